"""A leaf's matrices in SMEM among four warpgroups, for `leaf_gradients`.

A leaf is 128 tokens: two chunks of 64. Its matrices are 64 x 64 tiles, of two kinds:

    [tokens, features]   tile (row, features) at [row * k_tiles + features]; k_tiles is 1 or 2
    [tokens, tokens]     lower triangles: blocks 00, 10 and 11 of (row, column), at [row + column]

There is a warpgroup for each row and each column of chunks. It works on the tile or the block of
this number, if there is one: block 01 is not, nor are a second 64 of 64 features.

Sums of products are float32. What waits in registers for a later phase is float16, two in one
register; see `packed`.
"""

import dataclasses
import functools
from typing import Any

import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from jla.pallas.common import chunks, mosaic
from jla.pallas.common.chunks import CHUNK
from jla.pallas.common.mosaic import WGMMA_LAYOUT, f16, f32, product

ROWS = 2  # of chunks in a leaf
BLOCKS = 3  # of a triangle
WARPGROUPS = 4


@dataclasses.dataclass(frozen=True)
class Place:
    """A warpgroup's row of chunks, its column of chunks, and its column of features.

    The column of features is one that exists, whether it is the warpgroup's or not.
    """

    row: Any
    column: Any
    features: Any
    k_tiles: int


def here(wg, zeros, k_tiles):
    """The warpgroup's place.

    By a number that no compiler sees through, for `zeros` is SMEM: else the descriptors of all
    tiles are made once, for which there are no registers.
    """
    me = wg + zeros[wg]
    row, column = lax.shift_right_logical(me, 1), lax.bitwise_and(me, 1)
    return Place(row, column, jnp.minimum(column, k_tiles - 1), k_tiles)


# What a warpgroup does only if it has a block, or a tile of features.


def when_block(at, f):
    """Calls f() where the warpgroup has a block of the triangle."""
    pl.when(at.column <= at.row)(f)


def when_tile(at, f):
    """Calls f() where the warpgroup has a tile of features."""
    f() if at.k_tiles == 2 else pl.when(at.column < at.k_tiles)(f)


def in_block(at, f):
    """f(), packed, where the warpgroup has a block of the triangle, else zeros."""
    value = lax.cond(at.column <= at.row, lambda: packed(f()), nothing)
    return lax.optimization_barrier(value)


def in_tile(at, f):
    """f() where the warpgroup has a tile of features, else zeros; float16."""
    return f() if at.k_tiles == 2 else lax.cond(at.column < at.k_tiles, f, nothing)


def nothing():
    """A tile of zeros."""
    return plgpu.layout_cast(jnp.zeros((CHUNK, CHUNK), f16), WGMMA_LAYOUT)


# Access: tiles and blocks.


def tile_of(x, row, features):
    """A tile of 64 tokens by 64 features."""
    k_tiles = x.shape[0] // ROWS
    return x.at[row * k_tiles + features]


def own_tile(at, x):
    """The warpgroup's tile."""
    return tile_of(x, at.row, at.features)


def own_block(at, triangle):
    """The warpgroup's block."""
    return triangle.at[at.row + at.column]


def put(at, target, value):
    """Stores the warpgroup's tile, if it has one."""

    def store():
        own_tile(at, target)[...] = value

    when_tile(at, store)


def put_block(at, target, value):
    """Stores the warpgroup's block, if it has one."""

    def store():
        own_block(at, target)[...] = value

    when_block(at, store)


def fetch_tile(at, source, target, barrier):
    """Starts the load of the warpgroup's tile, if it has one; source(columns): where it is."""
    columns = pl.ds(at.features * CHUNK, CHUNK)
    source = source(columns)
    when_tile(at, functools.partial(plgpu.copy_gmem_to_smem, source, own_tile(at, target), barrier))


def send_tile(at, value, staging, target):
    """Stores the warpgroup's tile to GMEM, if it has one; target(columns): to where."""

    def copy():
        tile = own_tile(at, staging)
        tile[...] = value
        plgpu.commit_smem()
        columns = pl.ds(at.features * CHUNK, CHUNK)
        plgpu.copy_smem_to_gmem(tile, target(columns))

    when_tile(at, copy)


# Products. Those with a triangle run over one or two chunks, by (start, stop, the pair m).


def along_features(x, row, y, column):
    """The pairs of block (row, column) of x y^T."""
    k_tiles = x.shape[0] // ROWS
    return [(tile_of(x, row, i), tile_of(y, column, i).T) for i in range(k_tiles)]


def lower_times(triangle, x, at):
    """The terms of the own tile of (triangle x)."""
    row, features = at.row, at.features
    return 0, row + 1, lambda m: (triangle.at[row + m], tile_of(x, m, features))


def upper_times(triangle, x, at):
    """The terms of the own tile of (triangle^T x)."""
    row, features = at.row, at.features
    return row, 2, lambda m: (triangle.at[row + m].T, tile_of(x, m, features))


def lower_lower(left, right, at):
    """The terms of the own block of (left right^T), of two triangles."""
    row, column = at.row, at.column
    return 0, column + 1, lambda m: (left.at[row + m], right.at[column + m].T)


def upper_lower(left, right, at):
    """The terms of the own block of (left^T right), of two triangles."""
    row, column = at.row, at.column
    return row, 2, lambda m: (left.at[row + m].T, right.at[m + column])


def total(terms, init=None):
    """The sum of the terms' products, plus `init`."""
    start, stop, pair = terms
    if init is None:
        init = plgpu.layout_cast(jnp.zeros((CHUNK, CHUNK), f32), WGMMA_LAYOUT)
    return lax.fori_loop(start, stop, lambda i, total: product(pair(i), init=total), init)


def triangle(x, at, *, strict=False):
    """A block of a lower triangle: what is above the diagonal becomes zero.

    Opaque, for LLVM would rather select among float16, one by one.
    """
    i = chunks.tokens()
    i += jnp.uint32(CHUNK) * (at.row - at.column).astype(jnp.uint32) + (0 if strict else 1)
    below = mosaic.in_interval(jnp.zeros_like(i), i, CHUNK)
    return lax.optimization_barrier(jnp.where(below, x, 0.0))


def packed(x):
    """x as float16, two in a register: the compiler, if it sees them, takes a register for each."""
    return lax.optimization_barrier(x.astype(f16))


def unpacked(x):
    """x as float32, and not before it is asked for."""
    return lax.optimization_barrier(x).astype(f32)
