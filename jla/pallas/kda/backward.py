"""The chunk-local part of KDA's backward pass: all gradients of a chunk from its two states."""

import collections
import functools

import jax
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from jla.pallas.common import blocks, chunks, mosaic, scratch
from jla.pallas.common.chunks import CHUNK, TILE_WIDTH
from jla.pallas.common.mosaic import PER_ROW, bf16, f16, f32, load, per_row
from jla.pallas.common.scratch import barrier_for, fetch_each
from jla.pallas.kda.key_gradients import gradients_of_keys

SDS = jax.ShapeDtypeStruct

# Where a CTA's chunk is in the arrays: batch row, chunk, its tokens, value head and its key head.
Place = collections.namedtuple("Place", "b n rows h key_head")


def chunk_gradients(
    q, k, v, decay_operand, beta, do, states, gradients, inverse, a, aq, decay, levels,
    norms=None, *, scale,
):  # fmt: skip
    """Gradients of one chunk's inputs, given the state S before it and dS, the gradient after it.

    With the notation of `prepare`, E = M^-1 (v - k~ S) the chunk's errors:

        1.  y  = Aq^T do + kg dS;   dv = M^-T (beta y)
        2.  z  = y - A^T dv;        dbeta = rowsum(E z)       z: gradient of what is written, beta E
        3.  dAq = tril(do (beta E)^T);   dA = -stril(dv (beta E)^T)
        4.  dq~ = do S^T;   dk~ = -dv S^T;   dkg = (beta E) dS^T

    and from these, through the tree of references, dq, dk (5.) and the gradient of every cumulated
    decay,

        6.  dG = q dq + k dk_read - k dk_write

    whose reversed cumsum, with the border's term (7.) rowsum(decay S dS) + sum(k dk_write of kg),
    is dg. `key_gradients` makes 3 to 7.

    Args:
      q, k, v, decay_operand, beta: as in `prepare`, with its T and TP. do: [B, T, HV, V] bf16.
      states, gradients: S and dS transposed, [B, HV, N, V, K] bf16.
      inverse, a, aq, decay, levels: as `prepare` returned them: M^-1, A, Aq, exp(G_end) and the
        number of levels inside blocks.

    Returns:
      dq, dk [B, T, HV, K], dv [B, T, HV, V] bf16, dg [B, TP, HV, K] float32 and dbeta
      [B, HV, parts, TP] float32, to be summed over its parts.

    A CTA has a chunk of a value head, its one or two warpgroups K / 2 and V / 2 columns each.
    SMEM at K=V=128: 216 KB. Floor at B=8 T=4096 HV=16 K=V=128: 2.1 GB, 0.48 ms at 4.3 TB/s.
    """
    B, T, H, K = q.shape
    HV, V = v.shape[2:]
    TP = beta.shape[2]
    N = TP // CHUNK
    warpgroups = 2 if K % 128 == 0 and V % 128 == 0 else 1
    keys, values = SDS((B, T, HV, K), bf16), SDS((B, T, HV, V), bf16)
    out = scratch.kernel(
        functools.partial(_body, group=HV // H, scale=scale, warpgroups=warpgroups),
        inputs=dict(
            **dict(q=q, k=k, v=v, decay_operand=decay_operand, beta=beta),
            **dict(do=do, states=states, gradients=gradients),
            **dict(inverse=inverse, a=a, aq=aq, decay=decay, levels=levels, norms=norms),
        ),
        outputs=dict(
            dq=keys,
            dk=keys,
            dv=values,
            dg=SDS((B, TP, HV, K), f32),
            dbeta=SDS((B, HV, warpgroups, TP), f32),
        ),
        scratch=_scratch(K, V, warpgroups, norms is not None),
        reductions_cross_warps=False,
        grid=(B, N, HV),
        grid_names=("b", "n", "h"),
        num_threads=warpgroups,
        thread_name="wg",
    )
    return tuple(out)


def _scratch(K, V, warpgroups, normalize):
    stages = dict(k=1, decay_operand=K // TILE_WIDTH), ("states", "v", "inverse")
    stages = *stages, ("gradients", "do", "aq", "a", "q")
    return dict(
        sq=mosaic.tile(CHUNK, K),  # q, then dq
        sk=mosaic.tile(CHUNK, K),  # k, then dk
        sdv=mosaic.tile(CHUNK, V),  # v, then v - k~ S, beta y and dv
        sdo=mosaic.tile(CHUNK, V),
        ss=mosaic.tile(V, K),
        sds=mosaic.tile(V, K),
        a_block=mosaic.tile(CHUNK, CHUNK),  # M^-1 before
        sa=mosaic.tile(CHUNK, CHUNK),  # A, then dA
        saq=mosaic.tile(CHUNK, CHUNK),  # Aq, then dAq
        aq_block=mosaic.tile(CHUNK, CHUNK),
        sg=mosaic.tile(CHUNK, TILE_WIDTH, K // TILE_WIDTH, dtype=f16),  # of `decay_operand`
        read_keys=mosaic.tile(CHUNK, K),  # k~, then anything
        write_keys=mosaic.tile(CHUNK, K),  # kg, then anything
        written=mosaic.tile(CHUNK, V),  # beta E
        loaded=[barrier_for(x) for x in stages],  # see `_loads`
        shared=plgpu.Barrier(num_arrivals=warpgroups),
        dots=plgpu.SMEM((warpgroups, 2, CHUNK), f32) if normalize else None,
    )


def _body(refs, *, group, scale, warpgroups):
    b, n, h = lax.axis_index("b"), lax.axis_index("n"), lax.axis_index("h")
    wg = lax.axis_index("wg")
    place = Place(b, n, pl.ds(n * CHUNK, CHUNK), h, h // group)
    meet = functools.partial(meet_at, refs.shared, warpgroups)
    pl.when(wg == 0)(lambda: fetch_each(_loads(refs, place), *refs.loaded))
    key_columns, value_columns = (
        _columns(wg, x.shape[1] // TILE_WIDTH // warpgroups) for x in (refs.sq, refs.sdv)
    )
    k_parts = len(key_columns)
    tiles = [refs.sg.at[wg * k_parts + i] for i in range(k_parts)]
    number = refs.levels[b, h, n]
    plgpu.barrier_wait(refs.loaded[0])

    factors = None
    if refs.norms is not None:
        norms = [refs.norms.at[b, h, i, place.rows] for i in range(2)]
        factors = [load(x, PER_ROW, optimized=False) for x in norms]
        _normalize(refs.sk, key_columns, factors[1])
    beta = load(refs.beta.at[b, h, place.rows], PER_ROW, optimized=False)
    beta = per_row(beta, TILE_WIDTH)
    earlier, later = blocks.up_to(f16), blocks.from_on(f16, strict=True)
    tiles = list(zip(key_columns, tiles, strict=True))
    _decay_keys(refs, tiles, earlier, later)
    meet()
    refs.dbeta.at[b, h, wg, place.rows][...] = _gradients_of_value_columns(
        refs, value_columns, beta
    )
    meet()

    def store(tile, target):
        pl.when(wg == 0)(lambda: plgpu.copy_smem_to_gmem(tile, target))

    store(refs.sdv, refs.dv.at[b, place.rows, h])
    if factors is not None:
        _normalize(refs.sq, key_columns, factors[0])
    gradients_of_keys(
        refs, tiles, refs.decay.at[b, h, n], refs.dg.at[b, place.rows, h], wg, meet, number,
        factors, scale=scale, warpgroups=warpgroups,
    )  # fmt: skip
    meet()
    store(refs.sq, refs.dq.at[b, place.rows, h])
    store(refs.sk, refs.dk.at[b, place.rows, h])
    plgpu.wait_smem_to_gmem(0, wait_read_only=True)


def _columns(wg, parts):
    """The warpgroup's columns, 64 at a time."""
    return [pl.ds((wg * parts + i) * TILE_WIDTH, TILE_WIDTH) for i in range(parts)]


def _loads(refs, place):
    """All that is loaded, in the order of use, with the number of the barrier that awaits it."""
    b, n, rows, h, key_head = place
    yield refs.k.at[b, rows, key_head], refs.sk, 0
    for i in range(refs.sg.shape[0]):
        s = pl.ds(i * TILE_WIDTH, TILE_WIDTH)
        yield refs.decay_operand.at[b, rows, h, s], refs.sg.at[i], 0
    yield refs.states.at[b, h, n], refs.ss, 1
    yield refs.v.at[b, rows, h], refs.sdv, 1
    yield refs.inverse.at[b, h, n], refs.a_block, 1
    yield refs.gradients.at[b, h, n], refs.sds, 2
    yield refs.do.at[b, rows, h], refs.sdo, 2
    yield refs.aq.at[b, h, n], refs.saq, 2
    yield refs.a.at[b, h, n], refs.sa, 2
    yield refs.q.at[b, rows, key_head], refs.sq, 2


def meet_at(barrier, warpgroups):
    """Makes what each warpgroup has written to SMEM visible to the other."""
    plgpu.commit_smem()
    if warpgroups > 1:
        plgpu.barrier_arrive(barrier)
        plgpu.barrier_wait(barrier)


def _normalize(ref, columns, factor):
    """Multiplies the rows by what `prepare` multiplied them by."""
    for s in columns:
        tile = ref.at[:, s]
        tile[...] = (load(tile) * per_row(factor, TILE_WIDTH)).astype(bf16)


def _decay_keys(refs, tiles, earlier, later):
    """k~ = k exp(G) and kg = k exp(G_end - G)."""
    for s, tile in tiles:
        keys = load(refs.sk.at[:, s])
        before = chunks.decays(earlier, tile)
        refs.read_keys.at[:, s][...] = (keys * before).astype(bf16)
        after = chunks.decays(later, tile)
        refs.write_keys.at[:, s][...] = (keys * after).astype(bf16)


def _gradients_of_value_columns(refs, value_columns, beta):
    """Equations 1 and 2: dv and beta E of this warpgroup's columns; returns their part of dbeta."""
    dbeta = None
    for i, s in enumerate(value_columns):
        if not i:
            plgpu.barrier_wait(refs.loaded[1])
        residual = load(refs.sdv.at[:, s]) - mosaic.product((refs.read_keys, refs.ss.at[s].T))
        refs.sdv.at[:, s][...] = residual.astype(bf16)
        plgpu.commit_smem()
        error = mosaic.product((refs.a_block, refs.sdv.at[:, s]))
        if not i:
            plgpu.barrier_wait(refs.loaded[2])
        y = mosaic.product((refs.saq.T, refs.sdo.at[:, s]), (refs.write_keys, refs.sds.at[s].T))
        part = gradients_of_values(
            error, y, beta, refs.a_block, refs.sa, refs.sdv.at[:, s], refs.written.at[:, s]
        )
        dbeta = part if dbeta is None else dbeta + part
    return dbeta


def gradients_of_values(error, y, beta, sinverse, sa, sdv, written):
    """Makes dv and what was written of 64 value columns; returns their part of dbeta.

    Args:
      error, y: E and y, as in `chunk_gradients`. beta: by rows. sinverse, sa: M^-1 and A.
      sdv, written: tiles to fill with dv and beta E.
    """
    sdv[...] = (y * beta).astype(bf16)
    plgpu.commit_smem()
    dv = mosaic.product((sinverse.T, sdv))
    written[...] = (error * beta).astype(bf16)
    sdv[...] = dv.astype(bf16)
    plgpu.commit_smem()
    z = y - mosaic.product((sa.T, sdv))
    return (error * z).sum(axis=1)
