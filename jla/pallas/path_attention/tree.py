"""The transforms of PaTH: inside a leaf of 128 tokens, and from leaf to leaf along the tree.

With A = strict_lower(beta W W^T) and M = (I + A)^-1 diag(beta), a leaf's whole transform is
P_128 ... P_1 = I - W^T M W, of norm at most one. Queries are moved to the leaf's start and keys to
its end; then each level moves queries over the left half before them, and keys over the right half
after them, by one matrix. The transforms of blocks of which a part lies past the end are never
used.

Operands are float16, sums float32: norms do not grow, so float16 loses 12 bits' worth at each step
where bfloat16 loses 9.
"""

import functools

import jax
import jax.numpy as jnp
from jax import lax

from jla.pallas.chunks import CHUNK
from jla.pallas.path_attention import chains, leaf, levels
from jla.pallas.path_attention.inverse import inverse
from jla.pallas.path_attention.levels import LEAF

f16, f32 = jnp.float16, jnp.float32


def grown(q, k, w, beta, g, inverse=None, *, scale):
    """What a pass over the tree needs.

    Args:
      q: [B, T, HQ, K]. k, w: [B, T, H, K]. beta: [B, T, H] float32.
      g: None, or the logits' gates in base 2, [B, T, HQ] float32; -inf at a segment's first token.
      inverse: None, or as an earlier call returned it.
      scale: of the logits, positive, base 2.

    Returns:
      All versions of queries and of keys, the leaves' own logits, the gates from and to the levels'
      middles (or None), all as `forward` takes them; the blocks' transforms, see `chains.joined`;
      and the chunks' inverses, see `leaf.inverses`.
    """
    P = -(-q.shape[1] // LEAF)
    w, beta = rounded(w, beta)
    if q.dtype != w.dtype:
        q, k = q.astype(f16), k.astype(f16)
    beta = jnp.moveaxis(beta, 2, 1)
    beta = jnp.pad(beta, [(0, 0), (0, 0), (0, P * LEAF - beta.shape[2])])
    if inverse is None:
        inverse = leaf.inverses(w, beta)
    gates, within = (None, None) if g is None else (level_sums(g), leaf_sums(g))
    queries, keys, own, transforms = leaf.leaves(q, k, w, inverse, beta, within, scale=scale)
    transforms = chains.joined(transforms)
    queries = chains.query_chains(queries, transforms, P)
    keys = chains.key_chains(keys, transforms, P)
    return queries, keys, own, gates, transforms, inverse


def rounded(w, beta):
    """w in 16 bits, and beta such that its reflections stay ones: beta |w|^2 is what it was."""
    if w.dtype != f32:
        return w, beta
    out = w.astype(f16)
    before, after = (jnp.sum(jnp.square(x.astype(f32)), -1) for x in (w, out))
    return out, beta * lax.stop_gradient(before / jnp.where(after == 0.0, 1.0, after))


def leaf_sums(g):
    """Each token's sum of gates since its leaf's start or the last border, and whom it sees.

    Args:
      g: gates of the logits, [B, T, HQ] float32; -inf at a segment's first token.

    Returns:
      [B, HQ, L] float32, and the place in the leaf of the first token that it sees, uint32.
    """
    g = _by_leaf(g)
    first = jnp.where(jnp.isneginf(g), jnp.arange(LEAF), 0)
    first = lax.cummax(first, axis=3).astype(jnp.uint32)
    return tuple(x.reshape(*g.shape[:2], -1) for x in (_since(g), first))


def _since(g):
    """The sums of the last axis, which begin anew, with nothing, where it is -inf.

    What came before a border is not in them, not even in their last bit.
    """

    def joined(earlier, later):
        border, total = later
        return earlier[0] | border, jnp.where(border, total, earlier[1] + total)

    border = jnp.isneginf(g)
    return lax.associative_scan(joined, (border, jnp.where(border, 0.0, g)), axis=g.ndim - 1)[1]


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _product(spec, a, b):
    """An einsum of float16 operands, summed in float32; its gradients' operands are float16 too."""
    return jnp.einsum(spec, a, b, preferred_element_type=f32)


def _product_forward(spec, a, b):
    return _product(spec, a, b), (a, b)


def _product_backward(spec, operands, gradient):
    a, b = operands
    gradient = gradient.astype(f16)
    inputs, out = spec.split("->")
    of_a, of_b = inputs.split(",")
    da = jnp.einsum(f"{out},{of_b}->{of_a}", gradient, b, preferred_element_type=f32)
    db = jnp.einsum(f"{out},{of_a}->{of_b}", gradient, a, preferred_element_type=f32)
    return da.astype(f16), db.astype(f16)


_product.defvjp(_product_forward, _product_backward)


def versions(q, k, w, beta):
    """All levels' queries and keys, and the products of queries and keys inside each leaf.

    Args:
      q: [B, T, HQ, K]. k, w: [B, T, H, K]. beta: [B, T, H] float32.

    Returns:
      [B, HQ, R, K] and [B, H, S, K] float16 (see `levels`), at least one leaf of each, and
      [B, HQ, P, 128, 128] float32: q_t P_t ... P_(s+1) k_s for s <= t, anything for s > t.
    """
    H, HQ = k.shape[2], q.shape[2]
    q, k, w, beta = (_by_leaf(x) for x in (q, k, w, beta))
    q = q.reshape(q.shape[0], H, HQ // H, *q.shape[2:])
    rounded = w.astype(f16)
    if w.dtype == f32:
        # A reflection stays one: beta |w|^2 is what it was before rounding.
        before, after = (jnp.sum(jnp.square(x.astype(f32)), -1) for x in (w, rounded))
        beta *= lax.stop_gradient(before / jnp.where(after == 0.0, 1.0, after))
    own, q, k, transform = _in_leaves(q.astype(f16), k.astype(f16), rounded, beta)
    q, k = _along_tree(q, k, transform)
    return _flat(q, 4), _flat(k, 3), own.reshape(own.shape[0], HQ, *own.shape[3:])


def _by_leaf(x):
    """[B, T, H, ...] as [B, H, P, 128, ...], padded with zeros."""
    x = jnp.moveaxis(x, 2, 1)
    x = jnp.pad(x, [(0, 0), (0, 0), (0, -x.shape[2] % LEAF), *[(0, 0)] * (x.ndim - 3)])
    return x.reshape(*x.shape[:2], -1, LEAF, *x.shape[3:])


def _flat(arrays, leaf_axis):
    """The levels' leaves, one after another, as rows [B, heads, rows, K]."""
    x = jnp.concatenate(arrays, leaf_axis - 1)
    return x.reshape(x.shape[0], -1, x.shape[-3] * LEAF, x.shape[-1])


def _in_leaves(q, k, w, beta):
    """Products inside the leaves, q from each leaf's start, k from its end, and its transform."""
    row, column = (lax.broadcasted_iota(jnp.int32, (LEAF, LEAF), i) for i in range(2))
    past, until_now = column < row, column <= row
    a = jnp.where(past, beta[..., None] * _product("bhnik,bhnjk->bhnij", w, w), 0.0)
    m = (_leaf_inverse(a) * beta[..., None, :]).astype(f16)
    qw = _product("bhgntk,bhnrk->bhgntr", q, w)
    qw = jnp.where(until_now, qw, 0.0).astype(f16)
    wk = jnp.where(past, _product("bhnrk,bhnsk->bhnrs", w, k), 0.0).astype(f16)
    mwk = _product("bhnrj,bhnjs->bhnrs", m, wk).astype(f16)
    own = _product("bhgntk,bhnsk->bhgnts", q, k) - _product("bhgntr,bhnrs->bhgnts", qw, mwk)
    mw = _product("bhnrj,bhnjk->bhnrk", m, w).astype(f16)
    q = (q.astype(f32) - _product("bhgntr,bhnrk->bhgntk", qw, mw)).astype(f16)
    k = (k.astype(f32) - _product("bhnrs,bhnrk->bhnsk", mwk, w)).astype(f16)
    eye = jnp.eye(w.shape[-1], dtype=f32)
    transform = (eye - _product("bhnri,bhnrj->bhnij", w, mw)).astype(f16)
    return own, q, k, transform


def _leaf_inverse(a):
    """(I + a)^-1 of 128 tokens, from those of its two chunks."""
    first, second = (slice(i * CHUNK, (i + 1) * CHUNK) for i in range(2))
    x = jnp.stack([a[..., first, first], a[..., second, second]], 3)
    B, H, P = a.shape[:3]
    x = inverse(x.reshape(B, H, 2 * P, CHUNK, CHUNK)).reshape(x.shape)
    x, y = x[:, :, :, 0], x[:, :, :, 1]
    z = -jnp.matmul(y, jnp.matmul(a[..., second, first], x))
    above = jnp.concatenate([x, jnp.zeros_like(x)], -1)
    return jnp.concatenate([above, jnp.concatenate([z, y], -1)], -2)


def _along_tree(q, k, transform):
    """The versions, level by level: lists of arrays [..., leaves, 128, K]."""
    P = k.shape[2]
    if P == 1:
        return [jnp.zeros_like(q)], [jnp.zeros_like(k)]
    query_counts, key_counts = levels.query_counts(P), levels.key_counts(P)
    queries, keys = [], []
    for m in range(levels.number(P)):
        _, right = _halves(q, 3, 1 << m)
        left, _ = _halves(k, 2, 1 << m)
        queries.append(_leaves(right, 3)[:, :, :, : query_counts[m]])
        keys.append(_leaves(left, 2)[:, :, : key_counts[m]])
        if m + 1 == levels.number(P):
            return queries, keys
        earlier, later = _halves(transform, 2, 1)
        earlier, later = earlier[:, :, :, 0], later[:, :, :, 0]
        left, right = _halves(q, 3, 1 << m)
        q = _joined(left, _product("bhgnctk,bhnkl->bhgnctl", right, earlier), 3, P)
        left, right = _halves(k, 2, 1 << m)
        k = _joined(_product("bhnctk,bhnlk->bhnctl", left, later), right, 2, P)
        transform = _product("bhnij,bhnjk->bhnik", later, earlier)
        transform = transform.astype(f16)


def _halves(x, axis, leaves):
    """Splits an axis of leaves in blocks of two halves of `leaves`, padded with zeros."""
    x = jnp.pad(x, [(0, -n % (2 * leaves) if i == axis else 0) for i, n in enumerate(x.shape)])
    x = x.reshape(*x.shape[:axis], -1, 2, leaves, *x.shape[axis + 1 :])
    return lax.index_in_dim(x, 0, axis + 1, False), lax.index_in_dim(x, 1, axis + 1, False)


def _leaves(x, axis):
    return x.reshape(*x.shape[:axis], -1, *x.shape[axis + 2 :])


def _joined(left, right, axis, leaves):
    halves = jnp.stack([left.astype(f16), right.astype(f16)], axis + 1)
    whole = halves.reshape(*left.shape[:axis], -1, *left.shape[axis + 2 :])
    return lax.slice_in_dim(whole, 0, leaves, axis=axis)


def gate_sums(g):
    """`level_sums`, and the sums between the tokens of a leaf, [B, HQ, P, 128, 128], s <= t."""
    leaves = _by_leaf(g)
    border = jnp.isneginf(leaves)
    count = jnp.cumsum(border, axis=-1, dtype=jnp.int32)
    since = _since(leaves)
    own = jnp.where(
        count[..., :, None] == count[..., None, :],
        since[..., :, None] - since[..., None, :],
        -jnp.inf,
    )
    return *level_sums(g), own


def level_sums(g):
    """The sums of the gates between the levels' middles and the tokens of the versions.

    Args:
      g: gates of the logits, [B, T, HQ] float32; -inf at a segment's first token.

    Returns:
      From a level's middle to each query, [B, HQ, R], and from each key to the middle, [B, HQ, S].

    Sums begin at the middles, so that no long sums are subtracted from one another.
    """
    g = _by_leaf(g)
    P = g.shape[2]
    from_start = jnp.cumsum(g, axis=-1)
    to_end = jnp.flip(jnp.cumsum(jnp.flip(g[..., 1:], -1), -1), -1)
    to_end = jnp.pad(to_end, [(0, 0)] * 3 + [(0, 1)])
    total = from_start[..., -1]
    if P == 1:
        return tuple(jnp.zeros((*g.shape[:2], LEAF), f32) for _ in range(2))
    queries, keys = [], []
    for m in range(levels.number(P)):
        # Of whole leaves between the middle and the leaf, on either side.
        left, right = _halves(total, 2, 1 << m)
        before = jnp.cumsum(jnp.pad(right, [(0, 0)] * 3 + [(1, 0)])[..., :-1], -1)
        after = jnp.pad(left, [(0, 0)] * 3 + [(0, 1)])[..., 1:]
        after = jnp.flip(jnp.cumsum(jnp.flip(after, -1), -1), -1)
        for sums, whole, part, axis, counts in (
            (queries, before, from_start, 1, levels.query_counts(P)),
            (keys, after, to_end, 0, levels.key_counts(P)),
        ):
            half = _halves(part, 2, 1 << m)[axis] + whole[..., None]
            sums.append(_leaves(half, 2)[:, :, : counts[m]])
    queries, keys = (jnp.concatenate(x, 2) for x in (queries, keys))
    return queries.reshape(*g.shape[:2], -1), keys.reshape(*g.shape[:2], -1)
