"""States of packed segments: an initial state with an axis of segments, [B, N, ...].

Segment n holds a row's tokens with the id n, which are neighbours. It starts from the row's state n
and leaves its own there. Tokens with another id (-1: padding) touch nothing.

The chunkwise forms place the tokens so that no chunk has two segments' tokens. The states that a
chunk starts from and leaves are then its owner's, and segments cost neither a pass of their own nor
a program. With chunks of 4, one row of 3 segments, of which the row has 0 and 2:

    ids      0  0  0  0  0  2  2  -1
    places   a0 a1 a2 a3 | a4 .  .  . | c0 c1 .  . | .  .  .  . | .  .  .  .
    owner    0             0            2            3 (none)     3

Empty places hold zeros in all arrays, a log decay of 0 too: such tokens change no state.
"""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from jla._core.segments import segment_starts
from jla._core.types import Array, SegmentIds

i32 = jnp.int32


def count(state: Any, rank: int = 4) -> int | None:
    """N, or None where there is no axis of segments; `rank` is the first leaf's without one."""
    leaves = jax.tree.leaves(state)
    return leaves[0].shape[1] if leaves and leaves[0].ndim > rank else None


def owners(segment_ids: SegmentIds, N: int) -> jax.Array:
    """The ids, int32, with N at the tokens of no segment."""
    inside = (segment_ids >= 0) & (segment_ids < N)
    return jnp.where(inside, segment_ids, N).astype(i32)


def take[Tree](states: Tree, owner: jax.Array | None) -> Tree:
    """Each row's state of its owner, zeros where that is none; without owners `states` is it.

    Args:
      states: [B, N, ...]. owner: int32 [B], N for none.
    """
    if owner is None:
        return states

    def row(x, n):
        return x.at[n].get(mode="fill", fill_value=0)

    return jax.tree.map(lambda x: jax.vmap(row)(x, owner), states)


def put[Tree](states: Tree, new: Tree, owner: jax.Array | None) -> Tree:
    """Undoes `take`: the states with each row's new one; with no owner, none."""
    if owner is None:
        return new

    def row(x, y, n):
        return x.at[n].set(y, mode="drop", unique_indices=True)

    return jax.tree.map(lambda x, y: jax.vmap(row)(x, y, owner), states, new)


def by_token(
    step: Callable[..., Any], state: Any, segment_ids: SegmentIds | None, like: Array, rank: int = 4
) -> tuple[Callable[..., Any], jax.Array]:
    """The body of a scan over tokens, of a definition.

    Args:
      step: `step(*arrays, state)` returns o and the state.
      state: the initial state, with an axis of segments or without. rank: as `count` has it.
      like: [B, T, ...].

    Returns:
      The body, of the state and a token's arrays, and the array that it takes last, [B, T].
    """

    def of_rows(x, ndim):
        return x.reshape(-1, *[1] * (ndim - 1))

    N = count(state, rank)
    if segment_ids is None or N is None:
        starts = jnp.zeros(like.shape[:2], bool)
        if segment_ids is not None:
            starts = segment_starts(segment_ids)

        def token(state, inputs):
            *arrays, start = inputs
            state = jax.tree.map(lambda x: jnp.where(of_rows(start, x.ndim), 0, x), state)
            o, state = step(*arrays, state)
            return state, o

        return token, starts

    def token_of_segment(states, inputs):
        *arrays, owner = inputs

        def real(x):
            return jnp.where(of_rows(owner < N, x.ndim), x, 0)

        o, state = step(*map(real, arrays), take(states, owner))
        return put(states, state, owner), real(o)

    return token_of_segment, owners(segment_ids, N)


class Places(NamedTuple):
    """Where the tokens of each row are, so that a chunk of C places has one segment's.

    Attributes:
      place: each token's, [B, T], int32; M C or more where it has none.
      token: the token in each place, [B, M C], int32; T or more where there is none.
      owner: each chunk's segment, [B, M], int32; N for none.
    """

    place: jax.Array
    token: jax.Array
    owner: jax.Array


def places(
    segment_ids: SegmentIds,
    N: int,
    C: int,
    *,
    offset: jax.Array | None = None,
    M: int | None = None,
) -> Places:
    """Assigns places to the tokens of N segments, in chunks of C.

    A segment that is there takes at most C - 1 places beside its tokens', so that M = (T + N
    (C - 1)) // C chunks are enough; with an offset, [B, N] below C, it starts at that place of its
    first chunk, and M = (T + 2 N (C - 1)) // C. Another M must not be less.
    """
    T: int = segment_ids.shape[1]
    runs = min(N, T) * (1 if offset is None else 2)
    M = M or (T + runs * (C - 1)) // C
    owner, time = owners(segment_ids, N), jnp.arange(T, dtype=i32)[None]
    begins = segment_starts(owner) | (time == 0)
    since = time - lax.cummax(jnp.where(begins, time, 0), axis=1)
    if offset is not None:
        since = since + pick(offset, owner, unique=False)
    opens = (begins | (since % C == 0)) & (owner < N)
    chunk = jnp.cumsum(opens, axis=1, dtype=i32) - 1
    place = jnp.where(owner < N, C * chunk + since % C, M * C + time)
    place = lax.optimization_barrier(place)  # not computed anew for every number that is gathered

    def row(place, owner, opens, chunk):
        time = jnp.arange(T, dtype=i32)
        empty = T + jnp.arange(M * C, dtype=i32)  # all different, so that no index is there twice
        token = empty.at[place].set(time, unique_indices=True, mode="drop")
        chunk = jnp.where(opens, chunk, M + time)
        none = jnp.full(M, N, i32)
        return token, none.at[chunk].set(owner, unique_indices=True, mode="drop")

    return Places(place, *jax.vmap(row)(place, owner, opens, chunk))


def pick(x: Array, index: jax.Array, *, unique: bool = True) -> jax.Array:
    """`x[b, index[b, i]]`, zeros where there is none.

    Args:
      x: [B, n, ...]. index: [B, m], int32.
      unique: whether no index that is inside comes twice.
    """

    def row(x, index):
        return x.at[index].get(mode="fill", fill_value=0, unique_indices=unique)

    return jax.vmap(row)(x, index)


def by_chunks(
    run: Callable[..., tuple[jax.Array, Any]],
    arrays: Sequence[Array],
    states: Any,
    segment_ids: SegmentIds,
    C: int,
) -> tuple[jax.Array, Any]:
    """A mechanism on tokens in their places.

    Args:
      run: `run(*arrays, states, owner)` returns outputs [B, M C, ...] and the states.
      arrays: [B, T, ...].

    Returns:
      The outputs, [B, T, ...], zeros at tokens of no segment, and the states.
    """
    N: int = jax.tree.leaves(states)[0].shape[1]
    where = places(segment_ids, N, C)
    o, states = run(*(pick(x, where.token) for x in arrays), states, where.owner)
    return pick(o, where.place), states


# Kernels carry states through several pieces of a sequence at once; here a segment is one. Each has
# a chunk, an empty one if it is absent, and a last piece has those that are left, so that all are
# written, and by one piece. P = N + 1, M = T // C + N + 1.


def by_pieces(
    run: Callable[..., tuple[jax.Array, Any]],
    arrays: Sequence[Array],
    states: Any,
    segment_ids: SegmentIds,
    C: int,
) -> tuple[jax.Array, Any]:
    """`by_chunks` for kernels.

    Args:
      run: `run(*arrays, states, spans)` returns outputs [B, M C, ...] and states. The states are
        [B, H, P, ...], where each piece starts from and ends; spans are each piece's first chunk
        and its number of chunks, at least 1, [B, P, 2], int32.
    """
    N: int = jax.tree.leaves(states)[0].shape[1]
    M = segment_ids.shape[1] // C + N + 1
    where = places(segment_ids, N, C, M=M)
    mine = where.owner[..., None] == jnp.arange(N, dtype=i32)[None, None]
    number, begin = jnp.sum(mine, axis=1, dtype=i32), jnp.argmax(mine, axis=1).astype(i32)
    absent, used = number == 0, jnp.sum(number, axis=1, keepdims=True, dtype=i32)
    empty = used + jnp.cumsum(absent, axis=1, dtype=i32)
    begin = jnp.where(absent, empty - 1, begin)
    begin = jnp.concatenate([begin, empty[:, -1:]], axis=1)
    number = jnp.concatenate([jnp.maximum(number, 1), M - empty[:, -1:]], axis=1)
    spans = jnp.stack([begin, number], axis=2)

    def there(x):
        return ~absent.reshape(-1, N, *[1] * (x.ndim - 2))

    def start(x):
        x = jnp.where(there(x), x, 0.0)
        return jnp.moveaxis(jnp.pad(x, [(0, 0), (0, 1)] + [(0, 0)] * (x.ndim - 2)), 1, 2)

    def end(after, x):
        return jnp.where(there(x), jnp.moveaxis(after, 2, 1)[:, :N], x)

    placed = (pick(x, where.token) for x in arrays)
    o, after = run(*placed, jax.tree.map(start, states), spans)
    return pick(o, where.place), jax.tree.map(end, after, states)


class Extended(NamedTuple):
    """Where the tokens of each row are behind the last W - 1 inputs of their segment.

    Attributes:
      place: each token's, [B, T], int32; E or more where it has none.
      source: what is in each place, [B, E], int32: a token, or T plus the number of an input among
        the row's N (W - 1), or more where there is nothing.
      last: the places of each segment's last W - 1 inputs, [B, N (W - 1)], int32; E or more where
        it is absent.
    """

    place: jax.Array
    source: jax.Array
    last: jax.Array


def extended(segment_ids: SegmentIds, N: int, past: int) -> Extended:
    """Makes room for `past` inputs before each segment: for a window over a segment's tokens."""
    T: int = segment_ids.shape[1]
    E = T + min(N, T) * past
    owner, time = owners(segment_ids, N), jnp.arange(T, dtype=i32)[None]
    real = owner < N
    begins = real & (segment_starts(owner) | (time == 0))
    before = jnp.cumsum(real, axis=1, dtype=i32) + past * jnp.cumsum(begins, axis=1, dtype=i32)
    place = jnp.where(real, before - 1, E + time)
    mine = owner[..., None] == jnp.arange(N, dtype=i32)[None, None]
    first = jnp.min(jnp.where(mine, place[..., None], E + past), axis=1)
    last = jnp.max(jnp.where(mine, place[..., None], -1), axis=1)
    inputs = jnp.arange(past, dtype=i32)[None, None]

    def flat(x):
        return x.reshape(x.shape[0], N * past)

    def row(place, of_past):
        time, number = jnp.arange(T, dtype=i32), jnp.arange(N * past, dtype=i32)
        nothing = T + N * past + jnp.arange(E, dtype=i32)
        source = nothing.at[place].set(time, unique_indices=True, mode="drop")
        return source.at[of_past].set(T + number, mode="drop")

    source = jax.vmap(row)(place, flat(first[..., None] - past + inputs))
    last = flat(jnp.where(last[..., None] < 0, E, last[..., None] - past + 1) + inputs)
    return Extended(place, source, last)
