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

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from jla._core.exchange import join
from jla.pallas.common import mosaic
from jla.pallas.common.chunks import CHUNK, TILE_WIDTH
from jla.pallas.common.mosaic import PER_COLUMN, WGMMA_LAYOUT, f32, per_column, product
from jla.pallas.common.pieces import number_of_pairs
from jla.pallas.common.recurrence import piece
from jla.pallas.common.tiles import SMALLEST, columns, smem_tiles

SDS = jax.ShapeDtypeStruct
STAGES = 2


def forward(k, v, decays, weights, starts, *, pieces=None):
    """The states before each chunk, and the last.

    Args:
      k, v: [B, T, H, K], [B, T, H, V] float16, K and V 64 or 128, T a multiple of 8.
      decays: exp(G), [B, H, L] float32, G cumulated in each chunk; L is T in whole chunks.
      weights: w, [B, H, L] float32.
      starts: the first states, [B, H, K, K] and [B, H, K, V] float32.
      pieces: for tests; by default their number follows from the shapes.

    Returns:
      Hkk [B, H, N, K, K] and Hkv [B, H, N, K, V] float16, before each chunk and divided by the
      largest element of each 64 rows; the last states, as `starts`; and those largest elements,
      [B, H, N, K/64] float32 for either.
    """
    return _through_chunks(k, (k, v), decays, weights, starts, pieces, reverse=False)


def reverse(x, y, do, decays, ends, *, pieces=None):
    """The gradients of the states after each chunk, and those of the first.

    Args:
      x, y, do: [B, T, H, K], [B, T, H, K], [B, T, H, V] bf16: the solutions, those of the backward
        pass, the outputs' gradient.
      decays: as in `forward`.
      ends: -dHkk^T and dHkv of the last states, [B, H, K, K] and [B, H, K, V] float32.
      pieces: as in `forward`.

    Returns:
      -dHkk^T [B, H, N, K, K] and dHkv [B, H, N, K, V] bf16, after each chunk; those of the first
      states, as `ends`.
    """
    return _through_chunks(x, (y, do), decays, decays, ends, pieces, reverse=True)


def _through_chunks(left, right, decays, weights, starts, pieces, *, reverse):
    """Both functions, in one pass or two."""
    B, H, L = decays.shape
    if pieces is None:
        pieces = number_of_pairs(B * H * (left.shape[-1] // TILE_WIDTH), L // CHUNK)
    operands = left, right, decays, weights
    if pieces == 1:
        starts = [x[None] for x in starts]
    else:
        ends = _run(*operands, None, pieces, reverse=reverse)
        factors = _piece_decays(decays, pieces)[slice(1, None) if reverse else slice(-1)]
        starts = [join(factors, *pair, reverse=reverse) for pair in zip(ends, starts, strict=True)]
    *states, x_end, y_end = _run(*operands, starts, pieces, reverse=reverse)
    last = 0 if reverse else -1
    return *states[:2], x_end[last], y_end[last], *states[2:]


def _piece_decays(decays, pieces):
    """What is left of a state after each piece, [P, B, H, 1, 1]."""
    B, H, L = decays.shape
    N = L // CHUNK
    length = -(-N // pieces)  # only the last piece may be shorter
    of_chunks = decays[:, :, CHUNK - 1 :: CHUNK]
    of_chunks = jnp.pad(of_chunks, ((0, 0), (0, 0), (0, pieces * length - N)), constant_values=1.0)
    of_pieces = of_chunks.reshape(B, H, pieces, length).prod(-1)
    return jnp.moveaxis(of_pieces, 2, 0)[..., None, None]


def _run(left, right, decays, weights, starts, pieces, *, reverse):
    """The kernel: all pieces from `starts`, [P, B, H, ...], with the states at the chunks' borders;
    or all but the last (in reverse: the first) from zeros (None), without them. Returns the pieces'
    last states, [P, B, H, ...] or [P - 1, B, H, ...], after the others.

    In reverse the states are not scaled, for bf16 needs it not.

    One warpgroup has 64 rows of both states in registers for a whole piece; two of them share a
    multiprocessor (98 KB of SMEM at K=V=128, in reverse 113). Traffic at B=8 T=4096 H=16 K=V=128:
    k, v 134 MB each (twice into SMEM, the second time from L2), states out 268 MB each: 0.8 GB,
    0.19 ms at 4.3 TB/s; in reverse 134 MB more.
    """
    (B, _, H, K), V, L = right[0].shape, right[1].shape[-1], decays.shape[-1]
    N, k_tiles, v_tiles = L // CHUNK, K // TILE_WIDTH, V // TILE_WIDTH
    dtype = left.dtype
    separate = left is not right[0]
    keep = starts is not None
    scaled = keep and not reverse
    P = pieces if keep else pieces - 1
    skipped = pieces - P if reverse else 0

    def body(*refs):
        left_ref, x_ref, y_ref, decays_ref, weights_ref, *refs = refs
        if keep:
            x_start, y_start, x_out, y_out, *refs = refs
        if scaled:
            x_scale, y_scale, *refs = refs
        else:
            x_scale = y_scale = None
        x_end, y_end, sl, sx, sy, sd, sw, buffers, loaded = refs
        p, b, h, block = (lax.axis_index(name) for name in ("p", "b", "h", "block"))
        first, count = piece(p + skipped, pieces, N)
        mine = columns(block)

        def fetch(step):
            slot, rows = lax.rem(step, STAGES), pl.ds(chunk(step) * CHUNK, CHUNK)
            barrier = loaded.at[slot]
            if separate:
                plgpu.copy_gmem_to_smem(left_ref.at[b, rows, h, mine], sl[0].at[slot], barrier)
            for ref, targets in ((x_ref, sx), (y_ref, sy)):
                for i, target in enumerate(targets):
                    source = ref.at[b, rows, h, columns(i)]
                    plgpu.copy_gmem_to_smem(source, target.at[slot], barrier)
            plgpu.copy_gmem_to_smem(decays_ref.at[b, h, rows], sd.at[slot], barrier)
            if not reverse:
                plgpu.copy_gmem_to_smem(weights_ref.at[b, h, rows], sw[0].at[slot], barrier)

        def chunk(step):
            return first + (count - 1 - step if reverse else step)

        def put(n, state, out, scale_out, buffers):
            """Sends a state's tiles to memory."""
            factor = 1.0
            if scaled:
                largest = jnp.maximum(max_of(state), SMALLEST)
                scale_out[b, h, n, block] = largest
                factor = 1.0 / largest
            for x, buffer in zip(state, buffers, strict=True):
                buffer[...] = (x * factor).astype(dtype)
            plgpu.commit_smem()
            for i, buffer in enumerate(buffers):
                plgpu.copy_smem_to_gmem(buffer, out.at[b, h, n, mine, columns(i)])

        def left_of(slot):
            """The chunk's l of this block, transposed."""
            if separate:
                return mosaic.load(sl[0].at[slot].T)
            first, *others = (mosaic.load(ref.at[slot].T) for ref in sx)
            for other in others:
                first = jnp.where(jnp.broadcast_to(block == 0, first.shape), first, other)
            return first

        def step(index, state):
            n, slot = chunk(index), lax.rem(index, STAGES)
            if keep:
                plgpu.wait_smem_to_gmem(0, wait_read_only=True)
                put(n, state[:k_tiles], x_out, x_scale, buffers[:k_tiles])
                put(n, state[k_tiles:], y_out, y_scale, buffers[k_tiles:])
            pl.when(index + 1 < count)(lambda: fetch(index + 1))
            plgpu.barrier_wait(loaded.at[slot])
            weight = mosaic.load((sd if reverse else sw[0]).at[slot], PER_COLUMN)
            weighted = (left_of(slot) * per_column(weight, TILE_WIDTH)).astype(dtype)
            decay = sd[slot, CHUNK - 1]
            new = tuple(
                product((weighted, ref.at[slot]), init=x * decay)
                for ref, x in zip((*sx, *sy), state, strict=True)
            )
            plgpu.commit_smem()  # all warps are done with this slot
            return new

        def parts(x_ref, y_ref):
            for ref, count in ((x_ref, k_tiles), (y_ref, v_tiles)):
                for i in range(count):
                    yield ref.at[p, b, h, mine, columns(i)]

        fetch(jnp.int32(0))
        if keep:
            state = tuple(mosaic.load(ref, optimized=False) for ref in parts(x_start, y_start))
        else:
            zeros = plgpu.layout_cast(jnp.zeros((TILE_WIDTH, TILE_WIDTH), f32), WGMMA_LAYOUT)
            state = (zeros,) * (k_tiles + v_tiles)
        state = lax.fori_loop(0, count, step, state)
        for ref, x in zip(parts(x_end, y_end), state, strict=True):
            ref[...] = x
        if keep:
            plgpu.wait_smem_to_gmem(0)

    out_type = [SDS((P, B, H, K, K), f32), SDS((P, B, H, K, V), f32)]
    if scaled:
        out_type = [SDS((B, H, N, k_tiles), f32)] * 2 + out_type
    if keep:
        out_type = [SDS((B, H, N, K, K), dtype), SDS((B, H, N, K, V), dtype), *out_type]
    loads = separate + k_tiles + v_tiles + (1 if reverse else 2)
    vector = plgpu.SMEM((STAGES, CHUNK), f32)
    return mosaic.kernel(
        body,
        automatic_barriers=False,
        out_type=out_type,
        scratch_types=[
            smem_tiles(separate, STAGES, dtype=dtype),
            smem_tiles(k_tiles, STAGES, dtype=dtype),
            smem_tiles(v_tiles, STAGES, dtype=dtype),
            vector,
            [] if reverse else [vector],
            smem_tiles(k_tiles + v_tiles if keep else 0, dtype=dtype),
            plgpu.Barrier(num_arrivals=loads, num_barriers=STAGES),
        ],
        grid=(P, B, H, k_tiles),
        grid_names=("p", "b", "h", "block"),
    )(left, *right, decays, weights, *(starts or ()))


def max_of(tiles):
    """The largest magnitude in the tiles, a scalar."""
    largest = jnp.abs(tiles[0])
    for x in tiles[1:]:
        largest = jnp.maximum(largest, jnp.abs(x))
    return jnp.max(jnp.max(largest, axis=1))
