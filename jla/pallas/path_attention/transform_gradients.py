"""The gradients of the tree's transforms H, from the top level down.

The H of a block moves versions of one level to the next: that of a left half, q <- q H, the queries
of its right sibling; that of a right half, k <- H k, its left sibling's keys. And the H of two
siblings make their parent's, H_parent = H_right H_left. So

    dH_left  = H_right^T dH_parent + sum over the right sibling's queries of q^T dq_moved
    dH_right = dH_parent H_left^T  + sum over the left sibling's keys of dk_moved^T k

where the moved versions' gradients are those of everything above: what `query_gradients` and
`key_gradients` write.
"""

import functools

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from jla.pallas.common import mosaic
from jla.pallas.common.chunks import CHUNK
from jla.pallas.common.mosaic import PER_ROW, TILE, f16, f32, load, per_row, product
from jla.pallas.path_attention import levels
from jla.pallas.path_attention.backward import LEAST
from jla.pallas.path_attention.levels import LEAF

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
      H was, see `levels.beside`, for nobody else reads that H.
    """
    B, H, blocks = transforms.shape[:3]
    if leaves == 1:  # no version is written
        return jnp.zeros_like(transforms), jnp.zeros((B, H, blocks), f32)
    # float16 rows are relative to the head's largest.
    units = [jnp.maximum(x.reshape(B, H, -1).max(-1), LEAST) for _, x in (dqueries, dkeys)]
    out = transforms, jnp.zeros((B, H, blocks), f32)
    for m in reversed(range(len(levels.block_counts(leaves)))):
        level = jnp.full(1, m, jnp.int32)
        out = _level(queries, *dqueries, keys, *dkeys, *units, *out, level, leaves=leaves)
    return out


# The level is an operand and the shapes are those of all levels, so that all levels are one kernel,
# traced and compiled once.
@functools.partial(jax.jit, static_argnames="leaves")
def _level(
    queries, dqueries, query_factors, keys, dkeys, key_factors, query_unit, key_unit,
    gradients, factors, level, *, leaves,
):  # fmt: skip
    """Writes the gradients of one level's transforms in place of these, after the level above.

    One warpgroup a block, two on a multiprocessor: at K=128 97 KB of SMEM. There are CTAs for the
    leaves; at a higher level those that have no block come last, and return at once. Bytes at B=8
    T=4096 H=16 K=128, all levels together: versions and gradients 0.8 GB, H and dH 0.75 GB; 0.36
    ms.
    """
    (B, H, _, K, _), HQ = gradients.shape, queries.shape[1]
    group, parts, M = HQ // H, K // CHUNK, levels.number(leaves)
    query_counts, key_counts = levels.query_counts(leaves), levels.key_counts(leaves)
    blocks = levels.block_counts(leaves)

    def body(*refs):
        level = refs[10][0]
        n = lax.axis_index("n")
        pl.when(n < levels.count(blocks, level))(lambda: of_block(level, n, *refs))

    def of_block(
        level, n, q_ref, dq_ref, dq_factors, k_ref, dk_ref, dk_factors, q_unit, k_unit,
        h_ref, above_factors, _, out_ref, factors_ref, left, right, vectors, loaded,
    ):  # fmt: skip
        b, h = (lax.axis_index(name) for name in ("b", "h"))
        pair, pairs = lax.div(n, jnp.int32(2)), levels.count(blocks, level + 1)
        # A left half's gradient comes of its sibling's queries, a right half's of its keys.
        left_half = lax.rem(n, jnp.int32(2)) == 0
        sibling = jnp.where(left_half, 2 * pair + 1, 2 * pair)
        first = lax.shift_left(sibling, level)

        def versions(counts, present):
            """The places of the sibling's first leaf at this level and at its next one, or -1."""
            next_place = jnp.int32(-1)
            for m in reversed(range(1, M)):
                place = levels.place(counts, first, m)
                later = lax.bitwise_and(present(m), m > level)
                next_place = jnp.where(later, place, next_place)
            return levels.place(counts, first, level), next_place

        of_queries = versions(query_counts, lambda m: levels.has_query(first, m))
        of_keys = versions(key_counts, lambda m: levels.has_key(first, m, leaves))
        here, there = (jnp.where(left_half, x, y) for x, y in zip(of_queries, of_keys, strict=True))
        tiles = jnp.clip(leaves - first, 0, lax.shift_left(jnp.int32(1), level)) * (LEAF // CHUNK)
        tiles = jnp.where(there >= 0, tiles, 0)
        first_block, first_above = (levels.offset(blocks, m) for m in (level, level + 1))
        of_sibling, of_parent = first_block + sibling, first_above + levels.beside(pair, pairs)
        base = jnp.where(pair < pairs, parts, 0)
        total = base + tiles * jnp.where(left_half, group, 1)

        def copies(t, *sources):
            slot = lax.rem(t, jnp.int32(STAGES))
            for source, target in zip(sources, (left, right, vectors), strict=True):
                plgpu.copy_gmem_to_smem(source, target.at[slot], loaded.at[slot])

        def fetch_above(t):
            @pl.when(t < base)
            def _():
                rows = pl.ds(t * CHUNK, CHUNK)
                factors = dk_factors.at[b, h, pl.ds(0, CHUNK)]  # not used
                matrix, parent = (h_ref.at[b, h, i, rows] for i in (of_sibling, of_parent))
                copies(t, matrix, parent, factors)

        def fetch(t):
            @pl.when(jnp.logical_and(t >= base, t < total))
            def _():
                member, i = lax.div(t - base, tiles), lax.rem(t - base, tiles)
                before = pl.ds(here * LEAF + i * CHUNK, CHUNK)
                after = pl.ds(there * LEAF + i * CHUNK, CHUNK)

                @pl.when(left_half)
                def _():
                    at, last = (b, h * group + member), dq_factors
                    copies(t, q_ref.at[*at, before], dq_ref.at[*at, after], last.at[*at, after])

                @pl.when(jnp.logical_not(left_half))
                def _():
                    at, last = (b, h), dk_factors
                    copies(t, dk_ref.at[*at, after], k_ref.at[*at, before], last.at[*at, after])

        def fetch_next(first, count):
            lax.fori_loop(first, first + count, lambda t, _: fetch(t), None)

        lax.fori_loop(0, parts, lambda t, _: fetch_above(t), None)
        fetch_next(0, STAGES - 1)

        unit = jnp.where(left_half, q_unit[b, h], k_unit[b, h])
        nothing = plgpu.layout_cast(jnp.zeros((CHUNK, K), f32), TILE)
        total_of = (nothing,) * parts

        def of_left():
            """H_right^T dH."""
            columns = [pl.ds(i * CHUNK, CHUNK) for i in range(parts)]
            return [
                product(*((left.at[j, :, at].T, right.at[j]) for j in range(parts)))
                for at in columns
            ]

        def of_right():
            """dH H_left^T."""
            return [
                jnp.concatenate([product((right.at[i], left.at[j].T)) for j in range(parts)], 1)
                for i in range(parts)
            ]

        def from_above(_, __):
            ratio = above_factors[b, h, first_above + pair] / unit
            for i in range(parts):
                plgpu.barrier_wait(loaded.at[i])
            result = lax.cond(left_half, of_left, of_right)
            plgpu.commit_smem()  # all warps have read what is overwritten
            fetch_next(STAGES - 1, parts)
            return tuple(x * ratio for x in result)

        total_of = lax.fori_loop(0, jnp.minimum(base, 1), from_above, total_of)

        def tile(t, carry):
            slot = lax.rem(t, jnp.int32(STAGES))
            plgpu.barrier_wait(loaded.at[slot])
            factor = load(vectors.at[slot], PER_ROW) * (1.0 / unit)
            scaled = load(right.at[slot]) * per_row(factor, K)
            right.at[slot][...] = scaled.astype(f16)
            plgpu.commit_smem()
            result = []
            for i in range(parts):
                columns = pl.ds(i * CHUNK, CHUNK)
                operands = left.at[slot, :, columns].T, right.at[slot]
                result.append(product(operands, init=carry[i]))
            mosaic.release()
            fetch(t + STAGES - 1)
            return tuple(result)

        total_of = lax.fori_loop(base, total, tile, total_of)
        largest = functools.reduce(jnp.maximum, (jnp.abs(x).max(axis=1) for x in total_of)).max(
            axis=0
        )
        largest = jnp.maximum(largest, LEAST)
        factors_ref[b, h, first_block + n] = largest * unit
        target = out_ref.at[b, h, first_block + levels.beside(n, levels.count(blocks, level))]
        for i, x in enumerate(total_of):
            left.at[i][...] = (x * (1.0 / largest)).astype(f16)
        plgpu.commit_smem()
        for i in range(parts):
            rows = pl.ds(i * CHUNK, CHUNK)
            plgpu.copy_smem_to_gmem(left.at[i], target.at[rows])
        plgpu.wait_smem_to_gmem(0, wait_read_only=True)

    return mosaic.kernel(
        body,
        in_place={8: 0, 9: 1},
        out_type=[SDS(gradients.shape, f16), SDS(factors.shape, f32)],
        scratch_types=[
            mosaic.tile(CHUNK, K, STAGES, dtype=f16),
            mosaic.tile(CHUNK, K, STAGES, dtype=f16),
            plgpu.SMEM((STAGES, CHUNK), f32),
            plgpu.Barrier(num_arrivals=3, num_barriers=STAGES),
        ],
        grid=(leaves, B, H),
        grid_names=("n", "b", "h"),
    )(
        queries, dqueries, query_factors, keys, dkeys, key_factors, query_unit, key_unit,
        gradients, factors, level,
    )  # fmt: skip
