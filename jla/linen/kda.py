"""The layer of Kimi Delta Attention (arXiv 2510.26692)."""

import functools

import jax
import jax.numpy as jnp
from flax import linen as nn

from jla import _fused, _token
from jla._core import axes, checks
from jla.linen import _arguments, _one_token
from jla.linen.mixer import Mixer

f32 = jnp.float32


@functools.partial(jax.jit, static_argnums=(1, 2))
def _A_log_init(key, shape, dtype):
    return jnp.log(jax.random.uniform(key, shape, dtype, minval=1.0, maxval=16.0))


class _DenseAndBias(nn.DenseGeneral):
    """`nn.DenseGeneral`, but its bias, None without one, is returned beside the product: the norm
    adds it."""

    has_bias: bool = True

    @nn.compact
    def __call__(self, inputs):
        product = super().__call__(inputs)
        if not self.has_bias:
            return product, None
        return product, self.param("bias", self.bias_init, self.features, self.param_dtype)


class KimiDeltaAttention(Mixer):
    """Kimi Delta Attention with its projections, convolutions, gates and norms.

    For inputs x [B, T, D], `H` heads of value dimension `V` and `HK` key heads of dimension `K`
    (head `j` uses key head `j // (H // HK)`), with W for the projections:

        q = l2norm(silu(conv(W_q x)));   k = l2norm(silu(conv(W_k x)));   v = silu(conv(W_v x))
        g = -exp(A_log) softplus(W_f_up W_f_down x + dt_bias);   beta = sigmoid(W_b x)
        y = W_o (RMSNorm(kda(q, k, v, g, beta)) sigmoid(W_g_up W_g_down x + b_g))

    The projections run in `dtype`; g, beta, the l2 norm, the convolutions' sums, RMSNorm and its
    gate are computed in float32, and the recurrent state is float32. On a GPU that has the kernels,
    one kernel computes g (16 bits, T > 1, no mask, K a multiple of 64), for which XLA needs several
    passes.

    Parameters, their shapes and initial values (all `param_dtype`, except `A_log` and `dt_bias`,
    which are always float32; exclude these two, the norm's scale and the bias from weight decay):

    ===================  ===========  ====================================================
    q_proj, k_proj       kernel       [D, HK, K]
    v_proj               kernel       [D, H, V]
    q_conv1d, k_conv1d   kernel       [conv_size, HK, K], U(-conv_size**-0.5, conv_size**-0.5)
    v_conv1d             kernel       [conv_size, H, V], as q_conv1d
    ..._conv1d           bias         [HK, K] or [H, V], zeros; with `conv_bias`
    f_proj_down          kernel       [D, gate_rank]
    f_proj_up            kernel       [gate_rank, H, K]; with `full_rank_decay` f_proj, [D, H, K]
    A_log                             [H], log U(1, 16); zeros with `gate_lower_bound`
    dt_bias                           [H, K], inverse softplus of log-uniform [1e-3, 1e-1]
    b_proj               kernel       [D, H]
    g_proj_down          kernel       [D, gate_rank]
    g_proj_up            kernel,bias  [gate_rank, H, V], [H, V]; the bias is zero at first, and with
                                      `full_rank_gate` it is g_proj, [D, H, V], [H, V]
    o_norm               scale        [V], ones
    o_proj               kernel       [H, V, D]
    ===================  ===========  ====================================================

    Decoding, masks, segments and initial values are as in all layers, see docs/layers.md. The cache
    holds `recurrent_state` [B, H, K, V] (float32).

    Example:
      x = jnp.ones((2, 8, 64))  # [B, T, D]
      layer = jla.linen.KimiDeltaAttention(num_heads=4)
      variables = layer.init(jax.random.key(0), x)
      y = layer.apply(variables, x)  # [2, 8, 64]

    Attributes, beside those of all layers (`Mixer`):
      num_key_heads: HK, of which num_heads (the paper's and fla's value heads, `num_v_heads`) is a
        multiple; num_heads if None. fla's `num_heads`.
      key_dim: K, fla's `head_dim`; D // num_key_heads if None.
      allow_negative_eigenvalues: beta is `2 sigmoid(W_b x)`, so that `I - beta k k^T` has
        eigenvalues in [-1, 1] (arXiv 2411.12537).
      gate_lower_bound: None, or a negative number, for log decays
        `g = gate_lower_bound * sigmoid(exp(A_log) * (W_f_up W_f_down x + dt_bias))`.
      gate_rank: the inner dimension of the decays' and the output gate's projections; V if None.
      full_rank_decay: whether one matrix, `f_proj`, takes the place of W_f_up W_f_down.
      full_rank_gate: whether one matrix, `g_proj`, takes the place of W_g_up W_g_down.
      output_gate_bias: whether the output gate has its bias b_g.
    """

    num_key_heads: int | None = None
    allow_negative_eigenvalues: bool = False
    gate_lower_bound: float | None = None
    gate_rank: int | None = None
    full_rank_decay: bool = False
    full_rank_gate: bool = False
    output_gate_bias: bool = True

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
        tokens, (H, HK, K, V, rank) = self.begin(inputs, mask, segment_ids, slots)
        x = tokens.x
        entry = (x.shape[0], H, K, V), f32
        cache = self.cached(lambda recurrent_state: recurrent_state, tokens, recurrent_state=entry)
        if (o := self._of_one(tokens, (H, HK, K, V, rank), cache)) is not None:
            return self.finish(o, tokens)
        q, k = (
            self.convolve(
                self.project(tokens, (HK, K), f"{letter}_proj"),
                f"{letter}_conv1d",
                tokens,
                normalize=True,
            )
            for letter in "qk"
        )
        v = self.convolve(self.project(tokens, (H, V), "v_proj"), "v_conv1d", tokens)
        A_log_init = _A_log_init if self.gate_lower_bound is None else nn.initializers.zeros
        A_log = _arguments.float32_parameter(self, "A_log", A_log_init, (H,))
        dt_bias_init = _arguments.dt_bias_init
        dt_bias = _arguments.float32_parameter(self, "dt_bias", dt_bias_init, (H, K))
        f = self.low_rank(tokens, (H, K), "f_proj", None if self.full_rank_decay else rank)
        beta = nn.sigmoid(self.project(tokens, H, "b_proj").astype(f32))
        if self.allow_negative_eigenvalues:
            beta = 2.0 * beta

        options = dict(lower_bound=self.gate_lower_bound, implementation=self.implementation)

        def run(q, k, v, f, beta, state=None):
            arrays = dict(q=q, k=k, v=v, f=f, A_log=A_log, dt_bias=dt_bias, beta=beta)
            return self.on_mesh(
                _fused.kda_from_projection,
                axes.KDA_FROM_PROJECTION,
                **arrays,
                initial_state=state,
                segment_ids=tokens.segments,
                real=tokens.real,
                **options,
            )

        def step(q, k, v, f, beta, state, slots=None):
            real = None if tokens.real is None else tokens.real[:, 0]
            arguments = q, k, v, f, A_log, dt_bias, beta, state
            return _fused.kda_step_from_projection(*arguments, real=real, slots=slots, **options)

        o = self.mix(run, step, (q, k, v, f, beta), cache)
        gate_rank = None if self.full_rank_gate else rank
        bias = dict(kind=_DenseAndBias, has_bias=self.output_gate_bias)
        gate, gate_bias = self.low_rank(tokens, (H, V), "g_proj", gate_rank, **bias)
        return self.finish(self.norm("o_norm")(o, gate, gate_bias), tokens)

    def _of_one(self, tokens, sizes, cache):
        """The outputs of one token, normalised and gated, if kernels serve all of it; else None."""
        H, HK, K, V, rank = sizes
        first = dict(q_proj=(HK, K), k_proj=(HK, K), v_proj=(H, V), b_proj=(H,))
        second = {}
        for name, features, is_full in (
            ("f_proj", (H, K), self.full_rank_decay),
            ("g_proj", (H, V), self.full_rank_gate),
        ):
            if is_full:
                first[name] = features
            else:
                first[f"{name}_down"] = (rank,)
                second[f"{name}_up"] = f"{name}_down", features
        given = ("q_proj", "k_proj", "v_proj")
        float32 = ("A_log", "dt_bias")
        one = _one_token.of(self, tokens, "kda_token", given, first, second, float32)
        if one is None:
            return None
        y, params = one.project(), one.params
        f, gate = (y[name] if name in y else y[f"{name}_up"] for name in ("f_proj", "g_proj"))
        of_gate = params["g_proj" if self.full_rank_gate else "g_proj_up"]
        o, state = _token.kda_token(
            *(y[name] for name in given), f, params["A_log"], params["dt_bias"], y["b_proj"],
            gate, of_gate.get("bias"), params["o_norm"]["scale"], cache.whole,
            lower_bound=self.gate_lower_bound,
            strength=2.0 if self.allow_negative_eigenvalues else 1.0,
            epsilon=self.norm_epsilon,
            dtype=tokens.x.dtype,
            implementation=self.implementation,
        )  # fmt: skip
        cache.replace(state)
        return o[:, None]

    def sizes(self, T, D):
        if self.gate_lower_bound is not None:
            checks.check_negative("gate_lower_bound", self.gate_lower_bound)
        per = "num_heads" if self.num_key_heads is None else "num_key_heads"
        H, HK, K, V = self.heads_and_dims(D, self.num_key_heads, dims_per=per)
        if self.gate_rank is None:
            return H, HK, K, V, V
        _arguments.check_size("gate_rank", self.gate_rank, 1, "; None is for value_dim")
        if self.full_rank_decay and self.full_rank_gate:
            raise ValueError(
                f"gate_rank is {self.gate_rank}, but with full_rank_decay and full_rank_gate no "
                "projection has a rank: leave gate_rank out, or one of these"
            )
        return H, HK, K, V, self.gate_rank
