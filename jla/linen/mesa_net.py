"""The layer of MesaNet (arXiv 2506.05233)."""

import functools
import math

import jax.numpy as jnp
from flax import linen as nn

from jla._core import checks
from jla.linen import _arguments
from jla.linen._normalize import RMSNorm
from jla.linen._padding import arrange
from jla.linen._projections import projected
from jla.linen._short_convolution import convolutions
from jla.mesa_net import MesaState, mesa_net, mesa_step

f32 = jnp.float32


class MesaNet(nn.Module):
    r"""MesaNet with its projections, convolutions, gates and norm.

    For inputs :math:`x` [B, T, D] and `H` heads of key dimension `K` and value dimension `V`:

    .. math::
      q &= \mathrm{l2norm}(\mathrm{silu}(\mathrm{conv}(W_q x))), \quad
      k = \mathrm{l2norm}(\mathrm{silu}(\mathrm{conv}(W_k x))), \quad
      v = W_v x \\
      g &= \mathrm{logsigmoid}(W_a x + b_a), \quad \beta = \mathrm{sigmoid}(W_b x + b_b), \quad
      \lambda = \mathrm{softplus}(\mathrm{lambda\_params}) + \mathrm{lambda\_lower\_bound} \\
      y &= W_o\, \mathrm{RMSNorm}(\mathrm{mesa\_net}(q, k, v, g, \beta, \lambda))

    With `use_output_gate`, RMSNorm's result is multiplied by :math:`\mathrm{silu}(W_g x)`.

    The projections run in `dtype`; g, beta, lambda, the l2 norm, the convolutions' sums, RMSNorm
    and its gate are computed in float32, and the recurrent state is float32.

    Parameters, their shapes and initial values (all `param_dtype`, except `lambda_params`, which is
    always float32; exclude it, the norm's scale and the biases from weight decay):

    ===================  ===========  ====================================================
    q_proj, k_proj       kernel       [D, H, K]
    v_proj               kernel       [D, H, V]
    q_conv1d, k_conv1d   kernel       [conv_size, H, K], U(-conv_size**-0.5, conv_size**-0.5)
    a_proj, b_proj       kernel,bias  [D, H], [H]; the biases are zero at first
    lambda_params                     [H, K], such that lambda = 1, or twice a bound from 1 on
    g_proj               kernel       [D, H, V], with `use_output_gate`
    o_norm               scale        [V], ones
    o_proj               kernel       [H, V, D]
    ===================  ===========  ====================================================

    Kernels are initialised by `kernel_init`, flax's default (lecun_normal, variance 1 / fan-in).
    This differs from torch's Linear, which a port from fla would have: uniform with variance
    1 / (3 fan-in), and such biases too.

    Decoding: with `decode=True` the "cache" collection holds the state, `kk` [B, H, K, K] and `kv`
    [B, H, K, V] (float32), and each convolution's last `conv_size - 1` inputs. `init` makes it,
    empty, for its input's batch; T does not matter. Every `apply` with `mutable=["cache"]` then
    continues from the cache and advances it, by any number of tokens: a prefill in one call or
    several, then one token at a time. A cache is of fixed size, so there is no longest sequence.

    Attributes:
      num_heads: H.
      head_dim: K, 16 to 256; D // num_heads if None.
      value_head_dim: V, 16 to 256; K if None.
      use_output_gate: whether RMSNorm's result is gated.
      lambda_lower_bound: a positive number, below every lambda. The smaller, the more iterations
        the solution can take.
      cg_steps: the most iterations of conjugate gradients, see :func:`jla.mesa_net`.
      cg_steps_decode: the same for a call that brings one token, with `decode`; `cg_steps` if None.
      conv_size: taps of the convolutions, at least 2; with None or 0 there are none, only SiLU.
      norm_epsilon: RMSNorm's epsilon.
      dtype: the dtype of the computation; inferred from the inputs and parameters if None.
      param_dtype: the dtype of the parameters.
      kernel_init: initializer of the projections' kernels.
      precision: of the projections' matrix products, see `jax.lax.Precision`.
      implementation: of the mechanism, see :func:`jla.mesa_net`.
      decode: whether to keep and use a cache.
    """

    num_heads: int
    head_dim: int | None = None
    value_head_dim: int | None = None
    use_output_gate: bool = False
    lambda_lower_bound: float = 0.25
    cg_steps: int = 30
    cg_steps_decode: int | None = None
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
          TypeError: `inputs` is not floating, `mask` not bool or `segment_ids` not integers; an
            attribute of a wrong type.
          ValueError: shapes that disagree, sizes that `jla.mesa_net` does not accept, a bound that
            is not positive, a wrong `conv_size` or number of iterations; with `decode`, no cache,
            or one of another batch size.
        """
        H, K, V, bound = self._settings(inputs, mask, segment_ids)
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
        B = x.shape[0]
        _arguments.check_cache(self, kk=((B, H, K, K), f32), kv=((B, H, K, V), f32))
        q = convolve(dense((H, K), name="q_proj")(x), "q_conv1d", normalize=True)
        k = convolve(dense((H, K), name="k_proj")(x), "k_conv1d", normalize=True)
        v = dense((H, V), name="v_proj")(x)
        g = nn.log_sigmoid(dense(H, use_bias=True, name="a_proj")(x).astype(f32))
        beta = nn.sigmoid(dense(H, use_bias=True, name="b_proj")(x).astype(f32))
        if real is not None:
            g = jnp.where(real[..., None], g, 0.0)
            beta = jnp.where(real[..., None], beta, 0.0)
        first = math.log(math.expm1(1 - bound if bound < 1 else bound))
        init = nn.initializers.constant(first)
        lambda_params = _arguments.float32_parameter(self, "lambda_params", init, (H, K))
        lamb = nn.softplus(lambda_params) + bound

        o = self._mechanism(q, k, v, g, beta, lamb, segments)

        gate = dense((H, V), name="g_proj")(x) if self.use_output_gate else None
        o = RMSNorm(
            self.norm_epsilon,
            param_dtype=self.param_dtype,
            activation=nn.silu,
            implementation=_arguments.own_choice(self.implementation),
            name="o_norm",
        )(o, gate)
        return restore(projected(o, dense, inputs.shape[-1]))

    def _mechanism(self, q, k, v, g, beta, lamb, segments):
        """Runs `mesa_net`, or `mesa_step` for one token, from the cached state if there is one."""
        run = functools.partial(
            mesa_net,
            cg_steps=self.cg_steps,
            segment_ids=segments,
            implementation=self.implementation,
        )
        run = _arguments.unless_initializing(self, run)
        if not self.decode:
            return run(q, k, v, g, beta, lamb)[0]
        (B, _, H, K), V = k.shape, v.shape[3]
        kk = self.variable("cache", "kk", jnp.zeros, (B, H, K, K), f32)
        kv = self.variable("cache", "kv", jnp.zeros, (B, H, K, V), f32)
        state = MesaState(kk.value, kv.value)
        if q.shape[1] == 1:
            step = _arguments.unless_initializing(self, mesa_step)
            o, state = step(
                *(x[:, 0] for x in (q, k, v, g, beta)),
                lamb,
                state,
                cg_steps=self.cg_steps if self.cg_steps_decode is None else self.cg_steps_decode,
                implementation=self.implementation,
            )
            o = o[:, None]
        else:
            o, state = run(q, k, v, g, beta, lamb, initial_state=state)
        if not self.is_initializing():
            kk.value, kv.value = state
        return o

    def _settings(self, inputs, mask, segment_ids):
        """Checks the call's arguments and the attributes; returns H, K, V and lambda's bound."""
        D = _arguments.check_inputs(self, inputs, mask, segment_ids)
        H = self.num_heads
        _arguments.check_size("num_heads", H, 1)
        K, V = _arguments.head_dims(
            D, H, head_dim=self.head_dim, value_head_dim=self.value_head_dim
        )
        _arguments.check_conv_size(self.conv_size)
        checks.check_count("cg_steps", self.cg_steps)
        if self.cg_steps_decode is not None:
            checks.check_count("cg_steps_decode", self.cg_steps_decode)
        return H, K, V, checks.check_positive("lambda_lower_bound", self.lambda_lower_bound)
