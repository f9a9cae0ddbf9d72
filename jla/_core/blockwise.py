"""Rows of tokens cut into blocks, and products of such blocks, in plain jax.numpy."""

import jax
import jax.numpy as jnp
from jax import lax

from jla._core.states import hidden


def spans(x, length):
    """Cuts [B, T, H, D] into spans [spans, B, L, H, D], the end padded with zeros.

    With one row this moves no data.
    """
    B, T, H, D = x.shape
    count = -(-T // length)
    x = jnp.pad(x, ((0, 0), (0, count * length - T), (0, 0), (0, 0)))
    return hidden(jnp.moveaxis(x.reshape(B, count, length, H, D), 1, 0))


def join(x, T):
    """Undoes `spans`: [spans, B, L, H, D] to [B, T, H, D]."""
    x = jnp.moveaxis(hidden(x), 0, 1)
    return x.reshape(x.shape[0], -1, *x.shape[3:])[:, :T]


def heads_first(x):
    """[B, L, H, D] to [B, H, L, D], and back; span by span, it needs no memory for the whole."""
    return jnp.swapaxes(x, 1, 2)


def split(x, length):
    """As `spans`, but heads before tokens: [spans, B, H, L, D]."""
    return jnp.swapaxes(spans(x, length), 2, 3)


def merge(x, T):
    """Undoes `split`."""
    return join(jnp.swapaxes(x, 2, 3), T)


def blocks(x, s):
    """Cuts the tokens into blocks of s: [..., L, D] to [..., L/s, s, D]."""
    return x.reshape(*x.shape[:-2], -1, s, x.shape[-1])


def halves(x, s):
    """The left and right halves of blocks of 2s tokens: [..., L, D] to two [..., L/(2s), s, D].

    `jnp.split` is `lax.split`, whose transpose is one concatenation; that of two slices would be a
    sum of two padded arrays.
    """
    return jnp.split(blocks(x, 2 * s), 2, axis=-2)


def transposed(x):
    """Exchanges the last two axes."""
    return jnp.swapaxes(x, -1, -2)


def product(x, y):
    """x y^T, over the last axis of both; the leading axes are batches.

    In a linear map whose argument is `x` the transpose is again a product that XLA's CPU compiler
    does quickly; products that contract an axis before the last, of the left operand, it does at
    half the speed, and tiny ones at a tenth.
    """
    batch = tuple(range(x.ndim - 2))
    return lax.dot_general(x, y, (((x.ndim - 1,), (y.ndim - 1,)), (batch, batch)))


def turned(x):
    """The transpose of `x`, made in memory so that it is not folded into a product that uses it.

    Around a product, it gives a linear map whose transpose turns first and multiplies then.
    """
    return transposed(lax.optimization_barrier(x))


@jax.custom_jvp
def pair_products(x, y):
    """`product(x, y)` where both are differentiated."""
    return product(x, y)


@pair_products.defjvp
def _pair_products_jvp(primals, tangents):
    (x, y), (dx, dy) = primals, tangents
    return product(x, y), product(dx, y) + turned(product(dy, x))
