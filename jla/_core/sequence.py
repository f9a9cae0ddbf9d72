"""One sequence on several devices: T split over an axis of a mesh.

Each of the axis's P devices has a piece of every row: L = T / P neighbouring tokens, in the order
of the devices. What the tokens of a piece do to a state does not depend on the state, so every
device summarises its piece, all devices exchange the summaries in one all-gather, and each computes
the state that enters its own piece. Then it runs alone. `jla._core.movement` has the summaries.

A state is selected, never multiplied by 0: what later devices have, NaN included, cannot reach the
tokens of earlier ones. PaTH's state grows with T; there the devices exchange heads for time.
"""

import functools
import inspect
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from jla._core.derivatives import is_reverse_only
from jla._core.segments import segment_starts
from jla._core.types import Array, SegmentIds

i32 = jnp.int32

type Run = Callable[..., tuple[jax.Array, Any]]  # run(*arrays, state, segment_ids) -> o, state


def devices_of(axis_name: object) -> int:
    """The number of devices of a manual axis; raises ValueError where there is no such axis."""
    if not isinstance(axis_name, str):
        raise TypeError(f"axis_name must be None or a string, got {type(axis_name)}")
    try:
        return lax.axis_size(axis_name)
    except NameError:
        manual = ", ".join(map(repr, jax.sharding.get_abstract_mesh().manual_axes)) or "none"
        raise ValueError(
            f"axis_name must be a manual axis of the mesh (manual here: {manual}), got "
            f"{axis_name!r}. Call the function inside a jax.shard_map over {axis_name!r}, or give "
            "whole arrays to jla.sharded"
        ) from None


class Links(NamedTuple):
    """How the pieces of the rows continue one another. Every device knows it of all, [P, B].

    Attributes:
      linked: whether a piece's first token continues the segment of the token before; for the first
        piece whether it continues the initial state, which is always so. bool.
      whole: whether no border lies inside the piece, so that what enters may leave it. bool.
      length: the tokens of the piece's last segment, int32.
    """

    linked: jax.Array
    whole: jax.Array
    length: jax.Array


def links(segment_ids: SegmentIds | None, B: int, L: int, axis: str) -> Links:
    """The `Links` of pieces of L tokens; three integers a row from every device."""
    size = lax.axis_size(axis)
    if segment_ids is None:
        always = jnp.ones((size, B), bool)
        return Links(always, always, jnp.full((size, B), L, i32))
    ids = jnp.asarray(segment_ids)
    begin = jnp.max(jnp.where(segment_starts(ids), jnp.arange(L, dtype=i32)[None], 0), axis=1)
    # A narrower dtype could not hold the lengths; in a wider one ids may differ in high bits alone.
    ids = ids if ids.dtype.itemsize >= 4 else ids.astype(i32)
    mine = jnp.stack([ids[:, 0], ids[:, -1], (L - begin).astype(ids.dtype)])
    first, last, length = jnp.moveaxis(lax.all_gather(varying(mine, axis), axis), 1, 0)
    linked = jnp.concatenate([jnp.ones_like(first[:1], bool), first[1:] == last[:-1]])
    return Links(linked, length == L, length.astype(i32))


def varying[Tree](tree: Tree, axis: str) -> Tree:
    """The arrays of a tree, of types that vary over this axis, as shard_map's exchanges want."""
    if axis not in jax.sharding.get_abstract_mesh().manual_axes:
        return tree  # vmap's, of which types do not tell

    def cast(x):
        varies = axis in jax.typeof(x).manual_axis_type.varying
        return x if varies else lax.pcast(x, axis, to="varying")

    return jax.tree.map(cast, tree)


def entering(
    step: Callable[[Any, Any, Links], Any],
    piece: Any,
    initial: Any,
    links: Links,
    axis: str,
    *,
    reverse: bool = False,
) -> Any:
    """The state that enters this device's piece.

    Args:
      step: `step(state, piece, links)` is the state after a piece without borders inside; `links`
        are that piece's. Where there are borders, it gets zeros for the state.
      piece: this device's summary, a tree of arrays [B, ...].
      initial: the state before the first piece, a tree of arrays [B, ...].
      reverse: whether the states move from right to left; `initial` then enters the last piece.
    """
    pieces, state = gathered(piece, axis), varying(initial, axis)
    size, index = lax.axis_size(axis), lax.axis_index(axis)
    mine = state
    # No loop of JAX's: it would want one type of state before and after a step, and its turns cost
    # XLA more than these few products.
    for j in reversed(range(size)) if reverse else range(size):
        passed = j + 1 if reverse else j
        if passed < size:
            state = select_rows(links.linked[passed], state)
        mine = jax.tree.map(functools.partial(jnp.where, index == j), state, mine)
        piece, own = jax.tree.map(lambda x, j=j: x[j], (pieces, links))
        state = step(select_rows(own.whole, state), piece, own)
    return mine


def entering_gradient(step: Any, factor: Any, said: Any, links: Links, axis: str) -> Any:
    """The gradient of this device's last state, as far as later devices make it.

    Args:
      step: `entering`'s, of gradients, from right to left.
      factor, said: the piece's summary: what it does to a gradient, and the gradient of its first
        state, a tree of arrays [B, ...], if later devices make none.
    """
    nothing = jax.tree.map(jnp.zeros_like, said)
    return entering(step, (factor, said), nothing, links, axis, reverse=True)


def of_first_device[Tree](gradient: Tree, axis: str) -> Tree:
    """An initial state's gradient on the first device, zeros on others: shard_map adds them up."""
    first = lax.axis_index(axis) == 0
    return jax.tree.map(lambda x: jnp.where(first, x, 0), gradient)


def select_rows[Tree](rows: jax.Array, tree: Tree) -> Tree:
    """Arrays [B, ...] in the rows that are true, and zeros in the others."""

    def select(x):
        return jnp.where(rows.reshape(-1, *[1] * (x.ndim - 1)), x, jnp.zeros((), x.dtype))

    return jax.tree.map(select, tree)


def gathered(tree: Any, axis: str) -> Any:
    """`lax.all_gather` of arrays [B, ...] to [P, B, ...], with one collective for each dtype."""
    leaves, structure = jax.tree.flatten(tree)
    gathered: list[Any] = [None] * len(leaves)
    for dtype in dict.fromkeys(x.dtype for x in leaves):
        places = [i for i, x in enumerate(leaves) if x.dtype == dtype]
        flat = [leaves[i].reshape(leaves[i].shape[0], -1) for i in places]
        together = lax.all_gather(varying(jnp.concatenate(flat, axis=1), axis), axis)
        parts = jnp.split(together, np.cumsum([x.shape[1] for x in flat])[:-1], axis=2)
        for i, part in zip(places, parts, strict=True):
            gathered[i] = part.reshape(part.shape[0], *leaves[i].shape)
    return structure.unflatten(gathered)


def from_last[Tree](tree: Tree, axis: str) -> Tree:
    """The last device's arrays, on every device; a sum, so that shard_map knows they are equal."""
    last = lax.axis_index(axis) == lax.axis_size(axis) - 1
    return jax.tree.map(lambda x: lax.psum(jnp.where(last, x, 0), axis), tree)


class Movement(NamedTuple):
    """How a mechanism's state moves: what there is to know of it for a run over devices.

    Attributes:
      empty: `empty(arrays)` is the state before the first token, zeros.
      summary: `summary(run, arrays, state, segment_ids, links, axis)` is what a piece does to any
        state that enters it; `state` is the row's initial one.
      step: `step(state, summary, links)` is the state after a piece. If there is a `rule`, a
        summary is a pair, and `step` a linear map made of the first plus the second.
      rule: whether kernels' gradients are made without those of the summary, which would cost more
        than those of the run.
    """

    empty: Callable[[tuple[Any, ...]], Any]
    summary: Callable[..., Any]
    step: Callable[[Any, Any, Links], Any]
    rule: bool = False


def by_states(
    run: Run,
    movement: Movement,
    arrays: tuple[Any, ...],
    state: Any,
    segment_ids: SegmentIds | None,
    axis: str,
) -> tuple[jax.Array, Any]:
    """A mechanism on the pieces of a sequence: the outputs of this device's, and the last state.

    Args:
      run: `run(*arrays, state, segment_ids)` is the mechanism on one device. If it takes an
        `axis_name`, it does what this function does, and returns the state that leaves its piece.
      arrays: its arguments, those with tokens [B, L, ...].
      state: before the first token of the sequence, or None; the same on all devices.
      segment_ids: integers [B, L], or None.
      axis: the manual axis.
    """
    B, L = arrays[0].shape[:2]
    state = movement.empty(arrays) if state is None else state
    arrays, state = varying((arrays, state), axis)
    if "axis_name" in inspect.signature(run).parameters:  # it exchanges its states by itself
        o, end = run(*arrays, state, segment_ids, axis_name=axis)
        return o, from_last(end, axis)
    pieces = links(segment_ids, B, L, axis)
    if movement.rule and is_reverse_only(run):
        o, end = by_rule(run, movement, axis, arrays, state, segment_ids, pieces)
    else:
        summary = movement.summary(run, arrays, state, segment_ids, pieces, axis)
        start = entering(movement.step, summary, state, pieces, axis)
        o, end = run(*arrays, start, segment_ids)
    return o, from_last(end, axis)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1, 2))
def by_rule(
    run: Run,
    movement: Movement,
    axis: str,
    arrays: tuple[Any, ...],
    state: Any,
    segment_ids: SegmentIds | None,
    pieces: Links,
) -> tuple[jax.Array, Any]:
    """A run from the state that enters, whose gradient does not differentiate the summary.

    Given the states that enter the pieces, and the gradients of those that leave them, the run's
    own gradient is all of it. The gradients move as the states do, from right to left:

        dS_in = M^T dS_out + what the piece's outputs say about S_in;   dS_out = dS_in of the next
    """
    return _by_rule_forward(run, movement, axis, arrays, state, segment_ids, pieces)[0]


def _by_rule_forward(
    run: Run,
    movement: Movement,
    axis: str,
    arrays: tuple[Any, ...],
    state: Any,
    segment_ids: SegmentIds | None,
    pieces: Links,
) -> tuple[Any, Any]:
    summary = movement.summary(run, arrays, state, segment_ids, pieces, axis)
    start = entering(movement.step, summary, state, pieces, axis)
    out, pull = jax.vjp(lambda arrays, start: run(*arrays, start, segment_ids), arrays, start)
    return out, (pull, summary[0], pieces)


def _by_rule_backward(
    run: Run, movement: Movement, axis: str, kept: Any, cotangents: Any
) -> tuple[Any, ...]:
    pull, factor, pieces = kept
    do, dend = cotangents
    _, said = pull((do, dend))

    def back(gradient, piece, links):
        _, transpose = jax.vjp(lambda x: movement.step(x, piece, links), gradient)
        return jax.tree.map(jnp.add, transpose(gradient)[0], piece[1])

    after = entering_gradient(back, factor, said, pieces, axis)
    dend = jax.tree.map(jnp.add, dend, after)
    darrays, dstart = pull((do, dend))
    return darrays, of_first_device(dstart, axis), None, None


by_rule.defvjp(_by_rule_forward, _by_rule_backward)


def by_heads(
    run: Run, arrays: tuple[Any, ...], segment_ids: SegmentIds | None, axis: str
) -> jax.Array:
    """A mechanism with a part of the heads and all tokens on each device: this device's outputs.

    Args:
      run: `run(*arrays, None, segment_ids)`, on whole sequences.
      arrays: [B, L, heads, ...], or None; the axis's devices divide the heads.
      segment_ids: integers [B, L], or None; they alone are gathered.
      axis: the manual axis.
    """

    def to_heads(x):
        return lax.all_to_all(x, axis, split_axis=2, concat_axis=1, tiled=True)

    if segment_ids is not None:
        segment_ids = lax.all_gather(segment_ids, axis, axis=1, tiled=True)
    arrays, segment_ids = varying((arrays, segment_ids), axis)
    o, _ = run(*jax.tree.map(to_heads, arrays), None, segment_ids)
    return lax.all_to_all(o, axis, split_axis=1, concat_axis=2, tiled=True)


def halo(x: Array, tokens: int, axis: str) -> jax.Array:
    """The left neighbour's last tokens, [B, tokens, ...] of x [B, L, ...]; the first device gets
    zeros. A device must have as many."""
    if x.shape[1] < tokens:
        raise ValueError(
            f"each device of axis_name = {axis!r} must have at least {tokens} tokens, which its "
            f"right neighbour reads, got {x.shape[1]}"
        )
    size = lax.axis_size(axis)
    right = [(i, (i + 1) % size) for i in range(size)]  # vmap's axes want all of them to send
    before = lax.ppermute(varying(x[:, x.shape[1] - tokens :], axis), axis, right)
    return jnp.where(lax.axis_index(axis) > 0, before, jnp.zeros((), x.dtype))


def past(x: Array, segment_ids: SegmentIds | None, tokens: int, axis: str) -> jax.Array:
    """The `halo` of x, with zeros for tokens of other segments than that of the first own token."""
    before = halo(x, tokens, axis)
    if segment_ids is None:
        return before
    ids = jnp.asarray(segment_ids)
    ids = jnp.concatenate([halo(ids, tokens, axis), ids[:, :1]], axis=1)
    continues = lax.cummin((ids[:, 1:] == ids[:, :-1]).astype(i32), axis=1, reverse=True)
    return jnp.where(continues[..., None, None] == 1, before, jnp.zeros((), x.dtype))
