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

from jla._core.axes import KDA, letters, of_step
from jla._core.derivatives import reverse_only
from jla._core.parts import kda_operands
from jla._core.segments import segment_starts
from jla._core.shardwise import defvjp, shardwise
from jla._core.steps import differentiable
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
_STEP = of_step(KDA)
_STEP_INPUTS = letters(_STEP, "q k v g beta state")
_STEP_OUTPUTS = letters(_STEP, "o state")

_C = CHUNK.value
_FEW = 32  # sequences and heads that leave most of a GPU idle
_LOG2E = 1.4426950408889634
_STRONGEST = -3e4  # of a log decay: finite sums in float16, and an exp2 of zero


def unsupported(name, *arrays):
    """Why the kernels of the function `name` cannot serve these arguments, or None: they serve
    all that the public function takes."""
    return None


@functools.partial(jax.jit, static_argnames="scale")
@reverse_only("jla.kda")
def kda(q, k, v, g, beta, initial_state, segment_ids, *, scale):
    """Pads the features to powers of two and runs the kernels. See `jla.kda`.

    Products of 16-bit inputs take bfloat16 operands, those of float32 inputs three TF32 products
    each; all add in float32.
    """
    (K, V), dtype = (q.shape[-1], v.shape[-1]), v.dtype
    if dtype == f16:
        q, k, v = (x.astype(bf16) for x in (q, k, v))
    if segment_ids is not None:
        # To start a new segment, set its first token's decay to 0.
        starts = segment_starts(segment_ids)[:, :, None, None]
        g = jnp.where(starts, _STRONGEST, g)
    q, k, g, v = (_padded(x, 3) for x in (q, k, g, v))
    if initial_state is not None:
        initial_state = _padded(_padded(initial_state, 2), 3)
    o, state = _kda(q, k, v, g, beta.astype(f32), initial_state, scale)
    return o[..., :V].astype(dtype), state[:, :, :K, :V]


def kda_from_projection(
    q, k, v, f, A_log, dt_bias, beta, initial_state, segment_ids, real=None, *, scale, lower_bound
):  # fmt: skip
    """`kda` with the decays of its formula. See `jla._fused.kda_from_projection`."""
    g, beta = kda_operands(f, A_log, dt_bias, beta, lower_bound, real)
    return kda(q, k, v, g, beta, initial_state, segment_ids, scale=scale)


def _padded(x, axis):
    """Adds features of zeros up to a power of two."""
    missing = triton.next_power_of_2(x.shape[axis]) - x.shape[axis]
    if not missing:
        return x
    return jnp.pad(x, [(0, missing if i == axis else 0) for i in range(x.ndim)])


@functools.partial(jax.custom_vjp, nondiff_argnums=(6,))
def _kda(q, k, v, g, beta, initial_state, scale):
    """KDA on features that the kernels take."""
    return _run(q, k, v, _decay_operand(q, g), beta, initial_state, scale, keep=False)


def _decay_operand(q, g):
    """Log decays as the kernels take them: base 2, and in float16 for 16-bit inputs.

    float16 errs by 2**-12 of an exponent x, that is by x exp(-x) 2**-12 < 1e-4 in the decay.
    """
    return jnp.maximum(g * _LOG2E, _STRONGEST).astype(f32 if q.dtype == f32 else f16)


def _run(q, k, v, g, beta, initial_state, scale, *, keep):
    arrays, axes, results = (q, k, v, g, beta), _INPUTS, _OUTPUTS
    if initial_state is not None:
        arrays, axes = (*arrays, initial_state), (*axes, _STATE)
    if keep:
        results = (*results, *_KEPT.values())
    run = functools.partial(_forward, scale=scale, keep=keep)
    return shardwise(run, axes, results)(*arrays)


def _kda_forward(q, k, v, g, beta, initial_state, scale):
    g = _decay_operand(q, g)
    o, state, *kept = _run(q, k, v, g, beta, initial_state, scale, keep=True)
    kept = tuple(map(checkpoint_name, kept, _KEPT))
    return (o, state), (q, k, v, g, beta, kept, initial_state is not None)


def _kda_backward(scale, residuals, cotangents):
    q, k, v, g, beta, kept, has_start = residuals
    run = functools.partial(_backward, scale=scale)
    axes = (*_INPUTS, *_KEPT.values(), *_OUTPUTS)
    of_keys = KDA["g"]
    results = (of_keys, of_keys, KDA["v"], of_keys, KDA["beta"], _STATE)
    *gradients, dv, dg, dbeta, start = shardwise(run, axes, results)(
        *(q, k, v, g, beta), *kept, *cotangents
    )
    # A key head's gradient is the sum of its value heads'.
    if v.shape[2] != q.shape[2]:
        for i in range(2):
            per_head = gradients[i].reshape(*q.shape[:3], -1, q.shape[3])
            gradients[i] = per_head.astype(f32).sum(3).astype(q.dtype)
    return *gradients, dv, dg, dbeta, start if has_start else None


defvjp(_kda, _kda_forward, _kda_backward)


def _forward(q, k, v, g, beta, *start, scale, keep):
    """The forward kernels: o and the last state, with `keep` also what `_KEPT` lists."""
    (B, T, H, K), (HV, V) = q.shape, v.shape[2:]
    N = triton.cdiv(T, _C)
    dtype, sizes = q.dtype, dict(HV=HV, K=K, V=V)
    square, values = SDS((B, HV, N * _C, _C), dtype), SDS((B, HV, N * _C, V), dtype)
    scores, key_scores, inverse, u = _call(
        kda_forward.kda_scores, *(q, k, v, g, beta, masks(f16)), T=T, programs=B * N * HV,
        outputs=[square, square, square, values], **sizes, H=H, SCALE=scale,
    )  # fmt: skip
    query, read, write, decay = _operands(q, k, g, inverse, scale)
    start = start[0] if start else jnp.zeros((B, HV, K, V), f32)
    states = SDS((B, HV, N, V, K) if keep else (1,), dtype)
    o, state, states = _call(
        kda_forward.kda_recurrence, *(query, read, write, u, scores, decay, beta, start),
        T=T, programs=B * HV, by="BV",
        outputs=[SDS(v.shape, dtype), SDS(start.shape, f32), states], **sizes, KEEP=keep,
    )  # fmt: skip
    return (o, state, scores, key_scores, inverse, states) if keep else (o, state)


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


def _backward(q, k, v, g, beta, scores, key_scores, inverse, states, do, end, *, scale):
    """The backward kernels: the gradients of q, k (per value head), v, g, beta and the start."""
    (B, T, H, K), (HV, V) = q.shape, v.shape[2:]
    programs = B * HV * triton.cdiv(T, _C)
    sizes = dict(HV=HV, K=K, V=V)
    query, read, write, decay = _operands(q, k, g, inverse, scale)
    gradients, start = _call(
        kda_backward.kda_gradient_recurrence,
        *(query, read, write, do, scores, decay, beta, end), T=T,
        programs=B * HV, by="BV", outputs=[states, end], **sizes,
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
      programs: how many; by the name of the block, if any, whose number multiplies them.
    """
    config = _config(kernel, arrays[0].dtype, constants.get("K", 0), programs)
    for block, size in config.blocks.items():
        constants[block] = min(size, constants[block[1:]])
        if block == by:
            programs *= constants[by[1:]] // constants[by]
    outputs = [SDS(x.shape, x.dtype) for x in outputs]
    return launch.call(
        kernel, *arrays, T, grid=(programs,), outputs=outputs, config=config,
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
def kda_step(q, k, v, g, beta, state, *, scale):
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
    return differentiable(run, formula, _STEP_INPUTS, _STEP_OUTPUTS)(q, k, v, g, beta, state)


def _step(q, k, v, g, beta, state, *, scale):
    B, HV, K, V = state.shape
    config = configs.config("kda_step", launch.target())
    rows = triton.next_power_of_2(K)
    # Of twice as many rows half as many columns: what a program holds in registers stays the same.
    width = min(config.blocks["BV"] * 128 // max(rows, 128), triton.next_power_of_2(V))
    return tuple(
        launch.call(
            step.kda_step,
            *(q, k, v, g, beta, state),
            grid=(B * HV * triton.cdiv(V, width),),
            outputs=[SDS(v.shape, v.dtype), SDS(state.shape, state.dtype)],
            config=config,
            constants=dict(scale=scale, H=q.shape[1], HV=HV, K=K, V=V, BK=rows, BV=width),
            in_place={5: 1},
        )
    )
