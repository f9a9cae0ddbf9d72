"""Argument checks shared by the public functions: one message form for every mechanism.

Every message names the function, the argument, the value received and the values accepted
(API.md, clause 9).
"""

import functools
import numbers

import jax
import jax.numpy as jnp

FLOAT_DTYPES = (jnp.bfloat16, jnp.float16, jnp.float32)
HEAD_DIMS = range(16, 257)
IMPLEMENTATIONS = ("reference", "xla", "pallas")


def named(function):
    """Decorates a public function: its name stands in front of its error messages.

    What a layer says about its arguments starts with the layer's name; where the mechanism that the
    layer calls refuses something, both names are there. Only Python's plain exceptions are changed:
    the others belong to JAX or flax, and say themselves where they come from.
    """
    package = function.__module__.rpartition(".")[0]
    name = f"{package}.{function.__qualname__.removesuffix('.__call__')}"

    @functools.wraps(function)
    def call(*args, **kwargs):
        try:
            return function(*args, **kwargs)
        except (TypeError, ValueError, NotImplementedError) as error:
            if type(error) in (TypeError, ValueError, NotImplementedError):
                error.args = (f"{name}: {error}",)
            raise

    return call


def known(x):
    """Whether x's value can be read: it is no tracer, and all of it is on this host's devices."""
    return not isinstance(x, jax.core.Tracer) and getattr(x, "is_fully_addressable", True)


def check_shapes(**arguments):
    """Checks every array against its axis letters and returns the sizes the letters stand for.

    Each keyword is an argument's name, its value a pair of the array and its axes, for example
    `q=(q, "B T H K")`. The first argument that mentions a letter fixes its size.

    Raises:
      TypeError: an argument is not an array.
      ValueError: an argument's rank is wrong, an axis is empty, or two arguments disagree about a
        letter.
    """
    sizes, origin = {}, {}
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


def _order_hint(letters):
    """Ends the message about an array that may have its heads before its time, as elsewhere."""
    if letters[:2] != ["B", "T"] or not "".join(letters[2:3]).startswith("H"):
        return ""
    return (
        f". Time is axis 1 and heads are axis 2: if yours is [B, {letters[2]}, T, ...], "
        "pass x.swapaxes(1, 2)"
    )


def check_dtype(name, array, accepted):
    """Raises TypeError unless `array.dtype` is one of `accepted`."""
    accepted = tuple(jnp.dtype(d) for d in accepted)
    if jnp.dtype(array.dtype) not in accepted:
        names = " or ".join(dict.fromkeys(d.name for d in accepted))
        raise TypeError(f"{name} must be {names}, got {jnp.dtype(array.dtype).name}")


def check_float_dtype(name, dtype):
    """Raises TypeError unless a dtype, not an array's, is one that q, k and v can have."""
    if jnp.dtype(dtype) not in map(jnp.dtype, FLOAT_DTYPES):
        raise TypeError(f"{name} must be bfloat16, float16 or float32, got {jnp.dtype(dtype).name}")


def check_same_dtype(**arrays):
    """Raises TypeError unless the arrays share one of the supported floating dtypes."""
    (first, array), *rest = arrays.items()
    check_dtype(first, array, FLOAT_DTYPES)
    for name, other in rest:
        if other.dtype != array.dtype:
            raise TypeError(
                f"{name} must have {first}'s dtype {array.dtype.name}, got {other.dtype.name}"
            )


def check_head_dim(letter, size):
    """Raises ValueError unless a head dimension lies in the contract's 16 to 256."""
    if size not in HEAD_DIMS:
        raise ValueError(f"head dimension {letter} must be 16 to 256, got {size}")


def check_multiple(letter, size, of, of_size):
    """Raises ValueError unless one head count is a multiple of the other."""
    if size % of_size:
        raise ValueError(f"{letter} = {size} must be a multiple of {of} = {of_size}")


def check_scale(scale, default):
    """Returns the score scale as a Python float: it is a constant of the compiled program."""
    if scale is None:
        return float(default)
    if isinstance(scale, bool) or not isinstance(scale, numbers.Real):
        raise TypeError(f"scale must be None or a Python number, got {type(scale)}")
    return float(scale)


def check_negative(name, value):
    """Returns a Python number below zero as a float; raises TypeError or ValueError otherwise."""
    if isinstance(value, bool) or not isinstance(value, numbers.Real):
        raise TypeError(f"{name} must be a Python number, got {type(value)}")
    if not value < 0:
        raise ValueError(f"{name} must be negative, got {value}")
    return float(value)


def check_positive(name, value):
    """Returns a Python number above zero as a float; raises TypeError or ValueError otherwise."""
    if isinstance(value, bool) or not isinstance(value, numbers.Real):
        raise TypeError(f"{name} must be a Python number, got {type(value)}")
    if not value > 0:
        raise ValueError(f"{name} must be positive, got {value}")
    return float(value)


def check_count(name, value):
    """Returns a Python integer of at least 1; raises TypeError or ValueError otherwise."""
    if isinstance(value, bool) or not isinstance(value, numbers.Integral):
        raise TypeError(f"{name} must be a Python integer, got {type(value)}")
    if value < 1:
        raise ValueError(f"{name} must be at least 1, got {value}")
    return int(value)


def check_segment_ids(segment_ids):
    """Raises TypeError unless `segment_ids` holds integers."""
    if not jnp.issubdtype(segment_ids.dtype, jnp.integer):
        raise TypeError(f"segment_ids must be integers, got {segment_ids.dtype.name}")


def check_implementation(implementation):
    """Raises ValueError unless `implementation` is None or one of the three names."""
    if implementation is not None and implementation not in IMPLEMENTATIONS:
        raise ValueError(
            f"implementation must be None or one of {', '.join(map(repr, IMPLEMENTATIONS))}, "
            f"got {implementation!r}"
        )
