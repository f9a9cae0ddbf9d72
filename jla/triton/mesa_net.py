"""MesaNet as Triton kernels; docs/triton.md explains their design.

Forward: `states` carries both states from chunk to chunk, `solve` solves for every token, `read`
reads with the solutions. Backward: `states` again (cheaper than to keep them), `read` turned around
makes the gradients of the solutions, `solve` solves for them, `states` in reverse carries the
states' gradients back, and `gradients` makes all else of what is then known.
"""

import functools

import jax
import jax.numpy as jnp
import triton
from jax.ad_checkpoint import checkpoint_name

from jla._core import packed
from jla._core.axes import MESA_NET, letters, of_step
from jla._core.derivatives import reverse_only
from jla._core.segments import segment_starts
from jla._core.shardwise import defvjp, shardwise, varying_as
from jla._core.states import MesaState, zero_mesa_state
from jla._core.steps import differentiable
from jla.reference import mesa_net as reference
from jla.triton import configs, launch
from jla.triton.kernels import mesa_gradients, mesa_read, mesa_solve, mesa_states
from jla.triton.kernels import mesa_step as step

__all__ = ["mesa_net", "mesa_step", "unsupported"]

SDS = jax.ShapeDtypeStruct
bf16, f16, f32 = jnp.bfloat16, jnp.float16, jnp.float32

CHUNK = 64
# The most keys' features with which S, in float16, stays in shared memory.
WIDEST = 128

# To `shardwise` each axis of an array has a letter of its own.
_KK = MESA_NET["initial_state.kk"].replace("K K", "K J")
_STATES = (_KK, MESA_NET["initial_state.kv"])
_INPUTS = (*letters(MESA_NET, "q k v"), "B H TP", "B H TP", "B H K", *_STATES)
_OUTPUTS = (MESA_NET["o"], *_STATES)
# What the forward pass keeps for the backward pass, with the names that checkpoint policies use.
_KEPT = {"mesa_solution": MESA_NET["k"], "mesa_solution_scale": "B H TP"}
# States of pieces, and the pieces' spans.
_PIECES, _SPANS = ("B H P K J", "B H P K V"), "B P two"
_STEP = of_step(MESA_NET)
_STEP_INPUTS = (*letters(_STEP, "q k v g beta"), "B H K", *_STATES)
_STEP_OUTPUTS = (_STEP["o"], *_STATES)
_POOL_STATES = tuple(x.replace("B", "R") for x in _STATES)
_POOL_INPUTS = (*_STEP_INPUTS[:6], *_POOL_STATES, "B")
_POOL_OUTPUTS = (_STEP["o"], *_POOL_STATES)


def unsupported(name, *arrays, slots=None):
    """Why the kernels of the function `name` cannot serve these arguments, or None: they serve
    all that the public function takes."""
    return None


def _tolerance(dtype):
    """The relative residual at which a token stops, for inputs of this dtype.

    In float32, rounding leaves little less. For 16-bit inputs it is about what float16 operands
    reach, and a quarter of bfloat16's rounding.
    """
    return 1e-6 if dtype == f32 else 5e-4


@functools.partial(jax.jit, static_argnames=("cg_steps", "tolerance"))
@reverse_only("jla.mesa_net")
def mesa_net(
    q, k, v, g, beta, lamb, initial_state, segment_ids, *, cg_steps, tolerance=None
):  # fmt: skip
    """Runs the kernels. See `jla.mesa_net`.

    Products of 16-bit inputs take 16-bit operands, in the solves float16; those of float32 inputs
    three TF32 products each. All add in float32. A row stops when its residual is `tolerance` times
    its right-hand side; 0, for all iterations, is for benchmarks.
    """
    if tolerance is None:
        tolerance = _tolerance(q.dtype)
    options = cg_steps, tolerance
    if packed.count(initial_state) is not None:

        def run(q, k, v, g, beta, states, spans):
            return _on_chunks(q, k, v, g, beta, lamb, states, spans, options)

        return packed.by_pieces(run, (q, k, v, g, beta), initial_state, segment_ids, CHUNK)
    if segment_ids is not None:
        # To start a new segment, set its first token's decay to 0.
        g = jnp.where(segment_starts(segment_ids)[..., None], -jnp.inf, g)
    if initial_state is None:
        initial_state = zero_mesa_state(k[:, 0], v[:, 0])
    return _on_chunks(q, k, v, g, beta, lamb, initial_state, None, options)


def _on_chunks(q, k, v, g, beta, lamb, state, spans, options):
    """Fills the last chunk. With the spans of pieces the states are those of each, see
    `packed.by_pieces`."""
    B, T, H, K = q.shape
    # Tokens that fill the last chunk neither decay nor write.
    g, beta = (
        jnp.pad(jnp.swapaxes(x.astype(f32), 1, 2), ((0, 0), (0, 0), (0, -T % CHUNK)))
        for x in (g, beta)
    )
    lamb = jnp.broadcast_to(varying_as(lamb, k), (B, H, K))
    o, kk, kv = _mesa(q, k, v, g, beta, lamb, *state, spans, *options)
    return o, MesaState(kk, kv)


@functools.partial(jax.custom_vjp, nondiff_argnums=(9, 10))
def _mesa(q, k, v, g, beta, lamb, kk, kv, spans, cg_steps, tolerance):
    """MesaNet with g and beta [B, H, TP] float32, and lamb [B, H, K]. With spans, or None, the
    states are those of pieces, before and after."""
    return _run(q, k, v, g, beta, lamb, kk, kv, spans, cg_steps, tolerance, keep=False)


def _of_pieces(run, spans, operands, results):
    """`shardwise`; with spans, which `run` takes last, the states of these axes are of pieces."""
    if spans is None:
        return shardwise(run, operands, results)
    exchange = dict(zip(_STATES, _PIECES, strict=True))
    operands, results = ([exchange.get(x, x) for x in axes] for axes in (operands, results))
    call = shardwise(run, (*operands, _SPANS), results)
    return lambda *arrays: call(*arrays, spans)


def _row_and_column(x, state):
    """A number for each key feature, [B, H, K], at a state's rows and at its columns."""
    x = x.reshape(*x.shape[:2], *[1] * (state.ndim - 4), x.shape[2])
    return x[..., None], x[..., None, :]


def _run(q, k, v, g, beta, lamb, kk, kv, spans, cg_steps, tolerance, *, keep):
    run = functools.partial(_forward, steps=cg_steps, tolerance=tolerance, keep=keep)
    results = (*_OUTPUTS, *_KEPT.values()) if keep else _OUTPUTS
    k, kk, kv = _scaled(k, lamb, kk, kv)
    # Where lamb is NaN, only what the queries are multiplied by is: states stay as they are.
    scale = jax.lax.rsqrt(lamb)
    o, kk, kv, *x = _of_pieces(run, spans, _INPUTS, results)(q, k, v, g, beta, scale, kk, kv)
    row, column = _row_and_column(jnp.sqrt(_or_one(lamb)), kk)
    return o, row * kk * column, row * kv, *x


def _mesa_forward(q, k, v, g, beta, lamb, kk, kv, spans, cg_steps, tolerance):
    results = _run(q, k, v, g, beta, lamb, kk, kv, spans, cg_steps, tolerance, keep=True)
    kept = map(checkpoint_name, results[3:], _KEPT)
    return results[:3], (k, v, g, beta, lamb, kk, kv, *kept, spans)


def _mesa_backward(cg_steps, tolerance, residuals, cotangents):
    k, v, g, beta, lamb, kk, kv, *kept, spans = residuals
    do, dkk, dkv = cotangents
    dtype = k.dtype
    scale = jax.lax.rsqrt(lamb)
    row, column = _row_and_column(jnp.sqrt(_or_one(lamb)), dkk)
    # What the states' kernel carries in Hkk's place is -dHkk^T.
    ends = -jnp.swapaxes(row * dkk * column, -1, -2), row * dkv
    k, kk, kv = _scaled(k, lamb, kk, kv)
    run = functools.partial(_backward, steps=cg_steps, tolerance=tolerance, dtype=dtype)
    y, y_scale, dk, dv, dg, dbeta, products, dkk, dkv = _of_pieces(
        run,
        spans,
        (*_INPUTS[1:], *_KEPT.values(), *_OUTPUTS),
        (*_KEPT.values(), *letters(MESA_NET, "k v"), "B H TP", "B H TP", "B H K", *_STATES),
    )(k, v, g, beta, scale, kk, kv, *kept, do, *ends)
    y_scale = jnp.swapaxes(y_scale, 1, 2)[:, : y.shape[1], :, None]
    dq = (y.astype(f32) * y_scale * scale[:, None]).astype(dtype)
    row, column = _row_and_column(scale, dkk)
    dkk = -row * jnp.swapaxes(dkk, -1, -2) * column
    return dq, dk, dv, dg, dbeta, -scale * scale * products, dkk, row * dkv, None


defvjp(_mesa, _mesa_forward, _mesa_backward)


def _or_one(lamb):
    """lamb, and 1 where it is NaN."""
    return jnp.where(jnp.isnan(lamb), 1.0, lamb)


def _scaled(k, lamb, kk, kv):
    """The keys and the states for which lamb is 1; keys of 16 bits in float16."""
    scale = jax.lax.rsqrt(_or_one(lamb))
    dtype = k.dtype
    k = k.astype(f32) * scale[:, None]
    if dtype != f32:
        largest = float(jnp.finfo(f16).max)
        k = jnp.clip(k, -largest, largest).astype(f16)
    row, column = _row_and_column(scale, kk)
    return k, row * kk * column, row * kv


def _forward(q, k, v, g, beta, scale, kk, kv, *spans, steps, tolerance, keep):
    """The forward kernels: o and the last states, with `keep` also the solutions."""
    inputs = k, k, v, g, beta, _largest(k), kk, kv
    kk_states, kk_scale, kv_states, *states = _states(*inputs, *spans)
    x = _solve(q, scale, k, g, beta, kk_states, kk_scale, steps=steps, tolerance=tolerance)
    o = _read(*x, k, v, g, beta, kv_states, SDS(v.shape, v.dtype))
    return (o, *states, *x) if keep else (o, *states)


def _backward(
    k, v, g, beta, scale, kk, kv, x, x_scale, do, end_kk, end_kv, *spans, steps, tolerance, dtype
):  # fmt: skip
    """The backward kernels, and what is small enough for XLA: the log decays' gradient."""
    inputs, ends = (k, k, v, g, beta, _largest(k), kk, kv), (end_kk, end_kv)
    kk_states, kk_scale, kv_states, *_ = _states(*inputs, *spans)
    dx = _read(do, None, v, k, g, beta, kv_states, SDS(k.shape, f32))
    y = _solve(dx, None, k, g, beta, kk_states, kk_scale, steps=steps, tolerance=tolerance)
    arrays = x, y[0], do, g, x_scale, y[1]
    dkk, _, dkv, *starts = _states(*arrays, *ends, *spans, reverse=True)
    inputs = k, v, do, x, x_scale, *y, g, beta, scale, kk_states, kk_scale, kv_states, dkk, dkv
    dk, dv, direct, written, reads, read, through, border, products = _gradients(*inputs, dtype)

    # A token's decay counts where something written before it is read after it: in the chunk's own
    # pairs on either side of it, and in what goes through the states.
    by_chunk = functools.partial(jnp.reshape, shape=(*g.shape[:2], -1, CHUNK))
    written, through = written.sum(2), through.sum(2)
    within = by_chunk(reads - read + through)
    within = jnp.flip(jnp.cumsum(jnp.flip(within, -1), -1), -1)
    before = jnp.cumsum(by_chunk(beta * written)[..., :-1], -1)
    before = jnp.pad(before, ((0, 0), (0, 0), (0, 0), (1, 0)))
    carried = border.sum(-1) * jnp.exp(by_chunk(g).sum(-1))
    dg = (within + before + carried[..., None]).reshape(g.shape)
    return *y, dk, dv, dg, direct + written, products.sum(2), *starts


# ------------------------------------------------------------------------------ the kernels' calls


def _wide(size):
    """The block that holds a whole axis of features."""
    return max(16, triton.next_power_of_2(size))


def _largest(k):
    """The square of each token's largest element of k, [B, H, TP]; zeros beyond the last."""
    largest = jnp.square(jnp.abs(k).max(-1).astype(f32))
    return jnp.pad(jnp.swapaxes(largest, 1, 2), ((0, 0), (0, 0), (0, -k.shape[1] % CHUNK)))


def _states(left, x, y, g, weight, other, x_start, y_start, spans=None, *, reverse=False):
    """`states_kernel`'s outputs: both states before each chunk, the first one's scale second, and
    both after the last; with `reverse` after each chunk, and before the first. With spans of pieces
    the last two are those of each.
    """
    pieces = 0 if spans is None else spans.shape[1]
    spans = x_start if spans is None else spans  # not read
    (B, T, H, K), V = left.shape, y.shape[-1]
    N = g.shape[-1] // CHUNK
    dtype = f32 if left.dtype == f32 else bf16
    config = _config("mesa_states", dtype)
    rows = _wide(K)
    # Of twice as many rows half as many columns: what a program holds in registers stays the same.
    columns = min(config.blocks["BC"] * 128 // max(rows, 128), _wide(max(K, V)))
    programs = B * H * (triton.cdiv(K, columns) + triton.cdiv(V, columns))
    return launch.call(
        mesa_states.states_kernel,
        *(left, x, y, g, weight, other, x_start, y_start, spans, T, H, N),
        grid=(programs, pieces) if pieces else (programs,),
        outputs=[
            SDS((B, H, N, K, K), dtype if reverse or dtype == f32 else f16),
            SDS((B, H, N), f32),
            SDS((B, H, N, K, V), dtype),
            SDS(x_start.shape, f32),
            SDS(y_start.shape, f32),
        ],
        config=config,
        constants=_common(dtype) | dict(K=K, V=V, P=pieces, BK=rows, BC=columns, REVERSE=reverse),
    )


def _solve(b, scale, k, g, beta, s, s_scale, *, steps, tolerance):
    """The solutions x of all A_t x_t = b_t, or of b_t times `scale` if it is not None; and what
    they are divided by."""
    B, T, H, K = k.shape
    N, rows = g.shape[-1] // CHUNK, _wide(K)
    dtype = f32 if k.dtype == f32 else bf16
    whole = dtype != f32 and rows <= WIDEST
    config = _config("mesa_solve" if whole else "mesa_solve_wide", dtype)
    tokens = config.blocks["ROWS"]
    work = (1,)
    if not whole:
        # Of half as many features twice as many rows: registers stay the same.
        tokens = tokens * 256 // max(rows, 128)
        work = (B, H, N, CHUNK, rows + CHUNK)
    constants = dict(
        K=K, BK=rows, ROWS=tokens, WHOLE=whole, SCALED=scale is not None, TOLERANCE=tolerance
    )
    x, x_scale, _ = launch.call(
        mesa_solve.solve_kernel,
        *(b, s_scale if scale is None else scale, k, g, beta, s, s_scale, T, H, N, steps),
        grid=(B * H * N * (CHUNK // tokens),),
        outputs=[SDS(k.shape, k.dtype), SDS(g.shape, f32), SDS(work, k.dtype)],
        config=config,
        constants=_common(dtype) | constants,
    )
    return x, x_scale


def _read(x, x_scale, k, v, g, beta, s, out):
    """What tokens read with x, of `out`'s shape and dtype; turned around if x_scale is None. See
    `read_kernel`."""
    (B, T, H, D), E = x.shape, v.shape[-1]
    N = g.shape[-1] // CHUNK
    dtype = s.dtype
    config = _config("mesa_read", dtype)
    columns, part = min(config.blocks["BC"], _wide(E)), min(config.blocks["BI"], _wide(D))
    constants = dict(D=D, E=E, BC=columns, BI=part, TURNED=x_scale is None)
    (o,) = launch.call(
        mesa_read.read_kernel,
        *(x, g if x_scale is None else x_scale, k, v, g, beta, s, T, H, N),
        grid=(B * H * N * triton.cdiv(E, columns),),
        outputs=[out],
        config=config,
        constants=_common(dtype) | constants,
    )
    return o


def _gradients(
    k, v, do, x, x_scale, y, y_scale, g, beta, scale, kk, kk_scale, kv, dkk, dkv, dtype
):  # fmt: skip
    """`gradients_kernel`'s outputs; dk and dv of this dtype."""
    (B, T, H, K), V, TP = k.shape, v.shape[-1], g.shape[-1]
    N = TP // CHUNK
    config = _config("mesa_gradients", dkk.dtype)
    columns = min(config.blocks["BC"], _wide(max(K, V)))
    part = min(config.blocks["BI"], _wide(K), _wide(V))
    of_keys = triton.cdiv(K, columns)
    blocks = of_keys + triton.cdiv(V, columns)
    vector = SDS((B, H, TP), f32)
    sizes = dict(K=K, V=V, BC=columns, BI=part)
    return launch.call(
        mesa_gradients.gradients_kernel,
        *(k, v, do, x, x_scale, y, y_scale, g, beta, scale),
        *(kk, kk_scale, kv, dkk, dkv, T, H, N),
        grid=(B * H * N * blocks,),
        outputs=[
            *(SDS(k.shape, dtype), SDS(v.shape, dtype)),
            *(vector, SDS((B, H, of_keys, TP), f32), vector, vector),
            *(SDS((B, H, blocks, TP), f32), SDS((B, H, N, blocks), f32), SDS((B, H, N, K), f32)),
        ],
        config=config,
        constants=_common(dkk.dtype) | sizes,
    )


def _config(name, dtype):
    return configs.config(name + ("_float32" if dtype == f32 else ""), launch.target())


def _common(dtype):
    """Constants of every kernel."""
    return dict(C=CHUNK, PRECISION="tf32x3" if dtype == f32 else "tf32")


# ------------------------------------------------------------------------------ the step


@functools.partial(jax.jit, static_argnames="cg_steps")
def mesa_step(q, k, v, g, beta, lamb, state, *, cg_steps, slots=None):
    """One token in one kernel. See `jla.mesa_step`.

    All arithmetic is float32, whatever the inputs' dtype. The states are overwritten where their
    buffers are donated or temporaries of the caller's program, and copied before the kernel
    otherwise. Derivatives are those of the reference's formula, in XLA.
    """
    lamb = jnp.broadcast_to(lamb, q.shape)
    # A row stops when its residual is this much smaller than its query.
    tolerance = 1e-6 if q.dtype == f32 else 1e-4
    run = functools.partial(_step, steps=cg_steps, tolerance=tolerance)
    formula = functools.partial(_step_formula, steps=cg_steps)
    if slots is None:
        one = differentiable(run, formula, _STEP_INPUTS, _STEP_OUTPUTS)
        o, kk, kv = one(q, k, v, g, beta, lamb, *state)
    else:
        one = differentiable(run, formula, _POOL_INPUTS, _POOL_OUTPUTS)
        o, kk, kv = one(q, k, v, g, beta, lamb, *state, slots)
    return o, MesaState(kk, kv)


def _step_formula(q, k, v, g, beta, lamb, kk, kv, slots=None, *, steps):
    arrays = q, k, v, g, beta, lamb, MesaState(kk, kv)
    o, state = reference.mesa_step_by_row(*arrays, cg_steps=steps, slots=slots)
    return o, *state


def _step(q, k, v, g, beta, lamb, kk, kv, slots=None, *, steps, tolerance):
    """The kernel call."""
    (B, H, K), V = q.shape, v.shape[-1]
    kernel, on_pool, heads = step.mesa_step, (), {}
    if slots is not None:
        kernel, on_pool, heads = step.mesa_step_on_pool, (slots, kk.shape[0]), dict(H=H)
    config = configs.config("mesa_step", launch.target())
    rows = _wide(K)
    whole = rows <= 128
    part = min(config.blocks["BV"] * 128 // max(rows, 128), _wide(V))
    o, _, kk, kv = launch.call(
        kernel,
        *(q, k, v, g, beta, lamb, kk, kv, steps, *on_pool),
        grid=(B * H,),
        outputs=[
            SDS(v.shape, v.dtype),
            SDS((1,) if whole else (B, H, rows), f32),
            SDS(kk.shape, f32),
            SDS(kv.shape, f32),
        ],
        config=config,
        constants=dict(K=K, V=V, BK=rows, BV=part, WHOLE=whole, TOLERANCE=tolerance) | heads,
        in_place={6: 2, 7: 3},
    )
    return o, kk, kv
