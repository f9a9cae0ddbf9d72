"""Padding: real tokens are moved to the front of their row, so that only right padding is left."""

import jax.numpy as jnp


def pack_left(mask):
    """Orders every row's tokens: the real ones first, in their order, the padded ones after.

    Args:
      mask: bool [B, T], True at real tokens, in any pattern.

    Returns:
      `order` and `inverse`, int32 [B, T], for `take_tokens`, and the number of real tokens in each
      row, int32 [B].
    """
    order = jnp.argsort(~mask, axis=1, stable=True).astype(jnp.int32)
    inverse = jnp.argsort(order, axis=1).astype(jnp.int32)
    return order, inverse, jnp.sum(mask, axis=1, dtype=jnp.int32)


def take_tokens(x, indices):
    """Selects `x[b, indices[b, i]]`; x is [B, T, ...], the indices are [B, N] and within bounds."""
    indices = indices.reshape(indices.shape + (1,) * (x.ndim - 2))
    return jnp.take_along_axis(x, indices, axis=1, mode="promise_in_bounds")
