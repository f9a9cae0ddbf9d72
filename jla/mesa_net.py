"""MesaNet (arXiv 2506.05233)."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jla._core import axes, checking, checks, movement, pools, sequence
from jla._core.states import MesaState
from jla._core.types import (
    Implementation,
    Keys,
    LogDecays,
    Outputs,
    Queries,
    Ridge,
    SegmentIds,
    Sizes,
    Slots,
    Strengths,
    Values,
    jitted,
)
from jla._dispatch import choose

__all__ = ["MesaState", "mesa_net", "mesa_step"]

f32 = jnp.float32

AXES = axes.MESA_NET
_AXES_OF_STEP = axes.of_step(AXES)


@checks.named
def mesa_net(
    q: Queries,
    k: Keys,
    v: Values,
    g: LogDecays,
    beta: Strengths,
    lamb: Ridge,
    *,
    cg_steps: int = 30,
    initial_state: MesaState | None = None,
    segment_ids: SegmentIds | None = None,
    axis_name: str | None = None,
    implementation: Implementation | None = None,
) -> tuple[Outputs, MesaState]:
    """MesaNet: every token reads the ridge regression of the past values on the past keys.

    Every head keeps Hkk [K, K] and Hkv [K, V], zero at first. Token by token

        Hkk <- exp(g_t) Hkk + beta_t k_t k_t^T;   Hkv <- exp(g_t) Hkv + beta_t k_t v_t^T
        x_t = (Hkk + Diag(lamb))^-1 q_t;          o_t = Hkv^T x_t

    Normalise `q` and `k` first (the layer does, with the l2 norm).

    "reference" solves exactly. The others run conjugate gradients in float32, from zero, with
    Diag(lamb) as preconditioner. A token stops when its own residual r is small,

        sqrt(sum(r**2 / lamb)) <= tol sqrt(sum(q_t**2 / lamb)),

    or after `cg_steps` iterations; tol is 1e-6 for float32 inputs, and for bfloat16 and float16 it
    is 1e-4 in "xla", 5e-4 in "pallas" and "triton". No token's result depends on where its
    neighbours stop. Gradients are those of the solution (by the implicit function theorem), not of
    the iterations: they take one more solve with the same matrix and the same `cg_steps`.
    docs/mesa_net.md measures the error that remains.

    "pallas" holds `k_t / sqrt(lamb)` and `v_t` in float16, whatever the inputs' dtype: elements
    beyond 65504 in magnitude become 65504 there, and elements below 6e-5 keep fewer digits, below
    3e-8 none. "triton" does so with the keys, for 16-bit inputs. "xla" has float32's range.
    docs/mesa_net.md says more.

    The matrix must be positive definite: every `lamb` above zero, every `beta` at least zero, and
    `initial_state.kk` symmetric without negative eigenvalues. Outside of jit and other
    transformations, a `lamb` that is not above zero raises. Inside, all outputs of its head are
    NaN, and all gradients through them, in every implementation; the head's state does not depend
    on `lamb` and is right, and so are the other heads. A negative `beta` or eigenvalue is not
    detected (`jla.checking` finds a negative `beta`): the outputs then have no meaning.

    Shape letters: `B` batch, `T` time, `H` heads, `K` key dimension, `V` value dimension.

    Time is axis 1 and heads are axis 2. Transpose arrays [B, H, T, ...] with `x.swapaxes(1, 2)`: if
    no size disagrees, the two orders cannot be told apart, and nothing is raised.

    Example:
      q = k = jnp.full((2, 8, 4, 16), 0.25)  # [B, T, H, K], rows of length 1
      v, g = jnp.ones((2, 8, 4, 16)), jnp.full((2, 8, 4), -0.1)
      beta, lamb = jnp.ones((2, 8, 4)), jnp.ones((4, 16))
      o, state = jla.mesa_net(q, k, v, g, beta, lamb)  # [2, 8, 4, 16]

    Args:
      q: queries, [B, T, H, K], bfloat16, float16 or float32. K is 16 to 256.
      k: keys, [B, T, H, K], of q's dtype.
      v: values, [B, T, H, V], of q's dtype; V is 16 to 256.
      g: natural-log decays, [B, T, H], float32, `g <= 0`.
      beta: write strengths, [B, T, H], float32 or q's dtype, `beta >= 0`; used in float32.
      lamb: the regression's ridge, [H, K], float32, `lamb > 0`. The smaller it is beside the
        eigenvalues of Hkk, the more iterations it takes.
      cg_steps: the most iterations of conjugate gradients, a Python integer of at least 1;
        "reference" ignores it.
      initial_state: the state before the first token, `MesaState(kk, kv)`, [B, H, K, K] and
        [B, H, K, V], float32; zeros if None. With `segment_ids` it belongs to each row's first
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
        "pallas" (kernels for Hopper GPUs), "triton" (kernels for NVIDIA GPUs from Ampere on, with
        the extra jla[triton]), or None for the first of "pallas", "triton" and "xla" that supports
        these arguments here.

    Returns:
      The outputs, [B, T, H, V], of v's dtype, and the `MesaState` after the last token (with
      `segment_ids`, of each row's last segment). With an axis of segments, [B, N, ...]: what each
      segment left, or what it was given where a row has no such one.

    Raises:
      TypeError: an argument is no array or has a dtype that is not listed here, `initial_state` is
        no `MesaState`, or `cg_steps` no integer.
      ValueError: shapes that disagree, K or V outside 16 to 256, `cg_steps` below 1, a `lamb` that
        is not positive (outside of jit), an unknown implementation.
      NotImplementedError: the named implementation cannot do this; the message says what can.
    """
    if initial_state is not None:
        checks.check_state("initial_state", initial_state, MesaState)
    optional = checks.given(initial_state=initial_state, segment_ids=segment_ids)
    table = checks.axes_of_run(AXES, initial_state, segment_ids, axis_name)
    sizes = checks.check_axes(table, q=q, k=k, v=v, g=g, beta=beta, lamb=lamb, **optional)
    if initial_state is not None:
        checks.check_state_dtypes("initial_state", initial_state)
    if segment_ids is not None:
        checks.check_segment_ids(segment_ids, sizes)
    if axis_name is not None:
        sequence.devices_of(axis_name)
    cg_steps = _check_common(q, k, v, g, beta, lamb, sizes, cg_steps)
    checking.values(
        "jla.mesa_net", q=q, k=k, v=v, g=g, beta=beta, lamb=lamb, initial_state=initial_state
    )
    chosen = choose("mesa_net", implementation, q, k, v, g, beta, lamb)
    run = functools.partial(chosen, cg_steps=cg_steps)
    lamb = _nan_unless_positive(lamb)
    if axis_name is None:
        return run(q, k, v, g, beta, lamb, initial_state, segment_ids)
    arrays = q, k, v, g, beta, lamb
    return sequence.by_states(run, movement.MESA_NET, arrays, initial_state, segment_ids, axis_name)


@checks.named
def mesa_step(
    q: Queries,
    k: Keys,
    v: Values,
    g: LogDecays,
    beta: Strengths,
    lamb: Ridge,
    state: MesaState,
    *,
    cg_steps: int = 30,
    slots: Slots | None = None,
    implementation: Implementation | None = None,
) -> tuple[Outputs, MesaState]:
    """One token of `jla.mesa_net`, for decoding: `T` steps are one run over `T` tokens.

    Example:
      q = k = jnp.full((2, 4, 16), 0.25)
      v, g, beta = jnp.ones((2, 4, 16)), jnp.full((2, 4), -0.1), jnp.ones((2, 4))
      state = jla.MesaState(jnp.zeros((2, 4, 16, 16)), jnp.zeros((2, 4, 16, 16)))
      o, state = jla.mesa_step(q, k, v, g, beta, jnp.ones((4, 16)), state)  # [2, 4, 16]

    Args:
      q: query, [B, H, K], bfloat16, float16 or float32.
      k: key, [B, H, K], of q's dtype.
      v: value, [B, H, V], of q's dtype.
      g: natural-log decays, [B, H], float32, `g <= 0`.
      beta: write strengths, [B, H], float32 or q's dtype, `beta >= 0`.
      lamb: [H, K], float32, `lamb > 0`.
      state: `MesaState(kk, kv)`, [B, H, K, K] and [B, H, K, V], float32: what `mesa_net` or the
        last step returned. Donate it to jit, and it is updated in place.
      cg_steps: as in `mesa_net`; it need not be the same.
      slots: None, or int32 [B]: `state` is then a pool of R rows, [R, H, K, K] and [R, H, K, V],
        and row i starts from the state in row `slots[i]` and writes there. -1 is a row without a
        sequence: its output is zero, and nothing is written. All else of the pool stays as it is;
        see docs/pools.md.
      implementation: as in `mesa_net`.

    Returns:
      The output, [B, H, V], of v's dtype, and the new `MesaState`; with slots the whole pool.

    Raises:
      TypeError, ValueError, NotImplementedError: as `mesa_net`. ValueError: slots that are known
        and equal, or outside -1 to R - 1.
    """
    checks.check_state("state", state, MesaState)
    given: dict[str, Any] = dict(q=q, k=k, v=v, g=g, beta=beta, lamb=lamb, state=state)
    sizes = pools.check_axes(_AXES_OF_STEP, slots, **given)
    checks.check_state_dtypes("state", state)
    cg_steps = _check_common(q, k, v, g, beta, lamb, sizes, cg_steps)
    checking.values("jla.mesa_step", **given, slots=slots)
    on_pool = checks.given(slots=slots)
    run = choose("mesa_step", implementation, q, k, v, g, beta, lamb, **on_pool)
    lamb = _nan_unless_positive(lamb)
    return run(q, k, v, g, beta, lamb, state, cg_steps=cg_steps, **on_pool)


def _check_common(
    q: Queries,
    k: Keys,
    v: Values,
    g: LogDecays,
    beta: Strengths,
    lamb: Ridge,
    sizes: Sizes,
    cg_steps: int,
) -> int:
    """Checks what the run and the step share; returns the number of iterations."""
    checks.check_same_dtype(q=q, k=k, v=v)
    checks.check_dtype("g", g, [f32])
    checks.check_dtype("beta", beta, [f32, q.dtype])
    checks.check_dtype("lamb", lamb, [f32])
    checks.check_head_dim("K", sizes["K"])
    checks.check_head_dim("V", sizes["V"])
    if checks.known(lamb) and checks.known(q):  # not while tracing: it must not wait for a device
        values = jax.device_get(lamb)
        if not np.all(values > 0):
            raise ValueError(
                f"lamb must be positive, got elements from {np.min(values)} to {np.max(values)}; "
                "a layer makes it with softplus and a lower bound"
            )
    return checks.check_count("cg_steps", cg_steps)


# Jitted, so that no NaN stands alone: `jax_debug_nans` would stop at it on good input.
@jitted
def _nan_unless_positive(lamb: Ridge) -> jax.Array:
    """`lamb`, NaN in every head where any of it is not positive.

    An implementation makes NaN of it in that head's outputs, and in their gradients: a product, not
    a choice, gives `lamb` itself a gradient that is NaN.
    """
    positive = jnp.all(lamb > 0, axis=-1, keepdims=True)
    return jnp.multiply(lamb, jnp.where(positive, f32(1.0), f32(jnp.nan)))
