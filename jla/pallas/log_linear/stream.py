"""What the kernels over chunks share: the order in which a chunk meets what it works with.

A chunk of a leaf block works with itself, then with the other chunks of its block on one side, then
with states. Each of these is loaded to a slot of a ring of two while the one before is worked on.
"""

import collections
import functools

import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from jla.pallas.common import chunks, mosaic
from jla.pallas.common.chunks import CHUNK, LEVELS, TILE_WIDTH
from jla.pallas.common.mosaic import PER_COLUMN, PER_ROW, f32, per_column, per_row
from jla.pallas.common.scratch import barrier_for, fetch, fetch_each
from jla.pallas.common.tiles import columns, smem_tiles
from jla.pallas.log_linear import tree

STAGES = 2


def level_between(n, j):
    """The level at which chunks n and j != n of one leaf block meet."""
    different, level = lax.bitwise_xor(n, j), jnp.int32(LEVELS + 1)
    for bit in (2, 4, 8, 16):  # leaf blocks of up to 32 chunks
        level += (different >= bit).astype(jnp.int32)
    return level


def lowest_bit(i):
    """The number of the lowest bit that is set of i, 32 bits that are not all 0."""
    low, number = lax.bitwise_and(i, -i), jnp.int32(0)
    for bits in (16, 8, 4, 2, 1):
        more = (lax.shift_right_logical(low, jnp.int32(bits)) > 0).astype(jnp.int32)
        low, number = lax.shift_right_logical(low, more * bits), number + more * bits
    return number


def without_lowest_bit(i):
    return lax.bitwise_and(i, i - 1)


def read_states(refs, at, per, above):
    """The states that the CTA's chunk reads, as the bits that are set of a number: bit m of its
    leaf block's number stands for the node of height m, and the bits from `above` on for other
    devices' levels.
    """
    block = lax.div(at.n, jnp.int32(per))
    if refs.reads is None:
        return block
    return block + lax.shift_left(refs.reads[at.b, at.h, at.n], jnp.int32(above))


def back(n, per, states, fetch_chunk, fetch_state, on_diagonal, on_chunk, on_state):
    """Runs through all that chunk n reads: itself, the chunks before it, and states.

    Args:
      n: the chunk. per: chunks of a leaf block. states: those that are read, `read_states`.
      fetch_chunk: (j, slot) to nothing; starts to load chunk j. fetch_state: (states, slot), the
        first that is left of them; None where there are no states.
      on_diagonal: (slot) to the carry, tuples and arrays.
      on_chunk: (j, slot, carry) to the carry. on_state: (states, slot, carry) likewise.
    """
    place = lax.bitwise_and(n, per - 1)

    def fetch(step, following):
        slot = lax.bitwise_and(step, 1)
        pl.when(step <= place)(lambda: fetch_chunk(n - step, slot))
        if fetch_state:
            pl.when((step > place) & (following > 0))(lambda: fetch_state(following, slot))

    first = jnp.int32(0)
    fetch(first, states)
    fetch(first + 1, states)
    carry = on_diagonal(0)
    plgpu.commit_smem()

    def chunk_step(step, carry):
        fetch(step + 1, states)
        carry = on_chunk(n - step, lax.bitwise_and(step, 1), carry)
        plgpu.commit_smem()
        return carry

    carry = lax.fori_loop(1, place + 1, chunk_step, carry)
    if not fetch_state:
        return carry

    def state_step(state):
        step, now, carry = state
        following = without_lowest_bit(now)
        fetch(step + 1, following)
        carry = on_state(now, lax.bitwise_and(step, 1), carry)
        plgpu.commit_smem()
        return step + 1, following, carry

    return lax.while_loop(lambda state: state[1] > 0, state_step, (place + 1, states, carry))[2]


def forth(n, per, last, blocks, fetch_chunk, fetch_gradient, on_diagonal, on_chunk, on_gradient):
    """Runs through all that reads chunk n: itself, the chunks after it up to chunk `last` of all,
    and, if its leaf block is one of the first `blocks`, the gradient of the block's state.

    Args: as of `back`; fetch_gradient: (slot) to nothing; on_gradient: (slot, carry) to the carry.
    """
    place, block = lax.bitwise_and(n, per - 1), lax.div(n, jnp.int32(per))
    later = jnp.minimum(per - 1 - place, last - n)

    def fetch(step):
        slot = lax.bitwise_and(step, 1)
        pl.when(step <= later)(lambda: fetch_chunk(n + step, slot))
        if fetch_gradient:
            pl.when((step == later + 1) & (block < blocks))(lambda: fetch_gradient(slot))

    first = jnp.int32(0)
    fetch(first)
    fetch(first + 1)
    carry = on_diagonal(0)
    plgpu.commit_smem()

    def chunk_step(step, carry):
        fetch(step + 1)
        carry = on_chunk(n + step, lax.bitwise_and(step, 1), carry)
        plgpu.commit_smem()
        return carry

    carry = lax.fori_loop(1, later + 1, chunk_step, carry)
    if not fetch_gradient:
        return carry
    slot = lax.bitwise_and(later + 1, 1)
    once = (block < blocks).astype(jnp.int32)  # a loop of one turn or none: it has a carry
    return lax.fori_loop(0, once, lambda _, carry: on_gradient(slot, carry), carry)


def diagonal_weights(by_row, by_column, reverse=False):
    """The weights of a chunk's own pairs, [64, 64] float32: t by s, or in reverse s by t.

    Args:
      by_row, by_column: SMEM refs of the chunk's weights, [P, 64].
    """
    own = per_row(mosaic.load(by_row.at[0], PER_ROW), CHUNK)
    own = jnp.where(chunks.diagonal(), own, 0.0)

    def level_step(level, weights):
        return diagonal_level(level, by_row, by_column, weights, reverse)[0]

    return lax.fori_loop(0, LEVELS, level_step, own)


def plus_skip(weights, skip):
    """The weights of a chunk's own pairs, or any multiples of them, with the skip's weight, a
    number or None, added to those of each token with itself."""
    if skip is None:
        return weights
    return weights + jnp.where(chunks.diagonal(), skip, 0.0)


def diagonal_level(level, by_row, by_column, weights, reverse):
    """Adds a level's pairs to the weights; its mask, and the weights of its columns."""
    pairs = chunks.level_pairs(level, reverse=reverse)
    column = per_column(mosaic.load(by_column.at[level + 1], PER_COLUMN), CHUNK)
    row = per_row(mosaic.load(by_row.at[level + 1], PER_ROW), CHUNK)
    return jnp.where(pairs, row * column, weights), pairs, column


def of_live_chunks(body):
    """The kernel's body from body(until, refs): it is left out for chunks without tokens.

    `until` is the number of chunks up to its leaf block's last with tokens, or that of all chunks:
    `refs.live` is None, or from `weights.live`.
    """

    @functools.wraps(body)
    def of_refs(refs):
        if refs.live is None:
            body(refs.weights.shape[2], refs)
            return
        until = refs.live[lax.axis_index("b"), lax.axis_index("n")]
        pl.when(until > 0)(lambda: body(until, refs))

    return of_refs


# Where a CTA's chunk is in the arrays: batch row, chunk, head, its key head and the chunk's tokens.
Place = collections.namedtuple("Place", "b n h key_head rows")


def place(group):
    """The CTA's, of heads in groups with one key head."""
    b, n, h = (lax.axis_index(name) for name in ("b", "n", "h"))
    return Place(b, n, h, lax.div(h, group), pl.ds(n * CHUNK, CHUNK))


def scratch(own, k_tiles, v_tiles, planes):
    """The SMEM of a kernel over chunks; `own`: the names of its chunk's own tiles and their
    numbers."""
    return dict(
        **{name: smem_tiles(number) for name, number in own.items()},
        ring=smem_tiles(k_tiles + v_tiles, STAGES),  # the other chunks' tiles, or a state
        srow=plgpu.SMEM((planes, CHUNK), f32),  # the chunk's weights, to be read by rows
        scolumn=plgpu.SMEM((planes, CHUNK), f32),  # and by columns
        other=plgpu.SMEM((STAGES, CHUNK), f32),  # those of the other chunks
        near=barrier_for(own | dict(srow=1, scolumn=1)),
        loaded=barrier_for(dict(keys=k_tiles, values=v_tiles, weights=1), STAGES),
        state_loaded=barrier_for(dict(state=k_tiles * v_tiles), STAGES),
    )


def fetch_own(refs, at, by_key_head, by_head):
    """Starts to load the chunk's own tiles and weights.

    Args:
      by_key_head: an array and its tiles. by_head: likewise, or None.
    """

    def copies():
        for pair, head in ((by_key_head, at.key_head), (by_head, at.h)):
            if pair is not None:
                ref, tiles = pair
                for i, tile in enumerate(tiles):
                    yield ref.at[at.b, at.rows, head, columns(i)], tile
        for target in (refs.srow, refs.scolumn):
            yield refs.weights.at[at.b, at.h, at.n], target

    fetch_each(copies(), refs.near)


def fetch_chunk(refs, at, by_key_head, by_head, j, slot):
    """Starts to load chunk j of two arrays to the ring, and its weights at the level of the two."""
    rows = pl.ds(j * CHUNK, CHUNK)
    k_tiles = by_key_head.shape[3] // TILE_WIDTH

    def copies():
        for i, tile in enumerate(refs.ring[:k_tiles]):
            yield by_key_head.at[at.b, rows, at.key_head, columns(i)], tile.at[slot]
        for i, tile in enumerate(refs.ring[k_tiles:]):
            yield by_head.at[at.b, rows, at.h, columns(i)], tile.at[slot]
        level = level_between(at.n, j)
        yield refs.weights.at[at.b, at.h, j, level], refs.other.at[slot]

    fetch_each(copies(), refs.loaded.at[slot])


def fetch_node(refs, at, above, states, slot):
    """Starts to load the first of the states that are left, as `read_states` says them."""
    complete, height = refs.states.shape[2], lowest_bit(states)

    def node():
        block = lax.bitwise_and(states, (1 << above) - 1)
        fetch_state(refs, refs.states.at[at.b, at.h, tree.place(complete, block, height)], slot)

    def other():
        fetch_state(refs, refs.others.at[at.b, at.h, height - above], slot)

    if refs.others is None:
        node()
        return
    pl.when(height < above)(node)
    pl.when(height >= above)(other)


def fetch_state(refs, state, slot):
    """Starts to load a state [V, K] to the ring, its tile (i, j) to place i * k_tiles + j."""
    v_tiles, k_tiles = (ref.shape[3] // TILE_WIDTH for ref in (refs.v, refs.k))
    copies = [
        (state.at[columns(i), columns(j)], refs.ring[i * k_tiles + j].at[slot])
        for i in range(v_tiles)
        for j in range(k_tiles)
    ]
    fetch(dict(state=copies), refs.state_loaded.at[slot])
