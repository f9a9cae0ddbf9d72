"""Kimi Delta Attention by chunks; docs/kda.md derives the formulas."""

import functools

import jax
import jax.numpy as jnp
from jax import lax
from jax.ad_checkpoint import checkpoint_name

from jla._core import blockwise, packed
from jla._core.parts import kda_operands, l2norm
from jla._core.segments import segment_starts
from jla._core.states import hidden, repeated, zero_state
from jla.reference.kda import kda_step, kda_token
from jla.xla import chunks

# One token has no chunks: its step is the definition's.
__all__ = ["kda", "kda_from_projection", "kda_step", "kda_token"]

f32 = jnp.float32

# What a checkpoint keeps of each chunk.
_KEPT = ("inverse", "reads", "errors", "states")


@functools.partial(jax.jit, static_argnames="scale")
def kda(q, k, v, g, beta, initial_state, segment_ids, *, scale):
    """A scan over spans of chunks. See `jla.kda`.

    The body is checkpointed: the backward pass keeps the inputs and, of each chunk, the state that
    entered, the errors, W and the inverse. The decays and what they weight are computed again.
    """
    size, _ = chunks.layout(q.shape[1])
    run = functools.partial(_run, size, scale)
    arrays = q, k, v, g, beta
    if packed.count(initial_state) is not None:
        return packed.by_chunks(run, arrays, initial_state, segment_ids, size)
    starts = None if segment_ids is None else segment_starts(segment_ids)
    if initial_state is None:
        initial_state = zero_state(g[:, 0], v[:, 0])
    return run(*arrays, initial_state, starts=starts)


def _run(size, scale, q, k, v, g, beta, state, owner=None, starts=None):
    """The run in chunks of this size; with `owner` as `packed.Places` has it, or `starts`."""
    T = q.shape[1]
    length = chunks.span(T, size)
    if starts is not None:
        starts = blockwise.spans(starts[:, :, None, None], length)
    if owner is not None:
        owner = chunks.owners_by_span(owner, length // size, state.shape[1])
    inputs = *(blockwise.spans(x, length) for x in (q, k, v, g, beta[..., None])), starts
    policy = jax.checkpoint_policies.save_only_these_names(*_KEPT)
    span = functools.partial(_span, size, scale)
    span = jax.checkpoint(span, prevent_cse=False, policy=policy)
    state, o = lax.scan(span, blockwise.transposed(hidden(state)), (inputs, owner))
    return blockwise.join(o, T), hidden(blockwise.transposed(state))


def kda_from_projection(
    q, k, v, f, A_log, dt_bias, beta, initial_state, segment_ids, real,
    *, scale, lower_bound, normalize=False,
):  # fmt: skip
    """`kda` with the decays of its formula. See `jla._fused.kda_from_projection`."""
    q, k = (l2norm(x) if normalize else x for x in (q, k))
    g, beta = kda_operands(f, A_log, dt_bias, beta, lower_bound, real)
    return kda(q, k, v, g, beta, initial_state, segment_ids, scale=scale)


def _span(size, scale, state, inputs):
    """A span of chunks: from the state that enters to the one that leaves, and the outputs.

    The inputs are [B, L, heads, ...]. First all that a chunk can compute without its initial state
    is computed, for all chunks at once; then the state passes through them one by one. States,
    values and errors are transposed, features before tokens: then every product of the recurrence
    and of its transpose contracts last axes, or is a plain matrix product.
    """
    inputs, owner = inputs
    q, k, v, g, beta, starts = jax.tree.map(blockwise.heads_first, inputs)
    dtype = v.dtype
    group = v.shape[1] // q.shape[1]
    q, k, v, beta = (x.astype(f32) for x in (q, k, v, beta))
    q, k = (repeated(x, group, axis=1) for x in (scale * q, k))
    if starts is not None:
        g = jnp.where(starts, -jnp.inf, g)
    levels, prefix, suffix, total = chunks.decay_products(g, size)
    # The barrier keeps the gradient of `writes`, a sum over the levels, from being fused into its
    # users and computed element by element in each.
    writes = lax.optimization_barrier(chunks.spread(beta, k) * k)
    key_levels, query_levels = [], []
    for s, (later, earlier) in zip(chunks.tree_sizes(size), levels, strict=True):
        columns = blockwise.halves(writes, s)[0] * earlier
        rows = jnp.concatenate([later * blockwise.halves(x, s)[1] for x in (k, q)], axis=-2)
        key_level, query_level = jnp.split(blockwise.pair_products(rows, columns), 2, axis=-2)
        key_levels.append(key_level)
        query_levels.append(query_level)
    scores = chunks.lower_triangular(chunks.total(q * writes), query_levels)

    def by_chunk(x):
        return blockwise.blocks(x, size)

    values = blockwise.transposed(by_chunk(v))
    keys, reads = by_chunk(suffix * writes), by_chunk(prefix * k)
    total = total[..., None, :]
    errors, states, state = _delta_rule(key_levels, values, reads, keys, total, state, owner)
    o = _outputs(by_chunk(prefix * q), scores, states, errors)
    return state, blockwise.heads_first(o.reshape(v.shape).astype(dtype))


@jax.custom_jvp
def _delta_rule(levels, values, reads, keys, total, state, owner):
    """The errors [B, HV, N, V, C] of N chunks, the states that enter them [B, HV, N, V, K], and the
    state that leaves the last.

        E^T = (V^T - S^T (P*K)^T) M^T,   S'^T = S^T Diag(a_C) + E^T (F*beta*K)

    Args:
      levels: A, as `chunks.unit_lower_inverse` takes it; M is the inverse of I + A.
      values: V^T, [B, HV, N, V, C].
      reads: P*K, [B, HV, N, C, K].
      keys: F*beta*K, [B, HV, N, C, K].
      total: a_C, [B, HV, N, 1, K].
      state: the state that enters the first chunk, [B, HV, V, K]; with an `owner` of each chunk,
        [B, N], the states of all segments.
    """
    return _solve(levels, values, reads, keys, total, state, owner)[2:]


def _solve(levels, values, reads, keys, total, state, owner):
    inverse = checkpoint_name(chunks.unit_lower_inverse(levels), "inverse")
    reads = checkpoint_name(inverse @ reads, "reads")
    known = blockwise.product(values, inverse)
    errors, states, state = _recurrence(reads, keys, total, known, None, state, owner)
    errors, states = checkpoint_name(errors, "errors"), checkpoint_name(states, "states")
    return inverse, reads, errors, states, state


def _recurrence(reads, keys, total, known, driven, state, owner):
    """E^T = known - S^T reads^T and S'^T = S^T Diag(total) + E^T keys + driven, chunk by chunk.

    Linear in `known`, `driven` (or None) and `state`.
    """

    def chunk(states, inputs):
        (reads, keys, total, known, driven), owner = inputs
        state = packed.take(states, owner)
        errors = known - blockwise.product(state, reads)
        after = total * state + errors @ keys
        after = after if driven is None else after + driven
        return packed.put(states, after, owner), (errors, state)

    chunk_major = jax.tree.map(lambda x: jnp.moveaxis(x, 2, 0), (reads, keys, total, known, driven))
    owner = None if owner is None else jnp.moveaxis(owner, 1, 0)
    state, kept = lax.scan(chunk, state, (chunk_major, owner))
    errors, states = (jnp.moveaxis(x, 0, 2) for x in kept)
    return errors, states, state


@_delta_rule.defjvp
def _delta_rule_jvp(primals, tangents):
    """The same recurrence, driven by what changes: its transpose has two products a chunk, and all
    that the inputs' gradients need besides is computed for all chunks at once.
    """
    _, _, _, keys, total, _, owner = primals
    d_levels, d_values, d_reads, d_keys, d_total, d_state, _ = tangents
    inverse, reads, errors, states, state = _solve(*primals)
    zeros = jnp.zeros_like(d_values[..., 0, :])
    d_lower = chunks.lower_triangular(zeros.reshape(*zeros.shape[:-2], -1), d_levels)
    d_read = blockwise.product(d_reads, states) + blockwise.product(d_lower, errors)
    d_known = blockwise.product(d_values - blockwise.turned(d_read), inverse)
    d_writes = blockwise.product(blockwise.transposed(d_keys), errors)
    driven = chunks.spread(d_total, states) * states + blockwise.transposed(d_writes)
    driven = _recurrence(reads, keys, total, d_known, driven, d_state, owner)
    return (errors, states, state), driven


@jax.custom_jvp
def _outputs(reads, scores, states, errors):
    """O = (P*Q) S + scores E, [B, HV, N, C, V]."""
    return blockwise.product(reads, states) + blockwise.product(scores, errors)


@_outputs.defjvp
def _outputs_jvp(primals, tangents):
    reads, scores, states, errors = primals
    d_reads, d_scores, d_states, d_errors = tangents
    d_o = blockwise.product(d_states, reads) + blockwise.product(d_errors, scores)
    return _outputs(*primals), _outputs(d_reads, d_scores, states, errors) + blockwise.turned(d_o)
