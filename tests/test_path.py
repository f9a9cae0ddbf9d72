"""PaTH attention beside the contract: no gates, a narrow w, a cache that overflows, PathCache."""

import functools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from comparing import normal, uniform
from evaluator import evaluated

import jla
from jla._core import blockwise, parts

B, T, H, HQ, K, V = 2, 30, 2, 4, 16, 24


def arguments(dtype="float32"):
    q, k, v, w = (
        normal(i, B, T, heads, size)
        for i, (heads, size) in enumerate(((HQ, K), (H, K), (H, V), (H, K)))
    )
    w = w / jnp.linalg.norm(w, axis=-1, keepdims=True)
    beta = 2 * uniform(4, B, T, H)
    return [x.astype(dtype) for x in (q, k, v, w, beta)]


def run(implementation, args, cache):
    """Traced, so that what does not fit cannot be refused; the contract's tests compile it."""
    call = jax.jit(
        lambda args, cache: jla.path_attention(*args, cache=cache, implementation=implementation)
    )
    return evaluated(call)(args, cache)


def test_without_gates_a_prefill_is_a_run_and_a_split_is_whole():
    args = arguments()
    cache = jla.PathCache.empty(B, 40, H, K, V)
    for implementation in ("reference", "xla"):
        call = jax.jit(functools.partial(jla.path_attention, implementation=implementation))
        alone, none = evaluated(call)(*args)
        assert none is None
        o, whole = run(implementation, args, cache)
        assert whole.decay is None
        chex.assert_trees_all_close(o, alone, rtol=1e-5, atol=1e-5)
        _, first = run(implementation, [x[:, :11] for x in args], cache)
        rest, both = run(implementation, [x[:, 11:] for x in args], first)
        chex.assert_trees_all_close((rest, both), (o[:, 11:], whole), rtol=1e-4, atol=1e-5)


def test_a_narrow_w_and_beta_are_used_in_float32():
    q, k, v, w, beta = arguments("bfloat16")
    wide = [x.astype(jnp.float32) for x in (q, k, v, w, beta)]
    want, _ = jla.path_attention(*wide, implementation="reference")
    call = jax.jit(functools.partial(jla.path_attention, implementation="xla"))
    got, _ = evaluated(call)(q, k, v, w, beta)
    assert got.dtype == jnp.bfloat16
    got = jnp.asarray(got, jnp.float32)
    assert jnp.linalg.norm(got - want) < 1e-2 * jnp.linalg.norm(want)


def test_tokens_that_find_no_room():
    """Their outputs are NaN; other rows, earlier tokens and the cached ones are as they were."""
    args = arguments()
    roomy = jla.PathCache.empty(B, 40, H, K, V)
    _, begun = run("reference", [x[:, :20] for x in args], roomy)
    short = begun._replace(length=jnp.array([20, 5]))
    want, after = run("reference", args, short)
    assert np.array_equal(after.length, [50, 35])
    missing = np.zeros((B, T), bool)
    missing[0, 20:] = True
    np.testing.assert_array_equal(np.isnan(want).all(axis=(2, 3)), missing)
    np.testing.assert_array_equal(np.isnan(want).any(axis=(2, 3)), missing)
    np.testing.assert_array_equal(after.value[0, :20], begun.value[0, :20])
    np.testing.assert_array_equal(after.value[0, 20:], args[2][0, :20])
    o, cache = run("xla", args, short)
    chex.assert_trees_all_close((o, cache), (want, after), rtol=1e-4, atol=1e-5)
    room = "room for 40 tokens, but row 0 has 20 in it and needs .*PathCache.empty sets the room"
    with pytest.raises(ValueError, match=room):
        jla.path_attention(*args, cache=short)
    for implementation in ("reference", "xla"):
        token = [x[:, 0] for x in args]
        step = jax.jit(
            lambda cache, token=token, implementation=implementation: jla.path_step(
                *token, None, cache, implementation=implementation
            )
        )
        o, again = evaluated(step)(after)
        assert np.isnan(o[0]).all() and np.isfinite(o[1]).all()
        np.testing.assert_array_equal(again.value[0], after.value[0])
        assert np.array_equal(again.length, [51, 36])


def test_empty_caches():
    cache = jla.PathCache.empty(2, 5, 3, 16, 32, query_heads=6, dtype=jnp.bfloat16)
    shapes = jax.tree.map(lambda x: (x.shape, x.dtype.name), cache)
    assert shapes == (
        ((2, 5, 3, 16), "float32"),
        ((2, 5, 3, 32), "bfloat16"),
        ((2, 5, 6), "float32"),
        ((2,), "int32"),
    )
    assert not any(map(jnp.any, cache))
    assert jla.PathCache.empty(2, 5, 3, 16, 32).decay is None
    with pytest.raises(ValueError, match="capacity must be at least 1, got 0"):
        jla.PathCache.empty(2, 0, 3, 16, 32)
    with pytest.raises(ValueError, match="query_heads must be at least 1, got 0"):
        jla.PathCache.empty(2, 5, 3, 16, 32, query_heads=0)
    with pytest.raises(TypeError, match="dtype must be bfloat16, float16 or float32, got int32"):
        jla.PathCache.empty(2, 5, 3, 16, 32, dtype=jnp.int32)


def test_chunks_in_groups_are_the_chunks_one_by_one():
    """Five chunks are two groups of four, the last ones empty; and one group of five."""
    N, C = 5, 4
    arrays = [0.5 * normal(i, N, B, H, C, 3) for i in range(3)]
    for g in (None, -uniform(3, N, B, H, C, 2)):
        one_by_one = jax.tree.map(lambda x: x[:, None], (*arrays, g))
        ends = []
        for groups in (parts.in_groups(*arrays, g), one_by_one):
            *tokens, maps, total = evaluated(jax.jit(parts.at_the_end))(*groups)
            tokens = jax.tree.map(lambda x: blockwise.merge(x, N * C), tokens)
            ends.append((tokens, maps, total))
        chex.assert_trees_all_close(*ends, rtol=1e-5, atol=1e-6)


def test_unit_lower_inverse():
    """Its worst: one direction for all tokens, and every map reflects."""
    for C, matrix in ((64, 2.0 * np.ones((64, 64))), (8, np.asarray(normal(0, 8, 8)))):
        matrix = np.tril(matrix, -1)
        inverse = evaluated(jax.jit(parts._unit_lower_inverse))
        got = inverse(jnp.asarray(matrix, jnp.float32)[None])[0]
        np.testing.assert_allclose(got @ (np.eye(C) + matrix), np.eye(C), atol=1e-4)


def test_many_chunks_are_a_loop():
    """Few steps are unrolled, and their operations take XLA time to compile; many are not."""

    def operations(T):
        def of(*axes):
            return jax.ShapeDtypeStruct((1, T, 1, *axes), jnp.float32)

        run = functools.partial(jla.path_attention, implementation="xla")
        return jax.jit(run).lower(of(16), of(16), of(16), of(16), of()).as_text().count("\n")

    most = 64 * parts.MOST_STEPS**2
    assert operations(4 * most) <= operations(most)
