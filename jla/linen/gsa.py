"""The layer of Gated Slot Attention (arXiv 2409.07146)."""

import functools

import jax
import jax.numpy as jnp
from flax import linen as nn

from jla import _token
from jla._core import axes, checks
from jla.gsa import HEAD_DIMS, GSAState, gsa, gsa_step
from jla.linen import _one_token
from jla.linen.mixer import Mixer

f32 = jnp.float32

FEATURE_MAPS = {"swish": nn.silu, "relu": nn.relu, "t2r": nn.relu, None: lambda x: x}


class GatedSlotAttention(Mixer):
    """Gated Slot Attention with its projections, log decays and norm.

    For inputs x [B, T, D], `HQ` query heads and `HK` key/value heads (query head `j` uses key/value
    head `j // (HQ // HK)`) of key dimension `K` and value dimension `V`, and `M` slots, with W for
    the projections:

        q = phi(W_q x);   k = phi(W_k x);   v = silu(W_v x)
        g = logsigmoid(W_f x) / gate_logit_normalizer;   s = 1 - exp(g)
        y = W_o RMSNorm(silu(gsa(q, k, v, s, g)))

    with phi the feature map, and RMSNorm over all heads of a token together. With `conv_size`, each
    of W_q x, W_k x and W_v x first passes through a causal convolution of its own and SiLU. The
    feature map "t2r" is `relu(W_phi z)` of each head z, with one matrix W_phi for queries and keys.

    The projections run in `dtype`; g, s, the convolutions' sums and RMSNorm are computed in
    float32, and the recurrent state is float32.

    Parameters, their shapes and initial values (all `param_dtype`; exclude the norm's scale from
    weight decay):

    ===================  ===========  ====================================================
    q_proj               kernel       [D, HQ, K]
    k_proj               kernel       [D, HK, K]
    v_proj               kernel       [D, HK, V]
    f_proj               kernel       [D, HK, M]
    q_conv1d             kernel       [conv_size, HQ, K], U(-conv_size**-0.5, conv_size**-0.5)
    k_conv1d, v_conv1d   kernel       [conv_size, HK, K], [conv_size, HK, V], as q_conv1d
    ..._conv1d           bias         [HQ, K], [HK, K], [HK, V], zeros; with `conv_bias`
    feature_map          kernel       [K, K], with `feature_map="t2r"`
    g_norm               scale        [HQ, V], ones; none without `norm_scale`
    o_proj               kernel       [HQ, V, D]
    ===================  ===========  ====================================================

    Decoding, masks, segments and initial values are as in all layers, see docs/layers.md. The cache
    holds the state, `hk` [B, HK, K, M] and `hv` [B, HK, M, V] (float32).

    Example:
      x = jnp.ones((2, 8, 64))  # [B, T, D]
      layer = jla.linen.GatedSlotAttention(num_heads=4)
      variables = layer.init(jax.random.key(0), x)
      y = layer.apply(variables, x)  # [2, 8, 64]

    Attributes, beside those of all layers (`Mixer`):
      num_key_heads: HK, of which num_heads is a multiple; num_heads if None. fla's `num_kv_heads`.
      key_dim, value_dim: 16 to 512. Kernels serve up to 256, and up to 128 slots ("pallas").
      num_slots: M, 16 to 512; key_dim if None.
      feature_map: "swish", "relu", "t2r", or None for none.
      gate_logit_normalizer: a positive number; the larger, the slower a slot forgets.
      scale: of the slots' logits, see `jla.gsa`; 1 as in the paper's layer. None is `K**-0.5`.
      conv_size: taps of the convolutions; there are none unless it is set.
      norm_epsilon: RMSNorm's epsilon. In fla it is 1e-5, this default, whatever its config says.
      norm_scale: whether RMSNorm has a scale. fla's `elementwise_affine`.
    """

    num_key_heads: int | None = None
    num_slots: int | None = None
    feature_map: str | None = "swish"
    gate_logit_normalizer: float = 8.0
    scale: float | None = 1.0
    conv_size: int | None = None
    norm_scale: bool = True

    @nn.compact
    @checks.named
    def __call__(
        self,
        inputs: jax.Array,
        *,
        mask: jax.Array | None = None,
        segment_ids: jax.Array | None = None,
        slots: jax.Array | None = None,
    ) -> jax.Array:
        """Applies the layer; arguments, result and errors as of all layers, see `Mixer`."""
        tokens, (H, HK, K, V, M) = self.begin(inputs, mask, segment_ids, slots)
        B = tokens.x.shape[0]
        cache = self.cached(GSAState, tokens, hk=((B, HK, K, M), f32), hv=((B, HK, M, V), f32))
        over_heads = dict(axes=2, input_activation=nn.silu, use_scale=self.norm_scale)
        if (o := self._of_one(tokens, (H, HK, K, V, M), cache)) is not None:
            return self.finish(self.norm("g_norm", **over_heads)(o), tokens)
        convolve = functools.partial(self.convolve, tokens=tokens, otherwise=lambda x: x)
        # SiLU behind the convolution's own is the convolution's, too.
        swish, feature_map = self.feature_map == "swish", FEATURE_MAPS[self.feature_map]
        q = convolve(self.project(tokens, (H, K), "q_proj"), "q_conv1d", silu_twice=swish)
        k = convolve(self.project(tokens, (HK, K), "k_proj"), "k_conv1d", silu_twice=swish)
        v = convolve(self.project(tokens, (HK, V), "v_proj"), "v_conv1d", silu_twice=True)
        if self.feature_map == "t2r":
            mapped = self.dense(K, "feature_map")
            q, k = mapped(q), mapped(k)
        if not swish:
            q, k = feature_map(q), feature_map(k)
        g = nn.log_sigmoid(self.project(tokens, (HK, M), "f_proj").astype(f32))
        g = tokens.zero_padding(g / self.gate_logit_normalizer)  # and so s = 0
        s = -jnp.expm1(g)

        options = dict(scale=self.scale, implementation=self.implementation)

        def run(q, k, v, s, g, state=None):
            arrays = dict(q=q, k=k, v=v, s=s, g=g, segment_ids=tokens.segments)
            return self.on_mesh(gsa, axes.GSA, **arrays, initial_state=state, **options)

        step = functools.partial(gsa_step, **options)
        o = self.mix(run, step, (q, k, v, s, g), cache)
        return self.finish(self.norm("g_norm", **over_heads)(o), tokens)

    def _of_one(self, tokens, sizes, cache):
        """The outputs of one token, if kernels serve all before the norm; else None."""
        H, HK, K, V, M = sizes
        first = dict(q_proj=(H, K), k_proj=(HK, K), v_proj=(HK, V), f_proj=(HK, M))
        if self.feature_map != "swish":
            return None
        one = _one_token.of(self, tokens, "gsa_token", tuple(first), first)
        if one is None:
            return None
        y = one.project(silu_twice=True)
        o, state = _token.gsa_token(
            *y.values(),
            cache.whole,
            normalizer=float(self.gate_logit_normalizer),
            scale=self.scale,
            implementation=self.implementation,
        )
        cache.replace(state)
        return o[:, None]

    def sizes(self, T, D):
        if self.feature_map not in FEATURE_MAPS:
            raise ValueError(
                f"feature_map must be one of {', '.join(map(repr, FEATURE_MAPS))}, "
                f"got {self.feature_map!r}"
            )
        checks.check_positive("gate_logit_normalizer", self.gate_logit_normalizer)
        heads = dict(num_key_heads=self.num_key_heads, accepted=HEAD_DIMS)
        return self.heads_and_dims(D, **heads, num_slots=self.num_slots)
