"""Blocks of 16 tokens, whose pairs are decayed by the product of two factors: KDA's use of
`jla.pallas.common.blocks`.

With G cumulated from the block's first token, without that token's own decay, the score of tokens
j <= i of a block is decayed by exp(G_i), which is at most one, times exp(-G_j), which is not. A row
whose own span, -G_i of every feature, is longer than LONGEST takes the tree of decays instead.
"""

import jax.numpy as jnp
from jax import lax

from jla.pallas.common import blocks, chunks, mosaic
from jla.pallas.common.chunks import CHUNK, LOG2E
from jla.pallas.common.mosaic import bf16, f16

LEVELS = 4  # of the tree, inside a block of SIZE tokens
SIZE = 1 << LEVELS
# The largest exponent of a positive power of two: exp(80).
LONGEST = 115.0
# Log decays not below this stay within it, rounded to float16 as they are.
WEAKEST = -0.999 * LONGEST / LOG2E / (SIZE - 1)


def tokens():
    """The chunk's token numbers, int32."""
    return chunks.tokens().astype(jnp.int32)


def _tokens():
    """And the first token of each one's block."""
    i = tokens()
    return i, lax.bitwise_and(i, jnp.full_like(i, -SIZE))


def so_far():
    """[i, m]: 1.0 if the decay of token m is in G_i, else 0.0: an operand."""
    i, first = _tokens()
    return mosaic.interval_operand(first + 1, i + 1, CHUNK, f16)


def reads(so_far):
    """exp(G), of the tokens that read."""
    return blocks.reads(so_far)


def writes(so_far):
    """exp(-G), of the tokens that are read."""
    return blocks.writes(so_far, LONGEST)


def pairs(dtype):
    """[i, j]: 1.0 if j is in i's block and j < i, else 0.0: an operand or a factor."""
    return blocks.up_to(dtype, SIZE, strict=True)


def are_pairs():
    """[i, j]: whether j is in i's block and j < i."""
    i, first = (x.astype(jnp.uint32) for x in _tokens())
    return mosaic.in_interval(first, i - first, CHUNK)


def level_pairs(level, *, symmetric):
    """[i, j]: 1.0 if the level serves the pair with j as the reader, or, symmetric, with either;
    else 0.0. As `blocks.level_pairs`, where i is the reader."""
    i = tokens()
    half = jnp.broadcast_to(lax.shift_left(jnp.int32(1), jnp.int32(level)), i.shape)
    first, right = lax.bitwise_and(i, -half), lax.bitwise_and(i, half) != 0
    start = jnp.where(right, first - half, first + half)
    end = start + half
    if not symmetric:
        end = jnp.where(right, start, end)
    return mosaic.interval_operand(start, end, CHUNK, bf16)


def level_decays(level):
    """[i, m]: 1.0 if `chunks.level_decay_mask` is true, else 0.0: an operand."""
    i = tokens()
    half = jnp.broadcast_to(lax.shift_left(jnp.int32(1), jnp.int32(level)), i.shape)
    first, right = lax.bitwise_and(i, -half), lax.bitwise_and(i, half) != 0
    start, end = jnp.where(right, first, i + 1), jnp.where(right, i + 1, first + half)
    return mosaic.interval_operand(start, end, CHUNK, f16)


def everywhere(dtype):
    """[i, j]: 1.0."""
    return mosaic.interval_operand(None, jnp.full_like(tokens(), CHUNK), CHUNK, dtype)
