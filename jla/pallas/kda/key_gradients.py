"""The gradients of a chunk's queries, keys and log decays, shared by both backward kernels.

Equations are numbered as in `backward.chunk_gradients`. The kernels' `refs` have, by these names,
tiles in SMEM, of K or of the CTA's part of it:

    sq, sk [64, K]: q and k, to be replaced by dq and dk
    sdo, sdv, written [64, V]: do, dv and beta E;   ss, sds [V, K]: S and dS transposed
    saq, sa [64, 64]: to be filled with dAq and dA
    aq_block, a_block [64, 64], read_keys, write_keys [64, K]: to work in
"""

import functools

import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from jla.pallas.common import blocks, chunks, mosaic
from jla.pallas.common.chunks import CHUNK, LEVELS, TILE_WIDTH
from jla.pallas.common.mosaic import (
    PER_COLUMN,
    PER_ROW,
    WGMMA_LAYOUT,
    bf16,
    f16,
    load,
    per_column,
    per_row,
)
from jla.pallas.kda import spans


def gradients_of_keys(
    refs, tiles, decay_ref, dg_ref, wg, meet, number, factors=None, *, scale, warpgroups
):  # fmt: skip
    """Turns the SMEM tiles of queries and keys into dq and dk, and stores dg: equations 3 to 7.

    Args:
      refs: see above.
      tiles: this warpgroup's columns of q and k, 64 at a time, and their tiles of `decay_operand`.
      decay_ref, dg_ref: of this chunk and of the columns that `tiles` counts from.
      wg: this warpgroup's number. meet: awaits the other one.
      number: how many levels of scores there are inside blocks, see `prepare`.
      factors: by what q and k, rows of one tile of each warpgroup, have been multiplied to be
        normalised, or None.
    """
    _score_gradients(refs, wg, scale, warpgroups)
    meet()
    for s, tile in tiles:
        # 7. What the chunk carries out, and 4., through the states: what the border needs first.
        border = _carried(refs, s, decay_ref)
        after = chunks.decays(blocks.from_on(f16, strict=True), tile)
        dk_write = mosaic.product((refs.written, refs.sds.at[:, s])) * after
        before_each = blocks.up_to(bf16, strict=True)
        border += _row_sums(refs, before_each, load(refs.sk.at[:, s]) * dk_write, s)
        dg_ref.at[:, s][...] = border
        before = chunks.decays(blocks.up_to(f16), tile)
        dq = mosaic.product((refs.sdo, refs.ss.at[:, s])) * before * scale
        less = mosaic.product((refs.sdv, refs.ss.at[:, s])) * before  # -dk_read
        # 5. Through the scores.
        cumulated = load(refs.sq.at[:, s]) * dq - load(refs.sk.at[:, s]) * less
        gradients = dq, dk_write - less, cumulated
        dq, dk, cumulated = _through_scores(refs, s, tile, number, gradients)
        # 6. The reversed cumsum of dG.
        queries, keys = load(refs.sq.at[:, s]), load(refs.sk.at[:, s])
        onwards = blocks.from_on(bf16)
        dg = _row_sums(refs, onwards, cumulated, s)
        dg_ref.at[:, s][...] = dg + load(dg_ref.at[:, s], optimized=False)
        # The scores' diagonal, which knows no decay.
        diagonal = 0.5 * jnp.where(chunks.diagonal(), load(refs.saq), 0.0).sum(axis=1)
        diagonal = per_row(diagonal, TILE_WIDTH)
        made = (queries, dq + diagonal * keys), (keys, dk + diagonal * queries)
        if factors is not None:
            made = list(_of_raw(made, factors, refs.dots, wg, meet))
        for ref, (_, gradient) in zip((refs.sq, refs.sk), made, strict=True):
            ref.at[:, s][...] = gradient.astype(bf16)


def _of_raw(made, factors, dots, wg, meet):
    """The gradients of what was normalised: with r the factor, r (dx - x sum(x dx)).

    The sums are over the columns of all warpgroups.
    """
    for i, (x, gradient) in enumerate(made):
        dots.at[wg, i][...] = (x * gradient).sum(axis=1)
    meet()
    for i, (x, gradient) in enumerate(made):
        dot = load(dots.at[0, i], PER_ROW, optimized=False)
        for other in range(1, dots.shape[0]):
            dot += load(dots.at[other, i], PER_ROW, optimized=False)
        dot, factor = (per_row(y, TILE_WIDTH) for y in (dot, factors[i]))
        yield x, (gradient - x * dot) * factor


def _score_gradients(refs, wg, scale, warpgroups):
    """Equation 3, dAq and dA, each with its transpose.

    Their products span all of V: with two warpgroups each makes one.
    """

    def of_queries():
        gradient = mosaic.product((refs.sdo, refs.written.T)) * scale
        _store_symmetric(refs.saq, refs.aq_block, gradient, blocks.up_to(bf16))

    def of_keys():
        gradient = -mosaic.product((refs.sdv, refs.written.T))
        _store_symmetric(refs.sa, refs.a_block, gradient, blocks.up_to(bf16, strict=True))

    if warpgroups > 1:
        pl.when(wg == 0)(of_queries)
        pl.when(wg == 1)(of_keys)
    else:
        of_queries()
        of_keys()


def _store_symmetric(ref, block, gradient, mask):
    """Stores a score gradient for both of its uses, by the reader and by what is read: with its
    transpose, so that the diagonal is there twice. And that of pairs of one block by itself."""
    gradient = gradient.astype(bf16)
    block[...] = gradient * spans.pairs(bf16)
    gradient *= mask
    ref[...] = gradient
    plgpu.commit_smem()
    ref[...] = gradient + plgpu.load(ref.T, layout=WGMMA_LAYOUT)


def _carried(refs, s, decay_ref):
    """7. Of the border's term of dg what the chunk carries out, for all tokens alike."""
    carried = None
    for r in range(refs.ss.shape[0] // TILE_WIDTH):
        part = pl.ds(r * TILE_WIDTH, TILE_WIDTH)
        change = load(refs.ss.at[part, s]) * load(refs.sds.at[part, s])
        carried = change if carried is None else carried + change
    decay = load(decay_ref.at[s], PER_COLUMN, optimized=False)
    carried *= per_column(decay, CHUNK)
    return _row_sums(
        refs,
        spans.everywhere(bf16),
        carried,
        s,
    )


def _row_sums(refs, mask, x, s):
    """mask @ x for a float32 tile, through the two work tiles' columns s.

    Sums over rows go through wgmma: Mosaic's own use one scratch for all warpgroups, and race.
    """
    high, low = refs.read_keys.at[:, s], refs.write_keys.at[:, s]
    high[...], low[...] = mosaic.split(x)
    plgpu.commit_smem()
    return mosaic.product((mask, high), (mask, low))


def _through_scores(refs, s, log_decays, number, gradients):
    """5. Adds what reaches one tile of dq and dk through the scores.

    Pairs of one block by `spans`, unless `number` says that decays are too strong;
    those further apart, or then all, level by level. The products that make a gradient of q or k
    also make its share of dG, with the very operands that stand for q and k in the others: what two
    tokens of a pair give to the decays before both then cancels to the last digit.

    Args:
      refs: saq and sa hold Dq and D, each with its transpose. s: the tile's columns.
      log_decays: its tile of `decay_operand`.
      number: how many levels there are inside blocks.
      gradients: dq, dk and dG, to be added to.
    """
    block = functools.partial(_through_block, refs, s, log_decays)
    level = functools.partial(_through_level, refs, s, log_decays)
    gradients = lax.fori_loop(0, 1 - jnp.minimum(number, 1), block, gradients)
    return lax.fori_loop(spans.LEVELS - number, LEVELS, level, gradients)


def _masked(ref, mask):
    return plgpu.load(ref, layout=WGMMA_LAYOUT) * mask


def _through_block(refs, s, log_decays, _, gradients):
    """With X and Y the decayed readers and W the decayed keys that are read, D and Dq the score
    gradients of the block's pairs: Dq W is the gradient of X, D W of Y, D^T Y + Dq^T X of W."""
    dq, dk, cumulated = gradients
    sx, sy = refs.read_keys.at[:, s], refs.write_keys.at[:, s]
    sw = refs.ss.at[pl.ds(0, CHUNK), s]  # the state has been used
    so_far = mosaic.product((spans.so_far(), log_decays))
    reading, written = spans.reads(so_far), spans.writes(so_far)
    keys = load(refs.sk.at[:, s])
    sx[...] = (load(refs.sq.at[:, s]) * reading).astype(bf16)
    sy[...] = (keys * reading).astype(bf16)
    sw[...] = (keys * written).astype(bf16)
    plgpu.commit_smem()
    change = mosaic.product((refs.aq_block, sw))
    dq += reading * change
    cumulated += load(sx) * change
    change = mosaic.product((refs.a_block, sw))
    dk += reading * change
    cumulated += load(sy) * change
    change = mosaic.product((refs.a_block.T, sy), (refs.aq_block.T, sx))
    root = lax.rsqrt(reading)  # of `written`, which would take registers through all products
    return dq, dk + root * root * change, cumulated - load(sw) * change


def _through_level(refs, s, log_decays, level, gradients):
    """At a level a token either reads (right half) or is read (left half), with the same decay. So
    a key's gradient is that decay times (D + D^T) Y + Dq^T X, with D and Dq the score gradients of
    the level's pairs, and counts for the decays with + where it reads and with - where it is read.
    """
    dq, dk, cumulated = gradients
    sx, sy = refs.read_keys.at[:, s], refs.write_keys.at[:, s]
    decay = chunks.decays(spans.level_decays(level), log_decays)
    rounded = decay.astype(bf16)
    sx[...] = plgpu.load(refs.sq.at[:, s], layout=WGMMA_LAYOUT) * rounded
    sy[...] = plgpu.load(refs.sk.at[:, s], layout=WGMMA_LAYOUT) * rounded
    plgpu.commit_smem()
    change = mosaic.product((_masked(refs.saq, blocks.level_pairs(level, bf16)), sy))
    dq += decay * change
    cumulated += load(sx) * change
    by_key = _masked(refs.sa, spans.level_pairs(level, symmetric=True))
    from_query = _masked(refs.saq, spans.level_pairs(level, symmetric=False))
    change = mosaic.product((by_key, sy), (from_query, sx))
    dk += decay * change
    sign = per_row(chunks.level_roles(level), TILE_WIDTH)
    return dq, dk, cumulated + sign * (load(sy) * change)
