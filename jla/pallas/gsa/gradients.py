"""The chunk-local parts of Gated Slot Attention's backward pass, in two kernels.

Both passes are of the form that `slots` describes, with x and y = q and k, w = dlogits, and
x and y = do and v, w = p. `logit_gradients` reads do and v to make dlogits; then the states'
gradients can go from chunk to chunk; then `chunk_gradients`, once for each pass, makes the rest.
"""

import functools

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from jla.pallas.common import chunks, mosaic, scratch
from jla.pallas.common.chunks import CHUNK, LEVELS, TILE_WIDTH
from jla.pallas.common.mosaic import WGMMA_LAYOUT, bf16, f16, f32, load, per_row, product
from jla.pallas.common.scratch import barrier_for, fetch, fetch_each
from jla.pallas.common.tiles import columns, row_sum, smem_tiles
from jla.pallas.gsa import slots

SDS = jax.ShapeDtypeStruct


def logit_gradients(v, s, decay_operand, value_states, p, do, *, scale):
    """The gradient of the logits' products, q . Hk, of all chunks:

    1.  dp_i = exp(G_i) (do_i Hv^T) + sum_j (do_i . v_j) s_j exp(G_i - G_j),   j <= i
    2.  dlogits_i = scale p_i (dp_i - p_i . dp_i)

    Args:
      v, s, decay_operand, value_states: as `outputs.outputs` takes them; p as it returned it.
      do: [B, T, HQ, V] bf16.

    Returns:
      [B, T, HQ, M] bf16.

    SMEM as `outputs`. Floor at B=8 T=4096 HQ=H=16 V=128 M=64: 0.67 GB, 0.16 ms at 4.3 TB/s; 3800
    instructions a warp and chunk.
    """
    B, T, HQ, V = do.shape
    H, M = s.shape[2:]
    m_tiles, (_, v_tiles) = M // TILE_WIDTH, slots.parts(V)
    out = scratch.kernel(
        functools.partial(_logits_body, group=HQ // H, scale=scale),
        inputs=dict(
            **dict(v=v, s=s, decay_operand=decay_operand, value_states=value_states, p=p, do=do)
        ),
        outputs=dict(dlogits=SDS((B, T, HQ, M), bf16)),
        scratch=dict(
            sdo=smem_tiles(max(v_tiles, m_tiles)),  # do, then p, then dlogits
            sv=smem_tiles(v_tiles),
            sx=[smem_tiles(m_tiles) for _ in range(v_tiles)],
            **slots.near_scratch(m_tiles),
            loaded=barrier_for(dict(do=v_tiles, v=v_tiles, states=v_tiles * m_tiles)),
            p_loaded=barrier_for(dict(p=m_tiles)),
        ),
        automatic_barriers=False,
        grid=(B, -(-T // CHUNK), HQ),
        grid_names=("b", "n", "h"),
    )
    return out.dlogits


def _logits_body(refs, *, group, scale):
    b, n, head = (lax.axis_index(name) for name in ("b", "n", "h"))
    rows, h = pl.ds(n * CHUNK, CHUNK), lax.div(head, group)
    m_tiles, (parts, v_tiles) = len(refs.sg), slots.parts(refs.v.shape[3])
    sdo = refs.sdo

    def values(part):
        for i in range(v_tiles):
            at = columns(part * v_tiles + i)
            yield refs.do.at[b, rows, head, at], sdo[i]
            yield refs.v.at[b, rows, h, at], refs.sv[i]
            for m in range(m_tiles):
                yield refs.value_states.at[b, h, n, at, columns(m)], refs.sx[i][m]

    def fetch_values(part):
        fetch_each(values(part), refs.loaded)

    slots.fetch_near(refs, (b, rows, h))
    fetch_values(0)
    plgpu.barrier_wait(refs.near)
    slots.put_level_tiles(refs.levels, refs.ss, refs.sg)

    # 1. dp.
    scores, reads = slots.products(
        fetch_values, refs.loaded, parts, sdo[:v_tiles], refs.sv, refs.sx
    )
    plgpu.commit_smem()
    p = [(refs.p.at[b, rows, head, columns(m)], sdo[m]) for m in range(m_tiles)]
    fetch(dict(p=p), refs.p_loaded)
    earlier = chunks.mask_operand(chunks.up_to())
    for m in range(m_tiles):
        reads[m] *= chunks.decays(earlier, refs.sg[m])
    dp = slots.read(scores, reads, refs.levels, refs.ss)

    # 2. dlogits.
    plgpu.barrier_wait(refs.p_loaded)
    p = [load(sdo[m]) for m in range(m_tiles)]
    weighted = [x * y for x, y in zip(p, dp, strict=True)]
    # The rounded p do not sum to 1; without the division dlogits would not sum to 0, which
    # tells where one slot has nearly all.
    mean = per_row(row_sum(weighted) / row_sum(p), TILE_WIDTH)
    for m in range(m_tiles):
        sdo[m][...] = (scale * (weighted[m] - p[m] * mean)).astype(bf16)
    plgpu.commit_smem()
    for m in range(m_tiles):
        plgpu.copy_smem_to_gmem(sdo[m], refs.dlogits.at[b, rows, head, columns(m)])
    plgpu.wait_smem_to_gmem(0, wait_read_only=True)


def chunk_gradients(x, y, w, s, decay_operand, states, gradients, *, rows_too):
    """The gradients of one pass, of the form sum_ij (x_i . y_j) A[i, j] with A from w and s, given
    the state X before each chunk and dX, the gradient of the one after it:

    1.  dx = A y + (w exp(G)) X^T;   dy = A^T x + (s exp(G_end - G)) dX^T
    2.  dw = exp(G) (x X)       + sum_j (x_i . y_j) s_j exp(G_i - G_j)      for dg alone
        ds = exp(G_end - G) (y dX) + sum_i (x_i . y_j) w_i exp(G_i - G_j)

    3.  dG = w dw - s ds, of dw and ds without their terms j = i

    whose reversed cumsum over the chunk, with the border's terms (4.), is dg: for all tokens what
    the chunk carries out, exp(G_end) X dX, and for each what its predecessors write into the state
    after the chunk.

    All of it is linear in the features, so that each 128 of them are worked on alone; ds and dg are
    sums over their parts, and over the query heads of a group (what dX gives counts for the first).

    Args:
      x: [B, T, HQ, D] bf16. y: [B, T, H, D] bf16. w: [B, T, HQ, M] bf16.
      s, decay_operand: as `outputs.outputs` takes them.
      states, gradients: X and dX, [B, H, N, D, M] bf16.
      rows_too: whether dx is wanted.

    Returns:
      dx (if wanted) and dy [B, T, HQ, D] bf16, ds [B, T, HQ * parts, M] bf16 and dg
      [B, TP, HQ * parts, M] float32, TP whole chunks.

    One warpgroup for 128 features of a chunk; 112 KB of SMEM at M=64. Floor at B=8 T=4096 HQ=H=16
    D=128 M=64: 1.2 GB, 0.28 ms at 4.3 TB/s; 6700 instructions a warp and chunk (6400 without dx).
    """
    B, T, HQ, D = x.shape
    H, M = s.shape[2:]
    N, m_tiles = -(-T // CHUNK), M // TILE_WIDTH
    parts, d_tiles = slots.parts(D)
    features = SDS((B, T, HQ, D), bf16)
    states_tiles = d_tiles * m_tiles
    out = scratch.kernel(
        functools.partial(_gradients_body, group=HQ // H, parts=parts),
        inputs=dict(
            **dict(x=x, y=y, w=w, s=s, decay_operand=decay_operand),
            **dict(states=states, gradients=gradients),
        ),
        outputs=dict(
            dx=features if rows_too else None,
            dy=features,
            ds=SDS((B, T, HQ * parts, M), bf16),
            dg=SDS((B, N * CHUNK, HQ * parts, M), f32),
        ),
        scratch=dict(
            sx=smem_tiles(d_tiles),  # x, then dx
            sy=smem_tiles(d_tiles),  # y, then dy
            sw=smem_tiles(m_tiles),  # w, then w exp(G)
            ss=smem_tiles(m_tiles),  # s, then s exp(G_end - G)
            sg=smem_tiles(m_tiles, dtype=f16),  # of `decay_operand`
            sstates=[smem_tiles(m_tiles) for _ in range(d_tiles)],
            sgradients=[smem_tiles(m_tiles) for _ in range(d_tiles)],
            pairs=mosaic.tile(CHUNK, CHUNK),  # the products of x and y, then A
            work=smem_tiles(2),
            loaded=barrier_for(
                dict(x=d_tiles, y=d_tiles, states=states_tiles, gradients=states_tiles)
                | dict(w=m_tiles, s=m_tiles, decay_operand=m_tiles)
            ),
        ),
        automatic_barriers=False,
        grid=(B, N, HQ, parts),
        grid_names=("b", "n", "h", "part"),
    )
    return tuple(x for x in out if x is not None)


def _gradients_body(refs, *, group, parts):
    b, n, head, part = (lax.axis_index(name) for name in ("b", "n", "h", "part"))
    rows, h = pl.ds(n * CHUNK, CHUNK), lax.div(head, group)
    out_head = head * parts + part
    d_tiles, m_tiles = len(refs.sx), len(refs.sg)
    rows_too = refs.dx is not None

    def loads():
        for i in range(d_tiles):
            at = columns(part * d_tiles + i)
            yield refs.x.at[b, rows, head, at], refs.sx[i]
            yield refs.y.at[b, rows, h, at], refs.sy[i]
            for m in range(m_tiles):
                yield refs.states.at[b, h, n, at, columns(m)], refs.sstates[i][m]
                yield refs.gradients.at[b, h, n, at, columns(m)], refs.sgradients[i][m]
        for m in range(m_tiles):
            yield refs.w.at[b, rows, head, columns(m)], refs.sw[m]
            yield refs.s.at[b, rows, h, columns(m)], refs.ss[m]
            yield refs.decay_operand.at[b, rows, h, columns(m)], refs.sg[m]

    fetch_each(loads(), refs.loaded)
    plgpu.barrier_wait(refs.loaded)
    own = _put_pairs(refs)

    def of_first_head(x):
        """What the states give counts for a group's first query head."""
        return mosaic.where(lax.rem(head, group) == 0, x) if group > 1 else x

    a = None
    for m in range(m_tiles):
        # 2. and A, through the chunk's own pairs.
        before = chunks.decays(chunks.mask_operand(chunks.up_to()), refs.sg[m])
        states = (x[m] for x in refs.sstates)
        dw = before * product(*((tile, x) for tile, x in zip(refs.sx, states, strict=True)))
        a_m, dw, ds = _through_levels(
            refs.sw[m], refs.ss[m], refs.sg[m], refs.pairs, refs.work[0], dw
        )
        a = a_m if a is None else a + a_m
        if m + 1 == m_tiles:
            refs.pairs[...] = a.astype(bf16)
        # In this order few tiles live at a time.
        dg = _cumulated(refs, m, dw, ds)
        ds, dg = _from_the_end(refs, m, own, ds, dg, of_first_head)
        refs.dg.at[b, rows, out_head, columns(m)][...] = dg
        if rows_too:
            before = chunks.decays(chunks.mask_operand(chunks.up_to()), refs.sg[m])
            refs.sw[m][...] = (load(refs.sw[m]) * before).astype(bf16)  # for dx
        plgpu.commit_smem()
        refs.work[0][...] = ds
        plgpu.commit_smem()
        plgpu.copy_smem_to_gmem(refs.work[0], refs.ds.at[b, rows, out_head, columns(m)])
        if m + 1 < m_tiles:
            plgpu.wait_smem_to_gmem(0, wait_read_only=True)

    dx, dy = _of_features(refs, rows_too)
    plgpu.commit_smem()
    for tiles, results, out in ((refs.sx, dx, refs.dx), (refs.sy, dy, refs.dy)):
        for i, result in enumerate(results):
            tiles[i][...] = result
        plgpu.commit_smem()
        for i in range(len(results)):
            at = columns(part * d_tiles + i)
            plgpu.copy_smem_to_gmem(tiles[i], out.at[b, rows, head, at])
    plgpu.wait_smem_to_gmem(0, wait_read_only=True)


def _put_pairs(refs):
    """The products of tokens: for j < i x_i . y_j, for j > i x_j . y_i. Returns those for j = i."""
    both = product(*((a, b.T) for a, b in zip(refs.sy, refs.sx, strict=True)))
    one = product(*((a, b.T) for a, b in zip(refs.sx, refs.sy, strict=True)))
    own = jnp.where(chunks.diagonal(), one, 0.0).sum(axis=1)
    refs.pairs[...] = jnp.where(chunks.up_to(strict=True), one, both).astype(bf16)
    return own


def _cumulated(refs, m, dw, ds):
    """3. The reversed cumsum of dG, of slot tile m. It cancels, and so needs 16 bits."""
    work = refs.work
    signed = load(refs.sw[m]) * dw - load(refs.ss[m]) * ds
    plgpu.commit_smem()
    work[0][...], work[1][...] = mosaic.split(signed)
    plgpu.commit_smem()
    onwards = chunks.mask_operand(chunks.from_on(), bf16)
    return product((onwards, work[0]), (onwards, work[1]))


def _from_the_end(refs, m, own, ds, dg, of_first_head):
    """4. ds and dg of slot tile m with what the state's gradient adds; s exp(G_end - G) for dy."""
    work, ss, sg = refs.work, refs.ss[m], refs.sg[m]
    after = chunks.decays(chunks.mask_operand(chunks.from_on(strict=True)), sg)
    after = of_first_head(after)
    gradients = (x[m] for x in refs.sgradients)
    end = after * product(*((tile, x) for tile, x in zip(refs.sy, gradients, strict=True)))
    ds = (ds + end + load(refs.sw[m]) * per_row(own, TILE_WIDTH)).astype(bf16)
    plgpu.commit_smem()
    writes = load(ss)
    work[0][...] = (end * writes).astype(bf16)
    ss[...] = (writes * after).astype(bf16)
    everywhere = chunks.everywhere()
    carried = _carried(refs.sstates, refs.sgradients, m)
    carried *= jnp.exp2(product((chunks.mask_operand(everywhere), sg)))
    work[1][...] = of_first_head(carried).astype(bf16)
    plgpu.commit_smem()
    earlier = chunks.mask_operand(chunks.up_to(strict=True), bf16)
    border = (earlier, work[0]), (chunks.mask_operand(everywhere, bf16), work[1])
    return ds, product(*border, init=dg)


def _of_features(refs, rows_too):
    """1. dx (or none) and dy, in bf16 tiles."""
    dx, dy = [], []
    slot_tiles = range(len(refs.sg))
    for i in range(len(refs.sx)):
        end = ((refs.ss[m], refs.sgradients[i][m].T) for m in slot_tiles)
        dy.append(product((refs.pairs.T, refs.sx[i]), *end).astype(bf16))
        if rows_too:
            start = ((refs.sw[m], refs.sstates[i][m].T) for m in slot_tiles)
            dx.append(product((refs.pairs, refs.sy[i]), *start).astype(bf16))
    return dx, dy


def _through_levels(sw, ss, sg, pairs, work, dw):
    """One slot tile's part of A, and the terms of dw and ds from the chunk's own pairs j < i.

    At a level a token either reads or is read, with the same decay; so one product makes dw where
    it reads and ds where it is read.

    Args:
      sw, ss, sg: its w, s and log decays. pairs: the symmetric products. work: overwritten.
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
        # Entries too far from the diagonal are overwritten by the later levels.
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
