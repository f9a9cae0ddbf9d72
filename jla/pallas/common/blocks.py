"""Blocks of tokens inside a chunk whose decays are the product of two factors.

The score of tokens j <= i of one block is decayed by exp(G_i - G_j). With G cumulated from the
block's start that is exp(G_i), which is at most one, times exp(-G_j), which is not. Both are exact
as long as nothing overflows, so a row takes this way if its own span, -G_i of every feature, is at
most LARGEST: then so are those of all j <= i. The other rows take the tree of decays
(`chunks.level_decay_mask`), which has no positive exponents.

Which way a row goes thus depends on no later token, and a row's value is the same to the bit
whatever the rest of its chunk does. A chunk without far rows skips the tree: a branch for each
chunk (`some_far`). In a chunk that has some, both ways are added, each with the other's rows
(`near`) zero in its operand.

A block is 16, 32 or 64 tokens. Spans are in base 2, as `chunks.decay_operand` makes them.
"""

import jax.numpy as jnp
from jax import lax
from jax.experimental.pallas import mosaic_gpu as plgpu

from jla.pallas.common import chunks, mosaic
from jla.pallas.common.chunks import CHUNK
from jla.pallas.common.mosaic import f16, f32, product
from jla.pallas.common.tiles import over_tiles

# exp(-G) is at most 2**64: another 2**63 are left to what it is multiplied by before float32
# overflows, and as much to what exp(G) is multiplied by before bfloat16 loses digits.
LARGEST = 64.0


def up_to(dtype, size=CHUNK, *, strict=False, rows=None):
    """[i, j]: 1.0 if j is in i's block, and j <= i, or j < i; else 0.0. An operand, or a factor.

    The pairs of a block; and of which tokens the decays from the block's start to i are. `rows`:
    None, or which rows i have any, bools of layout PER_ROW.
    """
    i = _tokens()
    start = None if size == CHUNK else i - lax.bitwise_and(i, jnp.full_like(i, size - 1))
    end = i if strict else i + 1
    if rows is not None:
        end = jnp.where(rows, end, 0)
    return mosaic.interval_operand(start, end, CHUNK, dtype)


def from_on(dtype, *, strict=False):
    """[i, j]: 1.0 if j >= i, or j > i; else 0.0."""
    i = _tokens()
    return mosaic.interval_operand(i + 1 if strict else i, None, CHUNK, dtype)


def diagonal(dtype):
    """[i, j]: 1.0 if i = j, else 0.0."""
    i = _tokens()
    return mosaic.interval_operand(i, i + 1, CHUNK, dtype)


def level_decays(level, log_decays):
    """The decays of `chunks.level_decay_mask`, [64, 64] float32."""
    i, half, middle, right = _halves(level)
    start = jnp.where(right, middle, i + 1)
    end = jnp.where(right, i + 1, middle + half)
    return chunks.decays(mosaic.interval_operand(start, end, CHUNK, f16), log_decays)


def level_pairs(level, dtype, *, reverse=False):
    """[i, j]: 1.0 if `chunks.level_pairs` is true, else 0.0."""
    _, half, first, right = _halves(level)
    if reverse:
        start = first + half
        return mosaic.interval_operand(start, jnp.where(right, start, start + half), CHUNK, dtype)
    start = first - half
    return mosaic.interval_operand(start, jnp.where(right, first, start), CHUNK, dtype)


def before_half(level, dtype):
    """[i, j]: 1.0 if j lies before the half block of i, else 0.0."""
    *_, first, _ = _halves(level)
    return mosaic.interval_operand(None, first, CHUNK, dtype)


def _halves(level):
    """Token numbers, a half block's length, the half's first token, whether it is a right half."""
    i = _tokens()
    half = jnp.broadcast_to(lax.shift_left(jnp.int32(1), jnp.int32(level)), i.shape)
    return i, half, lax.bitwise_and(i, -half), lax.bitwise_and(i, half) != 0


def _tokens():
    return chunks.tokens().astype(jnp.int32)


def decays_so_far(log_decays, size=CHUNK):
    """G, the sums of log decays from the block's start up to each token: [64, 64] float32, <= 0.

    log_decays: an SMEM tile of `chunks.decay_operand`.
    """
    return product((up_to(f16, size), log_decays))


def reads(so_far):
    """exp(G), float32: of the tokens that read, and of what they read of the block's past."""
    return jnp.exp2(so_far)


def writes(so_far, largest=LARGEST):
    """exp(-G), float32, of the tokens that are read; finite for far rows, and wrong there."""
    # Negated last: a product's negation could be made before the product is awaited.
    return jnp.exp2(-jnp.maximum(so_far, -largest))


def lowest(tiles):
    """[i]: the lowest G of row i, over all features: those of all tiles."""
    return over_tiles(jnp.minimum, [jnp.min(x, axis=1) for x in tiles])


def near(lowest, largest=LARGEST):
    """[i]: whether row i takes the factors: its own span is at most `largest`.

    False where a log decay is NaN.
    """
    return lowest >= -largest


def lowest_of_blocks(size=CHUNK):
    """The SMEM that `some_far` needs: its `place`."""
    return plgpu.SMEM((CHUNK,), f32)


def some_far(lowest, place, size=CHUNK, largest=LARGEST):
    """Whether any row of the chunk is far: a scalar, for all threads of the warpgroup.

    place: an SMEM ref of 64 float32, overwritten. Has a `commit_smem` in it.
    """
    place[...] = lowest
    plgpu.commit_smem()
    last = place[size - 1]  # sums only fall: a block's last row has its lowest
    for row in range(2 * size - 1, CHUNK, size):
        last = jnp.minimum(last, place[row])
    return ~(last >= -largest)
