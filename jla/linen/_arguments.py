"""Checks that the layers share, and what a layer does in `init`."""

import dataclasses
import functools
import math
import numbers
from collections.abc import Mapping

import jax
import jax.numpy as jnp
import numpy as np

from jla._core import checks, pools, whole


def check_attributes(layer):
    """Checks the attributes that have the same meaning in all layers, and all flags."""
    checks.check_not_negative("norm_epsilon", layer.norm_epsilon)
    checks.check_function("kernel_init", layer.kernel_init, "an initializer")
    for field in dataclasses.fields(layer):
        value = getattr(layer, field.name)
        if isinstance(field.default, bool) and not isinstance(value, bool | np.bool_):
            raise TypeError(f"{field.name} must be True or False, got {value!r}")


def split_of(layer):
    """The axes of the mesh by letter, from a layer's `mesh_axes`; None without, and in `init`.

    Raises TypeError or ValueError for other letters and names.
    """
    given = layer.mesh_axes
    if given is None:
        return None
    accepted = 'a dict with some of "B", "T" and "H", such as dict(B="data", T="seq")'
    if not isinstance(given, Mapping):
        raise TypeError(f"mesh_axes must be None or {accepted}, got {given!r}")
    for letter, names in given.items():
        if letter not in ("B", "T", "H"):
            raise ValueError(f"mesh_axes must be {accepted}, got {described(given)}")
        several = isinstance(names, tuple) and letter != "T"
        if not all(isinstance(x, str) for x in (names if several else [names or ""])):
            kind = "a string or None" if letter == "T" else "a string, several, or None"
            raise TypeError(f"mesh_axes[{letter!r}] must be {kind}, got {names!r}")
    if getattr(layer, "axis_name", None) not in (None, given.get("T")):
        raise ValueError(
            f"axis_name = {layer.axis_name!r} and mesh_axes = {described(given)} are given: inside "
            "a shard_map give axis_name, for whole arrays mesh_axes"
        )
    return None if layer.is_initializing() else whole.split(**given)


def split_over(layer):
    """The axis that T is split over; None in `init`, which runs outside of shard_map."""
    if layer.is_initializing():
        return None
    return layer.axis_name if layer.mesh_axes is None else layer.mesh_axes.get("T")


def refuse_over_devices(layer, mask):
    """Raises NotImplementedError for what is not supported over devices."""
    name = "axis_name" if layer.mesh_axes is None else "mesh_axes"
    if layer.is_initializing() or getattr(layer, name) is None:
        return
    given = f"with {name} = {described(getattr(layer, name))}"
    if split_over(layer) is not None and mask is not None:
        raise NotImplementedError(
            f"mask is not supported {given}: padding is not split over devices. Padding can be a "
            "segment of its own"
        )
    if layer.decode:
        raise NotImplementedError(
            f"decode is not supported {given}: caches are not split over devices. A clone with "
            f"{name}=None decodes"
        )


def described(value):
    """A setting as it was written; flax makes its own kind of dict of dicts."""
    return repr(dict(value)) if isinstance(value, Mapping) else repr(value)


def check_inputs(layer, inputs, mask, segment_ids):
    """Checks a call's arguments and the layer's dtypes; returns T and D."""
    if layer.dtype is not None:
        checks.check_float_dtype("dtype", layer.dtype)
    checks.check_float_dtype("param_dtype", layer.param_dtype)
    axes = dict(inputs=(inputs, "B T D"))
    if mask is not None:
        axes |= dict(mask=(mask, "B T"))
    if segment_ids is not None:
        axes |= dict(segment_ids=(segment_ids, "B T"))
    sizes = checks.check_shapes(**axes)
    checks.check_dtype("inputs", inputs, checks.FLOAT_DTYPES)
    if mask is not None:
        checks.check_dtype("mask", mask, [bool])
    if segment_ids is not None:
        checks.check_segment_ids(segment_ids)
    return sizes["T"], sizes["D"]


def check_slots(layer, slots, inputs, mask, segment_ids):
    """Checks the slots of a call, without the size of the pool; None is for no pool."""
    if slots is None:
        return
    if not layer.decode:
        raise ValueError("slots need decode=True, got False: they are rows of a cache")
    if layer.is_initializing():
        raise ValueError(
            "slots must be None in init: the rows of its inputs become the rows of the cache"
        )
    axes = "B N" if jnp.ndim(slots) == 2 else "B"
    sizes = checks.check_shapes(inputs=(inputs, "B T D"), slots=(slots, axes))
    checks.check_dtype("slots", slots, [jnp.int32])
    if "N" in sizes:
        _check_slots_of_segments(layer, sizes["N"], mask, segment_ids)


def _check_slots_of_segments(layer, N, mask, segment_ids):
    """Checks a call whose slots are [B, N], one for each segment of a row."""
    if not getattr(layer, "packs_states", False):
        raise NotImplementedError(
            "slots of shape [B, N], one for each segment of a row, are not supported by this "
            "layer: give each segment a row of its own, with slots [B], mask= for those that are "
            "shorter than others, and no segment_ids"
        )
    if segment_ids is None:
        raise ValueError(
            "segment_ids must be given with slots of shape [B, N]: they say which of a row's N "
            "slots each token starts from. Slots of shape [B] are for rows of one sequence"
        )
    if checks.known(segment_ids) and (mask is None or checks.known(mask)):
        ids = np.asarray(segment_ids)
        real = np.ones(ids.shape, bool) if mask is None else np.asarray(mask)
        rows = [x[here] for x, here in zip(ids, real, strict=True)]
        checks.check_ids_of_states(rows, N, "slots")


def check_size(name, size, least, hint=""):
    """Raises TypeError or ValueError unless `size` is an integer of at least `least`."""
    if isinstance(size, bool) or not isinstance(size, numbers.Integral):
        raise TypeError(f"{name} must be an integer, got {size!r}{hint}")
    if size < least:
        raise ValueError(f"{name} must be at least {least}, got {size}{hint}")


def head_dims(D, per, accepted, **dims):
    """Checks the head dimensions, and returns them with their defaults put in.

    The first is by default D divided by `per`, an attribute's name and its value; every other one
    is the first. All must be in the range `accepted`.
    """
    (leading, first), (name, count) = next(iter(dims.items())), per
    hints = {}
    if first is None:
        checks.check_multiple("the inputs' last axis", D, name, count)
        first = D // count
        hints[leading] = (
            f", its default, the inputs' last axis // {name} = {D} // {count}; "
            f"set {leading}, or another {name}"
        )
    dims = {name: first if size is None else size for name, size in dims.items()}
    for name, size in dims.items():
        check_size(name, size, 1)
        if size not in accepted:
            hint = hints.get(name, "")
            raise ValueError(f"{name} must be {checks.bounds(accepted)}, got {size}{hint}")
    return dims.values()


def check_convolution(size, bias):
    """Raises TypeError or ValueError unless `size` is an integer of at least 2, or None or 0 and
    there is no bias."""
    if size is not None and size != 0:
        check_size("conv_size", size, 2, "; None or 0 leaves the convolutions out")
    elif bias:
        raise ValueError(
            f"conv_bias is True, but with conv_size = {size} there are no convolutions; set "
            "conv_size, or leave conv_bias at False"
        )


def float32_parameter(layer, name, init, shape):
    """Makes or takes a parameter that is float32 whatever `param_dtype` is.

    Raises:
      TypeError: one of another dtype was given: a layer that went on with it would be as exact as
        that is, and nothing would say so.
    """
    parameter = layer.param(name, init, shape, jnp.float32)
    if parameter.dtype != jnp.float32:
        raise TypeError(
            f"the parameter {name} must be float32, whatever param_dtype is, got "
            f"{parameter.dtype.name}"
        )
    return parameter


@functools.partial(jax.jit, static_argnums=(1, 2, 3, 4))
def uniform(key, shape, dtype, low, high):
    """As `jax.random.uniform`, to the bit, drawn along one axis: XLA takes two to three times as
    long to compile a draw of several axes, and `init` compiles one for every shape."""
    return jax.random.uniform(key, (math.prod(shape),), dtype, low, high).reshape(shape)


@functools.partial(jax.jit, static_argnums=(1, 2))
def dt_bias_init(key, shape, dtype):
    """softplus of the result is log-uniform in [1e-3, 1e-1]."""
    log_dt = uniform(key, shape, dtype, math.log(1e-3), math.log(1e-1))
    dt = jnp.exp(log_dt)
    return dt + jnp.log(-jnp.expm1(-dt))


def check_cache(layer, slots=None, /, **entries):
    """Raises ValueError or TypeError unless a decoding call of `layer` has a fitting cache.

    Args:
      layer: a module with `decode`.
      slots: the call's, or None. With them the cache may have any number of rows.
      entries: for each name in its cache, the shape and the dtype.
    """
    if not layer.decode or layer.is_initializing():
        return
    for name, (shape, dtype) in entries.items():
        if not layer.has_variable("cache", name):
            raise ValueError(
                'decode=True needs the "cache" collection: make one with '
                'init(key, inputs)["cache"] and pass it to apply beside "params"'
            )
        cached, path = layer.get_variable("cache", name), "/".join((*layer.path, name))
        if slots is not None and cached.ndim:
            shape = (cached.shape[0], *shape[1:])
            pools.check(slots, cached.shape[0])
        if cached.shape != shape:
            raise ValueError(
                f"the cache's {path} must have shape {shape} for these inputs, got {cached.shape}; "
                "make the cache with init on inputs of this batch size"
            )
        if cached.dtype != jnp.dtype(dtype):
            raise TypeError(
                f"the cache's {path} must be {jnp.dtype(dtype).name}, got {cached.dtype.name}; "
                "make the cache with init of this layer, on inputs of this dtype"
            )


def unless_initializing(layer, run):
    """`run` itself; in `init`, a function that returns zeros of the shapes that `run` returns.

    `init` needs no values of the mechanism, and to compile it takes far longer than all else there.
    `run` is traced nevertheless, so that wrong arguments raise in `init` too.
    """
    if not layer.is_initializing():
        return run

    def zeros(*args, **kwargs):
        return jax.tree.map(
            lambda x: jnp.zeros(x.shape, x.dtype, device=x.sharding),
            jax.eval_shape(lambda: run(*args, **kwargs)),
        )

    return zeros
