"""The layer of Kimi Delta Attention (arXiv 2510.26692)."""

import functools
import math

import jax
import jax.numpy as jnp
from flax import linen as nn

from jla import _fused
from jla._core import checks
from jla.linen import _arguments
from jla.linen._normalize import RMSNorm
from jla.linen._padding import arrange
from jla.linen._projections import projected
from jla.linen._short_convolution import convolutions

f32 = jnp.float32


@functools.partial(jax.jit, static_argnums=(1, 2))
def _A_log_init(key, shape, dtype):
    return jnp.log(jax.random.uniform(key, shape, dtype, minval=1.0, maxval=16.0))


@functools.partial(jax.jit, static_argnums=(1, 2))
def _dt_bias_init(key, shape, dtype):
    """softplus of the result is log-uniform in [1e-3, 1e-1]."""
    log_dt = _arguments.uniform(key, shape, dtype, math.log(1e-3), math.log(1e-1))
    dt = jnp.exp(log_dt)
    return dt + jnp.log(-jnp.expm1(-dt))


class _DenseAndBias(nn.DenseGeneral):
    """`nn.DenseGeneral`, but its bias is returned beside the product: the norm adds it."""

    @nn.compact
    def __call__(self, inputs):
        product = super().__call__(inputs)
        return product, self.param("bias", self.bias_init, self.features, self.param_dtype)


class KimiDeltaAttention(nn.Module):
    r"""Kimi Delta Attention with its projections, convolutions, gates and norms.

    For inputs :math:`x` [B, T, D], `H` key heads of dimension `K` and `HV` value heads of dimension
    `V` (value head `j` uses key head `j // (HV // H)`):

    .. math::
      q &= \mathrm{l2norm}(\mathrm{silu}(\mathrm{conv}(W_q x))), \quad
      k = \mathrm{l2norm}(\mathrm{silu}(\mathrm{conv}(W_k x))), \quad
      v = \mathrm{silu}(\mathrm{conv}(W_v x)) \\
      g &= -\exp(A) \cdot \mathrm{softplus}(W_f^\uparrow W_f^\downarrow x + \mathrm{dt\_bias}),
      \quad \beta = \mathrm{sigmoid}(W_b x) \\
      y &= W_o\,(\mathrm{RMSNorm}(\mathrm{kda}(q, k, v, g, \beta)) \cdot
      \mathrm{sigmoid}(W_g^\uparrow W_g^\downarrow x + b_g))

    The projections run in `dtype`; g, beta, the l2 norm, the convolutions' sums, RMSNorm and its
    gate are computed in float32, and the recurrent state is float32. On a GPU that has the kernels
    one of them makes g (16 bits, T > 1, no mask, K a multiple of 64), where XLA makes several
    passes.

    Parameters, their shapes and initial values (all `param_dtype`, except `A_log` and `dt_bias`,
    which are always float32; exclude these two, the norm's scale and the bias from weight decay):

    ===================  ===========  ====================================================
    q_proj, k_proj       kernel       [D, H, K]
    v_proj               kernel       [D, HV, V]
    q_conv1d, k_conv1d   kernel       [conv_size, H, K], U(-conv_size**-0.5, conv_size**-0.5)
    v_conv1d             kernel       [conv_size, HV, V], as q_conv1d
    f_proj_down          kernel       [D, V]
    f_proj_up            kernel       [V, HV, K]
    A_log                             [HV], log U(1, 16); zeros with `gate_lower_bound`
    dt_bias                           [HV, K], inverse softplus of log-uniform [1e-3, 1e-1]
    b_proj               kernel       [D, HV]
    g_proj_down          kernel       [D, V]
    g_proj_up            kernel,bias  [V, HV, V], [HV, V]; the bias is zero at first
    o_norm               scale        [V], ones
    o_proj               kernel       [HV, V, D]
    ===================  ===========  ====================================================

    Kernels are initialised by `kernel_init`, flax's default (lecun_normal, variance 1 / fan-in).
    This differs from torch's Linear, which a port from fla would have: uniform with variance
    1 / (3 fan-in), and such a bias too.

    Decoding: with `decode=True` the "cache" collection holds `recurrent_state` [B, HV, K, V]
    (float32) and each convolution's last `conv_size - 1` inputs. `init` makes it, empty, for its
    input's batch; T does not matter. Every `apply` with `mutable=["cache"]` then continues from the
    cache and advances it, by any number of tokens: a prefill in one call or several, then one token
    at a time. A cache is of fixed size, so there is no longest sequence.

    Attributes:
      num_heads: H.
      head_dim: K, 16 to 256; D // num_heads if None.
      num_value_heads: HV, a multiple of H; H if None.
      value_head_dim: V, 16 to 256; K if None.
      allow_negative_eigenvalues: beta is `2 sigmoid(W_b x)`, so that `I - beta k k^T` has
        eigenvalues in [-1, 1] (arXiv 2411.12537).
      gate_lower_bound: None, or a negative number, for the gate
        `g = gate_lower_bound * sigmoid(exp(A) * (W_f x + dt_bias))`.
      conv_size: taps of the convolutions, at least 2; with None or 0 there are none, only SiLU.
      norm_epsilon: RMSNorm's epsilon.
      dtype: the dtype of the computation; inferred from the inputs and parameters if None.
      param_dtype: the dtype of the parameters.
      kernel_init: initializer of the projections' kernels.
      precision: of the projections' matrix products, see `jax.lax.Precision`.
      implementation: of the mechanism, see :func:`jla.kda`.
      decode: whether to keep and use a cache.
    """

    num_heads: int
    head_dim: int | None = None
    num_value_heads: int | None = None
    value_head_dim: int | None = None
    allow_negative_eigenvalues: bool = False
    gate_lower_bound: float | None = None
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
            is as good as absent: it leaves the state and the convolutions as they are, and its
            output is zero. With `decode`, every row's cache goes on from its own last real token.
          segment_ids: integers [B, T]: equal neighbours (with a mask: neighbouring real tokens) are
            one segment, and nothing crosses a border. With `decode`, the cache continues into each
            row's first segment, and comes out as that of its last.

        Returns:
          [B, T, D] in the dtype of the computation.

        Raises:
          TypeError: `inputs` is not floating, `mask` not bool or `segment_ids` not integers.
          ValueError: shapes that disagree, head counts or sizes that `jla.kda` does not accept, a
            wrong `conv_size`; with `decode`, no cache, or one of another batch size.
        """
        H, HV, K, V = self._sizes(inputs, mask, segment_ids)
        dense = functools.partial(
            nn.DenseGeneral,
            use_bias=False,
            dtype=self.dtype,
            param_dtype=self.param_dtype,
            kernel_init=self.kernel_init,
            precision=self.precision,
        )

        x, real, lengths, segments, restore = arrange(inputs, mask, segment_ids)

        convolve = convolutions(self, segments, lengths)
        _arguments.check_cache(self, recurrent_state=((x.shape[0], HV, K, V), f32))
        q = convolve(dense((H, K), name="q_proj")(x), "q_conv1d", normalize=True)
        k = convolve(dense((H, K), name="k_proj")(x), "k_conv1d", normalize=True)
        v = convolve(dense((HV, V), name="v_proj")(x), "v_conv1d")

        bounded = self.gate_lower_bound is not None
        A_log_init = nn.initializers.zeros if bounded else _A_log_init
        A_log = _arguments.float32_parameter(self, "A_log", A_log_init, (HV,))
        dt_bias = _arguments.float32_parameter(self, "dt_bias", _dt_bias_init, (HV, K))
        f = dense((HV, K), name="f_proj_up")(dense(V, name="f_proj_down")(x))
        beta = nn.sigmoid(dense(HV, name="b_proj")(x).astype(f32))
        if self.allow_negative_eigenvalues:
            beta = 2.0 * beta

        o = self._mechanism(q, k, v, (f, A_log, dt_bias), beta, real, segments)

        gate_proj = _DenseAndBias((HV, V), name="g_proj_up", **dense.keywords)
        gate, gate_bias = gate_proj(dense(V, name="g_proj_down")(x))
        o = RMSNorm(
            self.norm_epsilon,
            param_dtype=self.param_dtype,
            implementation=_arguments.own_choice(self.implementation),
            name="o_norm",
        )(o, gate, gate_bias)
        return restore(projected(o, dense, inputs.shape[-1]))

    def _mechanism(self, q, k, v, gate, beta, real, segments):
        """Runs KDA, or one step of it for one token, from the cached state if there is one.

        `gate`: the projection, A_log and dt_bias.
        """
        bound = self.gate_lower_bound
        if bound is not None:
            checks.check_negative("gate_lower_bound", bound)
        options = dict(lower_bound=bound, implementation=self.implementation)
        f, *gate = gate

        def run(initial_state=None):
            where = dict(initial_state=initial_state, segment_ids=segments, real=real)
            return _fused.kda_from_projection(q, k, v, f, *gate, beta, **where, **options)

        run = _arguments.unless_initializing(self, run)
        if not self.decode:
            return run()[0]
        shape = (v.shape[0], v.shape[2], k.shape[3], v.shape[3])
        cache = self.variable("cache", "recurrent_state", jnp.zeros, shape, f32)
        if q.shape[1] == 1:
            *token, beta = (x[:, 0] for x in (q, k, v, f, beta))
            step = _arguments.unless_initializing(self, _fused.kda_step_from_projection)
            options |= dict(real=None if real is None else real[:, 0])
            o, state = step(*token, *gate, beta, cache.value, **options)
            o = o[:, None]
        else:
            o, state = run(cache.value)
        if not self.is_initializing():
            cache.value = state
        return o

    def _sizes(self, inputs, mask, segment_ids):
        """Checks the call's arguments and the attributes; returns H, HV, K and V."""
        D = _arguments.check_inputs(self, inputs, mask, segment_ids)
        H = self.num_heads
        _arguments.check_size("num_heads", H, 1)
        HV = H if self.num_value_heads is None else self.num_value_heads
        _arguments.check_size("num_value_heads", HV, 1)
        checks.check_multiple("num_value_heads", HV, "num_heads", H)
        K, V = _arguments.head_dims(
            D, H, head_dim=self.head_dim, value_head_dim=self.value_head_dim
        )
        _arguments.check_conv_size(self.conv_size)
        return H, HV, K, V
