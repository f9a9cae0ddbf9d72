"""PaTH's tree over leaves of tokens: its counts, and the gates from and to its levels' middles.

Two leaves i > j meet at one level: the highest bit in which i and j differ. At a level, leaves of
right halves have a version of their queries, and leaves of left halves, whose right half is not
empty, one of their keys. All versions of all levels are one array of leaves: a level's leaves in
their order. So are the transforms of the blocks of 2**level leaves: one array of blocks.
"""

import jax.numpy as jnp
from jax import lax

f16, f32 = jnp.float16, jnp.float32


def number(leaves):
    """The number of levels."""
    return (leaves - 1).bit_length()


def query_counts(leaves):
    """The number of leaves with a query version, level by level."""
    levels = range(number(leaves))
    return [(leaves >> m + 1 << m) + max(leaves % (2 << m) - (1 << m), 0) for m in levels]


def key_counts(leaves):
    """The number of leaves with a key version, level by level."""
    return [(leaves - (1 << m) - 1) // (2 << m) + 1 << m for m in range(number(leaves))]


def block_counts(leaves):
    """The number of whole blocks of 2**level leaves, for all levels but the last (if not alone)."""
    return [leaves >> m for m in range(max(number(leaves) - 1, 1))]


def rounded(w):
    """w in 16 bits; what keeps beta's reflections ones, for beta |w|^2 stays what it was.

    Returns:
      w, and the factors for beta [B, T, H], or None where w is not float32 and stays as it is.
    """
    if w.dtype != f32:
        return w, None
    out = w.astype(f16)
    before, after = (jnp.sum(jnp.square(x.astype(f32)), -1) for x in (w, out))
    return out, before / jnp.where(after == 0.0, 1.0, after)


def gradient_unit(v, do, dlse):
    """A power of two for each key head, with which the logits' gradients fit in float16.

    Those of a row sum to at most 2 (|do| |v| + |dlse|), in absolute value.
    """

    def largest(x):
        return x.max(1).reshape(*v.shape[::2], -1).max(-1)

    do, v = (jnp.sqrt(jnp.sum(jnp.square(x.astype(f32)), -1)) for x in (do, v))
    bound = largest(do) * largest(v) + largest(jnp.abs(jnp.swapaxes(dlse, 1, 2)))
    return jnp.exp2(jnp.floor(14 - jnp.log2(jnp.maximum(bound, 1e-30))))


def by_leaf(x, size):
    """[B, T, H, ...] as [B, H, P, size, ...], padded with zeros."""
    x = jnp.moveaxis(x, 2, 1)
    x = jnp.pad(x, [(0, 0), (0, 0), (0, -x.shape[2] % size), *[(0, 0)] * (x.ndim - 3)])
    return x.reshape(*x.shape[:2], -1, size, *x.shape[3:])


def _halves(x, axis, leaves):
    """Splits an axis of leaves in blocks of two halves of `leaves`, padded with zeros."""
    x = jnp.pad(x, [(0, -n % (2 * leaves) if i == axis else 0) for i, n in enumerate(x.shape)])
    x = x.reshape(*x.shape[:axis], -1, 2, leaves, *x.shape[axis + 1 :])
    return lax.index_in_dim(x, 0, axis + 1, False), lax.index_in_dim(x, 1, axis + 1, False)


def _leaves(x, axis):
    return x.reshape(*x.shape[:axis], -1, *x.shape[axis + 2 :])


def level_sums(g, size):
    """The sums of the gates between the levels' middles and the tokens of the versions.

    Args:
      g: gates of the logits, [B, T, HQ] float32; -inf at a segment's first token.
      size: tokens of a leaf.

    Returns:
      From a level's middle to each query, [B, HQ, R], and from each key to the middle, [B, HQ, S].

    Sums begin at the middles, so that no long sums are subtracted from one another.
    """
    g = by_leaf(g, size)
    P = g.shape[2]
    from_start = jnp.cumsum(g, axis=-1)
    to_end = jnp.flip(jnp.cumsum(jnp.flip(g[..., 1:], -1), -1), -1)
    to_end = jnp.pad(to_end, [(0, 0)] * 3 + [(0, 1)])
    total = from_start[..., -1]
    if P == 1:
        return tuple(jnp.zeros((*g.shape[:2], size), f32) for _ in range(2))
    queries, keys = [], []
    for m in range(number(P)):
        # Of whole leaves between the middle and the leaf, on either side.
        left, right = _halves(total, 2, 1 << m)
        before = jnp.cumsum(jnp.pad(right, [(0, 0)] * 3 + [(1, 0)])[..., :-1], -1)
        after = jnp.pad(left, [(0, 0)] * 3 + [(0, 1)])[..., 1:]
        after = jnp.flip(jnp.cumsum(jnp.flip(after, -1), -1), -1)
        for sums, whole, part, axis, counts in (
            (queries, before, from_start, 1, query_counts(P)),
            (keys, after, to_end, 0, key_counts(P)),
        ):
            half = _halves(part, 2, 1 << m)[axis] + whole[..., None]
            sums.append(_leaves(half, 2)[:, :, : counts[m]])
    queries, keys = (jnp.concatenate(x, 2) for x in (queries, keys))
    return queries.reshape(*g.shape[:2], -1), keys.reshape(*g.shape[:2], -1)
