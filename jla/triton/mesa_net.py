"""MesaNet as Triton kernels; docs/triton.md explains their design.

Forward: `states` carries both states from chunk to chunk, `solve` solves for every token, `read`
reads with the solutions. Backward: `states` again (cheaper than to keep them), `read` turned around
makes the gradients of the solutions, `solve` solves for them, `states` in reverse carries the
states' gradients back, and `gradients` makes all else of what is then known.
"""

import functools

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name

from jla._core import packed, sequence
from jla._core.axes import MESA_NET, letters
from jla._core.derivatives import reverse_only
from jla._core.movement import MESA_NET as MESA_STATES
from jla._core.segments import segment_starts
from jla._core.shardwise import defvjp, shardwise, varying_as
from jla._core.states import MesaState, zero_mesa_state
from jla.triton import mesa_calls as calls
from jla.triton import pieces
from jla.triton.mesa_calls import CHUNK
from jla.triton.mesa_step import mesa_step

__all__ = ["mesa_net", "mesa_step", "unsupported"]

SDS = jax.ShapeDtypeStruct
f16, f32 = jnp.float16, jnp.float32

# To `shardwise` each axis of an array has a letter of its own.
_KK = MESA_NET["initial_state.kk"].replace("K K", "K J")
_STATES = (_KK, MESA_NET["initial_state.kv"])
_INPUTS = (*letters(MESA_NET, "q k v"), "B H TP", "B H TP", "B H K", *_STATES)
_OUTPUTS = (MESA_NET["o"], *_STATES)
# What the forward pass keeps for the backward pass, with the names that checkpoint policies use.
_KEPT = {"mesa_solution": MESA_NET["k"], "mesa_solution_scale": "B H TP"}
_GRADIENTS = (*letters(MESA_NET, "k v"), "B H TP", "B H TP", "B H K", *_STATES)
# States of pieces, and the pieces' spans.
_PIECES, _SPANS = ("B H P K J", "B H P K V"), "B P two"


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


@functools.partial(jax.jit, static_argnames=("cg_steps", "tolerance", "axis_name"))
@reverse_only("jla.mesa_net")
def mesa_net(
    q, k, v, g, beta, lamb, initial_state, segment_ids,
    *, cg_steps, tolerance=None, axis_name=None,
):  # fmt: skip
    """Runs the kernels. See `jla.mesa_net`, and for `axis_name` `jla._core.sequence.by_states`.

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
    over = None
    if axis_name is not None:
        over = sequence.links(segment_ids, *q.shape[:2], axis_name), axis_name
    return _on_chunks(q, k, v, g, beta, lamb, initial_state, None, options, over)


def _on_chunks(q, k, v, g, beta, lamb, state, spans, options, over=None):
    """Fills the last chunk. With the spans of pieces the states are those of each, see
    `packed.by_pieces`. Over devices `over` is how their pieces link, and the axis."""
    B, T, H, K = q.shape
    # Tokens that fill the last chunk neither decay nor write.
    g, beta = (
        jnp.pad(jnp.swapaxes(x.astype(f32), 1, 2), ((0, 0), (0, 0), (0, -T % CHUNK)))
        for x in (g, beta)
    )
    lamb = jnp.broadcast_to(varying_as(lamb, k), (B, H, K))
    if over is None:
        o, kk, kv = _mesa(q, k, v, g, beta, lamb, *state, spans, *options)
    else:
        links, axis_name = over
        o, kk, kv = _mesa_over(q, k, v, g, beta, lamb, *state, links, *options, axis_name)
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
    return o, *_unscaled(lamb, kk, kv), *x


def _unscaled(lamb, kk, kv):
    """The states for this lamb, of those for which it is 1."""
    row, column = _row_and_column(jnp.sqrt(_or_one(lamb)), kk)
    return row * kk * column, row * kv


def _mesa_forward(q, k, v, g, beta, lamb, kk, kv, spans, cg_steps, tolerance):
    results = _run(q, k, v, g, beta, lamb, kk, kv, spans, cg_steps, tolerance, keep=True)
    kept = map(checkpoint_name, results[3:], _KEPT)
    return results[:3], (k, v, g, beta, lamb, kk, kv, *kept, spans)


def _mesa_backward(cg_steps, tolerance, residuals, cotangents):
    k, v, g, beta, lamb, kk, kv, *kept, spans = residuals
    do, dkk, dkv = cotangents
    dtype, ends = k.dtype, _ends(lamb, dkk, dkv)
    scale = jax.lax.rsqrt(lamb)
    k, kk, kv = _scaled(k, lamb, kk, kv)
    run = functools.partial(_backward, steps=cg_steps, tolerance=tolerance, dtype=dtype)
    axes = (*_INPUTS[1:], *_KEPT.values(), *_OUTPUTS)
    arrays = k, v, g, beta, scale, kk, kv, *kept, do, *ends
    results = _of_pieces(run, spans, axes, (*_KEPT.values(), *_GRADIENTS))(*arrays)
    return *_unscaled_gradients(scale, dtype, *results), None


def _ends(lamb, dkk, dkv):
    """What the states' kernel carries in reverse: in Hkk's place it is -dHkk^T."""
    dkk, dkv = _unscaled(lamb, dkk, dkv)
    return -jnp.swapaxes(dkk, -1, -2), dkv


def _unscaled_gradients(scale, dtype, y, y_scale, dk, dv, dg, dbeta, products, dkk, dkv):
    y_scale = jnp.swapaxes(y_scale, 1, 2)[:, : y.shape[1], :, None]
    dq = (y.astype(f32) * y_scale * scale[:, None]).astype(dtype)
    row, column = _row_and_column(scale, dkk)
    dkk = -row * jnp.swapaxes(dkk, -1, -2) * column
    return dq, dk, dv, dg, dbeta, -scale * scale * products, dkk, row * dkv


defvjp(_mesa, _mesa_forward, _mesa_backward)


# A piece of a sequence on each device. The states' first pass says what the piece does to them, and
# that is exchanged; backward likewise, with the states' gradients from right to left. All devices
# have the same lamb, so that they can exchange the kernels' states, for which it is 1.

# Of the pieces that a device cuts its own into: see `calls.first_pass`.
_MADE = (*_PIECES, "B H P")
_SUMMARY = ("B H", *_STATES, *_MADE)
# What the forward pass keeps besides: the states that those pieces start from.
_STARTS = dict(zip(("mesa_kk", "mesa_kv"), _PIECES, strict=True))
# And what the backward pass makes before the exchange: states, and its solutions.
_SOLVED = ("B H N K J", "B H N", "B H N K V", *_KEPT.values())


@functools.partial(jax.custom_vjp, nondiff_argnums=(9, 10, 11))
def _mesa_over(q, k, v, g, beta, lamb, kk, kv, links, cg_steps, tolerance, axis):
    """As `_mesa`: the outputs of this device's piece, and the states that leave it; `kk` and `kv`
    are those before the first piece."""
    arrays, options = (q, k, v, g, beta, lamb, kk, kv), (cg_steps, tolerance)
    return _run_over(*arrays, links, *options, axis, keep=False)


def _mesa_over_forward(q, k, v, g, beta, lamb, kk, kv, links, cg_steps, tolerance, axis):
    arrays, options = (q, k, v, g, beta, lamb, kk, kv), (cg_steps, tolerance)
    o, kk, kv, *kept = _run_over(*arrays, links, *options, axis, keep=True)
    kept = map(checkpoint_name, kept, (*_STARTS, *_KEPT))
    return (o, kk, kv), (k, v, g, beta, lamb, *kept, links)


def _run_over(q, k, v, g, beta, lamb, kk, kv, links, steps, tolerance, axis, *, keep):
    k, kk, kv = _scaled(k, lamb, kk, kv)
    decay, *term, kk_made, kv_made, decays = shardwise(_summarise, _INPUTS[1:5], _SUMMARY)(
        k, v, g, beta
    )
    summary, state = (decay, MesaState(*term)), MesaState(kk, kv)
    start = sequence.entering(MESA_STATES.step, summary, state, links, axis)
    run = functools.partial(_forward_in_pieces, steps=steps, tolerance=tolerance, keep=keep)
    results = (*_OUTPUTS, *_STARTS.values(), *_KEPT.values()) if keep else _OUTPUTS
    made = kk_made, kv_made, decays
    o, kk, kv, *kept = shardwise(run, (*_INPUTS, *_MADE), results)(
        q, k, v, g, beta, jax.lax.rsqrt(lamb), *start, *made
    )
    return o, *_unscaled(lamb, kk, kv), *kept


def _mesa_over_backward(cg_steps, tolerance, axis, residuals, cotangents):
    k, v, g, beta, lamb, kk, kv, *kept, links = residuals
    do, *ends = cotangents
    dtype, ends, scale = k.dtype, _ends(lamb, *ends), jax.lax.rsqrt(lamb)
    k = _scaled_keys(k, lamb)
    run = functools.partial(_solve_back_and_summarise, steps=cg_steps, tolerance=tolerance)
    axes = (*_INPUTS[1:5], *_PIECES, *_KEPT.values(), *_OUTPUTS)
    arrays = k, v, g, beta, kk, kv, *kept, do
    results = shardwise(run, axes, (*_SOLVED, *_SUMMARY))(*arrays, *ends)
    solved, (decay, *said), made = results[:5], results[5:8], results[8:]
    said = MesaState(*said)
    after = sequence.entering_gradient(MESA_STATES.step, decay, said, links, axis)
    run = functools.partial(_gradients_in_pieces, dtype=dtype)
    x, x_scale = kept
    arrays = k, v, do, g, beta, scale, x, x_scale, *solved, *map(jnp.add, ends, after), *made
    axes = *_INPUTS[1:3], _OUTPUTS[0], *_INPUTS[3:6], *_KEPT.values(), *_SOLVED, *_STATES, *_MADE
    results = shardwise(run, axes, _GRADIENTS)(*arrays)
    *gradients, dkk, dkv = _unscaled_gradients(scale, dtype, *solved[3:], *results)
    return *gradients, *sequence.of_first_device((dkk, dkv), axis), None


defvjp(_mesa_over, _mesa_over_forward, _mesa_over_backward)


def _summarise(k, v, g, beta):
    return calls.first_pass(k, k, v, g, beta, calls.largest(k))


def _forward_in_pieces(q, k, v, g, beta, scale, kk, kv, *made, steps, tolerance, keep):
    """As `_forward`, from the states that enter the first piece, and what `_summarise` made; with
    `keep` also the states that the pieces start from."""
    starts, spans, _ = calls.in_pieces(made, (kk, kv), g)
    options = dict(steps=steps, tolerance=tolerance, keep=keep)
    o, kk, kv, *x = _forward(q, k, v, g, beta, scale, *starts, spans, **options)
    o_and_ends = o, kk[:, :, -1], kv[:, :, -1]
    return (*o_and_ends, *starts, *x) if keep else o_and_ends


def _solve_back_and_summarise(
    k, v, g, beta, kk, kv, x, x_scale, do, end_kk, end_kv, *, steps, tolerance
):  # fmt: skip
    spans = pieces.spans(k.shape[0], kk.shape[2], g.shape[-1] // CHUNK)
    options = dict(steps=steps, tolerance=tolerance)
    states, y = _solve_back(k, v, g, beta, kk, kv, do, spans, **options)
    arrays = x, y[0], do, g, x_scale, y[1]
    return *states, *y, *calls.first_pass(*arrays, (end_kk, end_kv), reverse=True)


def _gradients_in_pieces(
    k, v, do, g, beta, scale, x, x_scale, kk, kk_scale, kv, y, y_scale, end_kk, end_kv, *made, dtype
):  # fmt: skip
    """As `_backward`, from the gradients of the states that leave the last piece, and what
    `_solve_back_and_summarise` made; without the solutions."""
    ends, spans, _ = calls.in_pieces(made, (end_kk, end_kv), g, reverse=True)
    arrays = k, v, do, g, beta, scale, x, x_scale
    *gradients, dkk, dkv = _backward_from(
        *arrays, (kk, kk_scale, kv), (y, y_scale), ends, spans, dtype=dtype
    )
    return *gradients, dkk[:, :, 0], dkv[:, :, 0]


# ------------------------------------------------------------------------------ forward, backward


def _or_one(lamb):
    """lamb, and 1 where it is NaN."""
    return jnp.where(jnp.isnan(lamb), 1.0, lamb)


def _scaled(k, lamb, kk, kv):
    """The keys and the states for which lamb is 1."""
    row, column = _row_and_column(jax.lax.rsqrt(_or_one(lamb)), kk)
    return _scaled_keys(k, lamb), row * kk * column, row * kv


def _scaled_keys(k, lamb):
    """Those of 16 bits in float16."""
    dtype = k.dtype
    k = k.astype(f32) * jax.lax.rsqrt(_or_one(lamb))[:, None]
    if dtype != f32:
        largest = float(jnp.finfo(f16).max)
        k = jnp.clip(k, -largest, largest).astype(f16)
    return k


def _forward(q, k, v, g, beta, scale, kk, kv, *spans, steps, tolerance, keep):
    """The forward kernels: o and the last states, with `keep` also the solutions."""
    inputs = k, k, v, g, beta, calls.largest(k), kk, kv
    kk_states, kk_scale, kv_states, *states = calls.states(*inputs, *spans)
    x = calls.solve(q, scale, k, g, beta, kk_states, kk_scale, steps=steps, tolerance=tolerance)
    o = calls.read(*x, k, v, g, beta, kv_states, SDS(v.shape, v.dtype))
    return (o, *states, *x) if keep else (o, *states)


def _backward(
    k, v, g, beta, scale, kk, kv, x, x_scale, do, end_kk, end_kv, *spans, steps, tolerance, dtype
):  # fmt: skip
    """The backward kernels, and what is small enough for XLA: the log decays' gradient."""
    options, ends = dict(steps=steps, tolerance=tolerance), (end_kk, end_kv)
    states, y = _solve_back(k, v, g, beta, kk, kv, do, *spans, **options)
    arrays = k, v, do, g, beta, scale, x, x_scale
    return *y, *_backward_from(*arrays, states, y, ends, *spans, dtype=dtype)


def _solve_back(k, v, g, beta, kk, kv, do, *spans, steps, tolerance):
    """The states before the chunks (the first one's scale second), and the backward solutions."""
    kk, kk_scale, kv, *_ = calls.states(k, k, v, g, beta, calls.largest(k), kk, kv, *spans)
    dx = calls.read(do, None, v, k, g, beta, kv, SDS(k.shape, f32))
    y = calls.solve(dx, None, k, g, beta, kk, kk_scale, steps=steps, tolerance=tolerance)
    return (kk, kk_scale, kv), y


def _backward_from(k, v, do, g, beta, scale, x, x_scale, states, y, ends, *spans, dtype):
    """As `_backward`, from what `_solve_back` returns, and without the solutions."""
    arrays = x, y[0], do, g, x_scale, y[1]
    dkk, _, dkv, *starts = calls.states(*arrays, *ends, *spans, reverse=True)
    inputs = k, v, do, x, x_scale, *y, g, beta, scale, *states, dkk, dkv
    dk, dv, direct, written, *rest = calls.gradients(*inputs, dtype)
    reads, read, through, border, products = rest

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
    return dk, dv, dg, direct + written, products.sum(2), *starts
