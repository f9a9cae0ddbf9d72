"""Log-linear attention as Pallas kernels; docs/kernels/log_linear.md explains their design.

Forward: `sums` makes the states of the leaf blocks, `tree_states` those above, `outputs` the rest.
Backward: `sums` makes the gradients of the states that are read, `tree_gradients` brings them down
to the leaf blocks, and `gradients` makes all others, chunk by chunk. What the decays and
level scales are worth is XLA's (`weights`), and so are their gradients.
"""

import functools

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name

from jla._core import alignment, packed_levels
from jla._core import level_weights as weights
from jla._core.derivatives import reverse_only
from jla._core.shardwise import defvjp, for_each_row
from jla.pallas.log_linear import operands, over_devices, step, token, tree
from jla.pallas.log_linear.gradients import reader_gradients, writer_gradients
from jla.pallas.log_linear.outputs import outputs
from jla.pallas.log_linear.step import log_linear_step
from jla.pallas.log_linear.sums import weighted_sums
from jla.pallas.log_linear.token import log_linear_token
from jla.pallas.log_linear.tree_kernels import tree_gradients, tree_states

__all__ = [
    "log_linear_attention",
    "log_linear_mamba2",
    "log_linear_step",
    "log_linear_token",
    "unsupported",
]

bf16, f32 = jnp.bfloat16, jnp.float32

LEAF_BLOCK = 256  # tokens of a leaf block: a power of two, 64 to 2048
WIDEST = 128  # K or V; the registers of one warpgroup hold no wider row


def unsupported(name, q, k, v, *_, slots=None):
    """Why the kernels of the function `name` cannot serve these arguments, or None."""
    if name == "log_linear_step":
        return step.unsupported(q, v)
    if name == "log_linear_token":
        return token.unsupported(q, k, v)
    if q.dtype == f32:
        return "q, k and v are float32, and the kernels take bfloat16 and float16"
    K, V = q.shape[-1], v.shape[-1]
    if max(K, V) > WIDEST:
        return f"K = {K} and V = {V}, and the kernels take at most {WIDEST}"
    return None


@functools.partial(jax.jit, static_argnames="node_axis")
@reverse_only("jla.log_linear_attention")
def log_linear_attention(
    q, k, v, g, level_scales, initial_state, segment_ids, *, node_axis=None
):  # fmt: skip
    """Tokens in aligned slots, and the kernels over them. See `jla.log_linear_attention`, and for
    `node_axis` `jla._core.movement.aligned_log_linear`."""
    if node_axis is not None:
        return over_devices.run(q, k, v, g, level_scales, node_axis, LEAF_BLOCK)
    return packed_levels.run_aligned(core, q, k, v, g, level_scales, initial_state, segment_ids)


@jax.jit
@reverse_only("jla.log_linear_attention")
def log_linear_mamba2(q, k, u, g, logits, value_scales, skip, segment_ids):
    """Mamba-2's outputs: `log_linear_attention`'s for the values `value_scales u` and the level
    scales `softplus(logits)`, plus `skip u`.

    The scales are part of the weights with which tokens are read, and the skip's weight is added to
    the one with which a token reads itself, so that none costs a pass over memory.

    Args:
      u: [B, T, H, V]. logits: [B, T, H, L]. value_scales: [B, T, H], float32. skip: [H], float32.
        The others are those of the public function.

    Returns:
      [B, T, H, V] in u's dtype.
    """
    skip = for_each_row(skip[None, :, None], u)
    # Without an initial state `run_aligned` does not move levels, so it can take logits.
    run = functools.partial(core, skip=skip, activation=jax.nn.softplus)
    return alignment.run_aligned(run, q, k, u, g, logits, None, segment_ids, value_scales)[0]


def core(
    q, k, v, g, level_scales, *, occupied=None, value_scales=None, skip=None, activation=None
):  # fmt: skip
    """The outputs of aligned sequences, see `alignment.run_aligned`; plus skip [B, 1, H, 1] v.

    All products take bfloat16 operands and add in float32, float16 inputs included.
    """
    T, V, dtype = v.shape[1], v.shape[-1], v.dtype
    w, decays = weights.weights(g, level_scales, LEAF_BLOCK, value_scales, activation)
    q, k, v = map(operands.whole_tiles, (q, k, v))
    per = weights.division(T, LEAF_BLOCK)[1]
    live = None if occupied is None or decays is None else weights.live(occupied, per)
    return _core(q, k, v, w, decays, skip, live, per)[:, :T, :, :V].astype(dtype)


@functools.partial(jax.custom_vjp, nondiff_argnums=(7,))
def _core(q, k, v, w, decays, skip, live, per):
    """The core on whole tiles, from `level_weights.weights` and `weights.live`."""
    return _run_forward(q, k, v, w, decays, skip, live, per, keep=False)[0]


def _core_forward(q, k, v, w, decays, skip, live, per):
    o, *states = _run_forward(q, k, v, w, decays, skip, live, per, keep=True)
    states = checkpoint_name(states[0], "log_linear_states") if states else None
    return o, (q, k, v, w, decays, skip, live, states)


def _run_forward(q, k, v, w, decays, skip, live, per, keep):
    results = ["v", "states"] if keep and decays is not None else ["v"]
    arrays = dict(q=q, k=k, v=v, w=w, decays=decays, skip=skip, live=live)
    return operands.by_shards(_forward, results, arrays, per=per, keep=keep)


def _core_backward(per, residuals, do):
    q, k, v, w, decays, skip, live, states = residuals
    results = ["of_head", "of_head", "v", "w"]
    results += [name for name, x in (("decays", decays), ("skip", skip)) if x is not None]
    arrays = dict(q=q, k=k, v=v, do=do, w=w, decays=decays, skip=skip, states=states, live=live)
    dq, dk, dv, dw, *others = operands.by_shards(_backward, results, arrays, per=per)
    dq, dk = (operands.over_group(x, q) for x in (dq, dk))
    ddecays, dskip = (others.pop(0) if x is not None else None for x in (decays, skip))
    return dq, dk, dv, dw, ddecays, dskip, None


defvjp(_core, _core_forward, _core_backward)


def _forward(*, q, k, v, w, decays=None, skip=None, live=None, per, keep):
    """o, and with `keep` the states that the backward pass reads (if there are any)."""
    blocks, inside, above = _sizes(w, per)
    states = None
    if decays is not None:
        job = tree.leaf_jobs(per, w.shape[3] - 1)
        counts = tree.live_counts(live, blocks - 1, job)
        states, _ = tree_states(weighted_sums(v, k, w, counts, blocks - 1, job), decays)
    options = dict(per=per, inside=inside, above=above)
    o = outputs(q, k, v, w, states, skip, live, None, None, **options)
    return (o, states) if keep and states is not None else (o,)


def _backward(*, q, k, v, do, w, decays=None, skip=None, states=None, live=None, per):
    """All backward kernels: dq and dk for each head, dv, and the gradients of w, of the decays and
    of the skip's weight, where there are such."""
    blocks, inside, above = _sizes(w, per)
    of_leaves, others = None, []
    if decays is not None:
        jobs = sum(nodes * parts for nodes, parts in tree.heights(per, blocks))
        job = tree.reader_jobs(w.shape[2], per, blocks, inside)
        read = weighted_sums(do, q, w, tree.live_counts(live, jobs, job), jobs, job)
        of_leaves, of_decays = tree_gradients(read, states, decays, per)
        others.append(of_decays)
    options = dict(per=per, inside=inside)
    dq, by_reads = reader_gradients(
        q, k, v, do, w, states, live, None, None, above=above, skip=skip is not None, **options
    )
    dk, dv, by_read = writer_gradients(q, k, v, do, w, of_leaves, skip, live, **options)
    dw = weights.gradient_of_weights(by_reads, by_read, live, inside, above)
    if skip is not None:
        others.append(weights.gradient_of_skip(by_reads, live))
    return dq, dk, dv, dw, *others


def _sizes(w, per):
    """The leaf blocks, and the levels inside of one and above."""
    blocks = -(-w.shape[2] // per)
    return blocks, *weights.levels_of(per, blocks)
