"""MesaNet's two states from chunk to chunk, and their gradients in reverse.

Both states follow one rule and share their left factor: with w_j = beta_j exp(G_end - G_j),

    Hkk <- exp(G_end) Hkk + (w k)^T k;   Hkv <- exp(G_end) Hkv + (w k)^T v
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
      largest element of each 64 rows; those, [B, H, N, K/64] float32 for either; and the last
      states, as `starts`.

    One warpgroup has 64 rows of both states in registers for the whole sequence. Traffic at B=8
    T=4096 H=16 K=V=128: k, v 134 MB each (twice into SMEM, the second time from L2), states out
    268 MB each: 0.8 GB, 0.19 ms at 4.3 TB/s.
    """
    (B, _, H, K), V, L = k.shape, v.shape[-1], decays.shape[-1]
    N, k_tiles, v_tiles = L // CHUNK, K // TILE_WIDTH, V // TILE_WIDTH

    def body(
        k_ref, v_ref, decays_ref, weights_ref, kk_start, kv_start,
        kk_out, kv_out, kk_scale, kv_scale, kk_end, kv_end,
        sk, sv, sd, sw, sx, loaded,
    ):  # fmt: skip
        b, h, block = (lax.axis_index(name) for name in ("b", "h", "block"))
        mine = columns(block)

        def fetch(n):
            slot, rows = lax.rem(n, STAGES), pl.ds(n * CHUNK, CHUNK)
            barrier = loaded.at[slot]
            for i in range(k_tiles):
                source = k_ref.at[b, rows, h, columns(i)]
                plgpu.copy_gmem_to_smem(source, sk[i].at[slot], barrier)
            for i in range(v_tiles):
                source = v_ref.at[b, rows, h, columns(i)]
                plgpu.copy_gmem_to_smem(source, sv[i].at[slot], barrier)
            plgpu.copy_gmem_to_smem(k_ref.at[b, rows, h, mine], sx[0].at[slot], barrier)
            plgpu.copy_gmem_to_smem(decays_ref.at[b, h, rows], sd.at[slot], barrier)
            plgpu.copy_gmem_to_smem(weights_ref.at[b, h, rows], sw.at[slot], barrier)

        def put(n, state, out, scale_out, buffers):
            """Sends a state's tiles to memory, scaled."""
            largest = jnp.maximum(max_of(state), SMALLEST)
            scale_out[b, h, n, block] = largest
            for i, x in enumerate(state):
                buffers[i][...] = (x * (1.0 / largest)).astype(f16)
            plgpu.commit_smem()
            for i in range(len(state)):
                plgpu.copy_smem_to_gmem(buffers[i], out.at[b, h, n, mine, columns(i)])

        def step(n, state):
            plgpu.wait_smem_to_gmem(0, wait_read_only=True)
            put(n, state[:k_tiles], kk_out, kk_scale, sx[1])
            put(n, state[k_tiles:], kv_out, kv_scale, sx[2])
            pl.when(n + 1 < N)(lambda: fetch(n + 1))
            slot = lax.rem(n, STAGES)
            plgpu.barrier_wait(loaded.at[slot])
            keys = mosaic.load(sx[0].at[slot].T)
            weight = mosaic.load(sw.at[slot], PER_COLUMN)
            keys = (keys * per_column(weight, TILE_WIDTH)).astype(f16)
            decay = sd[slot, CHUNK - 1]
            refs = [*sk, *sv]
            new = tuple(
                product((keys, ref.at[slot]), init=x * decay)
                for ref, x in zip(refs, state, strict=True)
            )
            plgpu.commit_smem()  # all warps are done with this slot
            return new

        def part(ref, i):
            return ref.at[b, h, mine, columns(i)]

        fetch(0)
        state = (
            *(mosaic.load(part(kk_start, i), optimized=False) for i in range(k_tiles)),
            *(mosaic.load(part(kv_start, i), optimized=False) for i in range(v_tiles)),
        )
        state = lax.fori_loop(0, N, step, state)
        for i in range(k_tiles):
            part(kk_end, i)[...] = state[i]
        for i in range(v_tiles):
            part(kv_end, i)[...] = state[k_tiles + i]
        plgpu.wait_smem_to_gmem(0)

    scales = SDS((B, H, N, k_tiles), f32)
    return mosaic.kernel(
        body,
        automatic_barriers=False,
        out_type=[
            *(SDS((B, H, N, K, K), f16), SDS((B, H, N, K, V), f16)),
            *(scales, scales),
            *(SDS((B, H, K, K), f32), SDS((B, H, K, V), f32)),
        ],
        scratch_types=[
            tiles(k_tiles, STAGES),
            tiles(v_tiles, STAGES),
            plgpu.SMEM((STAGES, CHUNK), f32),
            plgpu.SMEM((STAGES, CHUNK), f32),
            [mosaic.tile(CHUNK, TILE_WIDTH, STAGES, dtype=f16), tiles(k_tiles), tiles(v_tiles)],
            plgpu.Barrier(num_arrivals=k_tiles + v_tiles + 3, num_barriers=STAGES),
        ],
        grid=(B, H, k_tiles),
        grid_names=("b", "h", "block"),
    )(k, v, decays, weights, *starts)


def max_of(tiles):
    """The largest magnitude in the tiles, a scalar."""
    largest = jnp.abs(tiles[0])
    for x in tiles[1:]:
        largest = jnp.maximum(largest, jnp.abs(x))
    return jnp.max(jnp.max(largest, axis=1))
