"""Attention to intervals of places: what tokens see, and the attention, over devices too."""

import jax
import jax.numpy as jnp
from jax import lax

from jla._core import sequence
from jla._core.segments import segment_starts
from jla._core.varying import alike

f32, i32 = jnp.float32, jnp.int32
QUERIES_AT_ONCE = 256  # in `interval_attention`, so that its logits are [B, H, 256, S] at most


def intervals(T, segments, before):
    """The places that tokens see: from their segment's first one to their own.

    Args:
      T: how many new tokens each row has.
      segments: int32 [B, T], numbered from 0; None for one segment.
      before: of a cache, the number of its tokens and the place where its last segment begins,
        int32 [B] each; or None.

    Returns:
      The first and the last place, [B, T] or [1, T], and the new `start` [B], None without a cache.
    """
    place = jnp.arange(T, dtype=jnp.int32)[None]
    first = jnp.zeros_like(place)
    if before is not None:
        length, start = before
        place = place + length[:, None]
        first = jnp.broadcast_to(start[:, None], place.shape)
    if segments is not None:
        starts = jnp.where(segment_starts(segments), place, 0)
        first = jnp.maximum(lax.cummax(starts, axis=1), first)
    return first, place, None if before is None else first[:, -1]


def intervals_over(q, segments, axis):
    """`intervals` of queries [B, T, H, K]: of one device's, in the places of the whole sequence, if
    an axis splits it. `segments` are then ids, of which equal neighbours are one segment."""
    B, T = q.shape[:2]
    if axis is None:
        return intervals(T, segments, None)
    # How many tokens of the segment to which a device's first token belongs lie to its left.
    links = sequence.links(segments, B, T, axis)
    none = jnp.zeros(B, i32)
    there = sequence.entering(lambda tokens, _, own: tokens + own.length, (), none, links, axis)
    before = jnp.broadcast_to(lax.axis_index(axis) * T, (B,))
    return intervals(T, segments, (before, before - there))


def interval_attention(q, keys, values, first, last):
    """Attention of queries [B, T, H, K] to the keys in the places `first` to `last`, [B, T] each.

    Keys are [B, HK, S, K], values [B, HK, S, V]; `first` and `last` may have one row for all. No
    more than `QUERIES_AT_ONCE` queries' logits are there at a time, in the backward pass too.
    """
    return with_logsumexp(q, keys, values, first, last, values.dtype)[0]


def with_logsumexp(q, keys, values, first, last, dtype):
    """`interval_attention`, of this dtype, and the log of the sum of the logits' exponentials,
    [B, T, H]; of what sees nothing the one is of no use, and the other as good as -inf."""
    B, T, H, K = q.shape
    HK, S = keys.shape[1:3]
    place = jnp.arange(S, dtype=jnp.int32)[None, None]

    def attend(q, first, last):
        logits = jnp.einsum("bnhgk,bhsk->bhgns", q, keys, preferred_element_type=f32) * K**-0.5
        seen = (first[..., None] <= place) & (place <= last[..., None])
        # Finite: rows that see nothing (of padding, below) are not NaN.
        logits = jnp.where(seen[:, None, None], logits, jnp.finfo(f32).min)
        weights = jax.nn.softmax(logits, axis=-1).astype(values.dtype)
        # The axes are moved afterwards: XLA's CPU has no 16-bit product that moves them.
        o = jnp.einsum("bhgns,bhsv->bhgnv", weights, values, preferred_element_type=f32)
        total = jax.nn.logsumexp(logits, axis=-1)
        return jnp.moveaxis(o, 3, 1).astype(dtype), jnp.moveaxis(total, 3, 1)

    def of_heads(o, total):
        return o.reshape(B, -1, H, o.shape[-1])[:, :T], total.reshape(B, -1, H)[:, :T]

    q = q.reshape(B, T, HK, H // HK, K)
    if T <= QUERIES_AT_ONCE:
        return of_heads(*attend(q, first, last))

    blocks = -(-T // QUERIES_AT_ONCE)

    def cut(x):
        """[B, T, ...] in blocks of queries, [blocks, B, QUERIES_AT_ONCE, ...]."""
        rest = blocks * QUERIES_AT_ONCE - T
        x = jnp.pad(x, [(0, 0), (0, rest), *[(0, 0)] * (x.ndim - 2)])
        return jnp.moveaxis(x.reshape(x.shape[0], blocks, -1, *x.shape[2:]), 1, 0)

    run = jax.checkpoint(attend)
    found = lax.map(lambda block: run(*block), (cut(q), cut(first), cut(last)))
    o, total = (jnp.moveaxis(x, 0, 1).reshape(B, -1, *x.shape[3:]) for x in found)
    return of_heads(o, total)


def from_left(q, block, held, expand, first, last, axis, window=None):
    """`interval_attention` over devices: each device's keys and values move to the right, and the
    log-sum-exps of the parts join what a device reads of each.

    The backward pass moves them once more: kept, they would be those of all devices.

    Args:
      q: this device's queries, [B, T, H, K].
      block: a tree of arrays that has this device's keys and values.
      held: a tree of other arrays, which stay.
      expand: `expand(block, held)` makes keys [B, HK, T, K] and values [B, HK, T, V].
      first, last: the places, in the whole sequence, that each query sees.
      axis: the manual axis.
      window: how many tokens each sees at most, or None.
    """
    T, size = q.shape[1], lax.axis_size(axis)
    further = size - 1 if window is None else min(size - 1, -(-(window - 1) // T))
    right = [(i, (i + 1) % size) for i in range(size)]  # vmap's axes want all of them to send

    def run(q, block, held, first, last):
        index = lax.axis_index(axis)

        def read(block, number):
            start = (index - number) * T
            keys, values = expand(block, held)
            return with_logsumexp(q, keys, values, first - start, last - start, f32)

        def step(carry, number):
            o, total, block = carry
            block = jax.tree.map(lambda x: lax.ppermute(x, axis, right), block)
            # The first devices have nobody to their left, but what the last ones have.
            there = index >= number
            block = jax.tree.map(lambda x: jnp.where(there, x, jnp.zeros((), x.dtype)), block)
            of_left, joins = lax.cond(
                there,
                lambda block: read(block, number),
                lambda _: (jnp.where(False, o, 0.0), jnp.where(False, total, jnp.finfo(f32).min)),
                block,
            )
            share = jax.nn.sigmoid(joins - total)[..., None]
            return (o + share * (of_left - o), jnp.logaddexp(total, joins), block), None

        carry = *read(block, 0), block
        return lax.scan(step, carry, jnp.arange(1, further + 1, dtype=i32))[0][0]

    # All of them are each device's own: the gradient of what others have, too, would be summed over
    # devices inside of a condition that some of them do not enter.
    leaves, tree = jax.tree.flatten(sequence.varying((q, block, held, first, last), axis))
    return jax.checkpoint(run)(*tree.unflatten(alike(*leaves))).astype(q.dtype)
