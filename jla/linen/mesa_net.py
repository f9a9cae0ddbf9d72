"""The layer of MesaNet (arXiv 2506.05233)."""

import math

import jax
import jax.numpy as jnp
from flax import linen as nn

from jla import _token
from jla._core import axes, checks
from jla.linen import _arguments, _one_token
from jla.linen.mixer import Mixer
from jla.mesa_net import MesaState, mesa_net, mesa_step

f32 = jnp.float32


class MesaNet(Mixer):
    """MesaNet with its projections, convolutions, log decays and norm.

    For inputs x [B, T, D] and `H` heads of key dimension `K` and value dimension `V`, with W for
    the projections:

        q = l2norm(silu(conv(W_q x)));   k = l2norm(silu(conv(W_k x)));   v = W_v x
        g = logsigmoid(W_a x + b_a);   beta = sigmoid(W_b x + b_b)
        lamb = softplus(lambda_params) + lambda_lower_bound
        y = W_o RMSNorm(mesa_net(q, k, v, g, beta, lamb))

    With `use_output_gate`, RMSNorm's result is multiplied by `silu(W_g x)`.

    The projections run in `dtype`; g, beta, lamb, the l2 norm, the convolutions' sums, RMSNorm
    and its gate are computed in float32, and the recurrent state is float32.

    Parameters, their shapes and initial values (all `param_dtype`, except `lambda_params`, which is
    always float32; exclude it, the norm's scale and the biases from weight decay):

    ===================  ===========  ====================================================
    q_proj, k_proj       kernel       [D, H, K]
    v_proj               kernel       [D, H, V]
    q_conv1d, k_conv1d   kernel       [conv_size, H, K], U(-conv_size**-0.5, conv_size**-0.5)
    ..._conv1d           bias         [H, K], zeros; with `conv_bias`
    a_proj, b_proj       kernel,bias  [D, H], [H]; the biases are zero at first
    lambda_params                     [H, K], such that lamb = 1, or twice a bound from 1 on
    g_proj               kernel       [D, H, V], with `use_output_gate`
    o_norm               scale        [V], ones
    o_proj               kernel       [H, V, D]
    ===================  ===========  ====================================================

    Decoding, masks, segments and initial values are as in all layers, see docs/layers.md. The cache
    holds the state, `kk` [B, H, K, K] and `kv` [B, H, K, V] (float32).

    Example:
      x = jnp.ones((2, 8, 64))  # [B, T, D]
      layer = jla.linen.MesaNet(num_heads=4)
      variables = layer.init(jax.random.key(0), x)
      y = layer.apply(variables, x)  # [2, 8, 64]

    Attributes, beside those of all layers (`Mixer`):
      key_dim: K, fla's `head_dim`.
      use_output_gate: whether RMSNorm's result is gated.
      lambda_lower_bound: a positive number, below every lamb. The smaller, the more iterations the
        solution can take.
      cg_steps: the most iterations of conjugate gradients, see `jla.mesa_net`; fla's
        `max_cg_step_training`.
      cg_steps_decode: the same for a call of one token, with `decode`; `cg_steps` if None.
    """

    use_output_gate: bool = False
    lambda_lower_bound: float = 0.25
    cg_steps: int = 30
    cg_steps_decode: int | None = None

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
        tokens, (H, K, V) = self.begin(inputs, mask, segment_ids, slots)
        B = tokens.x.shape[0]
        cache = self.cached(MesaState, tokens, kk=((B, H, K, K), f32), kv=((B, H, K, V), f32))
        if (o := self._of_one(tokens, (H, K, V), cache)) is not None:
            return self.finish(o, tokens)
        q, k = (
            self.convolve(
                self.project(tokens, (H, K), f"{letter}_proj"),
                f"{letter}_conv1d",
                tokens,
                normalize=True,
            )
            for letter in "qk"
        )
        v = self.project(tokens, (H, V), "v_proj")
        g = nn.log_sigmoid(self.project(tokens, H, "a_proj", use_bias=True).astype(f32))
        beta = nn.sigmoid(self.project(tokens, H, "b_proj", use_bias=True).astype(f32))
        g, beta = tokens.zero_padding(g), tokens.zero_padding(beta)
        bound = float(self.lambda_lower_bound)
        rest = 1 - bound if bound < 1 else bound
        init = nn.initializers.constant(rest + math.log(-math.expm1(-rest)))  # softplus gives rest
        lambda_params = _arguments.float32_parameter(self, "lambda_params", init, (H, K))
        lamb = nn.softplus(lambda_params) + bound

        def run(q, k, v, g, beta, state=None):
            options = dict(cg_steps=self.cg_steps, implementation=self.implementation)
            options |= dict(initial_state=state, segment_ids=tokens.segments)
            arrays = dict(q=q, k=k, v=v, g=g, beta=beta, lamb=lamb)
            return self.on_mesh(mesa_net, axes.MESA_NET, **arrays, **options)

        def step(q, k, v, g, beta, state, slots=None):
            options = dict(
                cg_steps=self._steps_decode(), slots=slots, implementation=self.implementation
            )
            return mesa_step(q, k, v, g, beta, lamb, state, **options)

        o = self.mix(run, step, (q, k, v, g, beta), cache)
        gate = self.project(tokens, (H, V), "g_proj") if self.use_output_gate else None
        return self.finish(self.norm("o_norm", activation=nn.silu)(o, gate), tokens)

    def _steps_decode(self):
        return self.cg_steps if self.cg_steps_decode is None else self.cg_steps_decode

    def _of_one(self, tokens, sizes, cache):
        """The outputs of one token, normalised and gated, if kernels serve all of it; else None."""
        H, K, V = sizes
        given = ("q_proj", "k_proj", "v_proj")
        first = dict(q_proj=(H, K), k_proj=(H, K), v_proj=(H, V))
        first |= dict(a_proj=(H,), b_proj=(H,))
        if self.use_output_gate:
            first["g_proj"] = (H, V)
        options = dict(float32=("lambda_params",))
        one = _one_token.of(self, tokens, "mesa_token", given, first, **options)
        if one is None:
            return None
        y, params = one.project(), one.params
        o, state = _token.mesa_token(
            *(y[name] for name in given),
            y["a_proj"], params["a_proj"]["bias"], y["b_proj"], params["b_proj"]["bias"],
            params["lambda_params"], y.get("g_proj"), params["o_norm"]["scale"], cache.whole,
            lower_bound=float(self.lambda_lower_bound),
            cg_steps=self._steps_decode(),
            epsilon=self.norm_epsilon,
            dtype=tokens.x.dtype,
            implementation=self.implementation,
        )  # fmt: skip
        cache.replace(state)
        return o[:, None]

    def sizes(self, T, D):
        checks.check_count("cg_steps", self.cg_steps)
        if self.cg_steps_decode is not None:
            checks.check_count("cg_steps_decode", self.cg_steps_decode)
        checks.check_positive("lambda_lower_bound", self.lambda_lower_bound)
        H, _, K, V = self.heads_and_dims(D)
        return H, K, V
