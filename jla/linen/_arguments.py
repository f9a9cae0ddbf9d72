"""Checks that the layers share, and what a layer does in `init`."""

import numbers

import jax
import jax.numpy as jnp

from jla import _checks


def check_inputs(inputs, mask, segment_ids):
    """Checks a call's arguments; returns D, the inputs' last axis."""
    axes = dict(inputs=(inputs, "B T D"))
    if mask is not None:
        axes |= dict(mask=(mask, "B T"))
    if segment_ids is not None:
        axes |= dict(segment_ids=(segment_ids, "B T"))
    sizes = _checks.check_shapes(**axes)
    _checks.check_dtype("inputs", inputs, _checks.FLOAT_DTYPES)
    if mask is not None:
        _checks.check_dtype("mask", mask, [bool])
    if segment_ids is not None:
        _checks.check_segment_ids(segment_ids)
    return sizes["D"]


def check_size(name, size, least, hint=""):
    """Raises TypeError or ValueError unless `size` is an integer of at least `least`."""
    if isinstance(size, bool) or not isinstance(size, numbers.Integral):
        raise TypeError(f"{name} must be an integer, got {size!r}{hint}")
    if size < least:
        raise ValueError(f"{name} must be at least {least}, got {size}{hint}")


def head_dims(D, num_heads, **dims):
    """Checks the head dimensions, and returns them with their defaults put in.

    The first is `D // num_heads` if None, every other one is the first.
    """
    first = next(iter(dims.values()))
    if first is None:
        _checks.check_multiple("the inputs' last axis", D, "num_heads", num_heads)
        first = D // num_heads
    dims = {name: first if size is None else size for name, size in dims.items()}
    for name, size in dims.items():
        check_size(name, size, 1)
        _checks.check_head_dim(name, size)
    return dims.values()


def check_conv_size(size):
    """Raises TypeError or ValueError unless `size` is None, 0 or an integer of at least 2."""
    if size is not None and size != 0:
        check_size("conv_size", size, 2, "; None or 0 leaves the convolutions out")


def check_cache(layer, **shapes):
    """Raises ValueError unless a decoding call of `layer` has a cache of these shapes."""
    if not layer.decode or layer.is_initializing():
        return
    for name, shape in shapes.items():
        if not layer.has_variable("cache", name):
            raise ValueError(
                'decode=True needs the "cache" collection: make one with '
                'init(key, inputs)["cache"] and pass it to apply beside "params"'
            )
        cached = layer.get_variable("cache", name).shape
        if cached != shape:
            raise ValueError(
                f"the cache's {name} must have shape {shape} for these inputs, got {cached}; make "
                "the cache with init on inputs of this batch size"
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
