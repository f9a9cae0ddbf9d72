"""Log-linear attention (arXiv 2506.04761)."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jla._core import axes, checking, checks, movement, pools, sequence
from jla._core.lengths import is_symbolic_dim
from jla._core.states import LazyLogLinearState, LogLinearState
from jla._core.types import (
    Implementation,
    Keys,
    LevelScales,
    LogDecays,
    NumpyArray,
    Outputs,
    Queries,
    SegmentIds,
    Sizes,
    Slots,
    Values,
)
from jla._dispatch import choose

__all__ = ["LazyLogLinearState", "LogLinearState", "log_linear_attention", "log_linear_step"]

f32 = jnp.float32

AXES = axes.LOG_LINEAR
_AXES_OF_BOTH = {**AXES, **axes.LAZY_LOG_LINEAR}
_AXES_OF_STEP = axes.of_step(_AXES_OF_BOTH)


@checks.named
def log_linear_attention(
    q: Queries,
    k: Keys,
    v: Values,
    g: LogDecays,
    level_scales: LevelScales,
    *,
    initial_state: LogLinearState | LazyLogLinearState | None = None,
    segment_ids: SegmentIds | None = None,
    axis_name: str | None = None,
    implementation: Implementation | None = None,
) -> tuple[Outputs, LogLinearState]:
    """Log-linear attention: linear attention that weighs its past by how long ago it was.

    Position t, counted from 0, sees its past in the buckets of a Fenwick tree. Level 0 is t itself;
    level l >= 1 exists where bit l - 1 of t is set, and holds the `2**(l-1)` positions that end
    just before t with its l - 1 lowest bits cleared. So the level of an earlier position s is 1
    plus the highest bit in which s and t differ.

        o_t = sum_l level_scales[t, l] sum_{s in bucket_l(t)} exp(G_t - G_s) (q_t . k_s) v_s
        G_t = sum_{i <= t} g_i

    Token by token, each level has a state S_l [K, V]:

        S_l <- exp(g_t) S_l, l >= 1;   S_0 = k_t v_t^T
        o_t = sum_l level_scales[t, l] S_l^T q_t
        S_{n+1} <- S_0 + ... + S_n;    S_0, ..., S_n <- 0

    where n is the number of trailing ones in t (level n + 1 was empty).

    Shape letters: `B` batch, `T` time, `H` heads, `HK` key heads, `K` key dimension, `V` value
    dimension, `L` levels. Head `j` uses key head `j // (H // HK)`; `HK = 1` is Mamba-2's layout.

    Time is axis 1 and heads are axis 2. Transpose arrays [B, H, T, ...] with `x.swapaxes(1, 2)`: if
    no size disagrees, the two orders cannot be told apart, and nothing is raised.

    Example:
      q = k = jnp.ones((2, 8, 1, 16))  # [B, T, HK, K]
      v, g = jnp.ones((2, 8, 4, 16)), jnp.full((2, 8, 4), -0.1)
      scales = jnp.ones((2, 8, 4, 15))  # 15 levels serve 16384 tokens
      o, state = jla.log_linear_attention(q, k, v, g, scales)  # [2, 8, 4, 16]

    Args:
      q: queries, [B, T, HK, K], bfloat16, float16 or float32; H is a multiple of HK, K is 16 to
        256.
      k: keys, [B, T, HK, K], of q's dtype.
      v: values, [B, T, H, V], of q's dtype; V is 16 to 256.
      g: natural-log decays, [B, T, H], float32, `g <= 0`.
      level_scales: the weight of every level, [B, T, H, L], float32 or q's dtype, of any sign; used
        in float32. L is at least `ceil(log2 T) + 1` and at most 32. L levels serve the positions
        below `2**(L-1)`.
      initial_state: the state before the first token, `LogLinearState(levels, position)`,
        [B, H, L, K, V], float32, and [B], int32; or a `LazyLogLinearState`, which steps left;
        empty, at position 0, if None. With `segment_ids` it belongs to each row's first segment.
        Every later segment begins at position 0. With an axis of segments after the batch,
        [B, N, ...] and positions [B, N], segment n starts from its row's state n.
      segment_ids: integers [B, T]: equal neighbours are one segment, and nothing crosses a border.
        With an axis of segments in the state they are 0 to N - 1, each in one place of its row, or
        -1 for padding: no state is read or written there, and the output is zero. Others raise
        outside of jit, and inside count as -1; an id in two places has no meaning inside jit.
      axis_name: inside `jax.shard_map`, the manual axis of the mesh that T is split over: each
        device has the next T / P tokens. `initial_state` and the state returned are the same on all
        of them. None: T is whole. `jla.sharded` takes whole arrays.
      implementation: "reference" (a scan over tokens, float32), "xla" (chunkwise, any device),
        "pallas" (kernels for Hopper GPUs), "triton" (kernels for NVIDIA GPUs from Ampere on, with
        the extra jla[triton]), or None for the first of "pallas", "triton" and "xla" that supports
        these arguments here.

    Returns:
      The outputs, [B, T, H, V], of v's dtype, and the `LogLinearState` after the last token (with
      `segment_ids`, of each row's last segment). L levels hold no state of `2**(L-1)` tokens: after
      a run of so many its levels are zeros, and its position says that every further output is NaN.
      After more tokens its levels are NaN, too, row by row. With an axis of segments, [B, N, ...]:
      what each segment left, or what it was given where a row has no such one.

    Raises:
      TypeError: an argument is no array or has a dtype that is not listed here, or `initial_state`
        is no `LogLinearState`.
      ValueError: shapes that disagree, K or V outside 16 to 256, too few levels for T or, from an
        initial state, for the positions that come, an unknown implementation. Where the position is
        traced (under `jit`), a segment may end in time, or T is symbolic (`jax.export`), no error
        can be raised: the outputs at positions from `2**(L-1)` on are NaN.
      NotImplementedError: the named implementation cannot do this; the message says what can.
    """
    if initial_state is not None:
        _check_kind("initial_state", initial_state)
    optional = checks.given(initial_state=initial_state, segment_ids=segment_ids)
    table = checks.axes_of_run(_AXES_OF_BOTH, initial_state, segment_ids, axis_name)
    sizes = checks.check_axes(table, q=q, k=k, v=v, g=g, level_scales=level_scales, **optional)
    if segment_ids is not None:
        checks.check_segment_ids(segment_ids, sizes)
    _check_common(q, k, v, g, level_scales, sizes)
    L, devices = sizes["L"], 1 if axis_name is None else sequence.devices_of(axis_name)
    T = devices * sizes["T"]
    least = 1 if is_symbolic_dim(T) else (T - 1).bit_length() + 1
    if L < least:
        raise ValueError(
            f"level_scales has L = {L} levels, but T = {T} tokens need at least {least}, "
            "ceil(log2 T) + 1"
        )
    if initial_state is not None:
        fits_alone = segment_ids is not None or is_symbolic_dim(T)
        tokens = 1 if fits_alone else devices * sizes["T"]
        if "N" in sizes and checks.known(segment_ids):
            mine = np.asarray(segment_ids)[..., None] == np.arange(sizes["N"])
            tokens = mine.sum(axis=1)
        _check_state("initial_state", initial_state, L, tokens)
    checking.values(
        "jla.log_linear_attention",
        q=q,
        k=k,
        v=v,
        g=g,
        level_scales=level_scales,
        initial_state=initial_state,
    )
    if isinstance(initial_state, LazyLogLinearState):
        settled = LazyLogLinearState.settled
        initial_state = (jax.vmap(settled) if "N" in sizes else settled)(initial_state)
    run = choose("log_linear_attention", implementation, q, k, v, g, level_scales)
    if axis_name is None:
        return run(q, k, v, g, level_scales, initial_state, segment_ids)
    arrays = q, k, v, g, level_scales
    if movement.is_aligned(sizes["T"], initial_state, segment_ids):
        return movement.aligned_log_linear(run, arrays, axis_name)
    moves = movement.LOG_LINEAR
    return sequence.by_states(run, moves, arrays, initial_state, segment_ids, axis_name)


@checks.named
def log_linear_step[State: (LogLinearState, LazyLogLinearState)](
    q: Queries,
    k: Keys,
    v: Values,
    g: LogDecays,
    level_scales: LevelScales,
    state: State,
    *,
    slots: Slots | None = None,
    implementation: Implementation | None = None,
) -> tuple[Outputs, State]:
    """One token of `jla.log_linear_attention`, for decoding: `T` steps are one run.

    A step is about as long as what it moves. Of a `LogLinearState` it reads and writes all levels
    in use; of a lazy one it reads them and writes one.

    Example:
      q = k = jnp.ones((2, 1, 16))
      v, g = jnp.ones((2, 4, 16)), jnp.full((2, 4), -0.1)
      state = jla.LogLinearState(jnp.zeros((2, 4, 15, 16, 16)), jnp.zeros(2, jnp.int32)).lazy()
      o, state = jla.log_linear_step(q, k, v, g, jnp.ones((2, 4, 15)), state)  # [2, 4, 16]

    Args:
      q: query, [B, HK, K], bfloat16, float16 or float32.
      k: key, [B, HK, K], of q's dtype.
      v: value, [B, H, V], of q's dtype.
      g: natural-log decays, [B, H], float32, `g <= 0`.
      level_scales: [B, H, L], float32 or q's dtype; L is 1 to 32.
      state: `LogLinearState(levels, position)`, [B, H, L, K, V], float32, and [B], int32: what
        `log_linear_attention` or the last step returned; or `LazyLogLinearState(levels, position,
        log_decays)`, the last [B, H, L], float32: what `.lazy()` of it is, or the last step
        returned. Donate it to jit, and it is updated in place.
      slots: None, or int32 [B]: `state` is then a pool of R rows, [R, H, L, K, V] and so on, and
        row i starts from the state in row `slots[i]` and writes there. -1 is a row without a
        sequence: its output is zero, and nothing is written. All else of the pool stays as it is;
        see docs/pools.md.
      implementation: as in `log_linear_attention`.

    Returns:
      The output, [B, H, V], of v's dtype, and the new state, of the kind given; with slots the
      whole pool.

    Raises:
      TypeError, ValueError, NotImplementedError: as `log_linear_attention`. Rows whose position L
        levels do not serve raise, or are NaN where the position is traced. ValueError: slots that
        are known and equal, or outside -1 to R - 1.
    """
    _check_kind("state", state)
    given: dict[str, Any] = dict(q=q, k=k, v=v, g=g, level_scales=level_scales, state=state)
    sizes = pools.check_axes(_AXES_OF_STEP, slots, **given)
    _check_common(q, k, v, g, level_scales, sizes)
    _check_state("state", state, sizes["L"], 1, slots)
    checking.values("jla.log_linear_step", **given, slots=slots)
    on_pool = checks.given(slots=slots)
    run = choose("log_linear_step", implementation, q, k, v, g, level_scales, **on_pool)
    return run(q, k, v, g, level_scales, state, **on_pool)


def _check_common(
    q: Queries, k: Keys, v: Values, g: LogDecays, level_scales: LevelScales, sizes: Sizes
) -> None:
    """Checks what the run and the step share."""
    checks.check_same_dtype(q=q, k=k, v=v)
    checks.check_dtype("g", g, [f32])
    checks.check_dtype("level_scales", level_scales, [f32, q.dtype])
    checks.check_head_dim("K", sizes["K"])
    checks.check_head_dim("V", sizes["V"])
    checks.check_multiple("H", sizes["H"], "HK", sizes["HK"])
    if sizes["L"] > 32:
        raise ValueError(
            f"level_scales must have at most L = 32 levels (positions are int32), got {sizes['L']}"
        )


def _check_kind(name: str, state: object) -> None:
    """Raises TypeError unless it is a state, lazy or not."""
    if not isinstance(state, LazyLogLinearState):
        checks.check_state(name, state, LogLinearState)


def _check_state(
    name: str,
    state: LogLinearState | LazyLogLinearState,
    L: int,
    T: int | NumpyArray,
    slots: Slots | None = None,
) -> None:
    """Checks a state's dtypes, and, where its positions are known, that T tokens more fit, if there
    are any; T is an integer or an array like the position."""
    if isinstance(state, LazyLogLinearState):
        checks.check_dtype(f"{name}.log_decays", state.log_decays, [f32])
    checks.check_dtype(f"{name}.levels", state.levels, [f32])
    checks.check_dtype(f"{name}.position", state.position, [jnp.int32])
    position = state.position
    if not checks.known(position):
        return
    position = pools.row_values(position, slots)
    if not position.size:
        return
    position = np.where(np.asarray(T) > 0, position.astype(np.int64), 0)
    if position.min() < 0:
        raise ValueError(f"{name}.position must not be negative, got {position.min()}")
    last = int((position + T).max()) - 1
    if last >> (L - 1):
        raise ValueError(
            f"{name}.position is {position.max()}, so that the tokens reach position {last}, but "
            f"level_scales with L = {L} levels serve the positions below 2**(L-1) = {2 ** (L - 1)}"
        )
