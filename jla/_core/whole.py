"""Whole arrays on a mesh: functions of one device's arrays, in a shard_map over all of its axes."""

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from jla._core.types import Sizes

type Names = str | Sequence[str] | None  # axes of the mesh
type Split = Mapping[str, tuple[str, ...]]  # by the letters B, T and H


def split(B: Names = None, T: Names = None, H: Names = None) -> Split:
    """The mesh's axes that split rows, time and heads, as tuples."""

    def as_tuple(names: Names) -> tuple[str, ...]:
        if names is None:
            return ()
        return (names,) if isinstance(names, str) else tuple(names)

    return {"B": as_tuple(B), "T": as_tuple(T), "H": as_tuple(H)}


def mesh_with(names: Split) -> Any:
    """The mesh in force; raises ValueError unless it has these axes, and none of them is manual."""
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty:
        raise ValueError("no mesh is set: call it inside `with jax.set_mesh(mesh):`")
    for letter, axes_of_letter in names.items():
        for name in axes_of_letter:
            if name not in mesh.axis_names:
                raise ValueError(
                    f"{letter} must be an axis of the mesh, one of "
                    f"{', '.join(map(repr, mesh.axis_names))}, got {name!r}"
                )
            if name in mesh.manual_axes:
                raise ValueError(
                    f"{letter} = {name!r} is manual here, inside a shard_map over it: arrays are "
                    "no longer whole. Call the function itself, with axis_name for T"
                )
    return mesh


def devices(names: Sequence[str]) -> int:
    """How many devices these axes of the mesh in force have together."""
    return math.prod(jax.sharding.get_abstract_mesh().shape[name] for name in names)


def places(names: Split, mesh: Any, sizes: Sizes, shared: Sequence[str] = ()) -> Split:
    """The axes of the mesh that split each axis letter, for these sizes.

    Raises ValueError if they are more than the letter's elements can be divided among. A letter of
    heads that is `shared` is not split if it stands for one head, which all heads share.
    """
    found: dict[str, tuple[str, ...]] = {}
    for letter, size in sizes.items():
        over = names.get("H" if letter.startswith("H") else letter, ())
        parts = math.prod(mesh.shape[name] for name in over)
        if letter in shared and size == 1:
            continue
        if size % parts:
            more = size + -size % parts
            padding = f"; pad to {more}, the padding a segment of its own" if letter == "T" else ""
            raise ValueError(
                f"{letter} = {size} must be a multiple of the {parts} devices of "
                f"{', '.join(map(repr, over))}{padding}"
            )
        found[letter] = over
    return found


def spec(letters: str, place: Split) -> PartitionSpec:
    """Where an array with these axes lies."""
    return PartitionSpec(*(place.get(x) or None for x in letters.split()))


def mapped(run: Callable[..., Any], mesh: Any, in_specs: Any, out_specs: Any) -> Callable[..., Any]:
    """`run` in a shard_map over all axes of the mesh that are not manual already. Its arrays may
    lie anywhere."""
    inside = jax.shard_map(
        run,
        in_specs=in_specs,
        out_specs=out_specs,
        axis_names=set(mesh.axis_names) - set(mesh.manual_axes),
    )
    explicit = AxisType.Explicit in mesh.axis_types

    def placed(x: Any, spec: PartitionSpec) -> Any:
        return jax.sharding.reshard(x, NamedSharding(mesh, spec)) if explicit else x

    return lambda *arrays: inside(*jax.tree.map(placed, arrays, in_specs))


def call(
    run: Callable[..., Any],
    arrays: Mapping[str, Any],
    letters: Mapping[str, str],
    results: Any,
    names: Split,
    shared: Sequence[str] = ("H",),
) -> Any:
    """`run(**arrays)` with one device's arrays.

    Args:
      arrays: those that are given; others are left out.
      letters: the axis letters of the arrays, by name, of more perhaps.
      results: the axis letters of what `run` returns, one string or a tuple of them.
      names: the mesh's axes, from `split`.
      shared: see `places`.
    """
    sizes: Sizes = {}
    for name, x in arrays.items():
        sizes |= dict(zip(letters[name].split(), x.shape, strict=True))
    mesh = mesh_with(names)
    place = places(names, mesh, sizes, shared)
    in_specs = {name: spec(letters[name], place) for name in arrays}
    out_specs = jax.tree.map(lambda x: spec(x, place), results)
    program = mapped(lambda arrays: run(**arrays), mesh, (in_specs,), out_specs)
    return program(dict(arrays))


def carries_shardings(x: jax.Array) -> bool:
    """Whether an array's type says where it lies: some axis of its mesh is explicit."""
    return AxisType.Explicit in jax.typeof(x).sharding.mesh.axis_types
