"""The short causal convolution in front of linear attention."""

import functools
from collections.abc import Mapping

import jax
import jax.numpy as jnp
from flax import linen as nn

from jla import _fused
from jla._core import pools, whole
from jla._core.types import Array, Implementation
from jla._core.whole import Names
from jla.linen._arguments import check_cache, split_of, uniform, unless_initializing
from jla.linen._padding import take_tokens

f32 = jnp.float32


_LETTERS = dict(x="B T H K", taps="W H K", bias="H K", segments="B T")


def default_kernel_init(key, shape, dtype=f32):
    """U(-W**-0.5, W**-0.5) for W taps: every channel is its own convolution with fan-in W."""
    bound = shape[0] ** -0.5
    return uniform(key, shape, dtype, -bound, bound)


class ShortConvolution(nn.Module):
    """Depthwise causal convolution over time, then SiLU, then optionally another and the l2 norm.

    `y_t = silu(sum_i taps[i] * x_{t - (W - 1 - i)} + bias)`, with W taps for every channel of every
    head, accumulated in float32. The taps are the parameter `kernel`, as in `nn.Conv`, which lacks
    three things that linear attention needs: segments, rows of unequal length, and a cache of the
    last inputs. Before a sequence and before each segment there are zeros, to which the bias is
    added as to any token.

    On a GPU that has the kernels, they serve 16-bit inputs without segments and a cache: XLA sums
    the taps' gradient at a fifth of the speed of memory.

    Attributes:
      size: W, the number of taps.
      use_bias: whether there is a bias, the parameter `bias` [H, D], zeros at first.
      param_dtype: dtype of the parameters, `kernel` [W, H, D] and the bias.
      kernel_init: initializer of the kernel; `U(-W**-0.5, W**-0.5)`, as torch's Conv1d has it.
      normalize: whether a head's vector is divided by its length, as `l2norm` does it.
      silu_twice: whether there is a second SiLU upon the first: that of a feature map.
      implementation: "reference" or "xla" for the formula, "pallas" for the GPU kernels (what they
        cannot serve raises NotImplementedError), None for the fastest that supports the arguments.
      decode: whether to keep the last W - 1 inputs, [B, W - 1, H, D], as "inputs" in the "cache"
        collection.
      axis_name: inside `jax.shard_map`, the manual axis that T is split over, or None; with
        `mesh_axes` their T.
      mesh_axes: of whole arrays, as in `jla.linen.mixer.Mixer`.
    """

    size: int
    use_bias: bool = False
    param_dtype: nn.dtypes.Dtype = f32
    kernel_init: nn.initializers.Initializer = default_kernel_init
    normalize: bool = False
    silu_twice: bool = False
    implementation: Implementation | None = None
    decode: bool = False
    axis_name: str | None = None
    mesh_axes: Mapping[str, Names] | None = None

    @nn.compact
    def __call__(
        self,
        x: Array,
        segments: Array | None = None,
        lengths: Array | None = None,
        slots: Array | None = None,
    ) -> jax.Array:
        """Convolves.

        Args:
          x: [B, T, H, D].
          segments: int32 [B, T], segments numbered 0, 1, ... as `segment_index` does it: no window
            reaches over a border. The cache belongs to segment 0 before the call, to the row's last
            segment after it. With `axis_name`, integers in any order: equal neighbours are one.
          lengths: int32 [B]: only the first `lengths` tokens of a row are real; the rest does not
            enter the cache. T for every row if None.
          slots: int32 [B], the rows of the cache that x's rows go on from; None if they are the
            same. Or [B, N], those of each row's segments, whose ids are 0 to N - 1 or, padding, -1.

        Returns:
          [B, T, H, D] in x's dtype.
        """
        B, _, *channels = x.shape
        past = self.size - 1
        taps = self.param("kernel", self.kernel_init, (self.size, *channels), self.param_dtype)
        bias = None
        if self.use_bias:
            bias = self.param("bias", nn.initializers.zeros, tuple(channels), self.param_dtype)
        check_cache(self, slots, inputs=((B, past, *channels), x.dtype))
        if slots is not None and slots.ndim == 2:
            return self._by_segment(x, taps, bias, segments, slots)
        before = None
        if self.decode:
            cache = self.variable("cache", "inputs", jnp.zeros, (B, past, *channels), x.dtype)
            before = cache.value if slots is None else pools.take(cache.value, slots)
            if not self.is_initializing():
                last = _last_inputs(before, x, segments, lengths)
                cache.value = last if slots is None else pools.put(cache.value, last, slots)
        run = functools.partial(
            _fused.short_convolution,
            normalize=self.normalize,
            silu_twice=self.silu_twice,
            axis_name=self.axis_name,
            implementation=self.implementation,
        )
        split = split_of(self)
        if split is None:
            return unless_initializing(self, run)(x, taps, bias, before, segments)
        arrays = dict(x=x, taps=taps, bias=bias, segments=segments)
        arrays = {name: array for name, array in arrays.items() if array is not None}
        # The taps whole: XLA would gather those that are split one by one.
        return whole.call(run, arrays, _LETTERS, _LETTERS["x"], split)

    def _by_segment(self, x, taps, bias, segments, slots):
        """The convolution of segments that go on from rows of the cache."""
        cache = self.variable("cache", "inputs", jnp.zeros, (), x.dtype)
        y, last = _fused.short_convolution_of_segments(
            x,
            taps,
            bias,
            pools.take(cache.value, slots),
            segments,
            normalize=self.normalize,
            silu_twice=self.silu_twice,
            implementation=self.implementation,
        )
        cache.value = pools.put(cache.value, last, slots)
        return y


def _last_inputs(before, x, segments, lengths):
    """The next call's past: the last tokens of `before` [B, past, H, D] and x together. Those of
    another segment than the row's last are zeros, and those behind `lengths` do not count."""
    past = before.shape[1]
    window = jnp.concatenate([before, x], axis=1)
    if segments is not None:
        same = jnp.pad(segments, ((0, 0), (past, 0))) == segments[:, -1:]
        window = jnp.where(same[..., None, None], window, 0.0)
    if lengths is None:
        return window[:, x.shape[1] :]
    places = lengths[:, None] + jnp.arange(past, dtype=jnp.int32)[None]
    return take_tokens(window, places)
