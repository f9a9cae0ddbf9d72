"""Clauses 7 and 8: JAX's transformations, sharding, determinism, compilation."""

import contextlib
import functools
import re

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from harness import (
    assert_close,
    assert_same_bits,
    floats,
    forward,
    inputs,
    on_floats,
    upcast,
    value_and_vjp,
    with_gradients,
)
from jax.sharding import AxisType, NamedSharding, PartitionSpec
from mechanisms import COMPILED, GRID, SMALL

P = PartitionSpec


def running(mechanism, implementation):
    return functools.partial(mechanism.run, implementation=implementation.name)


@pytest.mark.parametrize("mechanism, implementation, sizes", COMPILED)
def test_vmap_and_checkpoint(mechanism, implementation, sizes):
    """Gradients under vmap of a checkpointed run are those of the runs one by one."""
    dtype = implementation.dtypes[0]
    pairs = [inputs(mechanism, sizes, dtype, seed) for seed in (0, 1)]
    stacked = jax.tree.map(lambda *x: jnp.stack(x), *pairs)
    run = jax.checkpoint(lambda args: running(mechanism, implementation)(**args))

    @jax.jit
    @jax.vmap
    def both(args, cotangents):
        return with_gradients(run, args, cotangents)

    with implementation.context():
        got = both(*stacked)
    one_by_one = [value_and_vjp(mechanism, implementation, *pair) for pair in pairs]
    want = jax.tree.map(lambda *x: jnp.stack(x), *one_by_one)
    assert_close(got, want, mechanism.tolerances[dtype][1])


@pytest.mark.parametrize("mechanism, implementation, sizes", SMALL)
def test_linearize(mechanism, implementation, sizes):
    """The linear map at a point, applied to two tangents, is the definition's jvp."""
    dtype = implementation.dtypes[0]
    args, _ = inputs(mechanism, sizes, dtype)
    if not implementation.linearizes:
        with implementation.context(), pytest.raises(TypeError, match="forward-mode"):
            run = running(mechanism, implementation)
            _, linear = jax.linearize(on_floats(lambda a: run(**a), args), floats(args))
            linear(floats(args))
        return
    tangents = [inputs(mechanism, sizes, dtype, seed)[0] for seed in (1, 2)]
    run = running(mechanism, implementation)
    with implementation.context():
        _, linear = jax.linearize(jax.jit(on_floats(lambda a: run(**a), args)), floats(args))
        got = [linear(floats(tangent)) for tangent in tangents]

    @jax.jit
    def definition(tangent):
        run = functools.partial(mechanism.run, implementation="reference")
        of_floats = on_floats(lambda a: run(**a), upcast(args))
        return jax.jvp(of_floats, (floats(upcast(args)),), (floats(upcast(tangent)),))[1]

    want = [definition(tangent) for tangent in tangents]
    assert_close(got, want, mechanism.tolerances[dtype][1])


def specs(tree, mesh_axes):
    """PartitionSpecs for a tree of axis letters; `mesh_axes` maps letters to the mesh's axes."""
    return jax.tree.map(lambda axes: P(*(mesh_axes.get(x) for x in axes.split())), tree)


HEADS = ("H", "HV", "HQ", "HK")
BY_BATCH, BY_HEADS = {"B": "x"}, dict.fromkeys(HEADS, "x")


def sharding_case(mechanism, implementation, sizes, dtype, mesh_axes, axis_type):
    """Four rows and four of the least heads, whole, and placed on four virtual CPU devices or on
    the two or four GPUs there are."""
    devices = jax.devices(implementation.compiled_on)[:4]
    if implementation.compiled_on == "gpu" and len(devices) < 2:
        pytest.skip("needs two or four GPUs")
    assert len(devices) in (2, 4), devices
    mesh = jax.make_mesh((len(devices),), ("x",), (axis_type,), devices=devices)
    heads = {n: size for n, size in sizes.items() if n in HEADS}
    heads = {n: 4 * size // min(heads.values()) for n, size in heads.items()}
    whole = inputs(mechanism, dict(sizes) | heads | dict(B=4), dtype)
    splits = specs((dict(mechanism.axes), mechanism.outputs), mesh_axes)
    placed = jax.tree.map(
        lambda x, spec: jax.device_put(x, NamedSharding(mesh, spec)), whole, splits
    )
    return mesh, splits, whole, placed


@pytest.mark.parametrize("mesh_axes", [BY_BATCH, BY_HEADS], ids=["batch", "heads"])
@pytest.mark.parametrize("mechanism, implementation, sizes", COMPILED)
def test_sharded_under_jit(mechanism, implementation, sizes, mesh_axes):
    """Each device computes its own rows or heads, and tells the others nothing but whether to end a
    loop, and the gradients of what the rows share."""
    dtype = implementation.dtypes[0]
    mesh, splits, whole, placed = sharding_case(
        mechanism, implementation, sizes, dtype, mesh_axes, AxisType.Auto
    )
    want = value_and_vjp(mechanism, implementation, *whole)

    def both(args, cotangents):
        run = running(mechanism, implementation)
        return with_gradients(lambda a: run(**a), args, cotangents)

    shardings = jax.tree.map(lambda spec: NamedSharding(mesh, spec), splits[::-1])
    with implementation.context():
        run = jax.jit(both, out_shardings=shardings).lower(*placed).compile()
        got = run(*placed)
    allowed = {"pred[]"} if implementation.ends_together else set()
    if mesh_axes is BY_BATCH:
        shapes = [whole[0][name].shape for name in mechanism.shared()]
        allowed |= {f"f32[{','.join(map(str, shape))}]" for shape in shapes}
    collectives = "all-gather|all-to-all|collective-permute|all-reduce"
    found = re.findall(rf"= (.*?) ({collectives})\w*(?:-start)?\(", run.as_text())
    assert len(found) == len(re.findall(rf" (?:{collectives})[\w-]*\(", run.as_text()))
    assert all(kind == "all-reduce" and x.split("{")[0] in allowed for x, kind in found), found
    assert_close(got, want, mechanism.tolerances[dtype][1])


@pytest.mark.parametrize("explicit", [False, True], ids=["shard_map", "explicit_sharding"])
@pytest.mark.parametrize("mechanism, implementation, sizes", COMPILED)
def test_shardings_in_types(mechanism, implementation, sizes, explicit):
    """Inside shard_map, and where types carry shardings; the initial zeros must have them too."""
    dtype, state = implementation.dtypes[0], mechanism.state[0]
    mesh, splits, whole, placed = sharding_case(
        mechanism, implementation, sizes, dtype, BY_HEADS, AxisType.Explicit
    )
    axes, outputs = splits
    for args in (axes, whole[0], placed[0]):
        del args[state]
    if not mechanism.always_returns_state:
        outputs = outputs[0], None
        whole, placed = ((args, (cotangent, None)) for args, (cotangent, _) in (whole, placed))
    want = value_and_vjp(mechanism, implementation, *whole)

    def both(args, cotangents):
        run = running(mechanism, implementation)
        return with_gradients(lambda a: run(**a), args, cotangents)

    if not explicit:
        in_specs, out_specs = (axes, outputs), (outputs, axes)
        both = jax.shard_map(both, mesh=mesh, in_specs=in_specs, out_specs=out_specs)
    with implementation.context():
        got = jax.jit(both)(*placed)
    places = jax.tree.map(lambda spec: NamedSharding(mesh, spec), (outputs, axes))
    assert all(
        x.sharding.is_equivalent_to(place, x.ndim)
        for x, place in zip(jax.tree.leaves(got), jax.tree.leaves(places), strict=True)
    )
    assert_close(jax.device_get(got), want, mechanism.tolerances[dtype][1])


@pytest.mark.parametrize("mechanism, implementation, sizes", GRID)
def test_same_inputs_same_bits(mechanism, implementation, sizes):
    args, cotangents = inputs(mechanism, sizes, implementation.dtypes[0])
    first = value_and_vjp(mechanism, implementation, args, cotangents)
    again = jax.tree.map(jnp.copy, (args, cotangents))
    assert_same_bits(value_and_vjp(mechanism, implementation, *again), first)


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


@pytest.mark.parametrize("mechanism, implementation, sizes", COMPILED)
def test_new_contents_never_compile(mechanism, implementation, sizes):
    """Neither new numbers nor new segment borders; nor a length that was there before."""
    B, T = sizes["B"], sizes["T"]
    ids = [jnp.asarray(np.arange(T) // n, jnp.int32) * jnp.ones((B, 1), jnp.int32) for n in (7, 50)]
    dtype = implementation.dtypes[0]
    (one, _), (two, _) = (inputs(mechanism, sizes, dtype, seed) for seed in (0, 1))
    short = {n: x[:, : T - 5] if n in mechanism.tokenwise() else x for n, x in one.items()}
    run = running(mechanism, implementation)
    with implementation.context():
        run(**one, segment_ids=ids[0])
        run(**short)
        with compilations() as events:
            run(**two, segment_ids=ids[1])
            run(**short)
            run(**one, segment_ids=ids[1])
        assert not events
        # And the counter counts: a length never seen compiles, once for the whole function.
        new = {n: x[:, : T - 6] if n in mechanism.tokenwise() else x for n, x in one.items()}
        with compilations() as events:
            run(**new)
        assert len(events) == 1


@pytest.mark.parametrize("mechanism, implementation, sizes", SMALL)
def test_one_trace_for_all_contents(mechanism, implementation, sizes):
    T = sizes["T"]
    chex.clear_trace_counter()

    @jax.jit
    @chex.assert_max_traces(n=1)
    def run(args, segment_ids):
        return running(mechanism, implementation)(**args, segment_ids=segment_ids)

    for seed, length in enumerate((3, 40, T)):
        args, _ = inputs(mechanism, sizes, implementation.dtypes[0], seed)
        ids = jnp.broadcast_to(jnp.arange(T, dtype=jnp.int32) // length, (sizes["B"], T))
        with implementation.context():
            got = run(args, ids)
        assert_same_bits(got, forward(mechanism, implementation, args, ids))
