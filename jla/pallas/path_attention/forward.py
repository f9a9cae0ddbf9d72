"""Softmax attention over the tree's levels: flash attention whose queries and keys change."""

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
from jla.pallas.path_attention.levels import LEAF

SDS = jax.ShapeDtypeStruct
ROWS = 64  # queries of one warpgroup; two make a leaf
STAGES = 2  # tiles of keys and values in SMEM
COMPUTE_REGISTERS, LOADER_REGISTERS = 232, 40


def forward(q, k, v, own, gates, *, scale):
    """Attention of each leaf of 128 queries to its own tokens, whose logits are given, and, level
    by level, to the left sibling's keys:

        logits = scale q k^T + gates of the query + gates of the key      (base 2)

    Args:
      q: [B, HQ, R, K] float16, all levels' query versions; see `levels`.
      k: [B, H, S, K] float16, all levels' key versions.
      v: [B, T, H, V] bf16, T a multiple of 8.
      own: the leaves' own logits in two parts, as `leaf.leaves` returns them.
      gates: None, or the sums of the gates from the level's middle to each query, [B, HQ, R], and
        from each key to the middle, [B, HQ, S], float32, -inf allowed.
      scale: positive, base 2.

    Returns:
      o [B, T, HQ, V] bf16, and the logits' log-sum-exp in base 2, [B, HQ, 128 P] float32.

    A CTA is a leaf of queries: two warpgroups of 64 rows, and one that loads. Leaf p has p tiles of
    128 keys, as in flash attention; heads are the fastest in launch order and long leaves come
    first, so that what runs at one time shares its keys in L2. SMEM at K=V=128: queries 64 KB (this
    level's and the next's), keys and values 128 KB.
    """
    (B, T, H, V), (HQ, P), K = v.shape, own[0].shape[1:3], q.shape[-1]
    group, M = HQ // H, levels.number(P)
    query_counts, key_counts = levels.query_counts(P), levels.key_counts(P)
    gated = gates is not None

    def body(q_ref, k_ref, v_ref, own_ref, tops_ref, *refs):
        if gated:
            query_gates, key_gates, *refs = refs
        o_ref, lse_ref, sq, sk, sv, *refs = refs
        if gated:
            query_sums, key_sums, *refs = refs
        q_loaded, k_loaded, v_loaded, q_used, k_used, v_used, turn, done = refs
        b, h, wg = (lax.axis_index(name) for name in ("b", "h", "wg"))
        leaf = P - 1 - lax.axis_index("leaf")

        @pl.when(wg == 2)
        def _():
            plgpu.set_max_registers(LOADER_REGISTERS, action="decrease")
            head = lax.div(h, jnp.int32(group))

            def values(leaf, n):
                slot, rows = lax.rem(n, jnp.int32(STAGES)), pl.ds(leaf * LEAF, LEAF)
                pl.when(n >= STAGES)(lambda: plgpu.barrier_wait(v_used.at[slot]))
                plgpu.copy_gmem_to_smem(v_ref.at[b, rows, head], sv.at[slot], v_loaded.at[slot])

            def level(m, carry):
                n, versions = carry
                right = levels.at_bit(leaf, m)

                @pl.when(right == 1)
                def _():
                    slot = lax.rem(versions, jnp.int32(2))
                    pl.when(versions >= 2)(lambda: plgpu.barrier_wait(q_used.at[slot]))
                    first = levels.place(query_counts, leaf, m) * LEAF
                    for half in range(2):
                        rows = pl.ds(first + half * ROWS, ROWS)
                        barrier = q_loaded.at[slot]
                        plgpu.copy_gmem_to_smem(q_ref.at[b, h, rows], sq.at[slot, half], barrier)
                        if gated:
                            source, target = query_gates.at[b, h, rows], query_sums.at[slot, half]
                            plgpu.copy_gmem_to_smem(source, target, barrier)

                sibling = levels.block(leaf, m)
                first = levels.offset(key_counts, m) + lax.shift_left(sibling, m)

                def tile(i, n):
                    slot = lax.rem(n, jnp.int32(STAGES))
                    pl.when(n > STAGES)(lambda: plgpu.barrier_wait(k_used.at[slot]))
                    rows, barrier = pl.ds((first + i) * LEAF, LEAF), k_loaded.at[slot]
                    plgpu.copy_gmem_to_smem(k_ref.at[b, head, rows], sk.at[slot], barrier)
                    if gated:
                        source = key_gates.at[b, h, rows]
                        plgpu.copy_gmem_to_smem(source, key_sums.at[slot], barrier)
                    values(lax.shift_left(sibling, m + 1) + i, n)
                    return n + 1

                return lax.fori_loop(0, lax.shift_left(right, m), tile, n), versions + right

            values(leaf, jnp.int32(0))
            n, versions = lax.fori_loop(0, M, level, (jnp.int32(1), jnp.int32(0)))
            mosaic.drain(k_used, STAGES, 1, n)
            mosaic.drain(v_used, STAGES, 0, n)
            mosaic.drain(q_used, 2, 0, versions)

        @pl.when(wg < 2)
        def _():
            plgpu.set_max_registers(COMPUTE_REGISTERS, action="increase")

            def take_turns():
                plgpu.barrier_arrive(turn)
                plgpu.barrier_wait(turn)

            rows = pl.ds(leaf * LEAF + wg * ROWS, ROWS)
            own, tops = own_ref.at[b, h, leaf], tops_ref.at[b, h, leaf]
            top = own_top(tops, wg)
            p = own_exp2(own, tops, wg, top)
            total = p.sum(axis=1)
            plgpu.barrier_wait(v_loaded.at[0])
            acc = mosaic.product((p.astype(bf16), sv.at[0]))
            mosaic.hand_back(v_used.at[0])
            # The warpgroups alternate: one multiplies while the other takes its softmax.
            pl.when(leaf > 0)(lambda: plgpu.barrier_wait(k_loaded.at[1]))
            pl.when(wg == 1)(take_turns)

            def level(m, carry):
                right = levels.at_bit(leaf, m)
                version = lax.rem(carry[-1], jnp.int32(2))
                pl.when(right == 1)(lambda: plgpu.barrier_wait(q_loaded.at[version]))

                def tile(_, carry):
                    acc, top, total, n = carry
                    slot = lax.rem(n, jnp.int32(STAGES))
                    s = mosaic.product((sq.at[version, wg], sk.at[slot].T), meanwhile=take_turns)
                    if gated:
                        by_key = load(key_sums.at[slot], PER_COLUMN)
                        by_query = load(query_sums.at[version, wg], PER_ROW)
                        s = s * scale + per_column(by_key, ROWS)
                        highest = jnp.maximum(top, s.max(axis=1) + by_query)
                        p = jnp.exp2(s + per_row(by_query - highest, LEAF))
                    else:
                        highest = jnp.maximum(top, s.max(axis=1) * scale)
                        p = jnp.exp2(s * scale - per_row(highest, LEAF))
                    mosaic.hand_back(k_used.at[slot])
                    shrink = jnp.exp2(top - highest)
                    acc *= per_row(shrink, V)
                    total = total * shrink + p.sum(axis=1)
                    p = p.astype(bf16)
                    # Keeps the compiler from moving any of this to after the barriers.
                    acc, total, highest, p = lax.optimization_barrier((acc, total, highest, p))
                    plgpu.barrier_arrive(turn)
                    plgpu.barrier_wait(v_loaded.at[slot])
                    plgpu.barrier_wait(turn)

                    def next_keys():
                        following = lax.rem(n + 1, jnp.int32(STAGES))
                        pl.when(n < leaf)(lambda: plgpu.barrier_wait(k_loaded.at[following]))

                    acc = mosaic.product((p, sv.at[slot]), init=acc, meanwhile=next_keys)
                    mosaic.hand_back(v_used.at[slot])
                    return acc, highest, total, n + 1

                *carry, versions = carry
                carry = lax.fori_loop(0, lax.shift_left(right, m), tile, tuple(carry))
                pl.when(right == 1)(lambda: mosaic.hand_back(q_used.at[version]))
                return *carry, versions + right

            start = acc, top, total, jnp.int32(1), jnp.int32(0)
            acc, top, total, *_ = lax.fori_loop(0, M, level, start)
            pl.when(wg == 0)(take_turns)
            mosaic.hand_back(done)
            plgpu.barrier_wait(done)  # nobody reads values any more: there is room for o
            so = sv.at[0, pl.ds(wg * ROWS, ROWS)]
            so[...] = (acc / per_row(total, V)).astype(bf16)
            plgpu.commit_smem()
            plgpu.copy_smem_to_gmem(so, o_ref.at[b, rows, h])
            lse_ref.at[b, h, rows][...] = top + jnp.log2(total)
            plgpu.wait_smem_to_gmem(0, wait_read_only=True)

    scratch = [
        mosaic.tile(ROWS, K, 2, 2, dtype=f16),
        mosaic.tile(LEAF, K, STAGES, dtype=f16),
        mosaic.tile(LEAF, V, STAGES),
    ]
    if gated:
        scratch += [plgpu.SMEM((2, 2, ROWS), f32), plgpu.SMEM((STAGES, LEAF), f32)]
    copies = 2 if gated else 1
    return mosaic.kernel(
        body,
        out_type=[SDS((B, T, HQ, V), bf16), SDS((B, HQ, P * LEAF), f32)],
        scratch_types=[
            *scratch,
            plgpu.Barrier(num_arrivals=2 * copies, num_barriers=2),
            plgpu.Barrier(num_arrivals=copies, num_barriers=STAGES),
            plgpu.Barrier(num_barriers=STAGES),
            plgpu.Barrier(num_arrivals=2, num_barriers=2),
            plgpu.Barrier(num_arrivals=2, num_barriers=STAGES),
            plgpu.Barrier(num_arrivals=2, num_barriers=STAGES),
            plgpu.Barrier(num_arrivals=2),
            plgpu.Barrier(num_arrivals=2),
        ],
        grid=(B, P, HQ),
        grid_names=("b", "leaf", "h"),
        num_threads=3,
        thread_name="wg",
    )(q, k, v, *own, *(gates or ()))


def own_top(tops, chunk):
    """The largest of the leaf's own logits, for each query of a chunk."""
    return jnp.maximum(*(load(tops.at[i * chunk], PER_ROW, optimized=False) for i in (1, 2)))


def own_exp2(own, tops, chunk, minus):
    """exp2(logits - minus) for a chunk of queries and the leaf's keys; `minus` is PER_ROW.

    The second chunk's blocks are the last two; the first's is the first, and zeros.
    """

    def block(i):
        top = load(tops.at[i], PER_ROW, optimized=False)
        return jnp.exp2(load(own.at[i], optimized=False) + per_row(top - minus, ROWS))

    def nothing():
        return plgpu.layout_cast(jnp.zeros((ROWS, ROWS), f32), TILE)

    return jnp.concatenate([block(chunk), lax.cond(chunk == 1, lambda: block(2), nothing)], 1)
