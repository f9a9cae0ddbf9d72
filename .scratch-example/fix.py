import pathlib, re
p = pathlib.Path(".scratch-example/edit2.py"); s = p.read_text()
i = s.index(' ("""        names = (('); j = s.index(' ("""            axis = axes.get(')
s = s[:i] + s[j:]
s = s.replace('''    p.write_text(s)
sub("examples/checkpoint.py"''', '''    p.write_text(s)
p = pathlib.Path("examples/devices.py"); s = p.read_text()
i = s.index("        names = ("); j = s.index("    def __call__(self, params)")
s = s[:i] + """        axes = ((path, list(spec).index("data") - behind) for path, spec in leaves if "data" in spec)
        return cls(tuple((joined(path), axis) for path, axis in axes))

""" + s[j:]
p.write_text(s)
sub("examples/checkpoint.py"''')
s = s.replace('''p = pathlib.Path("examples/train_lm.py"); s = p.read_text()
def cut''', '''sub("examples/train_lm.py", ("""    return nats(model, params, tokens[:, :-1], tokens[:, 1:])


def nats(""", """    logits = model.apply({"params": params}, tokens[:, :-1])
    return optax.softmax_cross_entropy_with_integer_labels(logits, tokens[:, 1:])


def nats("""))
p = pathlib.Path("examples/train_lm.py"); s = p.read_text()
def cut''')
p.write_text(s)
