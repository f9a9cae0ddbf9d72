"""The gradients of a chunk's queries, keys and log decays, shared by both backward kernels.

Equations are numbered as in `backward.chunk_gradients`. The kernels' `refs` have, by these names,
tiles in SMEM, of K or of the CTA's part of it:

    sq, sk [64, K]: q and k, to be replaced by dq and dk
    sdo, sdv, written [64, V]: do, dv and beta E;   ss, sds [V, K]: S and dS transposed
    saq, sa [64, 64]: to be filled with dAq and dA;   read_keys, write_keys [64, K]: to work in
"""

import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from jla.pallas.common import chunks, mosaic
from jla.pallas.common.chunks import CHUNK, LEVELS, TILE_WIDTH
from jla.pallas.common.mosaic import PER_COLUMN, WGMMA_LAYOUT, bf16, load, per_column, per_row


def gradients_of_keys(
    refs, tiles, earlier, later, decay_ref, dg_ref, wg, meet, *, scale, warpgroups
):  # fmt: skip
    """Turns the SMEM tiles of queries and keys into dq and dk, and stores dg: equations 3 to 7.

    Args:
      refs: see above.
      tiles: this warpgroup's columns of q and k, 64 at a time, and their tiles of `decay_operand`.
      earlier, later: the masks of the decays from the chunk's start and to its end.
      decay_ref, dg_ref: of this chunk and of the columns that `tiles` counts from.
      wg: this warpgroup's number. meet: awaits the other one.
    """
    _score_gradients(refs, wg, scale, warpgroups)
    meet()
    for s, tile in tiles:
        # 4. Through the states; what the border needs comes before the tree, for registers.
        before = chunks.decays(earlier, tile)
        dq = mosaic.product((refs.sdo, refs.ss.at[:, s])) * before * scale
        dk_read = -mosaic.product((refs.sdv, refs.ss.at[:, s])) * before
        after = chunks.decays(later, tile)
        dk_write = mosaic.product((refs.written, refs.sds.at[:, s])) * after
        dg_ref.at[:, s][...] = _border(refs, s, decay_ref, dk_write)
        # 5. Through the scores.
        gradients = dq, dk_read + dk_write, dk_read
        dq, dk, dk_signed = _through_scores(refs, s, tile, gradients)
        # 6. dG and its reversed cumsum.
        queries, keys = load(refs.sq.at[:, s]), load(refs.sk.at[:, s])
        cumulated = queries * dq + keys * dk_signed
        onwards = chunks.mask_operand(chunks.from_on(), bf16)
        dg = _row_sums(refs, onwards, cumulated, s)
        dg_ref.at[:, s][...] = dg + load(dg_ref.at[:, s], optimized=False)
        # The scores' diagonal, which knows no decay.
        diagonal = jnp.where(chunks.diagonal(), load(refs.saq), 0.0).sum(axis=1)
        diagonal = per_row(diagonal, TILE_WIDTH)
        refs.sq.at[:, s][...] = (dq + diagonal * keys).astype(bf16)
        refs.sk.at[:, s][...] = (dk + diagonal * queries).astype(bf16)


def _score_gradients(refs, wg, scale, warpgroups):
    """Equation 3, dAq and dA, each with its transpose.

    Their products span all of V: with two warpgroups each makes one.
    """

    def of_queries():
        gradient = mosaic.product((refs.sdo, refs.written.T)) * scale
        _store_symmetric(refs.saq, gradient, chunks.up_to())

    def of_keys():
        gradient = -mosaic.product((refs.sdv, refs.written.T))
        _store_symmetric(refs.sa, gradient, chunks.up_to(strict=True))

    if warpgroups > 1:
        pl.when(wg == 0)(of_queries)
        pl.when(wg == 1)(of_keys)
    else:
        of_queries()
        of_keys()


def _store_symmetric(ref, gradient, mask):
    """Stores a score gradient for both of its uses: by the reader, and by what is read."""
    gradient = jnp.where(mask, gradient, 0.0)
    ref[...] = gradient.astype(bf16)
    plgpu.commit_smem()
    both = jnp.where(mask, gradient, load(ref.T))
    ref[...] = both.astype(bf16)


def _border(refs, s, decay_ref, dk_write):
    """7. The border's term of dg: for all tokens what their chunk carries out, and for each what
    its predecessors write."""
    carried = None
    for r in range(refs.ss.shape[0] // TILE_WIDTH):
        part = pl.ds(r * TILE_WIDTH, TILE_WIDTH)
        change = load(refs.ss.at[part, s]) * load(refs.sds.at[part, s])
        carried = change if carried is None else carried + change
    decay = load(decay_ref.at[s], PER_COLUMN, optimized=False)
    carried *= per_column(decay, CHUNK)
    border = _row_sums(refs, chunks.mask_operand(chunks.everywhere(), bf16), carried, s)
    before_each = chunks.mask_operand(chunks.up_to(strict=True), bf16)
    return border + _row_sums(refs, before_each, load(refs.sk.at[:, s]) * dk_write, s)


def _row_sums(refs, mask, x, s):
    """mask @ x for a float32 tile, through the two work tiles' columns s.

    Sums over rows go through wgmma: Mosaic's own use one scratch for all warpgroups, and race.
    """
    high, low = refs.read_keys.at[:, s], refs.write_keys.at[:, s]
    high[...], low[...] = mosaic.split(x)
    plgpu.commit_smem()
    return mosaic.product((mask, high), (mask, low))


def _through_scores(refs, s, log_decays, gradients):
    """5. Adds what reaches one tile of dq and dk through the scores, level by level.

    At a level a token either reads (right half) or is read (left half), with the same decay. So a
    key's gradient is that decay times (D + D^T) Y + Dq^T X, with D and Dq the score gradients of
    the level's pairs, and counts for the decays with + where it reads and with - where it is read.

    Args:
      refs: saq and sa hold Dq and D, each with its transpose. s: the tile's columns.
      log_decays: its tile of `decay_operand`.
      gradients: dq, dk and dk_signed, to be added to; dk_signed is dk with the sign of the role.
    """
    sq, sk = refs.sq.at[:, s], refs.sk.at[:, s]
    sx, sy = refs.read_keys.at[:, s], refs.write_keys.at[:, s]

    def masked(ref, mask):
        return jnp.where(mask, load(ref), 0.0).astype(bf16)

    def level_step(level, gradients):
        dq, dk, dk_signed = gradients
        decay = chunks.decays(chunks.mask_operand(chunks.level_decay_mask(level)), log_decays)
        rounded = decay.astype(bf16)
        sx[...] = plgpu.load(sq, layout=WGMMA_LAYOUT) * rounded
        sy[...] = plgpu.load(sk, layout=WGMMA_LAYOUT) * rounded
        plgpu.commit_smem()
        by_query = masked(refs.saq, chunks.level_pairs(level))
        dq += decay * mosaic.product((by_query, sy))
        by_key = masked(refs.sa, chunks.level_pairs(level, symmetric=True))
        from_query = masked(refs.saq, chunks.level_pairs(level, reverse=True))
        change = decay * mosaic.product((by_key, sy), (from_query, sx))
        sign = per_row(chunks.level_roles(level), TILE_WIDTH)
        return dq, dk + change, dk_signed + sign * change

    return lax.fori_loop(0, LEVELS, level_step, gradients)
