"""The recurrence over a long sequence of few heads: in pieces that run at once.

A chunk waits for the one before it, so that few heads leave most of the GPU idle. What a piece of
the sequence does to a state is affine: S_end = M S_start + N. A first pass makes M and N of every
piece at once, N by running from zeros and M by running from the identity with nothing to write. A
few small products then give the state that each piece starts from, and `recurrence` runs all
pieces at once. The backward pass does the same to the gradient of the state, with M^T, in reverse.

Where M is diagonal or a scalar, in Gated Slot Attention and MesaNet, a first pass makes N alone;
their `states.py` take the number of pieces and the joining from here.
"""

import functools

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from jla._core.exchange import join
from jla.pallas.common import mosaic, recurrence
from jla.pallas.common.chunks import CHUNK
from jla.pallas.common.mosaic import PER_COLUMN, WGMMA_LAYOUT, bf16, f32, product
from jla.pallas.common.recurrence import (
    COLUMNS,
    backward_operands,
    features,
    gradient_step,
    piece,
    scalars,
    tokens,
)

SDS = jax.ShapeDtypeStruct
PROCESSORS = recurrence.PROCESSORS
SHORTEST = 32  # chunks of a piece; its share of the joining costs about as much as 5 of them
FEWEST = 4  # with fewer pieces the first pass takes what the shorter chains save


def number(heads, chunks, K, V):
    """The number of pieces: as many as the first pass can run at once, or 1."""
    if K > recurrence.NARROW:
        return 1  # the first pass has no registers for such a state
    return at_most(1 + PROCESSORS // (heads * max(K, V) // COLUMNS), chunks)


def number_of_pairs(warpgroups, chunks):
    """As `number`, where a sequence has so many warpgroups, and a multiprocessor room for two."""
    return at_most(2 * PROCESSORS // warpgroups, chunks)


def number_of_all(heads, chunks, K, V):
    """As `number`, where the first pass takes all pieces: the number with the shortest chains of
    chunks, of both passes and all that cannot run at once; a piece's joining is as 5 more."""
    if K > recurrence.NARROW:
        return 1

    def chain(pieces):
        first = pieces * heads * max(K, V) // COLUMNS
        second = pieces * heads * max(1, V // (2 * COLUMNS))
        turns = sum(-(-programs // PROCESSORS) for programs in (first, second))
        return turns * -(-chunks // pieces) + 5 * pieces

    fitting = (-(-chunks // length) for length in range(min(SHORTEST, chunks), chunks + 1))
    return min(dict.fromkeys(fitting), key=chain)


def at_most(most, chunks):
    """The largest number of pieces up to `most` that are long enough, or 1 if it is too few."""
    pieces = min(most, chunks // SHORTEST)
    if pieces < FEWEST:
        return 1
    length = -(-chunks // pieces)
    return -(-chunks // length)  # no piece is empty


def forward(
    q, w, u, kg, decay, aq, beta, initial_state,
    *, length, keep_states, made=None, pieces=None, spans=None,
):  # fmt: skip
    """As `recurrence.forward`, with the state before the whole sequence, [B, HV, K, V] or None.
    With spans it is that of each piece, [B, HV, P, K, V], and so is the last state.

    `made` is what the tokens before each piece do, if `summary` has made it. `pieces` is for tests;
    by default their number follows from the shapes.
    """
    options = dict(length=length, keep_states=keep_states)
    if spans is not None:
        (starts,) = pieces_first(initial_state)
        o, ends, *states = recurrence.forward(
            q, w, u, kg, decay, aq, beta, starts, spans=spans, **options
        )
        return [o, *rows_first(ends), *states]
    B, TP, HV, K = q.shape
    V = u.shape[-1]
    pieces = pieces or number(B * HV, TP // CHUNK, K, V)
    starts = None if initial_state is None else initial_state[None]
    if made is not None:
        starts = _at_pieces(*made, initial_state)
    elif pieces > 1:
        if initial_state is None:
            initial_state = jnp.zeros((B, HV, K, V), f32)
        transitions = _transitions(w, u, kg, decay, beta, pieces)
        starts = join(*transitions, initial_state, times=matmul)
    return recurrence.forward(q, w, u, kg, decay, aq, beta, starts, **options)


def backward(
    q, w, kg, do, decay, aq, beta, last_gradient, *, made=None, pieces=None, spans=None
):  # fmt: skip
    """As `recurrence.backward`, with the last state's gradient, [B, HV, K, V]. With spans the
    gradients of each piece's states, [B, HV, P, K, V].

    `made` is what the tokens behind each piece do, if `gradient_summary` has made it; the last
    state's gradient is then what comes to the one that is in there.
    """
    if spans is not None:
        (ends,) = pieces_first(last_gradient)
        gradients, starts = recurrence.backward(q, w, kg, do, decay, aq, beta, ends, spans)
        return gradients, *rows_first(starts)
    B, TP, HV, K = q.shape
    pieces = pieces or number(B * HV, TP // CHUNK, K, do.shape[-1])
    ends = last_gradient[None]
    if made is not None:
        ends = _at_pieces(*made, last_gradient)
    elif pieces > 1:
        transitions = _gradient_transitions(q, w, kg, do, decay, aq, beta, pieces)
        ends = join(*transitions, last_gradient, times=matmul, reverse=True)
    return recurrence.backward(q, w, kg, do, decay, aq, beta, ends)


def summary(w, u, kg, decay, beta):
    """What the whole sequence does to a state, M [B, HV, K, K] and N [B, HV, K, V]; the same of the
    tokens before each piece, [B, HV, P, K, K] and [B, HV, P, K, V]; and M of each piece. float32"""
    (B, TP, HV, K), V = w.shape, u.shape[-1]
    pieces = number_of_all(B * HV, TP // CHUNK, K, V)
    factors, terms = _transitions(w, u, kg, decay, beta, pieces, every=True)
    states = _together(factors, terms, jnp.zeros((B, HV, K, V), f32))
    return *_parted(states[-1]), *_parted(*rows_first(states[:-1])), *rows_first(factors)


def gradient_summary(q, w, kg, do, decay, aq, beta, last_gradient, factors):
    """The same of the gradient of the state: M^T, and the gradient of the state before the sequence
    if that of the state behind it is `last_gradient`; and of the tokens behind each piece.

    factors: M of each piece, from `summary`. With it the first pass makes N alone.
    """
    (factors,) = pieces_first(factors)
    terms = _gradient_terms(q, w, kg, do, decay, aq, beta, len(factors))
    transposed = jnp.swapaxes(factors, -1, -2)
    gradients = _together(transposed, terms, last_gradient, reverse=True)
    return *_parted(gradients[0]), *_parted(*rows_first(gradients[1:]))


def _together(factors, terms, state, *, reverse=False):
    """Where the pieces take the identity and a state, side by side: before each piece and behind
    all of them (in reverse: before all and behind each)."""
    identity = jnp.broadcast_to(jnp.eye(factors.shape[-1], dtype=f32), factors.shape[1:])
    state = jnp.concatenate([identity, state], axis=-1)
    terms = jnp.concatenate([jnp.zeros_like(factors), terms], axis=-1)
    return join(factors, terms, state, times=matmul, reverse=reverse)


def _parted(maps):
    """M and N of (M | N)."""
    K = maps.shape[-2]
    return maps[..., :K], maps[..., K:]


def _at_pieces(factors, terms, state):
    """The state that each piece starts from, [P, B, HV, K, V]."""
    (states,) = pieces_first(matmul(factors, state[:, :, None]) + terms)
    return states


# Between two kernels' calls the axis of pieces lies behind rows and heads, over which
# `shardwise` splits.


def rows_first(*arrays):
    return tuple(jnp.moveaxis(x, 0, 2) for x in arrays)


def pieces_first(*arrays):
    return tuple(jnp.moveaxis(x, 2, 0) for x in arrays)


matmul = functools.partial(jnp.matmul, precision=lax.Precision.HIGHEST)


def _transitions(w, u, kg, decay, beta, pieces, *, every=False):
    """M [P - 1, B, HV, K, K] and N [P - 1, B, HV, K, V], float32, of all pieces but the last; of
    `every` one, P.

    Floor: w, kg, u and little else, half of the recurrence's.
    """
    N = w.shape[1] // CHUNK
    length = -(-N // pieces)  # only the last piece may be shorter

    def body(refs):
        p, b, h, block, wg = (lax.axis_index(name) for name in ("p", "b", "h", "block", "wg"))
        K, V = refs.w.shape[3], refs.u.shape[3]
        count = piece(p, pieces, N)[1] if every else length

        def step(_, x, state):
            u_mine = mosaic.where(wg == 0, mosaic.load(x.u.T))
            error = u_mine - product((state.astype(bf16), x.w.T))
            write = error * mosaic.per_column(mosaic.load(x.beta, PER_COLUMN), COLUMNS)
            kept = state * mosaic.per_column(mosaic.load(x.decay, PER_COLUMN), COLUMNS)
            state = product((write.astype(bf16), x.kg), init=kept)
            mosaic.release()
            return state

        def chunk(i):
            return p * length + i

        run = _from_zeros_and_identity(refs.factor.at[p, b, h], refs.term.at[p, b, h])
        operands = dict(
            w=(refs.w, tokens(chunk, b, h, K)),
            u=(refs.u, tokens(chunk, b, h, COLUMNS, _value_block(block, V))),
            kg=(refs.kg, tokens(chunk, b, h, K)),
            decay=(refs.decay, features(chunk, b, h, K)),
            beta=(refs.beta, scalars(chunk, b, h)),
        )
        recurrence.stream(step, run, count, 2, operands)

    inputs = dict(w=w, u=u, kg=kg, decay=decay, beta=beta)
    return _kernel(body, inputs, pieces if every else pieces - 1, u.shape[3])


def _gradient_transitions(q, w, kg, do, decay, aq, beta, pieces):
    """M^T and the gradients' N, as `_transitions`, of all pieces but the first.

    M is made again rather than kept: its operands are loaded anyhow.
    """
    N = q.shape[1] // CHUNK

    def body(refs):
        p, b, h, block, wg = (lax.axis_index(name) for name in ("p", "b", "h", "block", "wg"))
        first, count = piece(p + 1, pieces, N)

        def step(_, x, gradient):
            do_mine = mosaic.where(wg == 0, plgpu.load(x.do.T, layout=WGMMA_LAYOUT))
            gradient = gradient_step(x, do_mine, gradient.astype(bf16), gradient)
            mosaic.release()
            return gradient

        def chunk(i):
            return first + count - 1 - i

        run = _from_zeros_and_identity(refs.factor.at[p, b, h], refs.term.at[p, b, h])
        values = _value_block(block, refs.do.shape[3])
        operands = backward_operands(refs, chunk, b, h, COLUMNS, values)
        recurrence.stream(step, run, count, 2, operands)

    inputs = dict(q=q, w=w, kg=kg, do=do, decay=decay, aq=aq, beta=beta)
    return _kernel(body, inputs, pieces - 1, do.shape[3])


def _gradient_terms(q, w, kg, do, decay, aq, beta, pieces):
    """The gradients' N alone, of every piece, [P, B, HV, K, V] float32.

    It reads what `recurrence.backward` does. Floor at B=1 T=131072 HV=16 K=V=128: 2.4 GB, 0.55 ms.
    """
    (B, TP, HV, K), V = q.shape, do.shape[3]
    N, warpgroups = TP // CHUNK, recurrence.warpgroups_of_cta(pieces * B * HV, V)
    width = warpgroups * COLUMNS

    def body(refs):
        p, b, h, block, wg = (lax.axis_index(name) for name in ("p", "b", "h", "block", "wg"))
        first, count = piece(p, pieces, N)

        def run(through_chunks):
            zeros = plgpu.layout_cast(jnp.zeros((COLUMNS, K), f32), WGMMA_LAYOUT)
            mine = pl.ds(block * width + wg * COLUMNS, COLUMNS)
            mosaic.store_transposed(refs.term.at[p, b, h, :, mine], through_chunks(zeros))

        def step(_, x, gradient):
            do = plgpu.load(x.do.at[:, pl.ds(wg * COLUMNS, COLUMNS)].T, layout=WGMMA_LAYOUT)
            gradient = gradient_step(x, do, gradient.astype(bf16), gradient)
            mosaic.release()
            return gradient

        def chunk(i):
            return first + count - 1 - i

        operands = backward_operands(refs, chunk, b, h, width, block)
        recurrence.stream(step, run, count, warpgroups, operands)

    out = recurrence.kernel(
        body,
        inputs=dict(q=q, w=w, kg=kg, do=do, decay=decay, aq=aq, beta=beta),
        outputs=dict(term=SDS((pieces, B, HV, K, V), f32)),
        scratch={},
        grid=(pieces, B, HV, V // width),
        warpgroups=warpgroups,
    )
    return out.term


def _kernel(body, inputs, pieces, V):
    """Two warpgroups share what they read: one makes 64 columns of N, the other 64 of M."""
    B, _, HV, K = inputs["w"].shape
    out = recurrence.kernel(
        body,
        inputs=inputs,
        outputs=dict(factor=SDS((pieces, B, HV, K, K), f32), term=SDS((pieces, B, HV, K, V), f32)),
        scratch={},
        grid=(pieces, B, HV, max(K, V) // COLUMNS),
        warpgroups=2,
    )
    return out.factor, out.term


def _value_block(block, V):
    """Where K is larger than V, the blocks beyond V's have no part of N, and read what there is."""
    return jnp.minimum(block, V // COLUMNS - 1)


def _from_zeros_and_identity(factor_ref, term_ref):
    """The compute context of a first pass: the first state, and where the last one goes."""
    K, V = term_ref.shape
    block, wg = lax.axis_index("block"), lax.axis_index("wg")
    mine = pl.ds(block * COLUMNS, COLUMNS)

    def run(through_chunks):
        row = mosaic.row_numbers(COLUMNS) + (block * COLUMNS).astype(jnp.uint32)
        identity = mosaic.in_interval(row, jnp.broadcast_to(wg.astype(jnp.uint32), row.shape), K)
        state = through_chunks(jnp.where(identity, 1.0, 0.0).astype(f32))

        @pl.when((wg == 0) & (block < V // COLUMNS))
        def _():
            mosaic.store_transposed(term_ref.at[:, mine], state)

        @pl.when((wg == 1) & (block < K // COLUMNS))
        def _():
            mosaic.store_transposed(factor_ref.at[:, mine], state)

    return run
