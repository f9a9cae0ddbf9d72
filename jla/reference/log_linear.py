"""Log-linear attention, token by token: the definition that everything else is tested against."""

import functools

import jax
import jax.numpy as jnp
from jax import lax

from jla._core import packed, pools, steps
from jla._core.axes import LOG_LINEAR, of_step, with_value_heads
from jla._core.lengths import is_symbolic_dim
from jla._core.parts import mamba2_gates, mamba2_operands
from jla._core.states import (
    LazyLogLinearState,
    lazy_decays,
    levels_in_use,
    merging_into,
    moved_on,
    outgrown,
    repeated,
    with_rank,
    zero_log_linear_state,
)

f32 = jnp.float32
_einsum = functools.partial(jnp.einsum, precision=lax.Precision.HIGHEST)

# Tokens between the states that the backward pass keeps: all of them would be L K V numbers for
# every token and head.
SPAN = 256

_STEP = with_value_heads(of_step(LOG_LINEAR))
# Of a pool the levels alone: positions, and the sums in log decays, are the rows'.
_OF_TOKEN = _STEP | dict(decays=_STEP["level_scales"], position="B")
_ARRAYS = "q k v decays level_scales state.levels position"


@pools.on_rows()
@jax.jit
def log_linear_step(q, k, v, g, level_scales, state):
    """One token. See `jla.log_linear_step`."""
    return stepped(token, q, k, v, g, level_scales, state)


def stepped(token, q, k, v, g, level_scales, state, slots=None):
    """A step from a state of either kind, by `token` or a kernel in its place.

    With slots the state is a pool. Then `token` gets all of its levels, the rows' positions and the
    slots; the little that lies beside the levels is gathered and scattered here.
    """
    lazy, on_pool = isinstance(state, LazyLogLinearState), {}
    rows = state
    if slots is not None:
        rows, on_pool = pools.take(state._replace(levels=None), slots), dict(slots=slots)
    if lazy:
        decays, after = lazy_decays(g, rows.log_decays, rows.position)
    else:
        decays = jnp.broadcast_to(g[..., None], level_scales.shape)
    arrays = q, k, v, decays, level_scales, state.levels, rows.position
    o, levels = token(*arrays, lazy=lazy, **on_pool)
    new = rows._replace(levels=None, position=moved_on(rows.position, 1))
    if lazy:
        new = new._replace(log_decays=after)
    if slots is not None:
        new = pools.put(state._replace(levels=None), new, slots)
    return o, new._replace(levels=levels)


def stepped_by_kernel(run, q, k, v, g, level_scales, state, slots=None):
    """`stepped` by a kernel; `run` takes what `_token_of_rows` takes, whose derivatives it has."""

    def kernel(*arrays, lazy, slots=None):
        call, formula = (functools.partial(f, lazy=lazy) for f in (run, _token_of_rows))
        results = "o state.levels"
        return steps.call(call, formula, _OF_TOKEN, _ARRAYS, results, *arrays, slots=slots)

    return stepped(kernel, q, k, v, g, level_scales, state, slots)


def _token_of_rows(q, k, v, decays, level_scales, levels, position, slots=None, *, lazy):
    """`token`; with slots, of rows of a pool of levels."""

    @pools.on_rows()
    def of_rows(q, k, v, decays, level_scales, position, levels):
        return token(q, k, v, decays, level_scales, levels, position, lazy=lazy)

    return of_rows(q, k, v, decays, level_scales, position, levels, slots=slots)


def token(q, k, v, decays, level_scales, levels, position, *, lazy):
    """A token's outputs and the levels after it.

    Args:
      decays: the log decays that are still to be applied to each level, the token's own included,
        [B, H, L].
      lazy: whether the levels that are not merged stay as they are. If not, they are decayed, and
        levels not in use are zeros.
    """
    group, dtype, L = v.shape[1] // q.shape[1], v.dtype, level_scales.shape[-1]
    q, k = (repeated(x.astype(f32), group, axis=1) for x in (q, k))
    v, level_scales = v.astype(f32), level_scales.astype(f32)
    level = jnp.arange(L, dtype=jnp.int32)[None]

    def by_level(mask):
        """[B, L] to [B, 1, L, 1, 1]."""
        return mask[:, None, :, None, None]

    in_use = levels_in_use(position, L)
    # Before the product: what is not in use may be NaN, and then so would g's gradient be.
    decayed = jnp.where(by_level(in_use), levels, 0.0)
    decayed = jnp.exp(jnp.where(in_use[:, None], decays, 0.0))[..., None, None] * decayed
    own = (k[..., :, None] * v[..., None, :])[:, :, None]
    decayed = jnp.where(by_level(level == 0), own, decayed)
    o = _einsum("bhl,bhk,bhlkv->bhv", level_scales, q, decayed)

    target = merging_into(position)[:, None]
    merged = jnp.sum(jnp.where(by_level(level < target), decayed, 0.0), axis=2, keepdims=True)
    if not lazy:
        levels = jnp.where(by_level(level < target), 0.0, decayed)
    levels = jnp.where(by_level(level == target), merged, levels)

    # L levels serve the positions 0 to 2**(L-1) - 1. At others, those beyond int32 included (they
    # are negative, see `moved_on`), outputs are NaN, because a wrong number would look like a right
    # one. Right after the last of these positions all levels are empty, and the position says so.
    # It says of a lazy state, too, that its levels are lost, see `LazyLogLinearState.settled`.
    beyond = outgrown(position, L)
    o = jnp.where(beyond[:, None, None], jnp.nan, o)
    if not lazy:
        lost = (beyond | (moved_on(position, 1) < 0))[:, None, None, None, None]
        levels = jnp.where(lost, jnp.nan, levels)
    return o.astype(dtype), levels


def log_linear_token(q, k, u, d, logits, A_log, dt_bias, level_weight, skip, state):
    """See `jla._token.log_linear_token`."""
    dt, g = mamba2_gates(d, A_log, dt_bias)
    logits = logits.astype(f32) * with_rank(level_weight, 3)
    v, level_scales, skipped = mamba2_operands(u, logits, dt, skip)
    o, state = log_linear_step(q, k, v, g, level_scales, state)
    return (o.astype(f32) + skipped).astype(u.dtype), state


@jax.jit
def log_linear_attention(q, k, v, g, level_scales, initial_state, segment_ids):
    """`lax.scan` over the tokens. See `jla.log_linear_attention`."""
    T = v.shape[1]
    if initial_state is None:
        initial_state = zero_log_linear_state(k[:, 0], v[:, 0], level_scales.shape[-1])
    if segment_ids is not None:
        # Inside shard_map the position varies as the segments do, from the first token on.
        position = initial_state.position
        first = segment_ids[:, 0].reshape(-1, *[1] * (position.ndim - 1))
        position = jnp.where((first == 0) & False, 0, position)
        initial_state = initial_state._replace(position=position)
    one, marks = packed.by_token(log_linear_step, initial_state, segment_ids, v, rank=5)
    span = functools.partial(lax.scan, one)
    time_major = tuple(jnp.moveaxis(x, 1, 0) for x in (q, k, v, g, level_scales, marks))
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
