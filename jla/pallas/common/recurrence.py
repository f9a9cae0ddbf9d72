"""The state recurrence over chunks, forward and backward, for states of the delta-rule form.

Both kernels keep the transposed state, [64 value columns, K] float32, in the registers of one
warpgroup for the whole sequence; another warpgroup streams the chunks' operands into SMEM. Chunks
follow one another, value columns are independent of one another, and so are pieces of the sequence
whose first states are known: `pieces.py` makes those, where heads are too few to fill the GPU.
"""

import collections
import functools

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from jla.pallas.common import mosaic, scratch
from jla.pallas.common.chunks import CHUNK
from jla.pallas.common.mosaic import PER_COLUMN, TRANSFORMS, WGMMA_LAYOUT, bf16, f32, product

SDS = jax.ShapeDtypeStruct
COLUMNS = 64  # value columns of one warpgroup
# Up to this K the rounded state is a register operand of its products, and SMEM holds the operands
# of two chunks. Beyond, the state does not fit into registers: it passes through SMEM, which then
# has room for one chunk only.
NARROW = 128
LOADER_REGISTERS = 40
PROCESSORS = 132  # multiprocessors of an H100 or H200


def forward(q, w, u, kg, decay, aq, beta, starts, *, length, keep_states, spans=None):
    """Runs the chunks in order:

        E = u - w S;   o = q S + Aq (beta E);   S <- Diag(decay) S + kg^T (beta E)

    Args:
      q, w, kg: [B, TP, HV, K] bf16, TP whole chunks. u: [B, TP, HV, V] bf16.
      decay: [B, HV, N, K] float32. aq: [B, HV, N, 64, 64] bf16. beta: [B, HV, TP] float32.
      starts: the state that each piece of the sequence starts from, [P, B, HV, K, V] float32, or
        None for one piece that starts from zeros.
      length: T, the tokens that o has, a multiple of 8; those beyond write nothing.
      keep_states: whether to return the state that each chunk starts from.
      spans: each piece's first chunk and its number of chunks, [B, P, 2] int32, or None: the
        pieces are of one sequence, and of equal length.

    Returns:
      o [B, T, HV, V] bf16, the last state [B, HV, K, V] float32 (with spans, that of each piece,
      [P, B, HV, K, V]), and with `keep_states` the states
      before each chunk, transposed: [B, HV, N, V, K] bf16.

    P * B * HV * V / 128 CTAs, each a chain of N / P chunks. Floor at B=8 T=4096 HV=16 K=V=128: 0.74
    GB, 0.17 ms at 4.3 TB/s, with the kept states 0.23 ms; 0.07 TFLOP.
    """
    B, TP, HV, K = q.shape
    V, N, P = u.shape[-1], TP // CHUNK, 1 if starts is None else starts.shape[0]
    warpgroups = warpgroups_of_cta(P * B * HV, V)
    out = kernel(
        functools.partial(_forward_body, chunks=N, pieces=P, warpgroups=warpgroups),
        inputs=dict(
            **dict(q=q, w=w, u=u, kg=kg, decay=decay, aq=aq, beta=beta),
            **dict(starts=starts, spans=spans),
        ),
        outputs=dict(
            o=SDS((B, length, HV, V), bf16),
            last=SDS(_ends(spans, P, (B, HV, K, V)), f32),
            states=SDS((B, HV, N, V, K), bf16) if keep_states else None,
        ),
        scratch=dict(
            so=mosaic.tile(CHUNK, COLUMNS, warpgroups, 2),
            ss=mosaic.tile(COLUMNS, K, warpgroups) if keep_states or K > NARROW else None,
        ),
        grid=(P, B, HV, V // (warpgroups * COLUMNS)),
        warpgroups=warpgroups,
    )
    return [x for x in out if x is not None]


def _forward_body(refs, *, chunks, pieces, warpgroups):
    K, width = refs.q.shape[3], warpgroups * COLUMNS
    wide, keep_states = K > NARROW, refs.states is not None
    p, b, h, block, wg = (lax.axis_index(name) for name in ("p", "b", "h", "block", "wg"))
    first, count = piece(p, pieces, chunks, refs.spans, b)
    mine = pl.ds(block * width + wg * COLUMNS, COLUMNS)

    def run(pipeline):
        if refs.starts is None:
            state = plgpu.layout_cast(jnp.zeros((COLUMNS, K), f32), WGMMA_LAYOUT)
        else:
            state = mosaic.load_transposed(refs.starts.at[p, b, h, :, mine])
        state = pipeline(state)

        _store_end(refs.last, refs.spans, p, pieces - 1, (b, h), mine, state)
        plgpu.wait_smem_to_gmem(0)

    def step(index, x, state):
        n = first + index[0]
        rounded = state.astype(bf16)
        if keep_states or wide:
            plgpu.wait_smem_to_gmem(1, wait_read_only=True)
            refs.ss.at[wg][...] = rounded
        if wide:
            plgpu.commit_smem()
            rounded = refs.ss.at[wg]
        # E = u - w S;   o = q S + Aq (beta E)
        error = mosaic.load(x.u.at[:, pl.ds(wg * COLUMNS, COLUMNS)].T) - product((rounded, x.w.T))
        write = error * mosaic.per_column(mosaic.load(x.beta, PER_COLUMN), COLUMNS)
        write = write.astype(bf16)
        o = product((rounded, x.q.T), (write, x.aq.T)).astype(bf16)
        # S <- Diag(decay) S + kg^T (beta E)
        kept = state * mosaic.per_column(mosaic.load(x.decay, PER_COLUMN), COLUMNS)
        state = product((write, x.kg), init=kept)
        if not (keep_states or wide):
            plgpu.wait_smem_to_gmem(1, wait_read_only=True)
        tile = refs.so.at[wg, lax.rem(index[0], 2)]
        o_transposed = tile.T
        o_transposed[...] = o
        plgpu.commit_smem()
        if keep_states:
            plgpu.copy_smem_to_gmem(refs.ss.at[wg], refs.states.at[b, h, n, mine])
        plgpu.copy_smem_to_gmem(tile, refs.o.at[b, pl.ds(n * CHUNK, CHUNK), h, mine])
        return state

    def chunk(i):
        return first + i

    operands = dict(
        q=(refs.q, tokens(chunk, b, h, K)),
        w=(refs.w, tokens(chunk, b, h, K)),
        u=(refs.u, tokens(chunk, b, h, width, block)),
        kg=(refs.kg, tokens(chunk, b, h, K)),
        decay=(refs.decay, features(chunk, b, h, K)),
        aq=(refs.aq, square(chunk, b, h)),
        beta=(refs.beta, scalars(chunk, b, h)),
    )
    stream(step, run, count, warpgroups, operands)


def backward(q, w, kg, do, decay, aq, beta, ends, spans=None):
    """Runs the chunks in reverse; dS is the gradient of the state after the chunk:

        dE = beta (Aq^T do + kg dS);   dS <- Diag(decay) dS + q^T do - w^T dE

    Args:
      q, w, kg, decay, aq, beta: as in `forward`. do: [B, T, HV, V] bf16, T at most TP.
      ends: gradient of the state after each piece of the sequence, [P, B, HV, K, V] float32.
      spans: as in `forward`.

    Returns:
      The gradient of the state after each chunk, transposed, [B, HV, N, V, K] bf16, and that of the
      initial state, [B, HV, K, V] float32 (with spans, of each piece's, [P, B, HV, K, V]).

    Floor as `forward`'s, with `do` in u's place and the state gradients in o's.
    """
    B, TP, HV, K = q.shape
    V, N, P = do.shape[-1], TP // CHUNK, ends.shape[0]
    warpgroups = warpgroups_of_cta(P * B * HV, V)
    out = kernel(
        functools.partial(_backward_body, chunks=N, pieces=P, warpgroups=warpgroups),
        inputs=dict(
            **dict(q=q, w=w, kg=kg, do=do, decay=decay, aq=aq, beta=beta),
            **dict(ends=ends, spans=spans),
        ),
        outputs=dict(
            gradients=SDS((B, HV, N, V, K), bf16),
            start=SDS(_ends(spans, P, (B, HV, K, V)), f32),
        ),
        scratch=dict(ss=mosaic.tile(COLUMNS, K, warpgroups, 1 if K > NARROW else 2)),
        grid=(P, B, HV, V // (warpgroups * COLUMNS)),
        warpgroups=warpgroups,
    )
    return out.gradients, out.start


def _backward_body(refs, *, chunks, pieces, warpgroups):
    K, width = refs.q.shape[3], warpgroups * COLUMNS
    wide, buffers = K > NARROW, refs.ss.shape[1]
    p, b, h, block, wg = (lax.axis_index(name) for name in ("p", "b", "h", "block", "wg"))
    first, count = piece(p, pieces, chunks, refs.spans, b)
    last = first + count - 1
    mine = pl.ds(block * width + wg * COLUMNS, COLUMNS)

    def run(pipeline):
        gradient = pipeline(mosaic.load_transposed(refs.ends.at[p, b, h, :, mine]))

        _store_end(refs.start, refs.spans, p, 0, (b, h), mine, gradient)
        plgpu.wait_smem_to_gmem(0)

    def step(index, x, gradient):
        n = last - index[0]
        rounded = gradient.astype(bf16)
        tile = refs.ss.at[wg, lax.rem(index[0], buffers)]
        plgpu.wait_smem_to_gmem(buffers - 1, wait_read_only=True)
        tile[...] = rounded
        if wide:
            plgpu.commit_smem()
            rounded = tile
        do = plgpu.load(x.do.at[:, pl.ds(wg * COLUMNS, COLUMNS)].T, layout=WGMMA_LAYOUT)
        gradient = gradient_step(x, do, rounded, gradient)
        plgpu.commit_smem()
        plgpu.copy_smem_to_gmem(tile, refs.gradients.at[b, h, n, mine])
        return gradient

    def chunk(i):
        return last - i

    stream(step, run, count, warpgroups, backward_operands(refs, chunk, b, h, width, block))


def gradient_step(x, do, rounded, gradient):
    """dS before the chunk: dE = beta (Aq^T do + kg dS), dS <- Diag(decay) dS + q^T do - w^T dE.

    Args:
      x: the chunk's tiles. do: this warpgroup's columns, transposed. rounded: dS in bf16.
    """
    y = product((do, x.aq), (rounded, x.kg.T))
    error = y * mosaic.per_column(mosaic.load(x.beta, PER_COLUMN), COLUMNS)
    kept = gradient * mosaic.per_column(mosaic.load(x.decay, PER_COLUMN), COLUMNS)
    return product((do, x.q), ((-error).astype(bf16), x.w), init=kept)


def backward_operands(refs, chunk, b, h, width, block):
    """What `gradient_step` takes of a chunk, with `width` columns of do at `block`."""
    K = refs.q.shape[3]
    return dict(
        q=(refs.q, tokens(chunk, b, h, K)),
        w=(refs.w, tokens(chunk, b, h, K)),
        kg=(refs.kg, tokens(chunk, b, h, K)),
        do=(refs.do, tokens(chunk, b, h, width, block)),
        decay=(refs.decay, features(chunk, b, h, K)),
        aq=(refs.aq, square(chunk, b, h)),
        beta=(refs.beta, scalars(chunk, b, h)),
    )


def piece(p, pieces, chunks, spans=None, b=None):
    """The first chunk of piece p and its number of chunks; the last piece may be shorter. With
    `spans`, a ref, what they say for batch row b."""
    if spans is not None:
        return spans[b, p, 0], spans[b, p, 1]
    length = -(-chunks // pieces)
    first = p * length
    if chunks == pieces * length:
        return first, length
    return first, jnp.minimum(length, chunks - first)


def _ends(spans, P, shape):
    """The shape of the states where pieces end: of one sequence the last counts alone."""
    return shape if spans is None else (P, *shape)


def _store_end(ref, spans, p, last, place, mine, state):
    """Stores the state where piece p ends; without spans if it is the sequence's `last`."""
    if spans is not None:
        mosaic.store_transposed(ref.at[p, *place, :, mine], state)
        return

    @pl.when(p == last)
    def _():
        mosaic.store_transposed(ref.at[*place, :, mine], state)


def warpgroups_of_cta(heads, V):
    """Compute warpgroups of a CTA: two share a chunk's operands, but also the tensor cores, so that
    with few heads, when the chain of chunks is all the time there is, each has a CTA of its own."""
    full = heads * V // (2 * COLUMNS) >= PROCESSORS // 2
    return 2 if V % (2 * COLUMNS) == 0 and full else 1


# How the pipeline's step i finds its chunk in an array; `chunk` maps i to the chunk's number.


def tokens(chunk, b, h, width, block=0):
    """Of [B, T, H, D]: the chunk's tokens, `width` features at `block`."""
    return plgpu.BlockSpec(
        (None, CHUNK, None, width), lambda i: (b, chunk(i), h, block), transforms=TRANSFORMS
    )


def features(chunk, b, h, width):
    """Of [B, H, N, D]: the chunk's vector."""
    return plgpu.BlockSpec((None, None, None, width), lambda i: (b, h, chunk(i), 0))


def square(chunk, b, h):
    """Of [B, H, N, 64, 64]: the chunk's matrix."""
    return plgpu.BlockSpec(
        (None, None, None, CHUNK, CHUNK), lambda i: (b, h, chunk(i), 0, 0), transforms=TRANSFORMS
    )


def scalars(chunk, b, h):
    """Of [B, H, T]: the chunk's tokens."""
    return plgpu.BlockSpec((None, None, CHUNK), lambda i: (b, h, chunk(i)))


def stream(step, run, chunks, warpgroups, operands):
    """Runs `step` for every chunk while a warpgroup of its own loads the chunks to come.

    Args:
      step: of the index, the chunk's tiles by name and the carry, to the carry.
      run: the pipeline's compute context. operands: {name: (ref, spec)}.
    """
    Tiles = collections.namedtuple("Tiles", operands)
    refs, specs = zip(*operands.values(), strict=True)

    def by_name(index, *tiles_and_carry):
        *tiles, carry = tiles_and_carry
        return step(index, Tiles(*tiles), carry)

    ahead = 1 if max(spec.block_shape[-1] for spec in specs) > NARROW else 2
    plgpu.emit_pipeline_warp_specialized(
        by_name,
        grid=(chunks,),
        in_specs=list(specs),
        compute_context=run,
        num_compute_wgs=warpgroups,
        memory_registers=LOADER_REGISTERS,
        wg_axis="wg",
        max_concurrent_steps=min(ahead, chunks) if isinstance(chunks, int) else ahead,
    )(*refs)


def kernel(body, *, grid, warpgroups, **named):
    """`scratch.kernel` over pieces, batch, heads and blocks of value columns."""
    return scratch.kernel(
        body,
        grid=grid,
        grid_names=("p", "b", "h", "block"),
        num_threads=warpgroups + 1,
        thread_name="wg",
        **named,
    )
