"""PaTH attention, token by token: the definition that everything else is tested against."""

import functools
import math

import jax
import jax.numpy as jnp
from jax import lax

from jla._core import pools
from jla._core.cache import (
    LazyPathCache,
    PathCache,
    counted,
    first_recent,
    places,
    with_rows,
    without_rest,
)
from jla._core.lengths import is_symbolic_dim
from jla._core.parts import l2norm
from jla._core.path_lazy import after_token, folded
from jla._core.segments import segment_starts
from jla._core.states import repeated, with_rank

f32 = jnp.float32
_einsum = functools.partial(jnp.einsum, precision=lax.Precision.HIGHEST)


@pools.on_rows()
@functools.partial(jax.jit, static_argnames=("scale", "logsumexps"))
def path_step(q, k, v, w, beta, g, cache, *, scale, logsumexps=False):
    """One token. See `jla.path_step`; with `logsumexps` the first result is o in float32 and the
    logits' log-sum-exp, [B, HQ]."""
    if isinstance(cache, LazyPathCache):
        return _lazy_step(q, k, v, w, beta, g, cache, scale=scale)
    group = q.shape[1] // k.shape[1]
    dtype = v.dtype
    q, k, w, beta = (x.astype(f32)[:, None] for x in (q, k, w, beta))
    cache = without_rest(cache)
    place = places(cache) - cache.length[:, None]
    before, here = place[..., None] < 0, place[..., None] == 0

    # P_t times every key; then the new one.
    overlap = jnp.sum(cache.key * w, axis=-1)
    moved = cache.key - (beta * overlap)[..., None] * w
    key = jnp.where(here[..., None], k, jnp.where(before[..., None], moved, 0.0))
    value = jnp.where(here[..., None], v[:, None], cache.value)
    decay = None if g is None else jnp.where(before, cache.decay + g[:, None], 0.0)

    keys, values = (repeated(x.astype(f32), group, axis=2) for x in (key, value))
    logits = _einsum("bhk,bshk->bsh", q[:, 0], keys)
    if g is not None:
        logits += decay
    logits = jnp.where(before | here, scale * logits, -jnp.inf)
    p = jax.nn.softmax(logits, axis=1)
    o = _einsum("bsh,bshv->bhv", p, values)
    fits = cache.length < cache.key.shape[1]
    o = jnp.where(fits[:, None, None], o, jnp.nan)
    o = (o, jax.nn.logsumexp(logits, axis=1)) if logsumexps else o.astype(dtype)
    return o, PathCache(key, value, decay, counted(cache.length, 1))


def _lazy_step(q, k, v, w, beta, g, cache, *, scale):
    """One token from a `LazyPathCache`, whose formulas these are."""
    (B, HQ, K), H, S, dtype = q.shape, k.shape[1], cache.key.shape[1], v.dtype
    q, k, w, beta = (x.astype(f32) for x in (q, k, w, beta))
    first = first_recent(cache.length, S)
    recent, change, back = after_token(cache.recent, cache.change, cache.length, S, q, k, w, beta)
    # A query for the settled keys, and one for the others.
    back, q = (x.reshape(B, H, HQ // H, K) for x in (back, q))
    place = places(cache)
    here, before = (
        x[..., None] for x in (place == cache.length[:, None], place < cache.length[:, None])
    )
    is_settled = (place < first[:, None])[..., None, None]
    settled = jnp.where(is_settled, cache.key.astype(f32), 0.0)
    others = with_rows(jnp.zeros_like(settled), recent, first)
    logits = _einsum("bhgk,bshk->bshg", back, settled) + jnp.where(
        is_settled, 0.0, _einsum("bhgk,bshk->bshg", q, others)
    )
    logits = logits.reshape(B, S, HQ)
    decay = None
    if g is not None:
        decay = jnp.where(before, cache.decay + g[:, None], 0.0)
        logits += decay
    p = jax.nn.softmax(jnp.where(before | here, scale * logits, -jnp.inf), axis=1)
    value = jnp.where(here[..., None], v[:, None], cache.value)
    values = jnp.where((before | here)[..., None], value, 0).astype(f32)
    o = _einsum("bshg,bshv->bhgv", p.reshape(B, S, H, -1), values).reshape(B, HQ, -1)
    o = jnp.where((cache.length < S)[:, None, None], o, jnp.nan)
    length = counted(cache.length, 1)
    cache = LazyPathCache(cache.key, value, decay, length, recent, change)
    return o.astype(dtype), folded(cache)


@functools.partial(jax.jit, static_argnames=("scale", "logsumexps"))
def path_attention(q, k, v, w, beta, g, cache, segment_ids, *, scale, logsumexps=False):
    """`lax.scan` over the tokens. See `jla.path_attention`; with `logsumexps` returns o in float32
    and the logits' log-sum-exp, [B, T, HQ]."""
    T = q.shape[1]
    if segment_ids is None:
        starts = jnp.zeros(q.shape[:2], bool)
    else:
        starts = segment_starts(segment_ids)
    state = _empty(k, v, g, starts) if cache is None else cache

    def token(cache, inputs):
        *arrays, start = inputs
        length = jnp.where(start, 0, cache.length)
        cache = cache._replace(length=length)
        o, cache = path_step(*arrays, cache, scale=scale, logsumexps=logsumexps)
        return cache, o

    def tokens(cache, inputs):
        return lax.scan(jax.checkpoint(token, prevent_cse=False), cache, inputs)

    # Runs of about sqrt(T) tokens: without them the gradient would keep all the keys T times.
    # A symbolic T has no such divisors; then it does.
    n = 1
    if not is_symbolic_dim(T):
        n = next(n for n in range(math.isqrt(T), 0, -1) if T % n == 0)

    def runs(x):
        return jnp.moveaxis(x, 1, 0).reshape(T // n, n, *x.shape[:1], *x.shape[2:])

    inputs = jax.tree.map(runs, (q, k, v, w, beta, g, starts))
    state, o = lax.scan(jax.checkpoint(tokens, prevent_cse=False), state, inputs)
    o = jax.tree.map(lambda x: jnp.moveaxis(x.reshape(T, *x.shape[2:]), 0, 1), o)
    if logsumexps:
        return o
    return o, None if cache is None else state


def _empty(k, v, g, starts):
    """A cache for T tokens. A select of k's places it as k is: a scan insists on that."""
    key, value, decay = (
        None if x is None else jnp.where(False, lax.stop_gradient(x), 0).astype(dtype)
        for x, dtype in ((k, f32), (v, v.dtype), (g, f32))
    )
    return PathCache(key, value, decay, jnp.zeros_like(starts[:, 0], jnp.int32))


def path_token(q, k, v, w, b, b_bias, cache, *, scale):
    """See `jla._token.path_token`."""
    w = l2norm(w.astype(f32))
    beta = 2.0 * jax.nn.sigmoid(b.astype(f32) + with_rank(b_bias, b.ndim))
    return path_step(q, k, v, w, beta, None, cache, scale=scale)
