"""Pools: the states of many sequences in one array, of which a step advances some rows.

A pool is a state with R rows. `slots`, int32 [B], says which of them each row of a call goes on
from and writes to; -1 says that a row has no sequence.
"""

import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from jla._core import checks
from jla._core.axes import Axes
from jla._core.types import Array, Sizes, Slots

STATES = ("state", "cache")  # what steps call theirs


def check_axes(axes: Axes, slots: Slots | None, /, **arguments: object) -> Sizes:
    """`checks.check_axes` of a step's arguments; with slots, the state is a pool of R rows."""
    if slots is None:
        return checks.check_axes(axes, **arguments)
    sizes = checks.check_axes(of_pool(axes), **arguments, slots=slots)
    check(slots, sizes["R"])
    return sizes


def of_pool(axes: Axes) -> dict[str, str]:
    """A step's axes with slots: those of a step, and R in the place of the state's B."""

    def of(name: str, letters: str) -> str:
        return "R" + letters[1:] if name.split(".")[0] in STATES else letters

    return {name: of(name, letters) for name, letters in axes.items()} | {"slots": "B"}


def check(slots: Slots, size: int, name: str = "slots", *, distinct: bool = True) -> None:
    """Raises TypeError unless slots are int32, and, where their values are known, ValueError for
    one that a pool of so many rows has not, and, if they are `distinct`, for two that are equal."""
    checks.check_dtype(name, slots, [jnp.int32])
    if not checks.known(slots) or not isinstance(size, int):
        return
    given = np.asarray(slots).ravel()
    outside = (given < -1) | (given >= size)
    if outside.any():
        i = int(np.argmax(outside))
        raise ValueError(
            f"{name} must be -1 (for a row without a sequence) to {size - 1}, the last row of the "
            f"pool, got {given[i]} in row {_place(i, slots)}"
        )
    if not distinct:
        return
    used = given[given >= 0]
    values, counts = np.unique(used, return_counts=True)
    if (counts > 1).any():
        twice = values[np.argmax(counts > 1)]
        places = [_place(int(i), slots) for i in np.flatnonzero(given == twice)]
        raise ValueError(
            f"{name} must differ from one another (but for -1), got {twice} in rows "
            f"{', '.join(map(str, places))}: each row of a pool holds one sequence"
        )


def _place(i: int, slots: Slots) -> object:
    """The place of the i-th slot: a number, or several where slots have several axes."""
    place = tuple(int(x) for x in np.unravel_index(i, np.shape(slots)))
    return place[0] if len(place) == 1 else place


def live(slots: Slots, size: int) -> jax.Array:
    """Which slots are rows of a pool of this size, bool as slots."""
    slots = jnp.asarray(slots)
    return (slots >= 0) & (slots < size)


def rows(slots: Slots, size: int) -> jax.Array:
    """The slots; for those that are no rows of a pool of this size, the size: what reads and writes
    by them drops what is out of bounds."""
    return jnp.where(live(slots, size), slots, size)


def read(pool: Any, slots: Slots) -> Any:
    """The states in these slots, a tree; zeros for a slot that is no row of the pool."""

    def rows_of(x: jax.Array) -> jax.Array:
        x = jnp.asarray(x)
        return x.at[rows(slots, x.shape[0])].get(mode="fill", fill_value=0)

    return jax.tree.map(rows_of, pool)


def take(pool: Any, slots: Slots) -> Any:
    """What `read` returns, for states that `put` writes back.

    A barrier: if XLA read the pool in several operations, it would copy the pool before it wrote to
    it, for what reads it afterwards.
    """
    return jax.tree.map(lax.optimization_barrier, read(pool, slots))


def put(pool: Any, new: Any, slots: Slots) -> Any:
    """The pool with these states in these slots; nothing is written for one that is no row of it.

    Where the pool's buffer is donated or a temporary of the caller's, it is written in place.
    """

    def write(x: jax.Array, y: jax.Array) -> jax.Array:
        x = jnp.asarray(x)
        return x.at[rows(slots, x.shape[0])].set(y, mode="drop")

    return jax.tree.map(write, pool, new)


def zero_unless(alive: jax.Array, x: jax.Array) -> jax.Array:
    """x [B, ...] with zeros in the rows that are not alive, bool [B], whatever they hold."""
    return jnp.where(alive.reshape(-1, *[1] * (x.ndim - 1)), x, jnp.zeros((), x.dtype))


def on_rows(*, shared: Sequence[int] = ()) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Decorates a step of states [B, ...], in plain JAX, which then takes `slots`, too.

    The rows are gathered, advanced and scattered. Rows without a sequence are advanced as zeros,
    so that no NaN of theirs reaches what all rows share, in a backward pass either.

    Args:
      shared: the numbers of the arguments without an axis of rows. The last argument is the state.
    """

    def decorate(step: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(step)
        def call(*arguments: Any, slots: Slots | None = None, **options: Any) -> Any:
            if slots is None:
                return step(*arguments, **options)
            *arrays, pool = arguments
            alive = live(slots, jax.tree.leaves(pool)[0].shape[0])
            arrays = [
                x if x is None or i in shared else zero_unless(alive, jnp.asarray(x))
                for i, x in enumerate(arrays)
            ]
            o, new = step(*arrays, take(pool, slots), **options)
            return zero_unless(alive, o), put(pool, new, slots)

        return call

    return decorate


def row_values(array: Array, slots: Slots | None) -> np.ndarray[Any, Any]:
    """The values of a known array [B], or [R] with slots, in the rows that a call starts from;
    all, if the slots are not known."""
    values = np.asarray(array)
    if slots is None or not checks.known(slots):
        return values
    chosen = np.asarray(slots)
    return values[chosen[chosen >= 0]]
