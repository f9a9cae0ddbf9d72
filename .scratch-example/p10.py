exec(open(".scratch-example/p7.py").read().split("edit(\"benchmarks/measure.py\"")[0])
edit("benchmarks/side_by_side.py",
('''    add("--heads", type=int, default=8)
''', '''    add("--heads", type=int, default=8)
    add("--dtype", choices=("bfloat16", "float32"), default="bfloat16", help="of the computation")
'''),
('''    """The example's model in bfloat16; on a GPU the kernels are asked for by name."""
''', '''    """The example's model; on a GPU the kernels are asked for by name."""
'''),
('''    more |= dict(dtype="bfloat16", implementation=implementation)
''', '''    more |= dict(dtype=options.dtype, implementation=implementation)
'''))
edit("tests/test_model_benchmarks.py",
('''    over = [*options, "--mesh", "data=2"]
''', '''    over = [*options, "--mesh", "data=2", "--dtype", "float32"]  # XLA's CPU has no such 16-bit sums
'''))
