"""The tree over leaves of 128 tokens: which leaf has a version of its queries or keys where.

Two leaves i > j meet at one level: the highest bit in which i and j differ. There i lies in the
right half and j in the left half of one aligned block of 2**(level + 1) leaves. At a level, leaves
of right halves have a query version, and leaves of left halves, whose right half is not empty, a
key version. All versions of all levels are one array of leaves: a level's leaves in their order.
So are the transforms of the blocks of 2**level leaves: one array of blocks.
"""

import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl

from jla._core.dyadic import block_counts, key_counts, number, query_counts

__all__ = ["block_counts", "key_counts", "number", "query_counts"]

LEAF = 128
HALF = LEAF // 2


def offset(counts, level):
    """The place of a level's first leaf; `level` may be traced."""
    if isinstance(level, int):
        return sum(counts[:level])
    return sum((jnp.where(level > m, n, 0) for m, n in enumerate(counts)), jnp.int32(0))


def beside(n, count):
    """The number of a block's sibling, or its own if there is none of `count` blocks."""
    other = lax.bitwise_xor(n, jnp.int32(1))
    return jnp.where(other < count, other, n)


def count(counts, level):
    """The number at a level, which may be traced and may be past the end: none."""
    return sum((jnp.where(level == m, n, 0) for m, n in enumerate(counts)), jnp.int32(0))


def at_bit(leaf, level):
    """The bit of the leaf that tells its half at the level: 1 for the right one."""
    return lax.bitwise_and(lax.shift_right_logical(leaf, level), jnp.int32(1))


def block(leaf, level):
    """The number of the leaf's block of 2**(level + 1) leaves."""
    return lax.shift_right_logical(leaf, level + 1)


def place(counts, leaf, level):
    """The place of the leaf's version of the level among all."""
    half = lax.shift_left(jnp.int32(1), level)
    among_level = lax.shift_left(block(leaf, level), level) + lax.bitwise_and(leaf, half - 1)
    return offset(counts, level) + among_level


def rows(counts, leaf, level, half):
    """The 64 rows of the leaf's version of the level, of its first or second half."""
    return pl.ds(place(counts, leaf, level) * LEAF + half * HALF, HALF)


def first_query(leaf, leaves):
    """The place of a leaf's query version of the lowest level, among all; -1 if it has none."""
    counts, found = query_counts(leaves), jnp.int32(-1)
    for m in reversed(range(number(leaves))):
        found = jnp.where(has_query(leaf, m), place(counts, leaf, m), found)
    return found


def first_key(leaf, leaves):
    """The place of a leaf's key version of the lowest level, among all; -1 if it has none."""
    counts, found = key_counts(leaves), jnp.int32(-1)
    for m in reversed(range(number(leaves))):
        found = jnp.where(has_key(leaf, m, leaves), place(counts, leaf, m), found)
    return found


def has_query(leaf, level):
    """Whether the leaf has a query version at the level."""
    return at_bit(leaf, level) == 1


def has_key(leaf, level, leaves):
    """Whether the leaf has a key version at the level: its sibling begins before the end."""
    sibling = lax.shift_left(block(leaf, level) * 2 + 1, level)
    return lax.bitwise_and(at_bit(leaf, level) == 0, sibling < leaves)
