"""The dense feed-forward layer."""

import functools
from collections.abc import Mapping

import jax
import jax.numpy as jnp
from flax import linen as nn
from flax.typing import Dtype
from jax.ad_checkpoint import checkpoint_name

from jla import _token
from jla._core import checks
from jla._core.types import Implementation
from jla._core.whole import Names, carries_shardings
from jla.linen import _arguments
from jla.linen._projections import by_heads, copies, dense


class SwiGLU(nn.Module):
    """The gated feed-forward layer (arXiv 2002.05202): `y = W_down (silu(W_gate x) * W_up x)`.

    Parameters, all without biases and of `param_dtype`: `gate/kernel` and `up/kernel` [D, hidden],
    `down/kernel` [hidden, D]. Checkpoint policies know what `down` multiplies by the name "hidden".

    Example:
      x = jnp.ones((2, 8, 64))  # [B, T, D]
      layer = jla.models.SwiGLU(hidden=128)
      variables = layer.init(jax.random.key(0), x)
      y = layer.apply(variables, x)  # [2, 8, 64]

    Attributes:
      hidden: the features inside; about 8/3 of D is usual.
      dtype: the dtype of the computation; inferred from the inputs and parameters if None.
      param_dtype: the dtype of the parameters.
      kernel_init: initializer of the kernels.
      mesh_axes: as in the layers of `jla.linen`: H are the axes of the mesh that split `hidden`.
      implementation: "reference" or "xla" for XLA's products alone; else, on a GPU, kernels serve
        up to 64 rows in 16 bits.
    """

    hidden: int
    dtype: Dtype | None = None
    param_dtype: Dtype = jnp.float32
    kernel_init: nn.initializers.Initializer = nn.linear.default_kernel_init
    mesh_axes: Mapping[str, Names] | None = None
    implementation: Implementation | None = None

    @nn.compact
    @checks.named
    def __call__(self, inputs: jax.Array) -> jax.Array:
        """Applies the layer to [B, T, D].

        Raises:
          TypeError, ValueError: `hidden` is no positive integer.
        """
        checks.check_count("hidden", self.hidden)
        split = _arguments.split_of(self)
        own = self.implementation if self.implementation in ("reference", "xla") else None
        to = functools.partial(
            dense,
            split,
            implementation=own,
            kind=nn.Dense,
            dtype=self.dtype,
            param_dtype=self.param_dtype,
            kernel_init=self.kernel_init,
        )
        into, x = to, copies(inputs, split)
        if x is None or self.hidden % x.shape[0]:
            x = inputs
        else:
            into = functools.partial(to, dot_general_cls=by_heads)
        y = self._of_few(inputs, own)
        if y is None:
            gate, up = (into(self.hidden, name=name)(x) for name in ("gate", "up"))
            y = nn.silu(gate) * up
            y = y if x is inputs else y[0]
        return to(inputs.shape[-1], name="down")(checkpoint_name(y, "hidden"))

    def _of_few(self, inputs, implementation):
        """silu(W_gate x) * W_up x of few rows by a kernel, or None if none serves."""
        dtype, params = self.dtype, self.variables.get("params", {})
        if dtype is None or inputs.dtype != jnp.dtype(dtype) or self.mesh_axes is not None:
            return None
        kernels = [params.get(name, {}).get("kernel") for name in ("gate", "up")]
        if self.is_initializing() or any(
            x is None or x.shape != (inputs.shape[-1], self.hidden) for x in kernels
        ):
            return None
        D = inputs.shape[-1]
        rows = jax.ShapeDtypeStruct((inputs.size // D, D), inputs.dtype)
        if carries_shardings(inputs) or not _token.serves(
            "swiglu_of_few", implementation, rows, *kernels
        ):
            return None
        rows = inputs.reshape(rows.shape)
        y = _token.swiglu_of_few(rows, *kernels, implementation=implementation)
        return y.reshape(*inputs.shape[:-1], self.hidden)
