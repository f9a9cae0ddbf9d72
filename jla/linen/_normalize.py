"""Normalisation in float32, whatever the dtypes of the inputs and the parameters."""

from collections.abc import Callable

import jax.numpy as jnp
from flax import linen as nn
from jax import lax
from jax.ad_checkpoint import checkpoint_name

from jla import _dispatch
from jla._core import checks
from jla._core.states import with_rank
from jla.linen import _arguments

f32 = jnp.float32

# The activations that the kernels have.
_NAMES = {nn.sigmoid: "sigmoid", nn.silu: "silu"}


def l2norm(x, epsilon=1e-6):
    """`x / sqrt(sum(x**2) + epsilon)` over the last axis, computed in float32, in x's dtype."""
    x32 = x.astype(f32)
    squares = jnp.sum(x32 * x32, axis=-1, keepdims=True)
    return (x32 * lax.rsqrt(squares + epsilon)).astype(x.dtype)


def gated_norm(norm, x, gate, real=None):
    """`norm(x * silu(gate))` over all heads of a token, as Mamba-2's.

    Args:
      norm: an `RMSNorm` of two axes with nothing of its own but a scale.
      x, gate: [B, T, H, D].
      real: bool [B, T], False where the result is zero whatever x is; or None.

    Returns:
      The gate's shape and dtype, computed in float32 and rounded once.
    """
    if real is None:
        arrays = x, gate, norm._scale(x)
        run = _dispatch.kernel("gated_norm", norm.implementation, *arrays)
        if run is not None:
            run = _arguments.unless_initializing(norm, run)
            return run(*arrays, epsilon=norm.epsilon)
    else:
        x = jnp.where(real[..., None, None], x, 0)
    return norm(x.astype(f32) * nn.silu(gate.astype(f32))).astype(gate.dtype)


class RMSNorm(nn.Module):
    """`x / sqrt(mean(x**2) + epsilon) * scale`, with a gate times `activation(gate + gate_bias)`.

    Computed in float32 and rounded once, to x's dtype. A drop-in for `nn.RMSNorm` whose input has
    the dtype that the output shall have: the parameter is the same, `scale`.

    16-bit inputs of more than one token go, on a GPU that has them, through kernels that read and
    write every array once, in the backward pass too, where XLA makes several passes.

        norm = RMSNorm()
        y = norm(x)              # [B, T, D], or [B, T, H, D] head by head
        y = norm(x, gate)        # or norm(x, gate, gate_bias)
        y, x = norm.branch(x, update)  # of a residual stream

    Attributes:
      epsilon: added to the mean square.
      axes: how many of x's last axes are normalised together.
      param_dtype: dtype of the scale, which has the shape of these axes and starts as ones.
      activation: of the gate.
      input_activation: what is applied to x before it is normalised; None for nothing.
      implementation: "reference" or "xla" for the formula, None or "pallas" for the GPU kernels
        where they can serve, and the formula elsewhere.
    """

    epsilon: float = 1e-6
    axes: int = 1
    param_dtype: nn.dtypes.Dtype = f32
    activation: Callable = nn.sigmoid
    input_activation: Callable | None = None
    implementation: str | None = None

    @checks.named
    def __call__(self, x, gate=None, gate_bias=None):
        """Normalises `x`.

        Args:
          x: [B, T, D] or [B, T, H, D], of any float dtype, as the others.
          gate: as x, or None.
          gate_bias: what is added to every token's gate, [D] or [H, D]; or None.

        Raises:
          ValueError: a gate's bias without a gate.
        """
        if gate is None and gate_bias is not None:
            raise ValueError("there is a gate_bias, and no gate")
        scale = self._scale(x)
        arrays = tuple(a for a in (x, scale, gate, gate_bias) if a is not None)
        used = {"activation": self.activation} if gate is not None else {}
        if self.input_activation is not None:
            used["input_activation"] = self.input_activation
        if all(function in _NAMES for function in used.values()):
            run = _dispatch.kernel("rms_norm", self.implementation, *arrays)
            if run is not None:
                names = {attribute: _NAMES[function] for attribute, function in used.items()}
                run = _arguments.unless_initializing(self, run)
                return run(*arrays, epsilon=self.epsilon, **names)
        return _arguments.unless_initializing(self, self._formula)(*arrays)

    @checks.named
    def branch(self, x, update=None):
        """The normalised residual stream, and the stream: x, or x + update.

        Take the stream from here, and leave the addition of what a branch makes to the next norm:

            y, x = norm_1.branch(x, update); update = mixer(y)
            y, x = norm_2.branch(x, update); update = mlp(y)

        Then the kernels add, normalise, and in the backward pass add up the gradients of y and of
        the stream, and no pass over memory is left to XLA. For checkpoint policies the sum is
        named "residual_stream".
        """
        scale = self._scale(x)
        arrays = (x, scale) if update is None else (x, scale, update)
        if self.input_activation is None:
            run = _dispatch.kernel("rms_norm_branch", self.implementation, *arrays)
            if run is not None:
                run = _arguments.unless_initializing(self, run)
                return run(*arrays, epsilon=self.epsilon)
        if update is not None:
            x = checkpoint_name(x + update, "residual_stream")
        return _arguments.unless_initializing(self, self._formula)(x, scale), x

    @nn.compact
    def _scale(self, x):
        return self.param("scale", nn.initializers.ones, x.shape[-self.axes :], self.param_dtype)

    def _formula(self, x, scale, gate=None, gate_bias=None):
        # Not `nn.RMSNorm` and a product, because that does not run with a bfloat16 scale under
        # strict dtype promotion.
        x32 = x.astype(f32)
        if self.input_activation is not None:
            x32 = self.input_activation(x32)
        axes = tuple(range(-self.axes, 0))
        mean_square = jnp.mean(x32 * x32, axis=axes, keepdims=True)
        scale = with_rank(scale.astype(f32), x.ndim)
        normed = x32 * lax.rsqrt(mean_square + self.epsilon) * scale
        if gate is not None:
            gate = gate.astype(f32)
            if gate_bias is not None:
                gate = gate + with_rank(gate_bias.astype(f32), gate.ndim)
            normed = normed * self.activation(gate)
        return normed.astype(x.dtype)
