"""Softmax attention: shared key heads, windows, rotary positions, padding, segments, a cache."""

import functools
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn
from flax.typing import Dtype
from jax import lax

from jla._core import checks, pools, sequence, whole
from jla._core.whole import Names
from jla.linen import _arguments
from jla.linen._projections import by_heads, copies, dense, sum_over_heads
from jla.linen.mixer import Cache, Tokens, arranged
from jla.models.intervals import from_left, interval_attention, intervals, intervals_over

f32 = jnp.float32
_LETTERS = dict(q="B T H K", k="B T HK K", v="B T HK K", segments="B T")


class Attention(nn.Module):
    """Causal softmax attention, the usual yardstick and the other layers of hybrid models.

    For inputs x [B, T, D], `H` query heads and `HK` key heads of `K` features (query head `j` uses
    key head `j // (H // HK)`), with W and b for the projections:

        q, k, v = rotate(W_q x + b_q), rotate(W_k x + b_k), W_v x + b_v
        o_t = sum_s softmax_s(q_t . k_s / sqrt(K)) v_s    over s = t - window + 1, ..., t
        y = W_o o

    Without `window` the sum begins with the row's, or the segment's, first token. `rotate` turns
    features i and i + K/2 of the token at position p by the angle p theta^(-2i/K) (RoPE, arXiv
    2104.09864); positions count a row's real tokens, and begin at 0 in each segment.

    Parameters (all `param_dtype`), as `nn.MultiHeadDotProductAttention` has them:

    ===================  ===========  ====================================================
    query                kernel,bias  [D, H, K], [H, K]; the biases with `use_bias`
    key, value           kernel,bias  [D, HK, K], [HK, K]
    out                  kernel       [H, K, D]
    ===================  ===========  ====================================================

    Arguments, result, errors, masks and segments are as in all layers, see docs/layers.md. The
    logits and their softmax are float32. On a GPU, in 16 bits and without a window or segments,
    cuDNN's kernel serves all but the decoding of single tokens; elsewhere it is XLA's.

    The cache holds `cached_key` and `cached_value` [B, HK, S, K], and `length` and `start` [B]
    (int32): of each row the number of tokens and the place where the last segment began. S is the
    T of `init`'s inputs. Tokens arrive in any number of calls; padding takes no room. Tokens that
    do not fit raise ValueError outside of jit; inside, their row's outputs are NaN.

    Example:
      x = jnp.ones((2, 8, 64))  # [B, T, D]
      layer = jla.models.Attention(num_heads=4, num_key_heads=2, window=5)
      variables = layer.init(jax.random.key(0), x)
      y = layer.apply(variables, x)  # [2, 8, 64]

    Attributes:
      num_heads: H.
      num_key_heads: HK, of which num_heads is a multiple; num_heads if None.
      key_dim: K; D // num_heads if None.
      use_bias: whether query, key and value have biases.
      window: how many tokens each sees, itself included; None for all.
      rope_theta: the base of the rotary angles; None for no rotation.
      dtype, param_dtype, kernel_init: as of the layers of `jla.linen`.
      decode: whether to keep and use a cache.
      axis_name, mesh_axes: of a mesh, as in the layers of `jla.linen`; see docs/scale.md. Where
        the devices of time divide the (device's) query and key heads, they exchange heads for time,
        and otherwise keys and values move from device to device, which read them by XLA.
    """

    num_heads: int
    num_key_heads: int | None = None
    key_dim: int | None = None
    use_bias: bool = False
    window: int | None = None
    rope_theta: float | None = 10000.0
    dtype: Dtype | None = None
    param_dtype: Dtype = f32
    kernel_init: nn.initializers.Initializer = nn.linear.default_kernel_init
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
        """Applies the layer; arguments, result and errors as of all layers, see docs/layers.md."""
        _, D = _arguments.check_inputs(self, inputs, mask, segment_ids)
        H, HK, K = self._sizes(D)
        _arguments.check_slots(self, slots, inputs, mask, segment_ids)
        split = _arguments.split_of(self)
        _arguments.refuse_over_devices(self, mask)
        tokens = tokens_of(self, inputs, mask, segment_ids, slots)
        project_to = functools.partial(
            dense,
            split,
            dtype=self.dtype,
            param_dtype=self.param_dtype,
            kernel_init=self.kernel_init,
        )
        once = copies(tokens.x, split)

        def project(heads, name):
            options: dict[str, Any] = dict(use_bias=self.use_bias, name=name)
            if once is None or heads % once.shape[0]:
                return project_to((heads, K), **options)(tokens.x)
            return project_to((heads, K), dot_general_cls=by_heads, **options)(once)[0]

        q, k, v = project(H, "query"), project(HK, "key"), project(HK, "value")
        cache = self._cache(v, tokens.slots) if self.decode else None
        if self.is_initializing():
            o = jnp.zeros_like(q)
        elif cache is not None:
            o = self._attend(q, k, v, tokens, cache)
        else:
            run = functools.partial(self._attend_over, axis=_arguments.split_over(self))
            o = over_mesh(run, split, _LETTERS, "B T H K", q=q, k=k, v=v, segments=tokens.segments)
        out = project_to(D, axis=(-2, -1), dot_general_cls=sum_over_heads, name="out")
        return tokens.restore(out(o))

    def _sizes(self, D):
        H, HK, K = self.num_heads, self.num_key_heads, self.key_dim
        _arguments.check_size("num_heads", H, 1)
        HK = H if HK is None else HK
        _arguments.check_size("num_key_heads", HK, 1)
        checks.check_multiple("num_heads", H, "num_key_heads", HK)
        if K is None:
            checks.check_multiple("the inputs' last axis", D, "num_heads", H)
            K = D // H
        _arguments.check_size("key_dim", K, 1)
        if self.window is not None:
            _arguments.check_size("window", self.window, 1, "; None is for all tokens")
        if self.rope_theta is not None:
            checks.check_positive("rope_theta", self.rope_theta)
            if K % 2:
                raise ValueError(
                    f"key_dim must be even for a rotation of pairs of features, got {K}; "
                    "rope_theta=None is for no rotation"
                )
        return H, HK, K

    def _cache(self, v, slots):
        """The cache for these values, with room for as many tokens in `init`."""
        B, S, HK, K = v.shape
        if self.has_variable("cache", "cached_key"):
            S = self.get_variable("cache", "cached_key").shape[2]
        # Heads before tokens: what one query reads of a head lies in one piece.
        tokens, rows = ((B, HK, S, K), v.dtype), ((B,), jnp.int32)
        entries = dict(cached_key=tokens, cached_value=tokens, length=rows, start=rows)
        _arguments.check_cache(self, slots, **entries)
        variables = {
            name: self.variable("cache", name, jnp.zeros, *entry) for name, entry in entries.items()
        }
        return Cache(lambda **state: state, variables, slots)

    def _attend_over(self, q, k, v, segments=None, *, axis):
        """The outputs [B, T, H, K] without a cache; `axis` splits time, or is None."""
        first, place, _ = intervals_over(q, segments, axis)
        q, k = self._rotated(q, k, place - first)
        if axis is None:
            return self._attend_whole(q, k, v, first, place, segments)
        size = lax.axis_size(axis)
        if q.shape[2] % size == 0 and k.shape[2] % size == 0:

            def run(q, k, v, _, segments):
                first, place, _ = intervals(q.shape[1], segments, None)
                return self._attend_whole(q, k, v, first, place, segments), None

            return sequence.by_heads(run, (q, k, v), segments, axis)
        if self.window is not None:
            first = jnp.maximum(first, place - (self.window - 1))
        kv = jnp.swapaxes(k, 1, 2), jnp.swapaxes(v, 1, 2)
        return from_left(q, kv, (), lambda kv, _: kv, first, place, axis, self.window)

    def _attend_whole(self, q, k, v, first, place, segments):
        if self.window is None and segments is None:
            return causal_attention(q, k, v)
        if self.window is not None:
            first = jnp.maximum(first, place - (self.window - 1))
        k, v = (jnp.swapaxes(x, 1, 2) for x in (k, v))
        return interval_attention(q, k, v, first, place)

    def _rotated(self, q, k, position):
        if self.rope_theta is None:
            return q, k
        return (rotate(x, position, self.rope_theta) for x in (q, k))

    def _attend(self, q, k, v, tokens, cache):
        """The outputs [B, T, H, K], from the cache, which advances."""
        (q, k, v), tokens, cache, outputs = by_pool_rows((q, k, v), tokens, cache)
        T = q.shape[1]
        before = cache.rows("length"), cache.rows("start")
        first, place, start = intervals(T, tokens.segments, before)
        q, k = self._rotated(q, k, place - first)
        if self.window is not None:
            first = jnp.maximum(first, place - (self.window - 1))
        is_plain = self.window is None and tokens.segments is None
        length = cache.rows("length")
        added = jnp.full_like(length, T) if tokens.lengths is None else tokens.lengths
        S = cache.variables["cached_key"].value.shape[2]
        check_room(length, added, S)
        keys, values = (
            appended(cache, name, new, length, tokens.real)
            for name, new in (("cached_key", k), ("cached_value", v))
        )
        cache.set_rows("length", length + added)
        cache.set_rows("start", start)
        fits = length + added <= S

        def from_cache():
            o = attention_to_cache(q, keys, values, length + added, first, place)
            return nan_unless(fits, o)

        if T == 1 or not is_plain or not cudnn_serves(q):
            return outputs(from_cache())
        # With cuDNN's kernel inside of the condition, or heads in its result, XLA transposes q, k,
        # v and o. Calls that go on from a cache drop `begun`, a small part of their work.
        begun = causal_attention(q, k, v)
        o = lax.cond(
            jnp.all(length == 0),
            lambda: nan_unless(fits, begun).reshape(*q.shape[:2], -1),
            lambda: from_cache().reshape(*q.shape[:2], -1),
        )
        return o.reshape(q.shape)


def tokens_of(layer, inputs, mask, segment_ids, slots):
    """The layer's tokens; over devices the segments are the ids themselves, see `Tokens`."""
    if _arguments.split_over(layer) is None:
        return arranged(inputs, mask, segment_ids, slots)
    return Tokens(jnp.asarray(inputs), None, None, segment_ids, lambda y: y)


def by_pool_rows(arrays, tokens, cache):
    """A token each of B rows as one of all R rows of the pool, so that attention reads the pool as
    it lies: XLA gathers rows inside of the sums that read them, eight times slower.

    Rows that no slot names get zeros, and keep their cache. Of less than a third of the pool a
    gathered copy would be cheaper, and several tokens are worth one: these stay as they are.

    Args:
      arrays: [B, 1, ...] each.
      tokens, cache: the layer's `Tokens` and `Cache`.

    Returns:
      The same three for R rows, and what takes the rows' outputs [R, ...] to [B, ...].
    """
    slots = cache.slots
    B, R = arrays[0].shape[0], cache.variables["length"].value.shape[0]
    if slots is None or arrays[0].shape[1] > 1 or tokens.segments is not None or R > 3 * B:
        return arrays, tokens, cache, lambda o: o
    spread = [pools.put(jnp.zeros((R, *x.shape[1:]), x.dtype), x, slots) for x in arrays]
    lengths = pools.put(jnp.zeros(R, jnp.int32), jnp.ones(B, jnp.int32), slots)
    tokens = tokens._replace(real=lengths[:, None] > 0, lengths=lengths)
    return spread, tokens, cache._replace(slots=None), lambda o: pools.read(o, slots)


def over_mesh(run, split, letters, results, **arrays):
    """`run(**arrays)` of those that are given, in a shard_map if there is a `split`."""
    arrays = {name: x for name, x in arrays.items() if x is not None}
    if split is None:
        return run(**arrays)
    return whole.call(run, arrays, letters, results, split, ("HK",))


def cudnn_serves(q):
    """Whether cuDNN has the causal attention of such queries [B, T, H, K]."""
    K = q.shape[-1]
    return jax.default_backend() == "gpu" and q.dtype.itemsize == 2 and K % 8 == 0 and K <= 128


def causal_attention(q, k, v):
    """Attention of all to their past, by cuDNN, or by XLA, which makes the square of logits."""
    implementation = "cudnn" if cudnn_serves(q) else "xla"
    with jax.numpy_dtype_promotion("standard"):  # which JAX's function relies on in 16 bits
        return jax.nn.dot_product_attention(q, k, v, is_causal=True, implementation=implementation)


def attention_to_cache(q, keys, values, length, first, last):
    """`interval_attention` to a cache, of which each row has the first `length` [B] in use.

    For one query, where every head has keys of its own, the products are written as sums, in
    float32: XLA then reads keys and values once, as they lie, where matrix products with a single
    row would have them copied or leave most of a GPU idle.
    """
    filled = jnp.arange(keys.shape[2], dtype=jnp.int32)[None] < length[:, None]
    # 0 times what lies behind could be NaN.
    values = jnp.where(filled[:, None, :, None], values, 0)
    if q.shape[1] > 1 or q.shape[2] != keys.shape[1]:
        return interval_attention(q, keys, values, first, last)
    query = q[:, 0, :, None].astype(f32) * q.shape[-1] ** -0.5
    logits = jnp.sum(query * keys.astype(f32), axis=-1)
    place = jnp.arange(keys.shape[2], dtype=jnp.int32)[None]
    seen = (first <= place) & (place <= last)
    weights = jax.nn.softmax(jnp.where(seen[:, None], logits, -jnp.inf), axis=-1)
    return jnp.sum(weights[..., None] * values.astype(f32), axis=2)[:, None].astype(q.dtype)


def rotate(x, position, theta):
    """Rotary position embedding (arXiv 2104.09864) of x [B, T, H, K] at positions [B, T] or
    [1, T]."""
    half = x.shape[-1] // 2
    rates = theta ** (-jnp.arange(half, dtype=f32) / half)
    angle = position.astype(f32)[..., None] * rates[None, None]
    sin, cos = jnp.sin(angle)[:, :, None], jnp.cos(angle)[:, :, None]
    a, b = jnp.split(x.astype(f32), 2, axis=-1)
    return jnp.concatenate([a * cos - b * sin, b * cos + a * sin], axis=-1).astype(x.dtype)


def appended(cache, name, new, length, real, *, has_heads=True):
    """The call's rows of a variable of a cache, which gets these tokens; see `append`.

    Args:
      has_heads: whether the variable is [B, HK, S, K] and new [B, T, HK, K]; without there is no
        HK.
    """
    x, slots = cache.variables[name].value, cache.slots
    if has_heads:
        x = append(x, new, length, real, slots)
    else:
        x = append(x[:, None], new[:, :, None], length, real, slots)[:, 0]
    cache.variables[name].value = x
    return x if slots is None else pools.read(x, slots)


def append(cached, new, length, real, slots=None):
    """The cache [B, HK, S, K] with new tokens [B, T, HK, K] behind each row's first `length`.

    With `real`, bool [B, T] or None for all, only those are written. What finds no room is lost.
    With `slots`, int32 [B], the cache is a pool and these are its rows.
    """
    T, new = new.shape[1], jnp.swapaxes(new, 1, 2)
    if slots is not None:
        place = length[:, None] + jnp.arange(T, dtype=jnp.int32)[None]
        if real is not None:
            place = jnp.where(real, place, cached.shape[2])
        head = jnp.arange(new.shape[1], dtype=jnp.int32)[None, :, None]
        row = pools.rows(slots, cached.shape[0])[:, None, None]
        return cached.at[row, head, place[:, None]].set(new, mode="drop")
    if real is None:
        if len(length) == 1:  # a batch's write is a scatter, for which XLA checks bounds by kernels
            return lax.dynamic_update_slice_in_dim(cached, new, length[0], axis=2)
        return jax.vmap(functools.partial(lax.dynamic_update_slice_in_dim, axis=1))(
            cached, new, length
        )
    place = length[:, None] + jnp.arange(T, dtype=jnp.int32)[None]
    place = jnp.where(real, place, cached.shape[2])

    def write(cached, new, place):
        return cached.at[place].set(new, mode="drop")

    # Places for each head: on a GPU, XLA would transpose the whole cache for a write across heads.
    place = jnp.broadcast_to(place[:, None], new.shape[:3])
    return jax.vmap(jax.vmap(write))(cached, new, place)


def check_room(length, added, capacity):
    """Raises ValueError if rows of a cache are known to get more tokens than they have room for."""
    if not (checks.known(length) and checks.known(added)):
        return
    length, added = np.asarray(length), np.asarray(added)
    row = int(np.argmax(length + added))
    if length[row] + added[row] > capacity:
        raise ValueError(
            f"the cache has room for {capacity} tokens, but row {row} has {length[row]} in it and "
            f"gets {added[row]} more; the length of init's input sets the room"
        )


# Jitted, so that the NaN itself is no result: `jax_debug_nans` would stop there.
@jax.jit
def nan_unless(fits, o):
    """o [B, ...] in the rows that fit, bool [B], and NaN in the others."""
    return jnp.where(fits.reshape(-1, *[1] * (o.ndim - 1)), o, jnp.nan)
