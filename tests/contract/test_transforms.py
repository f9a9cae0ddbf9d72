"""Programs, from docs/contract.md: under JAX's transformations, sharded without gathers, same
inputs, same bits, contents never compile."""

import contextlib
import functools
import math
import re

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from evaluator import evaluated
from harness import (
    assert_close,
    assert_same_bits,
    case,
    definition,
    floats,
    inputs,
    on_floats,
    shapes,
    upcast,
    value_and_vjp,
    with_gradients,
)
from jax.sharding import AxisType, NamedSharding, PartitionSpec
from mechanisms import COMPILED, GRID, MECHANISMS, SMALL, marked, short

P = PartitionSpec


def running(mechanism, implementation):
    return functools.partial(mechanism.run, implementation=implementation.name)


@pytest.mark.parametrize(
    "mechanism, implementation, sizes", marked("test_vmap_and_checkpoint", short(COMPILED))
)
def test_vmap_and_checkpoint(mechanism, implementation, sizes):
    """Gradients under vmap of a checkpointed run are the definition's of the runs one by one."""
    dtype = implementation.dtypes[0]
    pairs = [inputs(mechanism, sizes, dtype, seed) for seed in (0, 1)]
    stacked = jax.tree.map(lambda *x: np.stack(x), *pairs)
    run = jax.checkpoint(lambda args: running(mechanism, implementation)(**args))

    @jax.jit
    @jax.vmap
    def both(args, cotangents):
        return with_gradients(run, args, cotangents)

    with implementation.context():
        got = evaluated(both)(*stacked)
    one_by_one = [definition(mechanism, *pair) for pair in pairs]
    want = jax.tree.map(lambda *x: np.stack(x), *one_by_one)
    assert_close(got, want, mechanism.tolerances[dtype][1])


LINEARIZE = [row for row in SMALL if row.values[1].linearizes]


@pytest.mark.parametrize(
    "mechanism, implementation, sizes", marked("test_linearize", short(LINEARIZE))
)
def test_linearize(mechanism, implementation, sizes):
    """The linear map at a point, applied to two tangents, is the definition's jvp."""
    dtype = implementation.dtypes[0]
    args, _ = inputs(mechanism, sizes, dtype)
    tangents = [inputs(mechanism, sizes, dtype, seed)[0] for seed in (1, 2)]
    run = on_floats(lambda a: running(mechanism, implementation)(**a), args)

    @jax.jit
    def linearized(x, tangents):
        return jax.vmap(jax.linearize(jax.jit(run), x)[1])(tangents)

    stacked = jax.tree.map(lambda *x: np.stack(x), *map(floats, tangents))
    with implementation.context():
        both = evaluated(linearized)(floats(args), stacked)
    got = [jax.tree.map(lambda x, i=i: np.asarray(x)[i], both) for i in range(2)]

    @jax.jit
    def definition(tangent):
        run = functools.partial(mechanism.run, implementation="reference")
        of_floats = on_floats(lambda a: run(**a), upcast(args))
        return jax.jvp(of_floats, (floats(upcast(args)),), (floats(upcast(tangent)),))[1]

    want = [evaluated(definition)(tangent) for tangent in tangents]
    assert_close(got, want, mechanism.tolerances[dtype][1])


@pytest.mark.parametrize(
    "mechanism, implementation, sizes", [row for row in SMALL if row not in LINEARIZE]
)
def test_forward_mode_is_refused_by_name(mechanism, implementation, sizes):
    """However it is asked for. The steps have it: their derivatives are the definition's."""
    args, _ = inputs(mechanism, sizes, implementation.dtypes[0])
    run = on_floats(lambda a: running(mechanism, implementation)(**a), args)
    x = floats(args)

    def jvp(x, tangent):
        return jax.jvp(run, (x,), (tangent,))[1]

    def linearized(x, tangent):
        return jax.linearize(run, x)[1](tangent)

    def mapped(x, tangent):  # as `jax.jacfwd` does it
        return jax.vmap(jvp, (None, 0))(x, [t[None] for t in tangent])

    def gradient(x):
        return jax.grad(lambda x: sum(jnp.sum(y.astype(jnp.float32)) for y in run(x)))(x)

    message = f'jla.{mechanism.run.__name__}: .*forward-mode.*implementation="xla" has'
    with implementation.context():
        for differentiate in (jvp, linearized, mapped):
            with pytest.raises(NotImplementedError, match=message):
                jax.jit(differentiate).lower(x, x)
        with pytest.raises(NotImplementedError, match="derivatives of derivatives"):
            jax.eval_shape(lambda x: jax.jvp(gradient, (x,), (x,)), x)

        token = {n: args[n][:, 0] for n in mechanism.tokenwise()}
        token |= {n: args[n] for n in mechanism.shared()}
        token[mechanism.state[1]] = args[mechanism.state[0]]
        options = dict(implementation=implementation.name)
        step = on_floats(lambda a: mechanism.step(**a, **options), token)
        jax.eval_shape(lambda x: jax.jvp(step, (x,), (x,)), floats(token))


def specs(tree, mesh_axes):
    """PartitionSpecs for a tree of axis letters; `mesh_axes` maps letters to the mesh's axes."""
    return jax.tree.map(lambda axes: P(*(mesh_axes.get(x) for x in axes.split())), tree)


HEADS = ("H", "HV", "HQ", "HK")
MESH_AXES = {"B": "rows"} | dict.fromkeys(HEADS, "heads")


def sharding_case(mechanism, implementation, sizes, dtype, shape, axis_type):
    """Rows and heads enough for a mesh of that shape, whole, and placed on virtual CPU devices or
    on GPUs. An axis of the mesh with one device is not named."""
    devices = jax.devices(implementation.compiled_on)[: math.prod(shape)]
    if implementation.compiled_on == "gpu" and len(devices) < math.prod(shape):
        pytest.skip(f"needs {math.prod(shape)} GPUs")
    mesh = jax.make_mesh(shape, ("rows", "heads"), (axis_type,) * 2, devices=devices)
    heads = {n: size for n, size in sizes.items() if n in HEADS}
    times = math.ceil(shape[1] / min(heads.values()))
    heads = {n: times * size for n, size in heads.items()}
    whole = inputs(mechanism, dict(sizes) | heads | dict(B=max(sizes["B"], shape[0])), dtype)
    mesh_axes = {letter: axis for letter, axis in MESH_AXES.items() if mesh.shape[axis] > 1}
    splits = specs((dict(mechanism.axes), mechanism.outputs), mesh_axes)
    placed = jax.tree.map(
        lambda x, spec: jax.device_put(x, NamedSharding(mesh, spec)), whole, splits
    )
    return mesh, splits, whole, placed


def on_meshes(cpu, gpus):
    """COMPILED on these meshes; what runs on GPUs on those that two or four of them make."""
    for row in short(COMPILED):
        for shape in gpus if row.values[1].compiled_on == "gpu" else cpu:
            label = f"{row.id}-{shape[0]} by {shape[1]}"
            yield pytest.param(*row.values, shape, id=label, marks=row.marks)


BY_ROWS_AND_HEADS = list(on_meshes([(2, 2)], [(2, 2), (1, 2), (2, 1)]))
BY_HEADS = list(on_meshes([(1, 2)], [(1, 4), (1, 2)]))


@pytest.mark.parametrize(
    "mechanism, implementation, sizes, shape",
    # The first, and those with gathers of their own to avoid: conditions, sums over rows.
    marked("test_sharded_under_jit", BY_ROWS_AND_HEADS),
)
def test_sharded_under_jit(mechanism, implementation, sizes, shape):
    """Each device computes its own rows or heads, and tells the others nothing but whether to end a
    loop, and the gradients of what the rows share."""
    dtype = implementation.dtypes[0]
    mesh, splits, whole, placed = sharding_case(
        mechanism, implementation, sizes, dtype, shape, AxisType.Auto
    )
    want = definition(mechanism, *whole)

    def both(args, cotangents):
        run = running(mechanism, implementation)
        return with_gradients(lambda a: run(**a), args, cotangents)

    shardings = jax.tree.map(lambda spec: NamedSharding(mesh, spec), splits[::-1])
    with implementation.context():
        run = jax.jit(both, out_shardings=shardings).lower(*placed).compile()
        got = run(*placed)
    allowed = {"pred[]"} if implementation.ends_together else set()
    if shape[0] > 1:
        shared = [placed[0][name] for name in mechanism.shared()]
        parts = [x.sharding.shard_shape(x.shape) for x in shared]
        # XLA may drop axes of one element.
        parts += [[n for n in part if n > 1] for part in parts]
        allowed |= {f"f32[{','.join(map(str, part))}]" for part in parts}
    collectives = "all-gather|all-to-all|collective-permute|all-reduce"
    found = re.findall(rf"= (.*?) ({collectives})\w*(?:-start)?\(", run.as_text())
    assert len(found) == len(re.findall(rf" (?:{collectives})[\w-]*\(", run.as_text()))
    assert all(kind == "all-reduce" and x.split("{")[0] in allowed for x, kind in found), found
    assert_close(got, want, mechanism.tolerances[dtype][1])


@pytest.mark.parametrize(
    "explicit",
    [
        pytest.param(False, id="shard_map", marks=pytest.mark.slow),
        pytest.param(True, id="explicit_sharding"),
    ],
)
@pytest.mark.parametrize(
    "mechanism, implementation, sizes, shape", marked("test_shardings_in_types", BY_HEADS)
)
def test_shardings_in_types(mechanism, implementation, sizes, shape, explicit):
    """Inside shard_map, and where types carry shardings; the initial zeros must have them too."""
    dtype, state = implementation.dtypes[0], mechanism.state[0]
    mesh, splits, whole, placed = sharding_case(
        mechanism, implementation, sizes, dtype, shape, AxisType.Explicit
    )
    axes, outputs = splits
    for args in (axes, placed[0]):
        del args[state]
    zeros = jax.tree.map(np.zeros_like, whole[0][state])
    args, cotangents = whole[0] | {state: zeros}, whole[1]
    if not mechanism.always_returns_state:
        outputs = outputs[0], None
        placed = placed[0], (placed[1][0], None)
        cotangents = cotangents[0], jax.tree.map(np.zeros_like, cotangents[1])
    values, gradients = definition(mechanism, args, cotangents)
    del gradients[state]
    want = values if mechanism.always_returns_state else (values[0], None), gradients

    def both(args, cotangents):
        run = running(mechanism, implementation)
        return with_gradients(lambda a: run(**a), args, cotangents)

    if not explicit:
        in_specs, out_specs = (axes, outputs), (outputs, axes)
        both = jax.shard_map(both, mesh=mesh, in_specs=in_specs, out_specs=out_specs)
    # With the mesh set JAX also asks for shardings that it cannot infer.
    with implementation.context(), jax.set_mesh(mesh):
        got = jax.jit(both)(*placed)
    places = jax.tree.map(lambda spec: NamedSharding(mesh, spec), (outputs, axes))
    assert all(
        x.sharding.is_equivalent_to(place, x.ndim)
        for x, place in zip(jax.tree.leaves(got), jax.tree.leaves(places), strict=True)
    )
    assert_close(jax.device_get(got), want, mechanism.tolerances[dtype][1])


@pytest.mark.parametrize(
    "mechanism, implementation, sizes", marked("test_same_inputs_same_bits", GRID)
)
def test_same_inputs_same_bits(mechanism, implementation, sizes):
    first = case(mechanism, implementation, sizes)
    again = value_and_vjp(
        mechanism, implementation, first.args, first.cotangents, first.segment_ids
    )
    assert_same_bits(again, first.got)


@contextlib.contextmanager
def compilations():
    """A list that grows by one with every program that XLA compiles inside."""
    events = []

    def listen(event, duration, **_):
        if event == "/jax/core/compile/backend_compile_duration":
            events.append(duration)

    jax.monitoring.register_event_duration_secs_listener(listen)
    try:
        yield events
    finally:
        jax.monitoring.unregister_event_duration_listener(listen)


@pytest.mark.parametrize(
    "mechanism, implementation, sizes", marked("test_new_contents_never_compile", short(COMPILED))
)
def test_new_contents_never_compile(mechanism, implementation, sizes):
    """Neither new numbers nor new segment borders; nor a length that was there before."""
    B, T = sizes["B"], sizes["T"]
    ids = [np.tile(np.arange(T, dtype=np.int32) // n, (B, 1)) for n in (7, 50)]
    dtype = implementation.dtypes[0]
    (one, _), (two, _) = (inputs(mechanism, sizes, dtype, seed) for seed in (0, 1))
    short = {n: x[:, : T - 5] if n in mechanism.tokenwise() else x for n, x in one.items()}
    run = running(mechanism, implementation)
    with implementation.context():
        run(**one, segment_ids=ids[0])
        # The counter counts: a length never seen compiles, once for the whole function.
        with compilations() as events:
            run(**short)
        assert len(events) == 1
        with compilations() as events:
            run(**two, segment_ids=ids[1])
            run(**short)
            run(**one, segment_ids=ids[1])
        assert not events


@pytest.mark.parametrize(
    "mechanism", [m for m in MECHANISMS if not m.unrolls], ids=lambda m: m.name
)
def test_the_program_does_not_grow_with_the_chunks(mechanism):
    """XLA's time is that of the program's operations: no loop over chunks is unrolled."""
    sizes = mechanism.form("xla").sizes

    def operations(T):
        args = shapes(mechanism, dict(sizes) | dict(B=1, T=T))
        run = functools.partial(mechanism.run, implementation="xla")
        return jax.jit(lambda args: run(**args)).lower(args).as_text().count("\n")

    assert operations(512) <= operations(256)  # PaTH takes chunks in groups from four on


@pytest.mark.parametrize("mechanism, implementation, sizes", SMALL)
def test_one_trace_for_all_contents(mechanism, implementation, sizes):
    T = sizes["T"]
    chex.clear_trace_counter()

    @jax.jit
    @chex.assert_max_traces(n=1)
    def run(args, segment_ids):
        return running(mechanism, implementation)(**args, segment_ids=segment_ids)

    # The values are those of `test_packed_is_the_definition`.
    for seed, length in enumerate((3, 40, T)):
        args, _ = inputs(mechanism, sizes, implementation.dtypes[0], seed)
        ids = np.tile(np.arange(T, dtype=np.int32) // length, (sizes["B"], 1))
        with implementation.context():
            run.trace(args, ids)
