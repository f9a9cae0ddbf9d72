"""How each mechanism's state moves over a piece of a sequence, for `jla._core.sequence`.

A summary is made of the tokens alone. What it says is exact: the same sums as the mechanism's own,
in float32. With packed segments the tokens of a piece's last segment are all that is in its state.
"""

import functools
import inspect
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from jla._core import alignment, parts, sequence
from jla._core.lengths import is_symbolic_dim
from jla._core.segments import segment_starts
from jla._core.sequence import Movement
from jla._core.states import (
    GSAState,
    LogLinearState,
    MesaState,
    bit_length,
    moved_on,
    zero_gsa_state,
    zero_log_linear_state,
    zero_mesa_state,
    zero_state,
)
from jla._core.sums import running_sum
from jla._core.types import SegmentIds, SlotWrites

bf16, f32, i32 = jnp.bfloat16, jnp.float32, jnp.int32
_exact = functools.partial(jnp.einsum, precision=lax.Precision.HIGHEST)


def _of_last(pieces, segment_ids, L, axis):
    """Which tokens belong to the piece's last segment, bool [B, L]; None without segments."""
    if segment_ids is None:
        return None
    length = lax.dynamic_index_in_dim(pieces.length, lax.axis_index(axis), 0, keepdims=False)
    return jnp.arange(L, dtype=i32)[None] >= L - length[:, None]


def _decays_to_end(g, of_last=None):
    """The decay from each token of the last segment to the piece's end, [B, L, ...], and over all
    of them, [B, ...].

    Each is the exponential of a sum of its own gates: a difference of two longer sums would keep no
    digit beside a strong gate.
    """
    (g,) = _only(of_last, g)
    later = jnp.concatenate([g[:, 1:], jnp.zeros_like(g[:, :1])], axis=1)
    return jnp.exp(running_sum(later, True)), jnp.exp(jnp.sum(g, axis=1))


def _only(of_last, *arrays):
    """The tokens [B, L, ...] of the last segment, and zeros for the others, which may be NaN."""
    if of_last is None:
        return arrays
    zeros = (jnp.zeros((), x.dtype) for x in arrays)
    tokens = (of_last.reshape(*of_last.shape, *[1] * (x.ndim - 2)) for x in arrays)
    return tuple(map(jnp.where, tokens, arrays, zeros))


def _written(x, y, dtype):
    """The sum over the tokens of x_t y_t^T, [B, heads, I, J], float32. Of 16-bit inputs (`dtype`)
    the products are bfloat16's, as in the kernels."""
    if dtype == f32:
        return _exact("bthi,bthj->bhij", x.astype(f32), y.astype(f32))
    x, y = x.astype(bf16), y.astype(bf16)
    return jnp.einsum("bthi,bthj->bhij", x, y, preferred_element_type=f32)


# Kimi Delta Attention: M = prod_t (I - beta_t k_t k_t^T) Diag(exp g_t), a K x K matrix a head.
# Value columns are independent of one another, so M costs what K more of them cost.


def _kda_summary(run, arrays, state, segment_ids, pieces, axis):
    """The state that the run makes of (0 | I) with values (v | 0): (N | M). After q, k and v the
    arrays are those that decays and write strengths are made of."""
    q, k, v, *rest = arrays
    K, V = k.shape[-1], v.shape[-1]
    # Selects, so that all of it varies over the mesh's axes as the arrays do.
    nothing = jnp.where(False, v[..., :1], jnp.zeros((1, 1, 1, K), v.dtype))
    identity = jnp.where(False, state[..., :1], jnp.eye(K, dtype=f32)[None, None])
    start = jnp.concatenate([jnp.where(False, state, 0.0), identity], axis=-1)
    _, end = run(q, k, jnp.concatenate([v, nothing], axis=-1), *rest, start, segment_ids)
    return end[..., V:], end[..., :V]


def _kda_step(state, summary, _):
    factor, term = summary
    return _exact("bhij,bhjv->bhiv", factor, state) + term


KDA = Movement(
    empty=lambda arrays: zero_state(arrays[3][:, 0], arrays[2][:, 0]),
    summary=_kda_summary,
    step=_kda_step,
    rule=True,
)


# Gated Slot Attention: neither state depends on the queries or on the softmax.


def _gsa_summary(run, arrays, state, segment_ids, pieces, axis):
    _, k, v, s, g = arrays
    of_last = _of_last(pieces, segment_ids, k.shape[1], axis)
    after, total = _decays_to_end(g, of_last)
    k, v, s = _only(of_last, k, v, s)
    writes = after * s.astype(f32)
    return total, GSAState(_written(k, writes, k.dtype), _written(writes, v, k.dtype))


def _gsa_step(state, summary, _):
    total, term = summary
    hk = state.hk * total[..., None, :] + term.hk
    return GSAState(hk, total[..., :, None] * state.hv + term.hv)


GSA = Movement(
    empty=lambda arrays: zero_gsa_state(arrays[1][:, 0], arrays[3][:, 0], arrays[2][:, 0]),
    summary=_gsa_summary,
    step=_gsa_step,
)


# MesaNet: one decay for both states.


def _mesa_summary(run, arrays, state, segment_ids, pieces, axis):
    _, k, v, g, beta, _ = arrays
    of_last = _of_last(pieces, segment_ids, k.shape[1], axis)
    after, total = _decays_to_end(g, of_last)
    k, v, beta = (x.astype(f32) for x in _only(of_last, k, v, beta))
    writes = (after * beta)[..., None] * k
    # Exact for 16-bit inputs, too: rounded, kk would not be symmetric.
    return total, MesaState(_written(writes, k, f32), _written(writes, v, f32))


def _mesa_step(state, summary, _):
    total, term = summary
    return jax.tree.map(lambda x, y: total[..., None, None] * x + y, state, term)


MESA_NET = Movement(
    empty=lambda arrays: zero_mesa_state(arrays[1][:, 0], arrays[2][:, 0]),
    summary=_mesa_summary,
    step=_mesa_step,
)


# Log-linear attention, from any position: a piece's tokens go to the levels that their positions
# say, and what entered is merged as later positions see it.


def _log_linear_summary(run, arrays, state, segment_ids, pieces, axis):
    _, k, v, g, _ = arrays
    L = g.shape[1]

    def advance(position, _, links):
        return moved_on(position, links.length)

    position = sequence.entering(advance, (), state.position, pieces, axis)
    start = LogLinearState(jnp.where(False, state.levels, 0.0), position)
    end = alignment.state_after(jnp.full_like(position, L), k, v, g, start, segment_ids)
    return jnp.sum(g, axis=1), end.levels


def _log_linear_step(state, summary, links):
    total, levels = summary
    position = moved_on(state.position, links.length)
    return LogLinearState(alignment.merged_levels(state, total, position) + levels, position)


def _empty_log_linear(arrays):
    _, k, v, _, level_scales = arrays
    return zero_log_linear_state(k[:, 0], v[:, 0], level_scales.shape[-1])


LOG_LINEAR = Movement(empty=_empty_log_linear, summary=_log_linear_summary, step=_log_linear_step)


def is_aligned(L: int, state: LogLinearState | None, segment_ids: SegmentIds | None) -> bool:
    """Whether every piece of L tokens is a node of the tree over the whole sequence."""
    alone = state is None and segment_ids is None
    return alone and not is_symbolic_dim(L) and L & (L - 1) == 0


def aligned_log_linear(
    run: sequence.Run, arrays: tuple[Any, ...], axis: str
) -> tuple[jax.Array, LogLinearState]:
    """Log-linear attention where every piece is a node of the tree: no token moves.

    A piece is run from position 0. Its tokens read the other pieces through the levels above, of
    the tree over the devices: there a device is what a token is below, with the state of all its
    tokens. A run that takes a `node_axis` does so by itself, and returns the levels of the tree
    over devices after the last one, as `device_levels` does.
    """
    arrays = sequence.varying(arrays, axis)
    (B, T), L = arrays[0].shape[:2], arrays[4].shape[-1]
    if lax.axis_size(axis) == 1:
        o, state = run(*arrays, None, None)
        return o, sequence.from_last(state, axis)
    if "node_axis" in inspect.signature(run).parameters:
        o, end = run(*arrays, None, None, node_axis=axis)
    else:
        o, end = _with_other_devices(run, arrays, axis)
    end = jnp.pad(end, [(0, 0), (0, 0), (level_of_devices(T), L), (0, 0), (0, 0)])[:, :, :L]
    position = sequence.varying(jnp.full(B, lax.axis_size(axis) * T, i32), axis)
    return o, sequence.from_last(LogLinearState(end, position), axis)


def level_of_devices(T: int) -> int:
    """The level of a device of T tokens, a node of the tree; those above are its parents'."""
    return (T - 1).bit_length() + 1


def number_of_levels(size: int) -> int:
    """Of so many devices: the levels of others that any of them reads."""
    return (size - 1).bit_length()


def _with_other_devices(run, arrays, axis):
    """The outputs, and the levels of the tree over devices after the last one."""
    q, k, v, g, level_scales = arrays
    (B, T, H, V), HK, K = v.shape, k.shape[2], k.shape[3]
    o, _ = run(*arrays, None, None)

    # The heads of one key head lie side by side, as if they were one.
    values = (_decays_to_end(g)[0][..., None] * v.astype(f32)).reshape(B, T, HK, -1)
    tokens = _written(k, values, k.dtype).reshape(B, HK, K, H // HK, V)
    tokens = jnp.moveaxis(tokens, 3, 2).reshape(B, H, K, V)
    levels, end = device_levels(jnp.sum(g, axis=1), tokens, axis)

    level = level_of_devices(T)
    scales = level_scales[..., level : level + levels.shape[2]].astype(f32)
    weights = jnp.exp(running_sum(g))[..., None] * scales
    return (o.astype(f32) + _read_devices(q, weights, levels)).astype(o.dtype), end


def device_levels(log_decay: jax.Array, state: jax.Array, axis: str) -> tuple[jax.Array, jax.Array]:
    """The levels of the tree over devices that this device reads, and those after the last device.

    Args:
      log_decay: over this device's tokens, [B, H]. state: of them alone, [B, H, ...].

    Returns:
      [B, H, n, ...] each; level m stands for bit m of a device's number.
    """
    # Not together: a kernel that reads the state's gradient would get a part of what is exchanged.
    (states,), (log_decays,) = (sequence.gathered((x,), axis) for x in (state, log_decay))
    size = lax.axis_size(axis)
    here = _levels_at(lax.axis_index(axis), number_of_levels(size), log_decays, states)
    return here, _levels_at(jnp.asarray(size, i32), size.bit_length(), log_decays, states)


def _levels_at(device, number, log_decays, states):
    """The levels, so many of them, before a device; of all devices' [P, B, H] and [P, B, H, ...].

    What later devices have is not selected: it may be NaN.
    """
    one, other = (lax.broadcasted_iota(i32, (states.shape[0],) * 2, i) for i in range(2))
    between = (other > one) & (other < device)
    decays = jnp.where(between[..., None, None], log_decays[None], 0.0).sum(1)
    decays = jnp.exp(decays).reshape(*decays.shape, *[1] * (states.ndim - 2))
    devices, levels = (lax.broadcasted_iota(i32, (len(states), number), i) for i in range(2))
    mine = (devices < device) & (bit_length(devices ^ device) == levels + 1)
    mine = mine.reshape(len(states), 1, 1, number, *[1] * (states.ndim - 3))
    return jnp.where(mine, decays * states[:, :, :, None], 0.0).sum(0)


@jax.checkpoint
def _read_devices(q, weights, levels):
    """What the tokens read of other devices' states, [B, T, H, V] float32: weights [B, T, H, n] and
    levels [B, H, n, K, V]. Of 16-bit queries the products are bfloat16's, as in the kernels."""
    (B, H, n, K, V), (T, HK) = levels.shape, q.shape[1:3]
    product = _exact
    if q.dtype != f32:
        q, levels = q.astype(bf16), levels.astype(bf16)
        product = functools.partial(jnp.einsum, preferred_element_type=bf16)
    # The heads of one key head lie side by side, as if they were one.
    levels = jnp.moveaxis(levels.reshape(B, HK, H // HK, n, K, V), (3, 4), (0, 3))
    read = jnp.zeros((), f32)
    for i in range(n):
        values = product("btjk,bjkv->btjv", q, levels[i].reshape(B, HK, K, -1))
        values = values.reshape(B, T, HK, H // HK, V).reshape(B, T, H, V)
        read = read + weights[..., i, None] * values.astype(f32)
    return read


# ABC's running normaliser, a state of its own.


def abc_gates(
    s: SlotWrites, segment_ids: SegmentIds | None, axis: str
) -> tuple[jax.Array, jax.Array]:
    """ABC's writes and decays of a piece, from its logits; see `jla._core.parts.abc_gates`."""
    s = sequence.varying(s, axis)
    starts = None if segment_ids is None else segment_starts(segment_ids)
    return parts.abc_gates(s, starts, functools.partial(_abc_past, segment_ids, axis))


def _abc_past(segment_ids, axis, z):
    """The logsumexp of ABC's logits that the piece's first token continues, [B, H, M], and whether
    there is one, [B]; z [B, L, H, M] is the running one of the piece alone."""
    B, L = z.shape[:2]

    def step(state, z, _):
        before, there = state
        joined = jnp.where(there[:, None, None], jnp.logaddexp(before, z), z)
        return joined, jnp.ones_like(there)

    nothing = jnp.zeros_like(z[:, 0]), jnp.zeros(B, bool)
    pieces = sequence.links(segment_ids, B, L, axis)
    return sequence.entering(step, z[:, -1], nothing, pieces, axis)
