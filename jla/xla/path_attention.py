"""PaTH attention by chunks; docs/path_attention.md derives the formulas."""

import functools

import jax
import jax.numpy as jnp
from jax import lax

from jla._cache import PathCache
from jla._segments import segment_starts
from jla._state import zero_state
from jla.xla import chunks

__all__ = ["path_attention", "path_step"]

f32 = jnp.float32
# For what moves queries and keys: a product of hundreds of maps keeps every rounding.
_exactly = functools.partial(jax.default_matmul_precision, "highest")

# Tokens in a chunk: queries are moved past so many keys at once.
CHUNK = 64
# Cached tokens that are read at once.
BLOCK = 256


@functools.partial(jax.jit, static_argnames="scale")
def path_step(q, k, v, w, beta, g, cache, *, scale):
    """One token. See `jla.path_step`."""
    (B, HQ, K), H, dtype = q.shape, k.shape[1], v.dtype
    q, k, w, beta = (x.astype(f32) for x in (q, k, w, beta))
    place = jnp.arange(cache.key.shape[1]) - cache.length[:, None]
    before, here = place[..., None] < 0, place[..., None] == 0
    overlap = beta[:, None] * jnp.sum(cache.key * w[:, None], axis=-1)
    moved = cache.key - overlap[..., None] * w[:, None]
    key = jnp.where(here[..., None], k[:, None], jnp.where(before[..., None], moved, 0.0))
    # The values are written in one place; a select would write them all.
    value = cache.value.at[jnp.arange(B), cache.length].set(v, mode="drop")
    decay = None if g is None else jnp.where(before, cache.decay + g[:, None], 0.0)

    with _exactly():
        q = q.reshape(B, H, HQ // H, K)
        logits = jnp.einsum("bhgk,bshk->bshg", q, key).reshape(B, -1, HQ)
        if g is not None:
            logits += decay
        p = jax.nn.softmax(jnp.where(before | here, scale * logits, -jnp.inf), axis=1)
        p = p.reshape(B, -1, H, HQ // H)
        o = jnp.einsum("bshg,bshv->bhgv", p, value.astype(f32)).reshape(B, HQ, -1)
    fits = cache.length < cache.key.shape[1]
    o = jnp.where(fits[:, None, None], o, jnp.nan)
    return o.astype(dtype), PathCache(key, value, decay, cache.length + 1)


@functools.partial(jax.jit, static_argnames="scale")
def path_attention(q, k, v, w, beta, g, cache, segment_ids, *, scale):
    """A loop over the chunks of queries, in it one over the keys before. See `jla.path_attention`.

    The outer loop's body is checkpointed: the backward pass keeps the inputs and what `_prepare`
    makes of them, and computes one chunk of queries at a time again.
    """
    (B, T, HQ, K), H = q.shape, k.shape[2]
    size = min(CHUNK, max(2, 1 << (T - 1).bit_length()))
    starts = None if segment_ids is None else segment_starts(segment_ids)
    gates = None if g is None else scale * g.reshape(B, T, H, -1)
    if starts is not None:
        gates = jnp.where(starts[:, :, None, None], -jnp.inf, 0.0 if gates is None else gates)
    gates = None if gates is None else chunks.split(gates, size)
    # The queries of one key head lie side by side, as if they were one.
    queries = chunks.split(q.reshape(B, T, H, HQ // H, K).reshape(B, T, H, -1), size)
    values = chunks.split(v, size)
    k, w, moved, writes, inner = _prepare(size, k, w, beta)

    index = jnp.arange(len(w))
    past = index, moved, values, w, writes, *_after(gates)
    cached = None if cache is None else _cached(cache, scale)
    chunk = functools.partial(_chunk, scale, past, cached)
    o = lax.map(jax.checkpoint(chunk), (index, queries, k, values, w, writes, inner, gates))
    o = chunks.merge(o, T)
    o = o.reshape(B, T, H, HQ // H, -1).reshape(B, T, HQ, -1)
    if cache is None:
        return o, None
    if starts is None:
        starts = jnp.zeros((B, T), bool)
    o = jnp.where(_fits(cache, starts)[:, :, None, None], o, jnp.nan)
    keys, last = _at_the_end(moved, w, writes)
    return o, _appended(cache, last, chunks.merge(keys, T), v, g, starts)


def _prepare(size, k, w, beta):
    """What the chunks' keys and maps are, whatever the queries; float32, [N, B, H, C, ...].

    Returns:
      k and w, so cut.
      moved: the keys as the chunk's end sees them.
      writes: W'; the whole chunk's map is I - W^T W'.
      inner: [..., C, C], what one key's later maps take from its products inside the chunk.
    """
    length = size * -(-k.shape[1] // size)
    k, w, beta = (chunks.split(x.astype(f32), length)[0] for x in (k, w, beta[..., None]))
    with _exactly():
        levels = []
        for s in chunks.tree_sizes(size):
            earlier, later = chunks.halves(w, s)
            strength = chunks.halves(beta, s)[1]
            levels.append(strength * chunks.pair_products(later, earlier))
        k, w, beta = (chunks.blocks(x, size) for x in (k, w, beta))
        triangle = chunks.unit_lower_inverse(levels) * chunks.transposed(beta)
        writes = triangle @ w
        inner = triangle @ jnp.tril(chunks.pair_products(w, k), -1)
        moved = k - chunks.transposed(inner) @ w
    return tuple(jnp.moveaxis(x, 2, 0) for x in (k, w, moved, writes, inner))


def _after(gates):
    """Sums of the gates [N, B, H, C, G]: after each token to its chunk's end, [N, B, H, 1, G, C],
    and of all the chunk's, [N, B, H, 1, G, 1].

    Every sum of gates here is of those alone that it stands for: a difference of two longer sums
    would keep no digit beside a strong gate, and none at all beside a border's -inf.
    """
    if gates is None:
        return None, None
    sums = lax.cumsum(gates, axis=3, reverse=True)
    total, after = sums[..., :1, :], jnp.pad(sums[..., 1:, :], [(0, 0)] * 3 + [(0, 1), (0, 0)])
    return tuple(chunks.transposed(x)[..., None, :, :] for x in (after, total))


def _cached(cache, scale):
    """The cached tokens in blocks: keys, values, and what is added to their logits, -inf where
    there is none; and whether the block has any, in any row."""
    size = min(BLOCK, cache.key.shape[1])
    key, value = (chunks.split(x, size) for x in cache[:2])
    place = jnp.arange(len(key) * size).reshape(-1, 1, 1, size, 1)
    filled = place < cache.length[:, None, None, None]
    added = 0.0
    if cache.decay is not None:
        B, S, HQ = cache.decay.shape
        H = key.shape[2]
        added = scale * chunks.split(cache.decay.reshape(B, S, H, HQ // H), size)
    added = chunks.transposed(jnp.where(filled, added, -jnp.inf))[..., None, :, :]
    return jnp.any(filled, axis=(1, 2, 3, 4)), key, value, added


def _chunk(scale, past, cached, inputs):
    """The outputs of one chunk of queries, [B, H, C, G V].

    The rows of a product with the queries are their tokens', G to each. The online softmax keeps
    the largest logit, the sum and the sum of values, all relative to the largest: a constant to the
    derivative, for the outcome does not depend on it.
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
    with _exactly():
        passed = jnp.where(earlier, chunks.product(q, w), 0.0)
        logits = chunks.product(q, k) - passed @ inner
        q = scale * (q - passed @ writes)
    logits = jnp.where(earlier, scale * logits, -jnp.inf)
    added = before = None
    if gates is not None:
        later = jnp.arange(C)[:, None, None] > jnp.arange(C)
        added = lax.cumsum(jnp.where(later, gates[..., None], 0.0), axis=2)
        before = lax.cumsum(gates, axis=2)[..., None]
    nothing = jnp.full_like(by_query(q)[..., :1], -jnp.inf)
    softmax = attend((nothing, 0.0, 0.0), logits, added, v)

    # The chunks before, from right to left; the queries move along.
    def read(carry, k, v, w, writes, after, total):
        q, before, softmax = carry
        added = None if before is None else before + after
        softmax = attend(softmax, chunks.product(q, k), added, v)
        with _exactly():
            q = q - chunks.product(q, w) @ writes
        return q, None if before is None else before + total, softmax

    def visit(carry, inputs):
        chunk, *arrays = inputs
        return lax.cond(chunk < index, read, lambda carry, *_: carry, carry, *arrays), None

    (q, before, softmax), _ = lax.scan(visit, (q, before, softmax), past, reverse=True)

    # The cached tokens: their keys are as the first token finds them.
    def read_cached(softmax, k, v, added):
        if before is not None:
            added = before + added
        return attend(softmax, chunks.product(q, k), added, v)

    def visit_cached(softmax, inputs):
        any_there, *arrays = inputs
        return lax.cond(any_there, read_cached, lambda x, *_: x, softmax, *arrays), None

    if cached is not None:
        softmax, _ = lax.scan(visit_cached, softmax, cached)
    _, total, o = softmax
    return (o / total).reshape(*v.shape[:3], -1).astype(v.dtype)


def _at_the_end(moved, w, writes):
    """The keys as the row's last token sees them, [N, B, H, C, K], and all its maps as one,
    [B, H, K, K]."""
    first = (w[0, :, :, 0],) * 2
    start = zero_state(*first) + jnp.eye(w.shape[-1])

    @_exactly()
    def chunk(later, inputs):
        moved, w, writes = inputs
        return later - chunks.product(later, w) @ writes, chunks.product(moved, later)

    later, keys = lax.scan(chunk, start, (moved, w, writes), reverse=True)
    return keys, later


def _fits(cache, starts):
    """Whether each token finds room, bool [B, T]."""
    place = jnp.arange(starts.shape[1])
    first = jnp.where(starts, place, -cache.length[:, None])
    return place - lax.cummax(first, axis=1) < cache.key.shape[1]


def _appended(cache, last, keys, v, g, starts):
    """The cache after the tokens: those of each row's last segment, from its first place on."""
    (B, T), S = starts.shape, cache.key.shape[1]
    border = jnp.max(jnp.where(starts, jnp.arange(T), 0), axis=1)
    kept = jnp.where(jnp.any(starts, axis=1), 0, cache.length)
    length = kept + T - border
    # Places in the old cache, followed by the new tokens.
    place = jnp.arange(S)
    source = jnp.where(place < kept[:, None], place, S + place + (border - kept)[:, None])
    source = jnp.where(place < length[:, None], source, S + T)

    def place_tokens(old, new):
        x = jnp.concatenate([old, new], axis=1)
        index = source.reshape(B, S, *[1] * (x.ndim - 2))
        return jnp.take_along_axis(x, index, axis=1, mode="fill", fill_value=0)

    with _exactly():
        old = jnp.einsum("bshk,bhlk->bshl", cache.key, last)
    decay = None
    if g is not None:
        sums = lax.cumsum(g, axis=1, reverse=True)
        after = jnp.pad(sums[:, 1:], [(0, 0), (0, 1), (0, 0)])
        decay = place_tokens(cache.decay + sums[:, :1], after)
    return PathCache(place_tokens(old, keys), place_tokens(cache.value, v), decay, length)
