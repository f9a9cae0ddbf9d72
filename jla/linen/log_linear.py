"""The layer of log-linear attention, on Mamba-2 (arXiv 2506.04761)."""

import functools
import itertools

import jax.numpy as jnp
import numpy as np
from flax import linen as nn
from jax import lax

from jla import _fused
from jla._core import alignment, checks
from jla._core.lengths import is_symbolic_dim
from jla._core.parts import mamba2_operands
from jla._core.states import with_rank
from jla.linen import _arguments
from jla.linen._normalize import GatedRMSNorm
from jla.linen._padding import arrange
from jla.linen._projections import projected
from jla.linen._short_convolution import convolutions
from jla.linen.kda import _dt_bias_init
from jla.log_linear import LogLinearState

f32 = jnp.float32

_PRECISIONS = lax.Precision.DEFAULT, lax.Precision.HIGH, lax.Precision.HIGHEST


def _A_log_init(_, shape, dtype):
    return jnp.asarray(np.log(np.arange(1, shape[0] + 1)), dtype)  # nothing to compile


class _DenseInParts(nn.Module):
    """`nn.Dense`, whose output's columns come in parts, each a product of its own; the last columns
    times `scale`, [n] float32."""

    features: tuple[int, ...]
    use_bias: bool
    dtype: nn.dtypes.Dtype | None
    param_dtype: nn.dtypes.Dtype
    kernel_init: nn.initializers.Initializer
    precision: nn.linear.PrecisionLike

    @nn.compact
    def __call__(self, inputs, scale):
        width = sum(self.features)
        shape = inputs.shape[-1], width
        kernel = self.param("kernel", self.kernel_init, shape, self.param_dtype)
        bias = None
        if self.use_bias:
            bias = self.param("bias", nn.initializers.zeros, (width,), self.param_dtype)
        products = _arguments.unless_initializing(self, self._products)
        return products(inputs, kernel, bias, scale)

    def _products(self, inputs, kernel, bias, scale):
        inputs, kernel, bias = nn.dtypes.promote_dtype(inputs, kernel, bias, dtype=self.dtype)
        precisions = [self.precision] * len(self.features)
        if self.precision is None and inputs.dtype.itemsize == 2:
            # XLA merges the smaller products of one input, and then cuts and joins columns in
            # passes of their own, but not products of different precision. Those of 16-bit numbers
            # are exact at any.
            precisions = [_PRECISIONS[i % 3] for i in range(len(self.features))]
        parts = zip(_scaled(_parts(kernel, self.features), scale), precisions, strict=True)
        parts = [jnp.matmul(inputs, part, precision=precision) for part, precision in parts]
        if bias is None:
            return parts
        biases = _scaled(_parts(bias, self.features), scale)
        return [x + with_rank(b, x.ndim) for x, b in zip(parts, biases, strict=True)]


def _scaled(parts, scale):
    """The last of the parts with its last columns times the scale."""
    *others, last = parts
    columns = jnp.pad(scale, (last.shape[-1] - scale.size, 0), constant_values=1.0)
    columns = with_rank(columns, last.ndim)
    return [*others, (last.astype(f32) * columns).astype(last.dtype)]


def _parts(x, sizes):
    """Cuts the last axis in parts of these sizes."""
    return jnp.split(x, tuple(itertools.accumulate(sizes))[:-1], axis=-1)


def _decays(d, A_log, dt_bias):
    """The gates, and dt, of the projection d [B, T, H]; float32."""
    dt = nn.softplus(d.astype(f32) + dt_bias[None, None])
    return -jnp.exp(A_log)[None, None] * dt, dt


class LogLinearMamba2(nn.Module):
    r"""Log-linear Mamba-2: log-linear attention with Mamba-2's projections, gates and norm.

    For inputs :math:`x` [B, T, D], `H` heads of value dimension `V`, `HK` key heads of dimension
    `K`, shared as in :func:`jla.log_linear_attention`, and `L` levels:

    .. math::
      z, u, k, q, d, \ell &= W_{in} x + b_{in}, \qquad
      q, k, u \leftarrow \mathrm{silu}(\mathrm{conv}(q, k, u)) \\
      \Delta &= \mathrm{softplus}(d + \mathrm{dt\_bias}), \quad
      v = \Delta u, \quad g = -\exp(A_{\log})\, \Delta, \quad
      \lambda = \mathrm{softplus}(L\, \ell) \\
      o &= \mathrm{log\_linear\_attention}(q, k, v, g, \lambda) + D u \\
      y &= W_o\, \mathrm{RMSNorm}(o\, \mathrm{silu}(z)) + b_o

    with :math:`d, \Delta, A_{\log}, D` one number for each head, :math:`\ell, L, \lambda` one for
    each head and level, and RMSNorm over all heads of a token together. In Mamba's letters q, k, u
    are C, B, x.

    The projections run in `dtype`; the rest, but for the sequence mechanism, is computed in
    float32, and the recurrent state is float32.

    Parameters, their shapes and initial values (`A_log`, `dt_bias`, `D` and `L` are always float32,
    the others `param_dtype`; exclude these four, the norm's scale and the biases from weight
    decay):

    ===================  ===========  ====================================================
    in_proj              kernel,bias  [D, P], [P]; P has z and u (H V each), k and q (HK K
                                      each), d (H) and l (H L), in this order
    q_conv1d, k_conv1d   kernel       [conv_size, HK, K], U(-conv_size**-0.5, conv_size**-0.5)
    v_conv1d             kernel       [conv_size, H, V], of u, as q_conv1d
    A_log                             [H], log of 1, 2, ..., H
    dt_bias                           [H], such that softplus of it is log-uniform in [1e-3, 0.1]
    D                                 [H], ones
    L                                 [H, L], ones
    o_norm               scale        [H, V], ones
    o_proj               kernel,bias  [H, V, D], [D]
    ===================  ===========  ====================================================

    Kernels are initialised by `kernel_init`, flax's default (lecun_normal, variance 1 / fan-in),
    and biases are zero at first. This differs from torch's Linear, which a port from fla would
    have: uniform with variance 1 / (3 fan-in), and such biases too.

    Decoding: with `decode=True` the "cache" collection holds the state, `levels` [B, H, L, K, V]
    (float32) and `position` [B] (int32), and each convolution's last `conv_size - 1` inputs. `init`
    makes it, empty, for its input's batch; T does not matter. Every `apply` with
    `mutable=["cache"]` then continues from the cache and advances it, by any number of tokens: a
    prefill in one call or several, then one token at a time. L levels serve `2**(L-1)` tokens;
    beyond, the outputs are NaN (or a ValueError, where the position is not traced).

    Attributes:
      num_heads: H, a multiple of HK.
      head_dim: K, 16 to 256; D // num_heads if None. (fla's `state_size`; its `head_dim` is V.)
      value_head_dim: V, 16 to 256; K if None. Mamba-2 has H V = 2 D.
      num_key_heads: HK.
      num_levels: L, 1 to 32: the longest sequence has `2**(num_levels-1)` tokens.
      use_bias: whether the projections have biases.
      conv_size: taps of the convolutions, at least 2; with None or 0 there are none, only SiLU.
      norm_epsilon: RMSNorm's epsilon.
      dtype: the dtype of the computation; inferred from the inputs and parameters if None.
      param_dtype: the dtype of the parameters.
      kernel_init: initializer of the projections' kernels.
      precision: of the projections' matrix products, see `jax.lax.Precision`.
      implementation: of the mechanism, see :func:`jla.log_linear_attention`.
      decode: whether to keep and use a cache.
    """

    num_heads: int
    head_dim: int | None = None
    value_head_dim: int | None = None
    num_key_heads: int = 1
    num_levels: int = 15
    use_bias: bool = True
    conv_size: int | None = 4
    norm_epsilon: float = 1e-5
    dtype: nn.dtypes.Dtype | None = None
    param_dtype: nn.dtypes.Dtype = f32
    kernel_init: nn.initializers.Initializer = nn.linear.default_kernel_init
    precision: nn.linear.PrecisionLike = None
    implementation: str | None = None
    decode: bool = False

    @nn.compact
    @checks.named
    def __call__(self, inputs, *, mask=None, segment_ids=None):
        """Applies the layer.

        Args:
          inputs: [B, T, D], bfloat16, float16 or float32.
          mask: bool [B, T], True at real tokens; padding may be anywhere in a row. A padded token
            is as good as absent: it leaves the state and the convolutions as they are, takes no
            position, and its output is zero. With `decode`, every row's cache goes on from its own
            last real token.
          segment_ids: integers [B, T]: equal neighbours (with a mask: neighbouring real tokens) are
            one segment, and nothing crosses a border. With `decode`, the cache continues into each
            row's first segment, and comes out as that of its last.

        Returns:
          [B, T, D] in the dtype of the computation.

        Raises:
          TypeError: `inputs` is not floating, `mask` not bool or `segment_ids` not integers; an
            attribute of a wrong type.
          ValueError: shapes that disagree, head counts or sizes that `jla.log_linear_attention`
            does not accept, more tokens than `num_levels` serve, a wrong `conv_size`; with
            `decode`, no cache, or one of another batch size.
        """
        H, HK, K, V, L = self._sizes(inputs, mask, segment_ids)
        dense = functools.partial(
            nn.DenseGeneral,
            use_bias=self.use_bias,
            dtype=self.dtype,
            param_dtype=self.param_dtype,
            kernel_init=self.kernel_init,
            precision=self.precision,
        )
        x, real, lengths, segments, restore = arrange(inputs, mask, segment_ids)

        # z and u by products of their own: parts of a product's columns would have to be copied.
        shapes = (HK, K), (HK, K), (H, 1), (H, L)
        narrow = [heads * size for heads, size in shapes]
        in_proj = _DenseInParts((H * V, H * V, sum(narrow)), name="in_proj", **dense.keywords)
        # The levels' weights multiply the projection, not its results: these are far larger.
        parameter = functools.partial(_arguments.float32_parameter, self)
        level_weight = parameter("L", nn.initializers.ones, (H, L))
        z, u, rest = in_proj(x, level_weight.reshape(-1))
        z, u = (y.reshape(*y.shape[:2], H, V) for y in (z, u))
        k, q, d, logits = (
            y.reshape(*y.shape[:2], *shape)
            for y, shape in zip(_parts(rest, narrow), shapes, strict=True)
        )

        convolve = convolutions(self, segments, lengths)
        B = x.shape[0]
        _arguments.check_cache(self, levels=((B, H, L, K, V), f32), position=((B,), jnp.int32))
        q = convolve(q, "q_conv1d")
        k = convolve(k, "k_conv1d")
        u = convolve(u, "v_conv1d")
        A_log = parameter("A_log", _A_log_init, (H,))
        dt_bias = parameter("dt_bias", _dt_bias_init, (H,))
        skip = parameter("D", nn.initializers.ones, (H,))
        g, dt = _arguments.unless_initializing(self, _decays)(d[..., 0], A_log, dt_bias)
        o = self._mechanism(q, k, u, (g, logits, dt), skip, real, lengths, segments)

        norm = GatedRMSNorm(
            self.norm_epsilon,
            param_dtype=self.param_dtype,
            implementation=_arguments.own_choice(self.implementation),
            name="o_norm",
        )
        # At a padded token o may be NaN, beyond the last level.
        o = norm(o, z, real)
        return restore(projected(o, dense, inputs.shape[-1]))

    def _mechanism(self, q, k, u, gates, skip, real, lengths, segments):
        """Runs the mechanism, or one step of it for one token, from the cached state if there is
        one."""
        options = dict(implementation=self.implementation)
        run = functools.partial(_fused.log_linear_mamba2, segment_ids=segments, **options)
        run = _arguments.unless_initializing(self, run)
        if not self.decode:
            return run(q, k, u, *gates, skip)[0]
        (B, _, H, V), K, L = u.shape, k.shape[3], gates[1].shape[3]
        levels = self.variable("cache", "levels", jnp.zeros, (B, H, L, K, V), f32)
        position = self.variable("cache", "position", jnp.zeros, (B,), jnp.int32)
        before = LogLinearState(levels.value, position.value)
        if q.shape[1] == 1:
            token = (x[:, 0] for x in (q, k, u, *gates))
            step = _arguments.unless_initializing(self, _fused.log_linear_mamba2_step)
            o, state = step(*token, skip, before, **options)
            o = o[:, None]
            if real is not None:
                state = LogLinearState(
                    jnp.where(real[:, 0, None, None, None, None], state.levels, before.levels),
                    jnp.where(real[:, 0], state.position, before.position),
                )
        else:
            o, state = run(q, k, u, *gates, skip, initial_state=before)
            if real is not None:
                state_after = _arguments.unless_initializing(self, alignment.state_after)
                v = mamba2_operands(u, gates[1], gates[2], skip)[0]
                state = state_after(lengths, k, v, gates[0], before, segments)
        if not self.is_initializing():
            levels.value, position.value = state
        return o

    def _sizes(self, inputs, mask, segment_ids):
        """Checks the call's arguments and the attributes; returns H, HK, K, V and L."""
        D = _arguments.check_inputs(self, inputs, mask, segment_ids)
        H, HK, L = self.num_heads, self.num_key_heads, self.num_levels
        _arguments.check_size("num_heads", H, 1)
        _arguments.check_size("num_key_heads", HK, 1)
        checks.check_multiple("num_heads", H, "num_key_heads", HK)
        K, V = _arguments.head_dims(
            D, H, head_dim=self.head_dim, value_head_dim=self.value_head_dim
        )
        _arguments.check_conv_size(self.conv_size)
        _arguments.check_size("num_levels", L, 1)
        T = inputs.shape[1]
        if L > 32 or (not is_symbolic_dim(T) and T > 1 << (L - 1)):
            raise ValueError(
                f"num_levels must be at most 32 and at least {(T - 1).bit_length() + 1}, "
                f"ceil(log2 T) + 1, for T = {T} tokens, got {L}"
            )
        return H, HK, K, V, L
