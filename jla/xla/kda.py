"""Kimi Delta Attention by chunks; docs/kda.md derives the formulas."""

import functools

import jax
import jax.numpy as jnp
from jax import lax

from jla._segments import segment_starts
from jla.reference.kda import kda_step
from jla.xla import chunks

__all__ = ["kda", "kda_step"]  # one token has no chunks: its step is the definition's

f32 = jnp.float32


@functools.partial(jax.jit, static_argnames="scale")
def kda(q, k, v, g, beta, initial_state, segment_ids, *, scale):
    """All chunks' own work at once, then a scan that carries the state. See `jla.kda`."""
    B, T, HV, V = v.shape
    H, K = q.shape[2:]
    size = chunks.chunk_size(T)

    def split(x, group):
        return chunks.split(x.reshape(B, T, H, group, -1), size)

    group = HV // H
    starts = None
    if segment_ids is not None:
        starts = chunks.split(segment_starts(segment_ids)[:, :, None, None, None], size)
    if initial_state is None:
        initial_state = jnp.zeros((B, HV, K, V), f32)
    read, errors, queries, scores, writes, decay = _prepare(
        split(q, 1), split(k, 1), split(v, group), split(g, group), split(beta, group), starts, scale
    )

    def chunk(state, inputs):
        read, errors, writes, decay = inputs
        error = errors - read @ state
        return decay * state + jnp.swapaxes(writes, -1, -2) @ error, (state, error)

    state = initial_state.reshape(B, H, group, K, V)
    state, (states, error) = lax.scan(chunk, state, (read, errors, writes, decay))
    o = queries @ states + scores @ error
    return chunks.merge(o, T).reshape(v.shape).astype(v.dtype), state.reshape(B, HV, K, V)


@functools.partial(jax.checkpoint, static_argnums=6)
def _prepare(q, k, v, g, beta, starts, scale):
    """What a chunk computes without the state that enters it.

    All arrays are [N, B, H, group, C, ...], of q and k the group axis is 1. With S the entering
    state, the chunk's errors are E = errors - read @ S, its outputs queries @ S + scores @ E, and
    the state that leaves it is decay * S + writes^T E. Checkpointed: the backward pass keeps these six
    and rebuilds the decay products and score blocks behind them.
    """
    q, k, v, beta = (x.astype(f32) for x in (q, k, v, beta))
    q = scale * q
    decay = jnp.exp(g)
    if starts is not None:
        decay = jnp.where(starts, 0.0, decay)
    levels, prefix, suffix = chunks.decay_products(decay)
    writes = beta * k
    key_blocks, query_blocks = [], []
    for s, (later, earlier) in zip(chunks.tree_sizes(g.shape[-2]), levels, strict=True):
        columns = chunks.halves(chunks.blocks(writes, s))[0] * earlier
        rows = (later * chunks.halves(chunks.blocks(x, s))[1] for x in (k, q))
        key_rows, query_rows = (x @ jnp.swapaxes(columns, -1, -2) for x in rows)
        key_blocks.append(key_rows)
        query_blocks.append(query_rows)
    inverse = chunks.unit_lower_inverse(key_blocks)
    scores = chunks.lower_triangular(jnp.sum(q * writes, axis=-1), query_blocks)
    total = jnp.swapaxes(prefix[..., -1:, :], -1, -2)
    return inverse @ (prefix * k), inverse @ v, prefix * q, scores, suffix * writes, total
