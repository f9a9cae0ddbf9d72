"""What the chunkwise forms share: spans and chunks, products of decays, triangular systems.

The tokens are cut into spans of L, the spans into chunks of C, and arrays are [..., L, D] with the
features last. C is a power of two, and quantities between two tokens of a chunk are built on a
dyadic tree: at level s = 1, 2, 4, ..., C/2 the tokens fall into blocks of 2s, and the level has the
pairs whose later token is in a block's right half and whose earlier one is in its left half. Every
pair of a chunk's tokens is in exactly one level.

The leading axes stay few because XLA's CPU compiler (jaxlib 0.12) aborts on a product of arrays of
rank 8: these have 5, and so two `vmap`s can be added.
"""

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name

CHUNK = 32
SPAN = 128

# Names of intermediate results for the policies of jax.checkpoint.
INVERSE, SOLUTION = "unit lower inverse", "unit lower solution"


def layout(T):
    """The chunk's size C and the span's length L for T tokens.

    A shorter sequence has a smaller chunk, the power of two (2 at least) that holds it. Chunks are
    dealt to spans evenly, so that little is padded.
    """
    size = min(CHUNK, max(2, 1 << (T - 1).bit_length()))
    count = -(-T // size)
    spans = -(-count // (SPAN // size))
    return size, size * -(-count // spans)


def split(x, length):
    """Cuts [B, T, H, D] into spans [spans, B, H, L, D], the end padded with zeros."""
    B, T, H, D = x.shape
    x = jnp.pad(x, ((0, 0), (0, -T % length), (0, 0), (0, 0)))
    return jnp.transpose(x.reshape(B, -1, length, H, D), (1, 0, 3, 2, 4))


def merge(x, T):
    """Undoes `split`: [spans, B, H, L, D] to [B, T, H, D]."""
    x = jnp.transpose(x, (1, 0, 3, 2, 4))
    return x.reshape(x.shape[0], -1, *x.shape[3:])[:, :T]


def tree_sizes(C):
    """The levels s = 1, 2, 4, ..., C/2."""
    return [1 << i for i in range(C.bit_length() - 1)]


def blocks(x, s):
    """Cuts the tokens into blocks of s: [..., L, D] to [..., L/s, s, D]."""
    return x.reshape(*x.shape[:-2], -1, s, x.shape[-1])


def halves(x, s):
    """The left and right halves of blocks of 2s tokens: [..., L, D] to two [..., L/(2s), s, D].

    `jnp.split` is `lax.split`, whose transpose is one concatenation; that of two slices would be a
    sum of two padded arrays.
    """
    return jnp.split(blocks(x, 2 * s), 2, axis=-2)


def decay_products(decay, C):
    """Products of decays between any two tokens of a chunk, each a product of factors <= 1.

    Differences of cumulated log decays lose all digits beside one strong gate, and their
    exponential overflows on the pairs that causality masks; products do neither. A factor of
    exactly 0 cuts everything that would pass it: that is how a segment starts.

    Args:
      decay: per-token factors exp(g) in [0, 1], [..., L, K].
      C: the chunk's size.

    Returns:
      levels: for every level s a pair, both [..., L/(2s), s, K]. For a token of a right half, the
        product from the half's first token to it. For a token of a left half, the product of the
        tokens after it in the half. Their product is the decay from the one to the other.
      prefix: from the chunk's first token to each token, [..., L, K].
      suffix: of the tokens after each, to the chunk's last, [..., L, K].
      total: of all a chunk's tokens, [..., L/C, K].
    """
    prefix, suffix, total = decay, jnp.ones_like(decay), decay
    levels = []
    for s in tree_sizes(C):
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
    """The left and right of neighbouring blocks: [..., 2n, s, s] to two [..., n, s, s]."""
    x = x.reshape(*x.shape[:-3], -1, 2, *x.shape[-2:])
    return (half.squeeze(-3) for half in jnp.split(x, 2, axis=-3))


def lower_triangular(diagonal, levels):
    """Assembles [..., L/C, C, C] from its diagonal [..., L] and its levels [..., L/(2s), s, s]."""
    matrix = diagonal[..., None, None]
    for lower in levels:
        left, right = _pairs(matrix)
        matrix = _block_lower(left, lower, right)
    return matrix


def unit_lower_inverse(levels):
    """Inverts I + L, L strictly lower triangular, given as its levels; [..., L/C, C, C].

    Block by block: inv [[X, 0], [L, Y]] = [[X^-1, 0], [-Y^-1 L X^-1, Y^-1]]. Every factor is the
    inverse of a diagonal block of the whole, so nothing grows that does not grow in the result.
    (A Neumann series of powers of L does, and cancels: for equal keys its terms reach 1e14.)
    """
    pair, *levels = levels
    one = jnp.ones_like(pair)
    inverse = _block_lower(one, -pair, one)
    for lower in levels:
        left, right = _pairs(inverse)
        inverse = _block_lower(left, -(right @ lower @ left), right)
    return inverse


@jax.custom_jvp
def unit_lower_solve(levels, x):
    """Solves (I + L) y = x, L as `unit_lower_inverse` takes it, x and y [..., L/C, C, D]."""
    return unit_lower_inverse(levels) @ x


@unit_lower_solve.defjvp
def _unit_lower_solve_jvp(primals, tangents):
    """dy = (I + L)^-1 (dx - dL y): two products, where the recursion's own rule has dozens.

    The inverse and y are named, so that a checkpoint can keep what this rule reads.
    """
    (levels, x), (d_levels, dx) = primals, tangents
    inverse = checkpoint_name(unit_lower_inverse(levels), INVERSE)
    y = checkpoint_name(inverse @ x, SOLUTION)
    d_lower = lower_triangular(jnp.zeros_like(x[..., 0]).reshape(*x.shape[:-3], -1), d_levels)
    return y, inverse @ (dx - d_lower @ y)
