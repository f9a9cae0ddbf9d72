"""Exported for any size (docs/contract.md): programs written by jax.export and read again."""

import functools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from harness import (
    assert_close,
    assert_same_bits,
    cut,
    floats,
    forward,
    inputs,
    on_floats,
    one_segment,
    shapes,
)
from jax import export
from mechanisms import MECHANISMS, SMALL, marked
from table_gsa import GSA
from table_log_linear import LOG_LINEAR
from test_sequence import packs

import jla.pallas

EXPORTED = [row for row in SMALL if not row.values[1].interpreted]


def symbolic(args, axes):
    """The arguments' shapes, with a symbolic batch and a symbolic length."""
    batch, time = export.symbolic_shape("b, t")

    def one(x, axes):
        names = {"B": batch, "T": time}
        shape = (names.get(n, size) for n, size in zip(axes.split(), x.shape, strict=True))
        return jax.ShapeDtypeStruct(tuple(shape), x.dtype)

    return {name: jax.tree.map(one, x, axes[name]) for name, x in args.items()}


def exported(run, args, axes):
    """`run(args)` as a program of bytes, read again."""
    made = export.export(jax.jit(run))(symbolic(args, axes))
    return export.deserialize(made.serialize()).call


@pytest.mark.parametrize(
    "mechanism, implementation, sizes",
    # One whose chunks are scanned, and the one that takes another way.
    marked("test_any_batch_and_length_from_a_state_with_segments", EXPORTED),
)
def test_any_batch_and_length_from_a_state_with_segments(mechanism, implementation, sizes):
    args, _ = inputs(mechanism, sizes)
    given = args | dict(segment_ids=packs(sizes))
    axes = mechanism.axes | dict(segment_ids="B T")
    run = functools.partial(mechanism.run, implementation=implementation.name)
    call = exported(lambda a: run(**a), given, axes)

    # Another batch, one row; `test_any_batch_and_length_alone` has another length.
    row = {n: x if n in mechanism.shared() else jax.tree.map(lambda x: x[:1], x)
           for n, x in given.items()}  # fmt: skip
    want = forward(mechanism, implementation, args, given["segment_ids"])
    want = jax.tree.map(lambda x: x[:1], want)
    assert_close(call(row), want, mechanism.tolerances["float32"][0])


@pytest.mark.parametrize(
    "mechanism, implementation, sizes",
    # Log-linear attention's form has no slots then; the others' start from zeros.
    marked("test_any_batch_and_length_alone", EXPORTED),
)
def test_any_batch_and_length_alone(mechanism, implementation, sizes):
    """Without a state and segments."""
    args, _ = inputs(mechanism, sizes)
    state = args[mechanism.state[0]]
    alone = {n: x for n, x in args.items() if n != mechanism.state[0]}
    run = functools.partial(mechanism.run, implementation=implementation.name)
    call = exported(lambda a: run(**a)[0], alone, mechanism.axes)
    zeros = args | {mechanism.state[0]: jax.tree.map(np.zeros_like, state)}
    want = forward(mechanism, implementation, zeros, one_segment(implementation, sizes))[0]
    got = call(cut(mechanism, alone, 0, 50))
    assert_close(got, want[:, :50], mechanism.tolerances["float32"][0])


@pytest.mark.parametrize("mechanism, implementation, sizes", EXPORTED)
def test_steps_and_gradients_of_any_batch_and_length(mechanism, implementation, sizes):
    args = shapes(mechanism, sizes)
    run = functools.partial(mechanism.run, implementation=implementation.name)

    def gradients(a):
        outputs = on_floats(lambda a: run(**a), a)
        return jax.grad(lambda x: sum(map(jnp.sum, outputs(x))))(floats(a))

    if implementation.name == "xla":  # the others' take no other way
        export.export(jax.jit(gradients))(symbolic(args, mechanism.axes))
    tokenwise, (name, step_name) = mechanism.tokenwise(), mechanism.state
    token = {n: jax.eval_shape(lambda x: x[:, 0], args[n]) for n in tokenwise}
    token |= {n: args[n] for n in mechanism.shared()} | {step_name: args[name]}
    axes = {n: x.replace("T ", "") if n in tokenwise else x for n, x in mechanism.axes.items()}
    axes[step_name] = axes[name]
    step = functools.partial(mechanism.step, implementation=implementation.name)
    exported(lambda a: step(**a), token, axes)


@pytest.mark.parametrize("implementation", ["reference", "xla"])
def test_positions_that_the_levels_do_not_serve_are_nan(implementation):
    """The length is known when the program runs; then nothing can be raised."""
    args, _ = inputs(LOG_LINEAR, dict(B=1, T=9, H=1, HK=1, K=16, V=16))
    del args["initial_state"]
    args["level_scales"] = args["level_scales"][..., :3]
    ids = jnp.array([[0] * 3 + [1] * 6])
    run = functools.partial(jla.log_linear_attention, implementation=implementation)
    call = exported(lambda a: run(**a), args, LOG_LINEAR.axes)
    o, state = call(args)
    np.testing.assert_array_equal(np.isnan(o[0, :, 0, 0]), [False] * 4 + [True] * 5)
    assert np.all(np.isnan(state.levels))
    axes = LOG_LINEAR.axes | dict(segment_ids="B T")
    o, _ = exported(lambda a: run(**a), args | dict(segment_ids=ids), axes)(
        args | dict(segment_ids=ids)
    )
    np.testing.assert_array_equal(np.isnan(o[0, :, 0, 0]), [False] * 7 + [True] * 2)


@pytest.mark.parametrize("implementation", ["reference", "xla"])
def test_abc(implementation):
    args, _ = inputs(GSA, dict(B=2, T=9, H=1, HQ=1, K=16, V=16, M=16))
    args = {n: args[n] for n in "qkvs"} | dict(segment_ids=jnp.array([[0] * 3 + [1] * 6, [0] * 9]))
    axes = GSA.axes | dict(segment_ids="B T")
    call = exported(lambda a: jla.gsa(**a, implementation=implementation), args, axes)
    assert_close(call(args), jla.gsa(**args, implementation="reference"), 1e-4)


@pytest.mark.parametrize(
    "mechanism", [m for m in MECHANISMS if m.form("pallas")], ids=lambda m: m.name
)
def test_the_kernels_want_known_sizes(mechanism):
    kernels = mechanism.form("pallas")
    args = shapes(mechanism, kernels.sizes, "bfloat16")
    run = jax.jit(lambda a: mechanism.run(**a, implementation="pallas"))
    with jla.pallas.interpret(), pytest.raises(NotImplementedError, match=r"symbolic.*xla"):
        export.export(run)(symbolic(args, mechanism.axes))


def test_an_empty_cache_for_any_batch():
    made = export.export(jax.jit(lambda x: jla.PathCache.empty(len_of(x), 8, 1, 16, 16)))(
        jax.ShapeDtypeStruct(export.symbolic_shape("b"), jnp.float32)
    )
    cache = export.deserialize(made.serialize()).call(jnp.zeros(3))
    assert isinstance(cache, jla.PathCache)
    chex.assert_shape(cache.key, (3, 8, 1, 16))
    assert_same_bits(cache, jla.PathCache.empty(3, 8, 1, 16, 16))


def len_of(x):
    return x.shape[0]
