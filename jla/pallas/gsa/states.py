"""The two states of Gated Slot Attention from chunk to chunk, and their gradients in reverse.

Both states, and both of their gradients, follow one rule. With X [D, M], a row for each feature
and a column for each slot (X = Hk, or X = Hv^T), a chunk's features x [64, D], its weights w
[64, M]:

    forward:  X <- X Diag(exp G_end) + x^T (w exp(G_end - G))     x = k or v, w = s
    reverse:  X <- X Diag(exp G_end) + x^T (w exp(G))             x = q or do, w = dlogits or p

It is linear and depends on no query, and its factors are diagonal, so that a long sequence of few
heads can be cut into pieces: one pass makes each piece's end from zeros, elementwise products join
them, and a second pass runs all pieces from their true starts.
"""

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from jla._core.exchange import join
from jla.pallas.common import chunks, mosaic
from jla.pallas.common.chunks import CHUNK, TILE_WIDTH
from jla.pallas.common.mosaic import WGMMA_LAYOUT, bf16, f16, f32
from jla.pallas.common.pieces import number_of_pairs
from jla.pallas.common.recurrence import piece
from jla.pallas.common.tiles import columns, smem_tiles

SDS = jax.ShapeDtypeStruct


def through_chunks(features, weights, gates, starts, *, reverse=False, pieces=None):
    """Both states before each chunk, and the last; in reverse, the gradients of those after it.

    Args:
      features: x of either state, [B, T, HX, K] and [B, T, HX, V] bf16, HX a multiple of H; what
        the heads of a group contribute is added.
      weights: w of either state, [B, T, HX, M] bf16.
      gates: [B, T, H, M] float16, from `chunks.decay_operand`.
      starts: the first states, [B, H, K, M] and [B, H, M, V] float32, or None for zeros.
      pieces: for tests; by default their number follows from the shapes.

    Returns:
      X at the chunks' borders, [B, H, N, K, M] and [B, H, N, V, M] bf16, and the last states, as
      `starts`.
    """
    B, T, H, M = gates.shape
    N = _chunks(T)
    K, V = (x.shape[-1] for x in features)
    if pieces is None:
        pieces = number_of_pairs(B * H * _blocks(K, V, M), N)
    if starts is None:
        starts = jnp.zeros((B, H, K, M), f32), jnp.zeros((B, H, M, V), f32)
    starts = tuple(x[None] for x in starts)
    if pieces > 1:
        *ends, decays = _run(features, weights, gates, None, pieces, reverse=reverse)
        starts = _join(ends, decays, starts, reverse=reverse)
    *states, hk, hv = _run(features, weights, gates, starts, pieces, reverse=reverse)
    last = 0 if reverse else -1
    return (*states, hk[last], hv[last])


def _join(ends, log_decays, starts, *, reverse):
    """The states that the pieces start from, by X <- decay X + end over the pieces before."""
    decays = jnp.exp2(log_decays[..., 0, :])  # all rows are the same
    return tuple(
        join(jnp.expand_dims(decays, axis), end, start[0], reverse=reverse)
        for end, start, axis in zip(ends, starts, (3, 4), strict=True)
    )


def _width(K, V, M):
    """Features of one warpgroup: 64 registers a thread hold its part of the state."""
    return 2 * TILE_WIDTH if M == TILE_WIDTH and not (K % 128 or V % 128) else TILE_WIDTH


def _blocks(K, V, M):
    return (K + V) // _width(K, V, M)


def _run(features, weights, gates, starts, pieces, *, reverse):
    """The kernel: all pieces from `starts`, [P, B, H, ...], with the states at the chunks' borders
    and the pieces' last states, [P, B, H, ...]; or from zeros (None) all pieces that others follow.
    Then it returns their last states, [P - 1, ...], and sums of log decays, [P - 1, B, H, 64, M]
    in equal rows.

    One warpgroup has 128 features of either state (64 if M > 64) in registers for a whole piece.
    The chunk's operands are loaded two chunks ahead into a ring of three (two if M > 64); the
    weights are decayed in place.

    Traffic at B=8 T=4096 H=16 K=V=128 M=64, forward: k, v 134 MB each, s, gates 67 MB each (twice
    into SMEM, the second time from L2), states out 268 MB: 0.67 GB, 0.156 ms at 4.3 TB/s; in
    reverse 67 MB more. Operations: about 450 instructions a warp and chunk, two CTAs a
    multiprocessor: 0.06 ms of issue. Prediction: 0.18 ms.
    """
    B, T, H, M = gates.shape
    K, V = (x.shape[-1] for x in features)
    group = features[0].shape[2] // H
    N = _chunks(T)
    width = _width(K, V, M)
    tiles, m_tiles = width // TILE_WIDTH, M // TILE_WIDTH
    stages = 3 if M == TILE_WIDTH else 2
    key_blocks = K // width
    keep = starts is not None
    P = pieces if keep else pieces - 1
    skipped = pieces - P if reverse else 0

    def body(*refs):
        k_ref, v_ref, kw_ref, vw_ref, gates_ref, *refs = refs
        if keep:
            k_start, v_start, k_states, v_states, *refs = refs
        k_end, v_end, *refs = refs
        if not keep:
            sums_out, *refs = refs
        sx, sw, sg, so, loaded = refs
        p, b, h, block = (lax.axis_index(name) for name in ("p", "b", "h", "block"))
        first, count = piece(p + skipped, pieces, N)
        steps = count * group
        sides = (
            (block < key_blocks, k_ref, kw_ref, block * width),
            (block >= key_blocks, v_ref, vw_ref, (block - key_blocks) * width),
        )

        def chunk(step):
            i = _divide(step, group)
            return first + (count - 1 - i if reverse else i)

        def fetch(step):
            slot, rows = _modulo(step, stages), pl.ds(chunk(step) * CHUNK, CHUNK)
            head = h * group + _modulo(step, group)
            for mine, x_ref, w_ref, feature in sides:

                @pl.when(mine)
                def _(x_ref=x_ref, w_ref=w_ref, feature=feature):
                    for i in range(tiles):
                        part = pl.ds(feature + i * TILE_WIDTH, TILE_WIDTH)
                        source = x_ref.at[b, rows, head, part]
                        plgpu.copy_gmem_to_smem(source, sx[i].at[slot], loaded.at[slot])
                    for m in range(m_tiles):
                        source = w_ref.at[b, rows, head, columns(m)]
                        plgpu.copy_gmem_to_smem(source, sw[m].at[slot], loaded.at[slot])

            for m in range(m_tiles):
                source = gates_ref.at[b, rows, h, columns(m)]
                plgpu.copy_gmem_to_smem(source, sg[m].at[slot], loaded.at[slot])

        mask = chunks.mask_operand(chunks.up_to() if reverse else chunks.from_on(strict=True))
        everything = chunks.mask_operand(chunks.everywhere())

        def step(index, carry):
            state, sums = carry
            following = index + stages - 1
            pl.when(following < steps)(lambda: fetch(following))
            slot = _modulo(index, stages)
            first_of_chunk = _modulo(index, group) == 0
            if keep:

                @pl.when(first_of_chunk)
                def _():
                    put(index, state)

            plgpu.barrier_wait(loaded.at[slot])
            for m in range(m_tiles):
                decay = chunks.decays(mask, sg[m].at[slot]).astype(bf16)
                weights = plgpu.load(sw[m].at[slot], layout=WGMMA_LAYOUT)
                sw[m].at[slot][...] = weights * decay
            plgpu.commit_smem()
            new, new_sums = [], []
            for m in range(m_tiles):
                total = mosaic.product((everything, sg[m].at[slot]))
                if group > 1:  # the chunk's decay counts once
                    total = jnp.where(jnp.broadcast_to(first_of_chunk, total.shape), total, 0.0)
                if not keep:
                    new_sums.append(sums[m] + total)
                total = jnp.exp2(total)
                for i in range(tiles):
                    kept = state[m * tiles + i] * total
                    pair = sx[i].at[slot].T, sw[m].at[slot]
                    new.append(mosaic.product(pair, init=kept))
            plgpu.commit_smem()  # all warps are done with this slot
            return tuple(new), tuple(new_sums)

        def put(index, state):
            """Sends the state to memory, rounded."""
            plgpu.wait_smem_to_gmem(0, wait_read_only=True)
            for m in range(m_tiles):
                for i in range(tiles):
                    so[m][i][...] = state[m * tiles + i].astype(bf16)
            plgpu.commit_smem()
            n = chunk(index)
            for (mine, _, _, feature), out in zip(sides, (k_states, v_states), strict=True):

                @pl.when(mine)
                def _(feature=feature, out=out):
                    for m in range(m_tiles):
                        for i in range(tiles):
                            part = pl.ds(feature + i * TILE_WIDTH, TILE_WIDTH)
                            target = out.at[b, h, n, part, columns(m)]
                            plgpu.copy_smem_to_gmem(so[m][i], target)

        for i in range(stages - 1):
            pl.when(i < steps)(lambda i=i: fetch(i))
        order = [(m, i) for m in range(m_tiles) for i in range(tiles)]

        def zeros(number):
            zero = jnp.zeros((TILE_WIDTH, TILE_WIDTH), f32)
            return tuple(plgpu.layout_cast(zero, WGMMA_LAYOUT) for _ in range(number))

        def rows_of(ref, feature, m, i):
            return ref.at[p, b, h, pl.ds(feature + i * TILE_WIDTH, TILE_WIDTH), columns(m)]

        def columns_of(ref, feature, m, i):
            return ref.at[p, b, h, columns(m), pl.ds(feature + i * TILE_WIDTH, TILE_WIDTH)]

        (is_key, _, _, key_feature), (is_value, _, _, value_feature) = sides
        if keep:

            def of_keys():
                return tuple(
                    mosaic.load(rows_of(k_start, key_feature, *at), optimized=False) for at in order
                )

            def of_values():
                return tuple(
                    mosaic.load_transposed(columns_of(v_start, value_feature, *at)) for at in order
                )

            state = lax.cond(is_key, of_keys, of_values)
        else:
            state = zeros(len(order))
        sums = () if keep else zeros(m_tiles)
        state, sums = lax.fori_loop(0, steps, step, (state, sums))

        @pl.when(is_key)
        def _():
            for at, x in zip(order, state, strict=True):
                rows_of(k_end, key_feature, *at)[...] = x

        @pl.when(is_value)
        def _():
            for at, x in zip(order, state, strict=True):
                mosaic.store_transposed(columns_of(v_end, value_feature, *at), x)

        if keep:
            plgpu.wait_smem_to_gmem(0)
        else:

            @pl.when(block == 0)
            def _():
                for m in range(m_tiles):
                    sums_out[p, b, h, :, columns(m)] = sums[m]

    out_type = [SDS((P, B, H, K, M), f32), SDS((P, B, H, M, V), f32)]
    if keep:
        out_type = [SDS((B, H, N, K, M), bf16), SDS((B, H, N, V, M), bf16), *out_type]
    else:
        out_type.append(SDS((P, B, H, CHUNK, M), f32))
    return mosaic.kernel(
        body,
        out_type=out_type,
        scratch_types=[
            smem_tiles(tiles, stages),
            smem_tiles(m_tiles, stages),
            smem_tiles(m_tiles, stages, dtype=f16),
            [smem_tiles(tiles) for _ in range(m_tiles)],
            plgpu.Barrier(num_arrivals=tiles + 2 * m_tiles, num_barriers=stages),
        ],
        grid=(P, B, H, _blocks(K, V, M)),
        grid_names=("p", "b", "h", "block"),
    )(*features, *weights, gates, *(starts or ()))


def _chunks(T):
    return -(-T // CHUNK)


def _divide(x, y):
    return x // y if isinstance(x, int) else lax.div(x, jnp.int32(y))


def _modulo(x, y):
    return x % y if isinstance(x, int) else lax.rem(x, jnp.int32(y))
