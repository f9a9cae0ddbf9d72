"""The chunk-local parts of Gated Slot Attention's backward pass, in two kernels.

Both passes are of the form that `slots` describes, with x and y = q and k, w = dlogits, and
x and y = do and v, w = p. `logit_gradients` reads do and v to make dlogits; then the states'
gradients can go from chunk to chunk; then `chunk_gradients`, once for each pass, makes the rest.
"""

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from jla.pallas.common import chunks, mosaic
from jla.pallas.common.chunks import CHUNK, LEVELS, TILE_WIDTH
from jla.pallas.common.mosaic import WGMMA_LAYOUT, bf16, f16, f32, load, per_row, product
from jla.pallas.common.tiles import columns, row_sum, smem_tiles
from jla.pallas.gsa import slots

SDS = jax.ShapeDtypeStruct


def logit_gradients(v, s, gates, value_states, p, do, *, scale):
    """The gradient of the logits' products, q . Hk, of all chunks:

        dp_i = exp(G_i) (do_i Hv^T) + sum_j (do_i . v_j) s_j exp(G_i - G_j),   j <= i
        dlogits_i = scale p_i (dp_i - p_i . dp_i)

    Args:
      v, s, gates, value_states: as `outputs.outputs` takes them; p as it returned it.
      do: [B, T, HQ, V] bf16.

    Returns:
      [B, T, HQ, M] bf16.

    SMEM as `outputs`: do, v, Hv 16 KB each, p over do. Traffic at B=8 T=4096 HQ=H=16 V=128 M=64:
    do, v, Hv 134 MB each, s, gates, p, dlogits 67 MB each: 0.67 GB, 0.16 ms at 4.3 TB/s.
    Operations: 3800 instructions a warp and chunk, 0.33 ms: that is the prediction.
    """
    B, T, HQ, V = do.shape
    H, M = s.shape[2:]
    N, group = -(-T // CHUNK), HQ // H
    m_tiles = M // TILE_WIDTH
    parts, v_tiles = slots.parts(V)

    def body(
        v_ref, s_ref, gates_ref, states_ref, p_ref, do_ref, out,
        sdo, sv, sx, levels, ss, sg, near, loaded, p_loaded,
    ):  # fmt: skip
        b, n, head = (lax.axis_index(name) for name in ("b", "n", "h"))
        rows, h = pl.ds(n * CHUNK, CHUNK), lax.div(head, group)

        def fetch(part):
            for i in range(v_tiles):
                at = columns(part * v_tiles + i)
                plgpu.copy_gmem_to_smem(do_ref.at[b, rows, head, at], sdo[i], loaded)
                plgpu.copy_gmem_to_smem(v_ref.at[b, rows, h, at], sv[i], loaded)
                for m in range(m_tiles):
                    source = states_ref.at[b, h, n, at, columns(m)]
                    plgpu.copy_gmem_to_smem(source, sx[i][m], loaded)

        for m in range(m_tiles):
            plgpu.copy_gmem_to_smem(gates_ref.at[b, rows, h, columns(m)], sg[m], near)
            plgpu.copy_gmem_to_smem(s_ref.at[b, rows, h, columns(m)], ss[m], near)
        fetch(0)
        plgpu.barrier_wait(near)
        slots.put_level_tiles(levels, ss, sg)
        scores, reads = slots.products(fetch, loaded, parts, sdo[:v_tiles], sv, sx)
        plgpu.commit_smem()
        for m in range(m_tiles):
            plgpu.copy_gmem_to_smem(p_ref.at[b, rows, head, columns(m)], sdo[m], p_loaded)
        earlier = chunks.mask_operand(chunks.up_to())
        for m in range(m_tiles):
            reads[m] *= chunks.decays(earlier, sg[m])
        dp = slots.read(scores, reads, levels, ss)
        plgpu.barrier_wait(p_loaded)
        p = [load(sdo[m]) for m in range(m_tiles)]
        weighted = [x * y for x, y in zip(p, dp, strict=True)]
        # The rounded p do not sum to 1; without the division dlogits would not sum to 0, which
        # tells where one slot has nearly all.
        mean = per_row(row_sum(weighted) / row_sum(p), TILE_WIDTH)
        for m in range(m_tiles):
            sdo[m][...] = (scale * (weighted[m] - p[m] * mean)).astype(bf16)
        plgpu.commit_smem()
        for m in range(m_tiles):
            plgpu.copy_smem_to_gmem(sdo[m], out.at[b, rows, head, columns(m)])
        plgpu.wait_smem_to_gmem(0, wait_read_only=True)

    return mosaic.kernel(
        body,
        automatic_barriers=False,
        out_type=SDS((B, T, HQ, M), bf16),
        scratch_types=[
            smem_tiles(max(v_tiles, m_tiles)),
            smem_tiles(v_tiles),
            [smem_tiles(m_tiles) for _ in range(v_tiles)],
            smem_tiles(m_tiles, LEVELS),
            smem_tiles(m_tiles),
            smem_tiles(m_tiles, dtype=f16),
            plgpu.Barrier(num_arrivals=2 * m_tiles),
            plgpu.Barrier(num_arrivals=v_tiles * (2 + m_tiles)),
            plgpu.Barrier(num_arrivals=m_tiles),
        ],
        grid=(B, N, HQ),
        grid_names=("b", "n", "h"),
    )(v, s, gates, value_states, p, do)


def chunk_gradients(x, y, w, s, gates, states, gradients, *, rows_too):
    """The gradients of one pass, of the form sum_ij (x_i . y_j) A[i, j] with A from w and s, given
    the state X before each chunk and dX, the gradient of the one after it:

        dx = A y + (w exp(G)) X^T;   dy = A^T x + (s exp(G_end - G)) dX^T
        dw = exp(G) (x X)       + sum_j (x_i . y_j) s_j exp(G_i - G_j)      for dg alone
        ds = exp(G_end - G) (y dX) + sum_i (x_i . y_j) w_i exp(G_i - G_j)

    and with dw and ds without their terms j = i, dG = w dw - s ds, whose reversed cumsum over the
    chunk, with the border's terms, is dg: for all tokens what the chunk carries out,
    exp(G_end) X dX, and for each what its predecessors write into the state after the chunk.

    All of it is linear in the features, so that each 128 of them are worked on alone; ds and dg are
    sums over their parts, and over the query heads of a group (what dX gives counts for the first).

    Args:
      x: [B, T, HQ, D] bf16. y: [B, T, H, D] bf16. w: [B, T, HQ, M] bf16.
      s, gates: as `outputs.outputs` takes them.
      states, gradients: X and dX, [B, H, N, D, M] bf16.
      rows_too: whether dx is wanted.

    Returns:
      dx (if wanted) and dy [B, T, HQ, D] bf16, ds [B, T, HQ * parts, M] bf16 and dg
      [B, L, HQ * parts, M] float32, L whole chunks.

    One warpgroup for 128 features of a chunk; at M=64 112 KB of SMEM (x, y, X, dX 16 KB each, w, s,
    gates, the symmetric products and two work tiles 8 KB each). Traffic at B=8 T=4096 HQ=H=16 D=128
    M=64: x, y, X, dX, dx, dy 134 MB each, w, s, gates, ds 67 MB each, dg 134 MB: 1.2 GB, 0.28 ms at
    4.3 TB/s. Operations: 6700 instructions a warp and chunk (6400 without dx), at 1.6 a clock of
    eight warps 0.6 ms: that is the prediction.
    """
    B, T, HQ, D = x.shape
    H, M = s.shape[2:]
    N, group = -(-T // CHUNK), HQ // H
    m_tiles = M // TILE_WIDTH
    parts, d_tiles = slots.parts(D)

    def body(x_ref, y_ref, w_ref, s_ref, gates_ref, states_ref, gradients_ref, *refs):
        outs, (sx, sy, sw, ss, sg, states, gradients, pairs, work, loaded) = refs[:-10], refs[-10:]
        *dx_out, dy_out, ds_out, dg_out = outs
        b, n, head, part = (lax.axis_index(name) for name in ("b", "n", "h", "part"))
        rows, h = pl.ds(n * CHUNK, CHUNK), lax.div(head, group)
        out_head = head * parts + part

        for i in range(d_tiles):
            at = columns(part * d_tiles + i)
            plgpu.copy_gmem_to_smem(x_ref.at[b, rows, head, at], sx[i], loaded)
            plgpu.copy_gmem_to_smem(y_ref.at[b, rows, h, at], sy[i], loaded)
            for m in range(m_tiles):
                for source, target in ((states_ref, states), (gradients_ref, gradients)):
                    tile = source.at[b, h, n, at, columns(m)]
                    plgpu.copy_gmem_to_smem(tile, target[i][m], loaded)
        for m in range(m_tiles):
            plgpu.copy_gmem_to_smem(w_ref.at[b, rows, head, columns(m)], sw[m], loaded)
            plgpu.copy_gmem_to_smem(s_ref.at[b, rows, h, columns(m)], ss[m], loaded)
            plgpu.copy_gmem_to_smem(gates_ref.at[b, rows, h, columns(m)], sg[m], loaded)
        plgpu.barrier_wait(loaded)

        # For j < i the products x_i . y_j, for j > i x_j . y_i.
        both = product(*((a, b.T) for a, b in zip(sy, sx, strict=True)))
        one = product(*((a, b.T) for a, b in zip(sx, sy, strict=True)))
        own = jnp.where(chunks.diagonal(), one, 0.0).sum(axis=1)
        pairs[...] = jnp.where(chunks.up_to(strict=True), one, both).astype(bf16)

        a = None
        for m in range(m_tiles):
            before = chunks.decays(chunks.mask_operand(chunks.up_to()), sg[m])
            dw = before * product(*((tile, x[m]) for tile, x in zip(sx, states, strict=True)))
            a_m, dw, ds = _through_levels(sw[m], ss[m], sg[m], pairs, work[0], dw)
            a = a_m if a is None else a + a_m
            if m + 1 == m_tiles:
                pairs[...] = a.astype(bf16)

            # In this order few tiles live at a time. The cumsum cancels, and so needs 16 bits.
            signed = load(sw[m]) * dw - load(ss[m]) * ds
            plgpu.commit_smem()
            work[0][...], work[1][...] = mosaic.split(signed)
            plgpu.commit_smem()
            onwards = chunks.mask_operand(chunks.from_on(), bf16)
            dg = product((onwards, work[0]), (onwards, work[1]))

            after = chunks.decays(chunks.mask_operand(chunks.from_on(strict=True)), sg[m])
            if group > 1:
                after = mosaic.where(lax.rem(head, group) == 0, after)
            end = after * product(*((tile, x[m]) for tile, x in zip(sy, gradients, strict=True)))
            ds = (ds + end + load(sw[m]) * per_row(own, TILE_WIDTH)).astype(bf16)
            plgpu.commit_smem()
            writes = load(ss[m])
            work[0][...] = (end * writes).astype(bf16)
            ss[m][...] = (writes * after).astype(bf16)  # for dy
            everywhere = chunks.everywhere()
            carried = _carried(states, gradients, m)
            carried *= jnp.exp2(product((chunks.mask_operand(everywhere), sg[m])))
            if group > 1:
                carried = mosaic.where(lax.rem(head, group) == 0, carried)
            work[1][...] = carried.astype(bf16)
            plgpu.commit_smem()
            earlier = chunks.mask_operand(chunks.up_to(strict=True), bf16)
            border = (earlier, work[0]), (chunks.mask_operand(everywhere, bf16), work[1])
            dg_out.at[b, rows, out_head, columns(m)][...] = product(*border, init=dg)

            if rows_too:
                before = chunks.decays(chunks.mask_operand(chunks.up_to()), sg[m])
                sw[m][...] = (load(sw[m]) * before).astype(bf16)  # for dx
            plgpu.commit_smem()
            work[0][...] = ds
            plgpu.commit_smem()
            plgpu.copy_smem_to_gmem(work[0], ds_out.at[b, rows, out_head, columns(m)])
            if m + 1 < m_tiles:
                plgpu.wait_smem_to_gmem(0, wait_read_only=True)

        dx, dy = [], []
        for i in range(d_tiles):
            end = ((ss[m], gradients[i][m].T) for m in range(m_tiles))
            dy.append(product((pairs.T, sx[i]), *end).astype(bf16))
            if rows_too:
                start = ((sw[m], states[i][m].T) for m in range(m_tiles))
                dx.append(product((pairs, sy[i]), *start).astype(bf16))
        plgpu.commit_smem()
        for tiles, results, out in ((sx, dx, dx_out), (sy, dy, [dy_out])):
            for i, result in enumerate(results):
                tiles[i][...] = result
            plgpu.commit_smem()
            for i in range(len(results)):
                at = columns(part * d_tiles + i)
                plgpu.copy_smem_to_gmem(tiles[i], out[0].at[b, rows, head, at])
        plgpu.wait_smem_to_gmem(0, wait_read_only=True)

    features = SDS((B, T, HQ, D), bf16)
    return mosaic.kernel(
        body,
        automatic_barriers=False,
        out_type=[
            *[features] * (2 if rows_too else 1),
            SDS((B, T, HQ * parts, M), bf16),
            SDS((B, N * CHUNK, HQ * parts, M), f32),
        ],
        scratch_types=[
            smem_tiles(d_tiles),
            smem_tiles(d_tiles),
            smem_tiles(m_tiles),
            smem_tiles(m_tiles),
            smem_tiles(m_tiles, dtype=f16),
            [smem_tiles(m_tiles) for _ in range(d_tiles)],
            [smem_tiles(m_tiles) for _ in range(d_tiles)],
            mosaic.tile(CHUNK, CHUNK),
            smem_tiles(2),
            plgpu.Barrier(num_arrivals=2 * d_tiles * (1 + m_tiles) + 3 * m_tiles),
        ],
        grid=(B, N, HQ, parts),
        grid_names=("b", "n", "h", "part"),
    )(x, y, w, s, gates, states, gradients)


def _through_levels(sw, ss, sg, pairs, work, dw):
    """One slot tile's part of A, and the terms of dw and ds from the chunk's own pairs j < i.

    At a level a token either reads or is read, with the same decay; so one product makes dw where
    it reads and ds where it is read.

    Args:
      sw, ss, sg: its weights, writes and gates. pairs: the symmetric products. work: overwritten.
      dw: what is to be added to.
    """
    own = jnp.where(chunks.diagonal(), product((sw, ss.T)), 0.0)

    def level_step(level, carry):
        a, dw, ds = carry
        decay = chunks.decays(chunks.mask_operand(chunks.level_decay_mask(level)), sg)
        reads = chunks.level_reads(level, bf16)
        tokens = plgpu.load(sw, layout=WGMMA_LAYOUT) * per_row(reads, TILE_WIDTH)
        tokens += plgpu.load(ss, layout=WGMMA_LAYOUT) * per_row(1 - reads, TILE_WIDTH)
        tokens *= decay.astype(bf16)
        plgpu.commit_smem()
        work[...] = tokens
        plgpu.commit_smem()
        # What is written too far from the diagonal is overwritten by the levels to come.
        a = jnp.where(chunks.before_half(level), product((tokens, work.T)), a)
        mine = jnp.where(chunks.level_pairs(level, symmetric=True), load(pairs), 0.0)
        change = decay * product((mine.astype(bf16), work))
        reads = per_row(chunks.level_reads(level, f32), TILE_WIDTH)
        return a, dw + change * reads, ds + change * (1 - reads)

    return lax.fori_loop(0, LEVELS, level_step, (own, dw, jnp.zeros_like(dw)))


def _carried(states, gradients, m):
    """X dX of slot tile m, summed over the feature tiles: the sum over its rows remains."""
    total = None
    for x, dx in zip(states, gradients, strict=True):
        term = load(x[m]) * load(dx[m])
        total = term if total is None else total + term
    return total
