"""The gradients of a chunk's keys, values, gates and betas, once all solves are known."""

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from jla.pallas.common import chunks, mosaic
from jla.pallas.common.chunks import CHUNK, TILE_WIDTH
from jla.pallas.common.mosaic import (
    PER_COLUMN,
    PER_ROW,
    bf16,
    f16,
    f32,
    load,
    per_column,
    per_row,
    product,
)
from jla.pallas.common.tiles import columns, smem_tiles
from jla.pallas.mesa_net.solve import put, row_sum

SDS = jax.ShapeDtypeStruct


def chunk_gradients(
    k, v, do, x, y, cumulated, until, later, beta, kk, kk_scale, kv, kv_scale, dkk, dkv
):  # fmt: skip
    """Gradients of one chunk's inputs. With x, y the solutions of both passes, the loss sees A_t
    as -y_t A_t x_t; so with D[t, j] = exp(G_t - G_j) for j <= t, M = D beta, all sums over t,

        a = x k^T;   u = do v^T;   c = y k^T;   dM = a (u - c)
        dv_j = sum M a do_t + w_j dHkv^T k_j
        dk_j = sum M (u - c) x_t - sum M a y_t + w_j (dHkk k_j + dHkk^T k_j + dHkv v_j)
        dbeta_j = sum D dM + exp(G_end - G_j) (k_j dHkk k_j + k_j dHkv v_j)

    Args:
      k, v, do, x, y: as in `solve.output_gradients`.
      cumulated: G in base 2; later: exp(G_end - G); beta: [B, H, L] float32.
      until: the place in its chunk of the last token that reads each token, [B, H, L] uint32.
      kk, kk_scale, kv, kv_scale: as `states.forward` returned them.
      dkk, dkv: -dHkk^T and dHkv, as `states.reverse` returned them.

    Returns:
      dk [B, T, H, K], dv [B, T, H, V] bf16, and [B, H, L] float32: both parts of dbeta, by reads
      and by what is written; the sums of M dM over j < t, by t, and by j; and what sums over the
      chunk to <dHkk, Hkk> + <dHkv, Hkv> with the states before it and the gradients of those after
      it.

    Everything is transposed, [j, t]: what is summed over t then is a register operand. One
    warpgroup a chunk; 96 KB of SMEM at K=V=128 (k, v 32, then Hkk, then Hkv; x, y, do 48, then dHkk
    and dHkv 64), so that two chunks share a multiprocessor. Traffic at B=8 T=4096 H=16 K=V=128: k,
    v, do, x, y, dk, dv 134 MB each, four states 268 MB each: 2.0 GB, 0.47 ms at 4.3 TB/s.
    """
    (B, T, H, K), V, L = k.shape, v.shape[-1], beta.shape[-1]
    N, k_tiles, v_tiles = L // CHUNK, K // TILE_WIDTH, V // TILE_WIDTH
    squares = [(i, j) for i in range(k_tiles) for j in range(k_tiles)]
    oblongs = [(i, j) for i in range(k_tiles) for j in range(v_tiles)]
    # The states' tiles, in as many rounds as the keys' and values' tiles have room for.
    states = [(True, *at) for at in squares] + [(False, *at) for at in oblongs]
    room = k_tiles + v_tiles
    rounds = [states[i : i + room] for i in range(0, len(states), room)]

    def body(
        k_ref, v_ref, do_ref, x_ref, y_ref,
        cumulated_ref, cumulated_too, until_ref, later_ref, beta_ref,
        kk_ref, kk_scale_ref, kv_ref, kv_scale_ref, dkk_ref, dkv_ref,
        dk_out, dv_out, direct_out, written_out, reads_out, read_out, border_out,
        sk, sv, work, loaded, gradients_loaded, *states_loaded,
    ):  # fmt: skip
        b, n, h = (lax.axis_index(name) for name in ("b", "n", "h"))
        rows = pl.ds(n * CHUNK, CHUNK)
        sx, sy, sdo = work[:k_tiles], work[k_tiles : 2 * k_tiles], work[2 * k_tiles :][:v_tiles]
        sdkk = dict(zip(squares, work, strict=False))
        sdkv = dict(zip(oblongs, work[len(squares) :], strict=False))
        for ref, targets in ((k_ref, sk), (v_ref, sv), (x_ref, sx), (y_ref, sy), (do_ref, sdo)):
            for i, target in enumerate(targets):
                plgpu.copy_gmem_to_smem(ref.at[b, rows, h, columns(i)], target, loaded)

        def vector(ref, layout=PER_ROW):
            return load(ref.at[b, h, rows], layout, optimized=False)

        beta = per_row(vector(beta_ref), TILE_WIDTH)
        difference = per_column(vector(cumulated_too, PER_COLUMN), CHUNK) - per_row(
            vector(cumulated_ref), CHUNK
        )
        decay = jnp.exp2(jnp.minimum(difference, 0.0))
        place = chunks.tokens()
        until = plgpu.load(until_ref.at[b, h, rows], layout=PER_ROW, optimized=False) - place
        decay = jnp.where(mosaic.in_interval(place, until + 1, CHUNK), decay, 0.0)
        plgpu.barrier_wait(loaded)

        keys, values = ([load(tile).astype(bf16) for tile in refs] for refs in (sk, sv))
        scores = product(*((key, x.T) for key, x in zip(keys, sx, strict=True)))
        change = product(*((value, z.T) for value, z in zip(values, sdo, strict=True)))
        change -= product(*((key, y.T) for key, y in zip(keys, sy, strict=True)))
        change *= decay
        pairs = scores * change
        direct_out.at[b, h, rows][...] = jnp.sum(pairs, axis=1)
        # A token decays nothing of its own; its part would only have to cancel.
        pairs = jnp.where(mosaic.in_interval(place + 1, until, CHUNK), pairs * beta, 0.0)
        reads_out.at[b, h, rows][...] = jnp.sum(pairs, axis=0)
        read_out.at[b, h, rows][...] = jnp.sum(pairs, axis=1)
        change = (change * beta).astype(bf16)
        unread = (-scores * decay * beta).astype(bf16)
        # Rounded to be held: registers are short.
        dk = [product((change, x), (unread, y)).astype(bf16) for x, y in zip(sx, sy, strict=True)]
        dv = [(-product((unread, z))).astype(bf16) for z in sdo]
        plgpu.commit_smem()  # all warps are done with x, y and do
        for (i, j), tile in sdkk.items():
            source = dkk_ref.at[b, h, n, columns(i), columns(j)]
            plgpu.copy_gmem_to_smem(source, tile, gradients_loaded)
        for (i, j), tile in sdkv.items():
            source = dkv_ref.at[b, h, n, columns(i), columns(j)]
            plgpu.copy_gmem_to_smem(source, tile, gradients_loaded)
        later = per_row(vector(later_ref), TILE_WIDTH)
        keys, values = ([(load(tile) * later).astype(bf16) for tile in refs] for refs in (sk, sv))
        plgpu.barrier_wait(gradients_loaded)

        written = []
        for i in range(k_tiles):
            through_kk = product(
                *((key, sdkk[j, i]) for j, key in enumerate(keys)),
                *((key, sdkk[i, j].T) for j, key in enumerate(keys)),
            )
            written.append(-0.5 * through_kk * load(sk[i]))
            through_kv = product(*((value, sdkv[i, j].T) for j, value in enumerate(values)))
            total = dk[i].astype(f32) + beta * (through_kv - through_kk)
            dk[i] = total.astype(bf16)
        for j in range(v_tiles):
            through_kv = product(*((key, sdkv[i, j]) for i, key in enumerate(keys)))
            written.append(through_kv * load(sv[j]))
            dv[j] = (dv[j].astype(f32) + beta * through_kv).astype(bf16)
        written_out.at[b, h, rows][...] = row_sum(written)

        border = jnp.zeros((CHUNK,), f32)
        border = plgpu.layout_cast(border, PER_ROW)
        for group, barrier in zip(rounds, states_loaded, strict=True):
            plgpu.commit_smem()  # all warps are done with what was there
            for (is_kk, i, j), tile in zip(group, (*sk, *sv), strict=False):
                source = (kk_ref if is_kk else kv_ref).at[b, h, n, columns(i), columns(j)]
                plgpu.copy_gmem_to_smem(source, tile, barrier)
            plgpu.barrier_wait(barrier)
            for (is_kk, i, j), tile in zip(group, (*sk, *sv), strict=False):
                if is_kk:
                    gradient, scale = sdkk[i, j], -kk_scale_ref[b, h, n, i]
                else:
                    gradient, scale = sdkv[i, j], kv_scale_ref[b, h, n, i]
                border += scale * jnp.sum(load(tile) * load(gradient), axis=1)
        border_out.at[b, h, rows][...] = border
        plgpu.commit_smem()
        put(work, dk, dk_out.at[b, rows, h])
        put(work[k_tiles:], dv, dv_out.at[b, rows, h])
        plgpu.wait_smem_to_gmem(0, wait_read_only=True)

    vectors = SDS((B, H, L), f32)
    return mosaic.kernel(
        body,
        automatic_barriers=False,
        out_type=[SDS((B, T, H, K), bf16), SDS((B, T, H, V), bf16), *[vectors] * 5],
        scratch_types=[
            smem_tiles(k_tiles, dtype=f16),
            smem_tiles(v_tiles, dtype=f16),
            smem_tiles(max(2 * k_tiles + v_tiles, len(states))),
            plgpu.Barrier(num_arrivals=3 * k_tiles + 2 * v_tiles),
            plgpu.Barrier(num_arrivals=len(states)),
            *(plgpu.Barrier(num_arrivals=len(group)) for group in rounds),
        ],
        grid=(B, N, H),
        grid_names=("b", "n", "h"),
    )(
        k, v, do, x, y, cumulated, cumulated, until, later, beta,
        kk, kk_scale, kv, kv_scale, dkk, dkv,
    )  # fmt: skip
