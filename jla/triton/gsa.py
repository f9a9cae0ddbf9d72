"""Gated Slot Attention as Triton kernels; docs/kernels/gsa.md explains their design.

Forward: `gsa_states` carries both states from chunk to chunk, `gsa_read` makes the slots'
probabilities of all chunks at once, and `gsa_outputs` the outputs. Backward: `gsa_read` goes back
through the second pass to the softmax, `gsa_states` carries both states' gradients back, and
`gsa_gradients` makes all else, pass by pass.
"""

import functools

import jax
import jax.numpy as jnp
import triton
from jax.ad_checkpoint import checkpoint_name

from jla._core import packed, sequence
from jla._core.axes import GSA, letters
from jla._core.derivatives import reverse_only
from jla._core.movement import GSA as GSA_STATES
from jla._core.parts import abc_gates
from jla._core.segments import segment_starts
from jla._core.shardwise import defvjp, shardwise
from jla._core.states import GSAState
from jla.triton import configs, launch, pieces
from jla.triton.gsa_step import gsa_step
from jla.triton.kernels import gsa_backward, gsa_forward

__all__ = ["gsa", "gsa_step", "unsupported"]

SDS = jax.ShapeDtypeStruct
bf16, f32, i32 = jnp.bfloat16, jnp.float32, jnp.int32

CHUNK = gsa_forward.CHUNK.value
WIDEST = 256  # K, V and M; more have not been tried
SMALLEST = 16  # side of a tile that `tl.dot` takes

_INPUTS = letters(GSA, "q k v s g")
_STATES = letters(GSA, "initial_state.hk initial_state.hv")
_OUTPUTS = (GSA["o"], *_STATES)
# What the forward pass keeps for the backward pass, with the names that checkpoint policies use.
_KEPT = {
    "gsa_sums": "B T H M",
    "gsa_totals": "B N H M",
    "gsa_probabilities": "B T HQ M",
    "gsa_key_states": "B H N K M",
    "gsa_value_states": "B H N V M",
}
# States of pieces, and the pieces' spans.
_OF_PIECES, _SPANS = ("B H P K M", "B H P M V"), "B P two"


def unsupported(name, q, k, v, s, *_, slots=None):
    """Why the kernels of the function `name` cannot serve these arguments, or None."""
    K, V, M = (x.shape[-1] for x in (q, v, s))
    if max(K, V, M) > WIDEST:
        return f"K={K}, V={V} and M={M}, and the kernels take at most {WIDEST}"
    return None


@functools.partial(jax.jit, static_argnames=("scale", "axis_name"))
@reverse_only("jla.gsa")
def gsa(q, k, v, s, g, initial_state, segment_ids, *, scale, axis_name=None):
    """Runs the kernels. See `jla.gsa`, and for `axis_name` `jla._core.sequence.by_states`.

    Products of 16-bit inputs take bfloat16 operands, those of float32 inputs float32 ones as three
    TF32 products; all add in float32.
    """
    if packed.count(initial_state) is not None:

        def run(q, k, v, s, g, states, spans):
            o, *states = _gsa(q, k, v, s, g, (*states, spans), scale)
            return o, GSAState(*states)

        return packed.by_pieces(run, (q, k, v, s, g), initial_state, segment_ids, CHUNK)
    starts = None if segment_ids is None else segment_starts(segment_ids)
    if g is None:
        s, g = abc_gates(s, starts)
    if starts is not None:
        # To start a new segment, set its first token's decay to 0.
        g = jnp.where(starts[:, :, None, None], -jnp.inf, g)
    if axis_name is None:
        o, hk, hv = _gsa(q, k, v, s, g, tuple(initial_state or ()), scale)
    else:
        links = sequence.links(segment_ids, *q.shape[:2], axis_name)
        o, hk, hv = _gsa_over(q, k, v, s, g, initial_state, links, scale, axis_name)
    return o, GSAState(hk, hv)


@functools.partial(jax.custom_vjp, nondiff_argnums=(6,))
def _gsa(q, k, v, s, g, start, scale):
    """The kernels' forward pass. `start` is () for states of zeros, the first states, or those of
    each piece, [B, H, P, ...], and the pieces' spans, see `packed.by_pieces`; the states returned
    are like them."""
    axes, states = _axes(start)
    run = functools.partial(_forward, scale=scale, keep=False)
    return shardwise(run, axes, (_OUTPUTS[0], *states))(q, k, v, s, g, *start)


def _axes(start):
    """The axes of the inputs, and of the states at the end."""
    states = _OF_PIECES if len(start) == 3 else _STATES
    return (*_INPUTS, *(*states, _SPANS)[: len(start)]), states


def _gsa_forward(q, k, v, s, g, start, scale):
    axes, states = _axes(start)
    run = functools.partial(_forward, scale=scale, keep=True)
    results = (_OUTPUTS[0], *states, *_KEPT.values())
    o, hk, hv, *kept = shardwise(run, axes, results)(q, k, v, s, g, *start)
    kept = tuple(map(checkpoint_name, kept, _KEPT))
    return (o, hk, hv), ((q, k, v, s), kept, len(start), start[2:])


def _gsa_backward(scale, residuals, cotangents):
    inputs, kept, number, spans = residuals
    run = functools.partial(_backward, scale=scale)
    states = _OF_PIECES if spans else _STATES
    axes = (*_INPUTS[:4], *_KEPT.values(), _OUTPUTS[0], *states, *(_SPANS for _ in spans))
    arrays = *inputs, *kept, *cotangents, *spans
    *gradients, hk, hv = shardwise(run, axes, (*_INPUTS, *states))(*arrays)
    return *gradients, (hk, hv, None)[:number]


defvjp(_gsa, _gsa_forward, _gsa_backward)


# A piece of a sequence on each device. The states' first pass says what the piece does to them, and
# that is exchanged; backward likewise, with the states' gradients from right to left.

_DECAY = "B H M"
_SUMS = tuple(_KEPT.values())[:2]
# Of the pieces that a device cuts its own into: see `_first_pass`.
_MADE = (*_OF_PIECES, "B H P M")


@functools.partial(jax.custom_vjp, nondiff_argnums=(7, 8))
def _gsa_over(q, k, v, s, g, state, links, scale, axis):
    """As `_gsa`: the outputs of this device's piece, and the states that leave it; `state` is that
    before the first piece."""
    return _run_over(q, k, v, s, g, state, links, scale, axis, keep=False)


def _gsa_over_forward(q, k, v, s, g, state, links, scale, axis):
    o, hk, hv, *kept = _run_over(q, k, v, s, g, state, links, scale, axis, keep=True)
    kept = tuple(map(checkpoint_name, kept, _KEPT))
    return (o, hk, hv), ((q, k, v, s), kept, links)


def _run_over(q, k, v, s, g, state, links, scale, axis, *, keep):
    summarise = shardwise(_summarise, _INPUTS[1:], (*_SUMS, _DECAY, *_STATES, *_MADE))
    *decays, decay, hk, hv = (made := summarise(k, v, s, g))[:5]
    start = sequence.entering(GSA_STATES.step, (decay, GSAState(hk, hv)), state, links, axis)
    run = functools.partial(_forward_in_pieces, scale=scale, keep=keep)
    axes = (*_INPUTS[:4], *_SUMS, *_STATES, *_MADE)
    results = (*_OUTPUTS, *_KEPT.values()) if keep else _OUTPUTS
    return shardwise(run, axes, results)(q, k, v, s, *decays, *start, *made[5:])


def _gsa_over_backward(scale, axis, residuals, cotangents):
    inputs, kept, links = residuals
    dlogits = _KEPT["gsa_probabilities"]
    axes = (*_INPUTS[:4], *_KEPT.values(), *_OUTPUTS)
    run = functools.partial(_summarise_gradients, scale=scale)
    summarise = shardwise(run, axes, (dlogits, _DECAY, *_STATES, *_MADE))
    logits, decay, hk, hv, *made = summarise(*inputs, *kept, *cotangents)
    said = GSAState(hk, hv)
    after = sequence.entering_gradient(GSA_STATES.step, decay, said, links, axis)
    do, *ends = cotangents
    run = shardwise(_gradients_in_pieces, (*axes, dlogits, *_MADE), (*_INPUTS, *_STATES))
    *gradients, hk, hv = run(*inputs, *kept, do, *map(jnp.add, ends, after), logits, *made)
    return *gradients, sequence.of_first_device(GSAState(hk, hv), axis), None


defvjp(_gsa_over, _gsa_over_forward, _gsa_over_backward)


def _summarise(k, v, s, g):
    s, decays = s.astype(_operand(k)), _sums(g)
    return *decays, *_first_pass((k, v), (s, s), decays)


def _forward_in_pieces(q, k, v, s, sums, totals, hk, hv, *made, scale, keep):
    """As `_forward`, from the states that enter the first piece, and what `_summarise` made."""
    hk, hv, spans, _ = _in_pieces(made, (hk, hv), totals)
    o, hk, hv, *kept = _forward_from(q, k, v, s, (sums, totals), hk, hv, spans, scale=scale)
    results = o, hk[:, :, -1], hv[:, :, -1]
    return (*results, *kept) if keep else results


def _summarise_gradients(
    q, k, v, s, sums, totals, p, key_states, value_states, do, dhk, dhv, *, scale
):  # fmt: skip
    dlogits = _read(do, v, s.astype(_operand(q)), sums, value_states, p, scale=scale)
    start = dhk, dhv
    made = _first_pass((q, do), (dlogits, p), (sums, totals), start, reverse=True)
    return dlogits, *made


def _gradients_in_pieces(
    q, k, v, s, sums, totals, p, key_states, value_states, do, dhk, dhv, dlogits, *made
):  # fmt: skip
    """As `_backward`, from the gradients of the states that leave the last piece, and what
    `_summarise_gradients` made."""
    dhk, dhv, spans, _ = _in_pieces(made, (dhk, dhv), totals, reverse=True)
    arrays = q, k, v, s, sums, totals, p, key_states, value_states, do, dhk, dhv
    *gradients, dhk, dhv = _backward_from(*arrays, dlogits, spans)
    return *gradients, dhk[:, :, 0], dhv[:, :, 0]


def _first_pass(features, by_slot, decays, start=None, *, reverse=False):
    """What the tokens do to the states: how these decay, [B, H, M], and what becomes of `start`,
    zeros if it is None. Then what each of the pieces makes of zeros, [B, H, P, ...], and how the
    states decay over it, [B, H, P, M]. The arguments are those of `_states`.
    """
    (K, V), (B, N, H, M) = (x.shape[-1] for x in features), decays[1].shape
    blocks = _config(gsa_forward.gsa_states, features[0]).blocks
    programs = sum(_tiles(D, blocks["BD"]) for D in (K, V)) * B * H * _tiles(M, blocks["BM"])
    P = pieces.number(programs, N)
    spans = pieces.spans(B, P, N)
    *_, hk, hv = _states(features, by_slot, decays, None, spans, reverse=reverse, keep=False)
    decay = jnp.exp2(pieces.sums(jnp.moveaxis(decays[1], 2, 1), P))
    made = hk, hv, decay
    if start is None:
        start = jnp.zeros((B, H, K, M), f32), jnp.zeros((B, H, M, V), f32)
    *_, last = _in_pieces(made, start, decays[1], reverse=reverse)
    return jnp.prod(decay, axis=2), *last, *made


def _in_pieces(made, start, totals, *, reverse=False):
    """The states that the pieces start from, [B, H, P, ...], the pieces' spans, and the last
    states, [B, H, ...]: see `_first_pass`."""
    *ends, decay = made
    factors = decay[..., None, :], decay[..., None]
    options = dict(reverse=reverse)
    (hk, hk_last), (hv, hv_last) = (
        pieces.joined(*x, **options) for x in zip(factors, ends, start, strict=True)
    )
    B, N = totals.shape[:2]
    return hk, hv, pieces.spans(B, hk.shape[2], N), (hk_last, hv_last)


# ------------------------------------------------------------------------------ the kernels' calls


def _forward(q, k, v, s, g, *start, scale, keep):
    """The forward kernels: o and the last states, with `keep` also what `_KEPT` lists."""
    results = _forward_from(q, k, v, s, _sums(g), *start, scale=scale)
    return results if keep else results[:3]


def _forward_from(q, k, v, s, decays, *start, scale):
    """As `_forward`, from what `_sums` returns."""
    (B, T, HQ, _), (H, V), M = q.shape, v.shape[2:], s.shape[-1]
    s = s.astype(_operand(q))
    sums, _ = decays
    start, spans = start[:2], start[2:]
    key_states, value_states, hk, hv = _states((k, v), (s, s), decays, start or None, *spans)
    p = _read(q, k, s, sums, key_states, scale=scale)
    (o,) = _call(
        *(gsa_forward.gsa_outputs, p, v, s, sums, value_states),
        grid=lambda slots, features: B * triton.cdiv(T, CHUNK) * HQ,
        outputs=[SDS((B, T, HQ, V), v.dtype)],
        sizes=dict(HQ=HQ, H=H, D=V, M=M),
        inputs=q,
    )
    return o, hk, hv, *decays, p, key_states, value_states


def _backward(
    q, k, v, s, sums, totals, p, key_states, value_states, do, dhk, dhv, *spans, scale
):  # fmt: skip
    """The backward kernels: the gradients of q, k, v, s, g and of the first states."""
    dlogits = _read(do, v, s.astype(_operand(q)), sums, value_states, p, scale=scale)
    arrays = q, k, v, s, sums, totals, p, key_states, value_states, do, dhk, dhv
    return _backward_from(*arrays, dlogits, *spans)


def _backward_from(
    q, k, v, s, sums, totals, p, key_states, value_states, do, dhk, dhv, dlogits, *spans
):  # fmt: skip
    """As `_backward`, from the logits' gradients."""
    B, T, H, _ = sums.shape
    writes = s.astype(_operand(q))
    key_gradients, value_gradients, dhk, dhv = _states(
        (q, do), (dlogits, p), (sums, totals), (dhk, dhv), *spans, reverse=True
    )
    dq, dk, *of_keys = _gradients(q, k, dlogits, writes, sums, key_states, key_gradients, rows=True)
    _, dv, ds, dg = _gradients(
        do, v, p, writes, sums, value_states, value_gradients, rows=False, before=of_keys
    )

    def per_head(x, dtype):
        """The sum over the query heads that share a head."""
        if x.shape[2] > H:
            x = x.astype(f32).reshape(B, T, H, -1, x.shape[3]).sum(3)
        return x.astype(dtype)

    dk, dv, ds, dg = map(per_head, (dk, dv, ds, dg), (k.dtype, v.dtype, s.dtype, f32))
    return dq, dk, dv, ds, dg, dhk, dhv


def _sums(g):
    """The log decays summed from their chunk's start and to its end. See `gsa_sums`."""
    B, T, H, M = g.shape
    return _call(
        *(gsa_forward.gsa_sums, g),
        grid=lambda slots, features: B * triton.cdiv(T, CHUNK) * H * slots,
        outputs=[SDS(g.shape, i32), SDS((B, triton.cdiv(T, CHUNK), H, M), f32)],
        sizes=dict(H=H, M=M),
    )


def _states(features, by_slot, decays, start, spans=None, *, reverse=False, keep=True):
    """Both states of all chunks, [B, H, chunks, K or V, M], and the last ones. See `gsa_states`.

    If K and V differ it takes a call for each state. Without `keep` only the last ones are written.

    Args:
      features: k and v, in reverse q and do. by_slot: s twice, in reverse dlogits and p.
      decays: as `_sums` returned them.
      start: hk and hv at the start (in reverse the gradients at the end), or None for zeros.
      spans: of pieces, [B, P, 2], or None. With them hk and hv are [B, H, P, ...].
    """
    B, T, H, M = decays[0].shape
    HQ, (K, V) = features[0].shape[2], (x.shape[-1] for x in features)
    N, dtype = triton.cdiv(T, CHUNK), _operand(features[0])
    # In the place of arguments that a call does not use are such as it does, of their dtype.
    given = (*(start or (decays[1],) * 2), decays[1] if spans is None else spans)
    of_pieces = () if spans is None else (spans.shape[1],)
    of_keys, of_values = ((x, x, w, w) for x, w in zip(features, by_slot, strict=True))
    both = (*features, *by_slot)
    calls = [(K, 1, 1, both)] if K == V else [(K, 1, 0, of_keys), (V, 0, 1, of_values)]
    results = []
    for D, keys, values, arrays in calls:
        shapes = [SDS((B, H, N, D, M) if keep else (1,), dtype)] * 2
        shapes += [SDS((B, H, *of_pieces, K, M), f32), SDS((B, H, *of_pieces, M, V), f32)]
        used = (keys, values, keys, values)
        out = _call(
            *(gsa_forward.gsa_states, *arrays, *decays, *given),
            grid=lambda slots, features, n=keys + values: B * H * slots * features * n,
            outputs=[x if n else SDS((1,), x.dtype) for x, n in zip(shapes, used, strict=True)],
            sizes=dict(HQ=HQ, H=H, D=D, M=M),
            inputs=features[0],
            P=sum(of_pieces),
            KEYS=keys,
            VALUES=values,
            START=start is not None,
            KEEP=keep,
            REVERSE=reverse,
        )
        results.append(out)
    return [results[-1][i] if i % 2 else results[0][i] for i in range(4)]


def _read(x, y, s, sums, states, p=None, *, scale):
    """p or, of do and v with p given, dlogits; [B, T, HQ, M]. See `gsa_read`.

    Where a program has not all slots, the softmax or its derivative is XLA's.
    """
    (B, T, HQ, D), (H, M) = x.shape, s.shape[2:]
    dtype, tiles = _operand(x), _tiles(M, _config(gsa_forward.gsa_read, x).blocks["BM"])
    (out,) = _call(
        *(gsa_forward.gsa_read, x, y, s, sums, states, s if p is None else p),
        grid=lambda slots, features: B * triton.cdiv(T, CHUNK) * HQ * slots,
        outputs=[SDS((B, T, HQ, M), dtype if tiles == 1 else f32)],
        sizes=dict(HQ=HQ, H=H, D=D, M=M),
        inputs=x,
        scale=scale,
        FINISH=tiles == 1,
        GRADIENT=p is not None,
    )
    if tiles > 1 and p is None:
        out = jax.nn.softmax(scale * out, axis=-1)
    elif tiles > 1:
        p = p.astype(f32)
        total = jnp.sum(p, axis=-1, keepdims=True)  # not 1, for p is rounded
        out = scale * p * (out - jnp.sum(p * out, axis=-1, keepdims=True) / total)
    return out.astype(dtype)


def _gradients(x, y, w, s, sums, states, gradients, *, rows, before=None):
    """The gradients of one pass, of each query head. See `gsa_gradients`."""
    (B, T, HQ, D), (H, M) = x.shape, s.shape[2:]
    dtype = _operand(x)
    return _call(
        *(gsa_backward.gsa_gradients, x, y, w, s, sums, states, gradients, *(before or (w, w))),
        grid=lambda slots, features: B * triton.cdiv(T, CHUNK) * HQ,
        outputs=[
            SDS(x.shape if rows else (1,), x.dtype),
            SDS(x.shape, y.dtype if HQ == H else dtype),
            SDS((B, T, HQ, M), f32),
            SDS((B, T, HQ, M), f32),
        ],
        sizes=dict(HQ=HQ, H=H, D=D, M=M),
        inputs=x,
        ROWS=rows,
        ADD=before is not None,
    )


def _call(kernel, *arrays, grid, outputs, sizes, inputs=None, **constants):
    """Calls a kernel on arrays [B, T, ...], the first of them, with T behind them.

    Args:
      grid: the number of programs, of how many tiles cover the slots and the features.
      sizes: the kernel's constants among HQ, H, D and M; the tiles' sizes follow from them.
      inputs: an array of the inputs' dtype, where that matters.
      constants: the others. With a P above 0 the grid has a second axis, of so many.
    """
    config = _config(kernel, inputs)
    M, D = sizes["M"], sizes.get("D", 1)
    constants |= sizes | dict(BM=_width(M, config.blocks["BM"]))
    if "D" in sizes:
        constants |= dict(BD=_width(D, config.blocks["BD"]), FLOAT32=inputs.dtype == f32)
    programs = grid(_tiles(M, config.blocks["BM"]), _tiles(D, config.blocks.get("BD", 1)))
    return launch.call(
        *(kernel, *arrays, arrays[0].shape[1]),
        grid=(programs, constants["P"]) if constants.get("P") else (programs,),
        outputs=outputs,
        config=config,
        constants=constants,
    )


def _config(kernel, inputs):
    """The kernel's config, for inputs of this dtype if that matters."""
    float32 = inputs is not None and inputs.dtype == f32
    name = kernel.__name__
    return configs.config(f"{name}_float32" if float32 else name, launch.target())


def _tiles(size, most):
    """How many tiles cover `size`."""
    return triton.cdiv(size, _width(size, most))


def _operand(x):
    """The dtype of what products take, and of the arrays between kernels."""
    return f32 if x.dtype == f32 else bf16


def _width(size, most):
    """How wide tiles are: the power of two that holds `size`, and at most `most`."""
    return min(most, max(SMALLEST, triton.next_power_of_2(size)))
