"""The kernels' masks between a chunk's tokens: factors of products, which are read from memory.

Computed inside of a kernel, a mask would pass through shared memory two bytes at a time.
"""

import jax.numpy as jnp

from jla.triton.kernels.pieces import CHUNK, LEVELS, NEAR

_C = CHUNK.value


def masks(dtype):
    """All masks [i, m], [9, 64, 64]: 1 where the log decay of token m counts for token i.

    - 0 to 5, the levels of the tree: at level l, blocks of 2 * 2**l tokens have a left and a right
      half. A token of the right half reads from the block's middle on, so its decays are those from
      the middle to itself; a token of the left half is read from the middle on, so its decays are
      those after itself. Every pair of tokens meets at exactly one level.
    - 6: from the first of 2**NEAR tokens (exclusively) to token i.
    - 7: up to token i.   8: after token i.
    """
    # Not NumPy's, whose arrays would be constants of the program: a partitioned call takes none.
    i, m = jnp.arange(_C)[:, None], jnp.arange(_C)[None, :]

    def of_level(level):
        right = (i >> level) % 2 == 1
        return (i >> level == m >> level) & ((m <= i) == right)

    first = i >> NEAR.value << NEAR.value
    near = (first < m) & (m <= i)
    all_masks = [*map(of_level, range(LEVELS.value)), near, m <= i, m > i]
    return jnp.stack(all_masks).astype(dtype)
