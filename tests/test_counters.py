"""Positions and lengths at the end of int32, where jit knows no values to check."""

import contextlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jla
import jla.pallas
from jla import LogLinearState, PathCache

LAST = np.iinfo(np.int32).max
f32, bf16 = jnp.float32, jnp.bfloat16
each = pytest.mark.parametrize("implementation", ["reference", "xla"])
each_step = pytest.mark.parametrize("implementation", ["reference", "xla", "pallas"])


def context(implementation):
    return jla.pallas.interpret() if implementation == "pallas" else contextlib.nullcontext()


def ones(*shape, dtype=f32):
    return jnp.ones(shape, dtype)


def is_nan(x):
    return np.isnan(np.asarray(x, np.float32))


@each_step
def test_log_linear_steps(implementation):
    """The last position is served; what follows is NaN, for good."""
    x = ones(1, 1, 16, dtype=bf16)

    @jax.jit
    def step(state):
        options = dict(implementation=implementation)
        return jla.log_linear_step(x, x, x, -ones(1, 1), ones(1, 1, 32), state, **options)

    with context(implementation):
        state = LogLinearState(ones(1, 1, 32, 16, 16), jnp.full(1, LAST, jnp.int32))
        o, state = step(state)
        assert not np.any(is_nan(o)) and np.all(is_nan(state.levels))
        o, state = step(state)
        assert np.all(is_nan(o)) and np.all(is_nan(state.levels)) and state.position < 0
        state = state._replace(
            position=jnp.full(1, -1, jnp.int32), levels=0 * ones(1, 1, 32, 16, 16)
        )
        o, state = step(state)
        assert np.all(is_nan(o)) and np.all(is_nan(state.levels)) and state.position < 0


@each
def test_log_linear_run(implementation):
    x = ones(1, 3, 1, 16)

    @jax.jit
    def run(state):
        options = dict(initial_state=state, implementation=implementation)
        return jla.log_linear_attention(x, x, x, -ones(1, 3, 1), ones(1, 3, 1, 32), **options)

    state = LogLinearState(ones(1, 1, 32, 16, 16), jnp.full(1, LAST - 1, jnp.int32))
    o, state = run(state)
    np.testing.assert_array_equal(is_nan(o)[0, :, 0, 0], [False, False, True])
    assert np.all(is_nan(state.levels)) and state.position < 0
    assert np.all(is_nan(run(state)[0]))


def full_cache(length):
    cache = PathCache.empty(1, 8, 1, 16, 16, dtype=bf16)
    return cache._replace(length=jnp.full(1, length, jnp.int32))


@each_step
def test_path_steps(implementation):
    x, w = ones(1, 1, 16, dtype=bf16), ones(1, 1, 16) / 4

    @jax.jit
    def step(cache):
        return jla.path_step(x, x, x, w, ones(1, 1), None, cache, implementation=implementation)

    with context(implementation):
        for _ in range(2):
            o, cache = step(full_cache(LAST))
            assert np.all(is_nan(o)) and cache.length == LAST


@each
def test_path_run(implementation):
    x, w = ones(1, 3, 1, 16, dtype=bf16), ones(1, 3, 1, 16) / 4

    @jax.jit
    def run(cache, ids=None):
        options = dict(cache=cache, segment_ids=ids, implementation=implementation)
        return jla.path_attention(x, x, x, w, ones(1, 3, 1), **options)

    o, cache = run(full_cache(LAST - 1))
    assert np.all(is_nan(o)) and cache.length == LAST
    # A border empties it.
    o, cache = run(full_cache(LAST - 1), jnp.array([[0, 0, 1]]))
    np.testing.assert_array_equal(is_nan(o)[0, :, 0, 0], [True, True, False])
    assert cache.length == 1


def test_a_full_cache_is_refused_where_it_is_known():
    x, w = ones(1, 3, 1, 16, dtype=bf16), ones(1, 3, 1, 16) / 4
    with pytest.raises(ValueError, match="needs room for 2147483650"):
        jla.path_attention(x, x, x, w, ones(1, 3, 1), cache=full_cache(LAST))
