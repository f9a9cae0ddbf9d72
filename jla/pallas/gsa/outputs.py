"""Everything of a chunk of Gated Slot Attention whose states are known: the kernel of the outputs.

Parallel over batch, chunks and query heads.
"""

import jax
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from jla.pallas.common import chunks, mosaic
from jla.pallas.common.chunks import CHUNK, LEVELS, TILE_WIDTH
from jla.pallas.common.mosaic import WGMMA_LAYOUT, bf16, f16
from jla.pallas.common.tiles import columns, smem_tiles
from jla.pallas.gsa import slots

SDS = jax.ShapeDtypeStruct


def outputs(q, k, v, s, gates, key_states, value_states, *, scale, used, keep):
    """The outputs of all chunks: with H the states before the chunk, i its tokens,

        logits_i = scale (exp(G_i) (q_i Hk) + sum_j (q_i . k_j) s_j exp(G_i - G_j)),   j <= i
        p_i = softmax(logits_i);   A[i, j] = sum_m p_i s_j exp(G_i - G_j)
        o_i = (p_i exp(G_i)) Hv + sum_j A[i, j] v_j

    Args:
      q: [B, T, HQ, K] bf16, K a multiple of 64, beyond 128 of 128; T a multiple of 8.
      k, v: [B, T, H, K], [B, T, H, V] bf16.
      s: [B, T, H, M] bf16, M 64 or 128. gates: [B, T, H, M] float16, from `chunks.decay_operand`.
      key_states, value_states: as `states.through_chunks` returned them.
      used: the number of slots; those beyond are padding.
      keep: whether to return p, for the backward pass.

    Returns:
      o [B, T, HQ, V] and, with `keep`, p [B, T, HQ, M], bf16.

    One warpgroup a chunk; 112 KB of SMEM at K=V=128 M=64 (q, k then v, Hk then Hv 16 KB each, s and
    gates 8 KB each, the levels' tiles 48 KB), so that two chunks share a multiprocessor.
    Traffic at B=8 T=4096 HQ=H=16 K=V=128 M=64: q, k, v, o, both states 134 MB each, s, gates and
    p 67 MB each: 1.0 GB, 0.23 ms at 4.3 TB/s. Operations: about 4900 instructions a warp and chunk
    (a third for the levels' tiles, a third for the logits), at 1.6 a clock of eight warps 0.43 ms:
    that is the prediction.
    """
    B, T, HQ, K = q.shape
    (H, V), M = v.shape[2:], s.shape[-1]
    N, group = -(-T // CHUNK), HQ // H
    m_tiles = M // TILE_WIDTH
    (k_parts, k_tiles), (v_parts, v_tiles) = slots.parts(K), slots.parts(V)

    # The kernel awaits by hand (`commit_smem` is a barrier of the warpgroup, too) whatever it
    # overwrites in SMEM.
    def body(q_ref, k_ref, v_ref, s_ref, gates_ref, xk_ref, xv_ref, o_out, *refs):
        p_out, (sq, sk, sx, levels, ss, sg, near, keys_loaded, values_loaded) = refs[:-9], refs[-9:]
        b, n, head = (lax.axis_index(name) for name in ("b", "n", "h"))
        rows, h = pl.ds(n * CHUNK, CHUNK), lax.div(head, group)

        def fetch_states(ref, feature, i, barrier):
            for m in range(m_tiles):
                source = ref.at[b, h, n, columns(feature), columns(m)]
                plgpu.copy_gmem_to_smem(source, sx[i][m], barrier)

        def fetch_keys(part):
            for i in range(k_tiles):
                at = columns(part * k_tiles + i)
                plgpu.copy_gmem_to_smem(q_ref.at[b, rows, head, at], sq[i], keys_loaded)
                plgpu.copy_gmem_to_smem(k_ref.at[b, rows, h, at], sk[i], keys_loaded)
                fetch_states(xk_ref, part * k_tiles + i, i, keys_loaded)

        def fetch_values(part):
            for i in range(v_tiles):
                at = columns(part * v_tiles + i)
                plgpu.copy_gmem_to_smem(v_ref.at[b, rows, h, at], sk[i], values_loaded)
                fetch_states(xv_ref, part * v_tiles + i, i, values_loaded)

        for m in range(m_tiles):
            plgpu.copy_gmem_to_smem(gates_ref.at[b, rows, h, columns(m)], sg[m], near)
            plgpu.copy_gmem_to_smem(s_ref.at[b, rows, h, columns(m)], ss[m], near)
        fetch_keys(0)
        plgpu.barrier_wait(near)
        slots.put_level_tiles(levels, ss, sg)

        scores, reads = slots.products(
            fetch_keys, keys_loaded, k_parts, sq[:k_tiles], sk[:k_tiles], sx[:k_tiles]
        )
        plgpu.commit_smem()
        fetch_values(0)
        earlier = chunks.mask_operand(chunks.up_to())
        for m in range(m_tiles):
            before = chunks.decays(earlier, sg[m])
            reads[m] *= before
            sq[m][...] = before.astype(bf16)
        logits = slots.read(scores, reads, levels, ss)
        p = [x.astype(bf16) for x in slots.softmax([x * scale for x in logits], used)]
        if keep:
            for m in range(m_tiles):
                sq[m_tiles + m][...] = p[m]
            plgpu.commit_smem()
            for m in range(m_tiles):
                target = p_out[0].at[b, rows, head, columns(m)]
                plgpu.copy_smem_to_gmem(sq[m_tiles + m], target)

        weights = slots.scores(p, levels, ss).astype(bf16)
        decayed = [x * plgpu.load(sq[m], layout=WGMMA_LAYOUT) for m, x in enumerate(p)]
        for part in range(v_parts):
            if part:
                plgpu.wait_smem_to_gmem(0, wait_read_only=True)
                plgpu.commit_smem()
                fetch_values(part)
            plgpu.barrier_wait(values_loaded)
            results = []
            for i in range(v_tiles):
                carried = ((x, sx[i][m].T) for m, x in enumerate(decayed))
                results.append(mosaic.product(*carried, (weights, sk[i])).astype(bf16))
            plgpu.commit_smem()
            for i, result in enumerate(results):
                sk[i][...] = result
            plgpu.commit_smem()
            for i in range(v_tiles):
                at = columns(part * v_tiles + i)
                plgpu.copy_smem_to_gmem(sk[i], o_out.at[b, rows, head, at])
        plgpu.wait_smem_to_gmem(0, wait_read_only=True)

    out_type = [SDS((B, T, HQ, V), bf16)]
    if keep:
        out_type.append(SDS((B, T, HQ, M), bf16))
    wide = max(k_tiles, v_tiles)
    return mosaic.kernel(
        body,
        automatic_barriers=False,
        out_type=out_type,
        scratch_types=[
            smem_tiles(max(k_tiles, 2 * m_tiles if keep else m_tiles)),
            smem_tiles(wide),
            [smem_tiles(m_tiles) for _ in range(wide)],
            smem_tiles(m_tiles, LEVELS),
            smem_tiles(m_tiles),
            smem_tiles(m_tiles, dtype=f16),
            plgpu.Barrier(num_arrivals=2 * m_tiles),
            plgpu.Barrier(num_arrivals=k_tiles * (2 + m_tiles)),
            plgpu.Barrier(num_arrivals=v_tiles * (1 + m_tiles)),
        ],
        grid=(B, N, HQ),
        grid_names=("b", "n", "h"),
    )(q, k, v, s, gates, key_states, value_states)
