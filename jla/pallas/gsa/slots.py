"""What Gated Slot Attention does inside one chunk of 64 tokens, in one warpgroup.

Both of its passes, and their gradients, are parts of one form: for tokens j <= i and slots m,

    A[i, j] = sum_m w_i[m] s_j[m] exp(G_i - G_j)[m]

The slots' side *reads* row i of (x_i . y_j) through s and the decays: the logits, with queries and
keys, and the gradient of p, with those of the outputs and values. The tokens' side takes A as
*scores*: of the outputs, with w = p, and of the queries' gradient, with w that of the logits.

Decays follow the tree of `chunks.level_decay_mask`. At a level a token either reads or is read, so
one tile a level has all that the level needs: the rows of tokens that read hold their decays, those
of the others their decayed writes.

Tiles are [64, 64]; where a slot axis has more, they come in lists.
"""

import jax.numpy as jnp
from jax import lax
from jax.experimental.pallas import mosaic_gpu as plgpu

from jla.pallas.common import chunks, mosaic
from jla.pallas.common.chunks import LEVELS, TILE_WIDTH
from jla.pallas.common.mosaic import WGMMA_LAYOUT, bf16, f16, load, per_row, product
from jla.pallas.common.scratch import barrier_for, fetch_each
from jla.pallas.common.tiles import columns, over_tiles, row_sum, smem_tiles

PART = 128  # features that SMEM holds at once


def parts(features):
    """How many parts the features are worked on in, and how many tiles a part has."""
    width = min(features, PART)
    return features // width, width // TILE_WIDTH


def near_scratch(m_tiles):
    """What both kernels that read slots have in SMEM of the chunk's own tokens."""
    return dict(
        levels=smem_tiles(m_tiles, LEVELS),  # see `put_level_tiles`
        ss=smem_tiles(m_tiles),
        sg=smem_tiles(m_tiles, dtype=f16),  # of `decay_operand`
        near=barrier_for(dict(decay_operand=m_tiles, s=m_tiles)),
    )


def fetch_near(refs, place):
    """Starts to load s and `decay_operand`; place: the batch row, the tokens and the head."""

    def copies():
        for m, (s, g) in enumerate(zip(refs.ss, refs.sg, strict=True)):
            yield refs.decay_operand.at[*place, columns(m)], g
            yield refs.s.at[*place, columns(m)], s

    fetch_each(copies(), refs.near)


def put_level_tiles(levels, writes, log_decays):
    """Makes the levels' tiles, [6, 64, 64] of each slot tile, from its writes and log decays."""

    def level_step(level, carry):
        mask = chunks.mask_operand(chunks.level_decay_mask(level))
        reads = chunks.level_reads(level, bf16)
        is_read = per_row(1 - reads, TILE_WIDTH)
        reads = per_row(reads, TILE_WIDTH)
        for tiles, s, g in zip(levels, writes, log_decays, strict=True):
            decay = chunks.decays(mask, g).astype(bf16)
            tiles.at[level][...] = decay * (plgpu.load(s, layout=WGMMA_LAYOUT) * is_read + reads)
        return carry

    lax.fori_loop(0, LEVELS, level_step, None)
    plgpu.commit_smem()


def products(fetch, loaded, parts, rows, keys, states):
    """x_i . y_j, and x_i . X for each slot tile, over all features.

    Args:
      fetch: part to nothing; starts to load it to the tiles. The first is on its way.
      loaded: its barrier.
      rows, keys: tiles of x and y. states: by features, of each slot tile.
    """
    scores, reads = None, [None] * len(states[0])
    for part in range(parts):
        if part:
            plgpu.commit_smem()
            fetch(part)
        plgpu.barrier_wait(loaded)
        scores = product(*((x, y.T) for x, y in zip(rows, keys, strict=True)), init=scores)
        reads = [
            product(*((x, state[m]) for x, state in zip(rows, states, strict=True)), init=init)
            for m, init in enumerate(reads)
        ]
    return scores, reads


def read(scores, reads, levels, writes):
    """Adds what the chunk's own tokens give: sum_j scores[i, j] s_j exp(G_i - G_j), j <= i.

    Args:
      scores: [64, 64] float32. reads: what is to be added to, float32, of each slot tile.
      levels, writes: as in `put_level_tiles`.
    """
    own = jnp.where(chunks.diagonal(), scores, 0.0).astype(bf16)
    reads = tuple(product((own, s), init=x) for x, s in zip(reads, writes, strict=True))

    def level_step(level, reads):
        pairs = jnp.where(chunks.level_pairs(level), scores, 0.0).astype(bf16)
        return tuple(
            x + load(tiles.at[level]) * product((pairs, tiles.at[level]))
            for x, tiles in zip(reads, levels, strict=True)
        )

    return lax.fori_loop(0, LEVELS, level_step, reads)


def scores(w, levels, writes):
    """A, [64, 64] float32, from w, bf16 values of each slot tile.

    A level also writes the pairs of tokens that are further apart than its blocks, and what it
    writes there is overwritten by the level that they belong to; what j > i holds is zero.
    """
    own = product(*((x, s.T) for x, s in zip(w, writes, strict=True)))
    own = jnp.where(chunks.diagonal(), own, 0.0)

    def level_step(level, scores):
        pairs = (
            (x * plgpu.load(tiles.at[level], layout=WGMMA_LAYOUT), tiles.at[level].T)
            for x, tiles in zip(w, levels, strict=True)
        )
        return jnp.where(chunks.before_half(level), product(*pairs), scores)

    return lax.fori_loop(0, LEVELS, level_step, own)


def softmax(logits, slots):
    """Softmax over the first `slots` columns of the tiles; zero in the others."""
    if slots < TILE_WIDTH * len(logits):
        rest = slots - TILE_WIDTH * (len(logits) - 1)  # all padding is in the last tile
        row = chunks.tokens()
        some = mosaic.in_interval(jnp.zeros_like(row), jnp.full_like(row, rest), TILE_WIDTH)
        logits = [*logits[:-1], jnp.where(some, logits[-1], -jnp.inf)]
    largest = over_tiles(jnp.maximum, [jnp.max(x, axis=1) for x in logits])
    p = [jnp.exp2((x - per_row(largest, TILE_WIDTH)) * chunks.LOG2E) for x in logits]
    total = per_row(1.0 / row_sum(p), TILE_WIDTH)
    return [x * total for x in p]
