"""Trains the example's language model with every mixer side by side: speed, memory, loss, profile.

The step, the optimizer and the batches are those of examples/train_lm.py. With --gpus, several
share the batch through a mesh and shardings alone; each has --batch windows, so the step's tokens
grow. With --mesh the step is that of the example on a mesh, and each of data's devices, with those
that share its windows, has --batch of them.
"""

import functools
import math
import pathlib
import statistics
import sys
import sysconfig
import time
import zlib

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from benchmarks import side_by_side, turns
from benchmarks.device_profile import profile
from benchmarks.measure import collectives

# Of the examples, whose folder side_by_side has added to the path.
import devices  # isort: skip
from text import batch_at, load_text, split_text  # isort: skip
from train_lm import advance, make_optimizer, nats, train_step  # isort: skip

PEAK = 989e12  # an H200's dense bfloat16 operations a second, by its data sheet
GROUP = 5  # steps enqueued together and awaited once
KEYS = ("mixer", "gpus", "mesh", "replicated", "scan", "length")


def main(argv=None):
    options = parse(argv)
    start = time.monotonic()
    report = side_by_side.Report(options.out, KEYS, "language_model", argv)
    text, name = corpus(options.text)
    data, _ = split_text(text, options.length)
    of_text = dict(text=name, text_bytes=len(text), text_crc32=zlib.crc32(text))
    print(f"{name}: {len(text):,} bytes", flush=True)
    for mixer in options.mixers:
        if options.limit is not None and time.monotonic() - start > options.limit:
            print(f"not started, past --limit: {mixer}", flush=True)
            continue
        row = dict(mixer=mixer, gpus=options.gpus, length=options.length) | of_text
        if options.mesh:
            row |= dict(mesh=options.mesh, replicated=options.replicated)
        if options.scan:
            row |= dict(scan=True)
        report.measure(row, train(mixer, data, options))
        show(row, time.monotonic() - start)
    return 1 if report.failed else 0


def parse(argv):
    made = side_by_side.parser("language_model", __doc__.splitlines()[0])
    add = made.add_argument
    add("--text", nargs="+", metavar="FILE", help="default: the standard library's *.py")
    add("--length", type=int, default=4096, help="bytes in a window")
    add("--batch", type=int, default=16, help="windows in a step, for each GPU")
    add("--steps", type=int, default=60)
    add("--lr", type=float, default=1e-3, help="peak learning rate")
    several = made.add_mutually_exclusive_group()
    help = "data parallelism over so many (default: 1)"
    several.add_argument("--gpus", type=int, default=1, help=help)
    help = "the example on a mesh, as data=2,seq=2,model=1"
    several.add_argument("--mesh", type=devices.mesh_sizes(), help=help)
    add("--scan", action="store_true", help="blocks in a scan: compiled once, and a little slower")
    add("--replicated", action="store_true", help="with --mesh: parameters whole on all devices")
    options = side_by_side.parse(made, argv)
    if options.replicated and not options.mesh:
        made.error("--replicated goes with --mesh")
    if options.mesh:
        options.gpus = math.prod(options.mesh.values())
        if options.length % options.mesh.get("seq", 1):
            made.error(f"--length {options.length} must be a multiple of seq in --mesh")
    if not 1 <= options.gpus <= jax.device_count():
        made.error(f"--gpus {options.gpus}: there are {jax.device_count()} devices")
    if options.steps < 2 * GROUP or options.steps % GROUP:
        made.error(f"--steps must be a multiple of {GROUP} and at least {2 * GROUP}")
    return options


def corpus(paths):
    """The text to train on, uint8 [N], and what to call it."""
    if paths:
        return load_text(paths), " ".join(paths)
    root = pathlib.Path(sysconfig.get_path("stdlib"))
    parts = (path.relative_to(root).parts for path in root.rglob("*.py"))
    # What was installed with pip is not the same on two machines.
    kept = sorted(p for p in parts if not {"site-packages", "dist-packages"} & set(p))
    files = [root.joinpath(*p) for p in kept]
    name = f"standard library of Python {sysconfig.get_python_version()}"
    return load_text([path for path in files if path.stat().st_size]), name


def train(mixer, data, options):
    """Yields the row's numbers: of the model, of compiling, of `options.steps` steps, a profile."""
    B, T, model = model_of(mixer, options)
    params = side_by_side.make_params(model)
    optimizer, _ = make_optimizer(options.steps, options.lr, weight_decay=0.1)
    state = dict(params=params, moments=optimizer.init(params))
    arrange = over_mesh if options.mesh else by_shardings
    places, arrays, lower = arrange(model, optimizer, state, options)
    state = jax.device_put(state, places)
    operations, parameters = model_operations(mixer, model, params, T), side_by_side.size(params)
    del params
    yield dict(
        implementation=None if mixer == "attention" else model.implementation,
        **dict(parameters=parameters, width=options.width, depth=options.depth),
        **dict(heads=options.heads, length=T, batch_per_gpu=options.batch, steps=options.steps),
        **dict(peak_rate=options.lr, operations_per_token=operations),
    )

    def batch(number):
        return arrays(batch_at(data, number, seed=0, batch=B, length=T))

    began = time.perf_counter()
    lowered = lower(state, *batch(1))
    traced = time.perf_counter()
    turns.to_compile()
    waited = time.perf_counter()
    run = lowered.compile()
    compiled = time.perf_counter()
    plan = run.memory_analysis()
    held = plan.argument_size_in_bytes + plan.output_size_in_bytes - plan.alias_size_in_bytes
    yield dict(
        trace_s=traced - began,
        compile_s=compiled - waited,
        memory_gib=(held + plan.temp_size_in_bytes) / 2**30,
        donated_gib=plan.alias_size_in_bytes / 2**30,
        collectives=collectives(run.as_text()),
    )

    turns.to_time()
    before = jax.devices()[0].memory_stats() or {}
    losses, ms = [], []
    for first in range(1, options.steps + 1, GROUP):
        tokens = [batch(number) for number in range(first, first + GROUP)]
        began = time.perf_counter()
        group = []
        for x in jax.block_until_ready(tokens):
            state, loss, _ = run(state, *x)
            group.append(loss)
        losses += map(float, jax.block_until_ready(group))
        ms.append(1e3 * (time.perf_counter() - began) / GROUP)
    if not math.isfinite(sum(losses)):
        raise RuntimeError(f"a loss is not finite: {losses}")
    after = jax.devices()[0].memory_stats() or {}
    # The allocator's peak is that of the process: it tells only if no case before had a higher one.
    peak = after.get("peak_bytes_in_use", 0)
    step_ms = statistics.median(ms[1:])
    speed = 1e3 * B * T / step_ms
    yield dict(
        memory_peak_gib=peak / 2**30 if peak > before.get("peak_bytes_in_use", 0) else None,
        step_ms=step_ms,
        step_ms_slowest=max(ms[1:]),
        tokens_per_s=speed,
        utilisation=speed * operations / (PEAK * options.gpus),
        tokens=options.steps * B * T,
        bits_per_byte=statistics.mean(losses[-GROUP:]) / math.log(2),
        losses=losses,
    )
    last = batch(options.steps + 1)
    yield dict(profile=profile(lambda: run(state, *last), run.as_text()))


def model_of(mixer, options):
    """The windows of a step, their length, and the model."""
    sizes = options.mesh or dict(data=options.gpus)
    axis = "seq" if sizes.get("seq", 1) > 1 else None
    # log_linear has parameters for the levels of so many tokens.
    longest = max(2**14, options.length)
    model = side_by_side.make_model(
        mixer, options, unroll=not options.scan, axis_name=axis, longest=longest
    )
    return options.batch * sizes.get("data", 1), options.length, model


def by_shardings(model, optimizer, state, options):
    """Data parallelism by shardings alone. Returns where the state lies, a function of windows that
    makes a step's arrays, and one of state and arrays that lowers the step."""
    mesh = Mesh(np.array(jax.devices()[: options.gpus]), ("data",))
    everywhere, split = (NamedSharding(mesh, PartitionSpec(*axes)) for axes in ((), ("data",)))
    lower = functools.partial(train_step.lower, model=model, optimizer=optimizer)
    return everywhere, lambda windows: (jax.device_put(windows, split),), lower


def over_mesh(model, optimizer, state, options):
    """As `by_shardings`, of the example on a mesh."""
    mesh = devices.make_mesh(options.mesh, jax.devices())
    spread = devices.Spread(mesh, model, optimizer, state, nats, advance, whole=options.replicated)
    return spread.shardings, spread.inputs_and_targets, spread.step.lower


def model_operations(mixer, model, params, length):
    """Floating-point operations of one token's training: three times those of the forward pass.

    The forward pass of a token has 2 for every parameter of a matrix product (the embedding counts
    once, as the last layer; convolutions, norms and gates do not count), and in every layer those
    of `mixer_operations`. Nothing that is done twice counts twice.
    """
    leaves = jax.tree_util.tree_leaves_with_path(params)
    products = [
        leaf.size
        for path, leaf in leaves
        if path[-1].key in ("kernel", "embedding") and not path[-2].key.endswith("conv1d")
    ]
    layers = model.config.layers
    heads, key_dim = layers[0].mixer.num_heads, layers[0].mixer.key_dim
    mixers = len(layers) * heads * mixer_operations(mixer, key_dim, length)
    return 3 * (2 * sum(products) + mixers)


def mixer_operations(mixer, key_dim, length):
    """Operations of one token and head in the forward pass, as the definitions have them.

    A state's update by k v^T and its product with a vector are 2 K V each. What is only a matter
    of an implementation (chunks, decays, more than one iteration of MesaNet's solver, PaTH's maps
    of queries and keys) does not count.
    """
    K = V = M = key_dim
    return {
        "kda": 6 * K * V,  # the state's product with k, its update, its product with q
        "gsa": 4 * M * (K + V),  # both states' update and product
        "log_linear": 2 * K * V * (2 + math.log2(length) / 2),  # half of the levels are there
        "mesa": 4 * K * K + 4 * K * V,  # both states' updates, x, the product with x
        "path": length * (K + V),  # the pairs of tokens, half of the square
        "attention": length * (K + V),
    }[mixer]


def show(row, seconds):
    print(f"[{seconds:6.1f} s] {row['mixer']}, {row['gpus']} GPUs", end="")
    if "mesh" in row:
        kept = "replicated" if row["replicated"] else "split"
        print(f", mesh {devices.shown(row['mesh'])}, parameters {kept}", end="")
    if "trace_s" in row:
        print(f", {row['parameters'] / 1e6:.1f} M parameters", end="")
        print(f", trace {row['trace_s']:.1f} s, compile {row['compile_s']:.1f} s", end="")
        print(f", {row['memory_gib']:.1f} GiB, {row['collectives'] or 'no collectives'}", end="")
    if "step_ms" in row:
        print(f"\n  step {row['step_ms']:.1f} ms (slowest {row['step_ms_slowest']:.1f})", end="")
        print(f", {row['tokens_per_s']:,.0f} tokens/s, MFU {row['utilisation']:.1%}", end="")
        print(f", {row['bits_per_byte']:.3f} bits/byte after {row['tokens']:,}", end="")
    if row.get("profile"):
        shares = ", ".join(f"{k} {x:.1%}" for k, x in row["profile"]["share"].items())
        print(f"\n  device busy {row['profile']['busy_ms']:.1f} ms: {shares}")
        for part in ("others", "passes"):
            for name, ms, count in row["profile"][part][:12]:
                print(f"    {ms:8.2f} ms {count:6.0f} {name[:90]}")
    print(flush=True)


if __name__ == "__main__":
    sys.exit(main())
