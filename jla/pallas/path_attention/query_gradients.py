"""The backward pass of `forward` by leaves of queries; see `backward`."""

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from jla.pallas.common import mosaic
from jla.pallas.common.mosaic import PER_COLUMN, PER_ROW, TILE, f16, f32, load, per_column, per_row
from jla.pallas.path_attention import levels
from jla.pallas.path_attention.backward import load_rows, normalised
from jla.pallas.path_attention.forward import (
    COMPUTE_REGISTERS,
    LOADER_REGISTERS,
    ROWS,
    own_exp2,
)
from jla.pallas.path_attention.levels import LEAF

SDS = jax.ShapeDtypeStruct
KEY_STAGES = 2  # tiles of 128 keys and values in SMEM
PARTS = 8  # of a sum along rows, each in the registers of one thread


def query_gradients(q, k, v, own, gates, do, lse, delta, unit, transforms, after, *, scale):
    """The gradients of queries, of their gates, and of the leaves' own logits:

        p = exp2(logits - lse);   ds = p (do v^T - delta);   dq = ds k + dq_above H^T

    Args:
      q, k, v, own, gates: as `forward.forward` takes them.
      do: [B, T, HQ, V] bf16.
      lse, delta: the log-sum-exp and the sum of do o, [B, HQ, 128 P] float32.
      unit: [B, H] float32, with which no ds leaves float16's range.
      transforms: H of all blocks [B, H, blocks, K, K] float16, see `levels.block_counts`.
      after: an array that is not read. It comes of the last other kernel that reads own: so XLA
        knows that own may be overwritten.

    Returns:
      unit * dq in two parts, [B, HQ, R, K] float16 and [B, HQ, R] float32; unit * (ds of the own
      logits), [B, HQ, P, 3, 64, 64] float16, in the memory of own, and its rows' largest elements
      [B, HQ, 128 P] float32; and, with gates (or None), unit * (the sums of ds over each eighth
      key) [B, HQ, R, 8] float32; ds without scale.

    CTAs as in `forward`; SMEM at K=V=128: queries 64 KB, do 32 KB, keys and values 128 KB: no room
    for 2 KB more, so that gates are summed in parts. A level's dq takes the place of its queries;
    H comes as if it were keys.
    """
    (B, _, H, V), (HQ, P), K = v.shape, own[0].shape[1:3], q.shape[-1]
    group, M = HQ // H, levels.number(P)
    query_counts, key_counts = levels.query_counts(P), levels.key_counts(P)
    blocks = levels.block_counts(P)
    gated = gates is not None
    copies = 2 if gated else 1  # that a tile of queries or keys takes

    def body(q_ref, k_ref, v_ref, own_ref, tops_ref, do_ref, lse_ref, delta_ref, unit_ref, *refs):
        if gated:
            query_gates, key_gates, *refs = refs
        transforms_ref, _, dq_ref, factors_ref, down_ref, largest_ref, *refs = refs
        if gated:
            sums_ref, *refs = refs
        sq, sk, sv, sdo, *refs = refs
        if gated:
            query_sums, key_sums, *refs = refs
        q_loaded, k_loaded, v_loaded, do_loaded, q_used, k_used, v_used = refs
        b, h, wg = (lax.axis_index(name) for name in ("b", "h", "wg"))
        leaf, head = P - 1 - lax.axis_index("leaf"), lax.div(h, jnp.int32(group))

        @pl.when(wg == 2)
        def _():
            plgpu.set_max_registers(LOADER_REGISTERS, action="decrease")

            def values(leaf, n):
                slot, rows = lax.rem(n, jnp.int32(KEY_STAGES)), pl.ds(leaf * LEAF, LEAF)
                pl.when(n >= KEY_STAGES)(lambda: plgpu.barrier_wait(v_used.at[slot]))
                plgpu.copy_gmem_to_smem(v_ref.at[b, rows, head], sv.at[slot], v_loaded.at[slot])

            def key_slot(n):
                slot = lax.rem(n, jnp.int32(KEY_STAGES))
                pl.when(n >= KEY_STAGES)(lambda: plgpu.barrier_wait(k_used.at[slot]))
                return slot

            def level(i, carry):
                n, tiles, versions = carry
                m = M - 1 - i
                right = levels.at_bit(leaf, m)
                moved = right * jnp.minimum(versions, 1)

                @pl.when(right == 1)
                def _():
                    slot = lax.rem(versions, jnp.int32(2))
                    pl.when(versions >= 2)(lambda: plgpu.barrier_wait(q_used.at[slot]))
                    for half in range(2):
                        rows, barrier = levels.rows(query_counts, leaf, m, half), q_loaded.at[slot]
                        plgpu.copy_gmem_to_smem(q_ref.at[b, h, rows], sq.at[slot, half], barrier)
                        if gated:
                            source, target = query_gates.at[b, h, rows], query_sums.at[slot, half]
                            plgpu.copy_gmem_to_smem(source, target, barrier)

                sibling = levels.block(leaf, m)
                first = levels.offset(key_counts, m) + lax.shift_left(sibling, m)

                @pl.when(moved == 1)
                def _():
                    slot = key_slot(n)
                    source = transforms_ref.at[b, head, levels.offset(blocks, m) + 2 * sibling]
                    load_rows(source, 0, sk.at[slot, pl.ds(0, K)], k_loaded.at[slot])

                def tile(i, _):
                    slot = key_slot(n + moved + i)
                    rows, barrier = pl.ds((first + i) * LEAF, LEAF), k_loaded.at[slot]
                    plgpu.copy_gmem_to_smem(k_ref.at[b, head, rows], sk.at[slot], barrier)
                    if gated:
                        source = key_gates.at[b, h, rows]
                        plgpu.copy_gmem_to_smem(source, key_sums.at[slot], barrier)
                    values(lax.shift_left(sibling, m + 1) + i, tiles + i)

                count = lax.shift_left(right, m)
                lax.fori_loop(0, count, tile, None)
                return n + moved + count, tiles + count, versions + right

            for half in range(2):
                rows = pl.ds(leaf * LEAF + half * ROWS, ROWS)
                plgpu.copy_gmem_to_smem(do_ref.at[b, rows, h], sdo.at[half], do_loaded)
            values(leaf, jnp.int32(0))
            start = jnp.int32(0), jnp.int32(1), jnp.int32(0)
            n, tiles, versions = lax.fori_loop(0, M, level, start)
            mosaic.drain(k_used, KEY_STAGES, 0, n)
            mosaic.drain(v_used, KEY_STAGES, 0, tiles)
            mosaic.drain(q_used, 2, 0, versions)

        @pl.when(wg < 2)
        def _():
            plgpu.set_max_registers(COMPUTE_REGISTERS, action="increase")
            rows = pl.ds(leaf * LEAF + wg * ROWS, ROWS)
            unit = unit_ref[b, head]
            lse = load(lse_ref.at[b, h, rows], PER_ROW, optimized=False)
            delta = load(delta_ref.at[b, h, rows], PER_ROW, optimized=False) * unit

            p = own_exp2(own_ref.at[b, h, leaf], tops_ref.at[b, h, leaf], wg, lse)
            plgpu.barrier_wait(do_loaded)
            plgpu.barrier_wait(v_loaded.at[0])
            dp = mosaic.product((sdo.at[wg], sv.at[0].T))
            mosaic.hand_back(v_used.at[0])
            ds = p * (dp * unit - per_row(delta, LEAF))
            largest_ref.at[b, h, rows][...] = jnp.abs(ds).max(axis=1)
            down = ds.astype(f16)
            mosaic.store(down_ref.at[b, h, leaf, wg], down[:, :ROWS])

            @pl.when(wg == 1)
            def _():
                mosaic.store(down_ref.at[b, h, leaf, 2], down[:, ROWS:])

            def level(i, carry):
                dq, n, tiles, versions = carry
                m = M - 1 - i
                right = levels.at_bit(leaf, m)
                moved = right * jnp.minimum(versions, 1)
                version = lax.rem(versions, jnp.int32(2))

                def move(_, dq):
                    slot = lax.rem(n, jnp.int32(KEY_STAGES))
                    small, factor = normalised(dq)
                    plgpu.barrier_wait(k_loaded.at[slot])
                    dq = mosaic.product((small, sk.at[slot, pl.ds(0, K)].T)) * per_row(factor, K)
                    mosaic.hand_back(k_used.at[slot])
                    return dq

                def tile(i, carry):
                    dq, sums = carry
                    key_slot = lax.rem(n + moved + i, jnp.int32(KEY_STAGES))
                    slot = lax.rem(tiles + i, jnp.int32(KEY_STAGES))
                    plgpu.barrier_wait(k_loaded.at[key_slot])
                    s = mosaic.product((sq.at[version, wg], sk.at[key_slot].T)) * scale
                    if gated:
                        s += per_column(load(key_sums.at[key_slot], PER_COLUMN), ROWS)
                        by_query = load(query_sums.at[version, wg], PER_ROW)
                        p = jnp.exp2(s + per_row(by_query - lse, LEAF))
                    else:
                        p = jnp.exp2(s - per_row(lse, LEAF))
                    plgpu.barrier_wait(v_loaded.at[slot])
                    dp = mosaic.product((sdo.at[wg], sv.at[slot].T))
                    mosaic.hand_back(v_used.at[slot])
                    ds = p * (dp * unit - per_row(delta, LEAF))
                    if gated:
                        sums += _folded(ds)
                    dq = mosaic.product((ds.astype(f16), sk.at[key_slot]), init=dq)
                    mosaic.hand_back(k_used.at[key_slot])
                    return dq, sums

                @pl.when(right == 1)
                def _():
                    plgpu.barrier_wait(q_loaded.at[version])

                dq = lax.fori_loop(0, moved, move, dq)
                sums = plgpu.layout_cast(jnp.zeros((ROWS, PARTS), f32), TILE)
                count = lax.shift_left(right, m)
                dq, sums = lax.fori_loop(0, count, tile, (dq, sums))

                @pl.when(right == 1)
                def _():
                    rows = levels.rows(query_counts, leaf, m, wg)
                    small, factor = normalised(dq)
                    factors_ref.at[b, h, rows][...] = factor
                    sq.at[version, wg][...] = small
                    plgpu.commit_smem()
                    plgpu.copy_smem_to_gmem(sq.at[version, wg], dq_ref.at[b, h, rows])
                    if gated:
                        sums_ref.at[b, h, rows][...] = sums
                    plgpu.wait_smem_to_gmem(0, wait_read_only=True)
                    mosaic.hand_back(q_used.at[version])

                return dq, n + moved + count, tiles + count, versions + right

            dq = plgpu.layout_cast(jnp.zeros((ROWS, K), f32), TILE)
            lax.fori_loop(0, M, level, (dq, jnp.int32(0), jnp.int32(1), jnp.int32(0)))

    scratch = [
        mosaic.tile(ROWS, K, 2, 2, dtype=f16),
        mosaic.tile(LEAF, K, KEY_STAGES, dtype=f16),
        mosaic.tile(LEAF, V, KEY_STAGES),
        mosaic.tile(ROWS, V, 2),
    ]
    out_type = [
        *(SDS(q.shape, f16), SDS(q.shape[:-1], f32)),
        *(SDS(own[0].shape, f16), SDS((B, HQ, P * LEAF), f32)),
    ]
    if gated:
        scratch += [plgpu.SMEM((2, 2, ROWS), f32), plgpu.SMEM((KEY_STAGES, LEAF), f32)]
        out_type.append(SDS((*gates[0].shape, PARTS), f32))
    out = mosaic.kernel(
        body,
        reductions_cross_warps=False,
        in_place={3: 2},
        out_type=out_type,
        scratch_types=[
            *scratch,
            plgpu.Barrier(num_arrivals=2 * copies, num_barriers=2),
            plgpu.Barrier(num_arrivals=copies, num_barriers=KEY_STAGES),
            plgpu.Barrier(num_barriers=KEY_STAGES),
            plgpu.Barrier(num_arrivals=2),
            plgpu.Barrier(num_arrivals=2, num_barriers=2),
            plgpu.Barrier(num_arrivals=2, num_barriers=KEY_STAGES),
            plgpu.Barrier(num_arrivals=2, num_barriers=KEY_STAGES),
        ],
        grid=(B, P, HQ),
        grid_names=("b", "leaf", "h"),
        num_threads=3,
        thread_name="wg",
    )(q, k, v, *own, do, lse, delta, unit, *(gates or ()), transforms, after)
    return out if gated else (*out, None)


def _folded(x):
    """The sums of every eighth column of a tile."""
    while (width := x.shape[1] // 2) >= PARTS:
        x = x[:, :width] + x[:, width:]
    return x
