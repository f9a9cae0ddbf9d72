"""How a case is measured: device time, first call, memory, errors. A case returns a dict."""

import collections
import concurrent.futures
import functools
import math
import re
import statistics
import time

import jax
import jax.numpy as jnp

from benchmarks.mechanisms import MECHANISMS, segment_borders

f32 = jnp.float32
# The hardware's generator: it compiles in a moment.
key = functools.partial(jax.random.key, impl="unsafe_rbg")
# The limits for bfloat16 inputs, of values and of gradients: "Equal to the definition" in
# docs/contract.md.
VALUE_LIMIT, GRADIENT_LIMIT = 1e-2, 2e-2
# Inputs of one timed loop are at least this large together; an H200's L2 holds 60 MB.
LARGER_THAN_L2 = 200e6


def measure(name, shape, measure, implementation, seconds):
    """Runs one case of the mechanism `name`."""
    mechanism = MECHANISMS[name]
    if measure == "errors":
        return errors(name, shape, implementation)
    if measure.startswith("step"):
        count = 16 if measure.startswith("step16") else 1
        return step(name, shape, implementation, count, measure.endswith("_bare"), seconds)
    sets = input_sets(name, shape, measure.startswith("bare_"))
    function = mechanism.forced if measure.startswith("forced_") else mechanism.function

    def forward(arguments, segments):
        options = segments | dict(implementation=implementation)
        if not measure.startswith("bare_"):
            if mechanism.whole is not None:
                return mechanism.whole(arguments, **options)[0]
            arguments = mechanism.prepare(arguments)
        return function(**arguments, **options)[0]

    return timed(forward, sets, measure.endswith("backward"), seconds)


def attention(name, shape, measure, seconds):
    """cuDNN's causal softmax attention at the same sizes, for scale."""
    # Log-linear attention's one key head serves all.
    sets = [raw for raw, _ in input_sets(name, shape, False)]
    if sets[0]["k"].shape[2] < sets[0]["v"].shape[2]:
        sets = [{x: jnp.broadcast_to(raw[x], raw["v"].shape) for x in "qkv"} for raw in sets]
    qkv = [{x: raw[x] for x in "qkv"} for raw in sets]

    def forward(x, segments):
        attend = functools.partial(jax.nn.dot_product_attention, is_causal=True)
        return attend(x["q"], x["k"], x["v"], implementation="cudnn")

    return timed(forward, [(x, {}) for x in qkv], measure == "backward", seconds)


@functools.lru_cache(maxsize=1)  # the cases of one shape follow each other
def input_sets(name, shape, bare):
    """Pairs of float inputs (raw, or prepared if `bare`) and segment ids, larger than L2."""
    mechanism = MECHANISMS[name]

    @jax.jit
    def make(draw):
        inputs = mechanism.raw(draw, shape.sizes)
        if bare:
            inputs = mechanism.prepare(inputs)
        segments = {}
        if shape.packed:
            borders = segment_borders(jax.random.fold_in(draw, 1), shape.B, shape.T)
            segments = dict(segment_ids=borders)
        return inputs, segments

    first = make(key(0))
    size = sum(x.nbytes for x in jax.tree.leaves(first))
    is_step = shape.group in ("step", "step_slots")
    count = 16 if is_step else min(16, math.ceil(LARGER_THAN_L2 / size))
    return jax.block_until_ready([first] + [make(key(i)) for i in range(1, count)])


def timed(forward, sets, backward, seconds, place=None):
    """Compiles and times `forward(inputs, segments)`, or it and its gradients together."""
    return compiling(forward, sets, backward, place)()(seconds)


def compiling(forward, sets, backward, place=None):
    """Lowers what `timed` times, and compiles it in another thread. Returns a function that waits
    for that and returns another, of the seconds, which times it.

    place: the sharding of its result, and so of the cotangent; None for one device. One that lies
    elsewhere would be moved at every call.
    """

    def forward_and_backward(inputs, segments, cotangent):
        o, pull = jax.vjp(lambda x: forward(x, segments), inputs)
        return o, pull(cotangent)

    arguments = sets
    if backward:
        o = jax.eval_shape(forward, *sets[0])
        draw = jax.jit(lambda: jax.random.normal(key(99), o.shape, o.dtype), out_shardings=place)
        cotangent = draw()
        arguments = [(*pair, cotangent) for pair in sets]
        jax.clear_caches()  # the first call is to trace all, whatever ran before
    began = time.perf_counter()
    lowered = jax.jit(forward_and_backward if backward else forward).lower(*arguments[0])

    def compiled():
        return lowered.compile(), time.perf_counter() - began

    pool = concurrent.futures.ThreadPoolExecutor(1)
    future = pool.submit(compiled)

    def ready():
        run, made_s = future.result()
        pool.shutdown()

        def timed_for(seconds):
            numbers = first_call(run, arguments[0], made_s)
            return numbers | device_time(lambda i: run(*arguments[i % len(arguments)]), seconds)

        return timed_for

    return ready


def first_call(run, arguments, made_s):
    """Runs an executable once, which was made in `made_s`; returns the time of both, and its
    memory.

    `memory_gib` is what the compiler plans beyond the arguments: temporaries and outputs, less what
    is written over donated arguments. `memory_peak_gib` is what the allocator saw, where it tells,
    and None if an earlier case of this process had a higher peak. Both are one device's. Programs
    for several devices also have `collectives`.
    """
    jax.block_until_ready(arguments)
    before = jax.devices()[0].memory_stats() or {}
    start = time.perf_counter()
    planned = run.memory_analysis()
    out = jax.block_until_ready(run(*arguments))
    seconds = time.perf_counter() - start
    del out
    after = jax.devices()[0].memory_stats() or {}
    peak = None
    if after.get("peak_bytes_in_use", 0) > before.get("peak_bytes_in_use", 0):
        peak = (after["peak_bytes_in_use"] - before["bytes_in_use"]) / 2**30
    memory = planned.temp_size_in_bytes + planned.output_size_in_bytes
    memory -= planned.alias_size_in_bytes
    numbers = dict(first_call_s=made_s + seconds, memory_gib=memory / 2**30, memory_peak_gib=peak)
    if found := collectives(run.as_text()):
        numbers["collectives"] = found
    return numbers


def collectives(hlo):
    """How often each collective operation is in a compiled program's text."""
    words = "all-gather|all-reduce|all-to-all|reduce-scatter|collective-permute"
    return dict(collections.Counter(re.findall(rf" ({words})(?:-start)?\(", hlo)))


def device_time(call, seconds, steps=1, rounds=2, repeats=5):
    """Times `call(i)`, i = 0, 1, ..., enqueued back to back and awaited once.

    One repeat lasts about `seconds` and gives the mean of its calls; a round is the median of its
    repeats; the fastest round is the result, and `spread` says how far apart the rounds are.
    """

    def mean(n):
        start = time.perf_counter()
        for i in range(n):
            out = call(i)
        jax.block_until_ready(out)
        return (time.perf_counter() - start) / n

    mean(2)
    n = max(1, min(2000, math.ceil(seconds / mean(3))))
    medians = [statistics.median(mean(n) for _ in range(repeats)) for _ in range(rounds)]
    best = min(medians)
    return dict(ms=1e3 * best / steps, spread=max(medians) / best - 1, calls=n * rounds * repeats)


def step(name, shape, implementation, count, bare, seconds):
    """Times decoding: `count` steps in one call, the state donated and chained from call to call.

    One step a call can be bound by the host's dispatch; 16 in one call are not.
    """
    mechanism = MECHANISMS[name]
    inputs = [pair[0] for pair in input_sets(name, shape, bare)]
    groups = [inputs[i : i + count] for i in range(0, 16, count)]

    @functools.partial(jax.jit, donate_argnums=0)
    def steps(state, inputs, slots):
        outputs = []
        for x in inputs:
            if outputs:
                # A token is known only after the one before: keeps XLA from preparing all at once.
                x, outputs[-1] = jax.lax.optimization_barrier((x, outputs[-1]))
            arguments = x if bare else mechanism.prepare(x)
            o, state = mechanism.step(arguments, state, implementation, **slots)
            outputs.append(o)
        return state, outputs

    sizes, slots = shape.sizes, {}
    if shape.R is not None:
        rows = jax.random.permutation(jax.random.key(3), shape.R)[: shape.B]
        sizes, slots = sizes | dict(B=shape.R, R=shape.R), dict(slots=rows.astype(jnp.int32))
    state = jax.jit(lambda draw: mechanism.state(draw, sizes))(key(7))
    # A copy for the first call, which consumes its state.
    first, began = (jax.tree.map(jnp.copy, state), groups[0], slots), time.perf_counter()
    run = steps.lower(*first).compile()
    numbers = first_call(run, first, time.perf_counter() - began)

    def call(i):
        nonlocal state
        state, outputs = run(state, groups[i % len(groups)], slots)
        return state, outputs

    return numbers | device_time(call, seconds, steps=count)


def errors(name, shape, implementation):
    """Relative Frobenius errors of o, the state and every gradient of the public function.

    The implementation runs the whole batch, the reference its last row on the same prepared inputs
    upcast to float32; cotangents are random in that row, zero elsewhere. Also: whether everything
    is finite and a second run gives the same bits.
    """
    mechanism = MECHANISMS[name]
    arguments, segments = input_sets(name, shape, True)[0]

    def values(arguments, segments, implementation):
        o, state = mechanism.function(**arguments, **segments, implementation=implementation)
        return dict(o=o, state=state)

    @functools.partial(jax.jit, static_argnums=3)
    def run(arguments, segments, cotangent, implementation):
        out, pull = jax.vjp(lambda x: values(x, segments, implementation), arguments)
        return out, pull(cotangent)[0]

    def draw(x):
        row = jnp.arange(x.shape[0]) == x.shape[0] - 1
        noise = jax.random.normal(key(x.ndim), x.shape, x.dtype)
        return noise * row.reshape(-1, *[1] * (x.ndim - 1)).astype(x.dtype)

    def last_row(tree):
        keep = mechanism.unbatched
        return {n: x if n in keep else jax.tree.map(lambda y: y[-1:], x) for n, x in tree.items()}

    def upcast(tree):
        return jax.tree.map(lambda x: x.astype(f32), tree)

    out = jax.eval_shape(functools.partial(values, implementation="xla"), arguments, segments)
    cotangent = jax.tree.map(draw, out)
    got = run(arguments, segments, cotangent, implementation)
    again = run(arguments, segments, cotangent, implementation)
    leaves = list(zip(jax.tree.leaves(got), jax.tree.leaves(again), strict=True))
    same_bits = all(bool(jnp.array_equal(a, b)) for a, b in leaves)
    finite = all(bool(jnp.isfinite(a).all()) for a, _ in leaves)
    del again, leaves
    one_row = (upcast(last_row(arguments)), last_row(segments), upcast(last_row(cotangent)))
    want = run(*one_row, "reference")

    found, problems = {}, [] if finite else ["not finite"]
    limits = (("", VALUE_LIMIT), ("d", GRADIENT_LIMIT))
    for (prefix, limit), a, b in zip(limits, map(last_row, got), want, strict=True):
        references = jax.tree.leaves(b)
        for (path, x), y in zip(jax.tree.leaves_with_path(a), references, strict=True):
            label = prefix + jax.tree_util.keystr(path, simple=True, separator=".")
            found[label] = float(jnp.linalg.norm(x.astype(f32) - y) / jnp.linalg.norm(y))
            if not found[label] <= limit:
                problems.append(f"{label} is over {limit:.0e}")
    if not same_bits:
        problems.append("two runs differ in bits")
    numbers = dict(errors=found, same_bits=same_bits)
    return numbers | (dict(error="; ".join(problems)) if problems else {})
