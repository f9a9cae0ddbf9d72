"""Gated Slot Attention as Pallas kernels; docs/kernels/gsa.md explains their design.

Forward: `states` carries both states from chunk to chunk, `outputs` does the rest of every chunk at
once. Backward: `logit_gradients` goes back through the second pass to the softmax, `states` carries
both states' gradients back, and `chunk_gradients` makes all else, pass by pass.
"""

import functools

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name

from jla._core import packed, sequence
from jla._core.axes import GSA, letters
from jla._core.derivatives import reverse_only
from jla._core.movement import GSA as GSA_STATES
from jla._core.parts import abc_gates
from jla._core.segments import segment_starts
from jla._core.shardwise import defvjp, shardwise
from jla._core.states import GSAState
from jla.pallas.common.chunks import CHUNK, TILE_WIDTH, decay_operand
from jla.pallas.common.padding import missing_features, missing_tokens, pad
from jla.pallas.common.token import unsupported_here
from jla.pallas.gsa import step
from jla.pallas.gsa.gradients import Pass, chunk_gradients, fit_together, logit_gradients
from jla.pallas.gsa.outputs import outputs
from jla.pallas.gsa.states import summary, through_chunks
from jla.pallas.gsa.step import gsa_step, gsa_token

__all__ = ["gsa", "gsa_step", "gsa_token", "unsupported"]

bf16, f32 = jnp.bfloat16, jnp.float32

MOST_SLOTS = 128  # more have no room in SMEM beside a chunk's tokens
WIDEST = 256  # K and V, and M of a step; more have not been tried

_INPUTS = letters(GSA, "q k v s g")
_STATES = letters(GSA, "initial_state.hk initial_state.hv")
_OUTPUTS = (GSA["o"], *_STATES)
_OF_PIECES, _SPANS = ("B H P K M", "B H P M V"), "B P two"
# What the forward pass keeps for the backward pass, with the names that checkpoint policies use.
_KEPT = {
    "gsa_probabilities": "B T HQ M",
    "gsa_key_states": "B H N K M",
    "gsa_value_states": "B H N V M",
}


def unsupported(name, q, k, v, s, *_, slots=None):
    """Why the kernels of the function `name` cannot serve these arguments, or None."""
    K, V, M = (x.shape[-1] for x in (q, v, s))
    if max(K, V, M) > WIDEST:
        return f"K={K}, V={V} and M={M}, and the kernels take at most {WIDEST}"
    if name == "gsa_token":
        return unsupported_here() or step.unsupported(q, k, v, s)
    if name == "gsa_step":
        return step.unsupported(q, k, v, s)
    if q.dtype == f32:
        return "q, k and v are float32, and the kernels take bfloat16 and float16"
    if M > MOST_SLOTS:
        return f"M = {M}, and the kernels take at most {MOST_SLOTS} slots"
    return None


@functools.partial(jax.jit, static_argnames=("scale", "axis_name"))
@reverse_only("jla.gsa")
def gsa(q, k, v, s, g, initial_state, segment_ids, *, scale, axis_name=None):
    """Pads to whole tiles and runs the kernels. See `jla.gsa`, and for `axis_name`
    `jla._core.sequence.by_states`.

    All products take bfloat16 operands and add in float32, float16 inputs included; s is rounded to
    bfloat16 whatever its dtype.
    """
    if packed.count(initial_state) is not None:

        def run(q, k, v, s, g, states, spans):
            return _on_tiles(q, k, v, s, g, (*states, spans), scale)

        return packed.by_pieces(run, (q, k, v, s, g), initial_state, segment_ids, CHUNK)
    starts = None if segment_ids is None else segment_starts(segment_ids)
    if g is None:
        s, g = abc_gates(s, starts)
    if starts is not None:
        # To start a new segment, set its first token's decay to 0.
        g = jnp.where(starts[:, :, None, None], -jnp.inf, g)
    over = None
    if axis_name is not None:
        over = sequence.links(segment_ids, *q.shape[:2], axis_name), axis_name
    return _on_tiles(q, k, v, s, g, initial_state or (), scale, over)


def _on_tiles(q, k, v, s, g, start, scale, over=None):
    """Pads to whole tiles; `start` as `_gsa` has it. Over devices `over` is how their pieces link,
    and the axis."""
    (T, K), V, M, dtype = q.shape[1::2], v.shape[-1], s.shape[-1], v.dtype
    keys, values, slots = missing_features(K), missing_features(V), -M % TILE_WIDTH
    # Tokens of zeros neither read, write nor decay; features of zeros stay zero.
    pad_tokens = functools.partial(pad, tokens=missing_tokens(T))
    q, k, v, s = (x.astype(bf16) for x in (q, k, v, s))
    if start:
        hk, hv, *spans = start
        hk = pad(pad(hk, features=slots), features=keys, axis=-2)
        hv = pad(pad(hv, features=values), features=slots, axis=-2)
        start = hk, hv, *spans
    arrays = (
        pad_tokens(q, features=keys),
        pad_tokens(k, features=keys),
        pad_tokens(v, features=values),
        pad_tokens(s, features=slots),
        pad_tokens(g, features=slots),
    )
    if over is None:
        o, hk, hv = _gsa(*arrays, tuple(start), scale, M)
    else:
        links, axis_name = over
        o, hk, hv = _gsa_over(*arrays, GSAState(*start), links, scale, M, axis_name)
    return o[:, :T, :, :V].astype(dtype), GSAState(hk[..., :K, :M], hv[..., :M, :V])


@functools.partial(jax.custom_vjp, nondiff_argnums=(6, 7))
def _gsa(q, k, v, s, g, start, scale, used):
    """GSA on whole tiles; `used` slots, the others are padding.

    `start` is () for states of zeros, the first states, or those of each piece, [B, H, P, ...], and
    the pieces' spans, see `packed.by_pieces`; the states returned are like them.
    """
    run = functools.partial(_forward, scale=scale, used=used, keep=False)
    axes = (*_INPUTS, *(*_states(start), _SPANS)[: len(start)])
    results = (_OUTPUTS[0], *_states(start))
    return shardwise(run, axes, results)(q, k, v, s, decay_operand(g), *start)


def _states(start):
    """The axes of the states where a run starts and ends."""
    return _OF_PIECES if len(start) == 3 else _STATES


def _gsa_forward(q, k, v, s, g, start, scale, used):
    inputs = (q, k, v, s, decay_operand(g))
    run = functools.partial(_forward, scale=scale, used=used, keep=True)
    axes = (*_INPUTS, *(*_states(start), _SPANS)[: len(start)])
    results = (_OUTPUTS[0], *_states(start), *_KEPT.values())
    o, hk, hv, *kept = shardwise(run, axes, results)(*inputs, *start)
    kept = tuple(map(checkpoint_name, kept, _KEPT))
    return (o, hk, hv), (inputs, kept, start[:0] if not start else (None, None, *start[2:]))


def _gsa_backward(scale, used, residuals, cotangents):
    inputs, kept, start = residuals
    spans, states = start[2:], _states(start)
    run = functools.partial(_backward, scale=scale)
    axes = (*_INPUTS, *_KEPT.values(), _OUTPUTS[0], *states, *(_SPANS for _ in spans))
    *gradients, hk, hv = shardwise(run, axes, (*_INPUTS, *states))(
        *inputs, *kept, *cotangents, *spans
    )
    return *gradients, (hk, hv, None)[: len(start)]


defvjp(_gsa, _gsa_forward, _gsa_backward)


# A piece of a sequence on each device. The states' first pass says what the piece does to them;
# that is exchanged, and the second pass uses again what the first has made. Backward likewise, with
# the states' gradients from right to left.

_DECAYS = "B H M"
_MADE = ("B H P K M", "B H P M V", "B H P M")


@functools.partial(jax.custom_vjp, nondiff_argnums=(7, 8, 9))
def _gsa_over(q, k, v, s, g, state, links, scale, used, axis):
    """As `_gsa`: the outputs of this device's piece, and the states that leave it; `state` is that
    before the first piece."""
    return _run_over(q, k, v, s, decay_operand(g), state, links, scale, used, axis, keep=False)


def _gsa_over_forward(q, k, v, s, g, state, links, scale, used, axis):
    inputs = (q, k, v, s, decay_operand(g))
    o, hk, hv, *kept = _run_over(*inputs, state, links, scale, used, axis, keep=True)
    kept = tuple(map(checkpoint_name, kept, _KEPT))
    return (o, hk, hv), (inputs, kept, links)


def _run_over(q, k, v, s, log_decays, state, links, scale, used, axis, *, keep):
    summarise = shardwise(_summarise, _INPUTS[1:], (_DECAYS, *_STATES, *_MADE))
    decays, hk, hv, *made = summarise(k, v, s, log_decays)
    start = sequence.entering(GSA_STATES.step, (decays, GSAState(hk, hv)), state, links, axis)
    run = functools.partial(_forward, scale=scale, used=used, keep=keep)
    axes = (*_INPUTS, *_STATES, *_MADE)
    results = (*_OUTPUTS, *_KEPT.values()) if keep else _OUTPUTS
    return shardwise(run, axes, results)(q, k, v, s, log_decays, *start, *made)


def _gsa_over_backward(scale, used, axis, residuals, cotangents):
    inputs, kept, links = residuals
    run = functools.partial(_summarise_gradients, scale=scale)
    axes = (*_INPUTS, *_KEPT.values(), *_OUTPUTS)
    results = (_KEPT["gsa_probabilities"], _DECAYS, *_STATES, *_MADE)
    dlogits, decays, hk, hv, *made = shardwise(run, axes, results)(*inputs, *kept, *cotangents)
    said = GSAState(hk, hv)
    after = sequence.entering_gradient(GSA_STATES.step, decays, said, links, axis)
    do, *ends = cotangents
    ends = map(jnp.add, ends, after)
    axes = (*axes, _KEPT["gsa_probabilities"], *_MADE)
    *gradients, hk, hv = shardwise(_backward_from, axes, (*_INPUTS, *_STATES))(
        *inputs, *kept, do, *ends, dlogits, *made
    )
    return *gradients, sequence.of_first_device(GSAState(hk, hv), axis), None


defvjp(_gsa_over, _gsa_over_forward, _gsa_over_backward)


def _summarise(k, v, s, log_decays):
    return summary((k, v), (s, s), log_decays)


def _summarise_gradients(q, k, v, s, log_decays, p, _, value_states, do, dhk, dhv, *, scale):
    dlogits = logit_gradients(v, s, log_decays, value_states, p, do, scale=scale)
    said = summary((q, do), (dlogits, p), log_decays, (dhk, dhv), reverse=True)
    return dlogits, *said


def _forward(q, k, v, s, log_decays, *start, scale, used, keep):
    """Both forward kernels: o and the last states, with `keep` also what `_KEPT` lists; `start` are
    the first states, if there are any, and either spans, or `summary`'s of the pieces, if they were
    made before."""
    start, more = start[:2], _spans_or_made(start[2:])
    *states, hk, hv = through_chunks((k, v), (s, s), log_decays, start or None, **more)
    o, *p = outputs(q, k, v, s, log_decays, *states, scale=scale, used=used, keep=keep)
    return (o, hk, hv, *p, *states) if keep else (o, hk, hv)


def _spans_or_made(arrays):
    return dict(spans=arrays[0]) if len(arrays) == 1 else dict(made=arrays or None)


def _backward(q, k, v, s, log_decays, p, key_states, value_states, do, dhk, dhv, *spans, scale):
    """All backward kernels: the gradients of q, k, v, s, g and of the first states."""
    dlogits = logit_gradients(v, s, log_decays, value_states, p, do, scale=scale)
    states = key_states, value_states
    return _backward_from(q, k, v, s, log_decays, p, *states, do, dhk, dhv, dlogits, *spans)


def _backward_from(
    q, k, v, s, log_decays, p, key_states, value_states, do, dhk, dhv, dlogits, *more
):  # fmt: skip
    """As `_backward`, from the logits' gradients; `more` as of `_forward`."""
    B, T, H, _ = log_decays.shape
    key_gradients, value_gradients, dhk, dhv = through_chunks(
        (q, do), (dlogits, p), log_decays, (dhk, dhv), reverse=True, **_spans_or_made(more)
    )
    passes = [
        Pass(q, k, dlogits, key_states, key_gradients, rows_too=True),
        Pass(do, v, p, value_states, value_gradients, rows_too=False),
    ]
    if fit_together(passes):
        ((dq, dk), (_, dv)), *of_slots = chunk_gradients(passes, s, log_decays)
        of_slots = [of_slots]
    else:
        (((dq, dk),), *of_keys), (((_, dv),), *of_values) = (
            chunk_gradients([x], s, log_decays) for x in passes
        )
        of_slots = [of_keys, of_values]

    def per_head(x):
        """The sum over a head's queries (and over the parts of its features)."""
        x = x[:, :T]
        if x.shape[2] == H:
            return x
        return x.astype(f32).reshape(B, T, H, -1, x.shape[3]).sum(3)

    ds, dg = (
        functools.reduce(jnp.add, (per_head(x).astype(f32) for x in several))
        for several in zip(*of_slots, strict=True)
    )
    dk, dv, ds = (x.astype(bf16) for x in (per_head(dk), per_head(dv), ds))
    return dq, dk, dv, ds, dg, dhk, dhv
