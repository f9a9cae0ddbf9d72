"""What the chunkwise forms share: chunks, products of decays, unit lower-triangular matrices.

A chunk's arrays are [N, B, heads..., C, D]: chunk, batch, heads, token, feature. C is a power of
two, and quantities between two tokens of a chunk are built on a dyadic tree: at level s = 1, 2, 4,
..., C/2 the chunk falls into C/(2s) blocks of 2s tokens, and the tree treats the pairs whose later
token is in a block's right half and whose earlier one is in its left half. Every pair belongs to
exactly one level.
"""

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name

CHUNK = 64

# Names of intermediate results for the policies of jax.checkpoint.
INVERSE, SOLUTION = "unit lower inverse", "unit lower solution"


def chunk_size(T):
    """The chunk for T tokens: 64, or the power of two, 2 at least, that holds a shorter sequence."""
    return min(CHUNK, max(2, 1 << (T - 1).bit_length()))


def split(x, size):
    """Cuts [B, T, heads..., D] into chunks [N, B, heads..., C, D], the last padded with zeros."""
    B, T = x.shape[:2]
    x = jnp.pad(x, [(0, 0), (0, -T % size)] + [(0, 0)] * (x.ndim - 2))
    x = x.reshape(B, -1, size, *x.shape[2:])
    return jnp.moveaxis(jnp.moveaxis(x, 2, -2), 1, 0)


def merge(x, T):
    """Undoes `split`: [N, B, heads..., C, D] to [B, T, heads..., D]."""
    x = jnp.moveaxis(jnp.moveaxis(x, 0, 1), -2, 2)
    return x.reshape(x.shape[0], -1, *x.shape[3:])[:, :T]


def tree_sizes(C):
    """The levels s = 1, 2, 4, ..., C/2."""
    return [1 << i for i in range(C.bit_length() - 1)]


def halves(x, s):
    """Cuts the tokens of a chunk, [..., C, D], into the left and right halves of blocks of 2s.

    Returns a pair, both [..., C/(2s), s, D]. (`jnp.split` is `lax.split`, whose transpose is one
    concatenation; that of two slices is a sum of two padded arrays.)
    """
    x = x.reshape(*x.shape[:-2], -1, 2 * s, x.shape[-1])
    return jnp.split(x, 2, axis=-2)


def decay_products(decay):
    """Products of decays between any two tokens of a chunk, each a product of factors <= 1.

    Differences of cumulated log decays lose all digits beside one strong gate, and their
    exponential overflows on the pairs that causality masks; products do neither. A factor of
    exactly 0 cuts everything that would pass it: that is how a segment starts.

    Args:
      decay: per-token factors exp(g) in [0, 1], [..., C, K].

    Returns:
      levels: for every level s a pair, both [..., C/(2s), s, K]. For a token of a right half, the
        product from the half's first token to it. For a token of a left half, the product of the
        tokens after it in the half. Their product is the decay from the one to the other.
      prefix: from the chunk's first token to each token, [..., C, K].
      suffix: of the tokens after each, to the chunk's last, [..., C, K].
      total: of all the chunk's tokens, [..., 1, K].
    """
    prefix, suffix = decay, jnp.ones_like(decay)
    total = decay
    levels = []
    for s in tree_sizes(decay.shape[-2]):
        prefix_left, prefix_right = halves(prefix, s)
        suffix_left, suffix_right = halves(suffix, s)
        total_left, total_right = halves(total, 1)
        levels.append((prefix_right, suffix_left))
        prefix = jnp.concatenate([prefix_left, total_left * prefix_right], axis=-2)
        suffix = jnp.concatenate([suffix_left * total_right, suffix_right], axis=-2)
        prefix, suffix = prefix.reshape(decay.shape), suffix.reshape(decay.shape)
        total = (total_left * total_right)[..., 0, :]
    return levels, prefix, suffix, total


def _block_lower(left, lower, right):
    """[[left, 0], [lower, right]]."""
    top = jnp.concatenate([left, jnp.zeros_like(left)], axis=-1)
    return jnp.concatenate([top, jnp.concatenate([lower, right], axis=-1)], axis=-2)


def _pairs(x):
    """The left and right of every two neighbouring blocks, [..., 2n, s, s] to two [..., n, s, s]."""
    x = x.reshape(*x.shape[:-3], -1, 2, *x.shape[-2:])
    return (half.squeeze(-3) for half in jnp.split(x, 2, axis=-3))


def lower_triangular(diagonal, levels):
    """Assembles [..., C, C] from its diagonal [..., C] and its levels' blocks [..., C/(2s), s, s]."""
    matrix = diagonal[..., None, None]
    for lower in levels:
        left, right = _pairs(matrix)
        matrix = _block_lower(left, lower, right)
    return matrix[..., 0, :, :]


def unit_lower_inverse(levels):
    """Inverts I + L, L strictly lower triangular, given as its levels' blocks; [..., C, C].

    Block by block: inv [[X, 0], [L, Y]] = [[X^-1, 0], [-Y^-1 L X^-1, Y^-1]]. Every factor is the
    inverse of a diagonal block of the whole, so nothing grows that does not grow in the result.
    (A Neumann series of powers of L does, and cancels: for equal keys its terms reach 1e18.)
    """
    pair, *levels = levels
    one = jnp.ones_like(pair)
    inverse = _block_lower(one, -pair, one)
    for lower in levels:
        left, right = _pairs(inverse)
        inverse = _block_lower(left, -(right @ lower @ left), right)
    return inverse[..., 0, :, :]


@jax.custom_jvp
def unit_lower_solve(levels, x):
    """Solves (I + L) y = x, L strictly lower triangular, given as its levels' blocks."""
    return unit_lower_inverse(levels) @ x


@unit_lower_solve.defjvp
def _unit_lower_solve_jvp(primals, tangents):
    """dy = (I + L)^-1 (dx - dL y): two products, where the recursion's own rule has dozens.

    The inverse and y are named, so that a checkpoint can keep what this rule reads.
    """
    (levels, x), (d_levels, dx) = primals, tangents
    inverse = checkpoint_name(unit_lower_inverse(levels), INVERSE)
    y = checkpoint_name(inverse @ x, SOLUTION)
    d_lower = lower_triangular(jnp.zeros_like(inverse[..., 0]), d_levels)
    return y, inverse @ (dx - d_lower @ y)
