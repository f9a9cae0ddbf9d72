import pathlib
p = pathlib.Path("tests/test_examples_mesh.py"); s = p.read_text()
a = s.index('    for part in (made.shardings["params"]'); b = s.index("    pairs = zip(jax.tree.leaves(shapes)")
s = s[:a] + '''    # All kernels but those of convolutions and the second ones of gates, once and twice.
    for part, count in (("params", 11), ("moments", 22)):
        leaves = jax.tree.leaves(made.shardings[part])
        assert len([x for x in leaves if "data" in x.spec]) == count
''' + s[b:]
p.write_text(s)
