"""Sums over all tokens up to each one."""

import functools

import jax
import jax.numpy as jnp
from jax import lax


@functools.partial(jax.custom_jvp, nondiff_argnums=(1,))
def running_sum(x: jax.Array, reverse: bool = False) -> jax.Array:
    """The sum up to each token (in reverse: from it on) along axis 1 of x [B, T, ...].

    By `lax.cumsum` in reverse alone, which is a tree of sums. Forwards, JAX 0.11.2 has a GPU do a
    loop of T turns where T is not the last axis: 0.35 s for 131072 tokens.
    """
    if reverse:
        return lax.cumsum(x, axis=1, reverse=True)
    return jnp.flip(lax.cumsum(jnp.flip(x, 1), axis=1, reverse=True), 1)


@running_sum.defjvp
def _jvp(reverse, primals, tangents):
    (x,), (change,) = primals, tangents
    # Forwards, as its transpose, which gradients are made of, is in reverse.
    if reverse:
        return running_sum(x, True), jnp.flip(lax.cumsum(jnp.flip(change, 1), axis=1), 1)
    return running_sum(x), lax.cumsum(change, axis=1)
