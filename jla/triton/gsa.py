"""Gated Slot Attention as Triton kernels; docs/kernels/gsa.md explains their design.

Forward: `gsa_states` carries both states from chunk to chunk, `gsa_outputs` does the rest of every
chunk at once. Backward: `gsa_logit_gradients` goes back through the second pass to the softmax,
`gsa_states` carries both states' gradients back, and `gsa_gradients` makes all else, pass by pass.
"""

import functools

import jax
import jax.numpy as jnp
import triton
from jax.ad_checkpoint import checkpoint_name

from jla._core.axes import GSA, letters, of_step
from jla._core.derivatives import reverse_only
from jla._core.parts import abc_gates
from jla._core.segments import segment_starts
from jla._core.shardwise import defvjp, shardwise
from jla._core.states import GSAState
from jla.reference import gsa as reference
from jla.triton import configs, launch
from jla.triton.kernels import gsa_backward, gsa_forward
from jla.triton.kernels import gsa_step as step_kernel

__all__ = ["gsa", "gsa_step", "unsupported"]

SDS = jax.ShapeDtypeStruct
bf16, f32, i32 = jnp.bfloat16, jnp.float32, jnp.int32

CHUNK = gsa_forward.CHUNK.value
SMALLEST = 16  # side of a tile that `tl.dot` takes
STEP_TILE = 8192  # elements of a state that a step's program holds at a time

_INPUTS = letters(GSA, "q k v s g")
_STATES = letters(GSA, "initial_state.hk initial_state.hv")
_OUTPUTS = (GSA["o"], *_STATES)
# What the forward pass keeps for the backward pass, with the names that checkpoint policies use.
_KEPT = {
    "gsa_sums": "B T H M",
    "gsa_probabilities": "B T HQ M",
    "gsa_key_states": "B H N K M",
    "gsa_value_states": "B H N V M",
}
_STEP = of_step(GSA)
_STEP_INPUTS = letters(_STEP, "q k v s g state.hk state.hv")
_STEP_OUTPUTS = letters(_STEP, "o state.hk state.hv")


def unsupported(name, *arrays):
    """Why the kernels of the function `name` cannot serve these arguments, or None: they serve
    all that the public function takes."""
    return None


@functools.partial(jax.jit, static_argnames="scale")
@reverse_only("jla.gsa")
def gsa(q, k, v, s, g, initial_state, segment_ids, *, scale):
    """Runs the kernels. See `jla.gsa`.

    Products of 16-bit inputs take bfloat16 operands, those of float32 inputs float32 ones as three
    TF32 products; all add in float32.
    """
    starts = None if segment_ids is None else segment_starts(segment_ids)
    if g is None:
        s, g = abc_gates(s, starts)
    if starts is not None:
        # To start a new segment, set its first token's decay to 0.
        g = jnp.where(starts[:, :, None, None], -jnp.inf, g)
    o, hk, hv = _gsa(q, k, v, s, g, initial_state, scale)
    return o, GSAState(hk, hv)


@functools.partial(jax.custom_vjp, nondiff_argnums=(6,))
def _gsa(q, k, v, s, g, initial_state, scale):
    arrays, axes = _with_start((q, k, v, s, g), initial_state)
    run = functools.partial(_forward, scale=scale, keep=False)
    return shardwise(run, axes, _OUTPUTS)(*arrays)


def _gsa_forward(q, k, v, s, g, initial_state, scale):
    arrays, axes = _with_start((q, k, v, s, g), initial_state)
    run = functools.partial(_forward, scale=scale, keep=True)
    o, hk, hv, *kept = shardwise(run, axes, (*_OUTPUTS, *_KEPT.values()))(*arrays)
    kept = tuple(map(checkpoint_name, kept, _KEPT))
    return (o, hk, hv), ((q, k, v, s), kept, initial_state is not None)


def _gsa_backward(scale, residuals, cotangents):
    inputs, kept, has_start = residuals
    run = functools.partial(_backward, scale=scale)
    axes = (*_INPUTS[:4], *_KEPT.values(), *_OUTPUTS)
    *gradients, hk, hv = shardwise(run, axes, (*_INPUTS, *_STATES))(*inputs, *kept, *cotangents)
    return *gradients, GSAState(hk, hv) if has_start else None


defvjp(_gsa, _gsa_forward, _gsa_backward)


def _with_start(arrays, initial_state):
    if initial_state is None:
        return arrays, _INPUTS
    return (*arrays, *initial_state), (*_INPUTS, *_STATES)


def _forward(q, k, v, s, g, *start, scale, keep):
    """The forward kernels: o and the last states, with `keep` also what `_KEPT` lists."""
    (B, T, HQ, K), (H, V), M = q.shape, v.shape[2:], s.shape[-1]
    sums = _sums(g)
    key_states, value_states, hk, hv = _states((k, v), (s, s), sums, start or None)
    dtype = _operand(q)
    settings = _config("gsa_outputs", M, q.dtype)
    blocks = settings.blocks
    o, p = launch.call(
        gsa_forward.gsa_outputs,
        *(q, k, v, s, sums, key_states, value_states, T),
        grid=(B * triton.cdiv(T, CHUNK) * HQ,),
        outputs=[SDS((B, T, HQ, V), v.dtype), SDS((B, T, HQ, M) if keep else (1,), dtype)],
        config=settings,
        constants=dict(
            **dict(scale=scale, HQ=HQ, H=H, K=K, V=V, M=M, BM=_width(M), KEEP=keep),
            **dict(BK=_width(K, blocks["BK"]), BV=_width(V, blocks["BV"]), FLOAT32=dtype == f32),
        ),
    )
    return (o, hk, hv, sums, p, key_states, value_states) if keep else (o, hk, hv)


def _backward(q, k, v, s, sums, p, key_states, value_states, do, dhk, dhv, *, scale):
    """The backward kernels: the gradients of q, k, v, s, g and of the first states."""
    (B, T, HQ, _), (H, V), M = q.shape, v.shape[2:], s.shape[-1]
    dtype = _operand(q)
    settings = _config("gsa_logit_gradients", M, q.dtype)
    (dlogits,) = launch.call(
        gsa_backward.gsa_logit_gradients,
        *(do, v, s, sums, value_states, p, T),
        grid=(B * triton.cdiv(T, CHUNK) * HQ,),
        outputs=[SDS((B, T, HQ, M), dtype)],
        config=settings,
        constants=dict(
            **dict(scale=scale, HQ=HQ, H=H, V=V, M=M),
            **dict(BD=_width(V, settings.blocks["BD"]), BM=_width(M), FLOAT32=dtype == f32),
        ),
    )
    key_gradients, value_gradients, dhk, dhv = _states(
        (q, do), (dlogits, p), sums, (dhk, dhv), reverse=True
    )
    dq, dk, *sides = _gradients(q, k, dlogits, s, sums, key_states, key_gradients, rows=True)
    _, dv, ds, dg = _gradients(
        do, v, p, s, sums, value_states, value_gradients, rows=False, before=sides
    )

    def per_head(x, dtype):
        """The sum over the query heads that share a head."""
        if HQ > H:
            x = x.astype(f32).reshape(B, T, H, HQ // H, -1).sum(3)
        return x.astype(dtype)

    dk, dv, ds, dg = map(per_head, (dk, dv, ds, dg), (k.dtype, v.dtype, s.dtype, f32))
    return dq, dk, dv, ds, dg, dhk, dhv


def _sums(g):
    """The log decays summed from their chunk's start, [B, T, H, M] int32."""
    B, T, H, M = g.shape
    return launch.call(
        *(gsa_forward.gsa_sums, g, T),
        grid=(B * triton.cdiv(T, CHUNK) * H,),
        outputs=[SDS(g.shape, i32)],
        config=_config("gsa_sums", M, g.dtype),
        constants=dict(H=H, M=M, BM=_width(M)),
    )[0]


def _states(features, by_slot, sums, start, *, reverse=False):
    """Both states of all chunks, [B, H, chunks, K or V, M], and the last ones. See `gsa_states`.

    If K and V differ it takes a call for each state.

    Args:
      features: k and v, in reverse q and do. by_slot: s twice, in reverse dlogits and p.
      start: hk and hv at the start (in reverse the gradients at the end), or None for zeros.
    """
    B, T, H, M = sums.shape
    HQ, (K, V) = features[0].shape[2], (x.shape[-1] for x in features)
    N, dtype = triton.cdiv(T, CHUNK), _operand(features[0])
    settings = _config("gsa_states", M, features[0].dtype)
    # The arguments that a call does not use are those that it does.
    of_keys, of_values = ((x, x, w, w) for x, w in zip(features, by_slot, strict=True))
    both = (*features, *by_slot)
    calls = [(K, 1, 1, both)] if K == V else [(K, 1, 0, of_keys), (V, 0, 1, of_values)]
    results = []
    for D, keys, values, arrays in calls:
        width = _width(D, settings.blocks["BD"])
        shapes = [SDS((B, H, N, D, M), dtype)] * 2
        shapes += [SDS((B, H, K, M), f32), SDS((B, H, M, V), f32)]
        used = (keys, values, keys, values)
        out = launch.call(
            gsa_forward.gsa_states,
            *(*arrays, sums, *(start or (sums, sums)), T),
            grid=(B * H * triton.cdiv(D, width) * (keys + values),),
            outputs=[x if n else SDS((1,), x.dtype) for x, n in zip(shapes, used, strict=True)],
            config=settings,
            constants=dict(
                **dict(HQ=HQ, H=H, D=D, M=M, BD=width, BM=_width(M), KEYS=keys, VALUES=values),
                **dict(START=start is not None, REVERSE=reverse, FLOAT32=dtype == f32),
            ),
        )
        results.append(out)
    return [results[-1][i] if i % 2 else results[0][i] for i in range(4)]


def _gradients(x, y, w, s, sums, states, gradients, *, rows, before=None):
    """The gradients of one pass, of each query head. See `gsa_gradients`."""
    (B, T, HQ, D), H, M = x.shape, y.shape[2], s.shape[-1]
    settings, dtype = _config("gsa_gradients", M, x.dtype), _operand(x)
    return launch.call(
        gsa_backward.gsa_gradients,
        *(x, y, w, s, sums, states, gradients, *(before or (w, w)), T),
        grid=(B * triton.cdiv(T, CHUNK) * HQ,),
        outputs=[
            SDS(x.shape if rows else (1,), x.dtype),
            SDS(x.shape, y.dtype if HQ == H else dtype),
            SDS((B, T, HQ, M), s.dtype if HQ == H and before else f32),
            SDS((B, T, HQ, M), f32),
        ],
        config=settings,
        constants=dict(
            **dict(HQ=HQ, H=H, D=D, M=M, BD=_width(D, settings.blocks["BD"]), BM=_width(M)),
            **dict(ROWS=rows, ADD=before is not None, FLOAT32=dtype == f32),
        ),
    )


def _operand(x):
    """The dtype of what products take, and of the arrays between kernels."""
    return f32 if x.dtype == f32 else bf16


def _config(kernel, slots, dtype):
    """The config of a kernel for so many slots and for inputs of this dtype."""
    name = kernel
    if slots > 64:
        name += "_128" if slots <= 128 else "_256"
    if dtype == f32:
        name += "_float32"
    return configs.config(name, launch.target())


def _width(size, most=None):
    """How wide tiles are: the power of two that holds `size`, and at most `most`."""
    width = max(SMALLEST, triton.next_power_of_2(size))
    return width if most is None else min(width, most)


@functools.partial(jax.jit, static_argnames="scale")
def gsa_step(q, k, v, s, g, state, *, scale):
    """One token in one kernel. See `jla.gsa_step`.

    All arithmetic is float32, whatever the inputs' dtype. The states are overwritten where their
    buffers are donated or are temporaries of the caller's program, and copied before the kernel
    otherwise.

    Floor: both states are read once and written once, 8 H M (K + V) bytes a row, and everything
    else is small. B=128 H=16 K=V=128 M=64 has 0.268 GB: 0.063 ms on an H200 (4.3 TB/s).

    Derivatives are those of the reference's formula, in XLA.
    """
    o, hk, hv = _differentiable(scale)(q, k, v, s, g, *state)
    return o, GSAState(hk, hv)


@functools.cache
def _differentiable(scale):
    run = functools.partial(_step, scale=scale)
    step = jax.custom_jvp(lambda *arrays: shardwise(run, _STEP_INPUTS, _STEP_OUTPUTS)(*arrays))

    def formula(*arrays):
        o, state = reference.gsa_step(*arrays[:5], GSAState(*arrays[5:]), scale=scale)
        return o, *state

    @step.defjvp
    def _(primals, tangents):
        return step(*primals), jax.jvp(formula, primals, tangents)[1]

    return step


def _step(q, k, v, s, g, hk, hv, *, scale):
    (B, H, K, M), V, HQ = hk.shape, v.shape[-1], q.shape[1]
    power = triton.next_power_of_2
    BM = power(M)
    return tuple(
        launch.call(
            step_kernel.gsa_step,
            *(q, k, v, s, g, hk, hv),
            grid=(B * H,),
            outputs=[SDS((B, HQ, V), v.dtype), SDS(hk.shape, f32), SDS(hv.shape, f32)],
            config=configs.config("gsa_step", launch.target()),
            constants=dict(
                **dict(scale=scale, HQ=HQ, H=H, K=K, V=V, M=M, BM=BM, BG=power(HQ // H)),
                **dict(BK=min(power(K), STEP_TILE // BM), BV=min(power(V), STEP_TILE // BM)),
            ),
            in_place={5: 1, 6: 2},
        )
    )
