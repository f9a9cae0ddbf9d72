"""The chunk-local part of KDA's backward pass for wide keys, in two kernels.

With K > 128 a chunk's states and keys do not fit into SMEM together, as `backward.chunk_gradients`
needs them. The first kernel does all sums over K, 64 value columns at a time; the second does all
sums over V, 128 key features at a time. The written vectors pass from one to the other in memory.
"""

import functools

import jax
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from jla.pallas.common import mosaic, scratch
from jla.pallas.common.chunks import CHUNK, TILE_WIDTH
from jla.pallas.common.mosaic import PER_ROW, bf16, f16, f32, load, per_row
from jla.pallas.common.scratch import barrier_for, fetch, fetch_each
from jla.pallas.kda.backward import gradients_of_values, meet_at
from jla.pallas.kda.key_gradients import gradients_of_keys

SDS = jax.ShapeDtypeStruct
FEATURES = 128  # of keys, worked on by one CTA: 64 by each of two warpgroups
WARPGROUPS = 2


def chunk_gradients(
    q, k, v, decay_operand, beta, do, w, kg, states, gradients, inverse, a, aq, decay, levels,
    *, scale,
):  # fmt: skip
    """As `backward.chunk_gradients`, for K a multiple of 128; w and kg as `prepare` returned them.

    Floor at B=4 T=4096 HV=16 K=256 V=128: 2.7 GB (S and dS, 268 MB each, are read twice), 0.63 ms
    at 4.3 TB/s.
    """
    written, dv, dbeta = _errors(v, beta, do, w, kg, states, gradients, inverse, a, aq)
    inputs = q, k, decay_operand, do, dv, written, states, gradients, decay, levels
    dq, dk, dg = _keys(*inputs, scale=scale)
    return dq, dk, dv, dg, dbeta


def _errors(v, beta, do, w, kg, states, gradients, inverse, a, aq):
    """What each chunk wrote and the gradients of v and beta:

        E  = M^-1 v - w S;   y = Aq^T do + kg dS;   dv = M^-T (beta y)
        z  = y - A^T dv;     dbeta = rowsum(E z)

    Returns:
      beta E and dv, [B, T, HV, V] bf16; dbeta [B, HV, parts, TP] float32, to be summed over parts.
    """
    B, TP, HV, K = w.shape
    V, N = v.shape[-1], TP // CHUNK
    parts = V // TILE_WIDTH

    def body(refs):
        b, n, h, part = (lax.axis_index(name) for name in ("b", "n", "h", "part"))
        rows, columns = pl.ds(n * CHUNK, CHUNK), pl.ds(part * TILE_WIDTH, TILE_WIDTH)
        loads = dict(
            v=(refs.v.at[b, rows, h, columns], refs.sdv),
            do=(refs.do.at[b, rows, h, columns], refs.sdo),
            w=(refs.w.at[b, rows, h], refs.sw),
            kg=(refs.kg.at[b, rows, h], refs.skg),
            states=(refs.states.at[b, h, n, columns], refs.ss),
            gradients=(refs.gradients.at[b, h, n, columns], refs.sds),
            inverse=(refs.inverse.at[b, h, n], refs.sinverse),
            a=(refs.a.at[b, h, n], refs.sa),
            aq=(refs.aq.at[b, h, n], refs.saq),
        )
        fetch(loads, refs.loaded)
        beta = per_row(load(refs.beta.at[b, h, rows], PER_ROW, optimized=False), TILE_WIDTH)
        plgpu.barrier_wait(refs.loaded)

        error = mosaic.product((refs.sinverse, refs.sdv)) - mosaic.product((refs.sw, refs.ss.T))
        y = mosaic.product((refs.saq.T, refs.sdo), (refs.skg, refs.sds.T))
        dbeta = gradients_of_values(error, y, beta, refs.sinverse, refs.sa, refs.sdv, refs.swritten)
        refs.dbeta.at[b, h, part, rows][...] = dbeta
        plgpu.commit_smem()
        plgpu.copy_smem_to_gmem(refs.swritten, refs.written.at[b, rows, h, columns])
        plgpu.copy_smem_to_gmem(refs.sdv, refs.dv.at[b, rows, h, columns])
        plgpu.wait_smem_to_gmem(0, wait_read_only=True)

    values = SDS(v.shape, bf16)
    names = ("v", "do", "w", "kg", "states", "gradients", "inverse", "a", "aq")
    out = scratch.kernel(
        body,
        inputs=dict(
            **dict(v=v, beta=beta, do=do, w=w, kg=kg, states=states, gradients=gradients),
            **dict(inverse=inverse, a=a, aq=aq),
        ),
        outputs=dict(written=values, dv=values, dbeta=SDS((B, HV, parts, TP), f32)),
        scratch=dict(
            sdv=mosaic.tile(CHUNK, TILE_WIDTH),  # v, then dv
            sdo=mosaic.tile(CHUNK, TILE_WIDTH),
            **{name: mosaic.tile(CHUNK, K) for name in ("sw", "skg")},
            **{name: mosaic.tile(TILE_WIDTH, K) for name in ("ss", "sds")},
            **{name: mosaic.tile(CHUNK, CHUNK) for name in ("sinverse", "sa", "saq")},
            swritten=mosaic.tile(CHUNK, TILE_WIDTH),
            loaded=barrier_for(names),
        ),
        grid=(B, N, HV, parts),
        grid_names=("b", "n", "h", "part"),
    )
    return out.written, out.dv, out.dbeta


def _keys(
    q, k, decay_operand, do, dv, written, states, gradients, decay, levels, *, scale
):  # fmt: skip
    """The gradients of q, k and g, as in `backward.chunk_gradients`."""
    B, T, H, K = q.shape
    HV, V = dv.shape[2:]
    N = -(-T // CHUNK)
    keys = SDS((B, T, HV, K), bf16)
    names = ("q", "k", "do", "dv", "written", "states", "gradients")
    out = scratch.kernel(
        functools.partial(_keys_body, group=HV // H, scale=scale),
        inputs=dict(
            **dict(q=q, k=k, decay_operand=decay_operand, do=do, dv=dv, given_written=written),
            **dict(states=states, gradients=gradients, decay=decay, levels=levels),
        ),
        outputs=dict(dq=keys, dk=keys, dg=SDS((B, N * CHUNK, HV, K), f32)),
        scratch=dict(  # as `key_gradients` names it
            **{name: mosaic.tile(CHUNK, FEATURES) for name in ("sq", "sk")},
            **{name: mosaic.tile(CHUNK, V) for name in ("sdo", "sdv", "written")},
            **{name: mosaic.tile(V, FEATURES) for name in ("ss", "sds")},
            **{name: mosaic.tile(CHUNK, CHUNK) for name in ("saq", "sa", "aq_block", "a_block")},
            sg=mosaic.tile(CHUNK, TILE_WIDTH, WARPGROUPS, dtype=f16),
            **{name: mosaic.tile(CHUNK, FEATURES) for name in ("read_keys", "write_keys")},
            loaded=barrier_for(dict.fromkeys(names, 1) | dict(decay_operand=WARPGROUPS)),
            shared=plgpu.Barrier(num_arrivals=WARPGROUPS),
        ),
        grid=(B, N, HV, K // FEATURES),
        grid_names=("b", "n", "h", "part"),
        num_threads=WARPGROUPS,
        thread_name="wg",
    )
    return out.dq, out.dk, out.dg


def _keys_body(refs, *, group, scale):
    b, n, h, part = (lax.axis_index(name) for name in ("b", "n", "h", "part"))
    wg = lax.axis_index("wg")
    rows, features = pl.ds(n * CHUNK, CHUNK), pl.ds(part * FEATURES, FEATURES)
    meet = functools.partial(meet_at, refs.shared, WARPGROUPS)

    def loads():
        yield from (
            (refs.q.at[b, rows, h // group, features], refs.sq),
            (refs.k.at[b, rows, h // group, features], refs.sk),
        )
        yield refs.do.at[b, rows, h], refs.sdo
        yield refs.dv.at[b, rows, h], refs.sdv
        yield refs.given_written.at[b, rows, h], refs.written
        yield refs.states.at[b, h, n, :, features], refs.ss
        yield refs.gradients.at[b, h, n, :, features], refs.sds
        for i in range(WARPGROUPS):
            s = pl.ds(part * FEATURES + i * TILE_WIDTH, TILE_WIDTH)
            yield refs.decay_operand.at[b, rows, h, s], refs.sg.at[i]

    pl.when(wg == 0)(lambda: fetch_each(loads(), refs.loaded))
    plgpu.barrier_wait(refs.loaded)
    gradients_of_keys(
        refs,
        [(pl.ds(wg * TILE_WIDTH, TILE_WIDTH), refs.sg.at[wg])],
        refs.decay.at[b, h, n, features], refs.dg.at[b, rows, h, features], wg, meet,
        refs.levels[b, h, n],
        scale=scale, warpgroups=WARPGROUPS,
    )  # fmt: skip
    meet()

    @pl.when(wg == 0)
    def _():
        plgpu.copy_smem_to_gmem(refs.sq, refs.dq.at[b, rows, h, features])
        plgpu.copy_smem_to_gmem(refs.sk, refs.dk.at[b, rows, h, features])

    plgpu.wait_smem_to_gmem(0, wait_read_only=True)
