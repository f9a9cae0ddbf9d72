"""Kimi Delta Attention (arXiv 2510.26692)."""

import functools

import jax
import jax.numpy as jnp

from jla._core import axes, checking, checks, movement, pools, sequence
from jla._core.parts import kda_decays
from jla._core.types import (
    Array,
    GateBiases,
    GateRates,
    Implementation,
    KDAState,
    Keys,
    LogDecays,
    NumpyArray,
    Outputs,
    Queries,
    RawGates,
    SegmentIds,
    Sizes,
    Slots,
    Strengths,
    Values,
)
from jla._dispatch import choose

__all__ = ["kda", "kda_gate", "kda_step"]

f32 = jnp.float32

AXES = axes.KDA
_AXES_OF_STEP = axes.of_step(AXES)


@checks.named
def kda(
    q: Queries,
    k: Keys,
    v: Values,
    g: LogDecays,
    beta: Strengths,
    *,
    scale: float | None = None,
    initial_state: KDAState | NumpyArray | None = None,
    segment_ids: SegmentIds | None = None,
    axis_name: str | None = None,
    implementation: Implementation | None = None,
) -> tuple[Outputs, KDAState]:
    """Kimi Delta Attention: the delta rule with one decay per key channel.

    Every value head keeps a state S [K, V], zero at first. Token by token

        S <- Diag(exp g_t) S
        S <- S + beta_t k_t (v_t - S^T k_t)^T
        o_t = scale S^T q_t

    Normalise `q` and `k` first (the layer does, with the l2 norm), and make `g` with
    `jla.kda_gate`. With `|k| = 1` and `0 <= beta <= 1` the state cannot grow; `beta` up to 2 allows
    negative eigenvalues.

    Shape letters: `B` batch, `T` time, `H` key heads, `HV` value heads, `K` key dimension, `V`
    value dimension. Value head `j` uses key head `j // (HV // H)`.

    Time is axis 1 and heads are axis 2. Transpose arrays [B, H, T, ...] with `x.swapaxes(1, 2)`: if
    no size disagrees, the two orders cannot be told apart, and nothing is raised.

    Example:
      q = k = jnp.full((2, 8, 4, 16), 0.25)  # [B, T, H, K], rows of length 1
      v, g = jnp.ones((2, 8, 4, 16)), jnp.full((2, 8, 4, 16), -0.1)
      o, state = jla.kda(q, k, v, g, beta=jnp.ones((2, 8, 4)))  # [2, 8, 4, 16], [2, 4, 16, 16]

    Args:
      q: queries, [B, T, H, K], bfloat16, float16 or float32. K is 16 to 256.
      k: keys, [B, T, H, K], of q's dtype.
      v: values, [B, T, HV, V], of q's dtype; HV is a multiple of H, V is 16 to 256.
      g: natural-log decays, [B, T, HV, K], float32, `g <= 0`.
      beta: write strengths, [B, T, HV], float32 or q's dtype; used in float32.
      scale: factor of the output, a Python number; `K**-0.5` if None.
      initial_state: the state before the first token, [B, HV, K, V], float32; zeros if None. With
        `segment_ids` it belongs to each row's first segment. With an axis of segments,
        [B, N, HV, K, V], segment n starts from its row's state n.
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
      The outputs, [B, T, HV, V], of v's dtype, and the state after the last token, [B, HV, K, V],
      float32 (with `segment_ids`, of each row's last segment). With an axis of segments,
      [B, N, HV, K, V]: what each segment left, or what it was given where a row has no such one.

    Raises:
      TypeError: an argument is no array or has a dtype that is not listed here.
      ValueError: shapes that disagree, a head dimension outside 16 to 256, an unknown
        implementation.
      NotImplementedError: the named implementation cannot do this; the message says what can.
    """
    optional = checks.given(initial_state=initial_state, segment_ids=segment_ids)
    table = checks.axes_of_run(AXES, initial_state, segment_ids, axis_name)
    sizes = checks.check_axes(table, q=q, k=k, v=v, g=g, beta=beta, **optional)
    if initial_state is not None:
        checks.check_dtype("initial_state", initial_state, [f32])
    if segment_ids is not None:
        checks.check_segment_ids(segment_ids, sizes)
    if axis_name is not None:
        sequence.devices_of(axis_name)
    scale = _check_common(q, k, v, g, beta, sizes, scale)
    _check_values("jla.kda", q, k, v, g, beta, initial_state=initial_state)
    chosen = choose("kda", implementation, q, k, v, g, beta)
    run = functools.partial(chosen, scale=scale)
    if axis_name is None:
        return run(q, k, v, g, beta, initial_state, segment_ids)
    arrays = q, k, v, g, beta
    return sequence.by_states(run, movement.KDA, arrays, initial_state, segment_ids, axis_name)


@checks.named
def kda_step(
    q: Queries,
    k: Keys,
    v: Values,
    g: LogDecays,
    beta: Strengths,
    state: KDAState | NumpyArray,
    *,
    scale: float | None = None,
    slots: Slots | None = None,
    implementation: Implementation | None = None,
) -> tuple[Outputs, KDAState]:
    """One token of `jla.kda`, for decoding: `T` steps are one run over `T` tokens.

    Example:
      q = k = jnp.full((2, 4, 16), 0.25)
      v, g, beta = jnp.ones((2, 4, 16)), jnp.full((2, 4, 16), -0.1), jnp.ones((2, 4))
      state = jnp.zeros((2, 4, 16, 16))
      o, state = jla.kda_step(q, k, v, g, beta, state)  # [2, 4, 16], [2, 4, 16, 16]

    Args:
      q: query, [B, H, K], bfloat16, float16 or float32.
      k: key, [B, H, K], of q's dtype.
      v: value, [B, HV, V], of q's dtype.
      g: natural-log decays, [B, HV, K], float32, `g <= 0`.
      beta: write strengths, [B, HV], float32 or q's dtype.
      state: [B, HV, K, V], float32: what `kda` or the last step returned. Donate it to jit, and it
        is updated in place.
      scale: as in `kda`.
      slots: None, or int32 [B]: `state` is then a pool of R rows, [R, HV, K, V], and row i goes on
        from `state[slots[i]]` and writes there. -1 is a row without a sequence: its output is zero,
        and nothing is written. All else of the pool stays as it is; see docs/pools.md.
      implementation: as in `kda`.

    Returns:
      The output, [B, HV, V], of v's dtype, and the new state, [B, HV, K, V], float32; with
      slots the whole pool.

    Raises:
      TypeError, ValueError, NotImplementedError: as `kda`. ValueError: slots that are known and
        equal, or outside -1 to R - 1.
    """
    sizes = pools.check_axes(_AXES_OF_STEP, slots, q=q, k=k, v=v, g=g, beta=beta, state=state)
    checks.check_dtype("state", state, [f32])
    scale = _check_common(q, k, v, g, beta, sizes, scale)
    _check_values("jla.kda_step", q, k, v, g, beta, state=state, slots=slots)
    on_pool = checks.given(slots=slots)
    run = choose("kda_step", implementation, q, k, v, g, beta, **on_pool)
    return run(q, k, v, g, beta, state, scale=scale, **on_pool)


def _check_common(
    q: Queries,
    k: Keys,
    v: Values,
    g: LogDecays,
    beta: Strengths,
    sizes: Sizes,
    scale: float | None,
) -> float:
    """Checks what the run and the step share; returns the scale."""
    checks.check_same_dtype(q=q, k=k, v=v)
    checks.check_dtype("g", g, [f32])
    checks.check_dtype("beta", beta, [f32, q.dtype])
    checks.check_head_dim("K", sizes["K"])
    checks.check_head_dim("V", sizes["V"])
    checks.check_multiple("HV", sizes["HV"], "H", sizes["H"])
    return checks.check_scale(scale, sizes["K"] ** -0.5)


def _check_values(
    name: str,
    q: Queries,
    k: Keys,
    v: Values,
    g: LogDecays,
    beta: Strengths,
    **state: Array | None,
) -> None:
    checking.values(name, unit="k", most_beta=2, q=q, k=k, v=v, g=g, beta=beta, **state)


@checks.named
def kda_gate(
    g: RawGates, A_log: GateRates, dt_bias: GateBiases, *, lower_bound: float | None = None
) -> jax.Array:
    """Makes KDA's natural-log decays from a layer's decay projection, in float32:

        -exp(A_log) softplus(g + dt_bias)
        lower_bound sigmoid(exp(A_log) (g + dt_bias))      with a lower bound

    Example:
      f = jnp.ones((2, 8, 4, 16))  # [B, T, HV, K], a layer's projection
      A_log, dt_bias = jnp.zeros(4), jnp.zeros((4, 16))
      g = jla.kda_gate(f, A_log, dt_bias)  # [2, 8, 4, 16]
      g = jla.kda_gate(f, A_log, dt_bias, lower_bound=-5.0)  # -5 to 0

    Args:
      g: the projection, [..., HV, K], any supported float dtype.
      A_log: [HV], float32.
      dt_bias: [HV, K], float32.
      lower_bound: None, or a negative Python number: the strongest log decay a token can have.

    Returns:
      float32 decays of g's shape, all `<= 0`.

    Raises:
      TypeError: a dtype that is not listed here, or a `lower_bound` that is no number.
      ValueError: shapes that disagree, or a `lower_bound` that is not negative.
    """
    leading = " ".join(f"axis{i}" for i in range(jnp.ndim(g) - 2))
    checks.check_shapes(g=(g, f"{leading} HV K"), A_log=(A_log, "HV"), dt_bias=(dt_bias, "HV K"))
    checks.check_dtype("g", g, checks.FLOAT_DTYPES)
    checks.check_dtype("A_log", A_log, [f32])
    checks.check_dtype("dt_bias", dt_bias, [f32])
    if lower_bound is not None:
        lower_bound = checks.check_negative("lower_bound", lower_bound)
    return kda_decays(g, A_log, dt_bias, lower_bound)
