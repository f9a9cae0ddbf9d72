"""KDA's chunk-local preparation: everything of a chunk that needs no state."""

import functools

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from jla.pallas.common import blocks, chunks, mosaic, scratch
from jla.pallas.common.chunks import CHUNK, LEVELS, TILE_WIDTH
from jla.pallas.common.mosaic import (
    PER_COLUMN,
    WGMMA_LAYOUT,
    bf16,
    f16,
    f32,
    load,
    per_column,
    per_row,
)
from jla.pallas.common.scratch import barrier_for, fetch, fetch_each
from jla.pallas.common.tiles import columns, over_tiles
from jla.pallas.kda import spans

SDS = jax.ShapeDtypeStruct
EPSILON = 1e-6  # of `parts.l2norm`


def prepare(q, k, v, decay_operand, beta, *, scale, keep, exact=True, normalize=False):
    """Chunk-local part of KDA's forward pass.

    With G the cumulated log decays of the chunk:

        1.  A[i, j] = sum_k k_i k_j exp(G_i - G_j)   (j < i);   M = I + A diag(beta)
            Aq[i, j] = scale sum_k q_i k_j exp(G_i - G_j)   (j <= i)
        2.  q~ = scale q exp(G);  k~ = k exp(G);  kg = k exp(G_end - G);  decay = exp(G_end)
        3.  u  = M^-1 v                            the errors that a zero state would leave
            w  = M^-1 k~                           how the carried state changes them

    Args:
      q, k: [B, T, H, K] bf16, K a multiple of 64, T a multiple of 8. v: [B, T, HV, V] bf16.
      decay_operand: [B, T, HV, K] float16, as `chunks.decay_operand` makes it.
      beta: [B, HV, TP] float32; TP is T padded with zeros to whole chunks.
      keep: whether to return M^-1 and A, for the backward pass.

    Returns:
      q~, w [B, TP, HV, K], u [B, TP, HV, V], kg [B, TP, HV, K] bf16, decay [B, HV, N, K] float32,
      Aq and, with `keep`, M^-1 and A [B, HV, N, 64, 64] bf16.

    One warpgroup a chunk; 72 KB of SMEM at K=V=128, 255 registers, so that two chunks share a
    multiprocessor. Floor at B=8 T=4096 HV=16 K=V=128: 1.14 GB, 0.27 ms at 4.3 TB/s; 8000
    instructions a warp and chunk.
    """
    (B, _, H, K), TP = q.shape, beta.shape[2]
    HV, V = v.shape[2:]
    N = TP // CHUNK
    keys, values = SDS((B, TP, HV, K), bf16), SDS((B, TP, HV, V), bf16)
    squares = SDS((B, HV, N, CHUNK, CHUNK), bf16)
    out = scratch.kernel(
        functools.partial(_body, group=HV // H, scale=scale, exact=exact, normalize=normalize),
        inputs=dict(q=q, k=k, v=v, decay_operand=decay_operand, beta=beta),
        outputs=dict(
            **dict(query=keys, w=keys, u=values, kg=keys),
            decay=SDS((B, HV, N, K), f32),
            aq=squares,
            inverse=squares if keep else None,
            a=squares if keep else None,
            levels=SDS((B, HV, N), jnp.int32) if keep else None,
            norms=SDS((B, HV, 2, TP), f32) if keep and normalize else None,
        ),
        scratch=_scratch(K // TILE_WIDTH, V // TILE_WIDTH),
        automatic_barriers=False,
        grid=(B, N, HV),
        grid_names=("b", "n", "h"),
    )
    return tuple(x for x in out if x is not None)


def _scratch(k_tiles, v_tiles):
    wide = max(k_tiles, v_tiles)
    return dict(
        sk=mosaic.tile(CHUNK, TILE_WIDTH, wide),  # k, then k~, then u
        sq=mosaic.tile(CHUNK, TILE_WIDTH, k_tiles),  # q, then q~
        sv=mosaic.tile(CHUNK, TILE_WIDTH, v_tiles),
        sbeta=plgpu.SMEM((CHUNK,), f32),
        sg=mosaic.tile(CHUNK, TILE_WIDTH, k_tiles, dtype=f16),  # of `decay_operand`
        work=mosaic.tile(CHUNK, TILE_WIDTH, max(k_tiles, 2) + 1),
        reading=mosaic.tile(CHUNK, TILE_WIDTH, k_tiles),
        loaded=barrier_for(dict(q=k_tiles, k=k_tiles, decay_operand=k_tiles)),
        v_loaded=barrier_for(dict(v=v_tiles, beta=1)),
    )


# The kernel awaits by hand (`commit_smem` is a barrier of the warpgroup, too) whatever it
# overwrites in SMEM; Mosaic's own barriers, two for each store, would make it slower.
def _body(refs, *, group, scale, exact, normalize):
    b, n, h = (lax.axis_index(name) for name in ("b", "n", "h"))
    rows = pl.ds(n * CHUNK, CHUNK)
    k_tiles, v_tiles, keep = refs.sg.shape[0], refs.sv.shape[0], refs.inverse is not None
    spare = refs.work.at[max(k_tiles, 2)]

    def loads():
        for i in range(k_tiles):
            yield from (
                (refs.q.at[b, rows, h // group, columns(i)], refs.sq.at[i]),
                (refs.k.at[b, rows, h // group, columns(i)], refs.sk.at[i]),
                (refs.decay_operand.at[b, rows, h, columns(i)], refs.sg.at[i]),
            )

    fetch_each(loads(), refs.loaded)
    values = [(refs.v.at[b, rows, h, columns(i)], refs.sv.at[i]) for i in range(v_tiles)]
    fetch(dict(v=values, beta=(refs.beta.at[b, h, rows], refs.sbeta)), refs.v_loaded)
    plgpu.barrier_wait(refs.loaded)

    if normalize:
        for i, tiles in enumerate((refs.sq, refs.sk)):
            factor = _normalize(tiles)
            if refs.norms is not None:
                refs.norms.at[b, h, i, rows][...] = factor
        plgpu.commit_smem()
    # 1. A and Aq.
    a, aq, number = _scores(refs, k_tiles, exact)
    # The diagonal knows no decay.
    own = mosaic.product(*((refs.sq.at[i], refs.sk.at[i].T) for i in range(k_tiles)))
    aq = jnp.where(chunks.diagonal(), own, aq)
    if keep:
        refs.levels[b, h, n] = number
    plgpu.commit_smem()
    _put(spare, aq * scale, refs.aq.at[b, h, n])
    if keep:
        _put(refs.work.at[1], a, refs.a.at[b, h, n])

    _decay(refs, scale, (b, n, h, rows))
    plgpu.barrier_wait(refs.v_loaded)
    beta = per_column(load(refs.sbeta, PER_COLUMN), CHUNK)
    plgpu.wait_smem_to_gmem(0, wait_read_only=True)

    # 3. M^-1, w and u.
    inverse = chunks.unit_triangular_inverse(a * beta, (refs.work.at[0], refs.work.at[1]))
    inverse = inverse.astype(bf16)
    plgpu.commit_smem()  # all warps are done with `work`; with `keep`, `_put` would see to it, too
    if keep:
        _put(spare, inverse, refs.inverse.at[b, h, n])
    for i in range(k_tiles):
        w = mosaic.product((inverse, refs.sk.at[i]))
        _put(refs.work.at[i], w, refs.w.at[b, rows, h, columns(i)])
    for i in range(v_tiles):
        u = mosaic.product((inverse, refs.sv.at[i]))
        _put(refs.sk.at[i], u, refs.u.at[b, rows, h, columns(i)])
    plgpu.wait_smem_to_gmem(0, wait_read_only=True)


def _normalize(tiles):
    """Divides the rows of tiles by their lengths; returns by what they were multiplied."""
    rows = [load(tiles.at[i]) for i in range(tiles.shape[0])]
    factor = lax.rsqrt(over_tiles(jnp.add, [(x * x).sum(axis=1) for x in rows]) + EPSILON)
    for i, x in enumerate(rows):
        tiles.at[i][...] = (x * per_row(factor, TILE_WIDTH)).astype(bf16)
    return factor


def _put(tile, value, out):
    """Stores a value through an SMEM tile that is not read any more."""
    tile[...] = value.astype(bf16)
    plgpu.commit_smem()
    plgpu.copy_smem_to_gmem(tile, out)


def _decay(refs, scale, place):
    """2. q~ and k~ take the places of q and k; q~, kg and the chunk's decay are stored."""
    b, n, h, rows = place
    earlier, later = blocks.up_to(f16), blocks.from_on(f16, strict=True)
    for i in range(refs.sg.shape[0]):
        sq, sk, sg = refs.sq.at[i], refs.sk.at[i], refs.sg.at[i]
        before = chunks.decays(earlier, sg)
        sq[...] = (load(sq) * before * scale).astype(bf16)
        after = chunks.decays(later, sg)
        key = load(sk)
        sk[...] = (key * before).astype(bf16)
        if i:
            plgpu.wait_smem_to_gmem(0, wait_read_only=True)
        _put(refs.work.at[0], key * after, refs.kg.at[b, rows, h, columns(i)])
        plgpu.copy_smem_to_gmem(sq, refs.query.at[b, rows, h, columns(i)])
        # The sum over the chunk, as a sum along rows: along columns it would cross warps.
        refs.decay.at[b, h, n, columns(i)][...] = jnp.exp2(load(sg.T).sum(axis=1))


def _scores(refs, k_tiles, exact):
    """1. The decayed products of keys with keys (j < i) and of queries with keys (j <= i).

    Pairs of one block by `jla.pallas.kda.spans`, those further apart level by level of the tree of
    references (see `chunks.level_decay_mask`). A level also writes the pairs of tokens that are
    further apart than its blocks; what it writes there is overwritten by the level that they
    belong to. With `exact`, rows whose own decays inside their block are too strong get their pairs
    by the tree, too, whatever the others do.

    Returns:
      The two, and how many levels inside blocks there were: all or none.
    """
    sq, sk, work, sg = refs.sq, refs.sk, refs.work, refs.sg
    by_key, by_query, span = _block_scores(sq, sk, work, refs.reading, sg, k_tiles, exact)

    def level_step(level, scores):
        pairs = functools.partial(chunks.before_half, level)
        return _level_scores(level, sq, sk, work, sg, k_tiles, pairs, scores)

    scores = lax.fori_loop(spans.LEVELS, LEVELS, level_step, (by_key, by_query))
    if not exact:
        return *scores, jnp.int32(0)
    strong = span < -spans.LONGEST
    number = jnp.where(jnp.min(span) < -spans.LONGEST, jnp.int32(spans.LEVELS), jnp.int32(0))

    def strong_step(level, scores):
        pairs = functools.partial(chunks.level_pairs, level, rows=strong)
        return _level_scores(level, sq, sk, work, sg, k_tiles, pairs, scores)

    return *lax.fori_loop(0, number, strong_step, scores), number


def _block_scores(sq, sk, work, reading, sg, k_tiles, exact):
    """The scores of pairs in one block of 16, zeros elsewhere; with `exact` the span of each
    row, else None."""
    tiles = range(k_tiles)
    mask = spans.so_far()
    span, queries = None, []
    for i in tiles:
        so_far = mosaic.product((mask, sg.at[i]))
        if exact:
            lowest = so_far.min(axis=1)
            span = lowest if span is None else jnp.minimum(span, lowest)
        reader, written = spans.reads(so_far), spans.writes(so_far)
        key = load(sk.at[i])
        work.at[i][...] = (key * written).astype(bf16)
        reader = reader.astype(bf16)
        reading.at[i][...] = plgpu.load(sk.at[i], layout=WGMMA_LAYOUT) * reader
        queries.append(plgpu.load(sq.at[i], layout=WGMMA_LAYOUT) * reader)
    plgpu.commit_smem()
    by_query = mosaic.product(*((x, work.at[i].T) for i, x in enumerate(queries)))
    pairs = spans.are_pairs()
    by_key = mosaic.product(*((reading.at[i], work.at[i].T) for i in tiles))
    by_key = jnp.where(pairs, by_key, 0.0)
    return by_key, jnp.where(pairs, by_query, 0.0), span


def _level_scores(level, sq, sk, work, sg, k_tiles, pairs, scores):
    """The scores with those of the level's pairs, which the mask `pairs()` names."""
    tiles = range(k_tiles)
    mask = spans.level_decays(level)
    plgpu.commit_smem()  # all warps are done with the products of the level before
    queries = []
    for i in tiles:
        decay = chunks.decays(mask, sg.at[i]).astype(bf16)
        work.at[i][...] = plgpu.load(sk.at[i], layout=WGMMA_LAYOUT) * decay
        queries.append(plgpu.load(sq.at[i], layout=WGMMA_LAYOUT) * decay)
    plgpu.commit_smem()
    by_key, by_query = scores
    keys = [work.at[i] for i in tiles]
    pairs = pairs()
    by_key = jnp.where(pairs, mosaic.product(*((x, x.T) for x in keys)), by_key)
    product = mosaic.product(*((x, y.T) for x, y in zip(queries, keys, strict=True)))
    return by_key, jnp.where(pairs, product, by_query)
