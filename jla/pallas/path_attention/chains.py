"""From leaf to leaf: the blocks' transforms, and with them queries and keys from level to level.

A leaf's next query version is the one before it moved over the left sibling of the level,
q <- q H; its next key version is moved over the right sibling, k <- H k.
"""

import functools

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from jla.pallas.common import mosaic
from jla.pallas.common.chunks import CHUNK
from jla.pallas.common.mosaic import f16, product
from jla.pallas.path_attention import levels

SDS = jax.ShapeDtypeStruct


def joined(transforms, leaves):
    """The transforms of the blocks of 2**m leaves, for all levels m but the last.

    Args:
      transforms: [B, H, blocks, K, K] float16, see `levels.block_counts`; those of the leaves are
        there. leaves: P.

    Returns:
      The same with those of all blocks, in the same memory.
    """
    for m in range(1, len(levels.block_counts(leaves))):
        transforms = _pairs_joined(transforms, jnp.full(1, m, jnp.int32), leaves)
    return transforms


# The level is an operand and the shapes are those of all levels, so that all levels of both passes
# are one kernel, traced and compiled once.
@functools.partial(jax.jit, static_argnames="leaves")
def _pairs_joined(transforms, level, leaves):
    """A level's transforms: later @ earlier for each two neighbours of the level below.

    One warpgroup a pair, 64 KB of SMEM at K=128. There are CTAs for the lowest level's pairs; at a
    higher one those that have none come last, and return at once. Bytes at B=8 H=16 P=32, lowest
    level: 201 MB, 0.05 ms.
    """
    B, H, _, K, _ = transforms.shape
    parts, counts = K // CHUNK, levels.block_counts(leaves)

    def body(ref, level_ref, out, later, earlier, loaded):
        b, h, n = (lax.axis_index(name) for name in ("b", "h", "pair"))
        level = level_ref[0]
        below, here = (levels.offset(counts, m) for m in (level - 1, level))

        @pl.when(n < levels.count(counts, level))
        def _():
            plgpu.copy_gmem_to_smem(ref.at[b, h, below + 2 * n + 1], later, loaded)
            plgpu.copy_gmem_to_smem(ref.at[b, h, below + 2 * n], earlier, loaded)
            plgpu.barrier_wait(loaded)
            for i in range(parts):
                rows = pl.ds(i * CHUNK, CHUNK)
                # Each warp overwrites its own rows, which no other reads.
                later.at[rows][...] = product((later.at[rows], earlier)).astype(f16)
                plgpu.commit_smem()
                plgpu.copy_smem_to_gmem(later.at[rows], out.at[b, h, here + n, rows])
            plgpu.wait_smem_to_gmem(0, wait_read_only=True)

    return mosaic.kernel(
        body,
        automatic_barriers=False,
        in_place={0: 0},
        out_type=[SDS(transforms.shape, f16)],
        scratch_types=[
            mosaic.tile(K, K, dtype=f16),
            mosaic.tile(K, K, dtype=f16),
            plgpu.Barrier(num_arrivals=2),
        ],
        grid=(leaves // 2, B, H),
        grid_names=("pair", "b", "h"),
    )(transforms, level)[0]


@functools.partial(jax.jit, static_argnames="leaves")
def query_chains(queries, transforms, leaves):
    """All query versions from the leaves' first ones: each is the one before it times H.

    Args:
      queries: [B, HQ, R, K] float16, of which the leaves' first versions are there.
      transforms: of all blocks, as `joined` returns them. leaves: P.

    Returns:
      The same with all versions, in the same memory.
    """
    return _chains(queries, transforms, leaves, levels.query_counts(leaves), right=True)


@functools.partial(jax.jit, static_argnames="leaves")
def key_chains(keys, transforms, leaves):
    """All key versions, [B, H, S, K], from the first ones: each is the one before it times H^T.

    As `query_chains`.
    """
    return _chains(keys, transforms, leaves, levels.key_counts(leaves), right=False)


def _chains(versions, transforms, leaves, counts, *, right):
    """Moves each leaf from its first version on, over the sibling of each level that it has.

    One warpgroup a leaf; 96 KB of SMEM at K=128: the leaf's rows and two transforms, the next of
    which is on its way. Traffic at B=8 T=4096 H=HQ=16 K=128, for queries or keys: 109 MB read, 205
    written, transforms 250 MB of which a half come from L2: 0.11 ms at 4.3 TB/s.
    """
    (B, heads, _, K), H = versions.shape, transforms.shape[1]
    group, M = heads // H, levels.number(leaves)
    blocks = levels.block_counts(leaves)
    if M < 2:
        return versions

    def body(source, matrices, out, sx, sh, x_loaded, loaded):
        b, leaf, h = (lax.axis_index(name) for name in ("b", "leaf", "h"))
        head = lax.div(h, jnp.int32(group))
        there = [
            levels.has_query(leaf, m) if right else levels.has_key(leaf, m, leaves)
            for m in range(M)
        ]

        def next_level(level):
            """The next level above at which the leaf has a version, or M."""
            found = jnp.int32(M)
            for m in reversed(range(M)):
                found = jnp.where(lax.bitwise_and(there[m], m > level), m, found)
            return found

        def rows(m, half):
            return levels.rows(counts, leaf, m, half)

        def fetch(step, m, following):
            """Loads the transform from level m to the next one of the leaf, if there is one."""

            @pl.when(following < M)
            def _():
                slot = lax.rem(step, jnp.int32(2))
                sibling = 2 * levels.block(leaf, m) + (0 if right else 1)
                matrix = matrices.at[b, head, levels.offset(blocks, m) + sibling]
                plgpu.copy_gmem_to_smem(matrix, sh.at[slot], loaded.at[slot])

        def move_on(step, ahead):
            """From this level, the first of four of the leaf, to the second."""
            _, *ahead = ahead
            slot = lax.rem(step, jnp.int32(2))
            matrix = sh.at[slot]
            plgpu.barrier_wait(loaded.at[slot])
            for half in range(2):
                x = sx.at[half]
                moved = product((x, matrix if right else matrix.T)).astype(f16)
                if half == 0:
                    plgpu.wait_smem_to_gmem(0, wait_read_only=True)
                    plgpu.commit_smem()
                x[...] = moved
            plgpu.commit_smem()
            for half in range(2):
                plgpu.copy_smem_to_gmem(sx.at[half], out.at[b, h, rows(ahead[0], half)])
            fetch(step + 2, *ahead[1:])
            return *ahead, next_level(ahead[-1])

        ahead = [next_level(jnp.int32(-1))]
        for _ in range(3):
            ahead.append(next_level(ahead[-1]))
        versions_of_leaf = sum((jnp.where(x, 1, 0) for x in there), jnp.int32(0))

        @pl.when(versions_of_leaf > 1)
        def _():
            for half in range(2):
                at = source.at[b, h, rows(ahead[0], half)]
                plgpu.copy_gmem_to_smem(at, sx.at[half], x_loaded)
            for step in range(2):
                fetch(jnp.int32(step), *ahead[step : step + 2])
            plgpu.barrier_wait(x_loaded)
            lax.fori_loop(0, versions_of_leaf - 1, move_on, tuple(ahead))
            plgpu.wait_smem_to_gmem(0, wait_read_only=True)

    return mosaic.kernel(
        body,
        automatic_barriers=False,
        in_place={0: 0},
        out_type=[SDS(versions.shape, f16)],
        scratch_types=[
            mosaic.tile(CHUNK, K, 2, dtype=f16),
            mosaic.tile(K, K, 2, dtype=f16),
            plgpu.Barrier(num_arrivals=2),
            plgpu.Barrier(num_barriers=2),
        ],
        grid=(B, leaves, heads),
        grid_names=("b", "leaf", "h"),
    )(versions, transforms)[0]
