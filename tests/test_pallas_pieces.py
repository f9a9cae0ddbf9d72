"""Sequences run in pieces: values, gradients and races in the interpreter, and when it happens."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from comparing import normal
from evaluator import evaluated

import jla
import jla.pallas
from jla.pallas.common import pieces

f32, bf16 = jnp.float32, jnp.bfloat16


def arguments(T, H, HV, K, V):
    """Hardly any decay, so that the states, and not only the last tokens, decide the values."""

    def unit(seed):
        x = normal(seed, 1, T, H, K)
        return (x / jnp.linalg.norm(x, axis=-1, keepdims=True)).astype(bf16)

    v = normal(2, 1, T, HV, V).astype(bf16)
    g = -1e-3 * jnp.abs(normal(3, 1, T, HV, K))
    beta = jax.nn.sigmoid(normal(4, 1, T, HV))
    state = normal(5, 1, HV, K, V)
    return unit(0), unit(1), v, g, beta, state


@pytest.mark.parametrize(
    "sizes, number, has_start",
    [
        (dict(T=5 * 64, H=1, HV=1, K=64, V=64), 3, True),  # 2, 2 and 1 chunks
        # 3, 3, 3 and 2 chunks
        pytest.param(dict(T=11 * 64, H=1, HV=1, K=64, V=64), 4, True, marks=pytest.mark.slow),
        pytest.param(dict(T=6 * 64, H=1, HV=2, K=64, V=128), 2, True, marks=pytest.mark.slow),
        pytest.param(dict(T=6 * 64, H=1, HV=1, K=128, V=64), 2, False, marks=pytest.mark.slow),
    ],
    ids=str,
)
def test_is_the_reference(monkeypatch, sizes, number, has_start):
    asked = []
    monkeypatch.setattr(pieces, "number", lambda *shape: asked.append(shape) or number)
    *args, state = arguments(**sizes)
    args += [state] * has_start
    cotangents = normal(6, *args[2].shape), 0.1 * state

    def both(implementation, *args):
        def run(q, k, v, g, beta, initial_state=None):
            return jla.kda(
                q, k, v, g, beta, initial_state=initial_state, implementation=implementation
            )

        (o, state), vjp = jax.vjp(run, *args)
        return (o, state), vjp((cotangents[0].astype(o.dtype), cotangents[1]))

    with jla.pallas.interpret():
        got = evaluated(jax.jit(functools.partial(both, "pallas")))(*args)
    assert asked
    want = evaluated(jax.jit(functools.partial(both, "reference")))(*(x.astype(f32) for x in args))
    for ours, theirs, tolerance in zip(got, want, (1e-2, 2e-2), strict=True):
        for x, y in zip(ours, theirs, strict=True):
            x, y = np.asarray(x, np.float64), np.asarray(y, np.float64)
            assert np.linalg.norm(x - y) <= tolerance * np.linalg.norm(y)


@pytest.mark.slow  # two more passes, each interpreted
@pytest.mark.parametrize("number, chunks", [(1, 4), (3, 5)])  # of other shapes: traces are kept
def test_over_devices(monkeypatch, number, chunks):
    """Pieces of pieces: vmap's axis in the place of a mesh's, and a border in the first."""
    monkeypatch.setattr(pieces, "number_of_all", lambda *shape, **sizes: number)
    T = 2 * chunks * 64
    *args, state = arguments(T=T, H=1, HV=2, K=64, V=64)
    cotangents = normal(6, *args[2].shape), 0.1 * state
    ids = (jnp.arange(T) > 100).astype(jnp.int32)[None]

    def both(implementation, args, state, ids, cotangents, **options):
        def run(*args):
            *args, state = args
            options_ = dict(options, segment_ids=ids, implementation=implementation)
            return jla.kda(*args, initial_state=state, **options_)

        (o, end), vjp = jax.vjp(run, *args, state)
        return (o, end), vjp((cotangents[0].astype(o.dtype), cotangents[1]))

    def halves(x):
        return jnp.stack(jnp.split(x, 2, axis=1))

    def joined(x):
        return jnp.concatenate(list(x), axis=1)

    of_state = jnp.stack([cotangents[1], jnp.zeros_like(cotangents[1])])
    mapped = functools.partial(both, "pallas", axis_name="seq")
    mapped = jax.vmap(mapped, (0, None, 0, 0), axis_name="seq")
    with jla.pallas.interpret():
        pieces_ = [*map(halves, args)], state, halves(ids), (halves(cotangents[0]), of_state)
        (o, end), (*gradients, start) = jax.jit(mapped)(*pieces_)
        forward = jax.vmap(
            lambda args, ids: jla.kda(
                *args,
                initial_state=state,
                segment_ids=ids,
                axis_name="seq",
                implementation="pallas",
            ),
            axis_name="seq",
        )
        alone = jax.jit(forward)(pieces_[0], pieces_[2])
    jax.tree.map(np.testing.assert_array_equal, alone, (o, end))
    got = (joined(o), end[0]), (*map(joined, gradients), start.sum(0))
    whole = [x.astype(f32) for x in args], state, ids, cotangents
    want = jax.jit(functools.partial(both, "reference"))(*whole)
    for ours, theirs, tolerance in zip(got, want, (1e-2, 2e-2), strict=True):
        for x, y in zip(ours, theirs, strict=True):
            x, y = np.asarray(x, np.float64), np.asarray(y, np.float64)
            assert np.linalg.norm(x - y) <= tolerance * np.linalg.norm(y)


def test_only_few_heads_and_long_sequences_run_in_pieces():
    sizes = dict(K=128, V=128)
    assert pieces.number(128, 64, **sizes) == 1  # B=8 T=4096 H=16
    assert pieces.number(32, 2048, **sizes) == 1
    assert pieces.number(16, 64, **sizes) == 1  # B=1 T=4096
    assert pieces.number(16, 512, **sizes) == 5
    assert pieces.number(1, 2048, **sizes) == 64
    assert pieces.number(1, 2048, K=256, V=128) == 1
    for chunks in range(1, 3000, 7):
        count = pieces.number(1, chunks, **sizes)
        length = -(-chunks // count)
        assert (count - 1) * length < chunks  # none is empty


def test_pieces_of_a_device_fill_the_gpu():
    sizes = dict(K=128, V=128)
    # All of 4, or half of 8, run at once: half as many are next to each other in the second pass.
    assert pieces.number_of_all(16, 2048, **sizes) == 8
    assert pieces.number_of_all(128, 64, **sizes) == 1
    assert pieces.number_of_all(16, 2048, K=256, V=128) == 1
    for chunks in range(1, 3000, 97):
        count = pieces.number_of_all(1, chunks, **sizes)
        assert (count - 1) * -(-chunks // count) < chunks  # none is empty


@pytest.mark.slow  # two seconds
def test_first_passes_of_a_device_lower_for_cuda():
    B, H, N, K = 1, 16, 256, 128
    tokens = jax.ShapeDtypeStruct((B, N * 64, H, K), bf16)
    squares = jax.ShapeDtypeStruct((B, H, N, 64, 64), bf16)
    decay, beta = (jax.ShapeDtypeStruct((B, H, *x), f32) for x in ((N, K), (N * 64,)))
    state = jax.ShapeDtypeStruct((B, H, K, K), f32)

    def both(q, w, u, kg, do, decay, aq, beta, last_gradient):
        *made, factors = pieces.summary(w, u, kg, decay, beta)
        return made, pieces.gradient_summary(q, w, kg, do, decay, aq, beta, last_gradient, factors)

    traced = jax.jit(both).trace(*[tokens] * 5, decay, squares, beta, state)
    assert traced.lower(lowering_platforms=("cuda",)).as_text().count("@mosaic_gpu") == 2


@pytest.mark.parametrize(
    "warpgroups, chunks, want", [(256, 64, 1), (32, 512, 8), (32, 2048, 8), (2, 64, 1), (2, 256, 8)]
)
def test_number_of_pieces_where_a_multiprocessor_has_room_for_two(warpgroups, chunks, want):
    assert pieces.number_of_pairs(warpgroups, chunks) == want
