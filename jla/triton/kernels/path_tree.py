"""The tree over leaves of 64 tokens: which leaf has a version of its queries or keys where.

Two leaves i > j meet at one level, the highest bit in which i and j differ. There i is in the right
half and j in the left half of one aligned block of 2**(level + 1) leaves. i's queries, moved back
to the middle, are its query version of the level, and j's keys, moved forward to it, its key
version; their plain products are the logits. So a leaf has a query version for each of its set
bits, and a key version for each clear one whose right half is not empty. A row's versions are one
array of leaves: level by level, and a level's leaves in their order (`jla._core.dyadic`). So are
the transforms of the blocks of 2**level leaves.

Parameters of all kernels: P leaves, an even number; R query versions, S key versions and N
transforms of a row and head; HQ query heads, H key heads; K, V features, powers of two. Arrays of
tokens are [B, 64 P, heads, features], arrays of leaves [B, heads, leaves, 64, features].

The kernels' docstrings have bytes or operations, floor and prediction at B=8 T=4096 HQ=H=16
K=V=128 on an H200 (4.3 TB/s, 780 TFLOP/s) in 16 bits; and registers of a thread and shared memory,
as compiled by Triton 3.9 for compute capability 8.9, 8.0 and 9.0.
"""

import triton
import triton.language as tl

from jla.triton.kernels.pieces import CHUNK, tile_at

LEAF = CHUNK
LN2 = tl.constexpr(0.6931471805599453)
LEAST = tl.constexpr(1e-30)  # so that no row is divided by zero


@triton.jit
def query_place(leaf, level, P):
    """The place of a leaf's query version of the level, among all."""
    place = leaf * 0
    for m in range(level):
        place += ((P >> (m + 1)) << m) + tl.maximum((P & ((2 << m) - 1)) - (1 << m), 0)
    return place + ((leaf >> (level + 1)) << level) + (leaf & ((1 << level) - 1))


@triton.jit
def key_place(leaf, level, P):
    """The place of a leaf's key version of the level, among all."""
    place = leaf * 0
    for m in range(level):
        place += (((P - (1 << m) - 1) >> (m + 1)) + 1) << m
    return place + ((leaf >> (level + 1)) << level) + (leaf & ((1 << level) - 1))


@triton.jit
def transform_place(block, level, P):
    """The place of a block's transform, among all."""
    place = block * 0
    for m in range(level):
        place += P >> m
    return place + block


@triton.jit
def sibling(leaf, level):
    """The first leaf of the right half, for a leaf in the left half of a block of the level."""
    return ((leaf >> level) | 1) << level


@triton.jit
def lowest_bit(x):
    """The number of the lowest set bit of x, an int32 that is not 0."""
    low = x & -x
    n = ((low & 0x55555555) == 0).to(tl.int32)
    n += ((low & 0x33333333) == 0).to(tl.int32) * 2
    n += ((low & 0x0F0F0F0F) == 0).to(tl.int32) * 4
    n += ((low & 0x00FF00FF) == 0).to(tl.int32) * 8
    n += ((low & 0x0000FFFF) == 0).to(tl.int32) * 16
    return n


@triton.jit
def first_query(leaf, P):
    """The place of a leaf's first query version: as its own start sees it. Leaf 0 has none."""
    return query_place(leaf, lowest_bit(tl.maximum(leaf, 1)), P)


@triton.jit
def first_key(leaf, P):
    """The place of a leaf's first key version: as its own end sees it. The last leaf has none."""
    return key_place(leaf, lowest_bit(~leaf), P)


@triton.jit
def tokens(
    ptr, b, h, first, P, column, HEADS: tl.constexpr, D: tl.constexpr, ROWS: tl.constexpr,
    WIDTH: tl.constexpr,
):  # fmt: skip
    """Pointers to WIDTH features, from `column` on, of ROWS tokens of [B, 64 P, HEADS, D]."""
    ptr += ((b * P * LEAF + first).to(tl.int64) * HEADS + h) * D + column
    return tile_at(ptr, HEADS * D, ROWS, WIDTH)


@triton.jit
def tile(ptr, row, column, D: tl.constexpr, ROWS: tl.constexpr, WIDTH: tl.constexpr):
    """Pointers to WIDTH features, from `column` on, of ROWS rows of D features, from `row` on."""
    ptr += row.to(tl.int64) * D + column
    return tile_at(ptr, D, ROWS, WIDTH)


@triton.jit
def square(ptr, place):
    """Pointers to a [64, 64] tile of an array of them."""
    return tile(ptr, place * LEAF, 0, LEAF, LEAF, LEAF)


@triton.jit
def normalised(x, DTYPE: tl.constexpr):
    """A tile as numbers of at most 1, and its rows' factors."""
    factor = tl.maximum(tl.max(tl.abs(x), axis=1), LEAST)
    return (x / factor[:, None]).to(DTYPE), factor
