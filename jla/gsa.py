"""Gated Slot Attention (arXiv 2409.07146)."""

import functools

import jax.numpy as jnp

from jla._core import axes, checking, checks, movement, pools, sequence
from jla._core.states import GSAState
from jla._core.types import (
    Implementation,
    Keys,
    LogDecays,
    Outputs,
    Queries,
    SegmentIds,
    Sizes,
    Slots,
    SlotWrites,
    Values,
)
from jla._dispatch import choose

__all__ = ["GSAState", "gsa", "gsa_step"]

f32 = jnp.float32

HEAD_DIMS = range(16, 513)  # of K, V and M; the kernels take fewer

AXES = axes.GSA
_AXES_OF_STEP = axes.of_step(AXES)


@checks.named
def gsa(
    q: Queries,
    k: Keys,
    v: Values,
    s: SlotWrites,
    g: LogDecays | None = None,
    *,
    scale: float | None = None,
    initial_state: GSAState | None = None,
    segment_ids: SegmentIds | None = None,
    axis_name: str | None = None,
    implementation: Implementation | None = None,
) -> tuple[Outputs, GSAState]:
    """Gated Slot Attention: softmax attention over M slots that forget and are written to.

    Every key/value head keeps the slots' keys Hk [K, M] and values Hv [M, V], zero at first. Token
    by token

        Hk <- Hk Diag(exp g_t) + k_t s_t^T;   p_t = softmax_M(scale Hk^T q_t)
        Hv <- Diag(exp g_t) Hv + s_t v_t^T;   o_t = Hv^T p_t

    With `s = 1 - exp(g)`, as in the paper and in the layer, a slot holds a weighted mean of what
    was written to it; the function takes any s.

    Without `g` it is ABC (Attention with Bounded-memory Control, arXiv 2110.02488). Then `s` holds
    the logits of the writes, and each slot's writes are normalised over its past:

        z_t = log(sum_{i <= t} exp s_i);   g_t = z_{t-1} - z_t;   s_t <- exp(s_t - z_t)

    The first token of a row or segment has `g = 0`. The state does not hold `z`, so ABC neither
    takes an initial state nor decodes token by token.

    Shape letters: `B` batch, `T` time, `HQ` query heads, `H` key/value heads, `K` key dimension,
    `V` value dimension, `M` slots. Query head `j` uses key/value head `j // (HQ // H)`.

    Time is axis 1 and heads are axis 2. Transpose arrays [B, H, T, ...] with `x.swapaxes(1, 2)`: if
    no size disagrees, the two orders cannot be told apart, and nothing is raised.

    Example:
      q = k = v = jnp.ones((2, 8, 4, 16))  # [B, T, H, K]
      g = jnp.full((2, 8, 4, 16), -0.1)  # [B, T, H, M]
      o, state = jla.gsa(q, k, v, 1 - jnp.exp(g), g)  # [2, 8, 4, 16]

    Args:
      q: queries, [B, T, HQ, K], bfloat16, float16 or float32; HQ is a multiple of H, K is 16 to
        512.
      k: keys, [B, T, H, K], of q's dtype.
      v: values, [B, T, H, V], of q's dtype; V is 16 to 512.
      s: what is written to each slot, [B, T, H, M], float32 or q's dtype; used in float32. M is 16
        to 512.
      g: natural-log decays, [B, T, H, M], float32, `g <= 0`; None for ABC.
      scale: factor of the slots' logits, a Python number; `K**-0.5` if None.
      initial_state: the state before the first token, `GSAState(hk, hv)`, [B, H, K, M] and
        [B, H, M, V], float32; zeros if None. With `segment_ids` it belongs to each row's first
        segment. With an axis of segments after the batch, [B, N, ...], segment n starts from its
        row's state n.
      segment_ids: integers [B, T]: equal neighbours are one segment, and nothing crosses a border.
        With an axis of segments in the state they are 0 to N - 1, each in one place of its row, or
        -1 for padding: no state is read or written there, and the output is zero. Others raise
        outside of jit, and inside count as -1; an id in two places has no meaning inside jit.
      axis_name: inside `jax.shard_map`, the manual axis of the mesh that T is split over: each
        device has the next T / P tokens. `initial_state` and the state returned are the same on all
        of them. None: T is whole. `jla.sharded` takes whole arrays.
      implementation: "reference" (a scan over tokens, float32), "xla" (chunkwise, any device),
        "pallas" (kernels for Hopper GPUs; K and V up to 256, up to 128 slots, no float32), "triton"
        (kernels for NVIDIA GPUs from Ampere on, with the extra jla[triton]; K, V and M up to 256),
        or None for the first of "pallas", "triton" and "xla" that supports these arguments here.

    Returns:
      The outputs, [B, T, HQ, V], of v's dtype, and the `GSAState` after the last token (with
      `segment_ids`, of each row's last segment). With an axis of segments, [B, N, ...]: what each
      segment left, or what it was given where a row has no such one.

    Raises:
      TypeError: an argument is no array or has a dtype that is not listed here, or `initial_state`
        is no `GSAState`.
      ValueError: shapes that disagree, K, V or M outside 16 to 512, `initial_state` without `g`, an
        unknown implementation.
      NotImplementedError: the named implementation cannot do this; the message says what can.
    """
    if initial_state is not None:
        if g is None:
            raise ValueError(
                "initial_state must be None without g (ABC): its running normaliser starts with "
                "the row; give g, or no initial_state"
            )
        checks.check_state("initial_state", initial_state, GSAState)
    optional = checks.given(g=g, initial_state=initial_state, segment_ids=segment_ids)
    table = checks.axes_of_run(AXES, initial_state, segment_ids, axis_name)
    sizes = checks.check_axes(table, q=q, k=k, v=v, s=s, **optional)
    if initial_state is not None:
        checks.check_state_dtypes("initial_state", initial_state)
    if segment_ids is not None:
        checks.check_segment_ids(segment_ids, sizes)
    if axis_name is not None:
        sequence.devices_of(axis_name)
    scale = _check_common(q, k, v, s, g, sizes, scale)
    checking.values("jla.gsa", q=q, k=k, v=v, s=s, g=g, initial_state=initial_state)
    chosen = choose("gsa", implementation, q, k, v, s, g)
    run = functools.partial(chosen, scale=scale)
    if axis_name is None:
        return run(q, k, v, s, g, initial_state, segment_ids)
    if g is None:
        s, g = movement.abc_gates(s, segment_ids, axis_name)
    arrays = q, k, v, s, g
    return sequence.by_states(run, movement.GSA, arrays, initial_state, segment_ids, axis_name)


@checks.named
def gsa_step(
    q: Queries,
    k: Keys,
    v: Values,
    s: SlotWrites,
    g: LogDecays,
    state: GSAState,
    *,
    scale: float | None = None,
    slots: Slots | None = None,
    implementation: Implementation | None = None,
) -> tuple[Outputs, GSAState]:
    """One token of `jla.gsa`, for decoding: `T` steps are one run over `T` tokens.

    Example:
      q = k = v = jnp.ones((2, 4, 16))
      g = jnp.full((2, 4, 32), -0.1)  # 32 slots
      state = jla.GSAState(jnp.zeros((2, 4, 16, 32)), jnp.zeros((2, 4, 32, 16)))
      o, state = jla.gsa_step(q, k, v, 1 - jnp.exp(g), g, state)  # [2, 4, 16]

    Args:
      q: query, [B, HQ, K], bfloat16, float16 or float32.
      k: key, [B, H, K], of q's dtype.
      v: value, [B, H, V], of q's dtype.
      s: writes, [B, H, M], float32 or q's dtype.
      g: natural-log decays, [B, H, M], float32, `g <= 0`. ABC (no g) has no step.
      state: `GSAState(hk, hv)`, [B, H, K, M] and [B, H, M, V], float32: what `gsa` or the last step
        returned. Donate it to jit, and it is updated in place.
      scale: as in `gsa`.
      slots: None, or int32 [B]: `state` is then a pool of R rows, [R, H, K, M] and [R, H, M, V],
        and row i starts from the state in row `slots[i]` and writes there. -1 is a row without a
        sequence: its output is zero, and nothing is written. All else of the pool stays as it is;
        see docs/pools.md.
      implementation: as in `gsa`.

    Returns:
      The output, [B, HQ, V], of v's dtype, and the new `GSAState`; with slots the whole pool.

    Raises:
      TypeError, ValueError, NotImplementedError: as `gsa`. ValueError: slots that are known and
        equal, or outside -1 to R - 1.
    """
    if g is None:  # pyright: ignore[reportUnnecessaryComparison]
        raise TypeError(
            "g must be an array [B, H, M], got None: ABC has no step, for its running normaliser "
            "is not in the state"
        )
    checks.check_state("state", state, GSAState)
    sizes = pools.check_axes(_AXES_OF_STEP, slots, q=q, k=k, v=v, s=s, g=g, state=state)
    checks.check_state_dtypes("state", state)
    scale = _check_common(q, k, v, s, g, sizes, scale)
    checking.values("jla.gsa_step", q=q, k=k, v=v, s=s, g=g, state=state, slots=slots)
    on_pool = checks.given(slots=slots)
    run = choose("gsa_step", implementation, q, k, v, s, g, **on_pool)
    return run(q, k, v, s, g, state, scale=scale, **on_pool)


def _check_common(
    q: Queries,
    k: Keys,
    v: Values,
    s: SlotWrites,
    g: LogDecays | None,
    sizes: Sizes,
    scale: float | None,
) -> float:
    """Checks what the run and the step share; returns the scale."""
    checks.check_same_dtype(q=q, k=k, v=v)
    checks.check_dtype("s", s, [f32, q.dtype])
    if g is not None:
        checks.check_dtype("g", g, [f32])
    for letter in "KVM":
        checks.check_head_dim(letter, sizes[letter], HEAD_DIMS)
    checks.check_multiple("HQ", sizes["HQ"], "H", sizes["H"])
    return checks.check_scale(scale, sizes["K"] ** -0.5)
