"""Everything of a chunk of Gated Slot Attention whose states are known: the kernel of the outputs.

Parallel over batch, chunks and query heads.
"""

import functools

import jax
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from jla.pallas.common import mosaic, scratch
from jla.pallas.common.chunks import CHUNK, TILE_WIDTH
from jla.pallas.common.mosaic import WGMMA_LAYOUT, bf16
from jla.pallas.common.scratch import barrier_for, fetch_each
from jla.pallas.common.tiles import columns, smem_tiles
from jla.pallas.gsa import slots

SDS = jax.ShapeDtypeStruct


def outputs(q, k, v, s, decay_operand, key_states, value_states, *, scale, used, keep):
    """The outputs of all chunks: with H the states before the chunk, i its tokens,

    1.  logits_i = scale (exp(G_i) (q_i Hk) + sum_j (q_i . k_j) s_j exp(G_i - G_j)),   j <= i
    2.  p_i = softmax(logits_i);   A[i, j] = sum_m p_i s_j exp(G_i - G_j)
    3.  o_i = (p_i exp(G_i)) Hv + sum_j A[i, j] v_j

    Args:
      q: [B, T, HQ, K] bf16, K a multiple of 64, beyond 128 of 128; T a multiple of 8.
      k, v: [B, T, H, K], [B, T, H, V] bf16.
      s: [B, T, H, M] bf16, M 64 or 128. decay_operand: [B, T, H, M] float16, from
        `chunks.decay_operand`.
      key_states, value_states: as `states.through_chunks` returned them.
      used: the number of slots; those beyond are padding.
      keep: whether to return p, for the backward pass.

    Returns:
      o [B, T, HQ, V] and, with `keep`, p [B, T, HQ, M], bf16.

    One warpgroup a chunk; 112 KB of SMEM at K=V=128 M=64: two chunks share a multiprocessor. Floor
    at B=8 T=4096 HQ=H=16 K=V=128 M=64: 1.0 GB, 0.23 ms at 4.3 TB/s; 4900 instructions a warp
    and chunk.
    """
    B, T, HQ, K = q.shape
    (H, V), M = v.shape[2:], s.shape[-1]
    m_tiles = M // TILE_WIDTH
    (_, k_tiles), (_, v_tiles) = slots.parts(K), slots.parts(V)
    wide = max(k_tiles, v_tiles)
    out = scratch.kernel(
        functools.partial(_body, group=HQ // H, scale=scale, used=used),
        inputs=dict(
            **dict(q=q, k=k, v=v, s=s, decay_operand=decay_operand),
            **dict(key_states=key_states, value_states=value_states),
        ),
        outputs=dict(
            o=SDS((B, T, HQ, V), bf16),
            p=SDS((B, T, HQ, M), bf16) if keep else None,
        ),
        scratch=dict(
            sq=smem_tiles(max(k_tiles, 2 * m_tiles)),  # q, then exp(G), and p or a level
            sk=smem_tiles(wide),  # k, then v, then o
            sx=[smem_tiles(m_tiles) for _ in range(wide)],  # Hk, then Hv
            **slots.near_scratch(m_tiles),
            keys_loaded=barrier_for(dict(q=k_tiles, k=k_tiles, states=k_tiles * m_tiles)),
            values_loaded=barrier_for(dict(v=v_tiles, states=v_tiles * m_tiles)),
        ),
        automatic_barriers=False,
        reductions_cross_warps=False,
        grid=(B, -(-T // CHUNK), HQ),
        grid_names=("b", "n", "h"),
    )
    return tuple(x for x in out if x is not None)


# The kernel awaits by hand (`commit_smem` is a barrier of the warpgroup, too) whatever it
# overwrites in SMEM.
def _body(refs, *, group, scale, used):
    b, n, head = (lax.axis_index(name) for name in ("b", "n", "h"))
    rows, h = pl.ds(n * CHUNK, CHUNK), lax.div(head, group)
    (k_parts, k_tiles), (v_parts, v_tiles) = (slots.parts(x.shape[3]) for x in (refs.q, refs.v))
    m_tiles = len(refs.sg)
    sq, sk, sx = refs.sq, refs.sk, refs.sx

    def states(ref, feature, i):
        for m in range(m_tiles):
            yield ref.at[b, h, n, columns(feature), columns(m)], sx[i][m]

    def keys(part):
        for i in range(k_tiles):
            at = columns(part * k_tiles + i)
            yield refs.q.at[b, rows, head, at], sq[i]
            yield refs.k.at[b, rows, h, at], sk[i]
            yield from states(refs.key_states, part * k_tiles + i, i)

    def values(part):
        for i in range(v_tiles):
            at = columns(part * v_tiles + i)
            yield refs.v.at[b, rows, h, at], sk[i]
            yield from states(refs.value_states, part * v_tiles + i, i)

    def fetch_keys(part):
        fetch_each(keys(part), refs.keys_loaded)

    slots.fetch_near(refs, (b, rows, h))
    fetch_keys(0)
    decays = slots.put_writes(refs)

    # 1. The logits.
    scores, reads = slots.products(
        fetch_keys, refs.keys_loaded, k_parts, sq[:k_tiles], sk[:k_tiles], sx[:k_tiles]
    )
    plgpu.commit_smem()
    fetch_each(values(0), refs.values_loaded)
    for m in range(m_tiles):
        sq[m][...] = decays.before[m].astype(bf16)
    logits = slots.read(scores, reads, decays, refs, sq[-1])

    # 2. p and A.
    p = [x.astype(bf16) for x in slots.softmax(logits, scale, used)]
    if refs.p is not None:
        _put(sq[m_tiles : 2 * m_tiles], p, refs.p, (b, rows, head), range(m_tiles))
    decayed = [x * plgpu.load(sq[m], layout=WGMMA_LAYOUT) for m, x in enumerate(p)]
    a = slots.scores(p, decayed, decays, refs, sq[-1])

    # 3. o.
    for part in range(v_parts):
        if part:
            plgpu.wait_smem_to_gmem(0, wait_read_only=True)
            plgpu.commit_smem()
            fetch_each(values(part), refs.values_loaded)
        plgpu.barrier_wait(refs.values_loaded)
        results = []
        for i in range(v_tiles):
            carried = ((x, sx[i][m].T) for m, x in enumerate(decayed))
            results.append(mosaic.product(*carried, (a, sk[i])).astype(bf16))
        plgpu.commit_smem()
        features = range(part * v_tiles, (part + 1) * v_tiles)
        _put(sk[:v_tiles], results, refs.o, (b, rows, head), features)
    plgpu.wait_smem_to_gmem(0, wait_read_only=True)


def _put(buffers, values, out, place, numbers):
    """Sends tiles to memory, to the columns of these numbers, through SMEM that is free."""
    for buffer, value in zip(buffers, values, strict=True):
        buffer[...] = value
    plgpu.commit_smem()
    for buffer, number in zip(buffers, numbers, strict=True):
        plgpu.copy_smem_to_gmem(buffer, out.at[*place, columns(number)])
