"""What the chunkwise forms share: spans and chunks, products of decays, triangular systems.

The tokens are cut into spans of L, the spans into chunks of C, and arrays are [..., L, D] with the
features last. C is a power of two, and quantities between two tokens of a chunk are built on a
dyadic tree: at level s = 1, 2, 4, ..., C/2 the tokens fall into blocks of 2s, and the level has the
pairs whose later token is in a block's right half and whose earlier one is in its left half. Every
pair of a chunk's tokens is in exactly one level.

The leading axes stay few because XLA's CPU compiler (jaxlib 0.12) aborts on a product of arrays of
rank 8: these have 5, and so two `vmap`s can be added.
"""

import functools

import jax
import jax.numpy as jnp
from jax import lax

from jla._core.blockwise import halves, transposed
from jla._core.lengths import chunk_size, is_symbolic_dim

CHUNK = 32
SPAN = 256


def layout(T):
    """The chunk's size C and the span's length L for T tokens.

    A shorter sequence has a smaller chunk, the power of two (2 at least) that holds it. Chunks are
    dealt to spans evenly, so that little is padded. A symbolic T has whole spans.
    """
    size = chunk_size(T, CHUNK)
    return size, span(T, size)


def span(T, size):
    """The span's length for T tokens in chunks of this size."""
    if is_symbolic_dim(T):
        return SPAN
    count = -(-T // size)
    spans = -(-count // (SPAN // size))
    return size * -(-count // spans)


def owners_by_span(owner, chunks, N):
    """The owners [B, M] of a run's chunks as a scan over spans takes them, [spans, B, chunks]; the
    last span is filled with chunks of no segment, N."""
    missing = -owner.shape[1] % chunks
    owner = jnp.pad(owner, ((0, 0), (0, missing)), constant_values=N)
    return jnp.moveaxis(owner.reshape(owner.shape[0], -1, chunks), 1, 0)


def tree_sizes(C):
    """The levels s = 1, 2, 4, ..., C/2."""
    return [1 << i for i in range(C.bit_length() - 1)]


def spread(x, like):
    """Broadcasts one of the last two axes of `x` from 1 to that of `like`, as a product with ones.

    For linear maps: the transpose of a broadcast is a sum, and XLA's CPU compiler sums several
    times more slowly than it does this product's transpose. Of `like` only the shape and the
    sharding count; it must not be linear in what the map is linear in.
    """
    ones = jnp.where(False, lax.stop_gradient(like), 1.0)
    factors = (ones[..., :1], x) if x.shape[-1] == like.shape[-1] else (x, ones[..., :1, :])
    return jnp.matmul(*factors, precision=lax.Precision.HIGHEST)


def total(x):
    """Sums over the last axis, as a product with ones: XLA's CPU compiler's sum takes longer."""
    ones = jnp.where(False, lax.stop_gradient(x[..., :1, :]), 1.0)
    return jnp.matmul(x, transposed(ones), precision=lax.Precision.HIGHEST)[..., 0]


def _tree(x, operation, neutral, C, apart=lambda level: level):
    """What `decay_products` says, for any associative operation and its neutral element.

    The operation broadcasts its first argument, where a half of a block has one total, [..., 1, K].
    What enters a level passes through `apart`.
    """
    prefix, suffix, total = x, jnp.full_like(x, neutral), x
    levels = []
    for s in tree_sizes(C):
        prefix, suffix, total = apart((prefix, suffix, total))
        prefix_left, prefix_right = halves(prefix, s)
        suffix_left, suffix_right = halves(suffix, s)
        total_left, total_right = halves(total, 1)
        levels.append((prefix_right, suffix_left))
        prefix = jnp.concatenate([prefix_left, operation(total_left, prefix_right)], axis=-2)
        suffix = jnp.concatenate([operation(total_right, suffix_left), suffix_right], axis=-2)
        prefix, suffix = prefix.reshape(x.shape), suffix.reshape(x.shape)
        total = operation(total_left, total_right)[..., 0, :]
    return levels, prefix, suffix, total


@functools.partial(jax.custom_jvp, nondiff_argnums=(1,))
def decay_products(g, C):
    """Products of decays between any two tokens of a chunk, each a product of factors <= 1.

    Differences of cumulated log decays lose all digits beside one strong gate, and their
    exponential overflows on the pairs that causality masks; products do neither. A decay of exactly
    0 (a gate of -inf) cuts everything that would pass it: that is how a segment starts.

    Args:
      g: log decays, [..., L, K], not positive.
      C: the chunk's size.

    Returns:
      levels: for every level s a pair, both [..., L/(2s), s, K]. For a token of a right half, the
        product from the half's first token to it. For a token of a left half, the product of the
        tokens after it in the half. Their product is the decay from the one to the other.
      prefix: from the chunk's first token to each token, [..., L, K].
      suffix: of the tokens after each, to the chunk's last, [..., L, K].
      total: of all a chunk's tokens, [..., L/C, K].
    """
    # Without the barriers XLA may fuse the tree into its users and compute it once for each. They
    # are before the levels' halves, which users then cut out themselves: fewer kernels to compile.
    barrier = lax.optimization_barrier
    levels, *others = _tree(jnp.exp(g), jnp.multiply, 1.0, C, barrier)
    return levels, *barrier(others)


@decay_products.defjvp
def _decay_products_jvp(C, primals, tangents):
    """A product changes by itself times the sum of its log decays' changes: the same tree, of sums.

    Every term has the product as a factor, so nothing is divided and nothing cancels.
    """
    (g,), (dg,) = primals, tangents

    def add(one, many):
        if one.shape != many.shape:
            one = spread(one, halves(g, many.shape[-2])[0])
        return one + many

    products = decay_products(g, C)
    return products, jax.tree.map(jnp.multiply, products, _tree(dg, add, 0.0, C))


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
        corner = _small_product(_small_product(right, lower), left)
        inverse = _block_lower(left, -corner, right)
    return inverse


def _small_product(x, y):
    """x @ y of square matrices; the smallest as a sum of outer products, which XLA fuses."""
    s = x.shape[-1]
    if s > 4:
        return x @ y
    return sum(x[..., :, i : i + 1] * y[..., i : i + 1, :] for i in range(s))
