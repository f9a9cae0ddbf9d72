"""NumPy's evaluation of a program is XLA's. Kernels and definitions are both evaluated, so that a
wrong rule would not show where they are compared."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from evaluator import assert_no_nan, evaluated
from jax import lax


def test_functions_of_numbers():
    def run(x, n):
        near = 0.1 * x
        floats = jnp.log(jnp.abs(x)), jnp.log1p(near), jnp.expm1(x), jax.nn.sigmoid(x)
        return *floats, jnp.square(x), lax.population_count(n)

    x = np.random.default_rng(0).standard_normal((3, 5), np.float32)
    _same(run, x, np.array([0, 1, -1, 255, 2**31 - 1], np.int32))


def test_moves():
    def run(x, start):
        padded = [
            lax.pad(x, jnp.float32(7), ((low, high, inner), (0, 2, 0)))
            for low, high, inner in ((0, 0, 0), (2, 1, 0), (-1, -2, 0), (-1, 2, 0), (1, -1, 1))
        ]
        moved = [lax.dynamic_update_slice(x, x[:2, :3] + 1, (start + i, i)) for i in (-9, 1, 9)]
        return padded, moved, lax.rev(x, (1,)), lax.split(x, (1, 3, 1), axis=1)

    _same(run, np.arange(20, dtype=np.float32).reshape(4, 5), np.int32(1))


def test_reductions():
    def run(x):
        some = x > 0
        along = [lax.cummax(x, 1, reverse=r) for r in (False, True)]
        also = [lax.cummin(x, 0, reverse=r) for r in (False, True)]
        return along, also, jnp.any(some, 0), jnp.all(some, 1), jnp.max(x, 1)

    _same(run, np.random.default_rng(1).standard_normal((4, 5), np.float32))


def test_calls():
    """A solution for its own gradient, and a function with a batching rule of its own."""

    @jax.custom_batching.custom_vmap
    def twice(x):
        return 2 * x

    @twice.def_vmap
    def _(_, batched, x):
        return 2 * x, batched[0]

    def run(a, b):
        def solve(_, b):
            return jnp.linalg.inv(a) @ b

        x = lax.custom_linear_solve(lambda x: a @ x, b, solve, lambda _, b: solve(_, b))
        return x, twice(x)

    random = np.random.default_rng(2).standard_normal((3, 4), np.float32)
    _same(run, random[:, :3] + 4 * np.eye(3, dtype=np.float32), random[:, 3])


def test_random_numbers():
    def run(key):
        keys = jax.random.split(key, 3)
        many = jax.vmap(lambda key: jax.random.bits(key, (4, 5)))(keys)
        return many, jax.random.bits(key, (7,), "uint8"), jax.random.normal(keys[0], (3,))

    _same(run, jax.random.key(3))


def test_nan_is_looked_for_where_jax_does():
    def masked(x):
        return jnp.where(x == 0, 0.0, x / x)

    gated = jax.custom_vjp(masked)
    gated.defvjp(lambda x: (masked(x), None), lambda *_: None)
    assert_no_nan(jax.jit(masked), 0.0)
    for run in (masked, gated):
        with pytest.raises(AssertionError, match=r"NaN of .* div"):
            assert_no_nan(run, 0.0)
        with pytest.raises(FloatingPointError), jax.debug_nans(True):
            run(jnp.float32(0))
    with pytest.raises(AssertionError, match=r"NaN of .* div"):
        assert_no_nan(lambda x: masked(0.1 * x + 0.1 * x), jnp.float32(2e-38))
    with pytest.raises(AssertionError, match=r"NaN of .* log"):
        assert_no_nan(lambda x: x + jnp.log(-jnp.ones(1)), 0.0)


def _same(run, *args):
    jitted = jax.jit(run)
    got, want = evaluated(jitted)(*args), jitted(*args)
    for x, y in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
        assert x.dtype == y.dtype
        np.testing.assert_allclose(x, y, rtol=2e-5, atol=1e-6)
