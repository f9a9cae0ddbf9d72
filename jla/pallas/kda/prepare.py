"""KDA's chunk-local preparation: everything of a chunk that needs no state."""

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from jla.pallas import chunks, mosaic
from jla.pallas.chunks import CHUNK, LEVELS, TILE_WIDTH
from jla.pallas.mosaic import (
    PER_COLUMN,
    PER_ROW,
    TILE,
    bf16,
    f16,
    f32,
    load,
    per_column,
    per_row,
)

SDS = jax.ShapeDtypeStruct


def prepare(q, k, v, g, beta, *, scale):
    """Chunk-local part of KDA's forward pass.

    With G the cumulated log decays of the chunk:

        A0[i, j] = sum_k k_i k_j exp(G_i - G_j)   (j < i)
        X  = (I + A0 diag(beta))^-1 A0
        u  = v - X (beta v)                        the errors that a zero state would leave
        w  = k~ - X (beta k~),  k~ = k exp(G)      how the carried state changes them
        q~ = scale q exp(G);  kg = k exp(G_end - G);  decay = exp(G_end)
        Aq[i, j] = scale sum_k q_i k_j exp(G_i - G_j)   (j <= i)

    Args:
      q, k: [B, T, H, K] bf16, K a multiple of 64, T a multiple of 8. v: [B, T, HV, V] bf16.
      g: [B, L, HV, K] float32. beta: [B, HV, L] float32; L is T padded with zeros to whole chunks.

    Returns:
      q~, w [B, L, HV, K], u [B, L, HV, V], kg [B, L, HV, K] bf16, decay [B, HV, N, K] float32,
      Aq and X [B, HV, N, 64, 64] bf16.
    """
    B, L, HV, K = g.shape
    H, V = q.shape[2], v.shape[3]
    N, group = L // CHUNK, HV // H
    tiles = [pl.ds(i * TILE_WIDTH, TILE_WIDTH) for i in range(K // TILE_WIDTH)]

    def body(
        q_ref, k_ref, v_ref, g_ref, beta_row, beta_column,
        q_out, w_out, u_out, kg_out, decay_out, aq_out, x_out,
        sq, sk, sv, sg, sy, loaded, v_loaded,
    ):  # fmt: skip
        b, n, h = lax.axis_index("b"), lax.axis_index("n"), lax.axis_index("h")
        rows = pl.ds(n * CHUNK, CHUNK)
        plgpu.copy_gmem_to_smem(q_ref.at[b, rows, h // group], sq, loaded)
        plgpu.copy_gmem_to_smem(k_ref.at[b, rows, h // group], sk, loaded)
        for i, s in enumerate(tiles):
            gates = sg.at[i]
            gates[...] = chunks.gates(load(g_ref.at[b, rows, h, s], optimized=False))
        row_beta = per_row(load(beta_row.at[b, h, rows], PER_ROW, optimized=False), TILE_WIDTH)
        plgpu.commit_smem()
        for i, s in enumerate(tiles):
            # The sum over the chunk, as a sum along rows: along columns it would cross warps.
            decay_out.at[b, h, n, s][...] = jnp.exp2(load(sg.at[i].T).sum(axis=1))
        plgpu.barrier_wait(loaded)

        a0, aq = _scores(sq, sk, sv, sg, tiles)
        sy[...] = (aq.astype(f32) * scale).astype(bf16)
        plgpu.commit_smem()
        plgpu.copy_smem_to_gmem(sy, aq_out.at[b, h, n])

        # kg goes out through v's tile, which v enters when it has left.
        earlier, later = (chunks.weights(x) for x in (chunks.up_to(), chunks.from_on(strict=True)))
        for i, s in enumerate(tiles):
            after = chunks.decays(later, sg.at[i])
            sv.at[i][...] = (load(sk.at[:, s]) * after).astype(bf16)
            before = chunks.decays(earlier, sg.at[i])
            sq.at[:, s][...] = (load(sq.at[:, s]) * before * scale).astype(bf16)
            sk.at[:, s][...] = (load(sk.at[:, s]) * before).astype(bf16)
        plgpu.commit_smem()
        plgpu.copy_smem_to_gmem(sq, q_out.at[b, rows, h])
        for i, s in enumerate(tiles):
            plgpu.copy_smem_to_gmem(sv.at[i], kg_out.at[b, rows, h, s])
        plgpu.wait_smem_to_gmem(0, wait_read_only=True)
        value_tiles = [pl.ds(i * TILE_WIDTH, TILE_WIDTH) for i in range(V // TILE_WIDTH)]
        for i, s in enumerate(value_tiles):
            plgpu.copy_gmem_to_smem(v_ref.at[b, rows, h, s], sv.at[i], v_loaded)

        work = (sy, sq.at[:, tiles[0]])  # both have left
        beta = per_column(load(beta_column.at[b, h, rows], PER_COLUMN, optimized=False), CHUNK)
        inverse = chunks.unit_triangular_inverse(a0 * beta, work)
        x = chunks.precise_product(inverse, a0, work).astype(bf16)
        sy[...] = x
        plgpu.commit_smem()
        plgpu.copy_smem_to_gmem(sy, x_out.at[b, h, n])

        plgpu.wait_smem_to_gmem(0, wait_read_only=True)

        def solve(ref):
            y = load(ref)
            sy[...] = (y * row_beta).astype(bf16)
            plgpu.commit_smem()
            ref[...] = (y - mosaic.product((x, sy))).astype(bf16)

        for s in tiles:
            solve(sk.at[:, s])
        plgpu.barrier_wait(v_loaded)
        for i in range(len(value_tiles)):
            solve(sv.at[i])
        plgpu.commit_smem()
        plgpu.copy_smem_to_gmem(sk, w_out.at[b, rows, h])
        for i, s in enumerate(value_tiles):
            plgpu.copy_smem_to_gmem(sv.at[i], u_out.at[b, rows, h, s])
        plgpu.wait_smem_to_gmem(0, wait_read_only=True)

    keys, values = SDS((B, L, HV, K), bf16), SDS((B, L, HV, V), bf16)
    squares = SDS((B, HV, N, CHUNK, CHUNK), bf16)
    return mosaic.kernel(
        body,
        out_type=[keys, keys, values, keys, SDS((B, HV, N, K), f32), squares, squares],
        scratch_types=[
            mosaic.tile(CHUNK, K),
            mosaic.tile(CHUNK, K),
            mosaic.tile(CHUNK, TILE_WIDTH, max(K, V) // TILE_WIDTH),
            mosaic.tile(CHUNK, TILE_WIDTH, K // TILE_WIDTH, dtype=f16),
            mosaic.tile(CHUNK, TILE_WIDTH),
            plgpu.Barrier(num_arrivals=2),
            plgpu.Barrier(num_arrivals=V // TILE_WIDTH),
        ],
        grid=(B, N, HV),
        grid_names=("b", "n", "h"),
    )(q, k, v, g, beta, beta)


def _scores(sq, sk, sy, sg, tiles):
    """The decayed products of keys with keys (j < i) and of queries with keys (j <= i).

    Level by level of the tree of references (see `chunks.level_decay_mask`), so that no exponent
    is ever positive. Every pair belongs to one level, so the queries' scores are bf16 from the
    start; the keys' go into the inverse and stay float32.
    """
    # The diagonal knows no decay.
    own = mosaic.product(*((sq.at[:, s], sk.at[:, s].T) for s in tiles))
    query_scores = jnp.where(chunks.diagonal(), own, 0.0).astype(bf16)

    def level_step(level, scores):
        key_scores, query_scores = scores
        mask = chunks.weights(chunks.level_decay_mask(level))
        queries = []
        for i, s in enumerate(tiles):
            decay = chunks.decays(mask, sg.at[i]).astype(bf16)
            sy.at[i][...] = plgpu.load(sk.at[:, s], layout=TILE) * decay
            queries.append(plgpu.load(sq.at[:, s], layout=TILE) * decay)
        plgpu.commit_smem()
        keys = [sy.at[i] for i in range(len(tiles))]
        by_key = mosaic.product(*((x, x.T) for x in keys))
        by_query = mosaic.product(*((x, y.T) for x, y in zip(queries, keys, strict=True)))
        pairs = chunks.level_pairs(level)
        key_scores = jnp.where(pairs, by_key, key_scores)
        query_scores += jnp.where(pairs, by_query, 0.0).astype(bf16)
        return key_scores, query_scores

    return lax.fori_loop(0, LEVELS, level_step, (jnp.zeros_like(own), query_scores))
