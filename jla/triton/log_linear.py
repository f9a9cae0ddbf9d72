"""Log-linear attention as Triton kernels."""

import functools

import jax
import jax.numpy as jnp
import triton

from jla._core import alignment, level_weights, packed_levels
from jla._core.axes import LOG_LINEAR, with_value_heads
from jla._core.derivatives import reverse_only
from jla._core.shardwise import defvjp, shardwise
from jla.reference import log_linear as reference
from jla.triton import configs, launch
from jla.triton.kernels import log_linear_chunks as chunks
from jla.triton.kernels import log_linear_step as step

__all__ = ["log_linear_attention", "log_linear_mamba2", "log_linear_step", "unsupported"]

SDS = jax.ShapeDtypeStruct
f32, bf16 = jnp.float32, jnp.bfloat16

_GIVEN = with_value_heads(LOG_LINEAR)
_QUERIES, _VALUES, _OF_HEAD = _GIVEN["q"], _GIVEN["v"], "B T HV K"
_WEIGHTS, _LIVE = "B HV N P C", "B N"


def unsupported(name, *arrays, slots=None):
    """Why the kernels of the function `name` cannot serve these arguments, or None: they serve
    all that the public function takes."""
    return None


@jax.jit
@reverse_only("jla.log_linear_attention")
def log_linear_attention(q, k, v, g, level_scales, initial_state, segment_ids):
    """Tokens in aligned slots, and the kernels over them. See `jla.log_linear_attention`."""
    return packed_levels.run_aligned(_core, q, k, v, g, level_scales, initial_state, segment_ids)


@jax.jit
@reverse_only("jla.log_linear_attention")
def log_linear_mamba2(q, k, u, g, logits, value_scales, skip, segment_ids):
    """Mamba-2's outputs, see `jla._fused.log_linear_mamba2`: the values' scales and the softplus
    are part of the weights with which tokens are read."""
    run = functools.partial(_core, activation=jax.nn.softplus)
    o = alignment.run_aligned(run, q, k, u, g, logits, None, segment_ids, value_scales)[0]
    return (o.astype(f32) + skip[None, None, :, None] * u.astype(f32)).astype(u.dtype)


def _core(q, k, v, g, level_scales, *, occupied=None, value_scales=None, activation=None):
    """The outputs of aligned sequences, see `alignment.run_aligned`.

    float16 inputs become bfloat16: the states would not fit into float16's range.
    """
    chunk = level_weights.CHUNK
    N, dtype = -(-v.shape[1] // chunk), v.dtype
    whole = chunk << (N - 1).bit_length()  # all levels are inside of one leaf block
    w, _ = level_weights.weights(g, level_scales, whole, value_scales, activation)
    live = None
    if occupied is not None:
        slots = jnp.pad(occupied, ((0, 0), (0, N * chunk - occupied.shape[1])))
        live = slots.reshape(-1, N, chunk).any(2).astype(jnp.int32)
    q, k, v = (x if x.dtype == f32 else x.astype(bf16) for x in (q, k, v))
    return _differentiable(q, k, v, w, live).astype(dtype)


@jax.custom_vjp
def _differentiable(q, k, v, w, live):
    """o from `level_weights.weights` and the chunks that hold tokens, [B, N] int32, or None."""
    return _shardwise(_forward, [_VALUES], q, k, v, w, live)[0]


def _backward_from(residuals, do):
    q, k, v, w, live = residuals
    results = [_OF_HEAD, _OF_HEAD, _VALUES, _WEIGHTS]
    dq, dk, dv, dw = _shardwise(_backward, results, q, k, v, w, live, do)

    def over_group(x):
        if x.shape == q.shape:
            return x
        return x.astype(f32).reshape(*q.shape[:3], -1, q.shape[3]).sum(3).astype(q.dtype)

    return over_group(dq), over_group(dk), dv, dw, None


defvjp(_differentiable, lambda *arrays: (_differentiable(*arrays), arrays), _backward_from)


def _shardwise(function, results, q, k, v, w, live, *more):
    operands = [_QUERIES, _QUERIES, _VALUES, _WEIGHTS, *(_VALUES for _ in more)]
    arrays = [q, k, v, w, *more]
    if live is not None:
        operands, arrays = [*operands, _LIVE], [*arrays, live]
    return shardwise(function, operands, results)(*arrays)


def _forward(q, k, v, w, live=None):
    return (_outputs(q, k, v, w, _sums(k, v, w, reverse=False), live, reverse=False),)


def _backward(q, k, v, w, do, live=None):
    """dq and dk of every value head, dv and dw. What reads and what is read are the same with
    q and k, and v and do, exchanged."""
    states, gradients = _sums(k, v, w, reverse=False), _sums(q, do, w, reverse=True)
    dq, by_reads = _gradients(q, k, do, v, w, states, live, reverse=False)
    dk, by_read = _gradients(k, q, v, do, w, gradients, live, reverse=True)
    dv = _outputs(k, q, do, w, gradients, live, reverse=True)
    return dq, dk, dv, _gradient_of_weights(by_reads, by_read, live)


def _gradient_of_weights(by_reads, by_read, live):
    """Each plane from the role that a token has in it; what was left unwritten is selected away."""
    N, P = by_reads.shape[2:4]
    reads = level_weights.reading(N, P - 2)
    # Above a chunk, a token that would be read has readers only if there are chunks after its node.
    number, level = jnp.arange(N)[:, None, None], jnp.arange(P - 2)[None, :, None]
    inside = level_weights.LEVELS
    node = number >> jnp.maximum(level - inside, 0)
    read = (level < inside) | ((node + 1) << jnp.maximum(level - inside, 0) < N)
    zeros = jnp.zeros((), f32)
    levels = jnp.where(reads, by_reads[..., 1:-1, :], jnp.where(read, by_read[..., 1:-1, :], zeros))
    own = by_reads[..., :1, :]
    gradient = jnp.concatenate([own, levels, jnp.zeros_like(own)], axis=-2)
    return (
        gradient if live is None else jnp.where(live[:, None, :, None, None] > 0, gradient, zeros)
    )


def _sums(y, z, w, *, reverse):
    """The nodes' states, [B, HV, N - 1, K, V] in the inputs' dtype; None of one chunk."""
    (B, T, _, K), V, (HV, N) = y.shape, z.shape[3], w.shape[1:3]
    if N == 1:
        return None
    config, sizes = _settings("log_linear_sums", y, z, w)
    blocks = triton.cdiv(K, sizes["BK"]) * triton.cdiv(V, sizes["BV"])
    nodes = (1 << (N - 1).bit_length()) - 1
    return launch.call(
        chunks.log_linear_sums,
        *(y, z, w, T, N),
        grid=(nodes * B * HV * blocks,),
        outputs=[SDS((B, HV, N - 1, K, V), z.dtype)],
        config=config,
        constants=dict(REVERSE=reverse, **sizes),
    )[0]


def _outputs(x, y, z, w, states, live, *, reverse):
    (B, T, HV, V), N = z.shape, w.shape[2]
    config, sizes = _settings("log_linear_outputs", x, z, w)
    return launch.call(
        chunks.log_linear_outputs,
        *(x, y, z, w, z if states is None else states, w if live is None else live, T, N),
        grid=(B * HV * N * triton.cdiv(V, sizes["BV"]),),
        outputs=[SDS(z.shape, z.dtype)],
        config=config,
        constants=dict(REVERSE=reverse, SKIP=live is not None, **sizes),
    )[0]


def _gradients(x, y, own, other, w, states, live, *, reverse):
    """The gradient of x for each value head, [B, T, HV, K], and of w in this role."""
    (B, T, _, K), (HV, N) = x.shape, w.shape[1:3]
    config, sizes = _settings("log_linear_gradients", x, own, w)
    blocks = triton.cdiv(K, sizes["BK"])
    states, chunks_live = own if states is None else states, w if live is None else live
    dx, dw = launch.call(
        chunks.log_linear_gradients,
        *(x, y, own, other, w, states, chunks_live, B, T, N),
        grid=(B * HV * N * blocks,),
        outputs=[SDS((B, T, HV, K), x.dtype), SDS((blocks, *w.shape), f32)],
        config=config,
        constants=dict(REVERSE=reverse, SKIP=live is not None, **sizes),
    )
    return dx, dw[0] if blocks == 1 else dw.sum(0)


def _settings(name, x, z, w):
    """A kernel's config, and the sizes that are its constants."""
    name = name + "_float32" if x.dtype == f32 else name
    config = configs.config(name, launch.target())
    K, V = x.shape[3], z.shape[3]
    return config, dict(
        H=x.shape[2], HV=w.shape[1], K=K, V=V, P=w.shape[3],
        BK=min(config.blocks["BK"], _power_of_two_from(K)),
        BV=min(config.blocks["BV"], _power_of_two_from(V)),
    )  # fmt: skip


def _power_of_two_from(n):
    return max(16, triton.next_power_of_2(n))


@jax.jit
def log_linear_step(q, k, v, g, level_scales, state, *, slots=None):
    """One token in one kernel. See `jla.log_linear_step`.

    Only the levels in use are read, those where bit l - 1 of the row's position is set. Of a
    `LazyLogLinearState` one level is written, that into which others merge; of a `LogLinearState`
    all that are read, too. All arithmetic is float32. The state is overwritten where its buffer is
    donated or is a temporary of the caller's program, and copied before the kernel otherwise.

    Floor at B=128 H=16 K=V=128, position 4095: 1.74 GB of a lazy state (twelve levels are read, one
    is written), 0.41 ms at 4.3 TB/s; 0.9 ms on an A100 of 1.9 TB/s. Twice that of the other.

    Derivatives are those of the reference's formula, in XLA.
    """
    return reference.stepped_by_kernel(_step, q, k, v, g, level_scales, state, slots)


def _step(q, k, v, decays, level_scales, levels, position, slots=None, *, lazy):
    (B, H, V), (L, K) = v.shape, levels.shape[2:4]
    kernel, on_pool = step.log_linear_step, ()
    if slots is not None:
        kernel, on_pool = step.log_linear_step_on_pool, (slots, levels.shape[0])
    config = configs.config("log_linear_step", launch.target())
    rows = triton.next_power_of_2(K)
    width = min(config.blocks["BV"] * 128 // max(rows, 128), triton.next_power_of_2(V))
    return tuple(
        launch.call(
            kernel,
            *(q, k, v, decays, level_scales, levels, position, *on_pool),
            grid=(B * H * triton.cdiv(V, width),),
            outputs=[SDS(v.shape, v.dtype), SDS(levels.shape, levels.dtype)],
            config=config,
            constants=dict(H=q.shape[1], HV=H, L=L, K=K, V=V, LAZY=lazy, BK=rows, BV=width),
            in_place={5: 1},
        )
    )
