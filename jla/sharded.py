"""Whole arrays on a mesh: the mechanisms in a shard_map."""

import functools
import inspect
from collections.abc import Callable
from typing import Any

import jax

from jla._core import axes, checks, whole
from jla._core.whole import Names
from jla.gsa import GSAState, gsa
from jla.kda import kda
from jla.log_linear import LogLinearState, log_linear_attention
from jla.mesa_net import MesaState, mesa_net
from jla.path_attention import PathCache, path_attention

__all__ = ["sharded"]

# The axes of each function's arguments, and the type of its state; None if that is one array.
_FUNCTIONS: dict[Any, tuple[axes.Axes, Any]] = {
    kda: (axes.KDA, None),
    gsa: (axes.GSA, GSAState),
    log_linear_attention: (axes.LOG_LINEAR, LogLinearState),
    mesa_net: (axes.MESA_NET, MesaState),
    path_attention: (axes.PATH, PathCache),
}


@checks.named
def sharded[**A, R](
    function: Callable[A, R], *, B: Names = None, T: str | None = None, H: Names = None
) -> Callable[A, R]:
    """A mechanism on whole arrays that are split over a mesh: rows, time, heads, or several.

    The function returned takes what the mechanism takes, but for `axis_name`. It opens a
    `jax.shard_map` over all axes of the mesh in force (`jax.set_mesh`) and calls the mechanism with
    `axis_name=T`. It belongs under `jit`. Arrays that lie otherwise are moved first; axes of the
    mesh that are not named here have copies.

    docs/scale.md says which axis is good for what, and what it costs.

    Example:
      mesh = jax.make_mesh((1, 1), ("data", "seq"), devices=jax.devices()[:1])
      q = k = v = jnp.ones((2, 8, 4, 16))
      g = jnp.full((2, 8, 4, 16), -0.1)
      with jax.set_mesh(mesh):
          o, state = jla.sharded(jla.gsa, B="data", T="seq")(q, k, v, 1 - jnp.exp(g), g)

    Args:
      function: `jla.kda`, `jla.gsa`, `jla.log_linear_attention`, `jla.mesa_net` or
        `jla.path_attention`.
      B: the axis of the mesh, or several, over which rows are split; None for none.
      T: the axis over which time is split; None for none.
      H: the axis, or several, over which heads are split. Key heads that all heads share (H = 1 in
        `kda`, HK = 1 in `log_linear_attention`) are copied. None for none.

    Returns:
      A function with the arguments and the results of `function`.

    Raises:
      TypeError: another function. From the function returned: its `axis_name` is not None.
      ValueError: from the function returned: no mesh is set, or it has no such axis; an axis of an
        array is no multiple of the devices that split it; and all that `function` raises.
    """
    if function not in _FUNCTIONS:
        known = ", ".join(f"jla.{f.__name__}" for f in _FUNCTIONS)
        raise TypeError(f"function must be one of {known}, got {function!r}")
    table, state_type = _FUNCTIONS[function]
    state = _state(function)
    names = whole.split(B, T, H)
    signature = inspect.signature(function)

    def call(*args: A.args, **settings: A.kwargs) -> R:
        given = signature.bind(*args, **settings).arguments
        if given.pop("axis_name", None) is not None:
            raise TypeError("axis_name must not be given: sharded sets it to its own T")
        tokens = {field.partition(".")[0] for field in table}
        arrays = {n: x for n, x in given.items() if n in tokens and x is not None}
        if state in arrays and state_type is not None:
            checks.check_state(state, arrays[state], state_type)
        options = {n: x for n, x in given.items() if n not in tokens}
        mesh = whole.mesh_with(names)
        sizes = checks.sizes_of(table, **arrays)
        places = tuple(whole.places(names, mesh, sizes, axes.shared_heads(table)).items())
        program = _program(function, tuple(arrays), tuple(options.items()), T, mesh, places)
        return program(arrays)

    call.__qualname__ = "sharded"  # in front of its messages
    return functools.wraps(function)(checks.named(call))


def _state(function: Any) -> str:
    return "cache" if function is path_attention else "initial_state"


@functools.lru_cache(maxsize=256)
def _program(
    function: Any,
    names: tuple[str, ...],
    options: tuple[tuple[str, Any], ...],
    time: str | None,
    mesh: Any,
    places: tuple[tuple[str, tuple[str, ...]], ...],
) -> Callable[[dict[str, Any]], Any]:
    """The jitted shard_map of a function of these arrays, by name."""
    table, state_type = _FUNCTIONS[function]
    place = dict(places)

    def spec(name: str) -> Any:
        fields = [x for x in table if x.startswith(f"{name}.")]
        return state_type(*map(spec, fields)) if fields else whole.spec(table[name], place)

    in_specs = {name: spec(name) for name in names}
    state = _state(function)
    # PaTH without a cache returns none.
    out_state = spec(state) if state in names or function is not path_attention else None

    def run(arrays: dict[str, Any]) -> Any:
        return function(**arrays, **dict(options), axis_name=time)

    return jax.jit(whole.mapped(run, mesh, (in_specs,), (spec("o"), out_state)))
