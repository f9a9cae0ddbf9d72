"""Kimi Delta Attention by chunks; docs/kda.md derives the formulas."""

import functools

import jax
import jax.numpy as jnp
from jax import lax
from jax.ad_checkpoint import checkpoint_name

from jla._segments import segment_starts
from jla._state import zero_state
from jla.reference.kda import kda_step
from jla.xla import chunks

__all__ = ["kda", "kda_step"]  # one token has no chunks: its step is the definition's

f32 = jnp.float32
_SCORES = "scores"
_KEPT = (_SCORES, chunks.INVERSE, chunks.SOLUTION)


@functools.partial(jax.jit, static_argnames="scale")
def kda(q, k, v, g, beta, initial_state, segment_ids, *, scale):
    """A scan over spans of chunks. See `jla.kda`.

    The body is checkpointed: the backward pass keeps the inputs and, of each span, the state that
    entered, and of each chunk what its triangular system gave and two C x C matrices. The decays,
    what they weight and the states inside the span it computes again.
    """
    T = q.shape[1]
    size, length = chunks.layout(T)
    starts = None
    if segment_ids is not None:
        starts = chunks.split(segment_starts(segment_ids)[:, :, None, None], length)
    if initial_state is None:
        initial_state = zero_state(g[:, 0], v[:, 0])
    inputs = *(chunks.split(x, length) for x in (q, k, v, g, beta[..., None])), starts
    policy = jax.checkpoint_policies.save_only_these_names(*_KEPT)
    span = functools.partial(_span, size, scale)
    span = jax.checkpoint(span, prevent_cse=False, policy=policy)
    state, o = lax.scan(span, initial_state, inputs)
    return chunks.merge(o, T), state


def _span(size, scale, state, inputs):
    """A span of chunks: from the state that enters to the one that leaves, and the outputs.

    All arrays are [B, heads, L, ...]. What a chunk computes without the state that enters it comes
    first, for all chunks at once; the state then passes through them one by one.
    """
    q, k, v, g, beta, starts = inputs
    dtype = v.dtype
    group = v.shape[1] // q.shape[1]
    q, k, v, beta = (x.astype(f32) for x in (q, k, v, beta))
    q, k = (jnp.repeat(x, group, axis=1) for x in (scale * q, k))
    decay = jnp.exp(g)
    if starts is not None:
        decay = jnp.where(starts, 0.0, decay)
    # Without the barrier XLA may fuse the tree into its users and compute it once for each.
    levels, prefix, suffix, total = lax.optimization_barrier(chunks.decay_products(decay, size))
    writes = beta * k
    key_levels, query_levels = [], []
    for s, (later, earlier) in zip(chunks.tree_sizes(size), levels, strict=True):
        columns = chunks.halves(writes, s)[0] * earlier
        rows = jnp.concatenate([later * chunks.halves(x, s)[1] for x in (k, q)], axis=-2)
        key_level, query_level = jnp.split(rows @ jnp.swapaxes(columns, -1, -2), 2, axis=-2)
        key_levels.append(key_level)
        query_levels.append(query_level)
    scores = chunks.lower_triangular(jnp.sum(q * writes, axis=-1), query_levels)
    scores = checkpoint_name(scores, _SCORES)

    def by_chunk(x):
        return chunks.blocks(x, size)

    known = by_chunk(jnp.concatenate([v, prefix * k], axis=-1))
    known = chunks.unit_lower_solve(key_levels, known)
    errors, reads = jnp.split(known, [v.shape[-1]], axis=-1)
    keys = jnp.swapaxes(by_chunk(suffix * writes), -1, -2)

    def chunk(state, inputs):
        errors, reads, keys, total = inputs
        error = errors - reads @ state
        return total * state + keys @ error, (state, error)

    chunk_major = tuple(jnp.moveaxis(x, 2, 0) for x in (errors, reads, keys, total[..., None]))
    state, (states, errors) = lax.scan(chunk, state, chunk_major, unroll=True)
    states, errors = (jnp.moveaxis(x, 0, 2) for x in (states, errors))
    o = by_chunk(prefix * q) @ states + scores @ errors
    return state, o.reshape(v.shape).astype(dtype)
