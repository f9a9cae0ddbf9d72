"""Kimi Delta Attention as Triton kernels; docs/triton.md explains their design.

Forward: `scores` and `operands` do what a chunk can do without its state, `recurrence` carries the
state from chunk to chunk. Backward: `gradient_recurrence` carries the state's gradient back, then
`errors` and `key_gradients` make all gradients of a chunk from the two states around it.
"""

import functools

import jax
import jax.numpy as jnp
import triton
from jax.ad_checkpoint import checkpoint_name

from jla._core import movement, packed, sequence, steps
from jla._core.axes import KDA, letters, of_step
from jla._core.derivatives import reverse_only
from jla._core.parts import kda_operands, l2norm
from jla._core.segments import segment_starts
from jla._core.shardwise import defvjp, shardwise
from jla.reference import kda as reference
from jla.triton import configs, launch
from jla.triton.kernels import kda_backward, kda_forward
from jla.triton.kernels import kda_step as step
from jla.triton.kernels.pieces import CHUNK
from jla.triton.masks import masks

__all__ = ["kda", "kda_from_projection", "kda_step", "unsupported"]

SDS = jax.ShapeDtypeStruct
bf16, f16, f32 = jnp.bfloat16, jnp.float16, jnp.float32

_INPUTS = letters(KDA, "q k v g beta")
_STATE = KDA["initial_state"]
_OUTPUTS = (KDA["o"], _STATE)
# What the forward pass keeps for the backward pass, with the names that checkpoint policies use.
_KEPT = {
    "kda_scores": "B HV TP C",
    "kda_key_scores": "B HV TP C",
    "kda_inverse": "B HV TP C",
    "kda_states": "B HV N V K",
}
# States of pieces, see `packed.by_pieces`, and the pieces' spans.
_OF_PIECES, _SPANS = "B HV P K V", "B P two"
_GRADIENTS = (KDA["g"], KDA["g"], KDA["v"], KDA["g"], KDA["beta"], _STATE)
# What a piece does to a state, and what the recurrence takes, see `_prepare`.
_SUMMARY = ("B HV K J", _STATE)
_OPERANDS = ("B HV TP K", "B HV TP K", "B HV TP K", "B HV N K")
_PREPARED = (*tuple(_KEPT.values())[:3], "B HV TP V", *_OPERANDS)

_C = CHUNK.value
_FEW = 32  # sequences and heads that leave most of a GPU idle
_LOG2E = 1.4426950408889634
_STRONGEST = -3e4  # of a log decay: finite sums in float16, and an exp2 of zero


def unsupported(name, *arrays, slots=None):
    """Why the kernels of the function `name` cannot serve these arguments, or None: they serve
    all that the public function takes."""
    return None


@functools.partial(jax.jit, static_argnames=("scale", "axis_name"))
@reverse_only("jla.kda")
def kda(q, k, v, g, beta, initial_state, segment_ids, *, scale, axis_name=None):
    """Pads the features to powers of two and runs the kernels. See `jla.kda`, and for `axis_name`
    `jla._core.sequence.by_states`.

    Products of 16-bit inputs take bfloat16 operands. Those of float32 inputs are three of bfloat16
    each, or of TF32 where errors may be multiplied by hundreds. All add in float32.
    """
    if packed.count(initial_state) is not None:

        def run(q, k, v, g, beta, *start):
            return _on_powers(q, k, v, g, beta, start, scale)

        return packed.by_pieces(run, (q, k, v, g, beta), initial_state, segment_ids, _C)
    if segment_ids is not None:
        # To start a new segment, set its first token's decay to 0.
        starts = segment_starts(segment_ids)[:, :, None, None]
        g = jnp.where(starts, _STRONGEST, g)
    start = () if initial_state is None else (initial_state,)
    over = None
    if axis_name is not None:
        over = sequence.links(segment_ids, *q.shape[:2], axis_name), axis_name
    return _on_powers(q, k, v, g, beta, start, scale, over)


def _on_powers(q, k, v, g, beta, start, scale, over=None):
    """Pads the features; `start` as `_kda` has it. Over devices `over` is how their pieces link,
    and the axis."""
    (K, V), dtype = (q.shape[-1], v.shape[-1]), v.dtype
    if dtype == f16:
        q, k, v = (x.astype(bf16) for x in (q, k, v))
    q, k, g, v = (_padded(x, 3) for x in (q, k, g, v))
    start = (*(_padded(_padded(x, x.ndim - 2), x.ndim - 1) for x in start[:1]), *start[1:])
    arrays = q, k, v, g, beta.astype(f32)
    if over is None:
        o, state = _kda(*arrays, start, scale)
    else:
        links, axis_name = over
        o, state = _kda_over(*arrays, *start, links, scale, axis_name)
    return o[..., :V].astype(dtype), state[..., :K, :V]


def kda_from_projection(
    q, k, v, f, A_log, dt_bias, beta, initial_state, segment_ids, real=None,
    *, scale, lower_bound, normalize=False, axis_name=None,
):  # fmt: skip
    """`kda` with the decays of its formula. See `jla._fused.kda_from_projection`."""
    q, k = (l2norm(x) if normalize else x for x in (q, k))
    g, beta = kda_operands(f, A_log, dt_bias, beta, lower_bound, real)
    options = dict(scale=scale, axis_name=axis_name)
    return kda(q, k, v, g, beta, initial_state, segment_ids, **options)


def _padded(x, axis):
    """Adds features of zeros up to a power of two."""
    missing = triton.next_power_of_2(x.shape[axis]) - x.shape[axis]
    if not missing:
        return x
    return jnp.pad(x, [(0, missing if i == axis else 0) for i in range(x.ndim)])


@functools.partial(jax.custom_vjp, nondiff_argnums=(6,))
def _kda(q, k, v, g, beta, start, scale):
    """KDA on features that the kernels take.

    `start` is () for a state of zeros, a tuple of the first state, or one of the state of each
    piece, [B, HV, P, K, V], and the pieces' spans, see `packed.by_pieces`; the state returned is
    like it.
    """
    return _run(q, k, v, _decay_operand(q, g), beta, start, scale, keep=False)


def _decay_operand(q, g):
    """Log decays as the kernels take them: base 2, and in float16 for 16-bit inputs.

    float16 errs by 2**-12 of an exponent x, that is by x exp(-x) 2**-12 < 1e-4 in the decay.
    """
    return jnp.maximum(g * _LOG2E, _STRONGEST).astype(f32 if q.dtype == f32 else f16)


def _run(q, k, v, g, beta, start, scale, *, keep):
    state = _OF_PIECES if len(start) == 2 else _STATE
    axes, results = (*_INPUTS, *(state, _SPANS)[: len(start)]), (KDA["o"], state)
    if keep:
        results = (*results, *_KEPT.values())
    run = functools.partial(_forward, scale=scale, keep=keep)
    return shardwise(run, axes, results)(q, k, v, g, beta, *start)


def _kda_forward(q, k, v, g, beta, start, scale):
    g = _decay_operand(q, g)
    o, state, *kept = _run(q, k, v, g, beta, start, scale, keep=True)
    kept = tuple(map(checkpoint_name, kept, _KEPT))
    return (o, state), (q, k, v, g, beta, kept, len(start), start[1:])


def _kda_backward(scale, residuals, cotangents):
    q, k, v, g, beta, kept, number, spans = residuals
    run = functools.partial(_backward, scale=scale)
    state = _OF_PIECES if spans else _STATE
    axes = (*_INPUTS, *_KEPT.values(), KDA["o"], state, *(_SPANS for _ in spans))
    arrays = q, k, v, g, beta, *kept, *cotangents, *spans
    results = shardwise(run, axes, (*_GRADIENTS[:-1], state))(*arrays)
    *gradients, start = _over_value_heads(q, v, *results)
    return *gradients, (start, None)[:number]


def _over_value_heads(q, v, *gradients):
    *gradients, dv, dg, dbeta, start = gradients
    # A key head's gradient is the sum of its value heads'.
    if v.shape[2] != q.shape[2]:
        for i in range(2):
            per_head = gradients[i].reshape(*q.shape[:3], -1, q.shape[3])
            gradients[i] = per_head.astype(f32).sum(3).astype(q.dtype)
    return *gradients, dv, dg, dbeta, start


defvjp(_kda, _kda_forward, _kda_backward)


# A piece of a sequence on each device. What the piece does to a state is made before the recurrence
# and exchanged; backward likewise, with the gradient of the state from right to left.


@functools.partial(jax.custom_vjp, nondiff_argnums=(7, 8))
def _kda_over(q, k, v, g, beta, state, links, scale, axis):
    """As `_kda`: the outputs of this device's piece, and the state that leaves it; `state` is that
    before the first piece."""
    g = _decay_operand(q, g)
    return _run_over(q, k, v, g, beta, state, links, scale, axis, keep=False)


def _run_over(q, k, v, g, beta, state, links, scale, axis, *, keep):
    prepare = functools.partial(_prepare_and_summarise, scale=scale)
    results = (*_SUMMARY, *_PREPARED)
    factor, term, *made = shardwise(prepare, _INPUTS, results)(q, k, v, g, beta)
    start = sequence.entering(movement.KDA.step, (factor, term), state, links, axis)
    # The recurrence knows of value heads alone.
    axes = (*_PREPARED, KDA["beta"], _STATE, KDA["v"])
    results = (*_OUTPUTS, _KEPT["kda_states"]) if keep else _OUTPUTS
    axes, results = ([x.replace("HV", "H") for x in letters] for letters in (axes, results))
    run = functools.partial(_recurrence, keep=keep)
    o, end, *states = shardwise(run, axes, results)(*made, beta, start, v)
    return (o, end, *made[:3], *states) if keep else (o, end)


def _kda_over_forward(q, k, v, g, beta, state, links, scale, axis):
    g = _decay_operand(q, g)
    o, end, *kept = _run_over(q, k, v, g, beta, state, links, scale, axis, keep=True)
    kept = tuple(map(checkpoint_name, kept, _KEPT))
    return (o, end), (q, k, v, g, beta, kept, links)


def _kda_over_backward(scale, axis, residuals, cotangents):
    q, k, v, g, beta, kept, links = residuals
    do, end = cotangents
    run = functools.partial(_summarise_gradients, scale=scale)
    axes = (*_INPUTS, *_KEPT.values(), *_OUTPUTS)
    arrays = q, k, v, g, beta, *kept, do
    factor, said, *operands = shardwise(run, axes, (*_SUMMARY, *_OPERANDS))(*arrays, end)
    after = sequence.entering_gradient(movement.KDA.step, factor, said, links, axis)
    run = functools.partial(_backward_from, scale=scale)
    results = shardwise(run, (*axes, *_OPERANDS), _GRADIENTS)(*arrays, end + after, *operands)
    *gradients, start = _over_value_heads(q, v, *results)
    return *gradients, sequence.of_first_device(start, axis), None


defvjp(_kda_over, _kda_over_forward, _kda_over_backward)


def _prepare_and_summarise(q, k, v, g, beta, *, scale):
    """What the piece does to a state, and what `_recurrence` takes."""
    prepared = _prepare(q, k, v, g, beta, scale)
    *_, u, _, read, write, decay = prepared
    arrays = read, write, u, decay, beta
    return *_transitions(kda_forward.kda_transitions, *arrays, v=v), *prepared


def _summarise_gradients(
    q, k, v, g, beta, scores, key_scores, inverse, states, do, end, *, scale
):  # fmt: skip
    query, read, write, decay = operands = _operands(q, k, g, inverse, scale)
    arrays = query, read, write, do, scores, decay, beta, end
    return *_transitions(kda_backward.kda_gradient_transitions, *arrays, v=v), *operands


def _transitions(kernel, *arrays, v):
    """A kernel's M and N, float32."""
    (B, T, HV, V), K = v.shape, arrays[0].shape[-1]
    config = _config(kda_forward.kda_recurrence, v.dtype, K, B * HV)
    block = min(config.blocks["BV"], K, V)
    return launch.call(
        kernel, *arrays, T, grid=(B * HV * (V + K) // block,), config=config,
        outputs=[SDS((B, HV, K, K), f32), SDS((B, HV, K, V), f32)],
        constants=dict(HV=HV, K=K, V=V, BV=block, WHOLE=T % _C == 0),
    )  # fmt: skip


def _forward(q, k, v, g, beta, *start, scale, keep):
    """The forward kernels: o and the last state, with `keep` also what `_KEPT` lists."""
    B, K, (HV, V) = q.shape[0], q.shape[3], v.shape[2:]
    prepared = _prepare(q, k, v, g, beta, scale)
    start = start or (jnp.zeros((B, HV, K, V), f32),)
    o, state, *states = _recurrence(*prepared, beta, start[0], v, *start[1:], keep=keep)
    return (o, state, *prepared[:3], *states) if keep else (o, state)


def _prepare(q, k, v, g, beta, scale):
    """What `_recurrence` takes first: scores, key_scores, inverse, u, query, read, write, decay."""
    (B, T, H, K), (HV, V) = q.shape, v.shape[2:]
    N = triton.cdiv(T, _C)
    square, values = SDS((B, HV, N * _C, _C), q.dtype), SDS((B, HV, N * _C, V), q.dtype)
    scores, key_scores, inverse, u = _call(
        kda_forward.kda_scores, *(q, k, v, g, beta, masks(f16)), T=T, programs=B * N * HV,
        outputs=[square, square, square, values], HV=HV, K=K, V=V, H=H, SCALE=scale,
    )  # fmt: skip
    return scores, key_scores, inverse, u, *_operands(q, k, g, inverse, scale)


def _recurrence(
    scores, key_scores, inverse, u, query, read, write, decay, beta, start, v, spans=None, *, keep
):  # fmt: skip
    """o and the last state, with `keep` also the states before the chunks; v for its shape."""
    (B, T, HV, V), (N, K), dtype = v.shape, decay.shape[2:], query.dtype
    states = SDS((B, HV, N, V, K) if keep else (1,), dtype)
    o, state, states = _call(
        kda_forward.kda_recurrence, *(query, read, write, u, scores, decay, beta, start),
        *_spans(spans, start), T=T, programs=B * HV, by="BV", P=_pieces(spans),
        outputs=[SDS(v.shape, dtype), SDS(start.shape, f32), states], HV=HV, K=K, V=V, KEEP=keep,
    )  # fmt: skip
    return (o, state, states) if keep else (o, state)


def _pieces(spans):
    """P, 0 without spans."""
    return 0 if spans is None else spans.shape[1]


def _spans(spans, start):
    """The kernel's argument; without spans it is not read, and is any float32 array."""
    return (start if spans is None else spans,)


def _operands(q, k, g, inverse, scale):
    B, T, H, K = q.shape
    HV, TP = inverse.shape[1:3]
    keys = SDS((B, HV, TP, K), q.dtype)
    return _call(
        kda_forward.kda_operands, *(q, k, g, inverse, masks(f16)), T=T,
        programs=B * HV * (TP // _C), by="BK",
        outputs=[keys, keys, keys, SDS((B, HV, TP // _C, K), f32)],
        H=H, HV=HV, K=K, SCALE=scale,
    )  # fmt: skip


def _backward(
    q, k, v, g, beta, scores, key_scores, inverse, states, do, end, spans=None, *, scale
):  # fmt: skip
    """The backward kernels: the gradients of q, k (per value head), v, g, beta and the start."""
    operands = _operands(q, k, g, inverse, scale)
    arrays = q, k, v, g, beta, scores, key_scores, inverse, states, do, end
    return _backward_from(*arrays, *operands, spans, scale=scale)


def _backward_from(
    q, k, v, g, beta, scores, key_scores, inverse, states, do, end, query, read, write, decay,
    spans=None, *, scale,
):  # fmt: skip
    """As `_backward`, from what `_operands` returns."""
    (B, T, H, K), (HV, V) = q.shape, v.shape[2:]
    programs = B * HV * triton.cdiv(T, _C)
    sizes = dict(HV=HV, K=K, V=V)
    gradients, start = _call(
        kda_backward.kda_gradient_recurrence,
        *(query, read, write, do, scores, decay, beta, end), *_spans(spans, end), T=T,
        programs=B * HV, by="BV", outputs=[states, end], P=_pieces(spans), **sizes,
    )  # fmt: skip
    parts = max(1, V // _config(kda_backward.kda_errors, v.dtype, K, programs).blocks["BV"])
    dv, written, dbeta = _call(
        kda_backward.kda_errors, *(v, do, read, write, states, gradients),
        *(inverse, key_scores, scores, beta), T=T, programs=programs, by="BV",
        outputs=[v, SDS((*scores.shape[:3], V), v.dtype), SDS((parts, *beta.shape), f32)], **sizes,
    )  # fmt: skip
    dscores, dkey_scores = _call(
        kda_backward.kda_score_gradients, *(do, dv, written), T=T, programs=programs,
        outputs=[scores, scores], HV=HV, V=V, SCALE=scale,
    )  # fmt: skip
    keys, decays = SDS((B, T, HV, K), q.dtype), SDS((B, T, HV, K), f32)
    of_decays, of_sums = masks(f16), masks(bf16)
    dq, part = _call(
        kda_backward.kda_query_gradients,
        *(q, k, g, do, states, dscores, of_decays, of_sums),
        T=T, programs=programs, by="BK", outputs=[keys, decays], **sizes, H=H, SCALE=scale,
    )  # fmt: skip
    dk, dg = _call(
        kda_backward.kda_key_gradients, *(q, k, g, dv, written, states, gradients),
        *(dkey_scores, dscores, of_decays, of_sums, part),
        T=T, programs=programs, by="BK", outputs=[keys, decays], **sizes, H=H,
    )  # fmt: skip
    return dq, dk, dv, dg, dbeta.sum(0), start


def _call(kernel, *arrays, T, programs, outputs, by=None, **constants):
    """Runs a kernel in the blocks of its config, at most as large as the array.

    Args:
      T: how many tokens; the compiled kernel does not depend on it.
      programs: how many; by the name of the block, if any, whose number multiplies them. With a
        constant P above 0 there is a second axis of so many.
    """
    pieces = constants.get("P") or 1
    config = _config(kernel, arrays[0].dtype, constants.get("K", 0), programs * pieces)
    for block, size in config.blocks.items():
        constants[block] = min(size, constants[block[1:]])
        if block == by:
            programs *= constants[by[1:]] // constants[by]
    outputs = [SDS(x.shape, x.dtype) for x in outputs]
    return launch.call(
        kernel, *arrays, T, grid=(programs, pieces)[: 1 + (pieces > 1)], outputs=outputs,
        config=config,
        constants=dict(constants, WHOLE=T % _C == 0),
    )  # fmt: skip


def _config(kernel, dtype, K, programs):
    """A kernel's config for inputs of this dtype, this many features, and so many programs (times
    the number of blocks)."""
    name = kernel.__name__
    if dtype == f32:
        name += "_float32"
    for suffix, fits in (("_wide", K > 128), ("_few", programs <= _FEW)):
        if fits and name + suffix in configs.CONFIGS:
            name += suffix
    return configs.config(name, launch.target())


@functools.partial(jax.jit, static_argnames="scale")
def kda_step(q, k, v, g, beta, state, *, scale, slots=None):
    """One token in one kernel. See `jla.kda_step`.

    All arithmetic is float32, whatever the inputs' dtype. The state is overwritten where its buffer
    is donated or is a temporary of the caller's program, and copied before the kernel otherwise.

    Floor: the state is read once and written once, 8 HV K V bytes a row, and everything else is
    small. B=128 HV=16 K=V=128 has 0.272 GB: 0.063 ms on an H200 (4.3 TB/s), 0.14 ms on an A100
    of 1.9 TB/s, 0.32 ms on an L40S of 0.86 TB/s. About 5 operations an element of the state. For
    all kinds of GPU 117 to 132 registers a thread, nothing spilled, and 1 KB of shared memory.

    Derivatives are those of the reference's formula, in XLA.
    """
    run, formula = (functools.partial(x, scale=scale) for x in (_step, reference.kda_step))
    names, arrays = "q k v g beta state", (q, k, v, g, beta, state)
    return steps.call(run, formula, of_step(KDA), names, "o state", *arrays, slots=slots)


def _step(q, k, v, g, beta, state, slots=None, *, scale):
    (B, HV, V), K = v.shape, state.shape[2]
    kernel, on_pool = step.kda_step, ()
    if slots is not None:
        kernel, on_pool = step.kda_step_on_pool, (slots, state.shape[0])
    config = configs.config("kda_step", launch.target())
    rows = triton.next_power_of_2(K)
    # Of twice as many rows half as many columns: what a program holds in registers stays the same.
    width = min(config.blocks["BV"] * 128 // max(rows, 128), triton.next_power_of_2(V))
    return tuple(
        launch.call(
            kernel,
            *(q, k, v, g, beta, state, *on_pool),
            grid=(B * HV * triton.cdiv(V, width),),
            outputs=[SDS(v.shape, v.dtype), SDS(state.shape, state.dtype)],
            config=config,
            constants=dict(scale=scale, H=q.shape[1], HV=HV, K=K, V=V, BK=rows, BV=width),
            in_place={5: 1},
        )
    )
