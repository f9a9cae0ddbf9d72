"""Log-linear attention as Pallas kernels; docs/kernels.md explains their design.

Forward: `sums` makes the states of the leaf blocks, `tree` (XLA) those above, `outputs` the rest.
Backward: `sums` makes the gradients of the states that are read, `tree` brings them down to the
leaf blocks, and `gradients` makes all others, chunk by chunk. What the gates and level scales are
worth is XLA's (`weights`), and so are their gradients.
"""

import functools

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name

from jla import _seats
from jla.pallas.chunks import TILE_WIDTH
from jla.pallas.log_linear import step, tree, weights
from jla.pallas.log_linear.gradients import reader_gradients, writer_gradients
from jla.pallas.log_linear.outputs import outputs
from jla.pallas.log_linear.step import log_linear_step
from jla.pallas.log_linear.sums import weighted_sums
from jla.pallas.mosaic import TILE_ROWS
from jla.pallas.shardwise import shardwise

__all__ = ["log_linear_attention", "log_linear_step", "unsupported"]

bf16, f32 = jnp.bfloat16, jnp.float32

LEAF = 256  # tokens of a leaf block: a power of two, 64 to 2048
WIDEST = 128  # K or V; the registers of one warpgroup hold no wider row


def unsupported(name, q, k, v, *_):
    """Why the kernels of the function `name` cannot serve these arguments, or None."""
    if name == "log_linear_step":
        return step.unsupported(q, v)
    if q.dtype == f32:
        return "q, k and v are float32, and the kernels take bfloat16 and float16"
    K, V = q.shape[-1], v.shape[-1]
    if max(K, V) > WIDEST:
        return f"K = {K} and V = {V}, and the kernels take at most {WIDEST}"
    return None


@jax.jit
def log_linear_attention(q, k, v, g, level_scales, initial_state, segment_ids):
    """Tokens in their seats, and the kernels over them. See `jla.log_linear_attention`."""
    return _seats.seated(core, q, k, v, g, level_scales, initial_state, segment_ids)


def core(q, k, v, g, level_scales, used=None):
    """The outputs of aligned sequences, as `_seats.seated` asks for them.

    All products take bfloat16 operands and add in float32, float16 inputs included.
    """
    T, V, dtype = v.shape[1], v.shape[-1], v.dtype
    w, decays = weights.weights(g, level_scales, LEAF)
    q, k, v = (_pad(x.astype(bf16)) for x in (q, k, v))
    return _core(q, k, v, w, decays, weights.plan(T, LEAF)[1])[:, :T, :, :V].astype(dtype)


def _pad(x):
    """Tokens of zeros to whole tiles of 8, features of zeros to whole tiles of 64."""
    return jnp.pad(x, ((0, 0), (0, -x.shape[1] % TILE_ROWS), (0, 0), (0, -x.shape[3] % TILE_WIDTH)))


@functools.partial(jax.custom_vjp, nondiff_argnums=(5,))
def _core(q, k, v, w, decays, per):
    """The core on whole tiles, from `weights.weights`."""
    axes = _axes(q, v)
    arrays, names = _with_decays((q, k, v, w), decays, axes)
    run = functools.partial(_forward, per=per, keep=False)
    (o,) = shardwise(run, names, (axes["v"],))(*arrays)
    return o


def _core_forward(q, k, v, w, decays, per):
    axes = _axes(q, v)
    arrays, names = _with_decays((q, k, v, w), decays, axes)
    results = [axes["v"]] if decays is None else [axes["v"], axes["states"]]
    run = functools.partial(_forward, per=per, keep=True)
    o, *states = shardwise(run, names, results)(*arrays)
    states = [checkpoint_name(x, "log_linear_states") for x in states]
    return o, (q, k, v, w, decays, states)


def _core_backward(per, residuals, do):
    q, k, v, w, decays, states = residuals
    axes = _axes(q, v)
    arrays, names = _with_decays((q, k, v, do, w), decays, axes)
    results = [axes["of_head"], axes["of_head"], axes["v"], axes["w"]]
    if decays is not None:
        results.append(axes["decays"])
        names = (*names, axes["states"])
    run = functools.partial(_backward, per=per)
    dq, dk, dv, dw, *ddecays = shardwise(run, names, results)(*arrays, *states)

    def over_group(x):
        if x.shape == q.shape:
            return x
        return x.astype(f32).reshape(*q.shape[:3], -1, q.shape[3]).sum(3).astype(bf16)

    return over_group(dq), over_group(dk), dv, dw, ddecays[0] if ddecays else None


_core.defvjp(_core_forward, _core_backward)


def _axes(q, v):
    """The axis letters that `shardwise` splits by. One key head serves all shards whole."""
    keys, heads = ("one", "H") if q.shape[2] == 1 < v.shape[2] else ("H", "HV")
    return dict(
        q=f"B T {keys} K",
        v=f"B T {heads} V",
        of_head=f"B T {heads} K",
        w=f"B {heads} N P C",
        decays=f"B {heads} n",
        states=f"B {heads} n V K",
    )


def _with_decays(arrays, decays, axes):
    values = len(arrays) - 3
    names = (axes["q"], axes["q"], *[axes["v"]] * values, axes["w"])
    if decays is None:
        return arrays, names
    return (*arrays, decays), (*names, axes["decays"])


def _sizes(w, per):
    N = w.shape[2]
    blocks = -(-N // per)
    return N, blocks, *weights.planes(per, blocks)


def _forward(q, k, v, w, decays=None, *, per, keep):
    """o, and with `keep` the states that the backward pass reads (if there are any)."""
    _, blocks, inside, _, P = _sizes(w, per)
    states = None
    if decays is not None:
        leaves = weighted_sums(v, k, w, blocks - 1, tree.leaf_jobs(per, P - 1))
        states = tree.up(leaves, decays)
    o = outputs(q, k, v, w, states, per=per, inside=inside)
    return (o, states) if keep and states is not None else (o,)


def _backward(q, k, v, do, w, decays=None, states=None, *, per):
    """All backward kernels: dq and dk for each head, dv, and the gradients of w and the decays."""
    N, blocks, inside, above, _ = _sizes(w, per)
    of_leaves = of_decays = None
    if decays is not None:
        jobs = sum(nodes * parts for nodes, parts in tree.heights(per, blocks))
        read = weighted_sums(do, q, w, jobs, tree.reader_jobs(N, per, blocks, inside))
        read = tree.by_height(read, per, blocks)
        of_leaves, of_decays = tree.down(read, states, decays)
    dq, by_reads = reader_gradients(q, k, v, do, w, states, per=per, inside=inside)
    dk, dv, by_read = writer_gradients(q, k, v, do, w, of_leaves, per=per, inside=inside)
    dw = weights.gradient_of_weights(by_reads, by_read, inside, above)
    return (dq, dk, dv, dw) if decays is None else (dq, dk, dv, dw, of_decays)
