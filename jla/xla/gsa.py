"""Gated Slot Attention by chunks; docs/gsa.md derives the formulas."""

import functools

import jax
import jax.numpy as jnp
from jax import lax

from jla._core import blockwise, packed
from jla._core.parts import abc_gates
from jla._core.segments import segment_starts
from jla._core.states import GSAState, hidden, repeated, zero_gsa_state
from jla.reference.gsa import gsa_step, gsa_token
from jla.xla import chunks

# One token has no chunks: its step is the definition's.
__all__ = ["abc_gates", "gsa", "gsa_step", "gsa_token"]

f32 = jnp.float32


@functools.partial(jax.jit, static_argnames="scale")
def gsa(q, k, v, s, g, initial_state, segment_ids, *, scale):
    """A scan over spans of chunks. See `jla.gsa`.

    The body is checkpointed: the backward pass keeps the inputs and the state that entered each
    span, and computes the rest again.
    """
    size, _ = chunks.layout(q.shape[1])
    run = functools.partial(_run, size, scale)
    if packed.count(initial_state) is not None:
        return packed.by_chunks(run, (q, k, v, s, g), initial_state, segment_ids, size)
    starts = None if segment_ids is None else segment_starts(segment_ids)
    if g is None:
        s, g = abc_gates(s, starts)
    if initial_state is None:
        initial_state = zero_gsa_state(k[:, 0], g[:, 0], v[:, 0])
    return run(q, k, v, s, g, initial_state, starts=starts)


def _run(size, scale, q, k, v, s, g, state, owner=None, starts=None):
    """The run in chunks of this size; with `owner` as `packed.Places` has it, or `starts`."""
    B, T, HQ, K = q.shape
    H, length = k.shape[2], chunks.span(T, size)
    if starts is not None:
        starts = blockwise.split(starts[:, :, None, None], length)
    if owner is not None:
        owner = chunks.owners_by_span(owner, length // size, state.hk.shape[1])
    # The queries of one key head lie side by side, as if they were one.
    q = q.reshape(B, T, H, HQ // H, K).reshape(B, T, H, -1)
    inputs = *(blockwise.split(x, length) for x in (q, k, v, s, g)), starts, owner
    span = jax.checkpoint(functools.partial(_span, size, scale), prevent_cse=False)
    state, o = lax.scan(span, hidden(state), inputs)
    o = blockwise.merge(o, T)
    return o.reshape(B, T, H, HQ // H, -1).reshape(B, T, HQ, -1), hidden(state)


def _span(size, scale, state, inputs):
    """A span of chunks: from the state that enters to the one that leaves, and the outputs.

    All arrays are [B, H, L, ...]; those of the queries [B, H, L G, ...], with the G queries that
    share a key head as G rows of their token.
    """
    q, k, v, s, g, starts, owner = inputs
    dtype = v.dtype
    group = q.shape[-1] // k.shape[-1]
    q, k, v, s = (x.astype(f32) for x in (q, k, v, s))
    # Where types carry shardings, no reshape may merge and split at once: there are two.
    q = scale * q.reshape(*k.shape[:3], group, -1).reshape(*k.shape[:2], -1, k.shape[-1])
    if starts is not None:
        g = jnp.where(starts, -jnp.inf, g)
    levels, prefix, suffix, total = chunks.decay_products(g, size)
    prefix = _rows(prefix, group)
    levels = [
        (n, _rows(later, group), earlier * blockwise.halves(s, n)[0])
        for n, (later, earlier) in zip(chunks.tree_sizes(size), levels, strict=True)
    ]

    def by_chunk(x, rows=1):
        return blockwise.blocks(x, size * rows)

    writes = by_chunk(suffix * s)
    key_writes = blockwise.transposed(by_chunk(k)) @ writes
    value_writes = blockwise.transposed(writes) @ by_chunk(v)
    states, state = _entering(state, key_writes, value_writes, total, owner)

    # The slots' logits: the decays are the values', outside of the scores.
    queries = by_chunk(q, group)
    diagonal, scores = _cut(blockwise.pair_products(queries, by_chunk(k)))
    logits = prefix * (queries @ states.hk).reshape(prefix.shape)
    logits += diagonal.reshape(*prefix.shape[:-1], 1) * _rows(s, group)
    for (n, later, writes), lower in zip(levels, scores, strict=True):
        right = later * (lower @ writes)
        logits += jnp.pad(right, [(0, 0)] * 3 + [(n * group, 0), (0, 0)]).reshape(logits.shape)
    p = jax.nn.softmax(logits, axis=-1)

    # The outputs: the decays are the keys', inside the scores.
    diagonal = jnp.sum(p * _rows(s, group), axis=-1).reshape(*s.shape[:-1], group, 1)
    scores = [
        blockwise.pair_products(later * blockwise.halves(p, n * group)[1], writes)
        for n, later, writes in levels
    ]
    o = by_chunk(prefix * p, group) @ states.hv + _assembled(diagonal, scores) @ by_chunk(v)
    o = o.reshape(*p.shape[:-1], -1).reshape(*v.shape[:3], group, v.shape[-1])
    o = o.reshape(*v.shape[:3], -1)
    return state, o.astype(dtype)


def _rows(x, group):
    """Repeats every token [..., L, D] for its queries: [..., L G, D]."""
    return repeated(x, group, axis=x.ndim - 2)


def _cut(matrix):
    """Cuts scores of G rows a token, [..., L/C, C G, C], into the tokens' own, [..., L, G, 1], and
    the levels of the tree, [..., L/(2s), s G, s]; what is above the diagonal is left out."""
    levels = []
    while matrix.shape[-1] > 1:
        top, bottom = jnp.split(matrix, 2, axis=-2)
        left, _ = jnp.split(top, 2, axis=-1)
        lower, right = jnp.split(bottom, 2, axis=-1)
        levels.append(lower)
        matrix = jnp.stack([left, right], axis=-3)
        matrix = matrix.reshape(*lower.shape[:-3], -1, *lower.shape[-2:])
    return matrix, levels[::-1]


def _assembled(matrix, levels):
    """Undoes `_cut`, with zeros above the diagonal."""
    for lower in levels:
        pairs = matrix.reshape(*lower.shape[:-2], 2, *lower.shape[-2:])
        left, right = (x.squeeze(-3) for x in jnp.split(pairs, 2, axis=-3))
        matrix = jnp.block([[left, jnp.zeros_like(left)], [lower, right]])
    return matrix


def _entering(state, key_writes, value_writes, total, owner):
    """The states that enter the chunks, [..., chunks, K, M] and [..., M, V], and the one after.

    With an owner of each chunk, [B, chunks], `state` is those of all segments.
    """

    def chunk(states, inputs):
        key_writes, value_writes, total, owner = inputs
        state = packed.take(states, owner)
        hk = state.hk * total[..., None, :] + key_writes
        hv = total[..., :, None] * state.hv + value_writes
        return packed.put(states, GSAState(hk, hv), owner), state

    chunk_major = tuple(jnp.moveaxis(x, 2, 0) for x in (key_writes, value_writes, total))
    owner = None if owner is None else jnp.moveaxis(owner, 1, 0)
    state, states = lax.scan(chunk, state, (*chunk_major, owner), unroll=True)
    return jax.tree.map(lambda x: jnp.moveaxis(x, 0, 2), states), state
