"""The outputs: everything but the states, for all chunks at once."""

import jax
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from jla.pallas.common import mosaic
from jla.pallas.common.chunks import CHUNK, TILE_WIDTH
from jla.pallas.common.mosaic import (
    PER_COLUMN,
    PER_ROW,
    bf16,
    f32,
    load,
    per_column,
    per_row,
    product,
)
from jla.pallas.common.tiles import columns, smem_tiles
from jla.pallas.log_linear import stream

SDS = jax.ShapeDtypeStruct


def outputs(q, k, v, weights, states, skip, live, *, per, inside):
    """The outputs of all chunks: with w_l[t] the weights of level l,

        o_t = sum_s (q_t . k_s) w_l[t] w_l[s] v_s + sum_m w_l(m)[t] q_t S_m + D v_t

    over the pairs of t's leaf block, where l is the level at which t and s meet (and lambda[t, 0]
    stands for the weights of t with itself), and over the states S_m of the set bits m of the leaf
    block's number. D is added to the weight of v_t, and rounded with it to bf16.

    Args:
      q, k: [B, T, HK, K] bf16, K 64 or 128; T a multiple of 8. v: [B, T, H, V] bf16.
      weights: [B, H, N, P, 64] float32, from `weights.weights`.
      states: [B, H, n, V, K] bf16, from `tree_states`; None where there is one leaf block.
      skip: D, [B, 1, H, 1] float32; None: 0.
      live: [B, N] int32, from `weights.live`: which chunks are worth the work; None: all.
      per: chunks of a leaf block; inside: its levels.

    Returns:
      [B, T, H, V] bf16, of live chunks.

    One warpgroup a chunk, its outputs in 64 registers a thread; at K=V=128 80 KB of SMEM (q 16, a
    ring of two slots of 32, each a chunk's k and v or a state), so that two chunks share a
    multiprocessor. Traffic at B=8 T=4096 H=16 HK=1 K=V=128, leaf blocks of 256: from memory v, o
    134 MB each, states 63 MB: 0.33 GB, 0.08 ms at 4.3 TB/s; from L2 v and k 2.5 times, two states a
    chunk, 1.2 GB, 0.22 ms at 5.5 TB/s.
    """
    B, T, H, V = v.shape
    HK, K = q.shape[2:]
    N, P = weights.shape[2:4]
    group, k_tiles, v_tiles = H // HK, K // TILE_WIDTH, V // TILE_WIDTH

    @stream.of_live_chunks(live, N)
    def body(_, q_ref, k_ref, v_ref, weights_ref, *refs):
        refs = list(refs)
        states_ref = refs.pop(0) if states is not None else None
        skip_ref = refs.pop(0) if skip is not None else None
        o_out, sq, ring, srow, scolumn, other, near, loaded, states_loaded = refs
        b, n, h = (lax.axis_index(name) for name in ("b", "n", "h"))
        key_head, rows = lax.div(h, group), pl.ds(n * CHUNK, CHUNK)
        for i in range(k_tiles):
            plgpu.copy_gmem_to_smem(q_ref.at[b, rows, key_head, columns(i)], sq[i], near)
        for target in (srow, scolumn):
            plgpu.copy_gmem_to_smem(weights_ref.at[b, h, n], target, near)

        def fetch_chunk(j, slot):
            rows, barrier = pl.ds(j * CHUNK, CHUNK), loaded.at[slot]
            for i in range(k_tiles):
                source = k_ref.at[b, rows, key_head, columns(i)]
                plgpu.copy_gmem_to_smem(source, ring[i].at[slot], barrier)
            for i in range(v_tiles):
                source = v_ref.at[b, rows, h, columns(i)]
                plgpu.copy_gmem_to_smem(source, ring[k_tiles + i].at[slot], barrier)
            source = weights_ref.at[b, h, j, stream.level_between(n, j)]
            plgpu.copy_gmem_to_smem(source, other.at[slot], barrier)

        def fetch_state(block, slot):
            place, _ = stream.node(block, states.shape[2])
            for i in range(v_tiles):
                for j in range(k_tiles):
                    source = states_ref.at[b, h, place, columns(i), columns(j)]
                    target = ring[i * k_tiles + j].at[slot]
                    plgpu.copy_gmem_to_smem(source, target, states_loaded.at[slot])

        def scores(slot):
            plgpu.barrier_wait(loaded.at[slot])
            return product(*((x, y.at[slot].T) for x, y in zip(sq, ring, strict=False)))

        def on_diagonal(slot):
            plgpu.barrier_wait(near)
            weights = stream.diagonal_weights(srow, scolumn)
            own = None if skip is None else skip_ref[b, 0, h, 0]
            weights = stream.plus_skip(scores(slot) * weights, own).astype(bf16)
            return tuple(product((weights, ring[k_tiles + i].at[slot])) for i in range(v_tiles))

        def on_chunk(j, slot, o):
            row = load(srow.at[stream.level_between(n, j)], PER_ROW)
            weights = scores(slot) * per_row(row, CHUNK)
            weights *= per_column(load(other.at[slot], PER_COLUMN), CHUNK)
            weights = weights.astype(bf16)
            return tuple(
                product((weights, ring[k_tiles + i].at[slot]), init=x) for i, x in enumerate(o)
            )

        def on_state(block, slot, o):
            row = load(srow.at[inside + 1 + stream.lowest_bit(block)], PER_ROW)
            row = per_row(row, TILE_WIDTH)
            q = [(load(x) * row).astype(bf16) for x in sq]
            plgpu.barrier_wait(states_loaded.at[slot])
            return tuple(
                product(
                    *((x, ring[i * k_tiles + j].at[slot].T) for j, x in enumerate(q)), init=total
                )
                for i, total in enumerate(o)
            )

        o = stream.back(
            n, per, fetch_chunk, fetch_state if states is not None else None,
            on_diagonal, on_chunk, on_state,
        )  # fmt: skip
        for i, x in enumerate(o):
            ring[i].at[0][...] = x.astype(bf16)
        plgpu.commit_smem()
        for i in range(v_tiles):
            plgpu.copy_smem_to_gmem(ring[i].at[0], o_out.at[b, rows, h, columns(i)])
        plgpu.wait_smem_to_gmem(0, wait_read_only=True)

    operands = [x for x in (live, q, k, v, weights, states, skip) if x is not None]
    return mosaic.kernel(
        body,
        automatic_barriers=False,
        out_type=SDS((B, T, H, V), bf16),
        scratch_types=[
            smem_tiles(k_tiles),
            smem_tiles(k_tiles + v_tiles, stream.STAGES),
            plgpu.SMEM((P, CHUNK), f32),
            plgpu.SMEM((P, CHUNK), f32),
            stream.vector(stream.STAGES),
            plgpu.Barrier(num_arrivals=k_tiles + 2),
            plgpu.Barrier(num_arrivals=k_tiles + v_tiles + 1, num_barriers=stream.STAGES),
            plgpu.Barrier(num_arrivals=k_tiles * v_tiles, num_barriers=stream.STAGES),
        ],
        grid=(B, N, H),
        grid_names=("b", "n", "h"),
    )(*operands)
