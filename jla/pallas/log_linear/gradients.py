"""The gradients of all chunks: as readers (of q and the weights that read) and as what is read.

Both work with the same pairs, the one by rows, the other transposed, so that what is summed is
always a row of a register tile.
"""

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from jla.pallas.common import chunks, mosaic
from jla.pallas.common.chunks import CHUNK, LEVELS, TILE_WIDTH
from jla.pallas.common.mosaic import (
    PER_COLUMN,
    PER_ROW,
    bf16,
    f32,
    load,
    per_column,
    per_row,
    product,
)
from jla.pallas.common.tiles import columns, row_sum, smem_tiles
from jla.pallas.log_linear import stream

SDS = jax.ShapeDtypeStruct


def reader_gradients(q, k, v, do, weights, states, live, *, per, inside, skip):
    """With a = q_t . k_s, u = do_t . v_s and the weights as in `outputs.outputs`,

        dq_t = sum_s u w_l[t] w_l[s] k_s + sum_m w_l(m)[t] S_m do_t
        dw_l[t] = sum_s a u w_l[s],   or   q_t S_m do_t

    Args: as of `outputs.outputs`; do: [B, T, H, V] bf16; skip: whether o has the term D v_t.

    Returns:
      dq for each head, [B, T, H, K] bf16, and [B, H, N, P, 64] float32, of which only the planes of
      levels at which a token reads are written; with `skip` also the last one: do_t . v_t.

    As `outputs`, with do beside q: 104 KB of SMEM at K=V=128, two chunks a multiprocessor. Traffic
    at B=8 T=4096 H=16 HK=1 K=V=128, leaf blocks of 256: v, do, dq 134 MB each, states 63 MB: 0.47
    GB, 0.11 ms at 4.3 TB/s.
    """
    B, T, H, V = v.shape
    HK, K = q.shape[2:]
    N, P = weights.shape[2:4]
    group, k_tiles, v_tiles = H // HK, K // TILE_WIDTH, V // TILE_WIDTH

    @stream.of_live_chunks(live, N)
    def body(_, q_ref, k_ref, v_ref, do_ref, weights_ref, *refs):
        states_ref = refs[0] if states is not None else None
        dq_out, dw_out, sq, sdo, ring, srow, scolumn, other, near, loaded, states_loaded = refs[
            -11:
        ]
        b, n, h = (lax.axis_index(name) for name in ("b", "n", "h"))
        key_head, rows = lax.div(h, group), pl.ds(n * CHUNK, CHUNK)
        for i in range(k_tiles):
            plgpu.copy_gmem_to_smem(q_ref.at[b, rows, key_head, columns(i)], sq[i], near)
        for i in range(v_tiles):
            plgpu.copy_gmem_to_smem(do_ref.at[b, rows, h, columns(i)], sdo[i], near)
        for target in (srow, scolumn):
            plgpu.copy_gmem_to_smem(weights_ref.at[b, h, n], target, near)

        def fetch_chunk(j, slot):
            rows, barrier = pl.ds(j * CHUNK, CHUNK), loaded.at[slot]
            for i in range(k_tiles):
                source = k_ref.at[b, rows, key_head, columns(i)]
                plgpu.copy_gmem_to_smem(source, ring[i].at[slot], barrier)
            for i in range(v_tiles):
                source = v_ref.at[b, rows, h, columns(i)]
                plgpu.copy_gmem_to_smem(source, ring[k_tiles + i].at[slot], barrier)
            source = weights_ref.at[b, h, j, stream.level_between(n, j)]
            plgpu.copy_gmem_to_smem(source, other.at[slot], barrier)

        def fetch_state(block, slot):
            place, _ = stream.node(block, states.shape[2])
            _fetch_state(states_ref.at[b, h, place], ring, slot, states_loaded.at[slot], k_tiles)

        def put(plane, value):
            dw_out.at[b, h, n, plane][...] = value

        def pairs(slot):
            plgpu.barrier_wait(loaded.at[slot])
            a = product(*((x, y.at[slot].T) for x, y in zip(sq, ring[:k_tiles], strict=True)))
            u = product(*((x, y.at[slot].T) for x, y in zip(sdo, ring[k_tiles:], strict=True)))
            return a, u

        def on_diagonal(slot):
            plgpu.barrier_wait(near)
            a, u = pairs(slot)
            changes = a * u
            own, weights = _own(srow, changes)
            put(0, own)
            if skip:
                put(P - 1, jnp.sum(jnp.where(chunks.diagonal(), u, 0.0), axis=1))

            def level_step(level, weights):
                weights, mask, column = stream.diagonal_level(level, srow, scolumn, weights, False)
                put(level + 1, jnp.sum(jnp.where(mask, changes * column, 0.0), axis=1))
                return weights

            weights = lax.fori_loop(0, LEVELS, level_step, weights)
            da = (u * weights).astype(bf16)
            dq = tuple(product((da, ring[i].at[slot])) for i in range(k_tiles))
            zeros = plgpu.layout_cast(jnp.zeros((CHUNK,), f32), PER_ROW)
            return dq, (zeros,) * (inside - LEVELS)

        def on_chunk(j, slot, carry):
            dq, changes = carry
            level = stream.level_between(n, j)
            a, u = pairs(slot)
            u *= per_column(load(other.at[slot], PER_COLUMN), CHUNK)
            change = jnp.sum(a * u, axis=1)
            u *= per_row(load(srow.at[level], PER_ROW), CHUNK)
            da = u.astype(bf16)
            dq = tuple(product((da, ring[i].at[slot]), init=x) for i, x in enumerate(dq))
            changes = tuple(
                x + jnp.where(jnp.broadcast_to(level == LEVELS + 1 + i, x.shape), change, 0.0)
                for i, x in enumerate(changes)
            )
            return dq, changes

        def on_state(block, slot, carry):
            dq, changes = carry
            plane = inside + 1 + stream.lowest_bit(block)
            row = per_row(load(srow.at[plane], PER_ROW), TILE_WIDTH)
            plgpu.barrier_wait(states_loaded.at[slot])
            through = [
                product(*((x, ring[i * k_tiles + j].at[slot]) for i, x in enumerate(sdo)))
                for j in range(k_tiles)
            ]
            put(plane, row_sum([load(x) * y for x, y in zip(sq, through, strict=True)]))
            return tuple(x + row * y for x, y in zip(dq, through, strict=True)), changes

        dq, changes = stream.back(
            n, per, fetch_chunk, fetch_state if states is not None else None,
            on_diagonal, on_chunk, on_state,
        )  # fmt: skip
        for i, x in enumerate(changes):
            put(LEVELS + 1 + i, x)
        _send([(sq, dq, dq_out.at[b, rows, h])])

    operands = [x for x in (live, q, k, v, do, weights, states) if x is not None]
    return mosaic.kernel(
        body,
        automatic_barriers=False,
        out_type=[SDS((B, T, H, K), bf16), SDS((B, H, N, P, CHUNK), f32)],
        scratch_types=_scratch(k_tiles, v_tiles, P),
        grid=(B, N, H),
        grid_names=("b", "n", "h"),
    )(*operands)


def writer_gradients(q, k, v, do, weights, gradients, skip, live, *, per, inside):
    """With a, u and w as in `reader_gradients`, d the decay of a token's writes to the end of its
    leaf block (the last plane of the weights), dS the gradient of the block's state,

        dk_s = sum_t u w_l[t] w_l[s] q_t + d[s] dS v_s
        dv_s = sum_t a w_l[t] w_l[s] do_t + d[s] k_s dS + D do_s
        dw_l[s] = sum_t a u w_l[t];   dd[s] = k_s dS v_s

    Args: as of `outputs.outputs`; do: [B, T, H, V] bf16; gradients: dS, [B, H, blocks - 1, V, K]
    bf16, or None.

    Returns:
      dk for each head, [B, T, H, K], dv [B, T, H, V] bf16, and [B, H, N, P, 64] float32, of which
      only the planes of levels at which a token is read, and the last, are written.

    SMEM as `reader_gradients`, k and v for q and do. Traffic at B=8 T=4096 H=16 HK=1 K=V=128, leaf
    blocks of 256: v, do, dk, dv 134 MB each, dS 63 MB: 0.6 GB, 0.14 ms at 4.3 TB/s.
    """
    B, T, H, V = v.shape
    HK, K = q.shape[2:]
    N, P = weights.shape[2:4]
    group, k_tiles, v_tiles = H // HK, K // TILE_WIDTH, V // TILE_WIDTH
    blocks = -(-N // per)

    @stream.of_live_chunks(live, N)
    def body(until, q_ref, k_ref, v_ref, do_ref, weights_ref, *refs):
        refs = list(refs)
        gradients_ref = refs.pop(0) if gradients is not None else None
        skip_ref = refs.pop(0) if skip is not None else None
        dk_out, dv_out, dw_out, *refs = refs
        sk, sv, ring, srow, scolumn, other, near, loaded, gradient_loaded = refs
        b, n, h = (lax.axis_index(name) for name in ("b", "n", "h"))
        key_head, rows = lax.div(h, group), pl.ds(n * CHUNK, CHUNK)
        for i in range(k_tiles):
            plgpu.copy_gmem_to_smem(k_ref.at[b, rows, key_head, columns(i)], sk[i], near)
        for i in range(v_tiles):
            plgpu.copy_gmem_to_smem(v_ref.at[b, rows, h, columns(i)], sv[i], near)
        for target in (srow, scolumn):
            plgpu.copy_gmem_to_smem(weights_ref.at[b, h, n], target, near)

        def fetch_chunk(i, slot):
            rows, barrier = pl.ds(i * CHUNK, CHUNK), loaded.at[slot]
            for j in range(k_tiles):
                source = q_ref.at[b, rows, key_head, columns(j)]
                plgpu.copy_gmem_to_smem(source, ring[j].at[slot], barrier)
            for j in range(v_tiles):
                source = do_ref.at[b, rows, h, columns(j)]
                plgpu.copy_gmem_to_smem(source, ring[k_tiles + j].at[slot], barrier)
            source = weights_ref.at[b, h, i, stream.level_between(n, i)]
            plgpu.copy_gmem_to_smem(source, other.at[slot], barrier)

        def fetch_gradient(slot):
            source = gradients_ref.at[b, h, lax.div(n, jnp.int32(per))]
            _fetch_state(source, ring, slot, gradient_loaded.at[slot], k_tiles)

        def put(plane, value):
            dw_out.at[b, h, n, plane][...] = value

        def pairs(slot):
            plgpu.barrier_wait(loaded.at[slot])
            a = product(*((x, y.at[slot].T) for x, y in zip(sk, ring[:k_tiles], strict=True)))
            u = product(*((x, y.at[slot].T) for x, y in zip(sv, ring[k_tiles:], strict=True)))
            return a, u

        def on_diagonal(slot):
            plgpu.barrier_wait(near)
            a, u = pairs(slot)
            changes = a * u
            _, weights = _own(srow, changes)

            def level_step(level, weights):
                weights, mask, column = stream.diagonal_level(level, srow, scolumn, weights, True)
                put(level + 1, jnp.sum(jnp.where(mask, changes * column, 0.0), axis=1))
                return weights

            weights = lax.fori_loop(0, LEVELS, level_step, weights)
            own = None if skip is None else skip_ref[b, 0, h, 0]
            da = (u * weights).astype(bf16)
            p = stream.plus_skip(a * weights, own).astype(bf16)
            dk = tuple(product((da, x.at[slot])) for x in ring[:k_tiles])
            dv = tuple(product((p, x.at[slot])) for x in ring[k_tiles:])
            zeros = plgpu.layout_cast(jnp.zeros((CHUNK,), f32), PER_ROW)
            return dk, dv, (zeros,) * (inside - LEVELS)

        def on_chunk(i, slot, carry):
            dk, dv, changes = carry
            level = stream.level_between(n, i)
            a, u = pairs(slot)
            row = per_row(load(srow.at[level], PER_ROW), CHUNK)
            column = per_column(load(other.at[slot], PER_COLUMN), CHUNK)
            a *= column
            change = jnp.sum(a * u, axis=1)
            p, da = (a * row).astype(bf16), (u * (column * row)).astype(bf16)
            dk = tuple(
                product((da, y.at[slot]), init=x) for x, y in zip(dk, ring[:k_tiles], strict=True)
            )
            dv = tuple(
                product((p, y.at[slot]), init=x) for x, y in zip(dv, ring[k_tiles:], strict=True)
            )
            changes = tuple(
                x + jnp.where(jnp.broadcast_to(level == LEVELS + 1 + j, x.shape), change, 0.0)
                for j, x in enumerate(changes)
            )
            return dk, dv, changes

        def on_gradient(slot, carry):
            dk, dv, changes = carry
            row = per_row(load(srow.at[P - 1], PER_ROW), TILE_WIDTH)
            keys = [(load(x) * row).astype(bf16) for x in sk]
            plgpu.barrier_wait(gradient_loaded.at[slot])
            dv = tuple(
                product(
                    *((x, ring[i * k_tiles + j].at[slot].T) for j, x in enumerate(keys)), init=y
                )
                for i, y in enumerate(dv)
            )
            through = [
                product(*((x, ring[i * k_tiles + j].at[slot]) for i, x in enumerate(sv)))
                for j in range(k_tiles)
            ]
            put(P - 1, row_sum([load(x) * y for x, y in zip(sk, through, strict=True)]))
            return tuple(x + row * y for x, y in zip(dk, through, strict=True)), dv, changes

        put(P - 1, plgpu.layout_cast(jnp.zeros((CHUNK,), f32), PER_ROW))
        dk, dv, changes = stream.forth(
            n, per, until - 1, blocks, fetch_chunk,
            fetch_gradient if gradients is not None else None, on_diagonal, on_chunk, on_gradient,
        )  # fmt: skip
        for i, x in enumerate(changes):
            put(LEVELS + 1 + i, x)
        plgpu.commit_smem()
        _send([(sk, dk, dk_out.at[b, rows, h]), (sv, dv, dv_out.at[b, rows, h])])

    operands = [x for x in (live, q, k, v, do, weights, gradients, skip) if x is not None]
    return mosaic.kernel(
        body,
        automatic_barriers=False,
        out_type=[
            SDS((B, T, H, K), bf16),
            SDS((B, T, H, V), bf16),
            SDS((B, H, N, P, CHUNK), f32),
        ],
        scratch_types=_scratch(k_tiles, v_tiles, P),
        grid=(B, N, H),
        grid_names=("b", "n", "h"),
    )(*operands)


def _scratch(k_tiles, v_tiles, P):
    """The chunk's own tiles, the ring, the weights by rows and by columns, those of the others."""
    return [
        smem_tiles(k_tiles),
        smem_tiles(v_tiles),
        smem_tiles(k_tiles + v_tiles, stream.STAGES),
        plgpu.SMEM((P, CHUNK), f32),
        plgpu.SMEM((P, CHUNK), f32),
        stream.vector(stream.STAGES),
        plgpu.Barrier(num_arrivals=k_tiles + v_tiles + 2),
        plgpu.Barrier(num_arrivals=k_tiles + v_tiles + 1, num_barriers=stream.STAGES),
        plgpu.Barrier(num_arrivals=k_tiles * v_tiles, num_barriers=stream.STAGES),
    ]


def _own(srow, changes):
    """Of each token with itself: the gradient of its weight, and the weights, on the diagonal."""
    weights = per_row(load(srow.at[0], PER_ROW), CHUNK)
    mask = chunks.diagonal()
    change = jnp.sum(jnp.where(mask, changes, 0.0), axis=1)
    return change, jnp.where(mask, weights, 0.0)


def _fetch_state(source, ring, slot, barrier, k_tiles):
    for i in range(source.shape[0] // TILE_WIDTH):
        for j in range(k_tiles):
            target = ring[i * k_tiles + j].at[slot]
            plgpu.copy_gmem_to_smem(source.at[columns(i), columns(j)], target, barrier)


def _send(results):
    """Sends tiles to memory as bf16, through SMEM that nobody reads any more."""
    for buffers, values, _ in results:
        for buffer, value in zip(buffers, values, strict=True):
            buffer[...] = value.astype(bf16)
    plgpu.commit_smem()
    for buffers, _, out in results:
        for i, buffer in enumerate(buffers):
            plgpu.copy_smem_to_gmem(buffer, out.at[:, columns(i)])
    plgpu.wait_smem_to_gmem(0, wait_read_only=True)
