"""States of a sequence's pieces, joined: the affine maps S_end = M S_start + N applied in turn."""

import jax.numpy as jnp
from jax import lax


def join(factors, terms, state, *, times=jnp.multiply, reverse=False):
    """The state before each piece, [P, ...], by S <- M S + N; in reverse, that after it.

    Args:
      factors, terms: M and N of all pieces but the last (in reverse: the first), [P - 1, ...].
      state: the state before the whole sequence (in reverse: after it).
      times: the product of M and S.
    """

    def step(state, transition):
        factor, term = transition
        return times(factor, state) + term, state

    # Unrolled because a loop's turn costs XLA more than these products.
    state, before = lax.scan(step, state, (factors, terms), reverse=reverse, unroll=8)
    return jnp.concatenate([state[None], before] if reverse else [before, state[None]])
