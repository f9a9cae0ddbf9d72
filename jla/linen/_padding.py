"""Padding: real tokens are moved to the front of their row, so that only right padding is left."""

import jax.numpy as jnp

from jla._core import packed, pools
from jla._core.segments import segment_index


def pack_left(mask):
    """Orders every row's tokens: the real ones first, in their order, the padded ones after.

    Args:
      mask: bool [B, T], True at real tokens, in any pattern.

    Returns:
      `order` and `inverse`, int32 [B, T], for `take_tokens`, and the number of real tokens in each
      row, int32 [B].
    """
    order = jnp.argsort(~mask, axis=1, stable=True).astype(jnp.int32)
    inverse = jnp.argsort(order, axis=1).astype(jnp.int32)
    return order, inverse, jnp.sum(mask, axis=1, dtype=jnp.int32)


def take_tokens(x, indices):
    """Selects `x[b, indices[b, i]]`; x is [B, T, ...], the indices are [B, N] and within bounds."""
    indices = indices.reshape(indices.shape + (1,) * (x.ndim - 2))
    return jnp.take_along_axis(x, indices, axis=1, mode="promise_in_bounds")


def arrange(inputs, mask, segment_ids):
    """Moves every row's padding behind its real tokens, and numbers its segments.

    Args:
      inputs: [B, T, D].
      mask: bool [B, T], True at real tokens, or None if all are.
      segment_ids: integers [B, T], or None.

    Returns:
      x: the inputs so arranged, [B, T, D]. Padding is zeros, so that not even NaN in it reaches a
        gradient.
      real: bool [B, T], True at the real tokens of x; None without a mask.
      lengths: int32 [B], the number of real tokens in each row; None without a mask.
      segments: int32 [B, T], as `segment_index` numbers them; the padding behind a row's last real
        token belongs to that token's segment. None without `segment_ids`.
      restore: undoes the arrangement of outputs [B, T, D]; they are zero at padding.
    """
    x = jnp.asarray(inputs)
    if mask is None:
        segments = None if segment_ids is None else segment_index(segment_ids)
        return x, None, None, segments, lambda y: y
    order, inverse, lengths = pack_left(mask)
    places = jnp.arange(x.shape[1], dtype=jnp.int32)[None]
    real = places < lengths[:, None]
    x = jnp.where(real[..., None], take_tokens(x, order), 0.0)
    segments = None
    if segment_ids is not None:
        last = jnp.maximum(lengths - 1, 0)[:, None]
        source = take_tokens(order, jnp.minimum(places, last))
        segments = segment_index(take_tokens(segment_ids, source))

    def restore(y):
        return jnp.where(mask[..., None], take_tokens(y, inverse), 0.0)

    return x, real, lengths, segments, restore


def of_live_rows(inputs, mask, slots):
    """The inputs, the mask and the slots of a call on a pool.

    Rows without a sequence become zeros, and so they stay: see `zeros_elsewhere`. A row whose only
    token is padding has nothing to say to its sequence, and counts as one without.
    """
    slots = jnp.asarray(slots)
    if mask is not None and inputs.shape[1] == 1:
        slots, mask = jnp.where(mask[:, 0], slots, -1), None
    if mask is not None:
        mask = mask & (slots >= 0)[:, None]
    return pools.zero_unless(slots >= 0, jnp.asarray(inputs)), mask, slots


def of_live_segments(inputs, mask, segment_ids, slots):
    """A call on a pool with a slot for each segment, [B, N]: its inputs, zeros at padding; the ids,
    -1 there; the slots; and what undoes the arrangement of outputs, as in `arrange`.

    Tokens of a segment without a slot are padding. A segment without tokens gets the slot -1: its
    row of the pool is not touched.
    """
    slots, N = jnp.asarray(slots), slots.shape[1]
    owner = packed.owners(segment_ids, N)
    real = packed.pick(slots >= 0, owner, unique=False)
    if mask is not None:
        real = real & mask
    ids = jnp.where(real, owner, -1)
    there = jnp.any(ids[..., None] == jnp.arange(N, dtype=jnp.int32)[None, None], axis=1)
    x = jnp.where(real[..., None], jnp.asarray(inputs), 0.0)
    if mask is not None:  # there may be padding between a segment's tokens
        order, inverse, _ = pack_left(mask)
        x, ids = take_tokens(x, order), take_tokens(ids, order)

    def restore(y):
        y = y if mask is None else take_tokens(y, inverse)
        return jnp.where(real[..., None], y, 0.0)

    return x, ids, jnp.where(there, slots, -1), restore


def zeros_elsewhere(restore, slots):
    """`restore`, then zeros in the rows without a sequence."""
    return lambda y: pools.zero_unless(slots >= 0, restore(y))
