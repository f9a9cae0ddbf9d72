"""What happens inside one chunk of 64 tokens, written once for every mechanism's kernels.

All of it runs in one warpgroup, on [64, 64] tiles: a float32 tile takes 32 registers a thread.
"""

import jax.numpy as jnp
from jax import lax
from jax.experimental.pallas import mosaic_gpu as plgpu

from jla.pallas.common import mosaic
from jla.pallas.common.mosaic import bf16, f16, f32, product, split

CHUNK = 64
LEVELS = 6  # log2(CHUNK)
TILE_WIDTH = 64  # features worked on at a time: a float32 tile is 32 registers a thread
LOG2E = 1.4426950408889634
STRONGEST = -3e4  # of `decay_operand`: finite sums in float16, and an exp2 of zero


def tokens():
    """The chunk's token numbers, a uint32 vector of layout PER_ROW."""
    return mosaic.row_numbers(CHUNK)


def up_to(*, strict=False):
    """[i, j]: j <= i, or j < i."""
    i = tokens()
    return _interval(jnp.zeros_like(i), i if strict else i + 1)


def from_on(*, strict=False):
    """[i, j]: j >= i, or j > i."""
    start = tokens() + (1 if strict else 0)
    return _interval(start, CHUNK - start)


def everywhere():
    """[i, j]: true."""
    i = tokens()
    return _interval(jnp.zeros_like(i), jnp.full_like(i, CHUNK))


def diagonal():
    """[i, j]: i = j."""
    i = tokens()
    return _interval(i, jnp.ones_like(i))


def level_decay_mask(level):
    """[i, m]: whether the decay of token m lies between token i and its block's middle.

    At a level, blocks of 2 * 2**level tokens have a left and a right half. A token of the right
    half reads from the block's middle on, so its decays are those from the middle to itself; a
    token of the left half is read from the middle on, so its decays are those after itself.
    """
    i, half, offset, right = _halves(level)
    start = jnp.where(right, i - offset, i + 1)
    length = jnp.where(right, offset + 1, half - 1 - offset)
    return _interval(start, length)


def level_pairs(level, *, reverse=False, symmetric=False, rows=None):
    """[i, j]: whether the level serves the pair: i in the right half of j's block, j in the left.

    With `reverse` the transpose, with `symmetric` both. With `rows`, a mask, of these i alone.
    """
    i, half, offset, right = _halves(level)
    first, nothing = i - offset, jnp.zeros_like(i)
    if symmetric:
        return _interval(jnp.where(right, first - half, first + half), half)
    if reverse:
        return _interval(first + half, jnp.where(right, nothing, half))
    length = jnp.where(right, half, nothing)
    return _interval(first - half, length if rows is None else jnp.where(rows, length, nothing))


def before_half(level):
    """[i, j]: whether j lies before the half block of i."""
    i, _, offset, _ = _halves(level)
    return _interval(jnp.zeros_like(i), i - offset)


def level_roles(level):
    """[i]: 1.0 for tokens that read at this level (right half), -1.0 for those that are read."""
    *_, right = _halves(level)
    return jnp.where(right, 1.0, -1.0).astype(f32)


def level_reads(level, dtype):
    """[i]: 1 for tokens that read at this level (right half), 0 for those that are read."""
    *_, right = _halves(level)
    return jnp.where(right, 1.0, 0.0).astype(dtype)


def _halves(level):
    """Token numbers, a half block's length, the place in the half, whether it is a right half."""
    i = tokens()
    half = jnp.broadcast_to(lax.shift_left(jnp.uint32(1), jnp.uint32(level)), i.shape)
    return i, half, lax.bitwise_and(i, half - 1), lax.bitwise_and(i, half) != 0


def _interval(start, length):
    return mosaic.in_interval(start, length, CHUNK)


def mask_operand(mask, dtype=f16):
    """A mask as wgmma's operand: 1.0 or 0.0."""
    return jnp.where(mask, 1.0, 0.0).astype(dtype)


def decay_operand(g):
    """Log decays as wgmma's operand for `decays`: base 2, float16.

    float16 errs by 2**-12 of an exponent x, that is by x exp(-x) 2**-12 < 1e-4 in the decay. The
    bound keeps the sums of a chunk finite; its exp2 is zero, so that a log decay of -inf still
    starts a segment: nothing before it remains.
    """
    return jnp.maximum(g * LOG2E, STRONGEST).astype(f16)


def decays(mask, log_decays):
    """exp2(mask @ log_decays), [64, 64] float32.

    Every row's log decays are summed directly and none is subtracted, so no exponent is positive
    and a huge decay elsewhere in the chunk costs no precision here.

    Args:
      mask: from `mask_operand`. log_decays: an SMEM tile of `decay_operand`.
    """
    return jnp.exp2(product((mask, log_decays)))


def unit_triangular_inverse(a, scratch):
    """(I + a)^-1 for a strictly lower triangular [64, 64] float32 `a` in registers.

    Block substitution: X is the inverse of the diagonal blocks of 2**level, and
    X - X L X, with L the part of `a` that joins two of them, that of the blocks twice as large.
    No power of `a` is formed, so keys that repeat with beta = 2 stay exact where doubling
    overflows. The levels work with bf16 operands; then a Newton step, X + X (I - (I + a) X), with
    the residual from 16 bits of each factor, squares their error. float16 operands would do without
    it, but overflow where keys are not normalised.

    Args:
      scratch: two [64, 64] bf16 SMEM tiles, overwritten.
    """

    rounded = a.astype(bf16)

    def level_step(level, x):
        joined = rounded * _level_pairs(level)
        return x - _rounded_product(x, _rounded_product(joined, x, scratch[0]), scratch[1])

    eye = jnp.where(diagonal(), 1.0, 0.0).astype(f32)
    x = lax.fori_loop(1, LEVELS, level_step, eye - jnp.where(level_pairs(0), a, 0.0))
    # Made again rather than kept: 32 registers a thread through the whole loop.
    eye = jnp.where(diagonal(), 1.0, 0.0).astype(f32)
    plgpu.commit_smem()
    residual = eye - x - precise_product(a, x, scratch)
    plgpu.commit_smem()
    return x + _rounded_product(x, residual, scratch[0])


def _level_pairs(level):
    """`level_pairs` as a factor, 1.0 or 0.0 in bf16."""
    i, half, offset, right = (x.astype(jnp.int32) for x in _halves(level))
    first = i - offset
    end = jnp.where(right != 0, first, first - half)
    return mosaic.interval_operand(first - half, end, CHUNK, bf16)


def _rounded_product(a, b, scratch):
    """a @ b for values in registers, rounded to bf16; `scratch`: a bf16 SMEM tile."""
    scratch[...] = b.astype(bf16)
    plgpu.commit_smem()
    return product((a.astype(bf16), scratch))


def precise_product(a, b, scratch):
    """a @ b for float32 values in registers, 16 bits of each kept; `scratch`: two bf16 tiles."""
    (a_high, a_low), (b_high, b_low) = split(a), split(b)
    high, low = scratch
    high[...] = b_high
    low[...] = b_low
    plgpu.commit_smem()
    return product((a_high, high), (a_low, high), (a_high, low))
