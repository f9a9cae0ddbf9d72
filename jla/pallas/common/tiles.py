"""Tiles of 64 tokens by 64 features in shared memory (SMEM), and values over lists of them."""

import jax.numpy as jnp
from jax.experimental import pallas as pl

from jla.pallas.common import mosaic
from jla.pallas.common.chunks import CHUNK, TILE_WIDTH
from jla.pallas.common.mosaic import bf16

# The least that anything is divided by, so that rows of zeros stay finite.
SMALLEST = 1e-30
LARGEST = 8192  # elements of a state that a step works on at once: 64 registers a thread


def columns(tile):
    """The features or slots of a tile."""
    return pl.ds(tile * TILE_WIDTH, TILE_WIDTH)


def smem_tiles(count, *leading, dtype=bf16):
    """SMEM tiles, each a ref of its own: a product with `init` takes no constant index into one."""
    return [mosaic.tile(CHUNK, TILE_WIDTH, *leading, dtype=dtype) for _ in range(count)]


def row_sum(tiles):
    """The sum over all columns of the tiles."""
    return over_tiles(jnp.add, [jnp.sum(x, axis=1) for x in tiles])


def over_tiles(function, vectors):
    """`function` of the tiles' vectors, pair by pair."""
    first, *rest = vectors
    for x in rest:
        first = function(first, x)
    return first


def step_width(rows, columns):
    """Columns of a tile of a step's state: the most that divide them and keep the tile small."""
    widths = (w for w in (16, 32, 64, 128) if columns % w == 0)
    return max(w for w in widths if w == 16 or rows * w <= LARGEST)
