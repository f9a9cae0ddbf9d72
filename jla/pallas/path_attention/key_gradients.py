"""The backward pass of `forward` by leaves of keys; see `backward`."""

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from jla.pallas.common import mosaic
from jla.pallas.common.mosaic import (
    PER_COLUMN,
    PER_ROW,
    TILE,
    bf16,
    f16,
    f32,
    load,
    per_column,
    per_row,
)
from jla.pallas.path_attention import levels
from jla.pallas.path_attention.backward import load_rows, normalised
from jla.pallas.path_attention.forward import COMPUTE_REGISTERS, LOADER_REGISTERS, ROWS
from jla.pallas.path_attention.levels import LEAF

SDS = jax.ShapeDtypeStruct
QUERY_STAGES = 2  # tiles of 64 queries and outputs' gradients in SMEM


def key_gradients(q, k, v, own, gates, do, lse, delta, unit, transforms, *, scale):
    """The gradients of keys, values and the keys' gates, from the transposed products:

        p^T = exp2(logits - lse)^T;   dv = p^T do
        ds^T = p^T (v do^T - delta);  dk = ds^T q + dk_above H

    Args as `query_gradients` takes them.

    Returns:
      unit * dk in two parts, [B, H, S, K] float16 and [B, H, S] float32; dv [B, T, H, V] bf16; and
      with gates (or None) unit * (the sums of ds over the queries) [B, HQ, S] float32; ds without
      scale.

    A CTA is a leaf of keys, two warpgroups of 64 and one that loads: level by level the right
    sibling's queries pass in tiles of 64, those of the head's query heads one after another. dv
    stays in registers to the end, a level's dk takes the place of its keys. SMEM at K=V=128: keys
    64 KB (this level's and the next's), values 32 KB, queries and do 32 KB a stage; H comes as if
    it were queries.
    """
    (B, _, H, V), (HQ, P), K = v.shape, own[0].shape[1:3], q.shape[-1]
    group, M = HQ // H, levels.number(P)
    query_counts, key_counts = levels.query_counts(P), levels.key_counts(P)
    blocks = levels.block_counts(P)
    gated = gates is not None
    copies = 2 if gated else 1  # that a tile of queries or keys takes
    parts = K // ROWS  # tiles of H

    def body(q_ref, k_ref, v_ref, own_ref, tops_ref, do_ref, lse_ref, delta_ref, unit_ref, *refs):
        if gated:
            query_gates, key_gates, *refs = refs
        transforms_ref, dk_ref, factors_ref, dv_ref, *refs = refs
        if gated:
            sums_ref, *refs = refs
        sq, sdo, sk, sv, query_vectors, *refs = refs
        if gated:
            query_sums, *refs = refs
        q_loaded, do_loaded, k_loaded, v_loaded, q_used, do_used, k_used = refs
        b, h, wg, leaf = (lax.axis_index(name) for name in ("b", "h", "wg", "leaf"))

        def tiles(m):
            """The 64-row tiles of a level's queries: the first leaf of them and their number."""
            first = lax.shift_left(levels.block(leaf, m) * 2 + 1, m)
            count = jnp.clip(P - first, 0, lax.shift_left(jnp.int32(1), m))
            return first, 2 * jnp.where(levels.at_bit(leaf, m) == 0, count, 0)

        @pl.when(wg == 2)
        def _():
            plgpu.set_max_registers(LOADER_REGISTERS, action="decrease")

            def gradients(head, row, n):
                slot, rows = lax.rem(n, jnp.int32(QUERY_STAGES)), pl.ds(row, ROWS)
                pl.when(n >= QUERY_STAGES)(lambda: plgpu.barrier_wait(do_used.at[slot]))
                source, barrier = do_ref.at[b, rows, head], do_loaded.at[slot]
                plgpu.copy_gmem_to_smem(source, sdo.at[slot], barrier)
                for i, ref in enumerate((lse_ref, delta_ref)):
                    source, target = ref.at[b, head, rows], query_vectors.at[slot, i]
                    plgpu.copy_gmem_to_smem(source, target, barrier)

            def query_slot(n):
                slot = lax.rem(n, jnp.int32(QUERY_STAGES))
                pl.when(n >= QUERY_STAGES)(lambda: plgpu.barrier_wait(q_used.at[slot]))
                return slot

            def level(i, carry):
                n, done, versions = carry
                m = M - 1 - i
                first, count = tiles(m)
                left = jnp.minimum(count, 1)
                moved = left * jnp.minimum(versions, 1)
                place = levels.offset(query_counts, m) + lax.shift_left(levels.block(leaf, m), m)

                @pl.when(left == 1)
                def _():
                    slot = lax.rem(versions, jnp.int32(2))
                    pl.when(versions >= 2)(lambda: plgpu.barrier_wait(k_used.at[slot]))
                    for half in range(2):
                        source = k_ref.at[b, h, levels.rows(key_counts, leaf, m, half)]
                        plgpu.copy_gmem_to_smem(source, sk.at[slot, half], k_loaded.at[slot])

                @pl.when(moved == 1)
                def _():
                    sibling = levels.offset(blocks, m) + 2 * levels.block(leaf, m) + 1
                    source = transforms_ref.at[b, h, sibling]
                    for part in range(parts):
                        slot = query_slot(n + part)
                        load_rows(source, part * ROWS, sq.at[slot], q_loaded.at[slot], copies)

                n += moved * parts

                def of_head(member, _):
                    head = h * group + member

                    def tile(i, _):
                        slot = query_slot(n + member * count + i)
                        rows, barrier = pl.ds(place * LEAF + i * ROWS, ROWS), q_loaded.at[slot]
                        plgpu.copy_gmem_to_smem(q_ref.at[b, head, rows], sq.at[slot], barrier)
                        if gated:
                            source = query_gates.at[b, head, rows]
                            plgpu.copy_gmem_to_smem(source, query_sums.at[slot], barrier)
                        gradients(head, first * LEAF + i * ROWS, done + member * count + i)

                    lax.fori_loop(0, count, tile, None)

                lax.fori_loop(0, group, of_head, None)
                return n + group * count, done + group * count, versions + left

            for half in range(2):
                rows = pl.ds(leaf * LEAF + half * ROWS, ROWS)
                plgpu.copy_gmem_to_smem(v_ref.at[b, rows, h], sv.at[half], v_loaded)

            def own_tile(n, _):
                head, half = h * group + lax.div(n, jnp.int32(2)), lax.rem(n, jnp.int32(2))
                gradients(head, leaf * LEAF + half * ROWS, n)

            lax.fori_loop(0, 2 * group, own_tile, None)
            start = jnp.int32(0), jnp.int32(2 * group), jnp.int32(0)
            n, done, versions = lax.fori_loop(0, M, level, start)
            mosaic.drain(q_used, QUERY_STAGES, 0, n)
            mosaic.drain(do_used, QUERY_STAGES, 0, done)
            mosaic.drain(k_used, 2, 0, versions)

        @pl.when(wg < 2)
        def _():
            plgpu.set_max_registers(COMPUTE_REGISTERS, action="increase")
            unit = unit_ref[b, h]
            plgpu.barrier_wait(v_loaded)

            def level(i, carry):
                dk, dv, n, done, versions = carry
                m = M - 1 - i
                _, count = tiles(m)
                left = jnp.minimum(count, 1)
                moved = left * jnp.minimum(versions, 1)
                version = lax.rem(versions, jnp.int32(2))
                pl.when(left == 1)(lambda: plgpu.barrier_wait(k_loaded.at[version]))
                rows = levels.rows(key_counts, leaf, m, wg)

                def move(_, dk):
                    small, factor = normalised(dk)
                    dk = None
                    for part in range(parts):
                        slot = lax.rem(n + part, jnp.int32(QUERY_STAGES))
                        plgpu.barrier_wait(q_loaded.at[slot])
                        columns = small[:, part * ROWS : (part + 1) * ROWS]
                        dk = mosaic.product((columns, sq.at[slot]), init=dk)
                        mosaic.hand_back(q_used.at[slot])
                    return dk * per_row(factor, K)

                dk = lax.fori_loop(0, moved, move, dk)
                n += moved * parts

                def of_head(member, carry):
                    head = h * group + member

                    def tile(i, carry):
                        dk, dv, sums = carry
                        slot = lax.rem(n + member * count + i, jnp.int32(QUERY_STAGES))
                        do_slot = lax.rem(done + member * count + i, jnp.int32(QUERY_STAGES))
                        plgpu.barrier_wait(q_loaded.at[slot])
                        s = mosaic.product((sk.at[version, wg], sq.at[slot].T)) * scale
                        plgpu.barrier_wait(do_loaded.at[do_slot])
                        vectors = query_vectors.at[do_slot]
                        by_query = -load(vectors.at[0], PER_COLUMN)
                        if gated:
                            by_query += load(query_sums.at[slot], PER_COLUMN)
                            s += per_row(key_sums_of(head), ROWS)
                        p = jnp.exp2(s + per_column(by_query, ROWS))
                        dp = mosaic.product((sv.at[wg], sdo.at[do_slot].T))
                        delta = per_column(load(vectors.at[1], PER_COLUMN) * unit, ROWS)
                        dv = mosaic.product((p.astype(bf16), sdo.at[do_slot]), init=dv)
                        mosaic.hand_back(do_used.at[do_slot])
                        ds = p * (dp * unit - delta)
                        if gated:
                            sums += ds.sum(axis=1)
                        dk = mosaic.product((ds.astype(f16), sq.at[slot]), init=dk)
                        mosaic.hand_back(q_used.at[slot])
                        return dk, dv, sums

                    def key_sums_of(head):
                        return load(key_gates.at[b, head, rows], PER_ROW, optimized=False)

                    sums = plgpu.layout_cast(jnp.zeros((ROWS,), f32), PER_ROW)
                    dk, dv, sums = lax.fori_loop(0, count, tile, (*carry, sums))
                    if gated:

                        @pl.when(count > 0)
                        def _():
                            sums_ref.at[b, head, rows][...] = sums

                    return dk, dv

                dk, dv = lax.fori_loop(0, group, of_head, (dk, dv))

                @pl.when(left == 1)
                def _():
                    small, factor = normalised(dk)
                    factors_ref.at[b, h, rows][...] = factor
                    sk.at[version, wg][...] = small
                    plgpu.commit_smem()
                    plgpu.copy_smem_to_gmem(sk.at[version, wg], dk_ref.at[b, h, rows])
                    plgpu.wait_smem_to_gmem(0, wait_read_only=True)
                    mosaic.hand_back(k_used.at[version])

                return dk, dv, n + group * count, done + group * count, versions + left

            def own_tile(n, dv):
                head, half = h * group + lax.div(n, jnp.int32(2)), lax.rem(n, jnp.int32(2))
                slot, at = lax.rem(n, jnp.int32(QUERY_STAGES)), (b, head, leaf, half + wg)
                plgpu.barrier_wait(do_loaded.at[slot])

                def block(_, dv):
                    by_query = load(tops_ref.at[*at], PER_COLUMN, optimized=False)
                    by_query -= load(query_vectors.at[slot, 0], PER_COLUMN)
                    logits = mosaic.load_transposed(own_ref.at[*at])
                    p = jnp.exp2(logits + per_column(by_query, ROWS)).astype(bf16)
                    return mosaic.product((p, sdo.at[slot]), init=dv)

                # The first chunk's queries do not see the second's keys.
                dv = lax.fori_loop(0, jnp.where(half >= wg, 1, 0), block, dv)
                mosaic.hand_back(do_used.at[slot])
                return dv

            dv = plgpu.layout_cast(jnp.zeros((ROWS, V), f32), TILE)
            dv = lax.fori_loop(0, 2 * group, own_tile, dv)
            dk = plgpu.layout_cast(jnp.zeros((ROWS, K), f32), TILE)
            start = dk, dv, jnp.int32(0), jnp.int32(2 * group), jnp.int32(0)
            _, dv, *_ = lax.fori_loop(0, M, level, start)
            sv.at[wg][...] = dv.astype(bf16)
            plgpu.commit_smem()
            rows = pl.ds(leaf * LEAF + wg * ROWS, ROWS)
            plgpu.copy_smem_to_gmem(sv.at[wg], dv_ref.at[b, rows, h])
            plgpu.wait_smem_to_gmem(0, wait_read_only=True)

    scratch = [
        mosaic.tile(ROWS, K, QUERY_STAGES, dtype=f16),
        mosaic.tile(ROWS, V, QUERY_STAGES),
        mosaic.tile(ROWS, K, 2, 2, dtype=f16),
        mosaic.tile(ROWS, V, 2),
        plgpu.SMEM((QUERY_STAGES, 2, ROWS), f32),
    ]
    out_type = [SDS(k.shape, f16), SDS(k.shape[:-1], f32), SDS(v.shape, bf16)]
    if gated:
        scratch.append(plgpu.SMEM((QUERY_STAGES, ROWS), f32))
        out_type.append(SDS(gates[1].shape, f32))
    out = mosaic.kernel(
        body,
        out_type=out_type,
        scratch_types=[
            *scratch,
            plgpu.Barrier(num_arrivals=copies, num_barriers=QUERY_STAGES),
            plgpu.Barrier(num_arrivals=3, num_barriers=QUERY_STAGES),
            plgpu.Barrier(num_arrivals=2, num_barriers=2),
            plgpu.Barrier(num_arrivals=2),
            plgpu.Barrier(num_arrivals=2, num_barriers=QUERY_STAGES),
            plgpu.Barrier(num_arrivals=2, num_barriers=QUERY_STAGES),
            plgpu.Barrier(num_arrivals=2, num_barriers=2),
        ],
        grid=(B, P, H),
        grid_names=("b", "leaf", "h"),
        num_threads=3,
        thread_name="wg",
    )(q, k, v, *own, do, lse, delta, unit, *(gates or ()), transforms)
    return out if gated else (*out, None)
