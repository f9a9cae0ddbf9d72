import pathlib
p = pathlib.Path(".scratch-example/edit2.py"); s = p.read_text()
i = s.index('p = pathlib.Path("examples/devices.py"); s = p.read_text()\ni = s.index("        names'); j = s.index('sub("examples/checkpoint.py"')
s = s[:i] + s[j:]
s = s.replace("        assert a in s, (path, a)\n", "        if b in s:\n            continue\n        assert a in s, (path, a)\n")
p.write_text(s)
t = pathlib.Path("tests/test_examples_mesh.py"); s = t.read_text()
s = s.replace('''TINY = (
    "--width''', '''TINY = [
    *"--width''').replace('''--implementation xla --text"
).split() + [str(ROOT / "LICENSE")]''', '''--implementation xla --text".split(),
    str(ROOT / "LICENSE"),
]''')
s = s.replace('''    *"--width 32 --depth 2 --heads 2 --length 16 --batch 4 --steps 4 --save-every 2 "
    "--evaluate-every''', '''    *"--width 32 --depth 2 --heads 2 --length 16 --batch 4 --steps 4 --save-every 2".split(),
    *"--evaluate-every''')
s = s.replace('''        for _ in range(1200):
            if (tmp_path / "metrics.jsonl").exists() and (tmp_path / "metrics.jsonl").read_text():
                break
''', '''        lines = tmp_path / "metrics.jsonl"
        for _ in range(1200):
            begun = lines.exists() and lines.read_text()
            if begun or any(process.poll() is not None for process in run):
                break
''')
s = s.replace("import devices\nimport train_lm\n", "import devices\nimport train_lm\n")
t.write_text(s)
