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

from jla.pallas import mosaic
from jla.pallas.chunks import CHUNK
from jla.pallas.mosaic import f16, product
from jla.pallas.path_attention import levels
from jla.pallas.path_attention.levels import LEAF

SDS = jax.ShapeDtypeStruct


@jax.jit  # for one kernel in both passes, see `leaf.leaves`
def joined(transforms):
    """The transforms of the blocks of 2**m leaves, for all levels m but the last.

    Args:
      transforms: those of the leaves, [B, H, P, K, K] float16.

    Returns:
      A list, at m [B, H, P >> m, K, K] float16; at 0 the argument.
    """
    out = [transforms]
    while len(out) < levels.number(transforms.shape[2]) - 1:
        out.append(_pairs_joined(out[-1]))
    return out


def _pairs_joined(transforms):
    """later @ earlier for each two neighbours; an odd last one is left out.

    One warpgroup a pair, 64 KB of SMEM at K=128. Bytes at B=8 H=16 P=32: 201 MB, 0.05 ms.
    """
    B, H, P, K, _ = transforms.shape
    parts = K // CHUNK

    def body(ref, out, later, earlier, loaded):
        at = lax.axis_index("b"), lax.axis_index("h"), lax.axis_index("pair")
        b, h, n = at
        plgpu.copy_gmem_to_smem(ref.at[b, h, 2 * n + 1], later, loaded)
        plgpu.copy_gmem_to_smem(ref.at[b, h, 2 * n], earlier, loaded)
        plgpu.barrier_wait(loaded)
        for i in range(parts):
            rows = pl.ds(i * CHUNK, CHUNK)
            # Each warp overwrites its own rows, which no other reads.
            later.at[rows][...] = product((later.at[rows], earlier)).astype(f16)
            plgpu.commit_smem()
            plgpu.copy_smem_to_gmem(later.at[rows], out.at[b, h, n, rows])
        plgpu.wait_smem_to_gmem(0, wait_read_only=True)

    return mosaic.kernel(
        body,
        automatic_barriers=False,
        out_type=SDS((B, H, P // 2, K, K), f16),
        scratch_types=[
            mosaic.tile(K, K, dtype=f16),
            mosaic.tile(K, K, dtype=f16),
            plgpu.Barrier(num_arrivals=2),
        ],
        grid=(B, P // 2, H),
        grid_names=("b", "pair", "h"),
    )(transforms)


@functools.partial(jax.jit, static_argnames="leaves")
def query_chains(queries, transforms, leaves):
    """All query versions from the leaves' first ones: each is the one before it times H.

    Args:
      queries: [B, HQ, R, K] float16, of which the leaves' first versions are there.
      transforms: from `joined`, [B, H, P >> m, K, K] at m. leaves: P.

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
    (B, heads, _, K), H = versions.shape, transforms[0].shape[1]
    group, M = heads // H, levels.number(leaves)
    if M < 2:
        return versions
    transforms = transforms[: M - 1]

    def body(source, *refs):
        *matrices, out, sx, sh, x_loaded, loaded = refs
        b, leaf, h = (lax.axis_index(name) for name in ("b", "leaf", "h"))
        head = lax.div(h, jnp.int32(group))
        places, steps = [], [jnp.int32(0)]  # the versions' places; the steps before each level
        following = [jnp.int32(-1)]  # the place of the next version after each level
        for m in range(M):
            there = levels.has_query(leaf, m) if right else levels.has_key(leaf, m, leaves)
            place = levels.offset(counts, m) + levels.place(leaf, m)
            places.append(jnp.where(there, place, -1))
        for place in reversed(places[1:]):
            following.insert(0, jnp.where(place >= 0, place, following[0]))
        moves = [lax.bitwise_and(places[m] >= 0, following[m] >= 0) for m in range(M - 1)]
        for move in moves:
            steps.append(steps[-1] + jnp.where(move, 1, 0))

        def rows(place, half):
            return pl.ds(place * LEAF + half * CHUNK, CHUNK)

        def fetch(m, step):
            """Loads a level's transform if it is that of the given step."""

            @pl.when(lax.bitwise_and(moves[m], steps[m] == step))
            def _():
                slot = lax.rem(step, jnp.int32(2))
                sibling = 2 * levels.block(leaf, m) + (0 if right else 1)
                matrix = matrices[m].at[b, head, sibling]
                plgpu.copy_gmem_to_smem(matrix, sh.at[slot], loaded.at[slot])

        def move_on(m):
            slot = lax.rem(steps[m], jnp.int32(2))
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
                target = out.at[b, h, rows(following[m], half)]
                plgpu.copy_smem_to_gmem(sx.at[half], target)
            for n in range(m + 2, M - 1):
                fetch(n, steps[m] + 2)

        @pl.when(steps[-1] > 0)
        def _():
            first = functools.reduce(lambda x, y: jnp.where(y >= 0, y, x), reversed(places))
            for half in range(2):
                at = source.at[b, h, rows(first, half)]
                plgpu.copy_gmem_to_smem(at, sx.at[half], x_loaded)
            for step in range(2):
                for m in range(step, M - 1):
                    fetch(m, jnp.int32(step))
            plgpu.barrier_wait(x_loaded)
            for m in range(M - 1):
                pl.when(moves[m])(functools.partial(move_on, m))
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
    )(versions, *transforms)[0]
