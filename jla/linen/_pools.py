"""Rows of a cache that begin anew."""

from typing import Any

import jax

from jla._core import checks, pools
from jla._core.types import Array

type Tree = Any  # of arrays, in dicts


@checks.named
def clear(cache: Tree, slots: Array) -> Tree:
    """A layer's or a model's cache in which these rows are as `init` makes them: zeros.

    In a program that reads prompts it stands before `apply`, for the sequences that begin. It is a
    pure function: donate the cache to jit, and it is cleared in place.

    Example:
      layer = jla.linen.KimiDeltaAttention(num_heads=4, decode=True)
      cache = layer.init(jax.random.key(0), jnp.ones((8, 1, 64)))["cache"]  # 8 rows
      cache = jla.linen.clear(cache, jnp.array([2, 5, -1]))  # rows 2 and 5 begin anew

    Args:
      cache: the "cache" collection of a layer or a model, made with `decode=True`.
      slots: int32 [B], or of any number of axes: rows of the cache. -1 is none.

    Returns:
      The cache, its other rows as they were.

    Raises:
      TypeError: `slots` is no array, or not int32.
      ValueError: a slot that is known and outside -1 to the last row.
    """
    axes = " ".join(f"axis{i}" for i in range(getattr(slots, "ndim", 1)))
    checks.check_shapes(slots=(slots, axes))
    sizes = {x.shape[0] for x in jax.tree.leaves(cache)}
    if len(sizes) != 1:
        raise ValueError(
            f"cache must have the same number of rows in all arrays, got {sorted(sizes)}"
        )
    pools.check(slots, sizes.pop(), distinct=False)

    def cleared(x: jax.Array) -> jax.Array:
        return x.at[pools.rows(slots, x.shape[0])].set(0, mode="drop")

    return jax.tree.map(cleared, cache)
