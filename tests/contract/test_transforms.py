"""Clauses 7 and 8: JAX's transformations, sharding, determinism, compilation."""

import contextlib
import functools
import re

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from harness import assert_close, assert_same_bits, forward, inputs, upcast, value_and_vjp
from jax.sharding import NamedSharding, PartitionSpec
from mechanisms import GRID, SMALL

P = PartitionSpec


def running(mechanism, implementation):
    return functools.partial(mechanism.run, implementation=implementation.name)


@pytest.mark.parametrize("mechanism, implementation, sizes", SMALL)
def test_vmap_and_checkpoint(mechanism, implementation, sizes):
    """Gradients under vmap of a checkpointed run are those of the runs one by one."""
    dtype = implementation.dtypes[0]
    pairs = [inputs(mechanism, sizes, dtype, seed) for seed in (0, 1)]
    stacked = jax.tree.map(lambda *x: jnp.stack(x), *pairs)
    run = jax.checkpoint(lambda args: running(mechanism, implementation)(**args))

    @jax.jit
    @jax.vmap
    def both(args, cotangents):
        outputs, vjp = jax.vjp(run, args)
        return outputs, vjp(cotangents)[0]

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
    tangents = [inputs(mechanism, sizes, dtype, seed)[0] for seed in (1, 2)]
    run = running(mechanism, implementation)
    with implementation.context():
        _, linear = jax.linearize(jax.jit(lambda a: run(**a)), args)
        got = [linear(tangent) for tangent in tangents]

    @jax.jit
    def definition(tangent):
        run = functools.partial(mechanism.run, implementation="reference")
        return jax.jvp(lambda a: run(**a), (upcast(args),), (upcast(tangent),))[1]

    want = [definition(tangent) for tangent in tangents]
    assert_close(got, want, mechanism.tolerances[dtype][1])


def specs(tree, mesh_axes):
    """PartitionSpecs for a tree of axis letters; `mesh_axes` maps letters to the mesh's axes."""
    return jax.tree.map(lambda axes: P(*(mesh_axes.get(x) for x in axes.split())), tree)


# Letter to mesh axis. Every kind of head is split alike.
SHARDED = {
    "batch": {"B": "x"},
    "heads": {"H": "x", "HV": "x", "HQ": "x", "HK": "x"},
}


def sharding_case(mechanism, sizes, dtype):
    """Four rows and four times the key heads, on four virtual CPU devices."""
    heads = {n: 4 * s // sizes["H"] for n, s in sizes.items() if n in ("H", "HV", "HQ", "HK")}
    assert len(jax.devices("cpu")) >= 4
    mesh = jax.make_mesh((4,), ("x",), devices=jax.devices("cpu")[:4])
    return inputs(mechanism, dict(sizes) | heads | dict(B=4), dtype), mesh


@pytest.mark.parametrize("split", SHARDED)
@pytest.mark.parametrize("mechanism, implementation, sizes", SMALL)
def test_sharded_under_jit(mechanism, implementation, sizes, split):
    dtype = implementation.dtypes[0]
    (args, cotangents), mesh = sharding_case(mechanism, sizes, dtype)
    want = value_and_vjp(mechanism, implementation, args, cotangents)

    def shardings(tree):
        return jax.tree.map(lambda spec: NamedSharding(mesh, spec), specs(tree, SHARDED[split]))

    shardings = (shardings(dict(mechanism.axes)), shardings(mechanism.outputs))

    def both(args, cotangents):
        outputs, vjp = jax.vjp(lambda a: running(mechanism, implementation)(**a), args)
        return outputs, vjp(cotangents)[0]

    with implementation.context():
        placed = jax.device_put((args, cotangents), shardings)
        run = jax.jit(both, out_shardings=shardings[::-1]).lower(*placed).compile()
        got = run(*placed)
    collectives = r"all-gather|all-to-all|collective-permute|all-reduce"
    assert not re.findall(rf"{collectives}", run.as_text())
    assert_close(got, want, mechanism.tolerances[dtype][1])


@pytest.mark.parametrize("mechanism, implementation, sizes", SMALL)
def test_inside_shard_map(mechanism, implementation, sizes):
    dtype = implementation.dtypes[0]
    (args, cotangents), mesh = sharding_case(mechanism, sizes, dtype)
    want = value_and_vjp(mechanism, implementation, args, cotangents)
    mesh_axes = SHARDED["heads"]
    axes, outputs = specs(dict(mechanism.axes), mesh_axes), specs(mechanism.outputs, mesh_axes)

    @jax.jit
    @functools.partial(
        jax.shard_map, mesh=mesh, in_specs=(axes, outputs), out_specs=(outputs, axes)
    )
    def both(args, cotangents):
        values, vjp = jax.vjp(lambda a: running(mechanism, implementation)(**a), args)
        return values, vjp(cotangents)[0]

    with implementation.context():
        got = both(args, cotangents)
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


@pytest.mark.parametrize("mechanism, implementation, sizes", SMALL)
def test_new_contents_never_compile(mechanism, implementation, sizes):
    """Neither new numbers nor new segment borders; nor a length that was there before."""
    B, T = sizes["B"], sizes["T"]
    ids = [jnp.asarray(np.arange(T) // n, jnp.int32) * jnp.ones((B, 1), jnp.int32) for n in (7, 50)]
    dtype = implementation.dtypes[0]
    (one, _), (two, _) = (inputs(mechanism, sizes, dtype, seed) for seed in (0, 1))
    short = jax.tree.map(jnp.copy, {n: x[:, :T] for n, x in one.items()})
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

    @jax.jit
    @chex.assert_max_traces(n=1)
    def run(args, segment_ids):
        return running(mechanism, implementation)(**args, segment_ids=segment_ids)

    with implementation.context():
        for seed, length in enumerate((3, 40, T)):
            args, _ = inputs(mechanism, sizes, implementation.dtypes[0], seed)
            ids = jnp.asarray(np.arange(T) // length, jnp.int32)
            got = run(args, jnp.broadcast_to(ids, (sizes["B"], T)))
    assert_same_bits(
        got,
        forward(
            mechanism,
            implementation,
            args,
            jnp.zeros_like(ids)[None] * jnp.ones((sizes["B"], 1), jnp.int32),
        ),
    )
