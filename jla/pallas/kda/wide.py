"""The chunk-local part of KDA's backward pass for wide keys, in two kernels.

With K > 128 a chunk's states and keys do not fit into SMEM together, as `backward.chunk_gradients`
needs them. What sums over all of K is done first, 64 value columns at a time; what sums over all of
V then is done 128 key features at a time. What was written goes through memory.
"""

import functools

import jax
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from jla.pallas.common import chunks, mosaic
from jla.pallas.common.chunks import CHUNK, TILE_WIDTH
from jla.pallas.common.mosaic import PER_ROW, bf16, f16, f32, load, per_row
from jla.pallas.kda.backward import gradients_of_keys, gradients_of_values, meet_at

SDS = jax.ShapeDtypeStruct
FEATURES = 128  # of keys, worked on by one CTA: 64 by each of two warpgroups
WARPGROUPS = 2


def chunk_gradients(
    q, k, v, gates, beta, do, w, kg, states, gradients, inverse, a, aq, decay, *, scale
):  # fmt: skip
    """As `backward.chunk_gradients`, for K a multiple of 128; w and kg as `prepare` returned them.

    Traffic at B=4 T=4096 HV=16 K=256 V=128: S and dS 268 MB each, read twice, q, k, w, kg, g, dq,
    dk, dg 1.34 GB, all else 0.3 GB: 2.7 GB, 0.63 ms at 4.3 TB/s.
    """
    written, dv, dbeta = _errors(v, beta, do, w, kg, states, gradients, inverse, a, aq)
    dq, dk, dg = _keys(q, k, gates, do, dv, written, states, gradients, decay, scale=scale)
    return dq, dk, dv, dg, dbeta


def _errors(v, beta, do, w, kg, states, gradients, inverse, a, aq):
    """What each chunk wrote and the gradients of v and beta:

        E  = M^-1 v - w S;   y = Aq^T do + kg dS;   dv = M^-T (beta y)
        z  = y - A^T dv;     dbeta = rowsum(E z)

    Returns:
      beta E and dv, [B, T, HV, V] bf16; dbeta [B, HV, parts, L] float32, to be summed over parts.
    """
    B, L, HV, K = w.shape
    V, N = v.shape[-1], L // CHUNK
    parts = V // TILE_WIDTH

    def body(
        v_ref, beta_ref, do_ref, w_ref, kg_ref, states_ref, gradients_ref,
        inverse_ref, a_ref, aq_ref,
        written_out, dv_out, dbeta_out,
        sv, sdo, sw, skg, ss, sds, sinverse, sa, saq, written, loaded,
    ):  # fmt: skip
        b, n, h, part = (lax.axis_index(name) for name in ("b", "n", "h", "part"))
        rows, columns = pl.ds(n * CHUNK, CHUNK), pl.ds(part * TILE_WIDTH, TILE_WIDTH)
        for source, target in (
            (v_ref.at[b, rows, h, columns], sv),
            (do_ref.at[b, rows, h, columns], sdo),
            (w_ref.at[b, rows, h], sw),
            (kg_ref.at[b, rows, h], skg),
            (states_ref.at[b, h, n, columns], ss),
            (gradients_ref.at[b, h, n, columns], sds),
            (inverse_ref.at[b, h, n], sinverse),
            (a_ref.at[b, h, n], sa),
            (aq_ref.at[b, h, n], saq),
        ):
            plgpu.copy_gmem_to_smem(source, target, loaded)
        beta = per_row(load(beta_ref.at[b, h, rows], PER_ROW, optimized=False), TILE_WIDTH)
        plgpu.barrier_wait(loaded)

        error = mosaic.product((sinverse, sv)) - mosaic.product((sw, ss.T))
        y = mosaic.product((saq.T, sdo), (skg, sds.T))
        dbeta = gradients_of_values(error, y, beta, sinverse, sa, sv, written)
        dbeta_out.at[b, h, part, rows][...] = dbeta
        plgpu.commit_smem()
        plgpu.copy_smem_to_gmem(written, written_out.at[b, rows, h, columns])
        plgpu.copy_smem_to_gmem(sv, dv_out.at[b, rows, h, columns])
        plgpu.wait_smem_to_gmem(0, wait_read_only=True)

    values = SDS(v.shape, bf16)
    return mosaic.kernel(
        body,
        out_type=[values, values, SDS((B, HV, parts, L), f32)],
        scratch_types=[
            *(mosaic.tile(CHUNK, TILE_WIDTH) for _ in range(2)),
            *(mosaic.tile(CHUNK, K) for _ in range(4)),
            *(mosaic.tile(CHUNK, CHUNK) for _ in range(3)),
            mosaic.tile(CHUNK, TILE_WIDTH),
            plgpu.Barrier(num_arrivals=9),
        ],
        grid=(B, N, HV, parts),
        grid_names=("b", "n", "h", "part"),
    )(v, beta, do, w, kg, states, gradients, inverse, a, aq)


def _keys(q, k, gates, do, dv, written, states, gradients, decay, *, scale):
    """The gradients of q, k and g, as in `backward.chunk_gradients`."""
    B, T, H, K = q.shape
    HV, V = dv.shape[2:]
    N, group = -(-T // CHUNK), HV // H

    def body(
        q_ref, k_ref, gates_ref, do_ref, dv_ref, written_ref, states_ref, gradients_ref, decay_ref,
        dq_out, dk_out, dg_out,
        sq, sk, sdo, sdv, swritten, ss, sds, saq, sx, sg, sy, sz, loaded, shared,
    ):  # fmt: skip
        b, n, h, part = (lax.axis_index(name) for name in ("b", "n", "h", "part"))
        wg = lax.axis_index("wg")
        rows, features = pl.ds(n * CHUNK, CHUNK), pl.ds(part * FEATURES, FEATURES)
        meet = functools.partial(meet_at, shared, WARPGROUPS)

        @pl.when(wg == 0)
        def _():
            for source, target in (
                (q_ref.at[b, rows, h // group, features], sq),
                (k_ref.at[b, rows, h // group, features], sk),
                (do_ref.at[b, rows, h], sdo),
                (dv_ref.at[b, rows, h], sdv),
                (written_ref.at[b, rows, h], swritten),
                (states_ref.at[b, h, n, :, features], ss),
                (gradients_ref.at[b, h, n, :, features], sds),
            ):
                plgpu.copy_gmem_to_smem(source, target, loaded)
            for i in range(WARPGROUPS):
                s = pl.ds(part * FEATURES + i * TILE_WIDTH, TILE_WIDTH)
                plgpu.copy_gmem_to_smem(gates_ref.at[b, rows, h, s], sg.at[i], loaded)

        plgpu.barrier_wait(loaded)
        gradients_of_keys(
            sq, sk, sdo, sdv, swritten, ss, sds, saq, sx, sy, sz,
            [(pl.ds(wg * TILE_WIDTH, TILE_WIDTH), sg.at[wg])],
            chunks.weights(chunks.up_to()), chunks.weights(chunks.from_on(strict=True)),
            decay_ref.at[b, h, n, features], dg_out.at[b, rows, h, features], wg, meet,
            scale=scale, warpgroups=WARPGROUPS,
        )  # fmt: skip
        meet()

        @pl.when(wg == 0)
        def _():
            plgpu.copy_smem_to_gmem(sq, dq_out.at[b, rows, h, features])
            plgpu.copy_smem_to_gmem(sk, dk_out.at[b, rows, h, features])

        plgpu.wait_smem_to_gmem(0, wait_read_only=True)

    keys = SDS((B, T, HV, K), bf16)
    return mosaic.kernel(
        body,
        out_type=[keys, keys, SDS((B, N * CHUNK, HV, K), f32)],
        scratch_types=[
            *(mosaic.tile(CHUNK, FEATURES) for _ in range(2)),
            *(mosaic.tile(CHUNK, V) for _ in range(3)),
            *(mosaic.tile(V, FEATURES) for _ in range(2)),
            *(mosaic.tile(CHUNK, CHUNK) for _ in range(2)),
            mosaic.tile(CHUNK, TILE_WIDTH, WARPGROUPS, dtype=f16),
            *(mosaic.tile(CHUNK, FEATURES) for _ in range(2)),
            plgpu.Barrier(num_arrivals=7 + WARPGROUPS),
            plgpu.Barrier(num_arrivals=WARPGROUPS),
        ],
        grid=(B, N, HV, K // FEATURES),
        grid_names=("b", "n", "h", "part"),
        num_threads=WARPGROUPS,
        thread_name="wg",
    )(q, k, gates, do, dv, written, states, gradients, decay)
