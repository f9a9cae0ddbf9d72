import pathlib
def edit(path, *pairs):
    p = pathlib.Path(path); s = p.read_text()
    for a, b in pairs:
        assert s.count(a) == 1, (path, a, s.count(a))
        s = s.replace(a, b)
    p.write_text(s)

edit("benchmarks/measure.py",
('''import functools
import math
import statistics
''', '''import collections
import functools
import math
import re
import statistics
'''),
('''    is written over donated arguments. `memory_peak_gib` is what the allocator saw, where it tells,
    and None if an earlier case of this process had a higher peak.
''', '''    is written over donated arguments. `memory_peak_gib` is what the allocator saw, where it tells,
    and None if an earlier case of this process had a higher peak. Both are one device's. Programs
    for several devices also have `collectives`.
'''),
('''    return run, dict(first_call_s=seconds, memory_gib=memory / 2**30, memory_peak_gib=peak)
''', '''    numbers = dict(first_call_s=seconds, memory_gib=memory / 2**30, memory_peak_gib=peak)
    if found := collectives(run.as_text()):
        numbers["collectives"] = found
    return run, numbers


def collectives(hlo):
    """How often each collective operation is in a compiled program's text."""
    words = "all-gather|all-reduce|all-to-all|reduce-scatter|collective-permute"
    return dict(collections.Counter(re.findall(rf" ({words})(?:-start)?\\(", hlo)))
'''))
edit("benchmarks/language_model.py",
('''def collectives(hlo):
    """How often each collective operation is in a compiled program's text."""
    words = "all-gather|all-reduce|all-to-all|reduce-scatter|collective-permute"
    return dict(collections.Counter(re.findall(rf" ({words})(?:-start)?\\(", hlo)))


''', ""),
("import collections\nimport math\nimport pathlib\nimport re\nimport statistics", "import functools\nimport math\nimport pathlib\nimport statistics"),
("from benchmarks.device_profile import profile\n", "from benchmarks.device_profile import profile\nfrom benchmarks.measure import collectives\n"),
('''from text import batch_at, load_text, split_text  # isort: skip
from train_lm import make_optimizer, train_step  # isort: skip
''', '''import devices  # isort: skip
from text import batch_at, load_text, split_text  # isort: skip
from train_lm import advance, make_optimizer, nats, train_step  # isort: skip
'''),
('''KEYS = ("mixer", "gpus")
''', '''KEYS = ("mixer", "gpus", "mesh", "replicated", "length")
'''),
('''The step, the optimizer and the batches are those of examples/train_lm.py. Several GPUs share the
batch through a mesh and shardings alone; each has --batch windows, so the step's tokens grow.
''', '''The step, the optimizer and the batches are those of examples/train_lm.py. With --gpus, several
share the batch through a mesh and shardings alone; each has --batch windows, so the step's tokens
grow. With --mesh the step is that of the example on a mesh, and each of data's devices, with those
that share its windows, has --batch of them.
'''),
('''        row = dict(mixer=mixer, gpus=options.gpus) | of_text
''', '''        row = dict(mixer=mixer, gpus=options.gpus, length=options.length) | of_text
        if options.mesh:
            row |= dict(mesh=options.mesh, replicated=options.replicated)
'''),
('''    add("--gpus", type=int, default=1, help="data parallelism over so many (default: 1)")
    options = side_by_side.parse(made, argv)
''', '''    several = made.add_mutually_exclusive_group()
    help = "data parallelism over so many (default: 1)"
    several.add_argument("--gpus", type=int, default=1, help=help)
    help = "the example on a mesh, as data=2,seq=2,model=1"
    several.add_argument("--mesh", type=devices.mesh_sizes(), help=help)
    add("--replicated", action="store_true", help="with --mesh: parameters whole on all devices")
    options = side_by_side.parse(made, argv)
    if options.replicated and not options.mesh:
        made.error("--replicated goes with --mesh")
    if options.mesh:
        options.gpus = math.prod(options.mesh.values())
        if options.length % options.mesh.get("seq", 1):
            made.error(f"--length {options.length} must be a multiple of seq in --mesh")
'''),
('''    B, T = options.batch * options.gpus, options.length
    mesh = Mesh(np.array(jax.devices()[: options.gpus]), ("data",))
    replicated, split = (NamedSharding(mesh, PartitionSpec(*axes)) for axes in ((), ("data",)))

    model = side_by_side.make_model(mixer, options, unroll=True)
''', '''    sizes = options.mesh or dict(data=options.gpus)
    B, T = options.batch * sizes.get("data", 1), options.length
    time = "seq" if sizes.get("seq", 1) > 1 else None
    # log_linear has parameters for the levels of so many tokens.
    model = side_by_side.make_model(
        mixer, options, unroll=True, axis_name=time, longest=max(2**14, T)
    )
'''),
('''    state = jax.device_put(state, replicated)
''', '''    arrange = over_mesh if options.mesh else by_shardings
    places, arrays, step = arrange(model, optimizer, state, options)
    state = jax.device_put(state, places)
'''),
('''        return jax.device_put(batch_at(data, step, seed=0, batch=B, length=T), split)
''', '''        return arrays(batch_at(data, step, seed=0, batch=B, length=T))
'''),
('''    def batch(step):
''', '''    def batch(number):
'''),
("batch_at(data, step, seed=0", "batch_at(data, number, seed=0"),
('''    lowered = train_step.lower(state, batch(1), model=model, optimizer=optimizer)
''', '''    lowered = step.lower(state, *batch(1))
'''),
('''        tokens = [batch(step) for step in range(first, first + GROUP)]
''', '''        tokens = [batch(number) for number in range(first, first + GROUP)]
'''),
('''            state, loss, _ = run(state, x)
''', '''            state, loss, _ = run(state, *x)
'''),
('''    yield dict(profile=profile(lambda: run(state, last)))
''', '''    yield dict(profile=profile(lambda: run(state, *last)))


def by_shardings(model, optimizer, state, options):
    """Data parallelism by shardings alone. Returns where the state lies, a function of windows that
    makes a step's arrays, and the jitted step of state and arrays."""
    mesh = Mesh(np.array(jax.devices()[: options.gpus]), ("data",))
    everywhere, split = (NamedSharding(mesh, PartitionSpec(*axes)) for axes in ((), ("data",)))
    step = jax.jit(
        functools.partial(train_step.__wrapped__, model=model, optimizer=optimizer),
        donate_argnums=0,
    )
    return everywhere, lambda windows: (jax.device_put(windows, split),), step


def over_mesh(model, optimizer, state, options):
    """As `by_shardings`, of the example on a mesh."""
    mesh = devices.make_mesh(options.mesh, jax.devices())
    spread = devices.Spread(
        mesh, model, optimizer, state, nats, advance, whole=options.replicated
    )
    return spread.shardings, spread.inputs_and_targets, spread.step
'''),
('''    print(f"[{seconds:6.1f} s] {row['mixer']}, {row['gpus']} GPUs", end="")
''', '''    print(f"[{seconds:6.1f} s] {row['mixer']}, {row['gpus']} GPUs", end="")
    if "mesh" in row:
        kept = "replicated" if row["replicated"] else "split"
        print(f", mesh {devices.shown(row['mesh'])}, parameters {kept}", end="")
'''),
)
edit("benchmarks/side_by_side.py",
('''            print(*(row[key] for key in self.keys), "FAILED", message[:2000], flush=True)
''', '''            print(*(row.get(key, "") for key in self.keys), "FAILED", message[:2000], flush=True)
'''),
('''all(old[k] == row[k] for k in self.keys)''','''all(old.get(k) == row.get(k) for k in self.keys)'''))
edit("benchmarks/mechanisms.py",
('''      unbatched: the arguments of the public function that have no batch axis.
''', '''      unbatched: the arguments of the public function that have no batch axis.
      quadratic: whether the work of a sequence grows with the square of its tokens.
'''),
('''    unbatched: tuple = ()
    forced''', '''    unbatched: tuple = ()
    quadratic: bool = False
    forced'''),
('''    Shape("long 131072", "long", 1, 131072),
''', '''    Shape("long 131072", "long", 1, 131072),
    Shape("context", "context", 1, 131072),
'''),
('''    Shape("long", "long", 1, 256, 2, 16),
''', '''    Shape("long", "long", 1, 256, 2, 16),
    Shape("context", "context", 1, 32, 2, 16),
'''),
('''        shapes=dict(full=_FULL, small=_SMALL),
        targets={
            ("main", "forward", "ms"): 0.9,
''', '''        shapes=dict(full=(*_FULL, _MILLION), small=(*_SMALL, replace(_MILLION, T=256, H=2, D=16))),
        targets={
            ("main", "forward", "ms"): 0.9,
'''),
('''

def _with_forced(shapes):
''', '''# One sequence over all devices, through a layer.
_MILLION = Shape("one sequence", "context", 1, 2**20, measures=("layer",))


def _with_forced(shapes):
'''),
('''    D is the dimension of keys and values, M''', '''    In the group "context" T are the tokens of each device, but for the measure "layer", whose T are
    those of all. D is the dimension of keys and values, M'''),
)
p = pathlib.Path("benchmarks/mechanisms.py"); s = p.read_text()
assert s.count("        fla=fla.path,\n    ),") == 1 and s.count("        fla=fla.path_fox,\n    ),") == 1
s = s.replace("        fla=fla.path,\n    ),", "        fla=fla.path,\n        quadratic=True,\n    ),").replace("        fla=fla.path_fox,\n    ),", "        fla=fla.path_fox,\n        quadratic=True,\n    ),")
p.write_text(s)
edit("benchmarks/run.py",
('''from benchmarks import fla
''', '''from benchmarks import context, fla
'''),
('''GROUPS = ("main", "step", "long", "ragged", "packed", "sweep", "slots", "grouped")
MEASURES = ("forward", "backward", "bare", "forced", "errors")
''', '''GROUPS = ("main", "step", "long", "ragged", "packed", "sweep", "slots", "grouped", "context")
MEASURES = ("forward", "backward", "bare", "forced", "errors", "layer")
'''),
('''COLUMNS = dict(ms="{:.4g}", spread="{:.1%}", per_token_of_main="{:.2f}")
''', '''COLUMNS = dict(ms="{:.4g}", spread="{:.1%}", per_token_of_main="{:.2f}", efficiency="{:.1%}")
'''),
('''    what += "commas; all where none of a kind is named"
''', '''    what += "commas; all where none of a kind is named, but context"
'''),
('''        named = not measures or what in measures or what.split("_")[0] in measures
        return named and''', '''        named = not measures or what in measures or what.split("_")[0] in measures
        if shape.group == "context":
            return named and "context" in groups
        return named and'''),
('''    timed = [c for c in table if c[2] in ("forward", "backward") and not c[1].packed]
''', '''    others = [c for c in table if not c[1].packed and c[1].group != "context"]
    timed = [c for c in others if c[2] in ("forward", "backward")]
'''),
('''        if implementation == "cudnn attention":
''', '''        if shape.group == "context":
            return context.measure(name, shape, what, implementation, options.seconds)
        if implementation == "cudnn attention":
'''),
('''    notes = [f"{name} {error:.1e}" for name, error in row.get("errors", {}).items()]
''', '''    notes = [f"{name} {error:.1e}" for name, error in row.get("errors", {}).items()]
    notes += [f"{name} {count}" for name, count in row.get("collectives", {}).items()]
    notes += [f"{row['devices']} devices"] if "devices" in row else []
'''),
)
