"""Checks of values: off unless the caller is inside `jla.checking()`, and free then."""

import contextlib
import functools
import threading
from collections.abc import Iterator, Mapping
from typing import Any

import jax
import jax.numpy as jnp

from jla._core import pools
from jla._core.cache import LazyPathCache, PathCache, first_recent, places
from jla._core.checks import state_fields
from jla._core.states import LazyLogLinearState, LogLinearState, levels_in_use, repeated
from jla._core.types import Array, Slots, State

f32 = jnp.float32

# A part of every jit cache's key, so that programs with checks and without are never mistaken.
_on = jax.make_user_context(False)
_lock = threading.Lock()  # the callbacks come from the runtime's threads
# (function, argument, what it must be) to (elements that are not, lowest, highest)
_found: dict[tuple[str, str, str], tuple[int, float, float]] = {}

# How far from 1 the length of a row may be: rounding to bfloat16 moves it by up to 4e-3.
UNIT_TOLERANCE = 1e-2
# Shorter rows count as zeros: the l2 norm of zeros makes such rows, and they have no effect.
NOTHING = 1e-3


@contextlib.contextmanager
def checking() -> Iterator[None]:
    """Checks the values that public functions and layers receive, and reports wrong ones by name.

    Shapes and dtypes are always checked. Values are not, because a compiled program cannot raise.
    In this context every call of a mechanism or a step also looks for

      - elements of any argument that are NaN or infinite, those of a state or cache included
        (unused places of a `PathCache` and unused levels of a `LogLinearState` excepted),
      - log decays `g` above 0,
      - `beta` below 0, and of `kda` and `path_attention` above 2; `lamb` that is not above 0,
      - rows of `kda`'s `k` and of `path_attention`'s `w` whose length is neither 1 (up to 1e-2) nor
        0, where `beta` is not 0.

    Leaving the context waits for the programs that were started in it, and raises one ValueError
    that lists everything found, by function and argument.

    It works inside `jit`, `grad`, `vmap`, `scan`, `checkpoint` and `shard_map`, in every
    implementation. A jitted function compiles once more for it and runs slower; outside, programs
    are unchanged. Threads share the findings: open one context at a time.

    Example:
      x, zeros = jnp.ones((2, 4, 16)), jnp.zeros((2, 4, 16, 16))
      try:
          with jla.checking():
              jla.gsa_step(x, x, x, x, x, jla.GSAState(zeros, zeros))
      except ValueError as error:
          print(error)  # jla.gsa_step: g must be at most 0 (natural-log decays), got 1 (count: 128)

    Raises:
      ValueError: on leaving, if values were found wrong. If another exception leaves the context,
        the list becomes a note of that one.
    """
    if not _on.value:
        with _lock:
            _found.clear()  # what an interrupted context left
    try:
        with _on(True):
            yield
    except Exception as error:
        message = _collect()
        if message:
            error.add_note(message)
        raise
    message = _collect()
    if message:
        raise ValueError(message)


def on() -> bool:
    """Whether the caller is inside `checking()`."""
    return _on.value


def values(
    function: str,
    *,
    unit: str | None = None,
    most_beta: float | None = None,
    slots: Slots | None = None,
    **arguments: Array | State | None,
) -> None:
    """Checks the values of a call's arguments, if the caller is inside `checking()`.

    Args:
      function: the public function's name, for the message.
      unit: the name of the argument whose rows have length 1.
      most_beta: the largest beta, or None.
      slots: the rows of a pool that a step starts from; nothing else of the pool is checked, and
        nothing of the rows of arguments that have no sequence.
      **arguments: arrays, states, a cache or None, by name.
    """
    if not _on.value:
        return
    if slots is not None:
        arguments = _of_live_rows(arguments, slots)
    # (argument, what it must be) to where it is not, and what to show of it
    checks: dict[tuple[str, str], tuple[jax.Array, jax.Array]] = {}
    for name, array, used in _arrays(arguments):
        array = jnp.asarray(array, f32)
        checks[name, "must be finite"] = ~jnp.isfinite(array) & used, array
        if name == "g":
            checks[name, "must be at most 0 (natural-log decays)"] = array > 0, array
        if name == "lamb":
            checks[name, "must be above 0"] = array <= 0, array
        if name == "beta":
            wrong, wanted = array < 0, "must be at least 0"
            if most_beta is not None:
                wrong, wanted = wrong | (array > most_beta), f"must be 0 to {most_beta}"
            checks[name, wanted] = wrong, array
        if name == unit:
            length = jnp.sqrt(jnp.sum(array * array, axis=-1))
            beta: Any = arguments["beta"]  # several value heads may share a key
            length = repeated(length, beta.shape[-1] // length.shape[-1], axis=length.ndim - 1)
            wrong = (jnp.abs(length - 1) > UNIT_TOLERANCE) & (length > NOTHING) & (beta != 0)
            checks[name, "must have rows of length 1 (or 0): normalise them"] = wrong, length
    results = [
        (
            jnp.sum(wrong, dtype=jnp.int32),
            jnp.min(jnp.where(wrong, shown, jnp.inf)),
            jnp.max(jnp.where(wrong, shown, -jnp.inf)),
        )
        for wrong, shown in checks.values()
    ]
    jax.debug.callback(functools.partial(_record, function, list(checks)), results)


def _of_live_rows(arguments: Mapping[str, Any], slots: Slots) -> dict[str, Any]:
    """The arguments of a step, zeros in rows without a sequence, and the states of its rows."""

    def rows(name: str, x: Any) -> Any:
        if name in pools.STATES:
            return pools.take(x, slots)
        if x is None or name == "lamb":  # which all rows share
            return x
        return pools.zero_unless(jnp.asarray(slots) >= 0, jnp.asarray(x))

    return {name: rows(name, x) for name, x in arguments.items()}


def _arrays(
    arguments: Mapping[str, Any],
) -> Iterator[tuple[str, jax.Array, jax.Array | bool]]:
    """Name, array and what of it is in use, bool and broadcastable, of every array of floats."""
    for name, x in arguments.items():
        if isinstance(x, (LazyPathCache, PathCache)):
            used = dict.fromkeys(("key", "value", "decay"), places(x) < x.length[:, None])
            if isinstance(x, LazyPathCache):
                first = first_recent(x.length, x.key.shape[1])[:, None]
                recent = first + jnp.arange(x.recent.shape[1], dtype=jnp.int32)[None]
                used |= dict(key=places(x) < first, recent=recent < x.length[:, None])
                yield f"{name}.change", x.change, True
            for field, mask in used.items():
                array = getattr(x, field)
                if array is not None:
                    shape = mask.shape + (1,) * (array.ndim - 2)
                    yield f"{name}.{field}", array, mask.reshape(shape)
        elif isinstance(x, (LazyLogLinearState, LogLinearState)):
            in_use = functools.partial(levels_in_use, L=x.levels.shape[-3])
            # With an axis of segments, those of each.
            used = (in_use if x.position.ndim == 1 else jax.vmap(in_use))(x.position)[..., None, :]
            yield f"{name}.levels", x.levels, used[..., None, None]
            if isinstance(x, LazyLogLinearState):
                yield f"{name}.log_decays", x.log_decays, used
        elif isinstance(x, tuple):
            for field, array in state_fields(name, x).items():
                yield field, array, True
        elif x is not None:
            yield name, x, True


def _record(
    function: str, labels: list[tuple[str, str]], results: list[tuple[Any, Any, Any]]
) -> None:
    """The callback: notes what is wrong."""
    with _lock:
        for label, (count, low, high) in zip(labels, results, strict=True):
            count, low, high = int(count), float(low), float(high)
            if count:
                before, lowest, highest = _found.get((function, *label), (0, low, high))
                extremes = min(lowest, low), max(highest, high)
                _found[function, *label] = before + count, *extremes


def _collect() -> str | None:
    """Waits for the callbacks; returns and forgets what they noted, as text, or None."""
    jax.effects_barrier()
    with _lock:
        found = dict(_found)
        _found.clear()
    if not found:
        return None
    lines = ["jla.checking found wrong values:"]
    for (function, argument, wanted), (count, low, high) in found.items():
        what = " to ".join(dict.fromkeys((f"{low:.6g}", f"{high:.6g}")))
        lines.append(f"  {function}: {argument} {wanted}, got {what} (count: {count})")
    return "\n".join(lines)
