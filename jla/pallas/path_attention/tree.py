"""The transforms of PaTH: inside a leaf of 128 tokens, and from leaf to leaf along the tree.

With A = strict_lower(beta W W^T) and M = (I + A)^-1 diag(beta), a leaf's whole transform is
P_128 ... P_1 = I - W^T M W, of norm at most one. Queries are moved to the leaf's start and keys to
its end; then each level moves queries over the left half before them, and keys over the right half
after them, by one matrix. The transforms of blocks of which a part lies past the end are never
used.

Operands are float16, sums float32: norms do not grow, so float16 loses 12 bits' worth at each step
where bfloat16 loses 9.
"""

import jax.numpy as jnp
from jax import lax

from jla._core.dyadic import by_leaf, level_sums
from jla.pallas.path_attention import chains, leaf
from jla.pallas.path_attention.dyadic import LEAF

f16, f32 = jnp.float16, jnp.float32


def grown(q, k, w, beta, g, inverse, *, scale):
    """What a pass over the tree needs.

    Args:
      q: [B, T, HQ, K]. k, w: [B, T, H, K]. beta: [B, H, TP] float32. See `sixteen_bits`.
      g: None, or the logits' gates in base 2, [B, T, HQ] float32; -inf at a segment's first token.
      inverse: of the chunks, see `leaf.inverses`.
      scale: of the logits, positive, base 2.

    Returns:
      All versions of queries and of keys, the leaves' own logits, the gates from and to the levels'
      middles (or None), all as `forward` takes them; and all blocks' transforms, see
      `chains.joined`.
    """
    P = beta.shape[2] // LEAF
    gates, within = (None, None) if g is None else (level_sums(g, LEAF), leaf_sums(g))
    queries, keys, *own, transforms = leaf.leaves(q, k, w, inverse, beta, within, scale=scale)
    transforms = chains.joined(transforms, P)
    queries = chains.query_chains(queries, transforms, P)
    keys = chains.key_chains(keys, transforms, P)
    return queries, keys, own, gates, transforms


def sixteen_bits(q, k, w, beta):
    """q, k and w as `leaf.leaves` takes them, and beta [B, H, TP], zero past the end.

    A float32 w stays as it is: `leaf.inverses` rounds it.
    """
    if k.dtype != q.dtype:
        k = k.astype(f16)
    if w.dtype not in (k.dtype, f32):
        w = w.astype(f16)
    beta = jnp.moveaxis(beta, 2, 1)
    return q, k, w, jnp.pad(beta, [(0, 0), (0, 0), (0, -beta.shape[2] % LEAF)])


def leaf_sums(g):
    """Each token's sum of gates since its leaf's start or the last border, and where that is.

    Args:
      g: gates of the logits, [B, T, HQ] float32; -inf at a segment's first token.

    Returns:
      [B, HQ, TP] float32, and the place in the leaf of the first token that it sees, uint32.
    """
    g = by_leaf(g, LEAF)
    first = jnp.where(jnp.isneginf(g), jnp.arange(LEAF, dtype=jnp.int32), 0)
    first = lax.cummax(first, axis=3).astype(jnp.uint32)
    return tuple(x.reshape(*g.shape[:2], -1) for x in (_since(g), first))


def _since(g):
    """The sums along the last axis, which start again from 0 where it is -inf.

    Numbers before a border do not affect them, not even in their last bit.
    """

    def joined(earlier, later):
        border, total = later
        return earlier[0] | border, jnp.where(border, total, earlier[1] + total)

    border = jnp.isneginf(g)
    return lax.associative_scan(joined, (border, jnp.where(border, 0.0, g)), axis=g.ndim - 1)[1]
