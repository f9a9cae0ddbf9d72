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


def core(q, k, v, g, level_scales, taken=None):
    """The outputs of aligned sequences, as `_seats.seated` asks for them.

    All products take bfloat16 operands and add in float32, float16 inputs included.
    """
    T, V, dtype = v.shape[1], v.shape[-1], v.dtype
    w, decays = weights.weights(g, level_scales, LEAF)
    q, k, v = (_pad(x.astype(bf16)) for x in (q, k, v))
    per = weights.plan(T, LEAF)[1]
    live = None if taken is None or decays is None else weights.live(taken, per)
    return _core(q, k, v, w, decays, live, per)[:, :T, :, :V].astype(dtype)


def _pad(x):
    """Tokens of zeros to whole tiles of 8, features of zeros to whole tiles of 64."""
    return jnp.pad(x, ((0, 0), (0, -x.shape[1] % TILE_ROWS), (0, 0), (0, -x.shape[3] % TILE_WIDTH)))


@functools.partial(jax.custom_vjp, nondiff_argnums=(6,))
def _core(q, k, v, w, decays, live, per):
    """The core on whole tiles, from `weights.weights` and `weights.live`."""
    return _run_forward(q, k, v, w, decays, live, per, keep=False)[0]


def _core_forward(q, k, v, w, decays, live, per):
    o, *states = _run_forward(q, k, v, w, decays, live, per, keep=True)
    states = checkpoint_name(states[0], "log_linear_states") if states else None
    return o, (q, k, v, w, decays, live, states)


def _run_forward(q, k, v, w, decays, live, per, keep):
    axes = _axes(q, v)
    arrays, names = _present(axes, q=q, k=k, v=v, w=w, decays=decays, live=live)
    results = [axes["v"], axes["states"]] if keep and decays is not None else [axes["v"]]
    run = functools.partial(_forward, per=per, keep=keep)
    return shardwise(run, names, results)(*arrays)


def _core_backward(per, residuals, do):
    q, k, v, w, decays, live, states = residuals
    axes = _axes(q, v)
    arrays, names = _present(
        axes, q=q, k=k, v=v, do=do, w=w, decays=decays, states=states, live=live
    )
    results = [axes["of_head"], axes["of_head"], axes["v"], axes["w"]]
    if decays is not None:
        results.append(axes["decays"])
    run = functools.partial(_backward, per=per)
    dq, dk, dv, dw, *ddecays = shardwise(run, names, results)(*arrays)

    def over_group(x):
        if x.shape == q.shape:
            return x
        return x.astype(f32).reshape(*q.shape[:3], -1, q.shape[3]).sum(3).astype(bf16)

    return over_group(dq), over_group(dk), dv, dw, ddecays[0] if ddecays else None, None


_core.defvjp(_core_forward, _core_backward)


def _axes(q, v):
    """The axis letters that `shardwise` splits by. One key head serves all shards whole."""
    keys, heads = ("one", "H") if q.shape[2] == 1 < v.shape[2] else ("H", "HV")
    of_keys, of_values = f"B T {keys} K", f"B T {heads} V"
    return dict(
        q=of_keys,
        k=of_keys,
        v=of_values,
        do=of_values,
        of_head=f"B T {heads} K",
        w=f"B {heads} N P C",
        decays=f"B {heads} n",
        states=f"B {heads} n V K",
        live="B N",
    )


def _present(axes, **arrays):
    """Those that are not None, and their axis letters."""
    present = {name: x for name, x in arrays.items() if x is not None}
    return tuple(present.values()), tuple(axes[name] for name in present)


def _forward(q, k, v, w, decays=None, live=None, *, per, keep):
    """o, and with `keep` the states that the backward pass reads (if there are any)."""
    _, blocks, inside, _, P = _sizes(w, per)
    states = None
    if decays is not None:
        job = tree.leaf_jobs(per, P - 1)
        counts = tree.live_counts(live, blocks - 1, job)
        states = tree.up(weighted_sums(v, k, w, counts, blocks - 1, job), decays)
    o = outputs(q, k, v, w, states, live, per=per, inside=inside)
    return (o, states) if keep and states is not None else (o,)


def _backward(q, k, v, do, w, decays=None, states=None, live=None, *, per):
    """All backward kernels: dq and dk for each head, dv, and the gradients of w and the decays."""
    N, blocks, inside, above, _ = _sizes(w, per)
    of_leaves = of_decays = None
    if decays is not None:
        jobs = sum(nodes * parts for nodes, parts in tree.heights(per, blocks))
        job = tree.reader_jobs(N, per, blocks, inside)
        read = weighted_sums(do, q, w, tree.live_counts(live, jobs, job), jobs, job)
        read = tree.by_height(read, per, blocks)
        of_leaves, of_decays = tree.down(read, states, decays)
    dq, by_reads = reader_gradients(q, k, v, do, w, states, live, per=per, inside=inside)
    dk, dv, by_read = writer_gradients(q, k, v, do, w, of_leaves, live, per=per, inside=inside)
    dw = weights.gradient_of_weights(by_reads, by_read, live, inside, above)
    return (dq, dk, dv, dw) if decays is None else (dq, dk, dv, dw, of_decays)


def _sizes(w, per):
    N = w.shape[2]
    blocks = -(-N // per)
    return N, blocks, *weights.planes(per, blocks)
