"""The layer of PaTH attention (arXiv 2505.16381)."""

import functools

import jax
import jax.numpy as jnp
from flax import linen as nn
from jax.typing import DTypeLike

from jla import _token
from jla._core import axes, checks
from jla._core.cache import RECENT, LazyPathCache, PathCache, without_rest
from jla._core.parts import l2norm
from jla.linen import _arguments, _one_token
from jla.linen.mixer import Mixer
from jla.path_attention import check_room, path_attention, run, step

f32 = jnp.float32
_SET_BY = "the length of init's input"


class PaTHAttention(Mixer):
    """PaTH attention with its projections, the short convolution of `w`, log decays and norms.

    For inputs x [B, T, D], `H` query heads and `HK` key/value heads (query head `j` uses key/value
    head `j // (H // HK)`) of key dimension `K` and value dimension `V`, with W for the projections:

        q = W_q x;   k = W_k x;   v = W_v x
        w = l2norm(silu(conv(W_w_up W_w_down x)));   beta = 2 sigmoid(W_b x + b_b)
        y = W_o path_attention(q, k, v, w, beta)

    With `use_forget_gate`, `g = logsigmoid(W_g x + b_g)` is its last argument (PaTH-FoX); with
    `use_qk_norm`, q and k first pass through RMSNorm, head by head.

    The projections run in `dtype`; w, beta, g, the convolution's sums and the norms are computed in
    float32, and w stays float32.

    Parameters, their shapes and initial values (all `param_dtype`; exclude the norms' scales and
    the biases from weight decay):

    ===================  ===========  ====================================================
    q_proj               kernel       [D, H, K]
    k_proj, v_proj       kernel       [D, HK, K], [D, HK, V]
    w_proj_down          kernel       [D, w_rank], unless w_rank is None
    w_proj_up            kernel       [w_rank, HK, K]; without w_rank it is w_proj, [D, HK, K]
    w_conv1d             kernel       [conv_size, HK, K], U(-conv_size**-0.5, conv_size**-0.5)
    w_conv1d             bias         [HK, K], zeros; with `conv_bias`
    b_proj               kernel,bias  [D, HK], [HK]; the bias is zero at first
    g_proj               kernel,bias  [D, H], [H], with `use_forget_gate`; as b_proj
    q_norm, k_norm       scale        [K], ones, with `use_qk_norm`
    o_proj               kernel       [H, V, D]
    ===================  ===========  ====================================================

    Masks, segments and initial values are as in all layers, see docs/layers.md. The cache holds
    `key` [B, S, HK, K] (float32), `value` [B, S, HK, V], `decay` [B, S, H] (float32, with
    `use_forget_gate`) and `length` [B] (int32), see `jla.PathCache`. Its capacity S is the T of
    `init`'s inputs, as in flax's own attention. Rows have their own lengths, and padding takes no
    place. Tokens that do not fit raise ValueError outside of jit; inside, their outputs are NaN.
    With `lazy_keys` the cache is a `jla.LazyPathCache`: `key` is of that dtype, and there are
    `recent` [B, 64, HK, K] and `change` [B, HK, K, K] (float32) beside it.

    Example:
      x = jnp.ones((2, 8, 64))  # [B, T, D]
      layer = jla.linen.PaTHAttention(num_heads=4)
      variables = layer.init(jax.random.key(0), x)
      y = layer.apply(variables, x)  # [2, 8, 64]

    Attributes, beside those of all layers (`Mixer`):
      num_key_heads: HK, of which num_heads is a multiple; num_heads if None. fla's `num_kv_heads`.
      use_forget_gate: whether there are log decays g.
      use_qk_norm: whether q and k are normalised.
      w_rank: the inner dimension of w's projection; None for a projection of full rank.
      conv_size: taps of w's convolution, at least 2; with None or 0 there is none, nor SiLU.
      lazy_keys: None, or the dtype of the keys of a lazy cache, float32 or that of the computation.
        Its steps write no key but the last 64 tokens', so those of long rows take two thirds of the
        time, with 16-bit keys less than half. Without log decays and norms of q and k the kernels
        of "pallas" serve all of a token up to the output projection.
    """

    num_key_heads: int | None = None
    use_forget_gate: bool = False
    use_qk_norm: bool = False
    w_rank: int | None = 32
    conv_size: int | None = 3
    lazy_keys: DTypeLike | None = None

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
        tokens, (H, HK, K, V) = self.begin(inputs, mask, segment_ids, slots)
        cache = None
        if self._may_be_one(tokens):
            like_v = jax.ShapeDtypeStruct((*tokens.x.shape[:2], HK, V), tokens.x.dtype)
            cache = self._cache(like_v, H, K, tokens)
            if (o := self._of_one(tokens, (H, HK, K, V), cache)) is not None:
                return self.finish(o, tokens)
        q, k = (
            self.project(tokens, (heads, K), f"{letter}_proj")
            for letter, heads in (("q", H), ("k", HK))
        )
        v = self.project(tokens, (HK, V), "v_proj")
        if cache is None:
            cache = self._cache(v, H, K, tokens)
        if self.use_qk_norm:
            q, k = self.norm("q_norm")(q), self.norm("k_norm")(k)
        w = self.low_rank(tokens, (HK, K), "w_proj", self.w_rank)
        w = self.convolve(w, "w_conv1d", tokens, otherwise=lambda x: x)
        w = l2norm(w.astype(f32))
        beta = 2.0 * nn.sigmoid(self.project(tokens, HK, "b_proj", use_bias=True).astype(f32))
        beta, g = tokens.zero_padding(beta), None
        if self.use_forget_gate:
            g = nn.log_sigmoid(self.project(tokens, H, "g_proj", use_bias=True).astype(f32))
            g = tokens.zero_padding(g)

        def run(*arrays):
            if cache is None:
                arrays = dict(zip(("q", "k", "v", "w", "beta", "g"), arrays, strict=True))
                options = dict(segment_ids=tokens.segments, implementation=self.implementation)
                return self.on_mesh(path_attention, axes.PATH, **arrays, **options)
            *arrays, before = arrays
            return self._appended(arrays, before, tokens)

        def on_pool(*arguments, slots):
            *arrays, pool = arguments
            check_room(pool, 1, slots=slots, set_by=_SET_BY)
            scale = arrays[1].shape[2] ** -0.5
            return step(*arrays, pool, scale, self.implementation, slots)

        arrays = q, k, v, w, beta, g
        one = None if tokens.slots is None else on_pool
        return self.finish(self.mix(run, one, arrays, cache), tokens)

    def _may_be_one(self, tokens):
        """Whether this is a call of one token, of those that kernels may serve as a whole."""
        if self.lazy_keys is None or self.use_forget_gate or self.use_qk_norm or not self.conv_size:
            return False
        if self.dtype is None or tokens.x.dtype != jnp.dtype(self.dtype):
            return False
        return self.has_variable("cache", "key") and tokens.x.shape[1] == 1

    def _of_one(self, tokens, sizes, cache):
        """The outputs of one token from a lazy cache, if kernels serve all of it; else None."""
        H, HK, K, V = sizes
        first: dict[str, tuple[int, ...]] = dict(q_proj=(H, K), k_proj=(HK, K), v_proj=(HK, V))
        first |= dict(b_proj=(HK,))
        second, of_w = {}, "w_proj"
        if self.w_rank is None:
            first[of_w] = HK, K
        else:
            of_w = "w_proj_up"
            first["w_proj_down"] = (self.w_rank,)
            second[of_w] = "w_proj_down", (HK, K)
        given = "q_proj", "k_proj", "v_proj"
        state, convolved = cache.whole, {of_w: "w_conv1d"}
        options = dict(convolved=convolved, more=(state,))
        one = _one_token.of(self, tokens, "path_token", given, first, second, **options)
        if one is None:
            return None
        check_room(state, 1, set_by=_SET_BY)
        y, bias = one.project(rounded=given), one.params["b_proj"]["bias"].astype(f32)
        arrays = *(y[name] for name in given), y[of_w], y["b_proj"], bias, state
        o, state = _token.path_token(*arrays, scale=K**-0.5, implementation=self.implementation)
        cache.replace(state)
        return o[:, None]

    packs_states = False

    def sizes(self, T, D):
        if self.w_rank is not None:
            _arguments.check_size("w_rank", self.w_rank, 1, "; None is for full rank")
        return self.heads_and_dims(D, self.num_key_heads)

    def _cache(self, v, H, K, tokens):
        """The cache for these values, with room for as many tokens in `init`."""
        (B, S, HK, V) = v.shape
        if self.has_variable("cache", "key"):
            S = self.get_variable("cache", "key").shape[1]
        decay = dict(decay=((B, S, H), f32)) if self.use_forget_gate else {}
        kind, key_dtype, lazy = PathCache, f32, {}
        if self.lazy_keys is not None:
            checks.check_dtype("lazy_keys", jnp.zeros((), self.lazy_keys), [f32, v.dtype])
            kind, key_dtype = LazyPathCache, self.lazy_keys
            lazy = dict(recent=((B, RECENT, HK, K), f32), change=((B, HK, K, K), f32))
        return self.cached(
            functools.partial(kind, **{} if decay else dict(decay=None)),
            tokens,
            key=((B, S, HK, K), key_dtype),
            value=((B, S, HK, V), v.dtype),
            **decay,
            length=((B,), jnp.int32),
            **lazy,
        )

    def _appended(self, arrays, cache, tokens):
        """The outputs, and the cache with these tokens."""
        T = tokens.x.shape[1] if tokens.lengths is None else tokens.lengths
        # Padding, behind the real tokens, may find no room; they are what must fit.
        check_room(cache, T, tokens.segments, set_by=_SET_BY)
        options = dict(scale=arrays[1].shape[3] ** -0.5, implementation=self.implementation)
        return _advance(arrays, cache, tokens.segments, tokens.real, tokens.lengths, **options)


# Jitted, so that no NaN of padding that finds no room leaves it: `jax_debug_nans` would stop there.
@functools.partial(jax.jit, static_argnames=("scale", "implementation"))
def _advance(arguments, cache, segments, real, lengths, *, scale, implementation):
    """The outputs of the real tokens, zeros for the padding, and the cache with those tokens."""
    options = dict(scale=scale, implementation=implementation)
    T = arguments[0].shape[1]
    # Padding in a step takes its place back, which could not be done with a lazy cache.
    if isinstance(cache, LazyPathCache) and (T > 1 or lengths is not None):
        o, after = _advance(arguments, cache.settled(), segments, real, lengths, **options)
        return o, after.lazy(cache.key.dtype)
    if T == 1:
        one = (None if x is None else x[:, 0] for x in arguments)
        o, cache = step(*one, cache, **options)
        o = o[:, None]
    else:
        o, cache = run(*arguments, cache, segments, **options)
    if lengths is not None:
        # The maps of padding, behind the real tokens, did nothing.
        cache = without_rest(cache._replace(length=cache.length - (T - lengths)))
        o = jnp.where(real[..., None, None], o, 0.0)
    return o, cache
