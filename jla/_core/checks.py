"""Argument checks shared by the public functions: one message form for every mechanism.

Every message names the function, the argument, the value received and the values accepted
("Wrong arguments raise" in docs/contract.md).
"""

import functools
import numbers
from collections.abc import Callable, Iterable
from typing import Any, get_args

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer
from jax.typing import DTypeLike

from jla._core.axes import Axes, of_segments
from jla._core.types import Array, Implementation, NumpyArray, Sizes

FLOAT_DTYPES = (jnp.bfloat16, jnp.float16, jnp.float32)
HEAD_DIMS = range(16, 257)  # and slots; where a mechanism accepts more, its own file says so
IMPLEMENTATIONS: tuple[str, ...] = get_args(Implementation)


def named[**P, R](function: Callable[P, R]) -> Callable[P, R]:
    """Decorates a public function: its name stands in front of its error messages.

    A layer's message starts with the layer's name; if the mechanism that it calls refuses an
    argument, the message has both names. Only Python's plain exceptions are changed: the others
    belong to JAX or flax, and name their own origin.
    """
    package = [x for x in function.__module__.split(".")[:-1] if not x.startswith("_")]
    within = function.__qualname__.removesuffix(".__call__").removesuffix(".__post_init__")
    name = f"{'.'.join(package)}.{within}"

    @functools.wraps(function)
    def call(*args: P.args, **kwargs: P.kwargs) -> R:
        try:
            return function(*args, **kwargs)
        except (TypeError, ValueError, NotImplementedError) as error:
            if type(error) in (TypeError, ValueError, NotImplementedError):
                error.args = (f"{name}: {error}",)
            raise

    return call


def known(x: object) -> bool:
    """Whether x's value can be read: it is no tracer, and all of it is on this host's devices."""
    return not isinstance(x, Tracer) and getattr(x, "is_fully_addressable", True)


def check_shapes(**arguments: tuple[Any, str]) -> Sizes:
    """Checks every array against its axis letters and returns the sizes the letters stand for.

    Each keyword is an argument's name, its value a pair of the array and its axes, for example
    `q=(q, "B T H K")`. The first argument that mentions a letter fixes its size.

    Raises:
      TypeError: an argument is not an array.
      ValueError: an argument's rank is wrong, an axis is empty, or two arguments disagree about a
        letter.
    """
    sizes: Sizes = {}
    origin: dict[str, str] = {}
    for name, (array, axes) in arguments.items():
        letters = axes.split()
        if not isinstance(array, jax.Array) and not hasattr(array, "__array__"):
            raise TypeError(f"{name} must be an array [{', '.join(letters)}], got {type(array)}")
        shape = jnp.shape(array)
        if len(shape) != len(letters):
            raise ValueError(f"{name} must have axes [{', '.join(letters)}], got shape {shape}")
        for letter, size in zip(letters, shape, strict=True):
            if size < 1:
                raise ValueError(f"{name} has an empty axis {letter}: shape {shape}")
            if sizes.setdefault(letter, size) != size:
                raise ValueError(
                    f"{name} has {letter} = {size} (shape {shape}, axes [{', '.join(letters)}]), "
                    f"but {origin[letter]} has {letter} = {sizes[letter]}{_order_hint(letters)}"
                )
            origin.setdefault(letter, name)
    return sizes


def check_axes(axes: Axes, /, **arguments: object) -> Sizes:
    """`sizes_of`, and raises ValueError if T is split: where types carry shardings, they say so."""
    sizes = sizes_of(axes, **arguments)
    for name, x in arguments.items():
        letters = axes.get(name, "").split()
        if "T" not in letters or not isinstance(x, jax.Array):
            continue
        spec = (*jax.typeof(x).sharding.spec, *(None,) * len(letters))
        if split := spec[letters.index("T")]:
            raise ValueError(
                f"{name} has T split over the mesh's axis {split!r}: on whole arrays call "
                f"jla.sharded(..., T={split!r}), inside a shard_map over it give "
                f"axis_name={split!r}; or gather T with jax.sharding.reshard"
            )
    return sizes


def sizes_of(axes: Axes, /, **arguments: object) -> Sizes:
    """`check_shapes` of arguments whose axes a table of `jla._core.axes` has.

    A state is checked array by array.
    """
    pairs: dict[str, tuple[Any, str]] = {}
    for name, x in arguments.items():
        fields = {name: x} if name in axes else state_fields(name, x)
        pairs |= {field: (y, axes[field]) for field, y in fields.items()}
    return check_shapes(**pairs)


def state_fields(name: str, state: Any) -> dict[str, Any]:
    """The arrays of a NamedTuple, by the argument's name and theirs."""
    return {f"{name}.{field}": x for field, x in state._asdict().items()}


def given(**arguments: object) -> dict[str, object]:
    """The optional arguments that are not None."""
    return {name: x for name, x in arguments.items() if x is not None}


def check_state(name: str, state: object, kind: type[Any]) -> None:
    """Raises TypeError unless `state` is a NamedTuple of this kind."""
    if not isinstance(state, kind):
        fields = ", ".join(kind._fields)
        raise TypeError(f"{name} must be a jla.{kind.__name__}({fields}), got {type(state)}")


def _order_hint(letters: list[str]) -> str:
    """The end of the message about an array that may have its heads before its time."""
    if letters[:2] != ["B", "T"] or not "".join(letters[2:3]).startswith("H"):
        return ""
    return (
        f". Time is axis 1 and heads are axis 2: if yours is [B, {letters[2]}, T, ...], "
        "pass x.swapaxes(1, 2)"
    )


def check_state_dtypes(name: str, state: tuple[Array, ...]) -> None:
    """Raises TypeError unless all arrays of a state are float32."""
    for field, array in state_fields(name, state).items():
        check_dtype(field, array, [jnp.float32])


def check_dtype(name: str, array: Array, accepted: Iterable[DTypeLike]) -> None:
    """Raises TypeError unless `array.dtype` is one of `accepted`."""
    accepted = tuple(jnp.dtype(d) for d in accepted)
    if jnp.dtype(array.dtype) not in accepted:
        names = " or ".join(dict.fromkeys(d.name for d in accepted))
        raise TypeError(f"{name} must be {names}, got {jnp.dtype(array.dtype).name}")


def check_float_dtype(name: str, dtype: DTypeLike) -> None:
    """Raises TypeError unless a dtype, not an array's, is one that q, k and v can have."""
    try:
        given = "None" if dtype is None else jnp.dtype(dtype).name
    except TypeError:
        given = repr(dtype)
    if given not in [jnp.dtype(d).name for d in FLOAT_DTYPES]:
        raise TypeError(f"{name} must be bfloat16, float16 or float32, got {given}")


def check_same_dtype(**arrays: Array) -> None:
    """Raises TypeError unless the arrays share one of the supported floating dtypes."""
    (first, array), *rest = arrays.items()
    check_dtype(first, array, FLOAT_DTYPES)
    for name, other in rest:
        if other.dtype != array.dtype:
            raise TypeError(
                f"{name} must have {first}'s dtype {array.dtype.name}, got {other.dtype.name}"
            )


def check_head_dim(letter: str, size: int, accepted: range = HEAD_DIMS) -> None:
    """Raises ValueError unless a head dimension is accepted."""
    if size not in accepted:
        raise ValueError(f"head dimension {letter} must be {bounds(accepted)}, got {size}")


def bounds(accepted: range) -> str:
    """The first and the last of what is accepted, for a message."""
    return f"{accepted[0]} to {accepted[-1]}"


def check_multiple(letter: str, size: int, of: str, of_size: int) -> None:
    """Raises ValueError unless one head count is a multiple of the other."""
    if size % of_size:
        raise ValueError(f"{letter} = {size} must be a multiple of {of} = {of_size}")


def check_scale(scale: object, default: float) -> float:
    """Returns the score scale as a Python float: it is a constant of the compiled program."""
    if scale is None:
        return float(default)
    if isinstance(scale, bool) or not isinstance(scale, numbers.Real):
        raise TypeError(f"scale must be None or a Python number, got {type(scale)}")
    return float(scale)


def check_negative(name: str, value: object) -> float:
    """Returns a Python number below zero as a float; raises TypeError or ValueError otherwise."""
    number = _number(name, value)
    if not number < 0:
        raise ValueError(f"{name} must be negative, got {value}")
    return number


def check_positive(name: str, value: object) -> float:
    """Returns a Python number above zero as a float; raises TypeError or ValueError otherwise."""
    number = _number(name, value)
    if not number > 0:
        raise ValueError(f"{name} must be positive, got {value}")
    return number


def check_not_negative(name: str, value: object) -> float:
    """Returns a Python number, 0 or more, as a float; raises TypeError or ValueError otherwise."""
    number = _number(name, value)
    if not number >= 0:
        raise ValueError(f"{name} must be at least 0, got {value}")
    return number


def _number(name: str, value: object) -> float:
    if isinstance(value, bool) or not isinstance(value, numbers.Real):
        raise TypeError(f"{name} must be a Python number, got {type(value)}")
    return float(value)


def check_function(name: str, value: object, kind: str = "a function") -> None:
    """Raises TypeError unless the value can be called; `kind` says what it should be."""
    if not callable(value):
        raise TypeError(f"{name} must be {kind}, got {value!r}")


def check_count(name: str, value: object) -> int:
    """Returns a Python integer of at least 1; raises TypeError or ValueError otherwise."""
    if isinstance(value, bool) or not isinstance(value, numbers.Integral):
        raise TypeError(f"{name} must be a Python integer, got {type(value)}")
    if value < 1:
        raise ValueError(f"{name} must be at least 1, got {value}")
    return int(value)


def check_segment_ids(segment_ids: Array, sizes: Sizes | None = None) -> None:
    """Raises TypeError unless `segment_ids` holds integers; ValueError if these are known not to
    name the states, `sizes["N"]` of them where the initial state has an axis of segments."""
    if not jnp.issubdtype(segment_ids.dtype, jnp.integer):
        raise TypeError(f"segment_ids must be integers, got {segment_ids.dtype.name}")
    if sizes is not None and "N" in sizes and known(segment_ids):
        check_ids_of_states(list(np.asarray(segment_ids)), sizes["N"])


def axes_of_run(
    axes: Axes, initial_state: Any, segment_ids: Array | None, axis_name: str | None
) -> Axes:
    """The axes of a run's arguments: its initial state may have an axis of segments, N.

    Raises:
      ValueError: it has one, and there are no segments.
      NotImplementedError: it has one, and the sequence is split over devices.
    """
    if initial_state is None:
        return axes
    fields = {"initial_state": initial_state}
    if isinstance(initial_state, tuple):
        fields = state_fields("initial_state", initial_state)
    name, x = next(iter(fields.items()))
    given = axes[name].split()
    if jnp.ndim(x) != len(given) + 1:
        return axes
    if segment_ids is None:
        raise ValueError(
            f"{name} must have axes [{', '.join(given)}] without segment_ids, got shape "
            f"{jnp.shape(x)}; an axis of segments after the batch goes with segment_ids"
        )
    if axis_name is not None:
        raise NotImplementedError(
            f"{name} has an axis of segments (shape {jnp.shape(x)}), which is not supported with "
            f"axis_name: give [{', '.join(given)}], the state of each row's first segment, or run "
            "each row on one device"
        )
    return of_segments(axes)


def check_ids_of_states(rows: list[NumpyArray], N: int, states: str = "initial_state") -> None:
    """Raises ValueError unless each row's ids are -1 to N - 1, and each in one place of the row."""
    lowest, highest = min(x.min(initial=0) for x in rows), max(x.max(initial=0) for x in rows)
    if lowest < -1 or highest >= N:
        raise ValueError(
            f"segment_ids must be 0 to {N - 1}, for the N = {N} segments of {states}, or -1 "
            f"(padding), got {lowest} to {highest}"
        )
    for row, x in enumerate(rows):
        runs = x[np.flatnonzero(np.diff(x, prepend=-2))]
        names, counts = np.unique(runs[runs >= 0], return_counts=True)
        if np.any(counts > 1):
            raise ValueError(
                f"segment_ids must have each segment's tokens side by side where {states} has "
                f"an axis of segments, got id {names[counts > 1][0]} in several places of row {row}"
            )


def check_implementation(implementation: object) -> None:
    """Raises ValueError unless `implementation` is None or one of `IMPLEMENTATIONS`."""
    if implementation is not None and implementation not in IMPLEMENTATIONS:
        raise ValueError(
            f"implementation must be None or one of {', '.join(map(repr, IMPLEMENTATIONS))}, "
            f"got {implementation!r}"
        )
