"""Normalisation without parameters."""

import jax.numpy as jnp
from jax import lax


def l2norm(x, epsilon=1e-6):
    """`x / sqrt(sum(x**2) + epsilon)` over the last axis, computed in float32, in x's dtype."""
    x32 = x.astype(jnp.float32)
    squares = jnp.sum(x32 * x32, axis=-1, keepdims=True)
    return (x32 * lax.rsqrt(squares + epsilon)).astype(x.dtype)
