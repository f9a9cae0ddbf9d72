"""The chunk-local parts of Gated Slot Attention's backward pass, in two kernels.

Both passes are of the form that `slots` describes, with x and y = q and k, w = dlogits, and
x and y = do and v, w = p. `logit_gradients` reads do and v to make dlogits; then the states'
gradients can go from chunk to chunk; then `chunk_gradients`, once for each pass, makes the rest.
"""

import collections
import functools

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from jla.pallas.common import blocks, chunks, mosaic, scratch
from jla.pallas.common.chunks import CHUNK, LEVELS, TILE_WIDTH
from jla.pallas.common.mosaic import WGMMA_LAYOUT, bf16, f16, f32, load, per_row, product
from jla.pallas.common.scratch import barrier_for, fetch, fetch_each
from jla.pallas.common.tiles import columns, over_tiles, row_sum, smem_tiles
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
        reductions_cross_warps=False,
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
    decays = slots.put_writes(refs)

    # 1. dp.
    scores, reads = slots.products(
        fetch_values, refs.loaded, parts, sdo[:v_tiles], refs.sv, refs.sx
    )
    plgpu.commit_smem()
    p = [(refs.p.at[b, rows, head, columns(m)], sdo[m]) for m in range(m_tiles)]
    fetch(dict(p=p), refs.p_loaded)
    dp = slots.read(scores, reads, decays, refs, refs.sv[0])

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


# One of the two passes: x, y, w, the states before each chunk and the gradients of those after it;
# and whether dx is wanted.
Pass = collections.namedtuple("Pass", "x y w states gradients rows_too")


def fit_together(passes):
    """Whether one launch of `chunk_gradients` can take all the passes."""
    widths = {x.y.shape[-1] for x in passes}
    return passes[0].w.shape[-1] == TILE_WIDTH and len(widths) == 1 and max(widths) <= slots.PART


def chunk_gradients(passes, s, decay_operand):
    """The gradients of passes, each of the form sum_ij (x_i . y_j) A[i, j] with A from w and s,
    given the state X before each chunk and dX, the gradient of the one after it:

    1.  dw = exp(G) (x X)       + sum_j (x_i . y_j) s_j exp(G_i - G_j)      for dg alone
        ds = exp(G_end - G) (y dX) + sum_i (x_i . y_j) w_i exp(G_i - G_j)
    2.  dx = A y + (w exp(G)) X^T;   dy = A^T x + (s exp(G_end - G)) dX^T
    3.  dG = w dw - s ds, of dw and ds without what the chunk's end gives

    whose reversed cumsum over the chunk, with the border's terms (4.), is dg: for all tokens what
    the chunk carries out, exp(G_end) X dX, and for each what its predecessors write into the state
    after the chunk.

    In a chunk without far rows w exp(G) and s exp(-G) are two tiles, whose products with those of
    tokens are all of dG: its pairs cancel as they should, because both sides have the same factors,
    rounded alike. Gradients know later tokens, so that other chunks take the tree for all rows.

    All of it is linear in the features, so that each 128 of them are worked on alone; ds and dg are
    sums over their parts, and over the query heads of a group (what dX gives counts for the first).

    Args:
      passes: `Pass`es; several only if they `fit_together`. x: [B, T, HQ, D] bf16. y: [B, T, H, D]
        bf16. w: [B, T, HQ, M] bf16. states, gradients: X and dX, [B, H, N, D, M] bf16. D is one
        number of parts for all.
      s, decay_operand: as `outputs.outputs` takes them.

    Returns:
      [(dx, or None, and dy) for each pass], [B, T, HQ, D] bf16; ds [B, T, HQ * parts, M] bf16 and
      dg [B, TP, HQ * parts, M] float32, TP whole chunks, of all passes.

    One warpgroup for 128 features of a chunk; 112 KB of SMEM at M=64. Floor at B=8 T=4096 HQ=H=16
    D=128 M=64, both passes: 2.0 GB, 0.46 ms at 4.3 TB/s.
    """
    B, T, HQ, D = passes[0].x.shape
    H, M = s.shape[2:]
    N, m_tiles = -(-T // CHUNK), M // TILE_WIDTH
    parts, d_tiles = slots.parts(D)
    x, y, w, states, gradients, rows_too = (list(x) for x in zip(*passes, strict=True))
    out = scratch.kernel(
        functools.partial(_gradients_body, group=HQ // H, parts=parts),
        inputs=dict(
            **dict(x=x, y=y, w=w, s=s, decay_operand=decay_operand),
            **dict(states=states, gradients=gradients),
        ),
        outputs=dict(
            dx=[SDS(a.shape, bf16) if rows else None for a, rows in zip(x, rows_too, strict=True)],
            dy=[SDS(a.shape, bf16) for a in x],
            ds=SDS((B, T, HQ * parts, M), bf16),
            dg=SDS((B, N * CHUNK, HQ * parts, M), f32),
        ),
        scratch=dict(
            sx=smem_tiles(d_tiles, 1),  # x, then dx
            sy=smem_tiles(d_tiles, 1),  # y, then dy
            sw=smem_tiles(m_tiles, 1),  # w, then w exp(G)
            ss=smem_tiles(m_tiles, 1),  # s exp(-G); or s, if the chunk has far rows
            sg=smem_tiles(m_tiles, 1, dtype=f16),  # of `decay_operand`
            kept=smem_tiles(m_tiles, 1),  # s exp(G_end - G)
            sstates=[smem_tiles(m_tiles, 1) for _ in range(d_tiles)],
            sgradients=[smem_tiles(m_tiles, 1) for _ in range(d_tiles)],
            pairs=mosaic.tile(CHUNK, CHUNK, 1),  # the products of x and y, then A
            work=mosaic.tile(CHUNK, TILE_WIDTH, 1),
            more=mosaic.tile(CHUNK, TILE_WIDTH, 1) if m_tiles > 1 else None,
            nothing=plgpu.SMEM((1,), jnp.int32),
            lowest=blocks.lowest_of_blocks(),
            near=barrier_for(dict(decay_operand=m_tiles, s=m_tiles)),
            tokens_loaded=barrier_for(dict(x=d_tiles, y=d_tiles, w=m_tiles)),
            states_loaded=barrier_for(dict(states=d_tiles * m_tiles, gradients=d_tiles * m_tiles)),
        ),
        automatic_barriers=False,
        reductions_cross_warps=False,
        grid=(B, N, HQ, parts),
        grid_names=("b", "n", "h", "part"),
    )
    return list(zip(out.dx, out.dy, strict=True)), out.ds, out.dg


# Of a slot tile, over the passes so far: dg without what is left to `_finish`, ds of the chunk's own
# pairs (over exp(-G), where no row is far), and y dX.
Sums = collections.namedtuple("Sums", "dg ds end")


def _gradients_body(refs, *, group, parts):
    b, n, head, part = (lax.axis_index(name) for name in ("b", "n", "h", "part"))
    rows, h = pl.ds(n * CHUNK, CHUNK), lax.div(head, group)
    d_tiles, m_tiles, passes = len(refs.sx), len(refs.sg), len(refs.x)
    tiles = refs  # before `_afresh`

    def of_first_head(x):
        """What the states give counts for a group's first query head."""
        return mosaic.where(lax.rem(head, group) == 0, x) if group > 1 else x

    def fetch_tokens(number):
        def copies():
            for i in range(d_tiles):
                at = columns(part * d_tiles + i)
                yield refs.x[number].at[b, rows, head, at], refs.sx[i]
                yield refs.y[number].at[b, rows, h, at], refs.sy[i]
            for m in range(m_tiles):
                yield refs.w[number].at[b, rows, head, columns(m)], refs.sw[m]

        fetch_each(copies(), refs.tokens_loaded)

    def fetch_states(number):
        def copies():
            for i in range(d_tiles):
                at = columns(part * d_tiles + i)
                for m in range(m_tiles):
                    of_tile = b, h, n, at, columns(m)
                    yield refs.states[number].at[of_tile], refs.sstates[i][m]
                    yield refs.gradients[number].at[of_tile], refs.sgradients[i][m]

        fetch_each(copies(), refs.states_loaded)

    def send(number, i):
        at = b, rows, head, columns(part * d_tiles + i)
        plgpu.copy_smem_to_gmem(refs.sy[i], refs.dy[number].at[at])
        if refs.dx[number] is not None:
            plgpu.copy_smem_to_gmem(refs.sx[i], refs.dx[number].at[at])

    def step(number, sums):
        plgpu.barrier_wait(refs.tokens_loaded)
        _put_pairs(_afresh(tiles), far)
        plgpu.barrier_wait(refs.states_loaded)
        sums = list(sums)
        for m in range(m_tiles):
            sums[m] = _slot_sums(tiles, m, far, of_first_head, sums[m])
            if passes == 1:
                _finish(_afresh(tiles), m, sums[m], far, of_first_head, place(m))
        _put_a(_afresh(tiles), far)
        for i in range(d_tiles):
            _put_features(_afresh(tiles), i)
            _of_number(number, passes, functools.partial(send, i=i))
        return tuple(sums)

    def more(number, sums):
        sums = step(number, sums)

        @pl.when(number + 1 < passes)
        def _():
            for following in range(1, passes):
                pl.when(number + 1 == following)(functools.partial(fetch_states, following))
            plgpu.wait_smem_to_gmem(0, wait_read_only=True)
            plgpu.commit_smem()
            for following in range(1, passes):
                pl.when(number + 1 == following)(functools.partial(fetch_tokens, following))

        return sums

    def place(m):
        return b, rows, head * parts + part, columns(m)

    refs.nothing[0] = 0
    plgpu.commit_smem()
    refs = _afresh(tiles)
    slots.fetch_near(refs, (b, rows, h))
    fetch_tokens(0)
    fetch_states(0)
    far = _put_writes(_afresh(tiles), of_first_head)
    zero = mosaic.zeros((CHUNK, TILE_WIDTH), WGMMA_LAYOUT)
    sums = (Sums(zero, zero, zero),) * m_tiles
    if passes == 1:
        step(0, sums)
    else:
        (sums,) = lax.fori_loop(0, passes, more, sums)
        plgpu.wait_smem_to_gmem(0, wait_read_only=True)
        _finish(_afresh(tiles), 0, sums, far, of_first_head, place(0))
    plgpu.wait_smem_to_gmem(0, wait_read_only=True)


def _of_number(number, passes, function):
    """function(number), for a number that may be traced."""
    if passes == 1:
        return function(number)
    for i in range(passes):
        pl.when(number == i)(functools.partial(function, i))


TILES = "sx sy sw ss sg kept sstates sgradients pairs work more".split()


def _afresh(refs):
    """The same tiles, whose addresses are computed again from here on, and not kept in registers."""
    zero = refs.nothing[0]

    def at(x):
        if isinstance(x, list | tuple):
            return type(x)(map(at, x))
        return None if x is None else x.at[zero]

    return refs._replace(**{name: at(getattr(refs, name)) for name in TILES})


def _put_writes(refs, of_first_head):
    """Puts both tiles of decayed writes; whether the chunk has far rows."""
    plgpu.barrier_wait(refs.near)
    lowest = []
    for s, g, kept in zip(refs.ss, refs.sg, refs.kept, strict=True):
        after = chunks.decays(blocks.from_on(f16, strict=True), g)
        kept[...] = (load(s) * of_first_head(after)).astype(bf16)
        lowest.append(blocks.lowest([blocks.decays_so_far(g)]))
    far = blocks.some_far(over_tiles(jnp.minimum, lowest), refs.lowest)

    @pl.when(~far)
    def _():
        for s, g in zip(refs.ss, refs.sg, strict=True):
            s[...] = (load(s) * blocks.writes(blocks.decays_so_far(g))).astype(bf16)

    return far


def _put_pairs(refs, far):
    """The products of tokens: for j <= i x_i . y_j, for j > i zero, or x_j . y_i if rows are far."""
    one = product(*((a, b.T) for a, b in zip(refs.sx, refs.sy, strict=True)))

    def mirrored():
        both = product(*((a, b.T) for a, b in zip(refs.sy, refs.sx, strict=True)))
        refs.pairs[...] = jnp.where(chunks.up_to(), one, both).astype(bf16)

    def lower():
        refs.pairs[...] = one.astype(bf16) * blocks.up_to(bf16)

    lax.cond(far, mirrored, lower)
    plgpu.commit_smem()


def _slot_sums(refs, m, far, of_first_head, before):
    """1. and 3. The sums of slot tile m, added to those of the passes before."""
    tiled = refs
    refs = _afresh(tiled)
    if m:
        plgpu.wait_smem_to_gmem(0, wait_read_only=True)  # ds of the slot tile before
        plgpu.commit_smem()
    sw, ss, sg, work = refs.sw[m], refs.ss[m], refs.sg[m], refs.work
    states = [(x, state[m]) for x, state in zip(refs.sx, refs.sstates, strict=True)]

    def by_factors():
        sw[...] = (load(sw) * blocks.reads(blocks.decays_so_far(sg))).astype(bf16)
        plgpu.commit_smem()
        dg = load(sw) * product(*states, (refs.pairs, ss))
        ds = product((refs.pairs.T, sw))
        return dg - load(ss) * ds, ds

    def exactly():
        dw = blocks.reads(blocks.decays_so_far(sg)) * product(*states)
        dw, ds = _through_levels(sw, ss, sg, refs.pairs, work, dw)
        own = jnp.where(chunks.diagonal(), load(refs.pairs), 0.0).sum(axis=1)
        w = load(sw)
        return w * dw - load(ss) * ds, ds + w * per_row(own, TILE_WIDTH)

    signed, ds = lax.cond(far, exactly, by_factors)
    refs = _afresh(tiled)
    work, sg = refs.work, refs.sg[m]
    second = _second(refs)
    plgpu.commit_smem()
    work[...], second[...] = mosaic.split(signed)  # the cumsum cancels, and so needs 16 bits
    plgpu.commit_smem()
    onwards = blocks.from_on(bf16)
    dg = product((onwards, work), (onwards, second), init=before.dg)
    carried = _carried(refs.sstates, refs.sgradients, m)
    everywhere = chunks.everywhere()
    carried *= jnp.exp2(product((chunks.mask_operand(everywhere), sg)))
    plgpu.commit_smem()
    work[...] = of_first_head(carried).astype(bf16)
    plgpu.commit_smem()
    dg = product((chunks.mask_operand(everywhere, bf16), work), init=dg)
    gradients = [(y, gradient[m]) for y, gradient in zip(refs.sy, refs.sgradients, strict=True)]
    return Sums(dg, before.ds + ds, product(*gradients, init=before.end))


def _second(refs):
    """A second tile for work: that of the pairs, which the last slot tile needs no more."""
    return refs.pairs if refs.more is None else refs.more


def _put_a(refs, far):
    """A in the place of the products; and w exp(G) in that of w, where it is not there yet."""

    def by_factors():
        a = product(*((w, s.T) for w, s in zip(refs.sw, refs.ss, strict=True)))
        plgpu.commit_smem()
        refs.pairs[...] = a.astype(bf16) * blocks.up_to(bf16)

    def exactly():
        plgpu.wait_smem_to_gmem(0, wait_read_only=True)  # ds
        a = slots.scores_exactly(refs.sw, refs.ss, refs.sg, refs.work)
        plgpu.commit_smem()
        refs.pairs[...] = a
        for w, g in zip(refs.sw, refs.sg, strict=True):
            w[...] = (load(w) * blocks.reads(blocks.decays_so_far(g))).astype(bf16)

    lax.cond(far, exactly, by_factors)
    plgpu.commit_smem()


def _put_features(refs, i):
    """2. dx (if wanted) and dy of feature tile i, in the places of x and y."""
    slot_tiles, rows_too = range(len(refs.sg)), any(x is not None for x in refs.dx)
    end = ((refs.kept[m], refs.sgradients[i][m].T) for m in slot_tiles)
    dy = product((refs.pairs.T, refs.sx[i]), *end).astype(bf16)
    if rows_too:
        start = ((refs.sw[m], refs.sstates[i][m].T) for m in slot_tiles)
        dx = product((refs.pairs, refs.sy[i]), *start).astype(bf16)
    plgpu.commit_smem()  # all warps are done with the tiles
    refs.sy[i][...] = dy
    if rows_too:
        refs.sx[i][...] = dx
    plgpu.commit_smem()


def _finish(refs, m, sums, far, of_first_head, place):
    """4. ds and dg of slot tile m."""
    sg, work, second = refs.sg[m], refs.work, _second(refs)
    plgpu.commit_smem()
    second[...] = (load(refs.kept[m]) * sums.end).astype(bf16)
    after = of_first_head(chunks.decays(blocks.from_on(f16, strict=True), sg))
    so_far = mosaic.where(~far, blocks.decays_so_far(sg))
    ds = sums.ds * blocks.writes(so_far) + sums.end * after
    plgpu.commit_smem()
    work[...] = ds.astype(bf16)
    plgpu.commit_smem()
    plgpu.copy_smem_to_gmem(work, refs.ds.at[place])
    refs.dg.at[place][...] = product((blocks.up_to(bf16, strict=True), second), init=sums.dg)


def _through_levels(sw, ss, sg, pairs, work, dw):
    """The terms of dw and ds of one slot tile from the chunk's own pairs j < i, by the tree.

    At a level a token either reads or is read, with the same decay; so one product makes dw where
    it reads and ds where it is read.

    Args:
      sw, ss, sg: its w, s and log decays. pairs: the symmetric products. work: overwritten.
      dw: what is to be added to.
    """

    def level_step(level, carry):
        dw, ds = carry
        decay = blocks.level_decays(level, sg)
        reads = chunks.level_reads(level, bf16)
        tokens = plgpu.load(sw, layout=WGMMA_LAYOUT) * per_row(reads, TILE_WIDTH)
        tokens += plgpu.load(ss, layout=WGMMA_LAYOUT) * per_row(1 - reads, TILE_WIDTH)
        tokens *= decay.astype(bf16)
        plgpu.commit_smem()
        work[...] = tokens
        plgpu.commit_smem()
        mine = jnp.where(chunks.level_pairs(level, symmetric=True), load(pairs), 0.0)
        change = decay * product((mine.astype(bf16), work))
        reads = per_row(chunks.level_reads(level, f32), TILE_WIDTH)
        return dw + change * reads, ds + change * (1 - reads)

    return lax.fori_loop(0, LEVELS, level_step, (dw, jnp.zeros_like(dw)))


def _carried(states, gradients, m):
    """X dX of slot tile m, summed over the feature tiles: the sum over its rows remains."""
    total = None
    for x, dx in zip(states, gradients, strict=True):
        term = load(x[m]) * load(dx[m])
        total = term if total is None else total + term
    return total
