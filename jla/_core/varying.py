"""Which axes of shard_map's mesh the types of arrays vary over."""

from collections.abc import Callable

import jax
from jax import lax
from jax.extend.core import jaxpr_as_fun

type Arrays = tuple[jax.Array, ...]


def varying_as(weights: jax.Array, x: jax.Array) -> jax.Array:
    """Weights of a type that varies over all axes of shard_map's mesh over which x's does: the
    gradient that a kernel makes of them does so, and the transpose is the sum over those axes."""
    return _over(_varying(x), weights)


def alike(*arrays: jax.Array) -> tuple[jax.Array, ...]:
    """Arrays of types that vary over the same axes of shard_map's mesh, see `varying_as`."""
    axes = frozenset().union(*map(_varying, arrays))
    return tuple(_over(axes, x) for x in arrays)


def without_varying_types(function: Callable[..., Arrays], arrays: Arrays) -> Arrays:
    """Calls a function that knows nothing of the mesh axes over which shard_map's values vary.

    Refs that vary are refused by Pallas, and what a kernel returns would not vary, though all of it
    depends on all operands.
    """
    axes = frozenset().union(*map(_varying, arrays))
    if not axes:
        return function(*arrays)
    shapes = (jax.ShapeDtypeStruct(x.shape, x.dtype) for x in arrays)
    # Under jit it is one operation, inside of which JAX does not compare how an iota and its users
    # vary.
    out = jaxpr_as_fun(jax.make_jaxpr(jax.jit(lambda *x: function(*x)))(*shapes))(*arrays)
    return tuple(_over(axes, x) for x in out)


def _over(axes: frozenset[str], x: jax.Array) -> jax.Array:
    """x of a type that varies over these axes, too."""
    missing = tuple(axes - _varying(x))
    return lax.pcast(x, missing, to="varying") if missing else x


def _varying(x: jax.Array) -> frozenset[str]:
    return jax.typeof(x).manual_axis_type.varying
