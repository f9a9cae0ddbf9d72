"""Weighted sums of outer products over runs of chunks: the states of the leaf blocks, and the
gradients of the states that are read.
"""

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from jla.pallas.common import mosaic
from jla.pallas.common.chunks import CHUNK, TILE_WIDTH
from jla.pallas.common.mosaic import PER_COLUMN, WGMMA_LAYOUT, bf16, f32, per_column, product
from jla.pallas.common.tiles import columns, smem_tiles

SDS = jax.ShapeDtypeStruct
STAGES = 3


def weighted_sums(x, y, weights, counts, jobs, job):
    """sum_t weights[t] x_t y_t^T over the tokens of each job.

    Args:
      x: [B, T, H, V] bf16; y: [B, T, HK, K] bf16.
      weights: [B, H, N, P, 64] float32, as `weights.weights` makes them.
      counts: the chunks that are worth a sum, from a job's first on, [B, J] int32; None: all.
      jobs: their number, J. job: of a traced int32, the job's first chunk, its number of chunks
        and the plane of its weights, all int32.

    Returns:
      [B, H, J, V, K] float32.

    One warpgroup for 64 rows of a sum, which it has in 64 registers a thread; chunks come in a ring
    of three, 74 KB of SMEM, so that three CTAs share a multiprocessor. Traffic at B=8 T=4096 H=16
    HK=1 K=V=128 in leaf blocks of 256: x 134 MB, the sums 126 MB, y from L2: 0.26 GB, 0.06 ms at
    4.3 TB/s.
    """
    B, _, H, V = x.shape
    HK, K = y.shape[2:]
    group, k_tiles = H // HK, K // TILE_WIDTH

    def body(x_ref, y_ref, weights_ref, *refs):
        out, sx, sy, sw, loaded = refs[-5:]
        b, j, h, part = (lax.axis_index(name) for name in ("b", "j", "h", "part"))
        j = jobs - 1 - j  # the longest are last
        first, count, plane = job(j)
        if counts is not None:
            count = refs[0][b, j]

        def fetch(step):
            slot, chunk = _modulo(step, STAGES), first + step
            rows, barrier = pl.ds(chunk * CHUNK, CHUNK), loaded.at[slot]
            plgpu.copy_gmem_to_smem(x_ref.at[b, rows, h, columns(part)], sx.at[slot], barrier)
            for i in range(k_tiles):
                source = y_ref.at[b, rows, lax.div(h, group), columns(i)]
                plgpu.copy_gmem_to_smem(source, sy[i].at[slot], barrier)
            plgpu.copy_gmem_to_smem(weights_ref.at[b, h, chunk, plane], sw.at[slot], barrier)

        def step(i, sums):
            following = i + STAGES - 1
            pl.when(following < count)(lambda: fetch(following))
            slot = _modulo(i, STAGES)
            plgpu.barrier_wait(loaded.at[slot])
            weight = per_column(mosaic.load(sw.at[slot], PER_COLUMN), TILE_WIDTH)
            rows = plgpu.load(sx.at[slot].T, layout=WGMMA_LAYOUT)
            rows = (rows.astype(f32) * weight).astype(bf16)
            sums = tuple(
                product((rows, tile.at[slot]), init=x) for tile, x in zip(sy, sums, strict=True)
            )
            plgpu.commit_smem()  # all warps are done with this slot
            return sums

        for i in range(STAGES - 1):
            pl.when(i < count)(lambda i=i: fetch(i))
        zeros = tuple(plgpu.layout_cast(jnp.zeros((TILE_WIDTH, TILE_WIDTH), f32), WGMMA_LAYOUT) for _ in sy)
        sums = lax.fori_loop(0, count, step, zeros)
        for i, x in enumerate(sums):
            out.at[b, h, j, columns(part), columns(i)][...] = x

    operands = (x, y, weights) if counts is None else (x, y, weights, counts)
    return mosaic.kernel(
        body,
        automatic_barriers=False,
        out_type=SDS((B, H, jobs, V, K), f32),
        scratch_types=[
            mosaic.tile(CHUNK, TILE_WIDTH, STAGES),
            smem_tiles(k_tiles, STAGES),
            plgpu.SMEM((STAGES, CHUNK), f32),
            plgpu.Barrier(num_arrivals=k_tiles + 2, num_barriers=STAGES),
        ],
        grid=(B, jobs, H, V // TILE_WIDTH),
        grid_names=("b", "j", "h", "part"),
    )(*operands)


def _modulo(x, y):
    return x % y if isinstance(x, int) else lax.rem(x, jnp.int32(y))
