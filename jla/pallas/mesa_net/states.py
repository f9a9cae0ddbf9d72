"""MesaNet's two states from chunk to chunk, and their gradients in reverse.

All follow one rule. A pair of states X [K, K], Y [K, V] changes in a chunk by

    X <- exp(G_end) X + (w l)^T x;   Y <- exp(G_end) Y + (w l)^T y

    forward:  X = Hkk, Y = Hkv, l = x = k, y = v, w_j = beta_j exp(G_end - G_j)
    reverse:  X = -dHkk^T, Y = dHkv, l the solutions, x those of the backward pass, y = do,
              w = exp(G)
"""

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from jla.pallas import mosaic
from jla.pallas.chunks import CHUNK, TILE_WIDTH
from jla.pallas.mosaic import PER_COLUMN, f16, f32, per_column, product

SDS = jax.ShapeDtypeStruct
STAGES = 2
SMALLEST = 1e-30  # a scale, where there is nothing to scale


def columns(tile):
    """The features of a tile."""
    return pl.ds(tile * TILE_WIDTH, TILE_WIDTH)


def tiles(count, *leading, dtype=f16):
    """SMEM tiles, each a ref of its own: a product with `init` takes no constant index into one."""
    return [mosaic.tile(CHUNK, TILE_WIDTH, *leading, dtype=dtype) for _ in range(count)]


def forward(k, v, decays, weights, starts):
    """The states before each chunk, and the last.

    Args:
      k, v: [B, T, H, K], [B, T, H, V] float16, K and V 64 or 128, T a multiple of 8.
      decays: exp(G), [B, H, L] float32, G cumulated in each chunk; L is T in whole chunks.
      weights: w, [B, H, L] float32.
      starts: the first states, [B, H, K, K] and [B, H, K, V] float32.

    Returns:
      Hkk [B, H, N, K, K] and Hkv [B, H, N, K, V] float16, before each chunk and divided by the
      largest element of each 64 rows; the last states, as `starts`; and those largest elements,
      [B, H, N, K/64] float32 for either.
    """
    return _through_chunks(k, (k, v), decays, weights, starts, reverse=False)


def reverse(x, y, do, decays, ends):
    """The gradients of the states after each chunk, and those of the first.

    Args:
      x, y, do: [B, T, H, K], [B, T, H, K], [B, T, H, V] bf16: the solutions, those of the backward
        pass, the outputs' gradient.
      decays: as in `forward`.
      ends: -dHkk^T and dHkv of the last states, [B, H, K, K] and [B, H, K, V] float32.

    Returns:
      -dHkk^T [B, H, N, K, K] and dHkv [B, H, N, K, V] bf16, after each chunk; those of the first
      states, as `ends`.
    """
    return _through_chunks(x, (y, do), decays, decays, ends, reverse=True)


def _through_chunks(left, right, decays, weights, starts, *, reverse):
    """The kernel of both. In reverse the states are not scaled, for bf16 needs it not.

    One warpgroup has 64 rows of both states in registers for the whole sequence; two of them share
    a multiprocessor (98 KB of SMEM at K=V=128, in reverse 113). Traffic at B=8 T=4096 H=16 K=V=128:
    k, v 134 MB each (twice into SMEM, the second time from L2), states out 268 MB each: 0.8 GB,
    0.19 ms at 4.3 TB/s; in reverse 134 MB more.
    """
    (B, _, H, K), V, L = right[0].shape, right[1].shape[-1], decays.shape[-1]
    N, k_tiles, v_tiles = L // CHUNK, K // TILE_WIDTH, V // TILE_WIDTH
    dtype = left.dtype
    separate = left is not right[0]

    def body(*refs):
        left_ref, x_ref, y_ref, decays_ref, weights_ref, x_start, y_start, *refs = refs
        x_out, y_out, x_end, y_end, *refs = refs
        (x_scale, y_scale), refs = (refs[:2], refs[2:]) if not reverse else ((None, None), refs)
        sl, sx, sy, sd, sw, buffers, loaded = refs
        b, h, block = (lax.axis_index(name) for name in ("b", "h", "block"))
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
            return N - 1 - step if reverse else step

        def put(n, state, out, scale_out, buffers):
            """Sends a state's tiles to memory."""
            factor = 1.0
            if not reverse:
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
            plgpu.wait_smem_to_gmem(0, wait_read_only=True)
            put(n, state[:k_tiles], x_out, x_scale, buffers[:k_tiles])
            put(n, state[k_tiles:], y_out, y_scale, buffers[k_tiles:])
            pl.when(index + 1 < N)(lambda: fetch(index + 1))
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
                    yield ref.at[b, h, mine, columns(i)]

        fetch(jnp.int32(0))
        state = tuple(mosaic.load(ref, optimized=False) for ref in parts(x_start, y_start))
        state = lax.fori_loop(0, N, step, state)
        for ref, x in zip(parts(x_end, y_end), state, strict=True):
            ref[...] = x
        plgpu.wait_smem_to_gmem(0)

    out_type = [
        *(SDS((B, H, N, K, K), dtype), SDS((B, H, N, K, V), dtype)),
        *(SDS((B, H, K, K), f32), SDS((B, H, K, V), f32)),
    ]
    if not reverse:
        out_type += [SDS((B, H, N, k_tiles), f32)] * 2
    loads = separate + k_tiles + v_tiles + (1 if reverse else 2)
    vector = plgpu.SMEM((STAGES, CHUNK), f32)
    return mosaic.kernel(
        body,
        automatic_barriers=False,
        out_type=out_type,
        scratch_types=[
            tiles(separate, STAGES, dtype=dtype),
            tiles(k_tiles, STAGES, dtype=dtype),
            tiles(v_tiles, STAGES, dtype=dtype),
            vector,
            [] if reverse else [vector],
            tiles(k_tiles + v_tiles, dtype=dtype),
            plgpu.Barrier(num_arrivals=loads, num_barriers=STAGES),
        ],
        grid=(B, H, k_tiles),
        grid_names=("b", "h", "block"),
    )(left, *right, decays, weights, *starts)


def max_of(tiles):
    """The largest magnitude in the tiles, a scalar."""
    largest = jnp.abs(tiles[0])
    for x in tiles[1:]:
        largest = jnp.maximum(largest, jnp.abs(x))
    return jnp.max(jnp.max(largest, axis=1))
