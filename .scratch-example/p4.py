import pathlib
p = pathlib.Path("examples/devices.py"); s = p.read_text()
s = s.replace('''                raise InputError(
                    f"parameter {joined(path)} has {name} = {size}, which must be a multiple of the "
                    f"{mesh.shape[axis]} devices of {axis} in --mesh"
''', '''                raise InputError(
                    f"parameter {joined(path)} has {name} = {size}, which must be a multiple of "
                    f"the {mesh.shape[axis]} devices of {axis} in --mesh"
''')
p.write_text(s)
p = pathlib.Path("tests/test_examples_mesh.py"); s = p.read_text()
s = s.replace('''            "cannot train this model on the mesh parameter blocks/mixer/b_proj/kernel has embed = 34 "
            "must be a multiple of the 4 devices of data",
''', '''            "cannot train this model on the mesh: parameter blocks/mixer/b_proj/kernel has "
            "embed = 34, which must be a multiple of the 4 devices of data",
''')
p.write_text(s)
p = pathlib.Path("tests/test_examples_checkpoint.py"); s = p.read_text()
s = s.replace("Config(300, 32, layers))", "Config(300, 32, layers, tied=False))")
p.write_text(s)
p = pathlib.Path("tests/linen/test_layer_mesh.py"); s = p.read_text()
s = s.replace('''    assert loops and loops <= set(parts)
''', '''    assert bool(loops) == (" while(" in text) and loops <= set(parts)
''')
p.write_text(s)
