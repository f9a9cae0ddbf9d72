"""PaTH attention by chunks; docs/path_attention.md derives the formulas."""

import functools

import jax
import jax.numpy as jnp
from jax import lax

from jla._core import blockwise, pools
from jla._core.cache import LazyPathCache, PathCache, counted, places, without_rest
from jla._core.lengths import chunk_size, is_symbolic_dim
from jla._core.parts import (
    CHUNK,
    NEVER,
    appended,
    at_the_end,
    exactly,
    fits,
    in_groups,
    prepare,
    sums_after,
)
from jla._core.segments import segment_starts
from jla.reference import path_attention as reference
from jla.reference.path_attention import path_token

__all__ = ["path_attention", "path_step", "path_token"]

f32, i32 = jnp.float32, jnp.int32

# Cached tokens that are read at once.
BLOCK = 256


@pools.on_rows()
@functools.partial(jax.jit, static_argnames="scale")
def path_step(q, k, v, w, beta, g, cache, *, scale):
    """One token. See `jla.path_step`."""
    if isinstance(cache, LazyPathCache):
        return reference.path_step(q, k, v, w, beta, g, cache, scale=scale)
    (B, HQ, K), H, dtype = q.shape, k.shape[1], v.dtype
    q, k, w, beta = (x.astype(f32) for x in (q, k, w, beta))
    place = places(cache) - cache.length[:, None]
    before, here = place[..., None] < 0, place[..., None] == 0
    # The values are written in one place; a select would write them all.
    write = jax.vmap(lambda row, place, new: row.at[place].set(new, mode="drop"))
    value = write(cache.value, cache.length, v)
    cache = without_rest(cache)
    overlap = beta[:, None] * jnp.sum(cache.key * w[:, None], axis=-1)
    moved = cache.key - overlap[..., None] * w[:, None]
    key = jnp.where(here[..., None], k[:, None], jnp.where(before[..., None], moved, 0.0))
    decay = None if g is None else jnp.where(before, cache.decay + g[:, None], 0.0)

    with exactly():
        q = q.reshape(B, H, HQ // H, K)
        logits = jnp.einsum("bhgk,bshk->bshg", q, key).reshape(B, -1, HQ)
        if g is not None:
            logits += decay
        p = jax.nn.softmax(jnp.where(before | here, scale * logits, -jnp.inf), axis=1)
        p = p.reshape(B, -1, H, HQ // H)
        # Places behind the last token hold no data, and perhaps NaN; see `without_rest`.
        values = jnp.where((before | here)[..., None], value, 0).astype(f32)
        o = jnp.einsum("bshg,bshv->bhgv", p, values).reshape(B, HQ, -1)
    fits = cache.length < cache.key.shape[1]
    o = jnp.where(fits[:, None, None], o, jnp.nan)
    return o.astype(dtype), PathCache(key, value, decay, counted(cache.length, 1))


@functools.partial(jax.jit, static_argnames=("scale", "logsumexps"))
def path_attention(q, k, v, w, beta, g, cache, segment_ids, *, scale, logsumexps=False):
    """A loop over the chunks of queries, in it one over the keys before. See `jla.path_attention`;
    with `logsumexps` returns o in float32 and the logits' log-sum-exp, [B, T, HQ].

    The outer loop's body is checkpointed: the backward pass keeps the inputs and what `prepare`
    makes of them, and computes one chunk of queries at a time again.
    """
    (B, T, HQ, K), H = q.shape, k.shape[2]
    cache = None if cache is None else without_rest(cache)
    size = chunk_size(T, CHUNK)
    starts = None if segment_ids is None else segment_starts(segment_ids)
    g = None if g is None else jnp.maximum(g, NEVER).reshape(B, T, H, -1)
    gates = None if g is None else scale * g
    if starts is not None:
        gates = jnp.where(starts[:, :, None, None], NEVER, f32(0.0) if g is None else gates)
    gates = None if gates is None else blockwise.split(gates, size)
    # The queries of one key head lie side by side, as if they were one.
    queries = blockwise.split(q.reshape(B, T, H, HQ // H, K).reshape(B, T, H, -1), size)
    values = blockwise.split(v, size)
    k, w, beta = (blockwise.split(x.astype(f32), size) for x in (k, w, beta[..., None]))
    moved, writes, inner = prepare(k, w, beta)

    index = jnp.arange(w.shape[0], dtype=i32)
    after, total = (None, None) if gates is None else sums_after(gates)
    past = index, moved, values, w, writes, after, total
    cached = None if cache is None else _cached(cache, scale)
    chunk = functools.partial(_chunk, scale, past, cached, logsumexps)
    chunk = jax.checkpoint(chunk, prevent_cse=False)
    o = lax.map(chunk, (index, queries, k, values, w, writes, inner, gates))
    if logsumexps:
        o, logsumexp = (blockwise.merge(x, T).reshape(B, T, H, HQ // H, -1) for x in o)
        return o.reshape(B, T, HQ, -1), logsumexp.reshape(B, T, HQ)
    o = blockwise.merge(o, T)
    o = o.reshape(B, T, H, HQ // H, -1).reshape(B, T, HQ, -1)
    if cache is None:
        return o, None
    o = jnp.where(fits(cache, starts, T)[:, :, None, None], o, jnp.nan)
    g = None if g is None else blockwise.split(g, size)
    return o, appended(cache, v, starts, *at_the_end(*in_groups(moved, w, writes, g)))


def _cached(cache, scale):
    """Whether any row has cached tokens; and these in blocks: their keys, their values, and the
    terms to add to their logits, -inf where there is no token."""
    S = cache.key.shape[1]
    size = BLOCK if is_symbolic_dim(S) else min(BLOCK, S)
    key, value = (blockwise.split(x, size) for x in cache[:2])
    place = jnp.arange(key.shape[0] * size, dtype=i32).reshape(-1, 1, 1, size, 1)
    filled = place < cache.length[None, :, None, None, None]
    added = f32(0.0)
    if cache.decay is not None:
        B, S, HQ = cache.decay.shape
        H = key.shape[2]
        added = scale * blockwise.split(cache.decay.reshape(B, S, H, HQ // H), size)
    added = blockwise.transposed(jnp.where(filled, added, -jnp.inf))[..., None, :, :]
    return jnp.any(cache.length > 0), (key, value, added)


def _chunk(scale, past, cached, logsumexps, inputs):
    """The outputs of one chunk of queries, [B, H, C, G V]; with `logsumexps` in float32, and the
    logits' log-sum-exp, [B, H, C, G].

    The rows of a product with the queries are their tokens', G to each. The online softmax keeps
    the largest logit, the sum and the sum of values, all relative to the largest. That one is a
    constant to the derivative, because the result does not depend on it.
    """
    index, q, k, v, w, writes, inner, gates = inputs
    C, K = k.shape[2:]
    group = q.shape[-1] // K
    # Where types carry shardings, no reshape may merge and split at once: there are two.
    q = q.astype(f32).reshape(*k.shape[:3], group, K).reshape(*k.shape[:2], -1, K)
    earlier = jnp.repeat(jnp.tril(jnp.ones((C, C), bool)), group, axis=0)

    def by_query(x):
        """[B, H, C G, D] to [B, H, C, G, D]: the gates are the queries', the keys their group's."""
        return x.reshape(*x.shape[:2], C, group, x.shape[-1])

    def attend(softmax, logits, added, v):
        largest, total, o = softmax
        logits = by_query(logits)
        if added is not None:
            logits += added
        new = jnp.maximum(largest, jnp.max(lax.stop_gradient(logits), axis=-1, keepdims=True))
        p, kept = jnp.exp(logits - new), jnp.exp(largest - new)
        read = by_query(p.reshape(*q.shape[:3], -1) @ v.astype(f32))
        return new, kept * total + jnp.sum(p, axis=-1, keepdims=True), kept * o + read

    # The chunk's own keys.
    with exactly():
        passed = jnp.where(earlier, blockwise.product(q, w), 0.0)
        logits = blockwise.product(q, k) - passed @ inner
        q = scale * (q - passed @ writes)
    logits = jnp.where(earlier, scale * logits, -jnp.inf)
    added = before = None
    if gates is not None:
        # [B, H, r, G, s], with zeros where r <= s; then the sums over r, up to the query's t.
        after = gates[..., None] * jnp.tril(jnp.ones((C, C), f32), -1)[None, None, :, None]
        with exactly():
            upto = jnp.tril(jnp.ones((C, C), f32))
            added = jnp.einsum("tr,bhrgs->bhtgs", upto, after)
            before = jnp.einsum("tr,bhrg->bhtg", upto, gates)[..., None]
    nothing = jnp.full_like(by_query(q)[..., :1], -jnp.inf)
    softmax = attend((nothing, 0.0, 0.0), logits, added, v)

    # The chunks before, from right to left; the queries move along.
    def read(carry, k, v, w, writes, after, total):
        q, before, softmax = carry
        added = None if before is None else before + after
        softmax = attend(softmax, blockwise.product(q, k), added, v)
        with exactly():
            q = q - blockwise.product(q, w) @ writes
        return q, None if before is None else before + total, softmax

    def visit(carry, inputs):
        chunk, *arrays = inputs
        return lax.cond(chunk < index, read, lambda carry, *_: carry, carry, *arrays), None

    (q, before, softmax), _ = lax.scan(visit, (q, before, softmax), past, reverse=True)

    # The cached tokens: their keys are as the first token finds them.
    def visit_cached(softmax, inputs):
        k, v, added = inputs
        if before is not None:
            added = before + added
        return attend(softmax, blockwise.product(q, k), added, v), None

    if cached is not None:
        any_there, blocks = cached
        softmax = lax.cond(
            any_there, lambda x: lax.scan(visit_cached, x, blocks)[0], lambda x: x, softmax
        )
    largest, total, o = softmax
    if logsumexps:
        return tuple(x.reshape(*v.shape[:3], -1) for x in (o / total, largest + jnp.log(total)))
    return (o / total).reshape(*v.shape[:3], -1).astype(v.dtype)
