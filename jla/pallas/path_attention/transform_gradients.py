"""The gradients of the tree's transforms H, from the top level down.

The H of a block moves versions of one level to the next: that of a left half, q <- q H, the queries
of its right sibling; that of a right half, k <- H k, its left sibling's keys. And the H of two
siblings make their parent's, H_parent = H_right H_left. So

    dH_left  = H_right^T dH_parent + sum over the right sibling's queries of q^T dq_moved
    dH_right = dH_parent H_left^T  + sum over the left sibling's keys of dk_moved^T k

where the moved versions' gradients are those of everything above: what `backward` writes.
"""

import functools

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from jla.pallas import mosaic
from jla.pallas.chunks import CHUNK
from jla.pallas.mosaic import PER_ROW, TILE, f16, f32, load, per_row, product
from jla.pallas.path_attention import levels
from jla.pallas.path_attention.levels import LEAF

SDS = jax.ShapeDtypeStruct
STAGES = 3  # tiles of 64 rows, of a version and of a gradient
LEAST = 1e-30


def transform_gradients(queries, dqueries, keys, dkeys, transforms, leaves):
    """The gradients of the leaves' own transforms.

    Args:
      queries, keys: all versions, [B, HQ, R, K] and [B, H, S, K] float16.
      dqueries, dkeys: their gradients in two parts, float16 as the versions and the rows' factors,
        [B, HQ, R] and [B, H, S] float32.
      transforms: as `backward` takes them, level by level but for the top one.
      leaves: the number of leaves.

    Returns:
      In two parts, [B, H, leaves, K, K] float16 of at most 1 and a float32 factor for each,
      [B, H, leaves].
    """
    (B, H), K = keys.shape[:2], keys.shape[-1]
    if leaves == 1:  # no version is written
        return jnp.zeros((B, H, leaves, K, K), f16), jnp.zeros((B, H, leaves), f32)
    # float16 rows are relative to the head's largest.
    units = [jnp.maximum(x.reshape(B, H, -1).max(-1), LEAST) for _, x in (dqueries, dkeys)]
    above = None
    for m in reversed(range(len(transforms))):
        above = _level(queries, dqueries, keys, dkeys, units, transforms[m], above, m, leaves)
    return above


def _level(queries, dqueries, keys, dkeys, units, transforms, above, level, leaves):
    """The gradients of one level's transforms, given those of the level above, or None.

    One warpgroup a block, two on a multiprocessor: at K=128 97 KB of SMEM. Bytes at B=8 T=4096 H=16
    K=128, all levels together: versions and gradients 0.8 GB, H and dH 0.75 GB; 0.36 ms.
    """
    (B, H, N, K, _), HQ = transforms.shape, queries.shape[1]
    group, parts = HQ // H, K // CHUNK
    query_counts, key_counts = levels.query_counts(leaves), levels.key_counts(leaves)
    higher = range(level + 1, levels.number(leaves))

    def body(q_ref, dq_ref, dq_factors, k_ref, dk_ref, dk_factors, q_unit, k_unit, h_ref, *refs):
        if above is not None:
            above_ref, above_factors, *refs = refs
        out_ref, factors_ref, left, right, vectors, loaded = refs
        b, h, n = (lax.axis_index(name) for name in ("b", "h", "n"))
        pair = lax.div(n, jnp.int32(2))

        def work(*, is_left):
            """One block, of the left or the right half of its pair."""
            # The other half's versions at this level, and at their next one.
            first = lax.shift_left(2 * pair + (1 if is_left else 0), level)
            counts = query_counts if is_left else key_counts
            here = levels.offset(counts, level) + levels.place(first, level)
            there, found = jnp.int32(0), jnp.int32(0)
            for m in reversed(higher):
                present = (
                    levels.has_query(first, m) if is_left else levels.has_key(first, m, leaves)
                )
                there = jnp.where(present, levels.offset(counts, m) + levels.place(first, m), there)
                found = jnp.where(present, 1, found)
            tiles = jnp.clip(leaves - first, 0, 1 << level) * found * (LEAF // CHUNK)
            heads = group if is_left else 1
            base = jnp.int32(0)
            if above is not None:
                base = jnp.where(pair < above[0].shape[2], parts, 0)
            total = base + tiles * heads

            def fetch(t):
                slot = lax.rem(t, jnp.int32(STAGES))

                def copies(*sources):
                    for source, target in zip(sources, (left, right, vectors), strict=True):
                        plgpu.copy_gmem_to_smem(source, target.at[slot], loaded.at[slot])

                @pl.when(jnp.logical_and(t >= base, t < total))
                def _():
                    member, i = lax.div(t - base, tiles), lax.rem(t - base, tiles)
                    before = pl.ds(here * LEAF + i * CHUNK, CHUNK)
                    after = pl.ds(there * LEAF + i * CHUNK, CHUNK)
                    if is_left:
                        head = h * group + member
                        factors = dq_factors.at[b, head, after]
                        copies(q_ref.at[b, head, before], dq_ref.at[b, head, after], factors)
                    else:
                        factors = dk_factors.at[b, h, after]
                        copies(dk_ref.at[b, h, after], k_ref.at[b, h, before], factors)

                if above is not None:

                    @pl.when(t < base)
                    def _():
                        rows = pl.ds(t * CHUNK, CHUNK)
                        sibling = h_ref.at[b, h, 2 * pair + (1 if is_left else 0), rows]
                        parent = above_ref.at[b, h, pair, rows]
                        factors = dk_factors.at[b, h, pl.ds(0, CHUNK)]  # not used
                        if is_left:
                            copies(sibling, parent, factors)
                        else:
                            copies(parent, sibling, factors)

            for t in range(STAGES - 1):
                fetch(jnp.int32(t))

            unit = (q_unit if is_left else k_unit)[b, h]
            total_of = tuple(
                plgpu.layout_cast(jnp.zeros((CHUNK, K), f32), TILE) for _ in range(parts)
            )

            def from_above(_, __):
                ratio = above_factors[b, h, pair] / unit
                for i in range(parts):
                    plgpu.barrier_wait(loaded.at[i])
                result = []
                for i in range(parts):
                    if is_left:
                        columns = pl.ds(i * CHUNK, CHUNK)
                        pairs = ((left.at[j, :, columns].T, right.at[j]) for j in range(parts))
                        result.append(product(*pairs) * ratio)
                    else:
                        blocks = [product((left.at[i], right.at[j].T)) for j in range(parts)]
                        result.append(jnp.concatenate(blocks, 1) * ratio)
                plgpu.commit_smem()  # all warps have read what is overwritten
                for i in range(parts):
                    fetch(jnp.int32(i + STAGES - 1))
                return tuple(result)

            if above is not None:
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
            factors_ref[b, h, n] = largest * unit
            for i, x in enumerate(total_of):
                left.at[i][...] = (x * (1.0 / largest)).astype(f16)
            plgpu.commit_smem()
            for i in range(parts):
                rows = pl.ds(i * CHUNK, CHUNK)
                plgpu.copy_smem_to_gmem(left.at[i], out_ref.at[b, h, n, rows])
            plgpu.wait_smem_to_gmem(0, wait_read_only=True)

        is_left = lax.rem(n, jnp.int32(2)) == 0
        pl.when(is_left)(functools.partial(work, is_left=True))
        pl.when(jnp.logical_not(is_left))(functools.partial(work, is_left=False))

    return mosaic.kernel(
        body,
        out_type=[SDS(transforms.shape, f16), SDS((B, H, N), f32)],
        scratch_types=[
            mosaic.tile(CHUNK, K, STAGES, dtype=f16),
            mosaic.tile(CHUNK, K, STAGES, dtype=f16),
            plgpu.SMEM((STAGES, CHUNK), f32),
            plgpu.Barrier(num_arrivals=3, num_barriers=STAGES),
        ],
        grid=(B, N, H),
        grid_names=("b", "n", "h"),
    )(queries, *dqueries, keys, *dkeys, *units, transforms, *(above or ()))
