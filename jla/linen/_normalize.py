"""Normalisation in float32, whatever the dtypes of the inputs and the parameters."""

import functools
from collections.abc import Callable, Mapping

import jax
import jax.numpy as jnp
from flax import linen as nn

from jla import _fused
from jla._core import checks, whole
from jla._core.types import Array, Implementation
from jla._core.whole import Names
from jla.linen import _arguments

f32 = jnp.float32


class RMSNorm(nn.Module):
    """`x / sqrt(mean(x**2) + epsilon) * scale`, with a gate times `activation(gate + gate_bias)`.

    Computed in float32 and rounded once, to x's dtype. It replaces `nn.RMSNorm` where the output
    has the input's dtype: the parameter is the same, `scale`.

    On a GPU that has the kernels, they serve 16-bit inputs of more than one token: they read and
    write every array once, in the backward pass too, where XLA makes several passes. They support
    rows of 64 elements or a multiple of 128 up to 2048, and sigmoid and SiLU.

    Example:
      x = jnp.ones((2, 8, 64))  # [B, T, D], or [B, T, H, D] head by head
      norm = jla.linen.RMSNorm()
      variables = norm.init(jax.random.key(0), x)
      y = norm.apply(variables, x)  # [2, 8, 64]
      y = norm.apply(variables, x, gate=x)
      y, stream = norm.apply(variables, x, update=x, method="branch")

    Attributes:
      epsilon: added to the mean square.
      axes: how many of x's last axes are normalised together.
      use_scale: whether there is the parameter `scale`; without it the scale is 1.
      param_dtype: dtype of the scale, which has the shape of these axes and starts as ones.
      activation: of the gate.
      input_activation: what is applied to x before it is normalised; None for nothing.
      implementation: "reference" or "xla" for the formula, "pallas" for the GPU kernels (what they
        cannot serve raises NotImplementedError), None for the fastest that supports the arguments.
      mesh_axes: of whole arrays under `jit`, the axes of the mesh that split rows, time, and the
        heads of x [B, T, H, D], as in the layers (docs/scale.md). Where a norm is over heads on
        several devices, the formula sums over them.
    """

    epsilon: float = 1e-6
    axes: int = 1
    use_scale: bool = True
    param_dtype: nn.dtypes.Dtype = f32
    activation: Callable = nn.sigmoid
    input_activation: Callable | None = None
    implementation: Implementation | None = None
    mesh_axes: Mapping[str, Names] | None = None

    @checks.named
    def __call__(
        self, x: Array, gate: Array | None = None, gate_bias: Array | None = None
    ) -> jax.Array:
        """Normalises `x`.

        Args:
          x: [B, T, D] or [B, T, H, D], of any float dtype, as the others.
          gate: as x, or None.
          gate_bias: what is added to every token's gate, [D] or [H, D]; or None.

        Raises:
          TypeError: an array has no float dtype, or an attribute is of another kind than described.
          ValueError: a gate's bias without a gate; shapes that disagree.
          NotImplementedError: the named implementation cannot do this; the message says what can.
        """
        if gate is None and gate_bias is not None:
            raise ValueError("gate_bias is given, but no gate: give both or neither")
        self._check(x, gate=gate)
        if gate is not None:
            checks.check_function("activation", self.activation)
        if gate_bias is not None and gate_bias.shape != x.shape[-gate_bias.ndim :]:
            raise ValueError(
                f"gate_bias must have the shape of x's last axes, {x.shape[2:]}, got "
                f"{gate_bias.shape}"
            )
        options = dict(activation=self.activation, input_activation=self.input_activation)
        arrays = dict(x=x, scale=self._scale(x), gate=gate, gate_bias=gate_bias)
        return self._run(_fused.rms_norm, arrays, **options)

    @checks.named
    def branch(self, x: Array, update: Array | None = None) -> tuple[jax.Array, jax.Array]:
        """The normalised residual stream, and the stream: x, or x + update.

        Take the stream from here, and leave the addition of a branch's result to the next norm:

            y, x = norm_1.branch(x, update); update = mixer(y)
            y, x = norm_2.branch(x, update); update = mlp(y)

        Then the kernels add, normalise, and in the backward pass add up the gradients of y and of
        the stream. XLA then needs no extra pass over memory. For checkpoint policies the sum is
        named "residual_stream".
        """
        self._check(x, update=update)
        options = dict(input_activation=self.input_activation)
        arrays = dict(x=x, scale=self._scale(x), update=update)
        return self._run(_fused.rms_norm_branch, arrays, results=2, **options)

    def _check(self, x, **others):
        """Checks the attributes, x, and arrays of its shape (or None)."""
        checks.check_not_negative("epsilon", self.epsilon)
        if self.input_activation is not None:
            checks.check_function("input_activation", self.input_activation)
        for name, array in checks.given(x=x, **others).items():
            if not jnp.issubdtype(getattr(array, "dtype", object), jnp.floating):
                given = getattr(array, "dtype", type(array))
                raise TypeError(f"{name} must be an array of a float dtype, got {given}")
            if array.shape != x.shape:
                raise ValueError(f"{name} must have x's shape {x.shape}, got {array.shape}")
        _arguments.check_size("axes", self.axes, 1)
        if self.axes > x.ndim:
            raise ValueError(f"axes must be at most x's {x.ndim}, got {self.axes}")

    def _run(self, operation, arrays, results=1, **options):
        options |= dict(epsilon=self.epsilon, implementation=self.implementation)
        arrays = {name: array for name, array in arrays.items() if array is not None}
        split = _arguments.split_of(self)
        if split is None:
            operation = functools.partial(operation, **options)
            return _arguments.unless_initializing(self, operation)(**arrays)
        x = arrays["x"]
        if x.ndim not in (3, 4) or self.axes > x.ndim - 2:
            raise ValueError(
                f"mesh_axes are for a norm of x [B, T, D] or [B, T, H, D] over features or heads, "
                f"got x {list(x.shape)} and axes = {self.axes}"
            )
        last = ["H", "V"][4 - x.ndim :]
        letters = {name: " ".join(["B", "T", *last]) for name in arrays}
        letters |= dict(real="B T", scale=" ".join(last[-self.axes :]))
        if "gate_bias" in arrays:
            letters["gate_bias"] = " ".join(last[-arrays["gate_bias"].ndim :])
        if self.axes == 2 and split["H"]:
            options |= self._over_devices(whole.devices(split["H"]))
            if options.pop("together"):
                options["over"] = split["H"]
        run = functools.partial(operation, **options)
        out = letters["x"] if results == 1 else (letters["x"],) * results
        return whole.call(run, arrays, letters, out, split)

    def _over_devices(self, devices):
        """Settings of a norm over heads on several devices, and whether these sum `together`."""
        return dict(together=True)

    @nn.compact
    def _scale(self, x):
        shape = x.shape[-self.axes :]
        if not self.use_scale:
            return jnp.ones(shape, f32)  # XLA drops the product, and to the kernels it is no work
        return self.param("scale", nn.initializers.ones, shape, self.param_dtype)


class GatedRMSNorm(RMSNorm):
    """`RMSNorm(x * silu(gate))`, as Mamba-2 has it; of RMSNorm's attributes the activations have no
    meaning here.

    Attributes, beside those of RMSNorm:
      groups: into so many groups of neighbouring heads, each normalised for itself, a token's heads
        are split.
      norm_before_gate: `RMSNorm(x) * silu(gate)` in its place.
    """

    axes: int = 2
    groups: int = 1
    norm_before_gate: bool = False

    @checks.named
    def __call__(  # pyright: ignore[reportIncompatibleMethodOverride]
        self, x: Array, gate: Array, real: Array | None = None
    ) -> jax.Array:
        """Normalises x * silu(gate), both [B, T, H, D], over all heads of a token, or of a group.

        Where the token is not `real`, bool [B, T] or None for all, the result is zero whatever x
        is. Returns the gate's shape and dtype.
        """
        options = dict(groups=self.groups, norm_before_gate=self.norm_before_gate)
        arrays = dict(x=x, gate=gate, scale=self._scale(x), real=real)
        return self._run(_fused.gated_norm, arrays, **options)

    def _over_devices(self, devices):
        if self.groups == 1:
            return dict(together=True)
        checks.check_multiple("groups", self.groups, "the devices of H in mesh_axes", devices)
        return dict(together=False, groups=self.groups // devices)
