"""What Gated Slot Attention does inside one chunk of 64 tokens, in one warpgroup.

Both of its passes, and their gradients, are parts of one form: for tokens j <= i and slots m,

    A[i, j] = sum_m w_i[m] s_j[m] exp(G_i - G_j)[m]

The slots' side *reads* row i of (x_i . y_j) through s and the decays: the logits, with queries and
keys, and the gradient of p, with those of the outputs and values. The tokens' side takes A as
*scores*: of the outputs, with w = p, and of the queries' gradient, with w that of the logits.

The chunk is one of `blocks`: a near row takes exp(G_i) times the decayed writes s_j exp(-G_j), one
product for each side. Far rows go level by level through the tree of `chunks.level_decay_mask`. At
a level a token either reads or is read, so one tile has all that the level needs: the rows of
tokens that read hold their decays, those of the others their decayed writes.

Tiles are [64, 64]; where a slot axis has more, they come in lists.
"""

import collections

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental.pallas import mosaic_gpu as plgpu

from jla.pallas.common import blocks, chunks, mosaic
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
        ss=smem_tiles(m_tiles),
        sg=smem_tiles(m_tiles, dtype=f16),  # of `decay_operand`
        writes=smem_tiles(m_tiles),  # s exp(-G)
        lowest=blocks.lowest_of_blocks(),
        near=barrier_for(dict(decay_operand=m_tiles, s=m_tiles)),
    )


def fetch_near(refs, place):
    """Starts to load s and `decay_operand`; place: the batch row, the tokens and the head."""

    def copies():
        for m, (s, g) in enumerate(zip(refs.ss, refs.sg, strict=True)):
            yield refs.decay_operand.at[*place, columns(m)], g
            yield refs.s.at[*place, columns(m)], s

    fetch_each(copies(), refs.near)


# exp(G) of each slot tile, which rows are near, and whether the others are any.
Decays = collections.namedtuple("Decays", "before near some_far")


def put_writes(refs):
    """Awaits s and the log decays, puts the decayed writes, and returns the `Decays`."""
    plgpu.barrier_wait(refs.near)
    so_far = [blocks.decays_so_far(g) for g in refs.sg]
    for tile, s, x in zip(refs.writes, refs.ss, so_far, strict=True):
        tile[...] = (load(s) * blocks.writes(x)).astype(bf16)
    lowest = blocks.lowest(so_far)
    far = blocks.some_far(lowest, refs.lowest)  # commits the writes, too
    return Decays([blocks.reads(x) for x in so_far], blocks.near(lowest), far)


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


def read(scores, reads, decays, refs, work):
    """What tokens read of the state before the chunk and of the chunk's own tokens:

        exp(G_i) reads_i + sum_j scores[i, j] s_j exp(G_i - G_j),   j <= i

    Args:
      scores: [64, 64] float32. reads: float32, of each slot tile.
      decays: from `put_writes`. work: an SMEM tile that far rows take.
    """
    scores = scores.astype(bf16)
    earlier = scores * blocks.up_to(bf16, rows=decays.near)
    reads = tuple(
        before * product((earlier, tile), init=x)
        for before, tile, x in zip(decays.before, refs.writes, reads, strict=True)
    )

    def with_far():
        far = scores * _far_rows(decays)
        tiles = zip(reads, refs.ss, refs.sg, strict=True)
        return tuple(_read_exactly(far, x, s, g, work) for x, s, g in tiles)

    return lax.cond(decays.some_far, with_far, lambda: reads)


def scores(w, decayed, decays, refs, work):
    """A, [64, 64] bf16, from w and w exp(G), bf16 values of each slot tile.

    decays, work: as `read` takes them.
    """
    total = product(*((x, tile.T) for x, tile in zip(decayed, refs.writes, strict=True)))
    near = total.astype(bf16) * blocks.up_to(bf16, rows=decays.near)

    def with_far():
        far = _far_rows(decays)
        plgpu.wait_smem_to_gmem(0, wait_read_only=True)  # `work` may be on its way out
        return near + scores_exactly([x * far for x in w], refs.ss, refs.sg, work)

    return lax.cond(decays.some_far, with_far, lambda: near)


def _far_rows(decays):
    """[i, m]: 1.0 in far rows, 0.0 in near ones."""
    return per_row(jnp.where(decays.near, 0.0, 1.0).astype(bf16), TILE_WIDTH)


def put_level(level, s, g, work):
    """Makes a level's tile of one slot tile, from its writes and log decays."""
    decay = blocks.level_decays(level, g).astype(bf16)
    reads = chunks.level_reads(level, bf16)
    is_read, reads = (per_row(x, TILE_WIDTH) for x in (1 - reads, reads))
    plgpu.commit_smem()  # all warps are done with the level before
    work[...] = decay * (plgpu.load(s, layout=WGMMA_LAYOUT) * is_read + reads)
    plgpu.commit_smem()


def _read_exactly(scores, reads, s, g, work):
    """Adds sum_j scores[i, j] s_j exp(G_i - G_j), j <= i, to `reads`, of one slot tile."""

    def level_step(level, reads):
        put_level(level, s, g, work)
        pairs = scores * blocks.level_pairs(level, bf16)
        return reads + load(work) * product((pairs, work))

    own = scores * blocks.diagonal(bf16)
    reads = lax.fori_loop(0, LEVELS, level_step, product((own, s), init=reads))
    plgpu.commit_smem()
    return reads


def scores_exactly(w, writes, log_decays, work):
    """A, [64, 64] bf16, from w, bf16 values of each slot tile, or SMEM tiles of them.

    A level also writes the pairs of tokens that are further apart than its blocks, and what it
    writes there is overwritten by the level that they belong to; what j > i holds is zero.
    """

    def of_tile(w, s, g):
        def level_step(level, scores):
            put_level(level, s, g, work)
            rows = _value(w) * plgpu.load(work, layout=WGMMA_LAYOUT)
            earlier = blocks.before_half(level, bf16)
            return product((rows, work.T)).astype(bf16) * earlier + scores * (1 - earlier)

        own = product((w, s.T)).astype(bf16) * blocks.diagonal(bf16)
        return lax.fori_loop(0, LEVELS, level_step, own)

    tiles = zip(w, writes, log_decays, strict=True)
    return over_tiles(jnp.add, [of_tile(*x) for x in tiles])


def _value(x):
    return x if isinstance(x, jax.Array) else plgpu.load(x, layout=WGMMA_LAYOUT)


def softmax(x, scale, slots):
    """Softmax of scale x over the first `slots` columns of the tiles; zero in the others."""
    worst, extreme = (-jnp.inf, jnp.max) if scale >= 0 else (jnp.inf, jnp.min)
    if slots < TILE_WIDTH * len(x):
        rest = slots - TILE_WIDTH * (len(x) - 1)  # all padding is in the last tile
        row = chunks.tokens()
        some = mosaic.in_interval(jnp.zeros_like(row), jnp.full_like(row, rest), TILE_WIDTH)
        x = [*x[:-1], jnp.where(some, x[-1], worst)]
    larger = jnp.maximum if scale >= 0 else jnp.minimum
    largest = per_row(over_tiles(larger, [extreme(tile, axis=1) for tile in x]), TILE_WIDTH)
    p = [jnp.exp2((tile - largest) * (scale * chunks.LOG2E)) for tile in x]
    total = per_row(1.0 / row_sum(p), TILE_WIDTH)
    return [x * total for x in p]
