"""Operations of the layers that a kernel can do in one: a layer's formula around its mechanism.

Each is an ordinary operation, chosen among implementations as the public functions are
(`jla._dispatch.choose`), and private: the layers check the arguments. "reference" and "xla" are the
formula that the docstring gives; a kernel saves the passes over memory that XLA would make.

What is made inside a kernel cannot be looked at, so inside `jla.checking()` the two operations
around a mechanism are composed of the public function, which checks values.
"""

import functools
from collections.abc import Callable
from typing import Any, Literal

import jax
import jax.numpy as jnp

from jla._core import checking, movement, packed, sequence
from jla._core.parts import kda_operands, l2norm, mamba2_operands
from jla._core.segments import segment_index
from jla._core.states import LazyLogLinearState, LogLinearState, with_rank
from jla._core.types import (
    Array,
    GateBiases,
    GateRates,
    Implementation,
    KDAState,
    Keys,
    LogDecays,
    Outputs,
    Queries,
    RawGates,
    SegmentIds,
    Slots,
    Strengths,
    Values,
)
from jla._dispatch import choose
from jla.kda import kda, kda_step
from jla.log_linear import log_linear_attention, log_linear_step

f32 = jnp.float32

type Activation = Literal["sigmoid", "silu"] | Callable[[jax.Array], jax.Array]

# The activations that kernels have; others can be given as functions.
_NAMES: dict[object, str] = {jax.nn.sigmoid: "sigmoid", jax.nn.silu: "silu"}


def kda_from_projection(
    q: Queries,
    k: Keys,
    v: Values,
    f: RawGates,
    A_log: GateRates,
    dt_bias: GateBiases,
    beta: Strengths,
    *,
    lower_bound: float | None = None,
    normalize: bool = False,
    initial_state: KDAState | None = None,
    segment_ids: SegmentIds | None = None,
    real: Array | None = None,
    axis_name: str | None = None,
    implementation: Implementation | None = None,
) -> tuple[Outputs, KDAState]:
    """Kimi Delta Attention with the decays of a layer's projection f:

        o, state = kda(q, k, v, kda_gate(f, A_log, dt_bias, lower_bound), beta)

    The kernels make the decays themselves where f has 16 bits, its features are a multiple of 64
    and there is neither a single token nor padding. Elsewhere the formula makes them, and the
    mechanism's kernels run as they do for `jla.kda`.

    Args:
      f: [B, T, HV, K]. A_log: [HV], float32. dt_bias: [HV, K], float32.
      lower_bound: None, or a negative number, see `jla.kda_gate`.
      normalize: whether q and k are divided by their lengths first, see `parts.l2norm`. The kernels
        do it where K is 64, or 128 and V a multiple of it.
      real: bool [B, T] or None: other tokens neither decay nor write.
      q, k, v, beta, initial_state, segment_ids, axis_name, implementation: see `jla.kda`.

    Returns:
      o and the state, as `jla.kda`.
    """
    if checking.on():
        g, beta = kda_operands(f, A_log, dt_bias, beta, lower_bound, real)
        q, k = (l2norm(x) if normalize else x for x in (q, k))
        return kda(
            q, k, v, g, beta,
            initial_state=initial_state, segment_ids=segment_ids, axis_name=axis_name,
            implementation=implementation,
        )  # fmt: skip
    arrays = q, k, v, f, A_log, dt_bias, beta
    chosen = choose("kda_from_projection", implementation, *arrays)
    options = dict(scale=q.shape[3] ** -0.5, lower_bound=lower_bound, normalize=normalize)
    run = functools.partial(chosen, real=real, **options)
    if axis_name is None:
        return run(*arrays, initial_state, segment_ids)
    return sequence.by_states(run, movement.KDA, arrays, initial_state, segment_ids, axis_name)


def kda_step_from_projection(
    q: Queries,
    k: Keys,
    v: Values,
    f: RawGates,
    A_log: GateRates,
    dt_bias: GateBiases,
    beta: Strengths,
    state: KDAState,
    *,
    lower_bound: float | None = None,
    real: Array | None = None,
    slots: Slots | None = None,
    implementation: Implementation | None = None,
) -> tuple[Outputs, KDAState]:
    """One token of `kda_from_projection`; arrays without the axis of time, `real` is [B]."""
    g, beta = kda_operands(f, A_log, dt_bias, beta, lower_bound, real)
    return kda_step(q, k, v, g, beta, state, slots=slots, implementation=implementation)


def log_linear_mamba2(
    q: Queries,
    k: Keys,
    u: Values,
    g: LogDecays,
    logits: Array,
    dt: Array,
    skip: Array,
    *,
    initial_state: LogLinearState | LazyLogLinearState | None = None,
    segment_ids: SegmentIds | None = None,
    axis_name: str | None = None,
    implementation: Implementation | None = None,
) -> tuple[Outputs, LogLinearState | None]:
    """Log-linear attention as Mamba-2 has it, with values dt u and a skip:

        o = log_linear_attention(q, k, dt u, g, softplus(logits)) + skip u

    The kernels put dt, the softplus and the skip into the weights with which tokens are read. A
    skip of its own for each feature has no place there, and is added to what they give, which is
    rounded before. With an initial state or an axis, the public function and the formula make the
    same.

    Args:
      u: [B, T, H, V]. logits: [B, T, H, L]. dt: [B, T, H], float32. skip: [H] or [H, V], float32.
      q, k, g, initial_state, segment_ids, axis_name, implementation: see
        `jla.log_linear_attention`.

    Returns:
      o, [B, T, H, V] in u's dtype; the state after the last token if there is an initial state, and
      else None.
    """
    if initial_state is None and axis_name is None and not checking.on():
        by_head = skip if skip.ndim == 1 else jnp.zeros_like(skip[:, 0])
        arrays = q, k, u, g, logits, dt, by_head
        o = choose("log_linear_mamba2", implementation, *arrays)(*arrays, segment_ids)
        if skip.ndim == 2:
            o = (o.astype(f32) + with_rank(skip, u.ndim) * u.astype(f32)).astype(u.dtype)
        return o, None
    v, level_scales, skipped = mamba2_operands(u, logits, dt, skip)
    o, state = log_linear_attention(
        q, k, v, g, level_scales,
        initial_state=initial_state, segment_ids=segment_ids, axis_name=axis_name,
        implementation=implementation,
    )  # fmt: skip
    o = (o.astype(f32) + skipped).astype(u.dtype)
    return o, None if initial_state is None else state


def log_linear_mamba2_step[State: (LogLinearState, LazyLogLinearState)](
    q: Queries,
    k: Keys,
    u: Values,
    g: LogDecays,
    logits: Array,
    dt: Array,
    skip: Array,
    state: State,
    *,
    slots: Slots | None = None,
    implementation: Implementation | None = None,
) -> tuple[Outputs, State]:
    """One token of `log_linear_mamba2`; arrays without the axis of time."""
    v, level_scales, skipped = mamba2_operands(u, logits, dt, skip)
    options: dict[str, Any] = dict(slots=slots, implementation=implementation)
    o, state = log_linear_step(q, k, v, g, level_scales, state, **options)
    return (o.astype(f32) + skipped).astype(u.dtype), state


def rms_norm(
    x: Array,
    scale: Array,
    gate: Array | None = None,
    gate_bias: Array | None = None,
    *,
    epsilon: float,
    activation: Activation = "sigmoid",
    input_activation: Activation | None = None,
    over: tuple[str, ...] = (),
    implementation: Implementation | None = None,
) -> jax.Array:
    """RMSNorm over the last axes, as many as the scale has, with a gate behind it:

        y = x / sqrt(mean(x**2) + epsilon) * scale * activation(gate + gate_bias)

    Args:
      x: [B, T, D] or [B, T, H, D]. scale: [D], or [H, D] for one norm over all heads.
      gate: as x, or None. gate_bias: as a token of the gate, or None.
      activation: of the gate; "sigmoid", "silu" or a function.
      input_activation: the same, of x before it is normalised; None for none.
      over: inside shard_map, the manual axes over which the first of the normalised axes is split.
        No kernel serves this.
      implementation: see `jla._dispatch.choose`.

    Returns:
      x's shape and dtype, computed in float32 and rounded once.
    """
    arrays = tuple(a for a in (x, scale, gate, gate_bias) if a is not None)
    options: dict[str, Any] = dict(input_activation=_NAMES.get(input_activation, input_activation))
    if gate is not None:
        options["activation"] = _NAMES.get(activation, activation)
    if over:
        options["over"] = over
        implementation = _formula(implementation)
    run = choose("rms_norm", implementation, *arrays, **options)
    return run(*arrays, epsilon=epsilon, **options)


def _formula(implementation: Implementation | None) -> Implementation:
    """That of a norm over devices."""
    if implementation in ("pallas", "triton"):
        raise NotImplementedError(
            f'implementation="{implementation}" cannot serve a norm over heads on several devices. '
            'implementation="xla" or None can.'
        )
    return implementation or "xla"


def rms_norm_branch(
    x: Array,
    scale: Array,
    update: Array | None = None,
    *,
    epsilon: float,
    input_activation: Activation | None = None,
    implementation: Implementation | None = None,
) -> tuple[jax.Array, jax.Array]:
    """The norm of a residual stream, and the stream: the update is added on the way.

        stream = x + update;  y = rms_norm(stream, scale)

    For checkpoint policies the sum is named "residual_stream".

    Args:
      x, scale, input_activation: as `rms_norm`. update: as x, or None.

    Returns:
      y and the stream, of x's shape and dtype.
    """
    arrays = (x, scale) if update is None else (x, scale, update)
    options = dict(input_activation=_NAMES.get(input_activation, input_activation))
    run = choose("rms_norm_branch", implementation, *arrays, **options)
    return run(*arrays, epsilon=epsilon, **options)


def gated_norm(
    x: Array,
    gate: Array,
    scale: Array,
    real: Array | None = None,
    *,
    epsilon: float,
    groups: int = 1,
    norm_before_gate: bool = False,
    over: tuple[str, ...] = (),
    implementation: Implementation | None = None,
) -> jax.Array:
    """RMSNorm over all heads of a token, behind a gate or before it, as Mamba-2 has it:

        y = rms_norm(x silu(gate), scale)
        y = rms_norm(x, scale) silu(gate)          with norm_before_gate

    The kernels serve both without padding and groups.

    Args:
      x, gate: [B, T, H, D]. scale: [H, D].
      real: bool [B, T], False where the result is zero whatever x is; or None.
      groups: into so many groups of neighbouring heads, each normalised for itself, H is split.
      over: inside shard_map, the manual axes over which the heads of one group are split.

    Returns:
      The gate's shape and dtype, computed in float32 and rounded once.
    """
    arrays = (x, gate, scale) if real is None else (x, gate, scale, real)
    options: dict[str, Any] = dict(groups=groups, norm_before_gate=norm_before_gate)
    if over:
        options["over"] = over
        implementation = _formula(implementation)
    run = choose("gated_norm", implementation, *arrays, **options)
    return run(*arrays, epsilon=epsilon, **options)


def short_convolution(
    x: Array,
    taps: Array,
    bias: Array | None = None,
    past: Array | None = None,
    segments: Array | None = None,
    *,
    normalize: bool = False,
    silu_twice: bool = False,
    axis_name: str | None = None,
    implementation: Implementation | None = None,
) -> jax.Array:
    """A depthwise causal convolution over time of W taps, and SiLU:

        y_t = silu(sum_i taps[i] x_{t - (W - 1 - i)} + bias)

    then, if asked for, another SiLU and the l2 norm of each head's vector.

    Args:
      x: [B, T, H, D]. taps: [W, H, D]. bias: [H, D], or None for none.
      past: the W - 1 tokens before x, [B, W - 1, H, D]; zeros if None.
      segments: int32 [B, T], numbered 0, 1, ... in order, or None: no window reaches over a border.
        The past belongs to segment 0. With an axis: integers in any order, as `segment_ids`.
      normalize: whether a head's vector is divided by its length, see `parts.l2norm`.
      silu_twice: whether there is a second SiLU upon the first.
      axis_name: inside shard_map, the manual axis that T is split over: the past is then the end of
        the left neighbour's tokens, and zeros on the first device.

    Returns:
      x's shape and dtype, summed in float32.
    """
    options = dict(normalize=normalize, silu_twice=silu_twice)
    if axis_name is not None:
        past = sequence.past(x, segments, taps.shape[0] - 1, axis_name)
        if segments is None:
            return _convolution_from(past, x, taps, bias, implementation, **options)
        segments = segment_index(segments)
    arrays = x, taps, bias, past, segments
    run = choose("short_convolution", implementation, *arrays)
    return run(*arrays, **options)


def short_convolution_of_segments(
    x: Array,
    taps: Array,
    bias: Array | None,
    past: Array,
    segment_ids: SegmentIds,
    *,
    normalize: bool = False,
    silu_twice: bool = False,
    implementation: Implementation | None = None,
) -> tuple[jax.Array, jax.Array]:
    """`short_convolution` of segments that continue, each from its own past.

    The tokens are moved behind their segment's past; no window then reaches over a border, and all
    is one convolution without segments.

    Args:
      past: [B, N, W - 1, H, D].
      segment_ids: -1 to N - 1, as the mechanisms' are where states have an axis of segments.

    Returns:
      The outputs, zeros at tokens of no segment, and each segment's last W - 1 inputs.
    """
    (B, N, W1), token = past.shape[:3], x.shape[2:]
    where = packed.extended(segment_ids, N, W1)
    past = past.reshape(B, N * W1, *token)
    inputs = packed.pick(jnp.concatenate([x, past], axis=1), where.source)
    y = short_convolution(
        inputs, taps, bias,
        normalize=normalize, silu_twice=silu_twice, implementation=implementation,
    )  # fmt: skip
    last = packed.pick(inputs, where.last, unique=False)
    absent = where.last >= inputs.shape[1]
    last = jnp.where(absent[..., None, None], past, last)
    return packed.pick(y, where.place), last.reshape(B, N, W1, *token)


def _convolution_from(
    past: jax.Array,
    x: Array,
    taps: Array,
    bias: Array | None,
    implementation: Implementation | None,
    **options: bool,
) -> jax.Array:
    """The convolution of x as if nothing came before, which kernels serve, and the first tokens
    once more, from the past."""
    few = past.shape[1]
    run = choose("short_convolution", implementation, x, taps, bias, None, None)
    formula = choose("short_convolution", "xla", x, taps, bias)
    first = formula(x[:, :few], taps, bias, past, **options)
    return run(x, taps, bias, **options).at[:, :few].set(first)
