"""Going on from cached tokens, and filling the cache: around the kernels, in XLA.

Both need the new tokens' maps as products over the whole row, and in float32: the cached keys are
multiplied on for as long as the row lives. It is what `jla.xla` does, with its functions; but
shard by shard, as a kernel, for on several GPUs XLA gathers what the branches of a `cond` take.
"""

import contextlib
import functools

import jax
import jax.numpy as jnp
from jax import lax

from jla._core import blockwise
from jla._core.axes import PATH
from jla._core.cache import PathCache, without_rest
from jla._core.lengths import chunk_size
from jla._core.parts import (
    CHUNK,
    NEVER,
    appended,
    at_the_end,
    exactly,
    fits,
    in_groups,
    prepare,
    ungrouped,
)
from jla._core.segments import segment_starts
from jla._core.shardwise import defvjp, shardwise
from jla._core.states import repeated, zero_state
from jla._core.sums import running_sum

f32 = jnp.float32

# Queries, and cached tokens that they read at once.
QUERIES, KEYS = 512, 256

# Of arguments, outputs and the cache's arrays, by their names.
_AXES = {name.removeprefix("cache."): axes for name, axes in PATH.items()} | {"logsumexp": "B T HQ"}


def carried_on(o, logsumexp, q, k, v, w, beta, g, cache, segment_ids, *, scale):
    """What the new tokens read, the cached ones included, and the cache with them appended.

    Args:
      o, logsumexp: what the new tokens read of one another, [B, T, HQ, V], and the log of the sum
        of their logits' exponentials, [B, T, HQ] float32.
      q, k, v, w, beta, g, cache, segment_ids, scale: of `jla.path_attention`.

    Returns:
      o, float32, and the new `PathCache`.
    """
    floats = dict(o=o, logsumexp=logsumexp, q=q, k=k, v=v, w=w, beta=beta, g=g)
    floats |= dict(key=cache.key, value=cache.value, decay=cache.decay)
    integers = dict(length=cache.length, segment_ids=segment_ids)
    floats, integers = (
        {name: x for name, x in given.items() if x is not None} for given in (floats, integers)
    )
    o, key, value, *decay, length = _carried_on(floats, integers, scale)
    return o, PathCache(key, value, decay[0] if decay else None, length)


@functools.partial(jax.custom_vjp, nondiff_argnums=(2,))
def _carried_on(floats, integers, scale):
    """o and the new cache's arrays, from the arrays there are."""
    names = *floats, *integers

    def run(*arrays):
        return _of_shard(**dict(zip(names, arrays, strict=True)), scale=scale)

    operands = tuple(_AXES[name] for name in names)
    results = (*_float_results(floats), _AXES["length"])
    return shardwise(run, operands, results)(*floats.values(), *integers.values())


def _carried_on_forward(floats, integers, scale):
    return _carried_on(floats, integers, scale), (floats, integers)


def _carried_on_backward(scale, given, cotangents):
    floats, integers = given
    names = *floats, *integers

    def run(*arrays):
        inputs, cotangents = arrays[: len(names)], arrays[len(names) :]
        inputs = dict(zip(names, inputs, strict=True))

        def outputs(floats):
            return _of_shard(**(inputs | floats), scale=scale)[:-1]

        _, pull = jax.vjp(outputs, {name: inputs[name] for name in floats})
        return tuple(pull(cotangents)[0][name] for name in floats)

    results = tuple(_AXES[name] for name in floats)
    operands = (*(_AXES[name] for name in names), *_float_results(floats))
    arrays = *floats.values(), *integers.values(), *cotangents[:-1]
    gradients = shardwise(run, operands, results)(*arrays)
    return dict(zip(floats, gradients, strict=True)), None


defvjp(_carried_on, _carried_on_forward, _carried_on_backward)


def _float_results(floats):
    return tuple(_AXES[name] for name in ("o", "key", "value", "decay") if name in floats)


def _of_shard(
    o, logsumexp, q, k, v, w, beta, key, value, length, g=None, decay=None, segment_ids=None,
    *, scale,
):  # fmt: skip
    """`carried_on` for the rows and heads of one device, as a tuple of arrays."""
    cache = without_rest(PathCache(key, value, decay, length))
    (B, T, HQ, K), H = q.shape, k.shape[2]
    size = chunk_size(T, CHUNK)
    starts = None if segment_ids is None else segment_starts(segment_ids)
    g = None if g is None else jnp.maximum(g, NEVER)
    gates = None if g is None else g.reshape(B, T, H, -1)
    chunks = [
        None if x is None else blockwise.split(x, size) for x in (k, w, beta[..., None], gates)
    ]
    k, w, beta, gates = in_groups(*(None if x is None else x.astype(f32) for x in chunks))
    # As one axis of chunks: with more, XLA takes twice as long to compile this.
    chunks = prepare(*(x.reshape(-1, *x.shape[-2:]) for x in (k, w, beta)))
    moved, writes = (x.reshape(w.shape) for x in chunks[:2])
    new = v, starts, *at_the_end(moved, w, writes, gates)

    def with_cached(o):
        queries = blockwise.split(q.reshape(B, T, H, HQ // H, K).reshape(B, T, H, -1), size)
        in_order = (ungrouped(x, queries.shape[0]) for x in (w, writes))
        queries = blockwise.merge(at_the_start(queries, *in_order), T)
        gates = None if g is None else scale * g
        if starts is not None:
            gates = jnp.where(starts[..., None], NEVER, f32(0.0) if gates is None else gates)
        if gates is not None:
            gates = jnp.broadcast_to(running_sum(gates), (B, T, HQ))
        read, of_cached = _read(queries, gates, cache, scale)
        share = jax.nn.sigmoid(of_cached - logsumexp)[..., None]
        return o + share * (read - o), *appended(cache, *new)

    def alone(o):
        return o, *appended(cache, *new, empty=True)

    o, *cache_after = lax.cond(jnp.any(cache.length > 0), with_cached, alone, o.astype(f32))
    o = jnp.where(fits(cache, starts, T)[:, :, None, None], o, jnp.nan)
    return o, *(x for x in cache_after if x is not None)


def at_the_start(q, w, writes):
    """The queries as the row's first token sees the keys before it, [N, B, H, C, G K]."""

    def chunk(maps, inputs):
        q, w, writes = inputs
        by_query = q.astype(f32).reshape(*q.shape[:3], -1, w.shape[-1])
        with exactly():
            passed = jnp.einsum("bhtgk,bhrk->bhgtr", by_query, w)
            passed = jnp.tril(passed)
            inside = by_query - jnp.einsum("bhgtr,bhrk->bhtgk", passed, writes)
            moved = jnp.einsum("bhtgk,bhkl->bhtgl", inside, maps)
            maps = maps - blockwise.transposed(w) @ (writes @ maps)
        return maps, moved.reshape(q.shape)

    first = w[0, :, :, 0]
    identity = zero_state(first, first) + jnp.eye(w.shape[-1], dtype=f32)[None, None]
    return lax.scan(jax.checkpoint(chunk, prevent_cse=False), identity, (q, w, writes))[1]


def _read(q, gates, cache, scale):
    """What queries [B, T, H, G K] read of the cached tokens; see `read`. The log-sum-exp is nearly
    `NEVER` where a row has no cached token."""
    added = None if cache.decay is None else scale * cache.decay
    return read(q, gates, cache.key, cache.value, added, cache.length, scale=scale)


def read(q, gates, key, value, added, length=None, *, scale, exact=True):
    """What queries read of keys between which and them there are no maps.

    Args:
      q: [B, T, H, G K].
      gates: the sums of their gates, scaled, [B, T, HQ], or None.
      key, value: [B, S, H, K] and [B, S, H, V].
      added: the sums of the keys' gates, scaled, [B, S, HQ], or None.
      length: how many keys each row has, [B], int32, or None: S.
      exact: whether logits are products of all digits of float32.

    Returns:
      [B, T, HQ, V] and the log-sum-exp, [B, T, HQ], float32.
    """
    (B, T, H, _), (S, K) = q.shape, (key.shape[1], key.shape[-1])
    group = q.shape[-1] // K
    rows, block = min(QUERIES, T), min(KEYS, S)
    key, value = (blockwise.split(x, block) for x in (key, value))
    first = block * jnp.arange(len(key), dtype=jnp.int32)
    place = first[:, None] + jnp.arange(block, dtype=jnp.int32)[None]
    filled = place[:, None] < (S if length is None else length[None, :, None])
    if added is not None:
        added = blockwise.split(added.reshape(B, S, H, group), block)
    added = jnp.where(filled[:, :, None, :, None], f32(0.0) if added is None else added, NEVER)

    @functools.partial(jax.checkpoint, prevent_cse=False)
    def some(inputs):
        q, gates = inputs
        q = scale * q.reshape(*q.shape[:3], group, K)

        def read(softmax, key, value, added):
            highest, total, o = softmax
            with exactly() if exact else contextlib.nullcontext():
                logits = jnp.einsum("bhtgk,bhsk->bhtgs", q, key.astype(f32))
            logits += jnp.swapaxes(added, -1, -2)[:, :, None]
            if gates is not None:
                logits += gates[..., None]
            new = jnp.maximum(highest, jnp.max(lax.stop_gradient(logits), axis=-1))
            p, kept = jnp.exp(logits - new[..., None]), jnp.exp(highest - new)
            o = kept[..., None] * o + jnp.einsum("bhtgs,bhsv->bhtgv", p, value.astype(f32))
            return new, kept * total + jnp.sum(p, axis=-1), o

        def visit(softmax, inputs):
            place, *arrays = inputs
            if length is None:
                return read(softmax, *arrays), None
            # The first block is always read, so that no sum is 0.
            filled = (place == 0) | jnp.any(place < length)
            return lax.cond(filled, read, lambda x, *_: x, softmax, *arrays), None

        # Selects, so that they vary over a mesh's axes as the queries do.
        zeros = jnp.where(False, q[..., 0], 0.0)
        of_values = repeated(zeros[..., None], value.shape[-1], axis=q.ndim - 1)
        start = jnp.where(False, q[..., 0], -jnp.inf), zeros, of_values
        (highest, total, o), _ = lax.scan(visit, start, (first, key, value, added))
        return (o / total[..., None]).reshape(*q.shape[:3], -1), highest + jnp.log(total)

    gates = None if gates is None else blockwise.split(gates.reshape(B, T, H, group), rows)
    o, logsumexp = (blockwise.merge(x, T) for x in lax.map(some, (blockwise.split(q, rows), gates)))
    return o.reshape(B, T, H * group, -1), logsumexp.reshape(B, T, H * group)
