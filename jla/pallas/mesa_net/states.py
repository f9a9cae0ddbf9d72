"""MesaNet's two states from chunk to chunk, and their gradients in reverse.

All follow one rule. A pair of states X [K, K], Y [K, V] changes in a chunk by

    X <- exp(G_end) X + (w l)^T x;   Y <- exp(G_end) Y + (w l)^T y

    forward:  X = Hkk, Y = Hkv, l = x = k, y = v, w_j = beta_j exp(G_end - G_j)
    reverse:  X = -dHkk^T, Y = dHkv, l the solutions, x those of the backward pass, y = do,
              w = exp(G)

What a chunk does to a state is a scalar decay and an addition, so that a long sequence of few heads
can be cut into pieces, as `pieces.py` does: one pass makes each piece's end from zeros, XLA joins
them, and a second pass runs all pieces from their true starts.
"""

import functools

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from jla._core.exchange import join
from jla.pallas.common import mosaic, scratch
from jla.pallas.common.chunks import CHUNK, TILE_WIDTH
from jla.pallas.common.mosaic import PER_COLUMN, WGMMA_LAYOUT, f32, per_column, product
from jla.pallas.common.pieces import number_of_pairs, pieces_first, rows_first
from jla.pallas.common.recurrence import piece
from jla.pallas.common.scratch import barrier_for, fetch
from jla.pallas.common.tiles import SMALLEST, columns, smem_tiles

SDS = jax.ShapeDtypeStruct
STAGES = 2


def forward(k, v, decays, weights, starts, *, made=None, pieces=None, spans=None):
    """The states before each chunk, and the last.

    Args:
      k, v: [B, T, H, K], [B, T, H, V] float16, K and V 64 or 128, T a multiple of 8.
      decays: exp(G), [B, H, TP] float32, G cumulated in each chunk; TP is T in whole chunks.
      weights: w, [B, H, TP] float32.
      starts: the first states, [B, H, K, K] and [B, H, K, V] float32.
      made: what `summary` has made of each piece, or None.
      pieces: for tests; by default their number follows from the shapes.
      spans: None, or each piece's first chunk and its number of chunks, [B, P, 2] int32. Then
        `starts` are those of each piece, [B, H, P, K, K] and [B, H, P, K, V].

    Returns:
      Hkk [B, H, N, K, K] and Hkv [B, H, N, K, V] float16, before each chunk and divided by the
      largest element of each 64 rows; the last states, as `starts`; and those largest elements,
      [B, H, N, K/64] float32 for either.
    """
    options = dict(made=made, pieces=pieces, spans=spans)
    return _through_chunks(k, (k, v), decays, weights, starts, **options, reverse=False)


def reverse(x, y, do, decays, ends, *, made=None, pieces=None, spans=None):
    """The gradients of the states after each chunk, and those of the first.

    Args:
      x, y, do: [B, T, H, K], [B, T, H, K], [B, T, H, V] bf16: the solutions, those of the backward
        pass, the outputs' gradient.
      decays: as in `forward`.
      ends: -dHkk^T and dHkv of the last states, [B, H, K, K] and [B, H, K, V] float32.
      made, pieces, spans: as in `forward`, `made` by `gradient_summary`.

    Returns:
      -dHkk^T [B, H, N, K, K] and dHkv [B, H, N, K, V] bf16, after each chunk; those of the first
      states, as `ends`.
    """
    options = dict(made=made, pieces=pieces, spans=spans)
    return _through_chunks(x, (y, do), decays, decays, ends, **options, reverse=True)


def summary(k, v, decays, weights):
    """What the whole sequence does to the states: how they decay, [B, H], and what it makes of
    zeros, [B, H, K, K] and [B, H, K, V]; float32. And what each piece makes of zeros,
    [B, H, P, ...].

    The arguments are those of `forward`.
    """
    zeros = _zeros(k, k), _zeros(k, v)
    return _summary(k, (k, v), decays, weights, zeros, reverse=False)


def gradient_summary(x, y, do, decays, ends):
    """The same of the states' gradients, and what it makes of `ends`. The arguments are those of
    `reverse`."""
    return _summary(x, (y, do), decays, decays, ends, reverse=True)


def _summary(left, right, decays, weights, starts, *, reverse):
    pieces = _pieces(left, decays)
    ends = _run(left, right, decays, weights, None, pieces, reverse=reverse, every=True)
    factors, last = _piece_decays(decays, pieces), 0 if reverse else -1
    joined = (join(factors, *pair, reverse=reverse) for pair in zip(ends, starts, strict=True))
    whole = jnp.prod(factors, axis=0)[..., 0, 0]
    return whole, *(x[last] for x in joined), *rows_first(*ends)


def _zeros(x, y):
    (B, _, H, K), V = x.shape, y.shape[-1]
    return jnp.zeros((B, H, K, V), f32)


def _pieces(left, decays):
    """How many pieces, by the shapes."""
    B, H, TP = decays.shape
    return number_of_pairs(B * H * (left.shape[-1] // TILE_WIDTH), TP // CHUNK)


def _through_chunks(
    left, right, decays, weights, starts, *, made=None, pieces=None, spans=None, reverse
):  # fmt: skip
    """Both functions, in one pass or two."""
    if spans is not None:
        operands, starts = (left, right, decays, weights), pieces_first(*starts)
        *states, x_end, y_end = _run(
            *operands, starts, spans.shape[1], reverse=reverse, spans=spans
        )
        return *states[:2], *rows_first(x_end, y_end), *states[2:]
    pieces = pieces or (made[0].shape[2] if made else _pieces(left, decays))
    operands = left, right, decays, weights
    if pieces == 1:
        starts = [x[None] for x in starts]
    else:
        followed = slice(1, None) if reverse else slice(-1)
        if made is None:
            ends = _run(*operands, None, pieces, reverse=reverse)
        else:
            ends = (x[followed] for x in pieces_first(*made))
        factors = _piece_decays(decays, pieces)[followed]
        starts = [join(factors, *pair, reverse=reverse) for pair in zip(ends, starts, strict=True)]
    *states, x_end, y_end = _run(*operands, starts, pieces, reverse=reverse)
    last = 0 if reverse else -1
    return *states[:2], x_end[last], y_end[last], *states[2:]


def _piece_decays(decays, pieces):
    """The decay of a state over each piece, [P, B, H, 1, 1]."""
    B, H, TP = decays.shape
    N = TP // CHUNK
    length = -(-N // pieces)  # only the last piece may be shorter
    of_chunks = decays[:, :, CHUNK - 1 :: CHUNK]
    of_chunks = jnp.pad(of_chunks, ((0, 0), (0, 0), (0, pieces * length - N)), constant_values=1.0)
    of_pieces = of_chunks.reshape(B, H, pieces, length).prod(-1)
    return jnp.moveaxis(of_pieces, 2, 0)[..., None, None]


def _run(left, right, decays, weights, starts, pieces, *, reverse, every=False, spans=None):
    """The kernel: all pieces from `starts`, [P, B, H, ...], with the states at the chunks' borders;
    or all but the last (in reverse: the first), or `every` one, from zeros (None), without them.
    Returns the pieces' last states, [P, B, H, ...] or [P - 1, B, H, ...], after the others.

    In reverse the states are not scaled, for bf16 needs it not.

    One warpgroup has 64 rows of both states in registers for a whole piece; two of them share a
    multiprocessor (98 KB of SMEM at K=V=128, in reverse 113). Floor at B=8 T=4096 H=16 K=V=128:
    0.8 GB, 0.19 ms at 4.3 TB/s; in reverse 134 MB more.
    """
    (B, _, H, K), V, TP = right[0].shape, right[1].shape[-1], decays.shape[-1]
    N, k_tiles, v_tiles = TP // CHUNK, K // TILE_WIDTH, V // TILE_WIDTH
    dtype = left.dtype
    separate = left is not right[0]
    keep = starts is not None
    scaled = keep and not reverse
    P = pieces if keep or every else pieces - 1
    skipped = pieces - P if reverse else 0
    x_start, y_start = starts if keep else (None, None)
    scales = SDS((B, H, N, k_tiles), f32) if scaled else None
    vector = plgpu.SMEM((STAGES, CHUNK), f32)
    loads = dict(left=int(separate), x=k_tiles, y=v_tiles, decays=1, weights=0 if reverse else 1)
    out = scratch.kernel(
        functools.partial(
            _body,
            of_piece=lambda p, *span: piece(p + skipped, pieces, N, *span),
            reverse=reverse,
        ),
        inputs=dict(
            **dict(left=left, x=right[0], y=right[1], decays=decays, weights=weights),
            **dict(x_start=x_start, y_start=y_start, spans=spans),
        ),
        outputs=dict(
            x_states=SDS((B, H, N, K, K), dtype) if keep else None,
            y_states=SDS((B, H, N, K, V), dtype) if keep else None,
            **dict(x_scale=scales, y_scale=scales),
            **dict(x_end=SDS((P, B, H, K, K), f32), y_end=SDS((P, B, H, K, V), f32)),
        ),
        scratch=dict(
            sl=mosaic.tile(CHUNK, TILE_WIDTH, STAGES, dtype=dtype) if separate else None,
            sx=smem_tiles(k_tiles, STAGES, dtype=dtype),
            sy=smem_tiles(v_tiles, STAGES, dtype=dtype),
            sd=vector,
            sw=None if reverse else vector,
            buffers=smem_tiles(k_tiles + v_tiles if keep else 0, dtype=dtype),
            loaded=barrier_for(loads, STAGES),
        ),
        automatic_barriers=False,
        grid=(P, B, H, k_tiles),
        grid_names=("p", "b", "h", "block"),
    )
    return tuple(x for x in out if x is not None)


def _body(refs, *, of_piece, reverse):
    p, b, h, block = (lax.axis_index(name) for name in ("p", "b", "h", "block"))
    first, count = of_piece(p, refs.spans, b)
    mine, k_tiles = columns(block), len(refs.sx)
    keep = refs.x_states is not None

    def chunk(step):
        return first + (count - 1 - step if reverse else step)

    def load(step):
        slot, rows = lax.rem(step, STAGES), pl.ds(chunk(step) * CHUNK, CHUNK)

        def of_tokens(ref, tiles):
            sources = (ref.at[b, rows, h, columns(i)] for i in range(len(tiles)))
            return list(zip(sources, (tile.at[slot] for tile in tiles), strict=True))

        loads = dict(left=None, x=of_tokens(refs.x, refs.sx), y=of_tokens(refs.y, refs.sy))
        if refs.sl is not None:
            loads["left"] = refs.left.at[b, rows, h, mine], refs.sl.at[slot]
        loads["decays"] = refs.decays.at[b, h, rows], refs.sd.at[slot]
        if not reverse:
            loads["weights"] = refs.weights.at[b, h, rows], refs.sw.at[slot]
        fetch(loads, refs.loaded.at[slot])

    def step(index, state):
        n, slot = chunk(index), lax.rem(index, STAGES)
        if keep:
            plgpu.wait_smem_to_gmem(0, wait_read_only=True)
            x_buffers, y_buffers = refs.buffers[:k_tiles], refs.buffers[k_tiles:]
            at = b, h, n, block, mine
            _put(state[:k_tiles], refs.x_states, refs.x_scale, at, x_buffers)
            _put(state[k_tiles:], refs.y_states, refs.y_scale, at, y_buffers)
        pl.when(index + 1 < count)(lambda: load(index + 1))
        plgpu.barrier_wait(refs.loaded.at[slot])
        # X <- exp(G_end) X + (w l)^T x
        weight = mosaic.load((refs.sd if reverse else refs.sw).at[slot], PER_COLUMN)
        weighted = _left(refs, block, slot) * per_column(weight, TILE_WIDTH)
        weighted = weighted.astype(refs.sx[0].dtype)
        decay = refs.sd[slot, CHUNK - 1]
        new = tuple(
            product((weighted, ref.at[slot]), init=x * decay)
            for ref, x in zip((*refs.sx, *refs.sy), state, strict=True)
        )
        plgpu.commit_smem()  # all warps are done with this slot
        return new

    def parts(x_ref, y_ref):
        for ref, tiles in ((x_ref, refs.sx), (y_ref, refs.sy)):
            for i in range(len(tiles)):
                yield ref.at[p, b, h, mine, columns(i)]

    load(jnp.int32(0))
    if keep:
        starts = parts(refs.x_start, refs.y_start)
        state = tuple(mosaic.load(ref, optimized=False) for ref in starts)
    else:
        zeros = plgpu.layout_cast(jnp.zeros((TILE_WIDTH, TILE_WIDTH), f32), WGMMA_LAYOUT)
        state = (zeros,) * (k_tiles + len(refs.sy))
    state = lax.fori_loop(0, count, step, state)
    for ref, x in zip(parts(refs.x_end, refs.y_end), state, strict=True):
        ref[...] = x
    if keep:
        plgpu.wait_smem_to_gmem(0)


def _left(refs, block, slot):
    """The chunk's l of this block, transposed."""
    if refs.sl is not None:
        return mosaic.load(refs.sl.at[slot].T)
    first, *others = (mosaic.load(ref.at[slot].T) for ref in refs.sx)
    for other in others:
        first = jnp.where(jnp.broadcast_to(block == 0, first.shape), first, other)
    return first


def _put(state, out, scale_out, place, buffers):
    """Sends a state's tiles to memory, divided by their largest if there is room for it."""
    b, h, n, block, mine = place
    factor = 1.0
    if scale_out is not None:
        largest = jnp.maximum(max_of(state), SMALLEST)
        scale_out[b, h, n, block] = largest
        factor = 1.0 / largest
    for x, buffer in zip(state, buffers, strict=True):
        buffer[...] = (x * factor).astype(buffer.dtype)
    plgpu.commit_smem()
    for i, buffer in enumerate(buffers):
        plgpu.copy_smem_to_gmem(buffer, out.at[b, h, n, mine, columns(i)])


def max_of(tiles):
    """The largest magnitude in the tiles, a scalar."""
    largest = jnp.abs(tiles[0])
    for x in tiles[1:]:
        largest = jnp.maximum(largest, jnp.abs(x))
    return jnp.max(jnp.max(largest, axis=1))
