"""Kimi Delta Attention as Pallas kernels; docs/kernels/kda.md explains their design.

Forward: `prepare` does what a chunk can do without its state, `recurrence.forward` carries the
state from chunk to chunk. Backward: `recurrence.backward` carries the state's gradient back, and
`chunk_gradients` makes all gradients of a chunk from the two states around it.
"""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name

from jla._core import movement, packed, sequence
from jla._core.axes import KDA, letters
from jla._core.derivatives import reverse_only
from jla._core.parts import kda_operands, l2norm
from jla._core.segments import segment_starts
from jla._core.shardwise import defvjp, for_each_row, shardwise
from jla._core.states import repeated
from jla.pallas.common import pieces
from jla.pallas.common.chunks import CHUNK, decay_operand
from jla.pallas.common.padding import missing_features, missing_tokens, pad
from jla.pallas.common.recurrence import NARROW
from jla.pallas.kda import gate, spans, step, token, wide
from jla.pallas.kda.backward import chunk_gradients
from jla.pallas.kda.prepare import prepare
from jla.pallas.kda.step import kda_step
from jla.pallas.kda.token import kda_token

__all__ = ["kda", "kda_from_projection", "kda_step", "kda_token", "unsupported"]

bf16, f32 = jnp.bfloat16, jnp.float32


class _Form(NamedTuple):
    """What is known where kernels are traced.

    Attributes:
      scale: of the queries.
      bounded: what the decays are made of: log decays if None, else the arguments of
        `gate.decay_operand`, and whether they have a bound.
      exact: whether decays may be too strong for `spans`.
      normalize: whether the kernels divide q and k by their lengths.
    """

    scale: float
    bounded: bool | None = None
    exact: bool = True
    normalize: bool = False

    @property
    def kept(self):
        """What the forward pass keeps, as `_KEPT`."""
        return _KEPT | (dict(kda_norms="B HV two TP") if self.normalize else {})


_INPUTS = (*letters(KDA, "q k v g"), "B HV T")
_STATE = KDA["initial_state"]
_OF_PIECES, _SPANS = "B HV P K V", "B P two"
_OUTPUTS = (KDA["o"], _STATE)
# What the forward pass keeps for the backward pass, with the names that checkpoint policies use.
# TP is T in whole chunks.
_KEPT = {
    "kda_query": "B TP HV K",
    "kda_read": "B TP HV K",
    "kda_write": "B TP HV K",
    "kda_decay": "B HV N K",
    "kda_scores": "B HV N C D",
    "kda_inverse": "B HV N C D",
    "kda_key_scores": "B HV N C D",
    "kda_levels": "B HV N",
    "kda_states": "B HV N V K",
}


def unsupported(name, q, k, v, *_, slots=None):
    """Why the kernels of the function `name` cannot serve these arguments, or None."""
    if name == "kda_step":
        return step.unsupported(q, k, v)
    if name == "kda_token":
        return token.unsupported(q, k, v)
    if q.dtype == f32:
        return "q, k and v are float32, and the kernels take bfloat16 and float16"
    return None


@functools.partial(jax.jit, static_argnames=("scale", "axis_name"))
@reverse_only("jla.kda")
def kda(q, k, v, g, beta, initial_state, segment_ids, *, scale, axis_name=None):
    """Pads to whole tiles and runs the kernels. See `jla.kda`, and for `axis_name`
    `jla._core.sequence.by_states`.

    All products take bfloat16 operands and add in float32, float16 inputs included.
    """
    if axis_name is not None and q.shape[-1] > NARROW:
        run = functools.partial(kda, scale=scale)
        return _wide_over(run, (q, k, v, g, beta), initial_state, segment_ids, axis_name)
    if packed.count(initial_state) is not None:
        return _with_segments(q, k, v, g, beta, initial_state, segment_ids, _Form(scale))
    over = _over(axis_name, q, segment_ids)
    return _with_decays(q, k, v, g, beta, initial_state, segment_ids, _Form(scale), over)


def _with_segments(q, k, v, g, beta, states, segment_ids, form):
    """A run from states with an axis of segments, each segment in chunks of its own."""

    def run(q, k, v, g, beta, states, spans):
        return _on_tiles(q, k, v, (g,), beta, (states, spans), form, None)

    return packed.by_pieces(run, (q, k, v, g, beta), states, segment_ids, CHUNK)


def _with_decays(q, k, v, g, beta, initial_state, segment_ids, form, over):
    if segment_ids is not None:
        # To start a new segment, set its first token's decay to 0.
        starts = segment_starts(segment_ids)[:, :, None, None]
        g = jnp.where(starts, -jnp.inf, g)
    return _on_tiles(q, k, v, (g,), beta, _start(initial_state), form, over)


def _start(initial_state):
    """The state that a run starts from, as `_kda` has it."""
    return () if initial_state is None else (initial_state,)


def _over(axis_name, q, segment_ids):
    """The axis over which the sequence is split and how its pieces link, or None."""
    if axis_name is None:
        return None
    return axis_name, sequence.links(segment_ids, *q.shape[:2], axis_name)


def _wide_over(run, arrays, initial_state, segment_ids, axis_name):
    """A run over devices with keys for which there is no first pass, see `pieces.number`."""
    links = sequence.links(segment_ids, *arrays[0].shape[:2], axis_name)
    return sequence.by_rule(run, movement.KDA, axis_name, arrays, initial_state, segment_ids, links)


@functools.partial(jax.jit, static_argnames=("scale", "lower_bound", "normalize", "axis_name"))
@reverse_only("jla.kda")
def kda_from_projection(
    q, k, v, f, A_log, dt_bias, beta, initial_state, segment_ids, real=None,
    *, scale, lower_bound, normalize=False, axis_name=None,
):  # fmt: skip
    """`kda` with the log decays that `jla.kda_gate` makes of f [B, T, HV, K], A_log and dt_bias.

    They are made as the kernels take them, and for the backward pass once more: float32 decays are
    never in memory. What `gate.unsupported` names, and padding, get them by the formula instead.
    See `jla._fused.kda_from_projection`.
    """
    if normalize and not _normalizes(q, v):
        q, k, normalize = l2norm(q), l2norm(k), False
    if axis_name is not None and q.shape[-1] > NARROW:
        options = dict(real=real, scale=scale, lower_bound=lower_bound)
        run = functools.partial(kda_from_projection, **options)
        arrays = q, k, v, f, A_log, dt_bias, beta
        return _wide_over(run, arrays, initial_state, segment_ids, axis_name)
    over = _over(axis_name, q, segment_ids)
    form = _Form(scale, normalize=normalize)
    by_segment = packed.count(initial_state) is not None
    if by_segment or real is not None or gate.unsupported(f) is not None:
        g, beta = kda_operands(f, A_log, dt_bias, beta, lower_bound, real)
        if by_segment:  # empty places must not decay, and those of a projection of zeros would
            return _with_segments(q, k, v, g, beta, initial_state, segment_ids, form)
        return _with_decays(q, k, v, g, beta, initial_state, segment_ids, form, over)
    coefficients = for_each_row(gate.coefficients(A_log, dt_bias, lower_bound), f)
    source = f, coefficients, gate.borders(segment_ids, *f.shape[:2])
    weak = lower_bound is not None and lower_bound >= spans.WEAKEST and segment_ids is None
    form = form._replace(bounded=lower_bound is not None, exact=not weak)
    return _on_tiles(q, k, v, source, beta, _start(initial_state), form, over)


def _normalizes(q, v):
    """Whether the kernels can divide q and k by their lengths: each warpgroup has one tile."""
    K, V = (x.shape[-1] + missing_features(x.shape[-1]) for x in (q, v))
    return q.dtype == bf16 and (K == 64 or (K == 128 and V % 128 == 0))


def _on_tiles(q, k, v, source, beta, start, form, over):
    """Pads to whole tiles; `start` as `_kda` has it."""
    (T, K), V, dtype = q.shape[1::2], v.shape[-1], v.dtype
    keys, values = missing_features(K), missing_features(V)
    # Tokens of zeros neither read, write nor decay; features of zeros stay zero.
    pad_tokens = functools.partial(pad, tokens=missing_tokens(T))
    beta = jnp.swapaxes(pad_tokens(beta.astype(f32)), 1, 2)
    state, spans = start[:1], start[1:]
    state = tuple(pad(pad(x, features=values), features=keys, axis=-2) for x in state)
    q, k, v = (x.astype(bf16) for x in (q, k, v))
    o, state = _by_narrow_values(
        pad_tokens(q, features=keys),
        pad_tokens(k, features=keys),
        pad_tokens(v, features=values),
        source,
        beta,
        (*state, *spans),
        form,
        over,
    )
    return o[:, :T, :, :V].astype(dtype), state[..., :K, :V]


def _by_narrow_values(q, k, v, source, beta, start, form, over):
    """`_kda` or `_kda_over`, with each 128 of a wide head's value columns as a value head.

    Value columns are independent of one another but for the gradients of q, k, beta and the
    decays, which are sums over them.
    """
    B, T, HV, V = v.shape
    run = functools.partial(_kda, form=form)
    if over is not None:
        axis, links = over
        options = dict(links=links, form=form, axis=axis)

        def run(*arrays):
            *arrays, (state,) = arrays
            return _kda_over(*arrays, state, **options)

    if V <= NARROW:
        return run(q, k, v, source, beta, start)
    parts = V // NARROW
    v = v.reshape(B, T, HV * parts, NARROW)
    beta = repeated(beta, parts, axis=1)
    state, spans = start[:1], start[1:]

    def as_heads(x):
        x = jnp.moveaxis(x.reshape(*x.shape[:-1], parts, NARROW), -2, 2)
        return x.reshape(B, HV * parts, *x.shape[3:])

    o, state = run(q, k, v, source, beta, (*map(as_heads, state), *spans))
    state = jnp.moveaxis(state.reshape(B, HV, parts, *state.shape[2:]), 2, -2)
    return o.reshape(B, T, HV, V), state.reshape(*state.shape[:-2], V)


@functools.partial(jax.custom_vjp, nondiff_argnums=(6,))
def _kda(q, k, v, source, beta, start, form):
    """KDA on whole tiles; beta [B, HV, T].

    `start` is () for a state of zeros, a tuple of the first state, or one of the state of each
    piece, [B, HV, P, K, V], and the pieces' spans, see `packed.by_pieces`; the state returned is
    like it.

    `source` holds the arrays from which the decays are computed, without padding and with the
    caller's heads; see `_Form`.
    """
    made = _fit(_decay_operand(source, form.bounded), q, v)
    axes = (*_INPUTS, *_axes_of(start))
    run = functools.partial(_forward, form=form, keep=False)
    return shardwise(run, axes, (KDA["o"], _axes_of_state(start)))(q, k, v, made, beta, *start)


def _axes_of_state(start):
    """The axes of a state, where a run starts and ends."""
    return _OF_PIECES if len(start) == 2 else _STATE


def _axes_of(start):
    return (_axes_of_state(start), _SPANS)[: len(start)]


def _kda_forward(q, k, v, source, beta, start, form):
    made = _decay_operand(source, form.bounded)
    inputs = (q, k, v, _fit(made, q, v), beta)
    run = functools.partial(_forward, form=form, keep=True)
    results = KDA["o"], _axes_of_state(start), *form.kept.values()
    o, state, *kept = shardwise(run, (*_INPUTS, *_axes_of(start)), results)(*inputs, *start)
    kept = tuple(map(checkpoint_name, kept, form.kept))
    return (o, state), (q, k, v, _source(source, made, form), beta, kept, len(start), start[1:])


def _source(source, made, form):
    """What is kept of the decays: log decays and the projection are there to be differentiated.

    The operand is smaller than the log decays, and is kept in their place; the projection that
    our kernel made it of is as small, and mostly kept anyhow. Where q and k are not kept twice, as
    they are and normalised, there is room for both.
    """
    if form.bounded is None:
        return (made,)
    return (*source, made) if form.normalize else source


def _decay_operand_kept(source, form):
    """The operand, kept or made again, and the arguments that it was made of, if any."""
    if form.bounded is None:
        return *source, ()
    if form.normalize:
        return source[-1], source[:-1]
    return _decay_operand(source, form.bounded), source


def _kda_backward(form, residuals, cotangents):
    q, k, v, source, beta, kept, number, spans = residuals
    inputs = q, k, v, source, beta, kept, *cotangents
    *gradients, start = _kda_gradients(form, *inputs, spans=spans)
    return *gradients, (start, None)[:number]


def _kda_gradients(form, q, k, v, source, beta, kept, do, dend, *, behind=(), spans=()):
    """The gradients of q, k, v, the source, beta and the state before; `behind` is what the tokens
    behind each piece do to the state's gradient, if it was made before. `spans` as in `_kda`."""
    made, source = _decay_operand_kept(source, form)
    run = functools.partial(_backward, form=form)
    state = _OF_PIECES if spans else _STATE
    axes = (*_INPUTS, *form.kept.values(), KDA["o"], state)
    axes = (*axes, *(_SUMMARY[2:] if behind else ()), *(_SPANS for _ in spans))
    results = ("B T HV K", "B T HV K", KDA["v"], "B TP HV K", "B HV T", state)
    inputs = (q, k, v, _fit(made, q, v), beta, *kept, do, dend, *behind, *spans)
    *gradients, dv, dg, dbeta, start = shardwise(run, axes, results)(*inputs)
    # A key head's gradient is the sum of its value heads'.
    for i in range(2 if v.shape[2] > q.shape[2] else 0):
        per_head = gradients[i].reshape(*q.shape[:3], -1, q.shape[3])
        gradients[i] = per_head.astype(f32).sum(3).astype(bf16)
    # And so is that of a log decay, where value heads are parts of one.
    T, heads, features = made.shape[1:]
    dg = dg.reshape(*dg.shape[:2], heads, -1, dg.shape[3]).sum(3)[..., :features]
    if form.bounded is None:
        by_source = (dg[:, :T],)
    else:
        by_source = (*gate.gradients(*source, dg, bounded=form.bounded), None)
    return *gradients, dv, by_source, dbeta, start


defvjp(_kda, _kda_forward, _kda_backward)


# A piece of a sequence on each device. What the piece does to a state is made between `prepare` and
# the recurrence, and exchanged there; the recurrence uses again what that pass made of its own
# pieces. Backward likewise, with the gradient of the state from right to left; what a piece does to
# it is the transpose of what it does to the state, and is kept.

_SUMMARY = ("B HV K J", _STATE, "B HV P K J", "B HV P K V")
_FACTORS = _SUMMARY[2]  # of the device's own pieces, for the backward pass
# What `recurrence` takes: u, and the first five of `_KEPT`.
_PREPARED = ("B TP HV V", *list(_KEPT.values())[:5])


@functools.partial(jax.custom_vjp, nondiff_argnums=(7, 8))
def _kda_over(q, k, v, source, beta, state, links, form, axis):
    """As `_kda`: the outputs of this device's piece, and the state that leaves it; `state` is that
    before the first piece."""
    made = _fit(_decay_operand(source, form.bounded), q, v)
    return _run_over(q, k, v, made, beta, state, links, form, axis, keep=False)[0]


def _kda_over_forward(q, k, v, source, beta, state, links, form, axis):
    made = _decay_operand(source, form.bounded)
    arrays = q, k, v, _fit(made, q, v), beta, state, links
    out, kept, factors = _run_over(*arrays, form, axis, keep=True)
    kept = tuple(map(checkpoint_name, kept, form.kept))
    factors = checkpoint_name(factors, "kda_factors")
    return out, (q, k, v, _source(source, made, form), beta, kept, factors, links)


def _run_over(q, k, v, g, beta, state, links, form, axis, *, keep):
    run = functools.partial(_prepare_and_summarise, form=form, keep=keep)
    solved = list(form.kept.values())
    solved = (*solved[5:8], *solved[9:]) if keep else ()
    results = (*_SUMMARY, _FACTORS, *_PREPARED, *solved)
    factor, term, *made = shardwise(run, _INPUTS, results)(q, k, v, g, beta)
    start = sequence.entering(_move, (factor, term), state, links, axis)
    (*before, factors), prepared, solver = made[:3], made[3:9], made[9:]
    run = functools.partial(_forward_from, length=q.shape[1], keep=keep)
    axes = _heads_alone(*_PREPARED, "B HV T", _STATE, *_SUMMARY[2:])
    results = _heads_alone(*_OUTPUTS, *((_KEPT["kda_states"],) if keep else ()))
    o, end, *states = shardwise(run, axes, results)(*prepared, beta, start, *before)
    return (o, end), (*prepared[1:], *solver[:3], *states, *solver[3:]), factors


def _kda_over_backward(form, axis, residuals, cotangents):
    q, k, v, source, beta, kept, factors, links = residuals
    do, dend = cotangents
    axes = _heads_alone(*_PREPARED[1:], "B HV T", *_OUTPUTS, _FACTORS)
    summarise = shardwise(_summarise_gradients, axes, _heads_alone(*_SUMMARY))
    factor, said, *behind = summarise(*kept[:5], beta, do, dend, factors)
    after = sequence.entering_gradient(_move, factor, said, links, axis)
    inputs = q, k, v, source, beta, kept, do, after
    *gradients, start = _kda_gradients(form, *inputs, behind=behind)
    return *gradients, sequence.of_first_device(start, axis), None


def _heads_alone(*letters):
    """The axes of arrays of value heads, where no array has key heads."""
    return tuple(x.replace("HV", "H") for x in letters)


def _move(state, summary, _):
    factor, term = summary
    return pieces.matmul(factor, state) + term


def _prepare_and_summarise(q, k, v, g, beta, *, form, keep):
    beta = _whole_chunks(beta)
    query, w, u, kg, decay, scores, *solver = _prepare(q, k, v, g, beta, form, keep)
    summary = pieces.summary(w, u, kg, decay, beta)
    return *summary, u, query, w, kg, decay, scores, *solver


def _prepare(q, k, v, g, beta, form, keep):
    options = dict(exact=form.exact, normalize=form.normalize)
    return prepare(q, k, v, g, beta, scale=form.scale, keep=keep, **options)


def _forward_from(u, query, w, kg, decay, scores, beta, start, *made, length, keep):
    out = pieces.forward(
        query, w, u, kg, decay, scores, _whole_chunks(beta), start,
        length=length, keep_states=keep, made=made,
    )  # fmt: skip
    return tuple(out)


def _summarise_gradients(query, w, kg, decay, scores, beta, do, dend, factors):
    beta = _whole_chunks(beta)
    return pieces.gradient_summary(query, w, kg, do, decay, scores, beta, dend, factors)


defvjp(_kda_over, _kda_over_forward, _kda_over_backward)


def _decay_operand(source, bounded):
    if bounded is None:
        return decay_operand(*source)
    return gate.decay_operand(*source, bounded=bounded)


def _fit(made, q, v):
    """Pads the operand as q, and repeats its heads where value heads are parts of one."""
    made = pad(made, tokens=q.shape[1] - made.shape[1], features=q.shape[3] - made.shape[3])
    return repeated(made, v.shape[2] // made.shape[2], axis=2)


def _forward(q, k, v, g, beta, *start, form, keep):
    """Both forward kernels, g from `_decay_operand`: o and the last state, with `keep` also what
    `_KEPT` lists."""
    beta = _whole_chunks(beta)
    query, w, u, kg, decay, scores, *solver = _prepare(q, k, v, g, beta, form, keep)
    initial_state, spans = (*start, None, None)[:2]
    o, state, *states = pieces.forward(
        query, w, u, kg, decay, scores, beta, initial_state,
        length=q.shape[1], keep_states=keep, spans=spans,
    )  # fmt: skip
    kept = query, w, kg, decay, scores, *solver[:3], *states, *solver[3:]
    return (o, state, *kept) if keep else (o, state)


def _backward(q, k, v, g, beta, *arrays, form):
    """Both backward kernels: the gradients of q, k (per value head), v, g, beta and the start.

    `arrays` are those of `_Form.kept`, the gradients of o and of the last state, and two
    transitions of all pieces, or spans, or nothing.
    """
    number = len(form.kept)
    query, w, kg, decay, scores, inverse, key_scores, levels, states, *norms = arrays[:number]
    do, last_gradient, *more = arrays[number:]
    T = q.shape[1]
    beta = _whole_chunks(beta)
    options = dict(spans=more[0]) if len(more) == 1 else dict(made=more or None)
    gradients, start = pieces.backward(
        query, w, kg, do, decay, scores, beta, last_gradient, **options
    )
    if q.shape[-1] <= NARROW:
        dq, dk, dv, dg, dbeta = chunk_gradients(
            q, k, v, g, beta, do, states, gradients,
            inverse, key_scores, scores, decay, levels, *norms,
            scale=form.scale,
        )  # fmt: skip
    else:
        dq, dk, dv, dg, dbeta = wide.chunk_gradients(
            q, k, v, g, beta, do, w, kg, states, gradients,
            inverse, key_scores, scores, decay, levels,
            scale=form.scale,
        )  # fmt: skip
    return dq, dk, dv, dg, dbeta.sum(2)[:, :, :T], start


def _whole_chunks(beta):
    """Pads the tokens of what the kernels read without TMA, which would fill in zeros itself."""
    return jnp.pad(beta, ((0, 0), (0, 0), (0, -beta.shape[2] % CHUNK)))
