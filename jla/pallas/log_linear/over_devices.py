"""Log-linear attention with a piece of the sequence on each device, each a node of the tree.

Forward: the tree's kernel gives the root's state, too. The devices exchange these, and `outputs`
reads other devices' states as it reads the tree's, at the levels above. Backward: the gradients of
what was read of others are summed like those of the tree's states; they are exchanged likewise, and
what the others say of this device's root goes down the tree with all else.

Other devices' states are read by all chunks up to where their decay has vanished: one more state
for a chunk, which reads half of the tree's heights on average.
"""

import functools

import jax
import jax.numpy as jnp
from jax import lax
from jax.ad_checkpoint import checkpoint_name

from jla._core import level_weights as weights
from jla._core import movement
from jla._core.shardwise import defvjp
from jla.pallas.log_linear import operands, tree
from jla.pallas.log_linear.gradients import reader_gradients, writer_gradients
from jla.pallas.log_linear.outputs import outputs
from jla.pallas.log_linear.sums import weighted_sums
from jla.pallas.log_linear.tree_kernels import tree_gradients, tree_states

bf16, f32 = jnp.bfloat16, jnp.float32


def run(q, k, v, g, level_scales, axis, leaf):
    """The outputs of this device's tokens, and the levels of the tree over devices after all, as
    `jla._core.movement.device_levels` has them: [B, H, n, K, V] float32.

    The number of tokens is a power of two.
    """
    (_, T, _, V), K = v.shape, k.shape[3]
    count = movement.number_of_levels(lax.axis_size(axis))
    others = movement.level_of_devices(T), count
    w, decays, before = weights.weights(g, level_scales, leaf, others=others)
    reads = weights.others_read(before[..., :-1], lax.axis_index(axis))
    arrays = *map(operands.whole_tiles, (q, k, v)), w, decays, before[..., -1] / weights.LOG2E
    o, end = _core(*arrays, lax.stop_gradient(reads), weights.division(T, leaf)[1], axis)
    end = jnp.swapaxes(end[..., :V, :K], -1, -2)
    return o[:, :T, :, :V].astype(v.dtype), end


@functools.partial(jax.custom_vjp, nondiff_argnums=(7, 8))
def _core(q, k, v, w, decays, log_decay, reads, per, axis):
    """The outputs and levels on whole tiles, from `level_weights.weights` and `others_read`; the
    log decay over all tokens, [B, H]."""
    return _core_forward(q, k, v, w, decays, log_decay, reads, per, axis)[0]


def _core_forward(q, k, v, w, decays, log_decay, reads, per, axis):
    states, root = operands.by_shards(
        _states, ["states", "state"], dict(k=k, v=v, w=w, decays=decays), per=per
    )
    exchange = functools.partial(movement.device_levels, axis=axis)
    (others, end), pull = jax.vjp(exchange, log_decay, root)
    kept = checkpoint_name((states, others.astype(bf16)), "log_linear_states")
    arrays = dict(q=q, k=k, v=v, w=w, states=kept[0], others=kept[1], reads=reads)
    (o,) = operands.by_shards(_outputs, ["v"], arrays, per=per)
    return (o, end), (q, k, v, w, decays, reads, *kept, pull)


def _core_backward(per, axis, residuals, cotangents):
    q, k, v, w, decays, reads, states, others, pull = residuals
    do, dend = cotangents
    count = others.shape[2]
    (read,) = operands.by_shards(
        _read_sums, ["jobs"], dict(q=q, do=do, w=w, reads=reads), per=per, count=count
    )
    parts = tree.others_parts(w.shape[2])
    of_others = read[:, :, read.shape[2] - count * parts :]
    of_others = of_others.reshape(*of_others.shape[:2], count, parts, *of_others.shape[3:])
    dlog_decay, droot = pull((of_others.sum(3), dend))
    arrays = dict(q=q, k=k, v=v, do=do, w=w, decays=decays, states=states, others=others)
    arrays |= dict(reads=reads, read=read, droot=droot)
    results = ["of_head", "of_head", "v", "w", "decays"]
    dq, dk, dv, dw, ddecays = operands.by_shards(_gradients, results, arrays, per=per)
    dq, dk = (operands.over_group(x, q) for x in (dq, dk))
    return dq, dk, dv, dw, ddecays, dlog_decay, None


defvjp(_core, _core_forward, _core_backward)


def _states(*, k, v, w, decays, per):
    """The tree's states, bf16, and the root's, float32."""
    blocks = decays.shape[2]
    leaves = weighted_sums(v, k, w, None, blocks, tree.leaf_jobs(per, w.shape[3] - 1))
    return tree_states(leaves, decays, root=True)


def _outputs(*, q, k, v, w, states, others, reads, per):
    inside, above = weights.levels_of(per, states.shape[2])
    options = dict(per=per, inside=inside, above=above)
    return (outputs(q, k, v, w, states, None, None, others, reads, **options),)


def _read_sums(*, q, do, w, reads, per, count):
    """The gradients of all states that are read, in parts: `tree.reader_jobs`."""
    N, blocks = w.shape[2], w.shape[2] // per
    inside, _ = weights.levels_of(per, blocks)
    of_tree = sum(nodes * parts for nodes, parts in tree.heights(per, blocks))
    jobs = of_tree + count * tree.others_parts(N)
    job = tree.reader_jobs(N, per, blocks, inside, count)
    _, counts, _ = job(jnp.arange(of_tree, dtype=jnp.int32))
    counts = jnp.broadcast_to(counts, (*reads.shape[:2], of_tree))
    counts = jnp.concatenate([counts, tree.others_counts(reads, count)], axis=2)
    return (weighted_sums(do, q, w, counts, jobs, job),)


def _gradients(*, q, k, v, do, w, decays, states, others, reads, read, droot, per):
    """What `_backward` of the whole sequence has, and what other devices say of the root."""
    inside, above = weights.levels_of(per, states.shape[2])
    sums = read if above else None
    of_leaves, of_decays = tree_gradients(sums, states, decays, per, droot)
    options = dict(per=per, inside=inside)
    dq, by_reads = reader_gradients(
        q, k, v, do, w, states, None, others, reads, above=above, skip=False, **options
    )
    dk, dv, by_read = writer_gradients(q, k, v, do, w, of_leaves, None, None, **options)
    dw = weights.gradient_of_weights(by_reads, by_read, None, inside, above, reads)
    return dq, dk, dv, dw, of_decays
