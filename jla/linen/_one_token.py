"""A layer's call of one token a row, where kernels serve all parts of it."""

from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import linen as nn

from jla import _token
from jla._core import checking


class OneToken(NamedTuple):
    """A call of one token that kernels serve.

    Attributes:
      layer: a `Mixer`, bound. params: its parameters, by module and name.
      x: [B, D].
      first, second, convolutions: as `of` has them.
    """

    layer: nn.Module
    params: Mapping[str, Any]
    x: jax.Array
    first: Mapping[str, tuple[int, ...]]
    second: Mapping[str, tuple[str, tuple[int, ...]]]
    convolutions: Mapping[str, nn.Module]

    def project(self, *, rounded=(), silu_twice: bool = False) -> dict[str, jax.Array]:
        """All projections, convolved, [B, ...]; the convolutions' caches advance. In float32, but
        for those that are to be `rounded`, by name, and what others are made of."""
        rounded = {*rounded, *(source for source, _ in self.second.values())}
        results = self._multiplied(dict.fromkeys(self.first, self.x), rounded, silu_twice)
        if self.second:
            xs = {name: results[source] for name, (source, _) in self.second.items()}
            results |= self._multiplied(xs, rounded, silu_twice)
        features = {**self.first, **{name: x for name, (_, x) in self.second.items()}}
        return {name: y.reshape(-1, *features[name]) for name, y in results.items()}

    def _multiplied(self, xs, rounded, silu_twice):
        """The projections {name: rows}, convolved, [B, N]."""
        convolutions = [self.convolutions.get(name) for name in xs]
        taps = [None if c is None else self.params[c.name]["kernel"] for c in convolutions]
        pasts = [None if c is None else c.get_variable("cache", "inputs") for c in convolutions]
        y, new = _token.products_of_few(
            list(xs.values()),
            [_matrix(self.params[name]["kernel"]) for name in xs],
            [_flat(x) for x in taps],
            [_flat(x, 2) for x in pasts],
            rounded=[name in rounded for name in xs],
            silu_twice=silu_twice,
        )
        for convolution, past, last in zip(convolutions, new, pasts, strict=True):
            if convolution is not None:
                convolution.put_variable("cache", "inputs", past.reshape(last.shape))
        return dict(zip(xs, y, strict=True))


def of(layer, tokens, operation, given, first, second=None, float32=(), convolved=None, more=()):
    """The call, if it is one of one token from a cache and kernels serve it; else None.

    What is wrong with a call is left to be said by the layer's own way.

    Args:
      layer: a `Mixer`.
      operation: of `jla._token`. given: the projections that are its first arguments.
      first: {name: features} of the projections of the tokens.
      second: {name: (name of one of the first, features)} of projections of these.
      float32: parameters that have to be float32.
      more: what is left of the operation's arguments, as far as it matters to who serves.
      convolved: {name of a projection: name of its convolution}; None for those of "q_proj",
        "k_proj" and "v_proj", as far as the layer has parameters "q_conv1d" and so on.
    """
    second = second or {}
    plain = layer.decode and layer.axis_name is None and layer.mesh_axes is None
    if not plain or layer.is_initializing() or checking.on() or tokens.x.shape[1] != 1:
        return None
    if any(x is not None for x in (tokens.real, tokens.segments, tokens.slots, layer.precision)):
        return None
    if not layer.conv_size or layer.conv_bias:
        return None
    params, cache = layer.variables.get("params", {}), layer.variables.get("cache", {})
    x, dtype = tokens.x[:, 0], tokens.x.dtype
    if layer.dtype is None or jnp.dtype(layer.dtype) != dtype:
        return None
    (B, D), W = x.shape, layer.conv_size
    arrays = []  # and the shapes and dtypes that they must have
    for name, features in first.items():
        arrays.append((params.get(name, {}).get("kernel"), (D, *features), dtype))
    for name, (source, features) in second.items():
        arrays.append((params.get(name, {}).get("kernel"), (*first[source], *features), dtype))
    if convolved is None:
        convolved = {f"{x}_proj": f"{x}_conv1d" for x in "qkv" if f"{x}_conv1d" in params}
    shapes_of = {**first, **{name: x for name, (_, x) in second.items()}}
    taps, pasts = {}, {}
    for name, of in convolved.items():
        taps[name], pasts[name] = params[of].get("kernel"), cache.get(of, {}).get("inputs")
        arrays.append((taps[name], (W, *shapes_of[name]), None))
        arrays.append((pasts[name], (B, W - 1, *shapes_of[name]), dtype))
    arrays += [(params.get(name), None, jnp.float32) for name in float32]
    if not all(_fits(*array) for array in arrays):
        return None
    kernels = [_matrix(params[name]["kernel"]) for name in first]
    flat = [_flat(taps.get(name)) for name in first], [_flat(pasts.get(name), 2) for name in first]
    shapes = [jax.ShapeDtypeStruct((B, *shapes_of[name]), jnp.float32) for name in given]
    own = layer.own_choice()
    if not _token.serves("products_of_few", own, [x] * len(kernels), kernels, *flat):
        return None
    if second:
        rows = [jax.ShapeDtypeStruct((B, *first[source]), dtype) for source, _ in second.values()]
        kernels = [_matrix(params[name]["kernel"]) for name in second]
        flat = [_flat(taps.get(x)) for x in second], [_flat(pasts.get(x), 2) for x in second]
        if not _token.serves("products_of_few", own, rows, kernels, *flat):
            return None
    if not _token.serves(operation, layer.implementation, *shapes, *more):
        return None
    modules = {name: layer.convolution(of) for name, of in convolved.items()}
    return OneToken(layer, params, x, first, second, modules)


def _fits(array, shape, dtype):
    if array is None or dtype not in (None, array.dtype):
        return False
    return shape in (None, array.shape)


def _matrix(kernel):
    """A kernel [D, ...] as [D, N]."""
    return kernel.reshape(kernel.shape[0], -1)


def _flat(x, leading=1):
    """x with all axes but the first ones as one; or None."""
    return None if x is None else x.reshape(*x.shape[:leading], -1)
