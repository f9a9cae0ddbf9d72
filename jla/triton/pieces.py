"""A sequence in pieces that run at once, for states that decay by numbers: X <- d X + term.

A chunk waits for the one before it, so that few heads leave most of a GPU idle. A first pass takes
each piece's end from zeros, and keeps nothing else. The states at all borders follow, by a few
numbers for each element, and the kernels then run all pieces from where they start.
"""

import jax.numpy as jnp
import triton

from jla._core.exchange import join

PROCESSORS = 132  # of an H200; the others that are served have 84 to 148
SHORTEST = 32  # chunks of a piece; joining one costs about as much as 5


def number(programs, chunks):
    """How many pieces a sequence has that takes so many programs: two on each multiprocessor."""
    pieces = max(1, min(2 * PROCESSORS // programs, chunks // SHORTEST))
    return triton.cdiv(chunks, triton.cdiv(chunks, pieces))  # no piece is empty


def spans(rows, pieces, chunks):
    """Each piece's first chunk and its number of chunks, [rows, pieces, 2] int32."""
    length = triton.cdiv(chunks, pieces)
    first = length * jnp.arange(pieces, dtype=jnp.int32)
    return jnp.tile(jnp.stack([first, jnp.minimum(length, chunks - first)], axis=1), (rows, 1, 1))


def sums(x, pieces):
    """The sums over each piece's chunks, [B, H, pieces, ...] of x [B, H, chunks, ...]."""
    length = triton.cdiv(x.shape[2], pieces)
    x = jnp.pad(x, [(0, pieces * length - x.shape[2] if i == 2 else 0) for i in range(x.ndim)])
    return x.reshape(*x.shape[:2], pieces, length, *x.shape[3:]).sum(3)


def joined(factors, terms, state, *, reverse=False):
    """The states that the pieces start from, [B, H, P, ...], and the last one, [B, H, ...].

    Args:
      factors, terms: d and what the piece makes of zeros, [B, H, P, ...].
      state: what enters the first piece; in reverse the last one, and the last state is before all.
    """
    of_pieces = (jnp.moveaxis(x, 2, 0) for x in (factors, terms))
    states = jnp.moveaxis(join(*of_pieces, state, reverse=reverse), 0, 2)
    if reverse:
        return states[:, :, 1:], states[:, :, 0]
    return states[:, :, :-1], states[:, :, -1]
