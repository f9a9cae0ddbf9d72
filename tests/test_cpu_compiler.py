"""What XLA's CPU compiler gets wrong (the last section of docs/jax.md) does not reach jla."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from comparing import normal

import jla
from jla._core import blockwise
from jla._core.states import zero_state

# The suite's own setting, and the one that programs have elsewhere.
SETTINGS = {
    "quick": {"xla_backend_optimization_level": 0, "xla_llvm_disable_expensive_passes": True},
    "optimized": {"xla_backend_optimization_level": 3, "xla_llvm_disable_expensive_passes": False},
}
settings = pytest.mark.parametrize("setting", SETTINGS)


def compiled(run, *args, setting):
    return jax.jit(run).lower(*args).compile(SETTINGS[setting])(*args)


def zeros(x):
    return zero_state(x[:, 0], jnp.zeros((2, 64)))


def constant_tokens(x):
    tokens = jnp.full((2, 32, 1, 64), 0.5)
    return blockwise.split(tokens, 32)[0, :, 0]


def constant_cotangent(x):
    """That of a sum of outputs: ones."""
    outputs = jnp.broadcast_to(x[None, :, None, :, :1], (1, 2, 1, 32, 64))
    _, pull = jax.vjp(lambda x: blockwise.merge(x, 32), outputs)
    return pull(jnp.ones((2, 32, 1, 64)))[0][0, :, 0]


@settings
@pytest.mark.parametrize("right", [zeros, constant_tokens, constant_cotangent])
def test_a_reduced_product_with_a_constant(right, setting):
    x = normal(0, 2, 32, 32)
    value = compiled(lambda x: jnp.max(x @ right(x), axis=-1), x, setting=setting)
    expected = np.max(np.asarray(x) @ np.asarray(right(x)), axis=-1)
    np.testing.assert_allclose(value, expected, atol=1e-4)


slow = functools.partial(pytest.param, marks=pytest.mark.slow)


@pytest.mark.parametrize(
    "T, M, setting",
    [
        (17, 64, "quick"),
        slow(17, 64, "optimized"),
        *(slow(*x, setting) for x in ((17, 32), (33, 64)) for setting in SETTINGS),
    ],
)
def test_gsa_without_a_state(T, M, setting):
    q, k, v, s, g = (normal(i, 1, T, 2, D) for i, D in enumerate((32, 32, 16, M, M)))
    args = q, k, v, jnp.abs(s), -0.001 * jnp.abs(g)
    values = compiled(lambda *x: jla.gsa(*x, implementation="xla"), *args, setting=setting)
    expected = jla.gsa(*args, implementation="reference")
    for x, y in zip(jax.tree.leaves(values), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(x, y, atol=1e-5 * float(jnp.max(jnp.abs(y))))
