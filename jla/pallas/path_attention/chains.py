"""From leaf to leaf: the blocks' transforms, and with them queries and keys from level to level.

A leaf's next query version is the one before it moved over the left sibling of the level,
q <- q H; its next key version is moved over the right sibling, k <- H k.
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
from jla.pallas.common.mosaic import f16, product
from jla.pallas.common.scratch import barrier_for, fetch
from jla.pallas.path_attention import dyadic

SDS = jax.ShapeDtypeStruct


def joined(transforms, leaves):
    """The transforms of the blocks of 2**m leaves, for all levels m but the last.

    Args:
      transforms: [B, H, blocks, K, K] float16, see `dyadic.block_counts`; those of the leaves are
        there. leaves: P.

    Returns:
      The same with those of all blocks, in the same memory.
    """
    for m in range(1, len(dyadic.block_counts(leaves))):
        transforms = _pairs_joined(transforms, jnp.full(1, m, jnp.int32), leaves)
    return transforms


# The level is an operand and the shapes are those of all levels, so that all levels of both passes
# are one kernel, traced and compiled once.
@functools.partial(jax.jit, static_argnames="leaves")
def _pairs_joined(transforms, level, leaves):
    """A level's transforms: later @ earlier for each two neighbours of the level below.

    One warpgroup a pair, 64 KB of SMEM at K=128. There are CTAs for the lowest level's pairs; at a
    higher one those that have none come last, and return at once. Floor at B=8 H=16 P=32, lowest
    level: 201 MB, 0.05 ms.
    """
    B, H, _, K, _ = transforms.shape
    counts = dyadic.block_counts(leaves)

    def body(refs):
        b, h, n = (lax.axis_index(name) for name in ("b", "h", "pair"))
        level = refs.level[0]
        below, here = (dyadic.offset(counts, m) for m in (level - 1, level))
        pl.when(n < dyadic.count(counts, level))(lambda: _join(refs, b, h, n, below, here))

    out = scratch.kernel(
        body,
        inputs=dict(transforms=transforms, level=level),
        outputs=dict(out=SDS(transforms.shape, f16)),
        scratch=dict(
            later=mosaic.tile(K, K, dtype=f16),
            earlier=mosaic.tile(K, K, dtype=f16),
            loaded=barrier_for(["later", "earlier"]),
        ),
        in_place=dict(transforms="out"),
        automatic_barriers=False,
        grid=(leaves // 2, B, H),
        grid_names=("pair", "b", "h"),
    )
    return out.out


def _join(refs, b, h, n, below, here):
    """The n-th pair; `below` and `here` are where the two levels' transforms begin."""
    later, earlier = (refs.transforms.at[b, h, below + 2 * n + i] for i in (1, 0))
    fetch(dict(later=(later, refs.later), earlier=(earlier, refs.earlier)), refs.loaded)
    plgpu.barrier_wait(refs.loaded)
    for i in range(refs.later.shape[0] // CHUNK):
        rows = pl.ds(i * CHUNK, CHUNK)
        # Each warp overwrites its own rows, which no other reads.
        refs.later.at[rows][...] = product((refs.later.at[rows], refs.earlier)).astype(f16)
        plgpu.commit_smem()
        plgpu.copy_smem_to_gmem(refs.later.at[rows], refs.out.at[b, h, here + n, rows])
    plgpu.wait_smem_to_gmem(0, wait_read_only=True)


@functools.partial(jax.jit, static_argnames="leaves")
def query_chains(queries, transforms, leaves):
    """All query versions from the leaves' first ones: each is the one before it times H.

    Args:
      queries: [B, HQ, R, K] float16, of which the leaves' first versions are there.
      transforms: of all blocks, as `joined` returns them. leaves: P.

    Returns:
      The same with all versions, in the same memory.
    """
    return _chains(queries, transforms, leaves, dyadic.query_counts(leaves), right=True)


@functools.partial(jax.jit, static_argnames="leaves")
def key_chains(keys, transforms, leaves):
    """All key versions, [B, H, S, K], from the first ones: each is the one before it times H^T.

    As `query_chains`.
    """
    return _chains(keys, transforms, leaves, dyadic.key_counts(leaves), right=False)


def _chains(versions, transforms, leaves, counts, *, right):
    """Moves each leaf from its first version on, over the sibling of each level that it has.

    One warpgroup a leaf; 96 KB of SMEM at K=128: the leaf's rows and two transforms, the next of
    which is on its way. Floor at B=8 T=4096 H=HQ=16 K=128, for queries or keys: 0.44 GB, 0.11 ms.
    """
    (B, heads, _, K), H = versions.shape, transforms.shape[1]
    if dyadic.number(leaves) < 2:
        return versions
    out = scratch.kernel(
        functools.partial(
            _body, leaves=leaves, group=heads // H, counts=tuple(counts), right=right
        ),
        inputs=dict(versions=versions, transforms=transforms),
        outputs=dict(out=SDS(versions.shape, f16)),
        scratch=dict(
            rows=mosaic.tile(CHUNK, K, 2, dtype=f16),
            matrices=mosaic.tile(K, K, 2, dtype=f16),
            rows_loaded=barrier_for(dict(rows=2)),
            loaded=barrier_for(["matrix"], 2),
        ),
        in_place=dict(versions="out"),
        automatic_barriers=False,
        grid=(B, leaves, heads),
        grid_names=("b", "leaf", "h"),
    )
    return out.out


@dataclasses.dataclass(frozen=True)
class Leaf:
    """A CTA's leaf."""

    refs: Any
    b: Any
    number: Any
    h: Any  # of the versions
    head: Any  # of the transforms
    present: Any  # for each level, whether the leaf has a version there
    counts: tuple  # of versions
    leaves: int
    right: bool  # queries, of right halves; or keys, of left ones

    def next_level(self, level):
        """The next level above at which the leaf has a version, or M."""
        found = jnp.int32(len(self.present))
        for m in reversed(range(len(self.present))):
            found = jnp.where(lax.bitwise_and(self.present[m], m > level), m, found)
        return found

    def version_rows(self, m, half):
        return dyadic.rows(self.counts, self.number, m, half)


def _body(refs, *, leaves, group, counts, right):
    b, number, h = (lax.axis_index(name) for name in ("b", "leaf", "h"))
    head, M = lax.div(h, jnp.int32(group)), dyadic.number(leaves)
    present = [
        dyadic.has_query(number, m) if right else dyadic.has_key(number, m, leaves)
        for m in range(M)
    ]
    leaf = Leaf(refs, b, number, h, head, present, counts, leaves, right)
    ahead = [leaf.next_level(jnp.int32(-1))]
    for _ in range(3):
        ahead.append(leaf.next_level(ahead[-1]))
    count = sum((jnp.where(x, 1, 0) for x in present), jnp.int32(0))

    @pl.when(count > 1)
    def _():
        for half in range(2):
            source = refs.versions.at[b, h, leaf.version_rows(ahead[0], half)]
            fetch(dict(rows=(source, refs.rows.at[half])), refs.rows_loaded, partial=True)
        for step in range(2):
            load_transform(leaf, jnp.int32(step), *ahead[step : step + 2])
        plgpu.barrier_wait(refs.rows_loaded)
        lax.fori_loop(0, count - 1, functools.partial(move_on, leaf), tuple(ahead))
        plgpu.wait_smem_to_gmem(0, wait_read_only=True)


def load_transform(leaf, step, m, following):
    """Loads the transform from level m to the next one of the leaf, if there is one."""
    refs = leaf.refs

    @pl.when(following < len(leaf.present))
    def _():
        slot = lax.rem(step, jnp.int32(2))
        sibling = 2 * dyadic.block(leaf.number, m) + (0 if leaf.right else 1)
        place = dyadic.offset(dyadic.block_counts(leaf.leaves), m) + sibling
        matrix = refs.transforms.at[leaf.b, leaf.head, place], refs.matrices.at[slot]
        fetch(dict(matrix=matrix), refs.loaded.at[slot])


def move_on(leaf, step, ahead):
    """The version of this level, the first of four of the leaf, becomes that of the second.

    q <- q H, or k <- k H^T.
    """
    refs, (_, target, *rest) = leaf.refs, ahead
    slot = lax.rem(step, jnp.int32(2))
    matrix = refs.matrices.at[slot]
    plgpu.barrier_wait(refs.loaded.at[slot])
    for half in range(2):
        x = refs.rows.at[half]
        moved = product((x, matrix if leaf.right else matrix.T)).astype(f16)
        if half == 0:
            plgpu.wait_smem_to_gmem(0, wait_read_only=True)
            plgpu.commit_smem()
        x[...] = moved
    plgpu.commit_smem()
    for half in range(2):
        at = refs.out.at[leaf.b, leaf.h, leaf.version_rows(target, half)]
        plgpu.copy_smem_to_gmem(refs.rows.at[half], at)
    load_transform(leaf, step + 2, *rest)
    return target, *rest, leaf.next_level(rest[-1])
