"""Multi-head latent attention (arXiv 2405.04434): softmax attention with a small cache."""

import functools
import math
from collections.abc import Mapping

import jax
import jax.numpy as jnp
from flax import linen as nn
from flax.typing import Dtype
from jax import lax

from jla._core import checks, sequence
from jla._core.types import Implementation
from jla._core.varying import varying_as
from jla._core.whole import Names
from jla.linen import RMSNorm, _arguments
from jla.linen._projections import dense, sum_over_heads
from jla.linen.mixer import Cache
from jla.models.attention import (
    appended,
    by_pool_rows,
    check_room,
    nan_unless,
    over_mesh,
    rotate,
    tokens_of,
)
from jla.models.intervals import from_left, interval_attention, intervals, intervals_over

f32 = jnp.float32
ROWS = ("length", "start")  # of the cache: what each row has one number of
_LETTERS = dict(q="B T H K", latent="B T c", shared="B T r", up="c H d", segments="B T")


class LatentAttention(nn.Module):
    """Softmax attention whose keys and values are made from one small vector of each token.

    For inputs x [B, T, D] and H heads, with c = `latent_dim`, n = `nope_dim`, r = `rope_dim` and
    v = `value_dim` (W for the projections):

        q_h = W_q,h x,  or W_qu,h norm(W_qd x) with `query_latent_dim`;   q_h = [a_h, b_h]
        [z, s] = W_d x;   z = norm(z);   [k_h, v_h] = W_u,h z
        logit_h,ts = (a_h,t . k_h,s + b_h,t . s_s) / sqrt(n + r);   o = W_o softmax(logit) v

    With `rope_theta`, b and s are rotated by the token's position (arXiv 2104.09864; feature i with
    feature i + r / 2); without, as in Kimi Linear, nothing tells positions apart.

    The cache keeps z and s, c + r numbers for a token. One token is decoded without its cache's
    keys and values: a_h . W_u,h z = (W_u,h^T a_h) . z, and the values' projection comes last.

    Parameters, their shapes and initial values (all `param_dtype`):

    ============================  =========  ========================================
    query                         kernel     [D, H, n + r], without query_latent_dim
    query_down                    kernel     [D, query_latent_dim]
    query_norm                    scale      [query_latent_dim], ones
    query_up                      kernel     [query_latent_dim, H, n + r]
    latent_down                   kernel     [D, c + r]
    latent_norm                   scale      [c], ones
    latent_up                     kernel     [c, H, n + v]
    out                           kernel     [H, v, D]
    ============================  =========  ========================================

    Masks, segments and decoding are as in jla's layers, see `jla.linen.mixer.Mixer`. The cache
    holds `latent` [B, S, c], `shared_key` [B, S, r], `length` [B] and `start` [B] (int32), the
    place where each row's last segment begins. Its capacity S is the T of `init`'s inputs. Tokens
    that do not fit raise ValueError outside of jit; inside, their outputs are NaN.

    Example:
      x = jnp.ones((2, 8, 64))  # [B, T, D]
      layer = jla.models.LatentAttention(
          num_heads=4, latent_dim=32, nope_dim=16, rope_dim=8, value_dim=16
      )
      variables = layer.init(jax.random.key(0), x)
      y = layer.apply(variables, x)  # [2, 8, 64]

    Attributes:
      num_heads: H.
      latent_dim: c. Kimi's and DeepSeek's `kv_lora_rank`.
      nope_dim: n, the features of a head's query and key that are never rotated.
      rope_dim: r, those that are; an even number with `rope_theta`.
      value_dim: v, the features of a head's value.
      query_latent_dim: the inner dimension of the queries' projection; None for full rank.
      rope_theta: the base of the rotation's wave lengths; None for no rotation.
      norm_epsilon: of both norms.
      dtype: the dtype of the computation; inferred from the inputs and parameters if None.
      param_dtype: the dtype of the parameters.
      kernel_init: initializer of the kernels.
      implementation: of the norms, as in jla's layers.
      decode: whether to keep and use a cache.
      axis_name, mesh_axes: as of `jla.models.Attention`. Where time's devices do not divide the
        heads, latents move, which are smaller than keys and values.
    """

    num_heads: int
    latent_dim: int
    nope_dim: int
    rope_dim: int
    value_dim: int
    query_latent_dim: int | None = None
    rope_theta: float | None = None
    norm_epsilon: float = 1e-6
    dtype: Dtype | None = None
    param_dtype: Dtype = f32
    kernel_init: nn.initializers.Initializer = nn.linear.default_kernel_init
    implementation: Implementation | None = None
    decode: bool = False
    axis_name: str | None = None
    mesh_axes: Mapping[str, Names] | None = None

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
        """Applies the layer; arguments, result and errors as of jla's layers."""
        _, D = _arguments.check_inputs(self, inputs, mask, segment_ids)
        self._check()
        _arguments.check_slots(self, slots, inputs, mask, segment_ids)
        split = _arguments.split_of(self)
        _arguments.refuse_over_devices(self, mask)
        tokens = tokens_of(self, inputs, mask, segment_ids, slots)
        q = self._queries(tokens.x)
        parts = self._dense(self.latent_dim + self.rope_dim, "latent_down")(tokens.x)
        latent, shared = jnp.split(parts, [self.latent_dim], axis=-1)
        latent = self._norm("latent_norm")(latent)
        shape = self.latent_dim, self.num_heads, self.nope_dim + self.value_dim
        up = Kernel(shape, self.kernel_init, self.param_dtype, name="latent_up")()
        cache = self._cache(latent, shared, tokens.slots)
        if self.is_initializing():
            o = jnp.zeros((*q.shape[:3], self.value_dim), q.dtype)
        elif cache is not None:
            o = self._attend(q, latent, shared, up.astype(latent.dtype), tokens, cache)
        else:
            arrays = dict(q=q, latent=latent, shared=shared, up=up)
            run = functools.partial(self._attend_over, axis=_arguments.split_over(self))
            o = over_mesh(run, split, _LETTERS, "B T H V", **arrays, segments=tokens.segments)
        out = self._dense(D, "out", axis=(-2, -1), dot_general_cls=sum_over_heads)
        return tokens.restore(out(o))

    def _attend_over(self, q, latent, shared, up, segments=None, *, axis):
        """The outputs [B, T, H, v] without a cache; `axis` splits time, or is None."""
        up = varying_as(up, q).astype(q.dtype)  # devices sum gradients before the cast
        first, place, _ = intervals_over(q, segments, axis)
        q, shared = self._rotated(q, shared, place - first)
        if axis is None:
            return attend_to_all(q, latent, shared, up, first, place)
        n = self.nope_dim
        if q.shape[2] % lax.axis_size(axis):

            def expand(latents, up):
                latent, shared = latents
                return keys_and_values(latent, shared, up, n)

            return from_left(q, (latent, shared), up, expand, first, place, axis)

        def run(q, k, v, _, segments):
            first, place, _ = intervals(q.shape[1], segments, None)
            k, v = (jnp.swapaxes(x, 1, 2) for x in (k, v))
            return interval_attention(q, k, v, first, place), 0

        kv = (jnp.swapaxes(x, 1, 2) for x in keys_and_values(latent, shared, up, n))
        return sequence.by_heads(run, (q, *kv), segments, axis)

    def _rotated(self, q, shared, position):
        if self.rope_theta is None:
            return q, shared
        turn = functools.partial(rotate, position=position, theta=self.rope_theta)
        a, b = jnp.split(q, [self.nope_dim], axis=-1)
        return jnp.concatenate([a, turn(b)], axis=-1), turn(shared[:, :, None])[:, :, 0]

    def _attend(self, q, latent, shared, up, tokens, cache):
        """The outputs [B, T, H, v], from the cache, which advances."""
        arrays = q, latent, shared
        (q, latent, shared), tokens, cache, outputs = by_pool_rows(arrays, tokens, cache)
        T = q.shape[1]
        before = tuple(map(cache.rows, ROWS))
        first, place, start = intervals(T, tokens.segments, before)
        q, shared = self._rotated(q, shared, place - first)
        length = cache.rows("length")
        added = jnp.full_like(length, T) if tokens.lengths is None else tokens.lengths
        S = cache.variables["latent"].value.shape[1]
        check_room(length, added, S)
        filled = (jnp.arange(S)[None] < (length + added)[:, None])[:, :, None]

        def advance(name, new):
            x = appended(cache, name, new, length, tokens.real, has_heads=False)
            return jnp.where(filled, x, 0)  # 0 times what lies behind could be NaN

        latent, shared = advance("latent", latent), advance("shared_key", shared)
        cache.set_rows("length", length + added)
        cache.set_rows("start", start)
        attend = attend_to_latents if T == 1 else attend_to_all
        o = attend(q, latent, shared, up, first, place)
        return outputs(nan_unless(length + added <= S, o))

    def _check(self):
        sizes = ("num_heads", "latent_dim", "nope_dim", "rope_dim", "value_dim")
        for name in sizes:
            _arguments.check_size(name, getattr(self, name), 1)
        if self.query_latent_dim is not None:
            hint = "; None is for full rank"
            _arguments.check_size("query_latent_dim", self.query_latent_dim, 1, hint)
        if self.rope_theta is not None:
            checks.check_positive("rope_theta", self.rope_theta)
            if self.rope_dim % 2:
                raise ValueError(f"rope_dim must be even with rope_theta, got {self.rope_dim}")
        checks.check_implementation(self.implementation)

    def _dense(self, features, name, **options):
        return dense(
            _arguments.split_of(self),
            features,
            dtype=self.dtype,
            param_dtype=self.param_dtype,
            kernel_init=self.kernel_init,
            name=name,
            **options,
        )

    def _norm(self, name):
        own = self.implementation if self.implementation in ("reference", "xla") else None
        return RMSNorm(
            self.norm_epsilon,
            param_dtype=self.param_dtype,
            implementation=own,
            mesh_axes=self.mesh_axes,
            name=name,
        )

    def _queries(self, x):
        """[B, T, H, n + r]."""
        features = self.num_heads, self.nope_dim + self.rope_dim
        if self.query_latent_dim is None:
            return self._dense(features, "query")(x)
        z = self._norm("query_norm")(self._dense(self.query_latent_dim, "query_down")(x))
        return self._dense(features, "query_up")(z)

    def _cache(self, latent, shared, slots):
        """The cache, its state by name; None without `decode`."""
        if not self.decode:
            return None
        B, S, _ = latent.shape
        if self.has_variable("cache", "latent"):
            S = self.get_variable("cache", "latent").shape[1]
        entries = dict(
            latent=((B, S, latent.shape[2]), latent.dtype),
            shared_key=((B, S, shared.shape[2]), shared.dtype),
            length=((B,), jnp.int32),
            start=((B,), jnp.int32),
        )
        _arguments.check_cache(self, slots, **entries)
        variables = {
            name: self.variable("cache", name, jnp.zeros, *entry) for name, entry in entries.items()
        }
        return Cache(lambda **state: state, variables, slots)


class Kernel(nn.Module):
    """The parameter `kernel` of a projection [in, out...] by itself; drawn as nn.DenseGeneral's."""

    shape: tuple[int, ...]
    kernel_init: nn.initializers.Initializer
    param_dtype: Dtype

    @nn.compact
    def __call__(self):
        def init(key, shape, dtype):
            flat = shape[0], math.prod(shape[1:])
            return self.kernel_init(key, flat, dtype).reshape(shape)

        return self.param("kernel", init, self.shape, self.param_dtype)


def attend_to_latents(q, latent, shared, up, first, last):
    """`attend_to_all` of one query a row, with the keys' and values' projections taken apart."""
    n = q.shape[3] - shared.shape[2]
    a, b = jnp.split(q[:, 0], [n], axis=-1)
    a = jnp.einsum("bhn,chn->bhc", a, up[:, :, :n])
    product = functools.partial(jnp.einsum, preferred_element_type=f32)
    logits = product("bhc,bsc->bhs", a, latent) + product("bhr,bsr->bhs", b, shared)
    place = jnp.arange(latent.shape[1], dtype=jnp.int32)[None]
    seen = (first <= place) & (place <= last)
    logits = jnp.where(seen[:, None], logits * q.shape[3] ** -0.5, jnp.finfo(f32).min)
    weights = jax.nn.softmax(logits, axis=-1).astype(latent.dtype)
    o = jnp.einsum("bhs,bsc->bhc", weights, latent)
    return jnp.einsum("bhc,chv->bhv", o, up[:, :, n:])[:, None]


def attend_to_all(q, latent, shared, up, first, last):
    """Attention of queries [B, T, H, n + r] to the places `first` to `last`, [B, T] each, of
    latents [B, S, c] and shared keys [B, S, r]; `up` is [c, H, n + v]. Returns [B, T, H, v]."""
    n = q.shape[3] - shared.shape[2]
    k, v = keys_and_values(latent, shared, up, n)
    return interval_attention(q, k, v, first, last)


def keys_and_values(latent, shared, up, n):
    """Keys [B, H, S, n + r] and values [B, H, S, v] of all heads."""
    k, v = jnp.split(jnp.einsum("bsc,chd->bhsd", latent, up), [n], axis=-1)
    shared = jnp.broadcast_to(shared[:, None], (*k.shape[:3], shared.shape[2]))
    return jnp.concatenate([k, shared], axis=-1), v
