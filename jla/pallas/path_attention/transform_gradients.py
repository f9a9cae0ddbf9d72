"""The gradients of the tree's transforms H, from the top level down.

The H of a block moves versions of one level to the next: that of a left half, q <- q H, the queries
of its right sibling; that of a right half, k <- H k, its left sibling's keys. And the H of two
siblings make their parent's, H_parent = H_right H_left. So

    dH_left  = H_right^T dH_parent + sum over the right sibling's queries of q^T dq_moved
    dH_right = dH_parent H_left^T  + sum over the left sibling's keys of dk_moved^T k

where the moved versions' gradients are those of everything above: what `query_gradients` and
`key_gradients` write.

A CTA is a block of a level: one warpgroup. Tiles of 64 rows pass through one ring, `left`, `right`
and a factor for each row; the sum stays in registers:

    phase      | tile    | left              | right              | the sum
    -----------+---------+-------------------+--------------------+--------------------------------
    from_above | 0, ...  | H of the sibling  | dH_parent          | H_right^T dH, or dH H_left^T
    add_tile   | base... | q, or dk_moved    | dq_moved, or k     | + left^T right
    send       |         | dH                |                    |

Tiles 0 to base - 1 are the K rows of both matrices, if the block has a parent; the others are the
sibling's versions, for a left half those of all query heads of the group.
"""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from jla.pallas.common import mosaic, scratch
from jla.pallas.common.chunks import CHUNK
from jla.pallas.common.mosaic import PER_ROW, WGMMA_LAYOUT, f16, f32, load, per_row, product
from jla.pallas.common.scratch import barrier_for, fetch
from jla.pallas.path_attention import dyadic
from jla.pallas.path_attention.backward import LEAST
from jla.pallas.path_attention.dyadic import LEAF

SDS = jax.ShapeDtypeStruct
STAGES = 3  # tiles of 64 rows, of a version and of a gradient


def transform_gradients(queries, dqueries, keys, dkeys, transforms, leaves):
    """The gradients of all blocks' transforms, of which those of the leaves are wanted.

    Args:
      queries, keys: all versions, [B, HQ, R, K] and [B, H, S, K] float16.
      dqueries, dkeys: their gradients in two parts, float16 as the versions and the rows' factors,
        [B, HQ, R] and [B, H, S] float32.
      transforms: of all blocks, as `query_gradients` takes them.
      leaves: the number of leaves.

    Returns:
      In two parts, [B, H, blocks, K, K] float16 of at most 1, in the memory of the transforms, and
      a float32 factor for each, [B, H, blocks]. The first part of a block's is where its sibling's
      H was, see `dyadic.beside`: nothing else reads that H.
    """
    B, H, blocks = transforms.shape[:3]
    if leaves == 1:  # no version is written
        return jnp.zeros_like(transforms), jnp.zeros((B, H, blocks), f32)
    # float16 rows are relative to the head's largest.
    units = [jnp.maximum(x.reshape(B, H, -1).max(-1), LEAST) for _, x in (dqueries, dkeys)]
    out = transforms, jnp.zeros((B, H, blocks), f32)
    for m in reversed(range(len(dyadic.block_counts(leaves)))):
        level = jnp.full(1, m, jnp.int32)
        out = _level(queries, *dqueries, keys, *dkeys, *units, *out, level, leaves=leaves)
    return out


# The level is an operand and the shapes are those of all levels, so that all levels are one kernel,
# traced and compiled once.
@functools.partial(jax.jit, static_argnames="leaves")
def _level(
    queries, dqueries, query_factors, keys, dkeys, key_factors, query_unit, key_unit,
    transforms, factors, level, *, leaves,
):  # fmt: skip
    """Writes the gradients of one level's transforms in place of these, after the level above.

    One warpgroup a block, two on a multiprocessor: at K=128 97 KB of SMEM. There are CTAs for the
    leaves; at a higher level those that have no block come last, and return at once. Floor at B=8
    T=4096 H=16 K=128, all levels together: 1.55 GB, 0.36 ms.
    """
    (B, H, _, K, _), HQ = transforms.shape, queries.shape[1]
    out = scratch.kernel(
        functools.partial(_body, leaves=leaves, group=HQ // H),
        inputs=dict(
            q=queries,
            dq=dqueries,
            dq_factors=query_factors,
            k=keys,
            dk=dkeys,
            dk_factors=key_factors,
            q_unit=query_unit,
            k_unit=key_unit,
            transforms=transforms,
            above_factors=factors,
            level=level,
        ),
        outputs=dict(gradients=SDS(transforms.shape, f16), factors=SDS(factors.shape, f32)),
        scratch=dict(
            left=mosaic.tile(CHUNK, K, STAGES, dtype=f16),
            right=mosaic.tile(CHUNK, K, STAGES, dtype=f16),
            row_factors=plgpu.SMEM((STAGES, CHUNK), f32),
            loaded=barrier_for(["left", "right", "row_factors"], STAGES),
        ),
        in_place=dict(transforms="gradients", above_factors="factors"),
        grid=(leaves, B, H),
        grid_names=("n", "b", "h"),
    )
    return tuple(out)


@dataclasses.dataclass(frozen=True)
class Block:
    """A CTA's block of 2**level leaves, and what its gradient is made of."""

    refs: Any
    b: Any
    h: Any  # the head of keys
    group: int  # query heads of a head of keys
    level: Any
    n: Any  # the block's number in its level, and its parent's in the one above
    pair: Any
    is_left: bool  # whether it is a left half, which moves queries
    here: Any  # where the sibling's versions of this level begin, in leaves,
    there: Any  # and its next ones; -1 if there are none
    tiles: Any  # of 64 rows of these, for each head
    first: Any  # where the transforms of the level begin, and of the level above
    first_above: Any
    of_sibling: Any  # the number of H of the sibling, and of dH of the parent
    of_parent: Any
    base: Any  # the number of the first tile of versions
    total: Any  # the number of tiles

    @property
    def parts(self):
        """Tiles of 64 rows, or of 64 columns, of a transform."""
        return self.refs.left.shape[-1] // CHUNK


def _body(refs, *, leaves, group):
    level, n = refs.level[0], lax.axis_index("n")
    count = dyadic.count(dyadic.block_counts(leaves), level)
    left = lax.rem(n, jnp.int32(2)) == 0

    # The two kinds of halves have all code apart. Where they met, with sums of different products,
    # ptxas would make each product wait for the one before.
    @pl.when((n < count) & left)
    def _():
        _of_block(_block(refs, level, n, leaves, group, is_left=True), leaves)

    @pl.when((n < count) & ~left)
    def _():
        _of_block(_block(refs, level, n, leaves, group, is_left=False), leaves)


def _block(refs, level, n, leaves, group, *, is_left):
    """The CTA's block."""
    b, h = (lax.axis_index(name) for name in ("b", "h"))
    blocks = dyadic.block_counts(leaves)
    pair, pairs = lax.div(n, jnp.int32(2)), dyadic.count(blocks, level + 1)
    # A left half's gradient depends on its sibling's queries, a right half's on its keys.
    sibling = 2 * pair + int(is_left)
    leaf = lax.shift_left(sibling, level)
    of_queries = _versions(
        dyadic.query_counts(leaves), leaf, level, leaves, lambda m: dyadic.has_query(leaf, m)
    )
    of_keys = _versions(
        dyadic.key_counts(leaves), leaf, level, leaves, lambda m: dyadic.has_key(leaf, m, leaves)
    )
    here, there = of_queries if is_left else of_keys
    tiles = jnp.clip(leaves - leaf, 0, lax.shift_left(jnp.int32(1), level)) * (LEAF // CHUNK)
    tiles = jnp.where(there >= 0, tiles, 0)
    first, first_above = (dyadic.offset(blocks, m) for m in (level, level + 1))
    of_sibling, of_parent = first + sibling, first_above + dyadic.beside(pair, pairs)
    base = jnp.where(pair < pairs, refs.left.shape[-1] // CHUNK, 0)
    total = base + tiles * (group if is_left else 1)
    return Block(
        refs, b, h, group, level, n, pair, is_left, here, there, tiles, first, first_above,
        of_sibling, of_parent, base, total,
    )  # fmt: skip


def _versions(counts, leaf, level, leaves, present):
    """The places of a leaf's version of this level and of its next one, or -1."""
    next_place = jnp.int32(-1)
    for m in reversed(range(1, dyadic.number(leaves))):
        place = dyadic.place(counts, leaf, m)
        later = lax.bitwise_and(present(m), m > level)
        next_place = jnp.where(later, place, next_place)
    return dyadic.place(counts, leaf, level), next_place


def _of_block(block, leaves):
    """All phases."""
    lax.fori_loop(0, block.parts, lambda t, _: load_above(block, t), None)
    load_next(block, 0, STAGES - 1)
    refs = block.refs
    unit = (refs.q_unit if block.is_left else refs.k_unit)[block.b, block.h]
    nothing = plgpu.layout_cast(jnp.zeros((CHUNK, refs.left.shape[-1]), f32), WGMMA_LAYOUT)
    has_parent = jnp.minimum(block.base, 1)
    sums = (nothing,) * block.parts
    sums = lax.fori_loop(0, has_parent, lambda *_: from_above(block, unit), sums)
    of_tile = functools.partial(add_tile, block, unit)
    sums = lax.fori_loop(block.base, block.total, of_tile, sums)
    send(block, unit, sums, leaves)


# Loads.


def _load(block, t, left, right, row_factors):
    """Starts the loads of tile t."""
    refs, slot = block.refs, lax.rem(t, jnp.int32(STAGES))
    loads = dict(
        left=(left, refs.left.at[slot]),
        right=(right, refs.right.at[slot]),
        row_factors=(row_factors, refs.row_factors.at[slot]),
    )
    fetch(loads, refs.loaded.at[slot])


def load_above(block, t):
    """Tile t of H of the sibling and dH of the parent, if there is one."""
    refs = block.refs

    @pl.when(t < block.base)
    def _():
        rows = pl.ds(t * CHUNK, CHUNK)
        not_used = refs.dk_factors.at[block.b, block.h, pl.ds(0, CHUNK)]
        of_head = refs.transforms.at[block.b, block.h]
        _load(
            block,
            t,
            of_head.at[block.of_sibling, rows],
            of_head.at[block.of_parent, rows],
            not_used,
        )


def load_versions(block, t):
    """Tile t of versions and of their gradients, if there is one."""
    refs, b = block.refs, block.b

    @pl.when(jnp.logical_and(t >= block.base, t < block.total))
    def _():
        member, i = lax.div(t - block.base, block.tiles), lax.rem(t - block.base, block.tiles)
        before = pl.ds(block.here * LEAF + i * CHUNK, CHUNK)
        after = pl.ds(block.there * LEAF + i * CHUNK, CHUNK)

        if block.is_left:
            head = block.h * block.group + member
            q, dq = refs.q.at[b, head, before], refs.dq.at[b, head, after]
            _load(block, t, q, dq, refs.dq_factors.at[b, head, after])
        else:
            dk, k = refs.dk.at[b, block.h, after], refs.k.at[b, block.h, before]
            _load(block, t, dk, k, refs.dk_factors.at[b, block.h, after])


def load_next(block, first, count):
    """Tiles of versions from number `first` on."""
    lax.fori_loop(first, first + count, lambda t, _: load_versions(block, t), None)


# The sum, in tiles of 64 rows; relative to the unit of the versions' gradients.


def from_above(block, unit):
    """H_right^T dH_parent, or dH_parent H_left^T."""
    refs, parts = block.refs, range(block.parts)
    ratio = refs.above_factors[block.b, block.h, block.first_above + block.pair] / unit
    for i in parts:
        plgpu.barrier_wait(refs.loaded.at[i])

    def of_left():
        columns = [pl.ds(i * CHUNK, CHUNK) for i in parts]
        return [
            product(*((refs.left.at[j, :, at].T, refs.right.at[j]) for j in parts))
            for at in columns
        ]

    def of_right():
        return [
            jnp.concatenate([product((refs.right.at[i], refs.left.at[j].T)) for j in parts], 1)
            for i in parts
        ]

    result = of_left() if block.is_left else of_right()
    plgpu.commit_smem()  # all warps have read what is overwritten
    load_next(block, STAGES - 1, block.parts)
    return tuple(x * ratio for x in result)


def add_tile(block, unit, t, sums):
    """Adds q^T dq_moved, or dk_moved^T k, of 64 rows."""
    refs = block.refs
    slot = lax.rem(t, jnp.int32(STAGES))
    plgpu.barrier_wait(refs.loaded.at[slot])
    factor = load(refs.row_factors.at[slot], PER_ROW) * (1.0 / unit)
    scaled = load(refs.right.at[slot]) * per_row(factor, refs.right.shape[-1])
    refs.right.at[slot][...] = scaled.astype(f16)
    plgpu.commit_smem()
    columns = [pl.ds(i * CHUNK, CHUNK) for i in range(block.parts)]
    operands = [[(refs.left.at[slot, :, at].T, refs.right.at[slot])] for at in columns]
    added = mosaic.products(operands, sums)
    mosaic.release()
    load_versions(block, t + STAGES - 1)
    return tuple(added)


def send(block, unit, sums, leaves):
    """dH in two parts, the first by way of the ring's tiles."""
    refs, blocks = block.refs, dyadic.block_counts(leaves)
    largest = functools.reduce(jnp.maximum, (jnp.abs(x).max(axis=1) for x in sums)).max(axis=0)
    largest = jnp.maximum(largest, LEAST)
    refs.factors[block.b, block.h, block.first + block.n] = largest * unit
    place = block.first + dyadic.beside(block.n, dyadic.count(blocks, block.level))
    target = refs.gradients.at[block.b, block.h, place]
    for i, x in enumerate(sums):
        refs.left.at[i][...] = (x * (1.0 / largest)).astype(f16)
    plgpu.commit_smem()
    for i in range(block.parts):
        rows = pl.ds(i * CHUNK, CHUNK)
        plgpu.copy_smem_to_gmem(refs.left.at[i], target.at[rows])
    plgpu.wait_smem_to_gmem(0, wait_read_only=True)
