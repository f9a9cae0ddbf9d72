"""The chunk-local part of KDA's backward pass: all gradients of a chunk from its two states."""

import functools

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
    TILE,
    bf16,
    f16,
    f32,
    load,
    per_column,
    per_row,
)

SDS = jax.ShapeDtypeStruct


def chunk_gradients(
    q, k, v, gates, beta, do, states, gradients, inverse, a, aq, decay, *, scale
):  # fmt: skip
    """Gradients of one chunk's inputs, given the state S before it and dS, the gradient after it.

    With the notation of `prepare`, E = M^-1 (v - k~ S) the chunk's errors:

        y  = Aq^T do + kg dS;   dv = M^-T (beta y)
        z  = y - A^T dv;        dbeta = rowsum(E z)           z: gradient of what is written, beta E
        dAq = tril(do (beta E)^T);   dA = -stril(dv (beta E)^T)
        dq~ = do S^T;   dk~ = -dv S^T;   dkg = (beta E) dS^T

    and from these, through the tree of references, dq, dk and the gradient of every cumulated
    decay, dG = q dq + k dk_read - k dk_write, whose reversed cumsum, with the border's term
    rowsum(decay S dS) + sum(k dk_write of kg), is dg.

    Args:
      q, k, v, gates, beta: as in `prepare`, with its T and L. do: [B, T, HV, V] bf16.
      states, gradients: S and dS transposed, [B, HV, N, V, K] bf16.
      inverse, a, aq, decay: as `prepare` returned them: M^-1, A, Aq and exp(G_end).

    Returns:
      dq, dk [B, T, HV, K], dv [B, T, HV, V] bf16, dg [B, L, HV, K] float32 and dbeta
      [B, HV, parts, L] float32, to be summed over its parts.
    """
    B, T, H, K = q.shape
    HV, V = v.shape[2:]
    L = beta.shape[2]
    N, group = L // CHUNK, HV // H
    warpgroups = 2 if K % 128 == 0 and V % 128 == 0 else 1
    k_parts, v_parts = K // TILE_WIDTH // warpgroups, V // TILE_WIDTH // warpgroups

    def body(
        q_ref, k_ref, v_ref, gates_ref, beta_ref,
        do_ref, states_ref, gradients_ref, inverse_ref, a_ref, aq_ref, decay_ref,
        dq_out, dk_out, dv_out, dg_out, dbeta_out,
        sq, sk, sv, sdo, ss, sds, sinverse, sa, saq, sg,
        read_keys, write_keys, written, loaded, shared,
    ):  # fmt: skip
        b, n, h = lax.axis_index("b"), lax.axis_index("n"), lax.axis_index("h")
        wg = lax.axis_index("wg")
        rows = pl.ds(n * CHUNK, CHUNK)
        hk = h // group

        meet = functools.partial(meet_at, shared, warpgroups)

        def store(tile, target):
            pl.when(wg == 0)(lambda: plgpu.copy_smem_to_gmem(tile, target))

        @pl.when(wg == 0)
        def _():
            for source, target in (
                (q_ref.at[b, rows, hk], sq),
                (k_ref.at[b, rows, hk], sk),
                (v_ref.at[b, rows, h], sv),
                (do_ref.at[b, rows, h], sdo),
                (states_ref.at[b, h, n], ss),
                (gradients_ref.at[b, h, n], sds),
                (inverse_ref.at[b, h, n], sinverse),
                (a_ref.at[b, h, n], sa),
                (aq_ref.at[b, h, n], saq),
            ):
                plgpu.copy_gmem_to_smem(source, target, loaded)
            for i in range(K // TILE_WIDTH):
                s = pl.ds(i * TILE_WIDTH, TILE_WIDTH)
                plgpu.copy_gmem_to_smem(gates_ref.at[b, rows, h, s], sg.at[i], loaded)

        ks = [pl.ds((wg * k_parts + i) * TILE_WIDTH, TILE_WIDTH) for i in range(k_parts)]
        vs = [pl.ds((wg * v_parts + i) * TILE_WIDTH, TILE_WIDTH) for i in range(v_parts)]
        gates = [sg.at[wg * k_parts + i] for i in range(k_parts)]
        plgpu.barrier_wait(loaded)

        beta_rows = per_row(load(beta_ref.at[b, h, rows], PER_ROW, optimized=False), TILE_WIDTH)
        earlier = chunks.weights(chunks.up_to())
        later = chunks.weights(chunks.from_on(strict=True))
        for s, tile in zip(ks, gates, strict=True):
            keys = load(sk.at[:, s])
            before = chunks.decays(earlier, tile)
            read_keys.at[:, s][...] = (keys * before).astype(bf16)
            after = chunks.decays(later, tile)
            write_keys.at[:, s][...] = (keys * after).astype(bf16)
        meet()

        dbeta = None
        for s in vs:
            residual = load(sv.at[:, s]) - mosaic.product((read_keys, ss.at[s].T))
            sv.at[:, s][...] = residual.astype(bf16)
            plgpu.commit_smem()
            error = mosaic.product((sinverse, sv.at[:, s]))
            y = mosaic.product((saq.T, sdo.at[:, s]), (write_keys, sds.at[s].T))
            part = gradients_of_values(
                error, y, beta_rows, sinverse, sa, sv.at[:, s], written.at[:, s]
            )
            dbeta = part if dbeta is None else dbeta + part
        dbeta_out.at[b, h, wg, rows][...] = dbeta
        meet()
        store(sv, dv_out.at[b, rows, h])

        gradients_of_keys(
            sq, sk, sdo, sv, written, ss, sds, saq, sa, read_keys, write_keys,
            list(zip(ks, gates, strict=True)), earlier, later,
            decay_ref.at[b, h, n], dg_out.at[b, rows, h], wg, meet,
            scale=scale, warpgroups=warpgroups,
        )  # fmt: skip
        meet()
        store(sq, dq_out.at[b, rows, h])
        store(sk, dk_out.at[b, rows, h])
        plgpu.wait_smem_to_gmem(0, wait_read_only=True)

    keys, values = SDS((B, T, HV, K), bf16), SDS((B, T, HV, V), bf16)
    return mosaic.kernel(
        body,
        out_type=[keys, keys, values, SDS((B, L, HV, K), f32), SDS((B, HV, warpgroups, L), f32)],
        scratch_types=[
            *(mosaic.tile(CHUNK, K) for _ in range(2)),
            *(mosaic.tile(CHUNK, V) for _ in range(2)),
            *(mosaic.tile(V, K) for _ in range(2)),
            *(mosaic.tile(CHUNK, CHUNK) for _ in range(3)),
            mosaic.tile(CHUNK, TILE_WIDTH, K // TILE_WIDTH, dtype=f16),
            *(mosaic.tile(CHUNK, K) for _ in range(2)),
            mosaic.tile(CHUNK, V),
            plgpu.Barrier(num_arrivals=9 + K // TILE_WIDTH),
            plgpu.Barrier(num_arrivals=warpgroups),
        ],
        grid=(B, N, HV),
        grid_names=("b", "n", "h"),
        num_threads=warpgroups,
        thread_name="wg",
    )(q, k, v, gates, beta, do, states, gradients, inverse, a, aq, decay)


def meet_at(barrier, warpgroups):
    """Makes what each warpgroup has written to SMEM visible to the other."""
    plgpu.commit_smem()
    if warpgroups > 1:
        plgpu.barrier_arrive(barrier)
        plgpu.barrier_wait(barrier)


def gradients_of_values(error, y, beta, sinverse, sa, sdv, written):
    """Makes dv and what was written of 64 value columns; returns their part of dbeta.

    Args:
      error, y: as in `chunk_gradients`. beta: by rows. sinverse, sa: M^-1 and A.
      sdv, written: tiles to fill.
    """
    sdv[...] = (y * beta).astype(bf16)
    plgpu.commit_smem()
    dv = mosaic.product((sinverse.T, sdv))
    written[...] = (error * beta).astype(bf16)
    sdv[...] = dv.astype(bf16)
    plgpu.commit_smem()
    z = y - mosaic.product((sa.T, sdv))
    return (error * z).sum(axis=1)


def gradients_of_keys(
    sq, sk, sdo, sdv, written, ss, sds, saq, sx, read_keys, write_keys,
    tiles, earlier, later, decay_ref, dg_ref, wg, meet, *, scale, warpgroups,
):  # fmt: skip
    """Turns the SMEM tiles of queries and keys into dq and dk, and stores dg.

    Args:
      written: what was written, beta E. saq, sx, read_keys, write_keys: tiles to work in.
      tiles: this warpgroup's columns of q and k, 64 at a time, and their gates' tiles.
      earlier, later: the weights of the decays from the chunk's start and to its end.
      decay_ref, dg_ref: of this chunk and of the columns that `tiles` counts from.
      wg: this warpgroup's number. meet: awaits the other one.
    """

    def row_sums(mask, x, s):
        """mask @ x for a float32 tile, through the two key tiles' columns s."""
        read_keys.at[:, s][...], write_keys.at[:, s][...] = mosaic.split(x)
        plgpu.commit_smem()
        return mosaic.product((mask, read_keys.at[:, s]), (mask, write_keys.at[:, s]))

    # The products of the two score gradients span all of V: with two warpgroups each makes one.

    def store_symmetric(ref, gradient, mask):
        """Stores a score gradient for both of its uses: by the reader, and by what is read."""
        gradient = jnp.where(mask, gradient, 0.0)
        ref[...] = gradient.astype(bf16)
        plgpu.commit_smem()
        both = jnp.where(mask, gradient, load(ref.T))
        ref[...] = both.astype(bf16)

    def query_score_gradient():
        store_symmetric(saq, mosaic.product((sdo, written.T)) * scale, chunks.up_to())

    def key_score_gradient():
        store_symmetric(sx, -mosaic.product((sdv, written.T)), chunks.up_to(strict=True))

    if warpgroups > 1:
        pl.when(wg == 0)(query_score_gradient)
        pl.when(wg == 1)(key_score_gradient)
    else:
        query_score_gradient()
        key_score_gradient()
    meet()

    for s, tile in tiles:
        before = chunks.decays(earlier, tile)
        dq = mosaic.product((sdo, ss.at[:, s])) * before * scale
        dk_read = -mosaic.product((sdv, ss.at[:, s])) * before
        after = chunks.decays(later, tile)
        dk_write = mosaic.product((written, sds.at[:, s])) * after
        # The border's term, for all tokens what their chunk carries out and for each what its
        # predecessors write. Sums over rows go through wgmma: Mosaic's own use one scratch for
        # all warpgroups, and race.
        carried = None
        for r in range(ss.shape[0] // TILE_WIDTH):
            part = pl.ds(r * TILE_WIDTH, TILE_WIDTH)
            change = load(ss.at[part, s]) * load(sds.at[part, s])
            carried = change if carried is None else carried + change
        decay = load(decay_ref.at[s], PER_COLUMN, optimized=False)
        carried *= per_column(decay, CHUNK)
        border = row_sums(chunks.weights(chunks.everywhere(), bf16), carried, s)
        before_each = chunks.weights(chunks.up_to(strict=True), bf16)
        border += row_sums(before_each, load(sk.at[:, s]) * dk_write, s)
        dg_ref.at[:, s][...] = border

        dq, dk, dk_signed = _through_scores(
            sq.at[:, s], sk.at[:, s], tile, saq, sx,
            read_keys.at[:, s], write_keys.at[:, s],
            dq, dk_read + dk_write, dk_read,
        )  # fmt: skip

        queries, keys = load(sq.at[:, s]), load(sk.at[:, s])
        cumulated = queries * dq + keys * dk_signed
        dg = row_sums(chunks.weights(chunks.from_on(), bf16), cumulated, s)
        dg_ref.at[:, s][...] = dg + load(dg_ref.at[:, s], optimized=False)
        diagonal = jnp.where(chunks.diagonal(), load(saq), 0.0).sum(axis=1)
        diagonal = per_row(diagonal, TILE_WIDTH)
        sq.at[:, s][...] = (dq + diagonal * keys).astype(bf16)
        sk.at[:, s][...] = (dk + diagonal * queries).astype(bf16)


def _through_scores(sq, sk, gates, query_gradient, key_gradient, sx, sy, dq, dk, dk_signed):
    """Adds what reaches one tile of dq and dk through the scores, level by level.

    At a level a token either reads (right half) or is read (left half), with the same decay. So a
    key's gradient is that decay times (D + D^T) Y + Dq^T X, with D and Dq the score gradients of
    the level's pairs, and counts for the decays with + where it reads and with - where it is read.

    Args:
      sq, sk: the tile's queries and keys. sx, sy: two tiles to work in.
      query_gradient, key_gradient: gradients of the scores plus their transposes, [64, 64] bf16.
      dq, dk, dk_signed: what is to be added to; dk_signed is dk with the sign of the role.
    """

    def level_step(level, gradients):
        dq, dk, dk_signed = gradients
        decay = chunks.decays(chunks.weights(chunks.level_decay_mask(level)), gates)
        rounded = decay.astype(bf16)
        sx[...] = plgpu.load(sq, layout=TILE) * rounded
        sy[...] = plgpu.load(sk, layout=TILE) * rounded
        plgpu.commit_smem()

        def masked(ref, mask):
            return jnp.where(mask, load(ref), 0.0).astype(bf16)

        by_query = masked(query_gradient, chunks.level_pairs(level))
        dq += decay * mosaic.product((by_query, sy))
        by_key = masked(key_gradient, chunks.level_pairs(level, symmetric=True))
        from_query = masked(query_gradient, chunks.level_pairs(level, reverse=True))
        change = decay * mosaic.product((by_key, sy), (from_query, sx))
        sign = per_row(chunks.level_roles(level), TILE_WIDTH)
        return dq, dk + change, dk_signed + sign * change

    return lax.fori_loop(0, LEVELS, level_step, (dq, dk, dk_signed))
