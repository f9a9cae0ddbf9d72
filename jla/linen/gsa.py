"""The layer of Gated Slot Attention (arXiv 2409.07146)."""

import functools

import jax.numpy as jnp
from flax import linen as nn

from jla._core import checks
from jla.gsa import GSAState, gsa, gsa_step
from jla.linen import _arguments
from jla.linen._normalize import RMSNorm
from jla.linen._padding import arrange
from jla.linen._projections import projected
from jla.linen._short_convolution import convolutions

f32 = jnp.float32

FEATURE_MAPS = {"swish": nn.silu, "relu": nn.relu, None: lambda x: x}


class GatedSlotAttention(nn.Module):
    r"""Gated Slot Attention with its projections, gates and norm.

    For inputs :math:`x` [B, T, D], `HQ` query heads and `H` key/value heads (query head `j` uses
    key/value head `j // (HQ // H)`) of key dimension `K` and value dimension `V`, and `M` slots:

    .. math::
      q &= \phi(W_q x), \quad k = \phi(W_k x), \quad v = \mathrm{silu}(W_v x) \\
      g &= \mathrm{logsigmoid}(W_f x) / \mathrm{gate\_logit\_normalizer}, \quad s = 1 - \exp g \\
      y &= W_o\, \mathrm{RMSNorm}(\mathrm{silu}(\mathrm{gsa}(q, k, v, s, g)))

    with the feature map :math:`\phi`, and RMSNorm over all heads of a token together. With
    `conv_size` each of :math:`W_q x, W_k x, W_v x` first goes through a causal convolution of its
    own and SiLU.

    The projections run in `dtype`; g, s, the convolutions' sums and RMSNorm are computed in
    float32, and the recurrent state is float32.

    Parameters, their shapes and initial values (all `param_dtype`; exclude the norm's scale from
    weight decay):

    ===================  ===========  ====================================================
    q_proj               kernel       [D, HQ, K]
    k_proj               kernel       [D, H, K]
    v_proj               kernel       [D, H, V]
    f_proj               kernel       [D, H, M]
    q_conv1d             kernel       [conv_size, HQ, K], U(-conv_size**-0.5, conv_size**-0.5)
    k_conv1d, v_conv1d   kernel       [conv_size, H, K], [conv_size, H, V], as q_conv1d
    g_norm               scale        [HQ, V], ones
    o_proj               kernel       [HQ, V, D]
    ===================  ===========  ====================================================

    Kernels are initialised by `kernel_init`, flax's default (lecun_normal, variance 1 / fan-in).
    This differs from torch's Linear, which a port from fla would have: uniform with variance
    1 / (3 fan-in).

    Decoding: with `decode=True` the "cache" collection holds the state, `hk` [B, H, K, M] and `hv`
    [B, H, M, V] (float32), and each convolution's last `conv_size - 1` inputs. `init` makes it,
    empty, for its input's batch; T does not matter. Every `apply` with `mutable=["cache"]` then
    continues from the cache and advances it, by any number of tokens: a prefill in one call or
    several, then one token at a time. A cache is of fixed size, so there is no longest sequence.

    Attributes:
      num_heads: HQ, a multiple of H.
      head_dim: K, 16 to 256; D // num_heads if None.
      num_kv_heads: H; HQ if None.
      value_head_dim: V, 16 to 256; K if None.
      num_slots: M, 16 to 256; K if None.
      feature_map: "swish", "relu", or None for none.
      gate_logit_normalizer: a positive number; the larger, the slower a slot forgets.
      scale: of the slots' logits, see :func:`jla.gsa`; 1 as in the paper's layer, not `K**-0.5`,
        which None gives.
      conv_size: taps of the convolutions, at least 2; with None or 0 there are none.
      norm_epsilon: RMSNorm's epsilon.
      dtype: the dtype of the computation; inferred from the inputs and parameters if None.
      param_dtype: the dtype of the parameters.
      kernel_init: initializer of the projections' kernels.
      precision: of the projections' matrix products, see `jax.lax.Precision`.
      implementation: of the mechanism, see :func:`jla.gsa`.
      decode: whether to keep and use a cache.
    """

    num_heads: int
    head_dim: int | None = None
    num_kv_heads: int | None = None
    value_head_dim: int | None = None
    num_slots: int | None = None
    feature_map: str | None = "swish"
    gate_logit_normalizer: float = 8.0
    scale: float | None = 1.0
    conv_size: int | None = None
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
          ValueError: shapes that disagree, head counts or sizes that `jla.gsa` does not accept, an
            unknown feature map, a wrong `conv_size`; with `decode`, no cache, or one of another
            batch size.
        """
        HQ, H, K, V, M, normalizer = self._settings(inputs, mask, segment_ids)
        dense = functools.partial(
            nn.DenseGeneral,
            use_bias=False,
            dtype=self.dtype,
            param_dtype=self.param_dtype,
            kernel_init=self.kernel_init,
            precision=self.precision,
        )
        x, real, lengths, segments, restore = arrange(inputs, mask, segment_ids)

        convolve = convolutions(self, segments, lengths, without=lambda x: x)
        B = x.shape[0]
        _arguments.check_cache(self, hk=((B, H, K, M), f32), hv=((B, H, M, V), f32))
        # SiLU behind the convolution's own is the convolution's, too.
        swish, feature_map = self.feature_map == "swish", FEATURE_MAPS[self.feature_map]
        q = convolve(dense((HQ, K), name="q_proj")(x), "q_conv1d", silu_twice=swish)
        k = convolve(dense((H, K), name="k_proj")(x), "k_conv1d", silu_twice=swish)
        v = convolve(dense((H, V), name="v_proj")(x), "v_conv1d", silu_twice=True)
        if not swish:
            q, k = feature_map(q), feature_map(k)
        g = nn.log_sigmoid(dense((H, M), name="f_proj")(x).astype(f32)) / normalizer
        if real is not None:
            g = jnp.where(real[..., None, None], g, 0.0)  # and so s = 0
        s = -jnp.expm1(g)

        o = self._mechanism(q, k, v, s, g, segments)

        norm = RMSNorm(
            self.norm_epsilon,
            axes=2,
            param_dtype=self.param_dtype,
            input_activation=nn.silu,
            implementation=_arguments.own_choice(self.implementation),
            name="g_norm",
        )
        return restore(projected(norm(o), dense, inputs.shape[-1]))

    def _mechanism(self, q, k, v, s, g, segments):
        """Runs `gsa`, or `gsa_step` for one token, from the cached state if there is one."""
        options = dict(scale=self.scale, implementation=self.implementation)
        run = _arguments.unless_initializing(self, gsa)
        if not self.decode:
            return run(q, k, v, s, g, segment_ids=segments, **options)[0]
        (B, _, H, K), V, M = k.shape, v.shape[3], s.shape[3]
        hk = self.variable("cache", "hk", jnp.zeros, (B, H, K, M), f32)
        hv = self.variable("cache", "hv", jnp.zeros, (B, H, M, V), f32)
        state = GSAState(hk.value, hv.value)
        if q.shape[1] == 1:
            step = _arguments.unless_initializing(self, gsa_step)
            o, state = step(*(x[:, 0] for x in (q, k, v, s, g)), state, **options)
            o = o[:, None]
        else:
            o, state = run(q, k, v, s, g, initial_state=state, segment_ids=segments, **options)
        if not self.is_initializing():
            hk.value, hv.value = state
        return o

    def _settings(self, inputs, mask, segment_ids):
        """Checks the call's arguments and the attributes; returns HQ, H, K, V, M and the gates'
        normaliser."""
        D = _arguments.check_inputs(self, inputs, mask, segment_ids)
        HQ = self.num_heads
        _arguments.check_size("num_heads", HQ, 1)
        H = HQ if self.num_kv_heads is None else self.num_kv_heads
        _arguments.check_size("num_kv_heads", H, 1)
        checks.check_multiple("num_heads", HQ, "num_kv_heads", H)
        K, V, M = _arguments.head_dims(
            D,
            HQ,
            head_dim=self.head_dim,
            value_head_dim=self.value_head_dim,
            num_slots=self.num_slots,
        )
        if self.feature_map not in FEATURE_MAPS:
            raise ValueError(
                f"feature_map must be one of {', '.join(map(repr, FEATURE_MAPS))}, "
                f"got {self.feature_map!r}"
            )
        normalizer = checks.check_positive("gate_logit_normalizer", self.gate_logit_normalizer)
        _arguments.check_conv_size(self.conv_size)
        return HQ, H, K, V, M, normalizer
