"""Log-linear attention, token by token: the definition that everything else is tested against."""

import functools

import jax
import jax.numpy as jnp
from jax import lax

from jla._core.lengths import is_symbolic_dim
from jla._core.parts import mamba2_operands
from jla._core.segments import segment_starts
from jla._core.states import LogLinearState, moved_on, repeated, zero_log_linear_state

f32 = jnp.float32
_einsum = functools.partial(jnp.einsum, precision=lax.Precision.HIGHEST)

# Tokens between the states that the backward pass keeps: all of them would be L K V numbers for
# every token and head.
SPAN = 256


@jax.jit
def log_linear_step(q, k, v, g, level_scales, state):
    """One token. See `jla.log_linear_step`."""
    group, dtype = v.shape[1] // q.shape[1], v.dtype
    q, k = (repeated(x.astype(f32), group, axis=1) for x in (q, k))
    v, level_scales = v.astype(f32), level_scales.astype(f32)
    position = state.position
    level = jnp.arange(level_scales.shape[-1], dtype=jnp.int32)[None]

    def by_level(mask):
        """[B, L] to [B, 1, L, 1, 1]."""
        return mask[:, None, :, None, None]

    bits = position[:, None] >> jnp.maximum(level - 1, 0)
    in_use = (level > 0) & (bits % 2 == 1)
    # Before the product: what is not in use may be NaN, and then so would g's gradient be.
    levels = jnp.where(by_level(in_use), state.levels, 0.0)
    levels = jnp.exp(g)[..., None, None, None] * levels
    own = (k[..., :, None] * v[..., None, :])[:, :, None]
    levels = jnp.where(by_level(level == 0), own, levels)
    o = _einsum("bhl,bhk,bhlkv->bhv", level_scales, q, levels)

    ones = lax.population_count(position & ~(position + 1))[:, None]  # trailing ones
    merged = jnp.sum(jnp.where(by_level(level <= ones), levels, 0.0), axis=2, keepdims=True)
    levels = jnp.where(by_level(level <= ones), 0.0, levels)
    levels = jnp.where(by_level(level == ones + 1), merged, levels)

    # L levels serve the positions 0 to 2**(L-1) - 1. At others, those beyond int32 included (they
    # are negative, see `moved_on`), outputs are NaN, because a wrong number would look like a right
    # one. Right after the last of these positions all levels are empty, and the position says so.
    beyond = position >> (level_scales.shape[-1] - 1) != 0
    o = jnp.where(beyond[:, None, None], jnp.nan, o)
    position = moved_on(position, 1)
    lost = (beyond | (position < 0))[:, None, None, None, None]
    return o.astype(dtype), LogLinearState(jnp.where(lost, jnp.nan, levels), position)


@jax.jit
def log_linear_attention(q, k, v, g, level_scales, initial_state, segment_ids):
    """`lax.scan` over the tokens. See `jla.log_linear_attention`."""
    T = v.shape[1]
    if initial_state is None:
        initial_state = zero_log_linear_state(k[:, 0], v[:, 0], level_scales.shape[-1])
    if segment_ids is None:
        starts = jnp.zeros(v.shape[:2], bool)
    else:
        starts = segment_starts(segment_ids)
        # Inside shard_map the position varies as the segments do, from the first token on.
        position = jnp.where(starts[:, 0] & False, 0, initial_state.position)
        initial_state = initial_state._replace(position=position)

    def token(state, inputs):
        *arrays, start = inputs
        levels = jnp.where(start[:, None, None, None, None], 0.0, state.levels)
        position = jnp.where(start, 0, state.position)
        o, state = log_linear_step(*arrays, LogLinearState(levels, position))
        return state, o

    span = functools.partial(lax.scan, token)
    time_major = tuple(jnp.moveaxis(x, 1, 0) for x in (q, k, v, g, level_scales, starts))
    # A symbolic T may be shorter than a span.
    whole = 0 if is_symbolic_dim(T) else T // SPAN * SPAN
    state, outputs = initial_state, []
    if whole:
        spans = [x[:whole].reshape(T // SPAN, SPAN, *x.shape[1:]) for x in time_major]
        state, o = lax.scan(jax.checkpoint(span, prevent_cse=False), state, spans)
        outputs.append(o.reshape(whole, *o.shape[2:]))
    if whole < T:
        state, o = span(state, [x[whole:] for x in time_major])
        outputs.append(o)
    return jnp.moveaxis(jnp.concatenate(outputs), 0, 1), state


def log_linear_mamba2(q, k, u, g, logits, dt, skip, segment_ids):
    """`log_linear_attention` with Mamba-2's values and skip. See `jla._fused.log_linear_mamba2`."""
    v, level_scales, skipped = mamba2_operands(u, logits, dt, skip)
    o, _ = log_linear_attention(q, k, v, g, level_scales, None, segment_ids)
    return (o.astype(f32) + skipped).astype(u.dtype)
