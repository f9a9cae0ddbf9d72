import pathlib
p = pathlib.Path(".scratch-example/edit2.py"); s = p.read_text()
i, j = s.index('sub("examples/checkpoint.py"'), s.index('sub("examples/train_lm.py"')
src = s[:i] + s[j:]
t = pathlib.Path("examples/processes.py"); x = t.read_text()
i, j = x.index("        help=f\"one of several"), x.index("    parser.add_argument(\"--processes\"")
x = x[:i] + '''        help=f"one of several processes: where the first one listens; {FOUND} under Slurm, Open "
        "MPI and others that jax.distributed.initialize() knows, which then says the rest, too",
    )
''' + x[j:]
t.write_text(x)
exec(src)
t = pathlib.Path("tests/test_examples_mesh.py"); x = t.read_text()
i, j = x.index("    sizes = jax.tree.map(\n"), x.index("    assert kept <")
x = x[:i] + '''    pairs = zip(jax.tree.leaves(shapes), jax.tree.leaves(made.shardings), strict=True)
    kept = sum(math.prod(sharding.shard_shape(x.shape)) for x, sharding in pairs)
    whole = sum(x.size for x in jax.tree.leaves(shapes))
''' + x[j:]
x = x.replace("import json\nimport os", "import json\nimport math\nimport os")
x = x.replace('''    assert "held out" in texts[0][0] and texts[1][0] == ""
''', '''    assert "held out" in texts[0][0]
    printed = texts[1][0].splitlines()  # gloo's own messages cannot be switched off
    assert all(line.startswith("[Gloo]") for line in printed)
''')
x = x.replace("import devices\nimport train_lm\n", "import devices  # noqa: E402\nimport train_lm  # noqa: E402\n") if "E402" not in pathlib.Path("pyproject.toml").read_text() else x
t.write_text(x)
