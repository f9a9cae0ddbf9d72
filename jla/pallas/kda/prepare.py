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
from jla.pallas.common.scratch import barrier_for, fetch
from jla.pallas.common.tiles import columns, over_tiles
from jla.pallas.kda import gate, spans

SDS = jax.ShapeDtypeStruct
EPSILON = 1e-6  # of `parts.l2norm`


def prepare(
    q, k, v, decay_operand, beta, coefficients=None,
    *, scale, keep, exact=True, normalize=False, bounded=None,
):  # fmt: skip
    """Chunk-local part of KDA's forward pass.

    With G the cumulated log decays of the chunk:

        1.  A[i, j] = sum_k k_i k_j exp(G_i - G_j)   (j < i);   M = I + A diag(beta)
            Aq[i, j] = scale sum_k q_i k_j exp(G_i - G_j)   (j <= i)
        2.  q~ = scale q exp(G);  k~ = k exp(G);  kg = k exp(G_end - G);  decay = exp(G_end)
        3.  u  = M^-1 v                            the errors that a zero state would leave
            w  = M^-1 k~                           how the carried state changes them

    The pairs of a block of 16 tokens have decays of two factors (`spans`); those of tokens further
    apart, and those of rows whose own decays are too strong, go through the tree of references.

    Args:
      q, k: [B, T, H, K] bf16, K a multiple of 64, T a multiple of 8. v: [B, T, HV, V] bf16.
      decay_operand: [B, T, HV, K] float16, as `chunks.decay_operand` makes it; with `coefficients`
        [B, 3, HV, K] the projection in bf16 of which `gate.decays` makes it, T whole chunks.
      beta: [B, HV, TP] float32; TP is T padded with zeros to whole chunks.
      keep: whether to return what the backward pass needs.
      exact: whether there may be rows whose decays are too strong for `spans`.
      normalize: whether to divide the rows of q and k by their lengths first.
      bounded: the form of `gate.decays`.

    Returns:
      q~, w [B, TP, HV, K], u [B, TP, HV, V], kg [B, TP, HV, K] bf16, decay [B, HV, N, K] float32,
      Aq, and with `keep` M^-1 and A [B, HV, N, 64, 64] bf16, the number of levels of the tree
      inside blocks [B, HV, N] int32, and what was made: by what q and k were multiplied
      [B, HV, 2, TP] float32, and the decay operand.

    One warpgroup a chunk; 97 KB of SMEM at K=V=128, so that two chunks share a multiprocessor.
    Floor at B=8 T=4096 HV=16 K=V=128: 1.14 GB, 0.27 ms at 4.3 TB/s. A warp and chunk take about
    5300 instructions (8000 with six levels), and 800 to 1200 more for norms and gates; predicted
    0.50 ms, 0.59 with norms and gates.
    """
    (B, _, H, K), TP = q.shape, beta.shape[2]
    HV, V = v.shape[2:]
    N = TP // CHUNK
    keys, values = SDS((B, TP, HV, K), bf16), SDS((B, TP, HV, V), bf16)
    squares = SDS((B, HV, N, CHUNK, CHUNK), bf16)
    out = scratch.kernel(
        functools.partial(
            _body,
            **dict(group=HV // H, scale=scale, exact=exact, normalize=normalize, bounded=bounded),
        ),
        inputs=dict(
            **dict(q=q, k=k, v=v, decay_operand=decay_operand, beta=beta),
            coefficients=coefficients,
        ),
        outputs=dict(
            **dict(query=keys, w=keys, u=values, kg=keys),
            decay=SDS((B, HV, N, K), f32),
            aq=squares,
            inverse=squares if keep else None,
            a=squares if keep else None,
            levels=SDS((B, HV, N), jnp.int32) if keep else None,
            norms=SDS((B, HV, 2, TP), f32) if keep and normalize else None,
            gates=SDS((B, TP, HV, K), f16) if keep and coefficients is not None else None,
        ),
        scratch=_scratch(K, V),
        automatic_barriers=False,
        grid=(B, N, HV),
        grid_names=("b", "n", "h"),
    )
    return tuple(x for x in out if x is not None)


def _scratch(K, V):
    squares = 2 if K > TILE_WIDTH else 3
    return dict(
        sk=mosaic.tile(CHUNK, K),  # k, then k~
        sq=mosaic.tile(CHUNK, K),  # q, then q~
        sv=mosaic.tile(CHUNK, V),  # v, then u
        sbeta=plgpu.SMEM((CHUNK,), f32),
        sg=mosaic.tile(CHUNK, K, dtype=f16),  # of `decay_operand`
        work=mosaic.tile(CHUNK, K),  # of which gates are made, keys of scores, kg, then w
        squares=mosaic.tile(CHUNK, TILE_WIDTH, max(K // TILE_WIDTH, squares)),
        loaded=barrier_for(("q", "k", "decay_operand")),
        v_loaded=barrier_for(("v", "beta")),
    )


# The kernel awaits by hand (`commit_smem` is a barrier of the warpgroup, too) whatever it
# overwrites in SMEM; Mosaic's own barriers, two for each store, would make it slower.
def _body(refs, *, group, scale, exact, normalize, bounded):
    b, n, h = (lax.axis_index(name) for name in ("b", "n", "h"))
    rows, keep = pl.ds(n * CHUNK, CHUNK), refs.inverse is not None
    place = b, n, h, rows
    # What the decays are made of, if they are not given.
    decays = refs.sg if refs.coefficients is None else refs.work
    loads = dict(
        q=(refs.q.at[b, rows, h // group], refs.sq),
        k=(refs.k.at[b, rows, h // group], refs.sk),
        decay_operand=(refs.decay_operand.at[b, rows, h], decays),
    )
    fetch(loads, refs.loaded)
    values = (refs.v.at[b, rows, h], refs.sv)
    fetch(dict(v=values, beta=(refs.beta.at[b, h, rows], refs.sbeta)), refs.v_loaded)
    plgpu.barrier_wait(refs.loaded)

    if normalize:
        for i, x in enumerate((refs.sq, refs.sk)):
            factor = _normalize(_tiles(x))
            if refs.norms is not None:
                refs.norms.at[b, h, i, rows][...] = factor
    if refs.coefficients is not None:
        _make_gates(refs, place, bounded)
    if normalize or refs.coefficients is not None:
        plgpu.commit_smem()
    # 1. A and Aq.
    a, aq, number = _scores(refs, exact)
    # The diagonal knows no decay.
    aq = jnp.where(chunks.diagonal(), mosaic.product((refs.sq, refs.sk.T)), aq)
    if keep:
        refs.levels[b, h, n] = number
    plgpu.commit_smem()
    _put(refs.squares.at[0], aq * scale, refs.aq.at[b, h, n])
    if keep:
        _put(refs.squares.at[1], a, refs.a.at[b, h, n])

    _decay(refs, scale, place)
    plgpu.barrier_wait(refs.v_loaded)
    beta = per_column(load(refs.sbeta, PER_COLUMN), CHUNK)
    plgpu.wait_smem_to_gmem(0, wait_read_only=True)

    # 3. M^-1, w and u.
    work = _tiles(refs.work)
    pair = work[:2] if len(work) > 1 else (work[0], refs.squares.at[2])
    inverse = chunks.unit_triangular_inverse(a * beta, pair)
    inverse = inverse.astype(bf16)
    plgpu.commit_smem()  # all warps are done with `work`; with `keep`, `_put` would see to it, too
    if keep:
        _put(refs.squares.at[0], inverse, refs.inverse.at[b, h, n])
    u = mosaic.products([[(inverse, tile)] for tile in _tiles(refs.sv)])
    plgpu.commit_smem()  # all warps are done with v
    for tile, x in zip(_tiles(refs.sv), u, strict=True):
        tile[...] = x.astype(bf16)
    for i in range(0, len(work), 2):
        w = mosaic.products([[(inverse, tile)] for tile in _tiles(refs.sk)[i : i + 2]])
        for tile, x in zip(work[i : i + 2], w, strict=True):
            tile[...] = x.astype(bf16)
    plgpu.commit_smem()
    plgpu.copy_smem_to_gmem(refs.sv, refs.u.at[b, rows, h])
    plgpu.copy_smem_to_gmem(refs.work, refs.w.at[b, rows, h])
    plgpu.wait_smem_to_gmem(0, wait_read_only=True)


def _tiles(ref):
    """A tile's columns, 64 at a time."""
    return [ref.at[:, columns(i)] for i in range(ref.shape[1] // TILE_WIDTH)]


def _make_gates(refs, place, bounded):
    """The decay operand, of the projection in `work`."""
    b, _, h, rows = place
    for i, (tile, f) in enumerate(zip(_tiles(refs.sg), _tiles(refs.work), strict=True)):
        factors = (
            load(refs.coefficients.at[b, j, h, columns(i)], PER_COLUMN, optimized=False)
            for j in range(3)
        )
        factors = [per_column(x, CHUNK) for x in factors]
        tile[...] = gate.decays(load(f), factors, bounded=bounded)
    if refs.gates is not None:
        plgpu.commit_smem()
        plgpu.copy_smem_to_gmem(refs.sg, refs.gates.at[b, rows, h])


def _normalize(tiles):
    """Divides the rows of tiles by their lengths; returns by what they were multiplied."""
    rows = [load(x) for x in tiles]
    factor = lax.rsqrt(over_tiles(jnp.add, [(x * x).sum(axis=1) for x in rows]) + EPSILON)
    for tile, x in zip(tiles, rows, strict=True):
        tile[...] = (x * per_row(factor, TILE_WIDTH)).astype(bf16)
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
    tiles = (_tiles(x) for x in (refs.sq, refs.sk, refs.sg, refs.work))
    for i, (sq, sk, sg, work) in enumerate(zip(*tiles, strict=True)):
        sums = mosaic.products([[(earlier, sg)], [(later, sg)]])
        before, after = (jnp.exp2(x) for x in sums)
        sq[...] = (load(sq) * before * scale).astype(bf16)
        key = load(sk)
        sk[...] = (key * before).astype(bf16)
        work[...] = (key * after).astype(bf16)
        # The sum over the chunk, as a sum along rows: along columns it would cross warps.
        refs.decay.at[b, h, n, columns(i)][...] = jnp.exp2(load(sg.T).sum(axis=1))
    plgpu.commit_smem()
    plgpu.copy_smem_to_gmem(refs.work, refs.kg.at[b, rows, h])
    plgpu.copy_smem_to_gmem(refs.sq, refs.query.at[b, rows, h])


def _scores(refs, exact):
    """1. The decayed products of keys with keys (j < i) and of queries with keys (j <= i).

    Pairs of one block by `jla.pallas.kda.spans`, those further apart level by level of the tree of
    references (see `chunks.level_decay_mask`). A level also writes the pairs of tokens that are
    further apart than its blocks; what it writes there is overwritten by the level that they
    belong to. With `exact`, rows whose own decays inside their block are too strong get their pairs
    by the tree, too, whatever the others do.

    Returns:
      The two, and how many levels inside blocks there were: all or none.
    """
    by_key, by_query, span = _block_scores(refs, exact)

    def level_step(level, scores):
        pairs = functools.partial(chunks.before_half, level)
        return _level_scores(refs, level, pairs, scores)

    scores = lax.fori_loop(spans.LEVELS, LEVELS, level_step, (by_key, by_query))
    if not exact:
        return *scores, jnp.int32(0)
    strong = span < -spans.LONGEST
    number = jnp.where(jnp.min(span) < -spans.LONGEST, jnp.int32(spans.LEVELS), jnp.int32(0))

    def strong_step(level, scores):
        pairs = functools.partial(chunks.level_pairs, level, rows=strong)
        return _level_scores(refs, level, pairs, scores)

    return *lax.fori_loop(0, number, strong_step, scores), number


def _block_scores(refs, exact):
    """The scores of pairs in one block of 16, zeros elsewhere; with `exact` the span of each
    row, else None."""
    mask = spans.so_far()
    span, queries = None, []
    tiles = (_tiles(x) for x in (refs.sq, refs.sk, refs.sg, refs.work))
    for i, (sq, sk, sg, work) in enumerate(zip(*tiles, strict=True)):
        so_far = mosaic.product((mask, sg))
        if exact:
            lowest = so_far.min(axis=1)
            span = lowest if span is None else jnp.minimum(span, lowest)
        # Where none is too strong, none has to be kept finite.
        written = spans.writes(so_far) if exact else jnp.exp2(-so_far)
        work[...] = (load(sk) * written).astype(bf16)
        reader = spans.reads(so_far).astype(bf16)
        refs.squares.at[i][...] = plgpu.load(sk, layout=WGMMA_LAYOUT) * reader
        queries.append(plgpu.load(sq, layout=WGMMA_LAYOUT) * reader)
    plgpu.commit_smem()
    written = _tiles(refs.work)
    by_query = mosaic.product(*((x, y.T) for x, y in zip(queries, written, strict=True)))
    pairs = spans.are_pairs()
    by_key = mosaic.product(*((refs.squares.at[i], x.T) for i, x in enumerate(written)))
    by_key = jnp.where(pairs, by_key, 0.0)
    return by_key, jnp.where(pairs, by_query, 0.0), span


def _level_scores(refs, level, pairs, scores):
    """The scores with those of the level's pairs, which the mask `pairs()` names."""
    mask = spans.level_decays(level)
    plgpu.commit_smem()  # all warps are done with the products of the level before
    queries = []
    tiles = (_tiles(x) for x in (refs.sq, refs.sk, refs.sg, refs.work))
    for sq, sk, sg, work in zip(*tiles, strict=True):
        decay = chunks.decays(mask, sg).astype(bf16)
        work[...] = plgpu.load(sk, layout=WGMMA_LAYOUT) * decay
        queries.append(plgpu.load(sq, layout=WGMMA_LAYOUT) * decay)
    plgpu.commit_smem()
    by_key, by_query = scores
    pairs = pairs()
    by_key = jnp.where(pairs, mosaic.product((refs.work, refs.work.T)), by_key)
    keys = _tiles(refs.work)
    product = mosaic.product(*((x, y.T) for x, y in zip(queries, keys, strict=True)))
    return by_key, jnp.where(pairs, product, by_query)
