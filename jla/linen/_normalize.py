"""Normalisation in float32, whatever the dtypes of the inputs and the parameters."""

from collections.abc import Callable

import jax.numpy as jnp
from flax import linen as nn
from jax import lax

f32 = jnp.float32


def l2norm(x, epsilon=1e-6):
    """`x / sqrt(sum(x**2) + epsilon)` over the last axis, computed in float32, in x's dtype."""
    x32 = x.astype(f32)
    squares = jnp.sum(x32 * x32, axis=-1, keepdims=True)
    return (x32 * lax.rsqrt(squares + epsilon)).astype(x.dtype)


class RMSNorm(nn.Module):
    """`x / sqrt(mean(x**2) + epsilon) * scale * activation(gate)` in x's dtype; or without a gate.

    Not `nn.RMSNorm` and a product, because that does not run with a bfloat16 scale under strict
    dtype promotion.

    Attributes:
      epsilon: added to the mean square.
      axes: how many of x's last axes are normalised together.
      param_dtype: dtype of the scale, which has the shape of these axes and starts as ones.
      activation: of the gate.
    """

    epsilon: float
    axes: int = 1
    param_dtype: nn.dtypes.Dtype = f32
    activation: Callable = nn.sigmoid

    @nn.compact
    def __call__(self, x, gate=None):
        """`x` and `gate` have one shape and any float dtypes."""
        scale = self.param("scale", nn.initializers.ones, x.shape[-self.axes :], self.param_dtype)
        x32 = x.astype(f32)
        axes = tuple(range(-self.axes, 0))
        mean_square = jnp.mean(x32 * x32, axis=axes, keepdims=True)
        normed = x32 * lax.rsqrt(mean_square + self.epsilon) * scale.astype(f32)
        if gate is not None:
            normed = normed * self.activation(gate.astype(f32))
        return normed.astype(x.dtype)
