"""Log-linear attention from states with an axis of segments: see `packed` and `alignment`.

The tokens meet one another in slots, as `alignment` has it. What they read from the states, and the
states that they leave, are products in chunks (`packed.places`): of one segment each, and from a
multiple of C positions on, so that a chunk is in one bucket as a whole, but for a segment's last.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax import lax

from jla._core import alignment, packed
from jla._core.packed import Places, pick
from jla._core.segments import segment_starts
from jla._core.states import (
    LogLinearState,
    bit_length,
    moved_on,
    outgrown,
    used_levels,
    with_outgrown,
)
from jla._core.types import (
    Array,
    Keys,
    LevelScales,
    LogDecays,
    Outputs,
    Queries,
    SegmentIds,
    Values,
)

f32, i32 = jnp.float32, jnp.int32

CHUNK = 128


def run_aligned(
    core: Callable[..., jax.Array],
    q: Queries,
    k: Keys,
    v: Values,
    g: LogDecays,
    level_scales: LevelScales,
    initial_state: LogLinearState | None,
    segment_ids: SegmentIds | None,
) -> tuple[Outputs, LogLinearState]:
    """`alignment.run_aligned`, from states with an axis of segments or without."""
    N = packed.count(initial_state, rank=5)
    if segment_ids is None or initial_state is None or N is None:
        arrays = q, k, v, g, level_scales
        return alignment.run_aligned(core, *arrays, initial_state, segment_ids)
    T, dtype = v.shape[1], v.dtype
    owner = packed.owners(segment_ids, N)
    real = (owner < N)[..., None]
    g = jnp.where(real, g, 0.0)
    slots = alignment.assign_slots(T, owner, initial_state.position)
    o = alignment.through_slots(core, q, k, v, g, level_scales, slots)[0]
    places = packed.places(owner, N, CHUNK, offset=initial_state.position % CHUNK)
    decay = _sums(g, segment_starts(owner))
    read = _read(q, level_scales, decay, slots, initial_state, places)
    o = (o.astype(f32) + read).astype(dtype)
    o = jnp.where(outgrown(slots.position, level_scales.shape[-1])[..., None, None], jnp.nan, o)
    o = jnp.where(real[..., None], o, 0)
    return o, _states_after(k, v, g, owner, decay, slots.position, initial_state, places)


def _sums(g: Array, starts: jax.Array) -> jax.Array:
    """Sums of gates [B, T, H] over time, each segment's by itself: a difference of two longer sums
    would keep no digit beside a strong gate."""

    def join(left, right):
        (begins, x), (begins_again, y) = left, right
        return begins | begins_again, y + jnp.where(begins_again, 0.0, x)

    return lax.associative_scan(join, (starts[..., None], g), axis=1)[1]


def _read(
    q: Queries,
    level_scales: LevelScales,
    decay: jax.Array,
    slots: alignment.Slots,
    state: LogLinearState,
    places: Places,
) -> jax.Array:
    """`alignment.read_levels`, of each token from its segment's state."""
    V = state.levels.shape[-1]
    nothing = jnp.broadcast_to(jnp.where(False, decay[..., None], 0.0), (*decay.shape, V))
    arrays = q, level_scales, decay, slots.position, slots.before, state, places
    some = jnp.any(slots.before != 0)
    return lax.cond(some, _read_some, lambda nothing, *_: nothing, nothing, *arrays)


@jax.checkpoint
def _read_some(
    nothing: jax.Array,
    q: Queries,
    level_scales: LevelScales,
    decay: jax.Array,
    position: jax.Array,
    before: jax.Array,
    state: LogLinearState,
    places: Places,
) -> jax.Array:
    """`_read` of rows that have a past, added to the zeros `nothing`."""
    weights = alignment.read_weights(level_scales, decay, position, before)
    weights, q = (pick(x, places.token) for x in (weights, q.astype(f32)))
    (B, P, HK, K), (H, L), V = q.shape, weights.shape[2:], nothing.shape[-1]
    q = q.reshape(B, -1, CHUNK, HK, K)
    # The heads of one key head lie side by side, as if they were one.
    levels = jax.vmap(used_levels)(state).reshape(B, -1, HK, H // HK, L, K, V)
    levels = jnp.moveaxis(levels, (4, 5), (0, 4)).reshape(L, B, -1, HK, K, H // HK * V)

    def read(o, inputs):
        weights, levels = inputs
        of_chunk = pick(levels, places.owner, unique=False)
        values = jnp.einsum("bmcjk,bmjkv->bmcjv", q, of_chunk)
        values = values.reshape(B, P, HK, H // HK, V).reshape(B, P, H, V)
        return o + weights[..., None] * values, None

    start = jnp.broadcast_to(jnp.where(False, weights[..., :1], 0.0), (B, P, H, V))
    inputs = jnp.moveaxis(weights, 3, 0)[1:], levels[1:]  # level 0 holds nothing
    o = lax.scan(jax.checkpoint(read, prevent_cse=False), start, inputs)[0]
    return nothing + pick(o, places.place)


def _states_after(
    k: Keys,
    v: Values,
    g: LogDecays,
    owner: jax.Array,
    decay: jax.Array,
    position: jax.Array,
    state: LogLinearState,
    places: Places,
) -> LogLinearState:
    """What each segment leaves, or its state where it is absent.

    Args:
      owner: each token's segment, [B, T]. decay: from its state to each token, [B, T, H].
      position: each token's, [B, T].
    """
    T, N = owner.shape[1], state.position.shape[1]
    mine = owner[..., None] == jnp.arange(N, dtype=i32)[None, None]
    length = jnp.sum(mine, axis=1, dtype=i32)
    last = jnp.max(jnp.where(mine, jnp.arange(T, dtype=i32)[None, :, None], -1), axis=1)
    total = pick(decay, jnp.where(length > 0, last, T))
    after = moved_on(state.position, length)
    levels = jax.vmap(alignment.merged_levels)(state, total, after)
    levels = levels + _final_levels(k, v, g, owner, position, after, places, levels.shape[3])
    new = jax.vmap(with_outgrown)(levels, after)

    def present(new: jax.Array, given: jax.Array) -> jax.Array:
        there = (length > 0).reshape(*length.shape, *[1] * (new.ndim - 2))
        return jnp.where(there, new, given)

    return jax.tree.map(present, new, state)


def _final_levels(
    k: Keys,
    v: Values,
    g: LogDecays,
    owner: jax.Array,
    position: jax.Array,
    after: jax.Array,
    places: Places,
    L: int,
) -> jax.Array:
    """The levels after each segment's last token, of its tokens alone: [B, N, H, L, K, V].

    A token belongs to the level that is 1 plus the highest bit in which its position and `after`
    differ.

    Args:
      after: the position after each segment's last token, [B, N].
    """
    (B, _, HK, K), (H, V), N = k.shape, v.shape[2:], after.shape[1]
    ends = jnp.pad(segment_starts(owner)[:, 1:], ((0, 0), (0, 1)), constant_values=True)
    later = jnp.where(ends[..., None], 0.0, jnp.roll(g, -1, axis=1))
    weight = jnp.exp(_sums(later[:, ::-1], ends[:, ::-1])[:, ::-1])
    v = (weight[..., None] * v.astype(f32)).reshape(B, -1, HK, H // HK, V)
    k, v = (pick(x, places.token) for x in (k.astype(f32), v))
    k, v = k.reshape(B, -1, CHUNK, HK, K), v.reshape(B, -1, CHUNK, HK, H // HK * V)

    # Each chunk's first position, and the position after its segment's last token.
    first = jnp.max(pick(position, places.token).reshape(B, -1, CHUNK), axis=2) // CHUNK * CHUNK
    end = pick(after, places.owner, unique=False)
    mine = places.owner[..., None] == jnp.arange(N, dtype=i32)[None, None]
    is_last = mine & (end - first < CHUNK)[..., None]
    level = bit_length(first ^ end)[..., None] == jnp.arange(L, dtype=i32)[None, None]
    whole = ((mine & ~is_last)[..., None] & level[..., None, :]).astype(f32)
    sums = jnp.einsum("bmsjk,bmsjv->bmjkv", k, v)
    levels = jnp.einsum("bmnl,bmjkv->bnjlkv", whole, sums)

    # The last chunks: their tokens are in the lowest levels.
    M, lowest = first.shape[1], min(L, CHUNK.bit_length())
    chunk = jnp.where(jnp.any(is_last, axis=1), jnp.argmax(is_last, axis=1), M).astype(i32)
    here = pick(first, chunk)[..., None] + jnp.arange(CHUNK, dtype=i32)[None, None]
    level = bit_length(here ^ after[..., None])[..., None]
    level = level == jnp.arange(lowest, dtype=i32)[None, None, None]
    k, v = (pick(x, chunk) for x in (k, v))
    k = jnp.where(level[:, :, :, None, :, None], k[:, :, :, :, None], 0.0)
    tail = jnp.einsum("bnsjlk,bnsjv->bnjlkv", k, v)
    levels = levels + jnp.pad(tail, [(0, 0)] * 3 + [(0, L - lowest), (0, 0), (0, 0)])
    levels = levels.reshape(B, N, HK, L, K, H // HK, V)
    return jnp.moveaxis(levels, 5, 3).reshape(B, N, H, L, K, V)
