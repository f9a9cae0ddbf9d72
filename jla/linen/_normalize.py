"""Normalisation in float32, whatever the dtypes of the inputs and the parameters."""

import jax.numpy as jnp
from flax import linen as nn
from jax import lax

f32 = jnp.float32


def l2norm(x, epsilon=1e-6):
    """`x / sqrt(sum(x**2) + epsilon)` over the last axis, computed in float32, in x's dtype."""
    x32 = x.astype(f32)
    squares = jnp.sum(x32 * x32, axis=-1, keepdims=True)
    return (x32 * lax.rsqrt(squares + epsilon)).astype(x.dtype)


class GatedRMSNorm(nn.Module):
    """`x / sqrt(mean(x**2) + epsilon) * scale * sigmoid(gate)` over the last axis, in x's dtype.

    Not `nn.RMSNorm` and a product, because that does not run with a bfloat16 scale under strict
    dtype promotion.

    Attributes:
      epsilon: added to the mean square.
      param_dtype: dtype of the scale, which has the size of x's last axis and starts as ones.
    """

    epsilon: float
    param_dtype: nn.dtypes.Dtype = f32

    @nn.compact
    def __call__(self, x, gate):
        """`x` and `gate` have one shape, [..., D], and any float dtypes."""
        scale = self.param("scale", nn.initializers.ones, x.shape[-1:], self.param_dtype)
        x32 = x.astype(f32)
        mean_square = jnp.mean(x32 * x32, axis=-1, keepdims=True)
        normed = x32 * lax.rsqrt(mean_square + self.epsilon) * scale.astype(f32)
        return (normed * nn.sigmoid(gate.astype(f32))).astype(x.dtype)
