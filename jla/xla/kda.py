"""Kimi Delta Attention by chunks; docs/kda.md derives the formulas."""

import functools

import jax
import jax.numpy as jnp
from jax import lax
from jax.ad_checkpoint import checkpoint_name

from jla._segments import segment_starts
from jla.reference.kda import kda_step
from jla.xla import chunks

__all__ = ["kda", "kda_step"]  # one token has no chunks: its step is the definition's

f32 = jnp.float32
_SCORES = "scores"
_KEPT = (_SCORES, chunks.INVERSE, chunks.SOLUTION)


@functools.partial(jax.jit, static_argnames="scale")
def kda(q, k, v, g, beta, initial_state, segment_ids, *, scale):
    """A scan over chunks. See `jla.kda`.

    The body is checkpointed: the backward pass keeps the inputs and, of each chunk, the state that
    entered, the errors and two C x C matrices. The decays and what they weight it computes again.
    """
    B, T, HV, V = v.shape
    H, K = q.shape[2:]
    group = HV // H
    size = chunks.chunk_size(T)

    def split(x, group):
        return chunks.split(x.reshape(B, T, H, group, -1), size)

    starts = None
    if segment_ids is not None:
        starts = chunks.split(segment_starts(segment_ids)[:, :, None, None, None], size)
    if initial_state is None:
        initial_state = jnp.zeros((B, HV, K, V), f32)
    inputs = split(q, 1), split(k, 1), split(v, group), split(g, group), split(beta, group), starts
    policy = jax.checkpoint_policies.save_only_these_names(*_KEPT)
    chunk = jax.checkpoint(functools.partial(_chunk, scale), prevent_cse=False, policy=policy)
    state, o = lax.scan(chunk, initial_state.reshape(B, H, group, K, V), inputs)
    return chunks.merge(o, T).reshape(v.shape), state.reshape(B, HV, K, V)


def _chunk(scale, state, inputs):
    """One chunk of every head: from the state that enters to the one that leaves, and the outputs.

    All arrays are [B, H, group, C, ...]; q and k have a group axis of 1, beta and starts a feature
    axis of 1.
    """
    q, k, v, g, beta, starts = inputs
    dtype = v.dtype
    q, k, v, beta = (x.astype(f32) for x in (q, k, v, beta))
    q = scale * q
    decay = jnp.exp(g)
    if starts is not None:
        decay = jnp.where(starts, 0.0, decay)
    # Without the barrier XLA fuses the tree into its users and computes it once for each.
    levels, prefix, suffix, total = lax.optimization_barrier(chunks.decay_products(decay))
    writes = beta * k
    key_blocks, query_blocks = [], []
    for s, (later, earlier) in zip(chunks.tree_sizes(g.shape[-2]), levels, strict=True):
        columns = chunks.halves(writes, s)[0] * earlier
        rows = jnp.concatenate([later * chunks.halves(x, s)[1] for x in (k, q)], axis=-2)
        key_block, query_block = jnp.split(rows @ jnp.swapaxes(columns, -1, -2), 2, axis=-2)
        key_blocks.append(key_block)
        query_blocks.append(query_block)
    scores = chunks.lower_triangular(jnp.sum(q * writes, axis=-1), query_blocks)
    scores = checkpoint_name(scores, _SCORES)
    error = chunks.unit_lower_solve(key_blocks, v - (prefix * k) @ state)
    o = (prefix * q) @ state + scores @ error
    state = jnp.swapaxes(total, -1, -2) * state + jnp.swapaxes(suffix * writes, -1, -2) @ error
    return state, o.astype(dtype)
