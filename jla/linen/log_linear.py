"""The layer of log-linear attention, on Mamba-2 (arXiv 2506.04761)."""

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn
from jax import lax

from jla import _fused, _token
from jla._core import alignment, axes, checks
from jla._core.lengths import is_symbolic_dim
from jla._core.parts import mamba2_gates, mamba2_operands
from jla._core.states import with_rank
from jla.linen import _arguments, _one_token
from jla.linen._normalize import GatedRMSNorm
from jla.linen._projections import dot, only_inputs, plus, product_by_heads
from jla.linen.mixer import Mixer
from jla.log_linear import LazyLogLinearState

f32 = jnp.float32


def _A_log_init(_, shape, dtype):
    return jnp.asarray(np.log(np.arange(1, shape[0] + 1)), dtype)  # nothing to compile


class _Weights(nn.Module):
    """The parameters of `nn.DenseGeneral`, kernel and bias, without the product."""

    features: tuple[int, ...]
    use_bias: bool
    param_dtype: nn.dtypes.Dtype
    kernel_init: nn.initializers.Initializer

    @nn.compact
    def __call__(self, D):
        def init(key, shape, dtype):
            flat = self.kernel_init(key, (D, math.prod(self.features)), dtype)
            return flat.reshape(shape)

        kernel = self.param("kernel", init, (D, *self.features), self.param_dtype)
        if not self.use_bias:
            return kernel, None
        return kernel, self.param("bias", nn.initializers.zeros, self.features, self.param_dtype)


class LogLinearMamba2(Mixer):
    """Log-linear Mamba-2: log-linear attention with Mamba-2's projections, gates and norm.

    For inputs x [B, T, D], `H` heads of value dimension `V`, `HK` key heads of dimension `K`,
    shared as in `jla.log_linear_attention`, and `L` levels, with W for the projections:

        z = W_z x;   d = W_dt x;   logits = W_level x
        q = silu(conv(W_q x));   k = silu(conv(W_k x));   u = silu(conv(W_v x))
        dt = softplus(d + dt_bias);   v = dt u;   g = -exp(A_log) dt
        level_scales = softplus(L logits)
        o = log_linear_attention(q, k, v, g, level_scales) + D u
        y = W_o RMSNorm(o silu(z)) + b_o            RMSNorm(o) silu(z) with norm_before_gate
                                                    o silu(z) with use_norm=False

    d, dt and the parameters A_log and D are one number for each head (D one for each feature with
    `skip_per_feature`); logits, level_scales and the parameter L are one for each head and level;
    RMSNorm is over all heads of a token together, or over each of `norm_groups` groups of heads.
    Each projection has a bias unless `use_bias` is False, and each convolution if `conv_bias` is
    True. In Mamba's letters q, k, u are C, B, x.

    The projections run in `dtype`; the rest, but for the sequence mechanism, is computed in
    float32, and the recurrent state is float32. On a GPU, kernels serve the norm on either side of
    the gate; with padding or groups of heads it is the formula. A skip for each feature costs a
    pass over o and u, where one for each head costs none.

    Parameters, their shapes and initial values (`A_log`, `dt_bias`, `D` and `L` are always float32,
    the others `param_dtype`; exclude these four, the norm's scale and the biases from weight
    decay):

    ===================  ===========  ====================================================
    q_proj, k_proj       kernel,bias  [D, HK, K], [HK, K]
    v_proj, z_proj       kernel,bias  [D, H, V], [H, V]; v_proj makes u
    dt_proj              kernel,bias  [D, H], [H]
    level_proj           kernel,bias  [D, H, L], [H, L]
    q_conv1d, k_conv1d   kernel       [conv_size, HK, K], U(-conv_size**-0.5, conv_size**-0.5)
    v_conv1d             kernel       [conv_size, H, V], of u, as q_conv1d
    *_conv1d             bias         [HK, K] or [H, V], zeros; with conv_bias alone
    A_log                             [H], log of 1, 2, ..., H
    dt_bias                           [H], such that softplus of it is log-uniform in [1e-3, 0.1]
    D                                 [H], ones; [H, V] with skip_per_feature
    L                                 [H, L], ones
    o_norm               scale        [H, V], ones; none with use_norm=False
    o_proj               kernel,bias  [H, V, D], [D]
    ===================  ===========  ====================================================

    Decoding, masks, segments and initial values are as in all layers, see docs/layers.md. The cache
    holds a `jla.LazyLogLinearState`: `levels` [B, H, L, K, V] and `log_decays` [B, H, L] (float32),
    and `position` [B] (int32). L levels serve
    `2**(L-1)` tokens; beyond, the outputs are NaN (or a ValueError, where the position is not
    traced). Padding takes no position.

    Example:
      x = jnp.ones((2, 8, 64))  # [B, T, D]
      layer = jla.linen.LogLinearMamba2(num_heads=4)
      variables = layer.init(jax.random.key(0), x)
      y = layer.apply(variables, x)  # [2, 8, 64]

    Attributes, beside those of all layers (`Mixer`):
      num_key_heads: HK, of which num_heads is a multiple; 1 as in Mamba-2, where they are groups
        (fla's `n_groups`).
      key_dim: K, Mamba's and fla's `state_size`.
      value_dim: V, fla's `head_dim`. Mamba-2 has H V = 2 D.
      num_levels: L, 1 to 32: the longest sequence has `2**(num_levels-1)` tokens.
      use_bias: whether the projections have biases.
      skip_per_feature: whether D is a number for each feature of a head (fla's `D_has_hdim`).
      use_norm: whether there is a norm (fla's `rmsnorm`); without it the next two have no meaning.
      norm_before_gate: whether the norm is that of o, and the gate comes after it.
      norm_groups: into so many groups num_heads is split, which are normalised each for itself. In
        fla since 0.6 there are `n_groups`, as many as key heads.
    """

    num_key_heads: int = 1
    num_levels: int = 15
    use_bias: bool = True
    skip_per_feature: bool = False
    use_norm: bool = True
    norm_before_gate: bool = False
    norm_groups: int = 1

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
        tokens, (H, HK, K, V, L) = self.begin(inputs, mask, segment_ids, slots)
        B = tokens.x.shape[0]
        entries = dict(levels=((B, H, L, K, V), f32), position=((B,), jnp.int32))
        cache = self.cached(LazyLogLinearState, tokens, **entries, log_decays=((B, H, L), f32))
        if (made := self._of_one(tokens, (H, HK, K, V, L), cache)) is not None:
            return self._normed(*made, tokens)
        level_weight = _arguments.float32_parameter(self, "L", nn.initializers.ones, (H, L))
        z, u, q, k, d, logits = self._projections(tokens, (H, HK, K, V, L), level_weight)
        q, k, u = (
            self.convolve(y, f"{letter}_conv1d", tokens)
            for letter, y in zip("qkv", (q, k, u), strict=True)
        )
        A_log = _arguments.float32_parameter(self, "A_log", _A_log_init, (H,))
        dt_bias = _arguments.float32_parameter(self, "dt_bias", _arguments.dt_bias_init, (H,))
        skip_shape = (H, V) if self.skip_per_feature else (H,)
        skip = _arguments.float32_parameter(self, "D", nn.initializers.ones, skip_shape)

        def run(q, k, u, d, logits, before=None):
            dt, g = mamba2_gates(d, A_log, dt_bias)
            o, state = self.on_mesh(
                _fused.log_linear_mamba2,
                axes.LOG_LINEAR_MAMBA2 | {"skip": "H" if skip.ndim == 1 else "H V"},
                **dict(q=q, k=k, u=u, g=g, logits=logits, dt=dt, skip=skip),
                initial_state=before,
                segment_ids=tokens.segments,
                implementation=self.implementation,
            )
            if before is None:
                return o, state
            if tokens.real is not None:
                # Padding has taken positions.
                v, before = mamba2_operands(u, logits, dt, skip)[0], before.settled()
                state = alignment.state_after(tokens.lengths, k, v, g, before, tokens.segments)
            return o, state.lazy()

        def step(q, k, u, d, logits, before, slots=None):
            dt, g = mamba2_gates(d, A_log, dt_bias)
            options = dict(slots=slots, implementation=self.implementation)
            o, state = _fused.log_linear_mamba2_step(
                q, k, u, g, logits, dt, skip, before, **options
            )
            if tokens.real is not None:
                real = tokens.real[:, 0]
                state = jax.tree.map(
                    lambda new, old: jnp.where(real.reshape(-1, *[1] * (new.ndim - 1)), new, old),
                    state,
                    before,
                )
            return o, state

        return self._normed(self.mix(run, step, (q, k, u, d, logits), cache), z, tokens)

    def _normed(self, o, z, tokens):
        """The output projection of the norm of o behind or before its gate z."""
        # At a padded token o may be NaN, beyond the last level.
        if self.use_norm:
            options = dict(groups=self.norm_groups, norm_before_gate=self.norm_before_gate)
            o = self.norm("o_norm", GatedRMSNorm, **options)(o, z, tokens.real)
        else:
            o = tokens.zero_padding(o).astype(f32) * nn.silu(z.astype(f32))
        return self.finish(o.astype(z.dtype), tokens, use_bias=self.use_bias)

    def _of_one(self, tokens, sizes, cache):
        """o and z of one token, if kernels serve all before the norm; else None."""
        H, HK, K, V, L = sizes
        if self.use_bias or self.skip_per_feature:
            return None
        given = ("q_proj", "k_proj", "v_proj")
        first = dict(q_proj=(HK, K), k_proj=(HK, K), v_proj=(H, V), z_proj=(H, V))
        first |= dict(dt_proj=(H,), level_proj=(H, L))
        float32 = ("A_log", "dt_bias", "L", "D")
        one = _one_token.of(self, tokens, "log_linear_token", given, first, float32=float32)
        if one is None:
            return None
        y, params = one.project(), one.params
        arrays = (y[name] for name in (*given, "dt_proj", "level_proj"))
        more = (params[name] for name in ("A_log", "dt_bias", "L", "D"))
        o, state = _token.log_linear_token(
            *arrays, *more, cache.whole, implementation=self.implementation
        )
        cache.replace(state)
        return o[:, None], y["z_proj"][:, None]

    def _projections(self, tokens, sizes, level_weight):
        """z, u, q, k, d and the levels' logits, times the levels' weights.

        The narrow ones are two products: of the key heads', and of those of all heads. Heads stay
        an axis of their own, so that no sharding of them is in the way.
        """
        H, HK, K, V, L = sizes

        def weights(name, *features):
            options = dict(param_dtype=self.param_dtype, kernel_init=self.kernel_init)
            return _Weights(features, self.use_bias, **options, name=name)(tokens.x.shape[-1])

        def with_axis(weights):
            return [None if w is None else w[..., None] for w in weights]

        def scaled(w):
            # The weights multiply the projection, not its results: these are far larger.
            if w is None:
                return None
            return (w.astype(f32) * with_rank(level_weight, w.ndim)).astype(w.dtype)

        z, u = weights("z_proj", H, V), weights("v_proj", H, V)
        q, k = weights("q_proj", HK, K), weights("k_proj", HK, K)
        d, levels = weights("dt_proj", H), weights("level_proj", H, L)
        groups = [z], [u], [q, k], [with_axis(d), [scaled(w) for w in levels]]
        promote = nn.dtypes.promote_dtype if _arguments.split_of(self) is None else only_inputs
        promote = functools.partial(promote, dtype=self.dtype)
        z, u, qk, rest = _products(tokens, groups, promote, self.precision)
        return z, u, qk[..., :K], qk[..., K:], rest[..., 0], rest[..., 1:]

    def sizes(self, T, D):
        L = self.num_levels
        _arguments.check_size("num_levels", L, 1)
        if L > 32 or (not is_symbolic_dim(T) and T > 1 << (L - 1)):
            raise ValueError(
                f"num_levels must be at most 32 and at least {(T - 1).bit_length() + 1}, "
                f"ceil(log2 T) + 1, for T = {T} tokens, got {L}"
            )
        sizes = self.heads_and_dims(D, self.num_key_heads)
        _arguments.check_size("norm_groups", self.norm_groups, 1)
        checks.check_multiple("num_heads", self.num_heads, "norm_groups", self.norm_groups)
        return *sizes, L


def _products(tokens, groups, promote, precision):
    """The tokens times the kernels of each group side by side, plus their biases, [B, T, heads,
    features].

    Args:
      groups: lists of kernels [D, heads, features] and biases [heads, features], or None.
      promote: of x, a kernel and a bias, to the layer's dtype.
    """
    products = []
    for i, group in enumerate(groups):
        kernels, biases = zip(*group, strict=True)
        kernel = jnp.concatenate(kernels, axis=-1)
        bias = None if biases[0] is None else jnp.concatenate(biases, axis=-1)
        copies = tokens.copies
        alike = copies is None or kernel.shape[1] % copies.shape[0]
        x = tokens.x if alike else copies
        inputs, kernel, bias = promote(x, kernel, bias)
        by = precision
        if by is None and inputs.dtype.itemsize == 2:
            # XLA merges the smaller products of one input, and then cuts and joins columns in
            # passes of their own, but not products of different precision. Those of 16-bit numbers
            # are exact at any. The last two may well be merged.
            by = (lax.Precision.DEFAULT, lax.Precision.HIGH, lax.Precision.HIGHEST)[min(i, 2)]
        product = dot if alike else product_by_heads
        y = product(inputs, kernel, (((2,), (0,)), ((), ())), precision=by)
        products.append(y if bias is None else plus(y, bias))
    return products
