import pathlib
def sub(path, *pairs):
    p = pathlib.Path(path); s = p.read_text()
    for a, b in pairs:
        if b in s:
            continue
        assert a in s, (path, a)
        s = s.replace(a, b)
    p.write_text(s)
sub("examples/checkpoint.py", ("""    To write, those of one run alone, all of them: the folder is made if it is missing, and what a killed process left
    unfinished is deleted.
""", """    To write, by one run alone, in all of its processes: the folder is made if it is missing, and
    what a killed process left unfinished is deleted.
"""))
sub("examples/devices.py", ("""f"--mesh {shown(sizes)} is a mesh of {count} devices, but there are {len(devices)}; the "
            "sizes multiplied must be that, and CUDA_VISIBLE_DEVICES can leave some of a host's "
            "GPUs out\"""", """f"--mesh {shown(sizes)} needs {count} devices, but there are {len(devices)}; the sizes "
            "multiplied must be that (CUDA_VISIBLE_DEVICES can leave some of a host's GPUs out)\""""),
 ("""            axis = axes.get(jax.tree_util.keystr(path, simple=True, separator="/"))
""", """            axis = axes.get(joined(path))
"""),
 ("""        return placed(mesh, jax.tree_util.keystr(path, simple=True, separator="/"), x.shape)
""", """        return placed(mesh, joined(path), x.shape)
"""),
 ("""@dataclasses.dataclass(frozen=True)
class Gather""", """def joined(path):
    \"\"\"A path of jax.tree_util as "blocks/mixer/o_proj/kernel".\"\"\"
    return jax.tree_util.keystr(path, simple=True, separator="/")


@dataclasses.dataclass(frozen=True)
class Gather"""))
sub("examples/processes.py", ("""f"one of several processes: where the first one listens; {FOUND} under Slurm, Open MPI "
        "and others that jax.distributed.initialize() knows, which then says the rest, too",
""", """f"one of several processes: where the first one listens; {FOUND} under Slurm, Open "
        "MPI and others that jax.distributed.initialize() knows, which then says the rest, too",
"""), ("""        if jax.process_count() > 1 and (first := exchange(description)[0]) != description:
            raise InputError(f"other options or another text than the first: {description}, {first}")
""", """        if jax.process_count() > 1 and (first := exchange(description)[0]) != description:
            raise InputError(
                f"its options or text are not the first process's: {description}, there {first}"
            )
"""))
sub("examples/train_lm.py", ("""    return nats(model, params, tokens[:, :-1], tokens[:, 1:])


def nats(""", """    logits = model.apply({"params": params}, tokens[:, :-1])
    return optax.softmax_cross_entropy_with_integer_labels(logits, tokens[:, 1:])


def nats("""))
p = pathlib.Path("examples/train_lm.py"); s = p.read_text()
def cut(a, b):
    global s
    i, j = s.index(a), s.index(b)
    out, s = s[i:j], s[:i] + s[j:]
    return out
metrics = cut("class Metrics:", "def parse(")
settings = cut("# What changes the numbers", "def adopt(")
check = cut("def check_settings(", "@functools.partial(jax.jit, static_argnames=\"model\")\ndef initial_params")
s = s.replace("from plot import plot_losses\n", "from plot import plot_losses\nfrom records import MODEL_SETTINGS, SETTINGS, Metrics, check_settings, describe\n")
s = s.replace("import json\n", "import json\n").replace("import os\n", "").replace("import zlib\n", "")
s = s.replace("""    python examples/train_lm.py --resume --steps 480
""", """    python examples/train_lm.py --resume --steps 480

--mesh data=2,seq=2,model=1 uses several devices, and --coordinator several processes (docs/scale.md
says how to start them); a run can be resumed on other ones.
""", 1)
p.write_text(s)
pathlib.Path("examples/records.py").write_text('"""What a run keeps of itself: the settings in its checkpoints, the lines of metrics.jsonl."""\n\nimport json\nimport os\nimport zlib\n\nimport processes\nfrom command_line import InputError, writing\n\n' + settings + check + metrics.rstrip() + "\n")
# from_checkpoint: what it shares
p = pathlib.Path("examples/from_checkpoint.py"); s = p.read_text()
cut("def mesh_sizes(string)", "def token_ids(")
cut("# Where heads, or what is inside", "@functools.cache  # see train_lm")
s = s.replace('type=mesh_sizes,', 'type=mesh_sizes(AXES),').replace("from jax.sharding import AxisType", "from devices import mesh_sizes, placed\nfrom jax.sharding import AxisType")
p.write_text(s)
