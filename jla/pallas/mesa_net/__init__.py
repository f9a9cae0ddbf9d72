"""MesaNet as Pallas kernels; docs/kernels/mesa_net.md explains their design.

Forward: `states.forward` carries both states from chunk to chunk, `solve.outputs` solves and reads
every chunk at once.
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
from jla._core.shardwise import defvjp, shardwise
from jla._core.states import MesaState, zero_mesa_state
from jla._core.varying import varying_as
from jla.pallas.common.chunks import CHUNK, LOG2E, TILE_WIDTH
from jla.pallas.common.padding import missing_tokens, pad
from jla.pallas.mesa_net import log_decays, solve, states, step, token
from jla.pallas.mesa_net.gradients import chunk_gradients
from jla.pallas.mesa_net.step import mesa_step
from jla.pallas.mesa_net.token import mesa_token

__all__ = ["mesa_net", "mesa_step", "mesa_token", "unsupported"]

bf16, f16, f32 = jnp.bfloat16, jnp.float16, jnp.float32

WIDEST = 128  # K or V; the registers of one warpgroup hold no wider row
# exp2 of it is zero in float32, so it is as good as any stronger decay; and a sum of 64 such has an
# error below 1e-3.
STRONGEST = -160.0

_STATES = (step.KK, MESA_NET["initial_state.kv"])
_INPUTS = (*letters(MESA_NET, "q k v"), "B H TP", "B H TP", "B H TP", "B H K", *_STATES)
_OUTPUTS = (MESA_NET["o"], *_STATES)
# What the forward pass keeps for the backward pass, with the names that checkpoint policies use.
_KEPT = {
    "mesa_solution": "B T H K",
    "mesa_kk": "B H N K J",
    "mesa_kk_scale": "B H N D",
    "mesa_kv": "B H N K V",
    "mesa_kv_scale": "B H N D",
}


_GRADIENTS = (*letters(MESA_NET, "q k v"), "B H TP", "B H TP", "B H K", *_STATES)

# States of pieces, and the pieces' spans.
_OF_PIECES, _SPANS = ("B H P K J", "B H P K V"), "B P two"


def unsupported(name, q, k, v, *_, slots=None):
    """Why the kernels of the function `name` cannot serve these arguments, or None."""
    if name == "mesa_step":
        return step.unsupported(q, k, v)
    if name == "mesa_token":
        return token.unsupported(q, k, v)
    if q.dtype == f32:
        return "q, k and v are float32, and the kernels take bfloat16 and float16"
    K, V = q.shape[-1], v.shape[-1]
    if max(K, V) > WIDEST:
        return f"K = {K} and V = {V}, and the kernels take at most {WIDEST}"
    return None


@functools.partial(jax.jit, static_argnames=("cg_steps", "tolerance", "axis_name"))
@reverse_only("jla.mesa_net")
def mesa_net(
    q, k, v, g, beta, lamb, initial_state, segment_ids,
    *, cg_steps, tolerance=solve.TOLERANCE, axis_name=None,
):  # fmt: skip
    """Pads to whole tiles and runs the kernels. See `jla.mesa_net`, and for `axis_name`
    `jla._core.sequence.by_states`.

    Products take float16 operands and add in float32: keys divided by sqrt(lamb) and values must
    lie in float16's range, beyond which they are cut off. A row stops when its residual is
    `tolerance` times its right-hand side. benchmarks/mechanisms.py gives 0, for all iterations.
    """
    options = cg_steps, tolerance
    if packed.count(initial_state) is not None:

        def run(q, k, v, g, beta, states, spans):
            return _on_tiles(q, k, v, g, beta, lamb, states, None, spans, None, options)

        return packed.by_pieces(run, (q, k, v, g, beta), initial_state, segment_ids, CHUNK)
    arrays = q, k, v, g, beta, lamb, initial_state, segment_ids
    return _on_tiles(*arrays, None, axis_name, options)


def _on_tiles(
    q, k, v, g, beta, lamb, initial_state, segment_ids, spans, axis_name, options
):  # fmt: skip
    """Pads to whole tiles. With the spans of pieces the states are those of each, see
    `packed.by_pieces`."""
    (B, T, H, K), V, dtype = q.shape, v.shape[-1], v.dtype
    keys, values = -K % TILE_WIDTH, -V % TILE_WIDTH
    g = jnp.maximum(g * LOG2E, STRONGEST)
    starts = jnp.zeros((B, T), bool) if segment_ids is None else segment_starts(segment_ids)
    first = log_decays.firsts(jnp.pad(starts, ((0, 0), (0, -T % CHUNK))))
    first = jnp.broadcast_to(first[:, None], (B, H, first.shape[1]))
    g, beta = (
        jnp.pad(jnp.swapaxes(x.astype(f32), 1, 2), ((0, 0), (0, 0), (0, -T % CHUNK)))
        for x in (g, beta)
    )
    lamb = jnp.broadcast_to(varying_as(lamb, k), (B, H, K))
    lamb = jnp.pad(lamb, ((0, 0), (0, 0), (0, keys)), constant_values=1.0)
    if initial_state is None:
        initial_state = zero_mesa_state(k[:, 0], v[:, 0])
    kk, kv = initial_state
    whole = [(0, 0)] * (kk.ndim - 2)
    kk = jnp.pad(kk, [*whole, (0, keys), (0, keys)])
    kv = jnp.pad(kv, [*whole, (0, keys), (0, values)])
    # Tokens of zeros neither read, write nor decay; features of zeros stay zero.
    q, k, v = (
        pad(x, tokens=missing_tokens(T), features=features)
        for x, features in ((q.astype(bf16), keys), (k, keys), (v, values))
    )
    arrays, options = (q, k, v, g, first, beta, lamb, kk, kv), (*options, dtype)
    if axis_name is None:
        o, kk, kv = _mesa(*arrays, spans, *options)
    else:
        links = sequence.links(segment_ids, B, T, axis_name)
        o, kk, kv = _mesa_over(*arrays, links, *options, axis_name)
    return o[:, :T, :, :V].astype(dtype), MesaState(kk[..., :K, :K], kv[..., :K, :V])


@functools.partial(jax.custom_vjp, nondiff_argnums=(10, 11, 12))
def _mesa(q, k, v, g, first, beta, lamb, kk, kv, spans, cg_steps, tolerance, dtype):
    """MesaNet on whole tiles; g in base 2, `log_decays.firsts` and beta [B, H, TP]; lamb [B, H, K];
    k and v of `dtype`. With spans, or None, the states are those of pieces, before and after."""
    run = functools.partial(_forward, steps=cg_steps, tolerance=tolerance, keep=False)
    # Alone, for XLA makes one slow pass of keys' norms and their scaling: 0.21 ms where two take
    # 0.14. With a backward pass it makes two anyway.
    k = jax.lax.optimization_barrier(k)
    inputs = _arranged(_scaled(k, v, lamb, kk, kv), g, first, beta)
    return _unscaled(lamb, _of_pieces(run, spans, _INPUTS, _OUTPUTS)(q, *inputs))


def _of_pieces(run, spans, operands, results):
    """`shardwise`; with spans, which `run` takes last, the states of these axes are of pieces."""
    if spans is None:
        return shardwise(run, operands, results)
    exchange = dict(zip(_STATES, _OF_PIECES, strict=True))
    operands, results = ([exchange.get(x, x) for x in axes] for axes in (operands, results))
    call = shardwise(run, (*operands, _SPANS), results)
    return lambda *arrays: call(*arrays, spans)


def _mesa_forward(q, k, v, g, first, beta, lamb, kk, kv, spans, cg_steps, tolerance, dtype):
    run = functools.partial(_forward, steps=cg_steps, tolerance=tolerance, keep=True)
    inputs = _arranged(_scaled(k, v, lamb, kk, kv), g, first, beta)
    results = (*_OUTPUTS, *_KEPT.values())
    results = _of_pieces(run, spans, _INPUTS, results)(q, *inputs)
    *results, x, kk, kk_scale, kv, kv_scale = results
    kept = map(checkpoint_name, (x, kk, kk_scale, kv, kv_scale), _KEPT)
    return _unscaled(lamb, results), (*inputs[:6], lamb, *kept, spans)


def _mesa_backward(cg_steps, tolerance, dtype, residuals, cotangents):
    k, v, cumulated, first, beta, scale, lamb, *kept, spans = residuals
    do, *ends = cotangents
    run = functools.partial(_backward, steps=cg_steps, tolerance=tolerance)
    axes = (*_INPUTS[1:6], *_KEPT.values(), *_OUTPUTS)
    arrays = k, v, cumulated, first, beta, *kept, do, *_ends(lamb, *ends)
    results = _of_pieces(run, spans, axes, _GRADIENTS)(*arrays)
    return *_unscaled_gradients(scale, dtype, *results), None


def _ends(lamb, dkk, dkv):
    """What the states' kernel carries in reverse: in Hkk's place it is -dHkk^T."""
    row, column = _row_and_column(jnp.sqrt(_or_one(lamb)), dkk)
    return -jnp.swapaxes(row * dkk * column, -1, -2), row * dkv


def _row_and_column(x, state):
    """A number for each key feature, [B, H, K], at a state's rows and at its columns."""
    x = x.reshape(*x.shape[:2], *[1] * (state.ndim - 4), x.shape[2])
    return x[..., None], x[..., None, :]


def _unscaled_gradients(scale, dtype, dq, dk, dv, dg, dbeta, products, dkk, dkv):
    dq, dk = (x.astype(f32) * scale[:, None] for x in (dq, dk))
    row, column = _row_and_column(scale, dkk)
    dkk = -row * jnp.swapaxes(dkk, -1, -2) * column
    dkv = row * dkv
    dq, dk, dv = dq.astype(bf16), dk.astype(dtype), dv.astype(dtype)
    return dq, dk, dv, dg, None, dbeta, -scale * scale * products, dkk, dkv


defvjp(_mesa, _mesa_forward, _mesa_backward)


# A piece of a sequence on each device. The states' first pass says what the piece does to them;
# that is exchanged, and the second pass uses again what the first has made. Backward likewise,
# with the states' gradients from right to left. All devices have the same lamb, so that they can
# exchange the kernels' states, for which it is 1.

_MADE = ("B H P K J", "B H P K V")
_SUMMARY = ("B H", *_STATES, *_MADE)


@functools.partial(jax.custom_vjp, nondiff_argnums=(10, 11, 12, 13))
def _mesa_over(q, k, v, g, first, beta, lamb, kk, kv, links, cg_steps, tolerance, dtype, axis):
    """As `_mesa`: the outputs of this device's piece, and the states that leave it; `kk` and `kv`
    are those before the first piece."""
    inputs = _arranged(_scaled(k, v, lamb, kk, kv), g, first, beta)
    options = dict(steps=cg_steps, tolerance=tolerance, keep=False)
    return _unscaled(lamb, _run_over(q, *inputs, links, axis, options))


def _mesa_over_forward(
    q, k, v, g, first, beta, lamb, kk, kv, links, cg_steps, tolerance, dtype, axis
):  # fmt: skip
    inputs = _arranged(_scaled(k, v, lamb, kk, kv), g, first, beta)
    options = dict(steps=cg_steps, tolerance=tolerance, keep=True)
    *results, x, kk, kk_scale, kv, kv_scale = _run_over(q, *inputs, links, axis, options)
    kept = map(checkpoint_name, (x, kk, kk_scale, kv, kv_scale), _KEPT)
    return _unscaled(lamb, results), (*inputs[:6], lamb, *kept, links)


def _run_over(q, k, v, cumulated, first, beta, scale, kk, kv, links, axis, options):
    summarise = shardwise(_summarise, _INPUTS[1:6], _SUMMARY)
    decay, *term, kk_made, kv_made = summarise(k, v, cumulated, first, beta)
    state = MesaState(kk, kv)
    start = sequence.entering(MESA_STATES.step, (decay, MesaState(*term)), state, links, axis)
    results = (*_OUTPUTS, *_KEPT.values()) if options["keep"] else _OUTPUTS
    return shardwise(functools.partial(_forward, **options), (*_INPUTS, *_MADE), results)(
        q, k, v, cumulated, first, beta, scale, *start, kk_made, kv_made
    )


def _mesa_over_backward(cg_steps, tolerance, dtype, axis, residuals, cotangents):
    k, v, cumulated, first, beta, scale, lamb, *kept, links = residuals
    do, *ends = cotangents
    ends = _ends(lamb, *ends)
    solution = _INPUTS[0], "B H TP", "B H N K"
    axes = (*_INPUTS[1:6], *_KEPT.values(), _OUTPUTS[0])
    run = functools.partial(_solve_back, steps=cg_steps, tolerance=tolerance)
    arrays = k, v, cumulated, first, beta, *kept, do
    summarise = shardwise(run, (*axes, *_STATES), (*solution, *_SUMMARY))
    y, through_states, products, decay, kk, kv, *made = summarise(*arrays, *ends)
    said = MesaState(kk, kv)
    after = sequence.entering_gradient(MESA_STATES.step, decay, said, links, axis)
    ends = map(jnp.add, ends, after)
    results = shardwise(_gradients_from, (*axes, *solution, *_STATES, *_MADE), _GRADIENTS)(
        *arrays, y, through_states, products, *ends, *made
    )
    *gradients, dkk, dkv = _unscaled_gradients(scale, dtype, *results)
    return *gradients, *sequence.of_first_device((dkk, dkv), axis), None


defvjp(_mesa_over, _mesa_over_forward, _mesa_over_backward)


def _summarise(k, v, cumulated, first, beta):
    decays, weights = _decays_and_weights(cumulated, first, beta)
    return states.summary(k, v, decays, weights)


def _solve_back(
    k, v, cumulated, first, beta, x, kk, kk_scale, kv, kv_scale, do, *ends, steps, tolerance
):  # fmt: skip
    """The first of the backward kernels, and what the piece does to the states' gradients."""
    decays = log_decays.from_start(cumulated, first)
    since, _ = log_decays.reach(first)
    borders, options = (kk, kk_scale, kv, kv_scale), dict(steps=steps, tolerance=tolerance)
    solution = solve.output_gradients(
        k, v, do, x, cumulated, decays, since, beta, *borders, **options
    )  # fmt: skip
    return *solution, *states.gradient_summary(x, solution[0], do, decays, ends)


def _gradients_from(
    k, v, cumulated, first, beta, x, kk, kk_scale, kv, kv_scale, do,
    y, through_states, products, end_kk, end_kv, *made,
):  # fmt: skip
    """The other two, from the states' gradients behind the piece."""
    operands = k, v, cumulated, first, beta, x, kk, kk_scale, kv, kv_scale, do
    solution, small = (y, through_states, products), _from_decays(cumulated, first)
    return _backward_from(operands, small, solution, (end_kk, end_kv), made)


def _scaled(k, v, lamb, kk, kv):
    """What the kernels, for which lamb is 1, make of the keys, the values, lamb and the states.

    Where lamb is NaN, only what the queries are multiplied by is: the states stay as they are.
    """
    scale = jax.lax.rsqrt(_or_one(lamb))
    largest = float(jnp.finfo(f16).max)
    k, v = (
        jnp.clip(x.astype(f32), -largest, largest).astype(f16)
        for x in (k.astype(f32) * scale[:, None], v)
    )
    row, column = _row_and_column(scale, kk)
    return k, v, jax.lax.rsqrt(lamb), row * kk * column, row * kv


def _or_one(lamb):
    """lamb, and 1 where it is NaN."""
    return jnp.where(jnp.isnan(lamb), 1.0, lamb)


def _arranged(scaled, g, first, beta):
    k, v, scale, kk, kv = scaled
    return k, v, log_decays.cumulated(g, first), first, beta, scale, kk, kv


def _unscaled(lamb, results):
    o, kk, kv = results
    row, column = _row_and_column(jnp.sqrt(_or_one(lamb)), kk)
    return o, row * kk * column, row * kv


def _decays_and_weights(cumulated, first, beta):
    decays = log_decays.from_start(cumulated, first)
    return decays, beta * log_decays.to_end(cumulated, first)


def _forward(q, k, v, cumulated, first, beta, scale, kk, kv, *more, steps, tolerance, keep):
    """Both forward kernels: o and the last states, with `keep` also what `_KEPT` lists. `more` is
    `states.summary`'s of the pieces, if they were made before, or spans."""
    decays, weights = _decays_and_weights(cumulated, first, beta)
    results = states.forward(k, v, decays, weights, (kk, kv), **_spans_or_made(more))
    kk_states, kv_states, kk, kv, kk_scale, kv_scale = results
    borders = (kk_states, kk_scale, kv_states, kv_scale)
    o, *x = solve.outputs(
        q,
        k,
        v,
        scale,
        cumulated,
        decays,
        log_decays.reach(first)[0],
        beta,
        *borders,
        steps=steps,
        tolerance=tolerance,
        keep=keep,
    )
    return (o, kk, kv, *x, *borders) if keep else (o, kk, kv)


def _spans_or_made(arrays):
    return dict(spans=arrays[0]) if len(arrays) == 1 else dict(made=arrays or None)


def _backward(
    k, v, cumulated, first, beta, x, kk, kk_scale, kv, kv_scale, do, end_kk, end_kv, *spans,
    steps, tolerance,
):  # fmt: skip
    """The three backward kernels, and what is small enough for XLA: the log decays' gradient."""
    decays, _, since, _ = small = _from_decays(cumulated, first)
    borders, options = (kk, kk_scale, kv, kv_scale), dict(steps=steps, tolerance=tolerance)
    solution = solve.output_gradients(
        k, v, do, x, cumulated, decays, since, beta, *borders, **options
    )  # fmt: skip
    operands = k, v, cumulated, first, beta, x, *borders, do
    return _backward_from(operands, small, solution, (end_kk, end_kv), spans)


def _from_decays(cumulated, first):
    """What the backward kernels take of the log decays."""
    decays, later = log_decays.from_start(cumulated, first), log_decays.to_end(cumulated, first)
    return decays, later, *log_decays.reach(first)


def _backward_from(operands, small, solution, ends, more=()):
    """As `_backward`, from the solves' results; `more` as of `_forward`."""
    k, v, cumulated, _, beta, x, *borders, do = operands
    decays, later, _, until = small
    y, through_states, products = solution
    dkk, dkv, *starts = states.reverse(x, y, do, decays, ends, **_spans_or_made(more))
    dk, dv, direct, written, reads, read, border = chunk_gradients(
        k, v, do, x, y, cumulated, until, later, beta, *borders, dkk, dkv
    )

    # A token's decay counts where something written before it is read after it: in the chunk's own
    # pairs on either side of it, and in what goes through the states.
    within = log_decays.by_chunk(reads - read + through_states)
    within = jnp.flip(jnp.cumsum(jnp.flip(within, -1), -1), -1)
    before = jnp.cumsum(log_decays.by_chunk(beta * written)[..., :-1], -1)
    before = jnp.pad(before, ((0, 0), (0, 0), (0, 0), (1, 0)))
    carried = (
        log_decays.by_chunk(border).sum(-1, keepdims=True) * log_decays.by_chunk(decays)[..., -1:]
    )
    dg = within + before + carried
    dg = dg.reshape(beta.shape) / LOG2E
    return y, dk, dv, dg, direct + written, products.sum(2), *starts
