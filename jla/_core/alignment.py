"""Slots: how log-linear attention handles segments and continued sequences.

A core of log-linear attention receives only sequences that start at position 0. The level of two
tokens is 1 plus the highest bit in which their positions differ. If a segment of n tokens starts at
a multiple of `2**ceil(log2 n)`, the low bits of its tokens' slots are their positions, and the core
finds the levels from the slots alone. One row of 11 tokens, in segments a (3), b (6) and c (2):

    tokens   a0 a1 a2 b0 b1 b2 b3 b4 b5 c0 c1
    slots    b0 b1 b2 b3 b4 b5 .  .  a0 a1 a2 .  c0 c1 .  .  .  .  .  .  .
             |--- 8 slots, for 6 ---|-- 4, for 3 |- 2 -|

Each segment's size is rounded up to a power of two. The segments lie in the order of these sizes,
the largest first, so that each starts at a multiple of its own size; together they take less than
twice the row. The segments are data: one compiled program serves all.

A row's first segment may continue from a state at position p, and where states have an axis of
segments (`packed_levels`), each may. It then starts at an offset, p modulo its size, so that the
low bits are right again. It may cross one multiple of its size, where the carry can run through
higher bits of the position than there are slots: for the tokens after it, one level's scale
replaces another's (`_scales_by_slot`). What the tokens read from the state, and the state after the
last token, are products outside of the core (`read_levels`, `final_levels`, `merged_levels`).
"""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from jla._core import packed
from jla._core.lengths import chunk_size, is_symbolic_dim
from jla._core.segments import segment_starts
from jla._core.states import (
    LogLinearState,
    bit_length,
    merging_into,
    moved_on,
    outgrown,
    used_levels,
    with_outgrown,
    with_rank,
)
from jla._core.sums import running_sum
from jla._core.types import (
    Array,
    Keys,
    Lengths,
    Levels,
    LevelScales,
    LogDecays,
    Outputs,
    Positions,
    Queries,
    SegmentIds,
    Values,
)

f32, i32 = jnp.float32, jnp.int32

# Tokens whose sum `k v^T` the final state takes at once.
CHUNK = 256


class Slots(NamedTuple):
    """Where the tokens of each row sit.

    Attributes:
      slot: each token's slot, [B, T], int32.
      token: the token in each slot, [B, N], int32; T or more where there is none.
      starts_segment: the first tokens of segments, the row's first token included, [B, T], bool.
      continues: the tokens of segments that continue from a state, [B, T], bool: of the row's first
        segment, or of all that have one.
      before: the position of that state, [B, T], int32; 0 for the others.
      position: each token's position, [B, T], int32.
      level_by_slot, level_by_position: the level that two tokens of a segment that continues have
        by their slots, and by their positions, where a multiple of its size lies between them,
        [B, T], int32.
    """

    slot: jax.Array
    token: jax.Array
    starts_segment: jax.Array
    continues: jax.Array
    before: jax.Array
    position: jax.Array
    level_by_slot: jax.Array
    level_by_position: jax.Array


def run_aligned(
    core: Callable[..., jax.Array],
    q: Queries,
    k: Keys,
    v: Values,
    g: LogDecays,
    level_scales: LevelScales,
    initial_state: LogLinearState | None,
    segment_ids: SegmentIds | None,
    value_scales: jax.Array | None = None,
) -> tuple[Outputs, LogLinearState]:
    """Log-linear attention, as `jla.log_linear_attention` says, by a core for aligned sequences.

    Args:
      core: `core(q, k, v, g, level_scales, *, occupied, value_scales)` returns o [B, N, H, V] in
        v's dtype. Every row is one sequence from position 0: the level of two tokens is that of
        their indices. It gets
          q, k: [B, N, HK, K]; v: [B, N, H, V], in their dtype. N is any number.
          g: [B, N, H], float32. -inf where a segment starts: exp(-inf) = 0 then cuts off all that
            would pass it, and the gradient there must be 0, not NaN.
          level_scales: [B, N, H, L], in its dtype. No pair whose decay is not 0 has a level from L
            on.
          occupied: None where the tokens are as they came, N = T and no gate is -inf. Otherwise
            bool, [B, N]: whether a token sits there. Empty slots, about half of them, hold zeros
            in all arrays (a log decay of 0 too); their outputs and gradients are ignored.
          value_scales: [B, N, H], float32, or None.
      q, k, v, g, level_scales, initial_state, segment_ids: of the public function.
      value_scales: [B, T, H], float32: the values are these times v. None: v.

    Returns:
      What the public function returns.
    """
    B, T = v.shape[:2]
    L, dtype = level_scales.shape[-1], v.dtype

    def values(v: Values, scales: jax.Array | None) -> Values:
        return v if scales is None else v.astype(f32) * scales[..., None]

    if initial_state is None and segment_ids is None:
        end = jnp.full(B, T, i32)
        o = core(q, k, v, g, level_scales, occupied=None, value_scales=value_scales)
        if is_symbolic_dim(T):  # else the caller knows that L levels do
            o = jnp.where(outgrown(jnp.arange(T, dtype=i32), L)[:, None, None], jnp.nan, o)
        return o, with_outgrown(final_levels(k, values(v, value_scales), g, end, end, L), end)
    slots, decay = _slots_and_decay(T, g, initial_state, segment_ids)
    o, k, v, cut, value_scales = through_slots(core, q, k, v, g, level_scales, slots, value_scales)
    if initial_state is not None:
        read = read_levels(q, level_scales, decay, slots.position, initial_state)
        o = (o.astype(f32) + read).astype(dtype)
    if initial_state is not None or is_symbolic_dim(T):
        o = jnp.where(outgrown(slots.position, L)[..., None, None], jnp.nan, o)
    return o, _state_after(None, slots, k, values(v, value_scales), cut, decay, initial_state, L)


def through_slots(
    core: Callable[..., jax.Array],
    q: Queries,
    k: Keys,
    v: Values,
    g: LogDecays,
    level_scales: LevelScales,
    slots: Slots,
    value_scales: jax.Array | None = None,
) -> tuple[Outputs, jax.Array, jax.Array, jax.Array, jax.Array | None]:
    """What the tokens read from one another by `core`, see `run_aligned`; and k, v, the gates and
    the values' scales in their slots."""
    cut = jnp.where(slots.starts_segment[..., None], -jnp.inf, g)
    scales = _scales_by_slot(level_scales, slots)
    q, k, v, cut, scales = (to_slots(x, slots) for x in (q, k, v, cut, scales))
    if value_scales is not None:
        value_scales = to_slots(value_scales, slots)
    occupied = slots.token < level_scales.shape[1]
    o = core(q, k, v, cut, scales, occupied=occupied, value_scales=value_scales)
    return from_slots(o, slots), k, v, cut, value_scales


def state_after(
    length: Lengths,
    k: Keys,
    v: Values,
    g: LogDecays,
    initial_state: LogLinearState,
    segment_ids: SegmentIds | None,
) -> LogLinearState:
    """The state after the first tokens of each row, for rows that end in padding.

    In other mechanisms a token of zeros does not change the state; here it takes a position.

    Args:
      length: the number of these tokens, [B], int32; 0 gives the initial state.
      k, v, g, initial_state, segment_ids: of the public function, with an initial state.

    Returns:
      The `LogLinearState`, of the segment of the last of these tokens.
    """
    slots, decay = _slots_and_decay(v.shape[1], g, initial_state, segment_ids)
    cut = jnp.where(slots.starts_segment[..., None], -jnp.inf, g)
    k, v, cut = (to_slots(x, slots) for x in (k, v, cut))
    L = initial_state.levels.shape[2]
    last = jnp.maximum(length - 1, 0)
    state = _state_after(last, slots, k, v, cut, decay, initial_state, L)

    def keep_if_empty(before: jax.Array, after: jax.Array) -> jax.Array:
        return jnp.where(length.reshape(-1, *[1] * (after.ndim - 1)) > 0, after, before)

    return jax.tree.map(keep_if_empty, initial_state, state)


def _slots_and_decay(
    T: int, g: LogDecays, initial_state: LogLinearState | None, segment_ids: SegmentIds | None
) -> tuple[Slots, jax.Array]:
    """The slots, and the sum of the gates from the initial state to each token (its own included),
    -inf from where a later segment starts, [B, T, H]."""
    slots = assign_slots(T, segment_ids, None if initial_state is None else initial_state.position)
    return slots, running_sum(jnp.where(slots.continues[..., None], g, -jnp.inf))


def _state_after(
    last: jax.Array | None,
    slots: Slots,
    k: Keys,
    v: Values,
    g: LogDecays,
    decay: jax.Array,
    initial_state: LogLinearState | None,
    L: int,
) -> LogLinearState:
    """The state after the token `last` of each row, [B], or after all if it is None."""

    def at_last(x: jax.Array) -> jax.Array:
        if last is None:
            return x[:, -1]
        last_of_all = last.reshape(-1, *[1] * (x.ndim - 1))
        return jnp.take_along_axis(x, last_of_all, axis=1, mode="promise_in_bounds")[:, 0]

    position = moved_on(at_last(slots.position), 1)
    levels = final_levels(k, v, g, at_last(slots.slot) + 1, position, L)
    if initial_state is not None:
        levels = levels + merged_levels(initial_state, at_last(decay), position)
    return with_outgrown(levels, position)


def assign_slots(T: int, segment_ids: SegmentIds | None, position: Positions | None) -> Slots:
    """Assigns slots to rows of T tokens.

    Args:
      T: the number of tokens.
      segment_ids: integers [B, T], or None: each row is one segment.
      position: of the row's first token, [B], int32, or None: 0. Not both are None. With an axis of
        segments, [B, N], of the first token of each, and tokens of no segment sit nowhere: their
        `slot` is another token's or empty.

    Returns:
      `Slots`. N is 2T - 1 without a position, and else, without segments, T - 1 plus T rounded up
      to a power of two (at most 2T - 1, which a symbolic T takes); with both it is 4T.
    """
    by_row = position if segment_ids is None else segment_ids
    assert by_row is not None
    B, symbolic = by_row.shape[0], is_symbolic_dim(T)
    time = jnp.arange(T, dtype=i32)
    # `begin`, and `end` of each token's segment.
    if segment_ids is None:
        starts_segment = jnp.broadcast_to(time == 0, (B, T))
        begin, end = jnp.zeros((B, T), i32), jnp.full((B, T), T, i32)
    else:
        starts_segment = segment_starts(segment_ids) | (time == 0)[None]
        begin = lax.cummax(jnp.where(starts_segment, time, 0), axis=1)
        ends = jnp.pad(
            jnp.where(starts_segment, time, T)[:, 1:], ((0, 0), (0, 1)), constant_values=T
        )
        end = lax.cummin(ends, axis=1, reverse=True)
    length, continues, real = end - begin, begin == 0, None
    size = bit_length(length - 1)  # as an exponent of 2
    if position is None:
        before = jnp.zeros((B, T), i32)
    elif position.ndim == 1:
        before = jnp.where(continues, position[:, None], 0)
    else:
        assert segment_ids is not None
        owner = packed.owners(segment_ids, position.shape[1])
        before = packed.pick(position, owner, unique=False)
        real = continues = owner < position.shape[1]
    offset = before & ((1 << size) - 1)
    block = bit_length(offset + length - 1)  # with the offset; also an exponent

    # Blocks lie in the order of their sizes, the largest first, and then of time. A token's rank
    # counts the blocks of its size that begin up to it, its own the last of them.
    sizes = 32 if symbolic else (T - 1).bit_length() + (1 if position is None else 2)
    exponent = jnp.arange(sizes, dtype=i32)
    of_size = block[..., None] == exponent[None, None]
    count = running_sum((starts_segment[..., None] & of_size).astype(i32))
    room = count[:, -1] << exponent[None]
    base = running_sum(room, True) - room
    start = base[:, None] + ((count - 1) << exponent[None, None])
    slot = jnp.sum(jnp.where(of_size, start, 0), axis=2, dtype=i32) + offset + time[None] - begin
    # XLA would compute the sum anew for every number that is gathered from a slot.
    slot = lax.optimization_barrier(slot)

    if position is None:
        N = 2 * T - 1
    elif segment_ids is None:
        N = T + (2 * T - 1 if symbolic else 1 << (T - 1).bit_length()) - 1
    else:
        N = 4 * T
    empty = T + jnp.arange(N, dtype=i32)  # all different, so that no index is there twice

    def tokens(slot: jax.Array) -> jax.Array:
        return empty.at[slot].set(time, unique_indices=True, mode="promise_in_bounds")

    token = jax.vmap(tokens)(slot)
    if real is not None:
        token = jnp.where(packed.pick(real, token), token, empty[None])
    return Slots(
        slot=slot,
        token=token,
        starts_segment=starts_segment,
        continues=continues,
        before=before,
        position=moved_on(before, time[None] - begin),
        level_by_slot=size + 1,
        level_by_position=size + merging_into(before >> size),
    )


def to_slots(x: Array, slots: Slots) -> jax.Array:
    """Moves tokens [B, T, ...] to their slots [B, N, ...]; empty slots are zeros."""

    def row(x, token):
        return x.at[token].get(mode="fill", fill_value=0, unique_indices=True)

    return jax.vmap(row)(x, slots.token)


def from_slots(x: jax.Array, slots: Slots) -> jax.Array:
    """Undoes `to_slots`: [B, N, ...] to [B, T, ...]."""

    def row(x, slot):
        return x.at[slot].get(mode="promise_in_bounds", unique_indices=True)

    return jax.vmap(row)(x, slots.slot)


def read_levels(
    q: Queries,
    level_scales: LevelScales,
    decay: jax.Array,
    position: jax.Array,
    state: LogLinearState,
) -> jax.Array:
    """What the tokens read from the levels of the initial state.

    A token at position t reads the bucket that was level l at position p from the level
    `max(l, h)`, where h is 1 plus the highest bit in which p and t differ (0 if t = p).

    Args:
      q: [B, T, HK, K].
      level_scales: [B, T, H, L].
      decay: the sum of the gates from the state to each token (its own included), -inf where no
        state reaches; [B, T, H], float32.
      position: each token's, [B, T], int32.
      state: the `LogLinearState`.

    Returns:
      [B, T, H, V], float32.

    Where no row has a past, as where a prompt is read into an empty cache, nothing is computed. The
    products would be zeros there, so no row's outputs depend on whether another has a past.
    """
    # A place for the outputs: zeros, sharded as the tokens and heads are.
    nothing = jnp.broadcast_to(
        jnp.where(False, decay[..., None], 0.0), (*decay.shape, state.levels.shape[-1])
    )
    arrays = nothing, q, level_scales, decay, position, state
    some = jnp.any(state.position != 0)
    return lax.cond(some, _read_levels, lambda nothing, *_: nothing, *arrays)


def read_weights(
    level_scales: LevelScales, decay: jax.Array, position: jax.Array, before: jax.Array
) -> jax.Array:
    """The weight with which each token reads each level of a state at the position `before`, [B, T]
    or [B, 1]: [B, T, H, L], float32. The others as in `read_levels`."""
    scales, level = level_scales.astype(f32), _levels(level_scales.shape[-1], 4)
    above = bit_length(position ^ before)[..., None, None]
    one = jnp.sum(jnp.where(level == above, scales, 0.0), axis=-1, keepdims=True)
    return jnp.exp(decay)[..., None] * jnp.where(level > above, scales, one)


@jax.checkpoint
def _read_levels(
    nothing: jax.Array,
    q: Queries,
    level_scales: LevelScales,
    decay: jax.Array,
    position: jax.Array,
    state: LogLinearState,
) -> jax.Array:
    """`read_levels` of rows that may have a past, added to the zeros `nothing`."""
    B, T, HK, K = q.shape
    H, L, V = *level_scales.shape[2:], state.levels.shape[-1]
    weights = read_weights(level_scales, decay, position, state.position[:, None])
    # The heads of one key head lie side by side, as if they were one.
    levels = used_levels(state).reshape(B, HK, H // HK, L, K, V)
    levels = jnp.moveaxis(levels, (3, 4), (0, 3)).reshape(L, B, HK, K, -1)
    q = q.astype(f32)

    def read(o, inputs):
        weights, levels = inputs
        values = jnp.einsum("btjk,bjkv->btjv", q, levels)
        values = values.reshape(B, T, HK, H // HK, V).reshape(B, T, H, V)
        return o + weights[..., None] * values, None

    inputs = jnp.moveaxis(weights, 3, 0)[1:], levels[1:]  # level 0 holds nothing
    return lax.scan(jax.checkpoint(read, prevent_cse=False), nothing, inputs)[0]


def final_levels(
    k: Keys, v: Values, g: LogDecays, end: jax.Array, position: Positions, L: int
) -> Levels:
    """The levels after the last token, of aligned tokens alone.

    The tokens of the last segment end just before the slot `end`. A token belongs to the level that
    is 1 plus the highest bit in which its position and `position` differ. Chunks that do not hold
    the last token are in one bucket each, as a whole.

    Args:
      k: [B, N, HK, K].
      v: [B, N, H, V].
      g: [B, N, H], float32, -inf where a segment starts.
      end: the slot after the last token's, [B], int32.
      position: the position after the last token's, [B], int32; equal to `end` in its low bits.
      L: the number of levels.

    Returns:
      [B, H, L, K, V], float32; a bucket that has no level below L is left out.
    """
    (B, N, HK, K), (H, V) = k.shape, v.shape[2:]
    size = chunk_size(N, CHUNK, least=1)
    n = -(-N // size)
    pad = [(0, 0), (0, n * size - N), (0, 0)]
    g, k, v = jnp.pad(g, pad), jnp.pad(k, [*pad, (0, 0)]), jnp.pad(v, [*pad, (0, 0)])
    # The sum of the gates after each token, up to `end`; -inf for other segments' tokens.
    earlier = jnp.arange(n * size, dtype=i32)[None] < end[:, None]
    later_gates = jnp.where(earlier[..., None], g, 0.0)[:, 1:]
    decay = running_sum(jnp.pad(later_gates, [(0, 0), (0, 1), (0, 0)]), True)
    weight = jnp.where(earlier[..., None], jnp.exp(decay), 0.0)
    # Where types carry shardings, no reshape may merge and split at once.
    v = (weight[..., None] * v.astype(f32)).reshape(B, -1, HK, H // HK, V)
    v = v.reshape(B, n * size, HK, -1).reshape(B, n, size, HK, -1)
    k = k.astype(f32).reshape(B, n, size, HK, K)

    def level(index: jax.Array) -> jax.Array:
        """The level of the token in a slot, one-hot, [..., L]."""
        ahead = end.reshape(-1, *[1] * (index.ndim - 1)) - index
        after = position.reshape(-1, *[1] * (index.ndim - 1))
        return bit_length((after - ahead) ^ after)[..., None] == _levels(L, index.ndim + 1)

    last = (end - 1) // size
    chunk = jnp.broadcast_to(jnp.arange(n, dtype=i32), (B, n))
    whole = level(chunk * size) & (chunk != last[:, None])[..., None]
    sums = jnp.einsum("bnsjk,bnsjv->bnjkv", k, v)
    # A select, so that `whole` lies where the rows do, see `zero_state`.
    placed = jnp.sum(lax.stop_gradient(sums), axis=(2, 3, 4))[..., None]
    whole = jnp.where(False, placed, whole.astype(f32))
    levels = jnp.einsum("bnl,bnjkv->bjlkv", whole, sums)
    tail = level(last[:, None] * size + jnp.arange(size, dtype=i32)[None])
    here = (chunk == last[:, None])[..., None, None, None]
    k, v = (jnp.sum(jnp.where(here, x, 0.0), axis=1) for x in (k, v))
    k = jnp.where(tail[:, :, None, :, None], k[:, :, :, None], 0.0)
    levels = levels + jnp.einsum("bsjlk,bsjv->bjlkv", k, v)
    levels = levels.reshape(B, HK, L, K, H // HK, V)
    return jnp.moveaxis(levels, 4, 2).reshape(B, H, L, K, V)


def merged_levels(state: LogLinearState, decay: jax.Array, position: Positions) -> Levels:
    """The levels of `state` as they are at a later position, decayed by exp(decay), [B, H].

    Those below the highest bit in which the positions differ have merged into its level. A decay of
    -inf gives zeros.
    """
    level = _levels(state.levels.shape[2], 2)
    highest = bit_length(state.position ^ position)[:, None]

    def by_level(mask: jax.Array) -> jax.Array:
        return mask[:, None, :, None, None]

    levels = jnp.exp(decay)[..., None, None, None] * used_levels(state)
    merged = jnp.sum(jnp.where(by_level(level < highest), levels, 0.0), axis=2, keepdims=True)
    levels = jnp.where(by_level(level > highest), levels, 0.0)
    return jnp.where(by_level(level == highest), merged, levels)


def _levels(L: int, ndim: int) -> jax.Array:
    """0 to L - 1, int32, along the last of `ndim` axes."""
    return with_rank(jnp.arange(L, dtype=i32), ndim)


def _scales_by_slot(level_scales: LevelScales, slots: Slots) -> jax.Array:
    """The scales, with that of `level_by_position` in the place of `level_by_slot`, in the segments
    that continue from a state."""
    level = _levels(level_scales.shape[-1], 4)

    def at(target: jax.Array) -> jax.Array:
        return level == target[..., None, None]

    scale = jnp.sum(jnp.where(at(slots.level_by_position), level_scales, 0), axis=-1, keepdims=True)
    here = slots.continues[..., None, None] & at(slots.level_by_slot)
    return jnp.where(here, scale, level_scales)
