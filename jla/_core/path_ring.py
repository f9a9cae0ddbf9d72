"""PaTH attention over devices where heads do not divide the axis: keys move from left to right.

The maps between a query and a key of a device further left are those up to the end of the key's
device, those of the whole devices between, and those from the start of the query's device on. The
first are in the key, the last in the query, and each device multiplies what it passes on by its own
maps. So every device has of the keys to its left, one device's after another, what plain attention
takes, and the log-sum-exps of the parts join these. A device keeps two devices' keys at a time.

A border of segments is a gate that lets nothing through.
"""

import functools

import jax
import jax.numpy as jnp
from jax import lax

from jla._core import blockwise, sequence
from jla._core.lengths import chunk_size
from jla._core.parts import CHUNK, NEVER, at_the_end, exactly, in_groups, prepare
from jla._core.path_cache import at_the_start, read
from jla._core.segments import segment_starts
from jla._core.sums import running_sum
from jla._core.types import Directions, Keys, LogDecays, Queries, SegmentIds, Strengths, Values

f32, i32 = jnp.float32, jnp.int32


def with_left(
    o: jax.Array,
    logsumexp: jax.Array,
    q: Queries,
    k: Keys,
    v: Values,
    w: Directions,
    beta: Strengths,
    g: LogDecays | None,
    segment_ids: SegmentIds | None,
    axis: str,
    *,
    scale: float,
) -> jax.Array:
    """What a device's tokens read, those of the devices to the left included.

    The backward pass moves the keys once more: kept from the forward pass, they would be those of
    all devices for each layer of a model.

    Args:
      o, logsumexp: what they read of one another, [B, T, HQ, V], and the log of the sum of their
        logits' exponentials, [B, T, HQ]; float32.
      q, k, v, w, beta, g, segment_ids, scale: of `jla.path_attention`, this device's.
      axis: the manual axis.

    Returns:
      o, float32.
    """
    gates = _gates(g, segment_ids, logsumexp.shape, axis, scale)
    arrays = sequence.varying((o, logsumexp, q, k, v, w, beta, gates), axis)
    return jax.checkpoint(functools.partial(_with_left, axis=axis, scale=scale))(*arrays)


def _with_left(o, logsumexp, q, k, v, w, beta, gates, *, axis, scale):
    (B, T, HQ, K), H, dtype = q.shape, k.shape[2], v.dtype
    size, index = lax.axis_size(axis), lax.axis_index(axis)
    before = None if gates is None else running_sum(gates)
    chunk = chunk_size(T, CHUNK)
    k, w, beta = (blockwise.split(x.astype(f32), chunk) for x in (k, w, beta[..., None]))
    moved, writes, _ = prepare(k, w, beta)
    queries = blockwise.split(q.reshape(B, T, H, HQ // H, K).reshape(B, T, H, -1), chunk)
    queries = blockwise.merge(at_the_start(queries, w, writes), T)
    if gates is not None:
        gates = blockwise.split(gates.reshape(B, T, H, -1), chunk)
    keys, after, maps, total = at_the_end(*in_groups(moved, w, writes, gates))
    if after is not None and total is not None:
        after = blockwise.merge(after, T).reshape(B, T, HQ)
        total = jnp.swapaxes(total, 1, 2).reshape(B, 1, HQ)
    keys = blockwise.merge(keys, T)

    def of_block(block):
        sent, after = block
        keys, values = sent[..., :K], sent[..., K:]
        return read(queries, before, keys, values, after, scale=scale, exact=dtype == f32)

    def nothing(_):
        return jnp.where(False, o, 0.0), jnp.where(False, logsumexp, NEVER)

    def step(carry, number):
        o, logsumexp, block = carry
        # Devices without so many to their left have zeros, whatever the last devices hold.
        there = index >= number
        block = jax.tree.map(functools.partial(_from_left, axis, there), block)
        of_left, joins = lax.cond(there, of_block, nothing, block)
        share = jax.nn.sigmoid(joins - logsumexp)[..., None]
        o, logsumexp = o + share * (of_left - o), jnp.logaddexp(logsumexp, joins)
        sent, after = block
        with exactly():
            keys = jnp.einsum("bshk,bhlk->bshl", sent[..., :K].astype(f32), maps)
        sent = jnp.concatenate([keys.astype(dtype), sent[..., K:]], axis=-1)
        return (o, logsumexp, (sent, None if after is None else after + total)), None

    # Keys and values, of one dtype, travel together.
    block = jnp.concatenate([keys.astype(dtype), v], axis=-1), after
    # A select, so that it varies over a mesh's axes as a loop's carry does.
    logsumexp = jnp.where(False, o[..., 0], logsumexp)
    numbers = jnp.arange(1, size, dtype=i32)
    return lax.scan(step, (o, logsumexp, block), numbers)[0][0]


def _from_left(axis, there, x):
    size = lax.axis_size(axis)
    right = [(i, (i + 1) % size) for i in range(size)]  # vmap's axes want all of them to send
    return jnp.where(there, lax.ppermute(x, axis, right), jnp.zeros((), x.dtype))


def _gates(g, segment_ids, shape, axis, scale):
    """The tokens' gates, scaled, `NEVER` at borders, [B, T, HQ]; None without both."""
    if segment_ids is None:
        return None if g is None else scale * jnp.maximum(g, NEVER)
    B, T, _ = shape
    gates = f32(0.0) if g is None else scale * jnp.maximum(g, NEVER)
    pieces = sequence.links(segment_ids, B, T, axis)
    linked = lax.dynamic_index_in_dim(pieces.linked, lax.axis_index(axis), 0, keepdims=False)
    first = (jnp.arange(T, dtype=i32) == 0)[None] & ~linked[:, None]
    starts = segment_starts(segment_ids) | first
    return jnp.broadcast_to(jnp.where(starts[..., None], NEVER, gates), shape)
