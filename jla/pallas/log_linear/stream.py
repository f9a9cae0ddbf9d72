"""What the kernels over chunks share: the order in which a chunk meets what it works with.

A chunk of a leaf block works with itself, then with the other chunks of its block on one side, then
with states. Each of these is loaded to a slot of a ring of two while the one before is worked on.
"""

import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from jla.pallas.common import chunks, mosaic
from jla.pallas.common.chunks import CHUNK, LEVELS
from jla.pallas.common.mosaic import PER_COLUMN, PER_ROW, f32, per_column, per_row
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


def node(i, complete):
    """Where `tree` keeps the state that ends with leaf block i > 0, and its height."""
    height = lowest_bit(i)
    return tree.place(complete, i, height), height


def back(n, per, fetch_chunk, fetch_state, on_diagonal, on_chunk, on_state):
    """Runs through all that chunk n reads: itself, the chunks before it, and states.

    Args:
      n: the chunk. per: chunks of a leaf block.
      fetch_chunk: (j, slot) to nothing; starts to load chunk j. fetch_state: (block, slot), the
        state that ends with leaf block `block`; None where there are no states.
      on_diagonal: (slot) to the carry, tuples and arrays.
      on_chunk: (j, slot, carry) to the carry. on_state: (block, slot, carry) likewise.
    """
    place, block = lax.bitwise_and(n, per - 1), lax.div(n, jnp.int32(per))

    def fetch(step, following):
        slot = lax.bitwise_and(step, 1)
        pl.when(step <= place)(lambda: fetch_chunk(n - step, slot))
        if fetch_state:
            pl.when((step > place) & (following > 0))(lambda: fetch_state(following, slot))

    first = jnp.int32(0)
    fetch(first, block)
    fetch(first + 1, block)
    carry = on_diagonal(0)
    plgpu.commit_smem()

    def chunk_step(step, carry):
        fetch(step + 1, block)
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

    return lax.while_loop(lambda state: state[1] > 0, state_step, (place + 1, block, carry))[2]


def forth(n, per, last, blocks, fetch_chunk, fetch_gradient, on_diagonal, on_chunk, on_gradient):
    """Runs through all that reads chunk n: itself, the chunks after it up to chunk `last` of all,
    and, unless its leaf block is the last of `blocks`, the gradient of the block's state.

    Args: as of `back`; fetch_gradient: (slot) to nothing; on_gradient: (slot, carry) to the carry.
    """
    place, block = lax.bitwise_and(n, per - 1), lax.div(n, jnp.int32(per))
    later = jnp.minimum(per - 1 - place, last - n)

    def fetch(step):
        slot = lax.bitwise_and(step, 1)
        pl.when(step <= later)(lambda: fetch_chunk(n + step, slot))
        if fetch_gradient:
            pl.when((step == later + 1) & (block + 1 < blocks))(lambda: fetch_gradient(slot))

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
    once = (block + 1 < blocks).astype(jnp.int32)  # a loop of one turn or none: it has a carry
    return lax.fori_loop(0, once, lambda _, carry: on_gradient(slot, carry), carry)


def diagonal_weights(rows, columns, reverse=False):
    """The weights of a chunk's own pairs, [64, 64] float32: t by s, or in reverse s by t.

    Args:
      rows, columns: SMEM refs of the chunk's weights, [P, 64].
    """
    own = per_row(mosaic.load(rows.at[0], PER_ROW), CHUNK)
    own = jnp.where(chunks.diagonal(), own, 0.0)

    def level_step(level, weights):
        return diagonal_level(level, rows, columns, weights, reverse)[0]

    return lax.fori_loop(0, LEVELS, level_step, own)


def plus_skip(weights, skip):
    """The weights of a chunk's own pairs, or any multiples of them, with the skip's weight, a
    number or None, added to those of each token with itself."""
    if skip is None:
        return weights
    return weights + jnp.where(chunks.diagonal(), skip, 0.0)


def diagonal_level(level, rows, columns, weights, reverse):
    """Adds a level's pairs to the weights; its mask, and the weights of its columns."""
    pairs = chunks.level_pairs(level, reverse=reverse)
    column = per_column(mosaic.load(columns.at[level + 1], PER_COLUMN), CHUNK)
    row = per_row(mosaic.load(rows.at[level + 1], PER_ROW), CHUNK)
    return jnp.where(pairs, row * column, weights), pairs, column


def of_live_chunks(live, chunks):
    """Decorates a kernel's body: it is left out for chunks without tokens.

    Args:
      live: None or, from `weights.live`, the kernel's first operand, which the body does not see.
      chunks: their number.

    The body gets instead the number of chunks up to its leaf block's last with tokens, or `chunks`.
    """

    def decorate(body):
        def of_all(*refs):
            body(chunks, *refs)

        def of_live(live_ref, *refs):
            until = live_ref[lax.axis_index("b"), lax.axis_index("n")]
            pl.when(until > 0)(lambda: body(until, *refs))

        return of_all if live is None else of_live

    return decorate


def vector(stages=None):
    """SMEM for a chunk's float32 numbers."""
    return plgpu.SMEM((CHUNK,) if stages is None else (stages, CHUNK), f32)
