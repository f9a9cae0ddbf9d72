"""KDA's chunk-local preparation: everything of a chunk that needs no state."""

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from jla.pallas import chunks, mosaic
from jla.pallas.chunks import CHUNK, LEVELS, LOG2E, TILE_WIDTH
from jla.pallas.mosaic import PER_COLUMN, PER_ROW, bf16, f32, load, per_column, per_row

SDS = jax.ShapeDtypeStruct


def prepare(q, k, v, g, beta, segments, *, scale):
    """Chunk-local part of KDA's forward pass.

    With G the cumulated log decays of the chunk, and pairs of different segments masked:

        A0[i, j] = sum_k k_i k_j exp(G_i - G_j)   (j < i)
        X  = (I + A0 diag(beta))^-1 A0
        u  = v - X (beta v)                        the errors that a zero state would leave
        w  = k~ - X (beta k~),  k~ = k exp(G)      how the carried state changes them
        q~ = scale q exp(G);  kg = k exp(G_end - G);  decay = exp(G_end)
        Aq[i, j] = scale sum_k q_i k_j exp(G_i - G_j)   (j <= i)

    Args:
      q, k: [B, T, H, K] bf16, K a multiple of 64, T a multiple of 64.
      v: [B, T, HV, V] bf16. g: [B, T, HV, K] float32. beta: [B, HV, T] float32.
      segments: (index, reads, writes), each [B, T] float32: the token's segment in its row, whether
        it sees the state carried into its chunk, whether the state carried out sees it.

    Returns:
      q~, w [B, T, HV, K], u [B, T, HV, V], kg [B, T, HV, K] bf16, decay [B, HV, N, K] float32,
      Aq and X [B, HV, N, 64, 64] bf16.
    """
    B, T, H, K = q.shape
    HV, V = v.shape[2:]
    N, group = T // CHUNK, HV // H
    tiles = [pl.ds(i * TILE_WIDTH, TILE_WIDTH) for i in range(K // TILE_WIDTH)]

    def body(
        q_ref, k_ref, v_ref, g_ref, beta_row, beta_column, index_row, index_column, reads, writes,
        q_out, w_out, u_out, kg_out, decay_out, aq_out, x_out,
        sq, sk, sv, sg, sy, square, loaded,
    ):  # fmt: skip
        b, n, h = lax.axis_index("b"), lax.axis_index("n"), lax.axis_index("h")
        rows = pl.ds(n * CHUNK, CHUNK)
        hk = h // group
        plgpu.copy_gmem_to_smem(q_ref.at[b, rows, hk], sq, loaded)
        plgpu.copy_gmem_to_smem(k_ref.at[b, rows, hk], sk, loaded)
        plgpu.copy_gmem_to_smem(v_ref.at[b, rows, h], sv, loaded)
        gates = []
        for i, s in enumerate(tiles):
            log2_decay = load(g_ref.at[b, rows, h, s], optimized=False) * LOG2E
            decay_out.at[b, h, n, s][...] = jnp.exp2(log2_decay.sum(axis=0))
            gates.append((sg.at[2 * i], sg.at[2 * i + 1]))
            for ref, part in zip(gates[i], mosaic.split(log2_decay), strict=True):
                ref[...] = part
        plgpu.commit_smem()
        plgpu.barrier_wait(loaded)

        a0, aq = _scores(sq, sk, sy, gates, tiles)
        same = chunks.same_segment(index_row.at[b, rows], index_column.at[b, rows])
        a0 = jnp.where(same, a0, 0.0)
        aq = jnp.where(same, aq * scale, 0.0)
        square[...] = aq.astype(bf16)

        read = load(reads.at[b, rows], PER_ROW, optimized=False)
        write = load(writes.at[b, rows], PER_ROW, optimized=False)
        earlier = chunks.weights(chunks.up_to())
        later = chunks.weights(chunks.from_on(strict=True))
        for s, pair in zip(tiles, gates, strict=True):
            after = chunks.decays(later, pair)
            sy.at[:, s][...] = (load(sk.at[:, s]) * after * per_row(write, TILE_WIDTH)).astype(bf16)
            before = chunks.decays(earlier, pair) * per_row(read, TILE_WIDTH)
            sq.at[:, s][...] = (load(sq.at[:, s]) * before * scale).astype(bf16)
            sk.at[:, s][...] = (load(sk.at[:, s]) * before).astype(bf16)
        plgpu.commit_smem()
        plgpu.copy_smem_to_gmem(square, aq_out.at[b, h, n])
        plgpu.copy_smem_to_gmem(sq, q_out.at[b, rows, h])
        plgpu.copy_smem_to_gmem(sy, kg_out.at[b, rows, h])

        # The gates are done with: their tiles serve the inverse.
        free = [sg.at[i] for i in range(4)]
        column_beta = per_column(
            load(beta_column.at[b, h, rows], PER_COLUMN, optimized=False), CHUNK
        )
        inverse = chunks.unit_triangular_inverse(a0 * column_beta, free)
        x = chunks.product16(inverse, a0, free[:2]).astype(bf16)
        plgpu.wait_smem_to_gmem(0, wait_read_only=True)
        square[...] = x
        plgpu.commit_smem()
        plgpu.copy_smem_to_gmem(square, x_out.at[b, h, n])

        row_beta = per_row(load(beta_row.at[b, h, rows], PER_ROW, optimized=False), TILE_WIDTH)
        scaled = free[2]

        def solved(ref, s):
            y = load(ref.at[:, s])
            scaled[...] = (y * row_beta).astype(bf16)
            plgpu.commit_smem()
            ref.at[:, s][...] = (y - mosaic.product((x, scaled))).astype(bf16)

        for s in tiles:
            solved(sk, s)
        for i in range(V // TILE_WIDTH):
            solved(sv, pl.ds(i * TILE_WIDTH, TILE_WIDTH))
        plgpu.commit_smem()
        plgpu.copy_smem_to_gmem(sk, w_out.at[b, rows, h])
        plgpu.copy_smem_to_gmem(sv, u_out.at[b, rows, h])
        plgpu.wait_smem_to_gmem(0)

    keys, values = SDS((B, T, HV, K), bf16), SDS((B, T, HV, V), bf16)
    squares = SDS((B, HV, N, CHUNK, CHUNK), bf16)
    index, reads, writes = segments
    return mosaic.kernel(
        body,
        out_type=[keys, keys, values, keys, SDS((B, HV, N, K), f32), squares, squares],
        scratch_types=[
            mosaic.tile(CHUNK, K),
            mosaic.tile(CHUNK, K),
            mosaic.tile(CHUNK, V),
            mosaic.tile(CHUNK, TILE_WIDTH, max(4, 2 * len(tiles))),
            mosaic.tile(CHUNK, K),
            mosaic.tile(CHUNK, CHUNK),
            plgpu.Barrier(num_arrivals=3),
        ],
        grid=(B, N, HV),
        grid_names=("b", "n", "h"),
    )(q, k, v, g, beta, beta, index, index, reads, writes)


def _scores(sq, sk, sy, gates, tiles):
    """The decayed products of keys with keys (j < i) and of queries with keys (j <= i), float32.

    Level by level of the tree of references (see `chunks.level_decay_mask`), so that no exponent
    is ever positive.
    """
    # The diagonal knows no decay.
    pairs = [(sq.at[:, s], sk.at[:, s].T) for s in tiles]
    query_scores = jnp.where(chunks.diagonal(), mosaic.product(*pairs), 0.0)

    def level_step(level, scores):
        key_scores, query_scores = scores
        mask = chunks.weights(chunks.level_decay_mask(level))
        queries, keys = [], []
        for s, pair in zip(tiles, gates, strict=True):
            decay = chunks.decays(mask, pair)
            x = (load(sq.at[:, s]) * decay).astype(bf16)
            y = (load(sk.at[:, s]) * decay).astype(bf16)
            sy.at[:, s][...] = y
            queries.append((x, sy.at[:, s].T))
            keys.append((y, sy.at[:, s].T))
        plgpu.commit_smem()
        pairs = chunks.level_pairs(level)
        query_scores = jnp.where(pairs, mosaic.product(*queries), query_scores)
        key_scores = jnp.where(pairs, mosaic.product(*keys), key_scores)
        return key_scores, query_scores

    return lax.fori_loop(0, LEVELS, level_step, (jnp.zeros_like(query_scores), query_scores))
