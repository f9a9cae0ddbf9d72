"""The state recurrence over chunks, forward and backward, for states of the delta-rule form.

Both kernels keep the transposed state, [64 value columns, K] float32, in the registers of one
warpgroup for the whole sequence; another warpgroup streams the chunks' operands into SMEM. Chunks
follow one another, value columns are independent of one another.
"""

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from jla.pallas import mosaic
from jla.pallas.chunks import CHUNK
from jla.pallas.mosaic import PER_COLUMN, TILE, TILE_TRANSPOSED, TRANSFORMS, bf16, f32, product

SDS = jax.ShapeDtypeStruct
COLUMNS = 64  # value columns of one warpgroup
LOADER_REGISTERS = 40
PROCESSORS = 132  # multiprocessors of an H100 or H200


def forward(q, w, u, kg, decay, aq, beta, initial_state, *, keep_states):
    """Runs the chunks in order:

        E = u - w S;   o = q S + Aq (beta E);   S <- Diag(decay) S + kg^T (beta E)

    Args:
      q, w, kg: [B, T, HV, K] bf16. u: [B, T, HV, V] bf16. decay: [B, HV, N, K] float32.
      aq: [B, HV, N, 64, 64] bf16. beta: [B, HV, T] float32.
      initial_state: [B, HV, K, V] float32 or None for zeros.
      keep_states: whether to return the state that each chunk starts from.

    Returns:
      o [B, T, HV, V] bf16, the last state [B, HV, K, V] float32, and with `keep_states` the states
      before each chunk, transposed: [B, HV, N, V, K] bf16.

    Traffic at B=8 T=4096 HV=16 K=V=128: q, w, u, kg, o 134 MB each, Aq 67 MB: 0.74 GB, 0.17 ms at
    4.3 TB/s; the kept states add 268 MB, 0.06 ms. Operations: 4 products of 64x64x128 a chunk and
    64 columns, 0.07 TFLOP in all: nothing. B * HV * V / 128 CTAs, each a chain of N chunks.
    """
    B, T, HV, K = q.shape
    V, N = u.shape[-1], T // CHUNK
    warpgroups = _warpgroups(B * HV, V)
    width = warpgroups * COLUMNS

    def body(q_ref, w_ref, u_ref, kg_ref, decay_ref, aq_ref, beta_ref, *refs):
        start_ref = refs[0] if initial_state is not None else None
        o_ref, last_ref, *refs = refs[initial_state is not None :]
        states_ref = refs.pop(0) if keep_states else None
        so, *ss = refs
        b, h, block, wg = (lax.axis_index(name) for name in ("b", "h", "block", "wg"))
        mine = pl.ds(block * width + wg * COLUMNS, COLUMNS)

        def run(pipeline):
            if start_ref is None:
                state = plgpu.layout_cast(jnp.zeros((COLUMNS, K), f32), TILE)
            else:
                state = _load_transposed(start_ref.at[b, h, :, mine])
            state = pipeline(state)
            last = last_ref.at[b, h, :, mine].T
            last[...] = plgpu.layout_cast(state, TILE_TRANSPOSED)
            plgpu.wait_smem_to_gmem(0)

        def step(index, q, w, u, kg, decay, aq, beta, state):
            (n,) = index
            rounded = state.astype(bf16)
            if keep_states:
                plgpu.wait_smem_to_gmem(1, wait_read_only=True)
                ss[0].at[wg][...] = rounded
            u_mine = mosaic.load(u.at[:, pl.ds(wg * COLUMNS, COLUMNS)].T)
            error = u_mine - product((rounded, w.T))
            write = error * mosaic.per_column(mosaic.load(beta, PER_COLUMN), COLUMNS)
            write = write.astype(bf16)
            o = product((rounded, q.T), (write, aq.T)).astype(bf16)
            kept = state * mosaic.per_column(mosaic.load(decay, PER_COLUMN), COLUMNS)
            state = product((write, kg), init=kept)
            if not keep_states:
                plgpu.wait_smem_to_gmem(1, wait_read_only=True)
            tile = so.at[wg, lax.rem(n, 2)]
            o_transposed = tile.T
            o_transposed[...] = o
            plgpu.commit_smem()
            if keep_states:
                plgpu.copy_smem_to_gmem(ss[0].at[wg], states_ref.at[b, h, n, mine])
            plgpu.copy_smem_to_gmem(tile, o_ref.at[b, pl.ds(n * CHUNK, CHUNK), h, mine])
            return state

        _pipeline(
            step, run, N, warpgroups, [q_ref, w_ref, u_ref, kg_ref, decay_ref, aq_ref, beta_ref],
            [
                _tokens(b, h, K),
                _tokens(b, h, K),
                _tokens(b, h, width, block),
                _tokens(b, h, K),
                plgpu.BlockSpec((None, None, None, K), lambda n: (b, h, n, 0)),
                _square(b, h),
                plgpu.BlockSpec((None, None, CHUNK), lambda n: (b, h, n)),
            ],
        )  # fmt: skip

    out_type = [SDS(u.shape, bf16), SDS((B, HV, K, V), f32)]
    scratch = [mosaic.tile(CHUNK, COLUMNS, warpgroups, 2)]
    if keep_states:
        out_type.append(SDS((B, HV, N, V, K), bf16))
        scratch.append(mosaic.tile(COLUMNS, K, warpgroups))
    start = [] if initial_state is None else [initial_state]
    return _kernel(body, out_type, scratch, (B, HV, V // width), warpgroups)(
        q, w, u, kg, decay, aq, beta, *start
    )


def backward(q, w, kg, do, decay, aq, beta, last_gradient):
    """Runs the chunks in reverse; dS is the gradient of the state after the chunk:

        dE = beta (Aq^T do + kg dS);   dS <- Diag(decay) dS + q^T do - w^T dE

    Args:
      q, w, kg, decay, aq, beta: as in `forward`. do: [B, T, HV, V] bf16.
      last_gradient: gradient of the last state, [B, HV, K, V] float32 or None for zeros.

    Returns:
      The gradient of the state after each chunk, transposed, [B, HV, N, V, K] bf16, and that of the
      initial state, [B, HV, K, V] float32.

    Traffic as `forward`, with `do` in u's place and the state gradients in o's.
    """
    B, T, HV, K = q.shape
    V, N = do.shape[-1], T // CHUNK
    warpgroups = _warpgroups(B * HV, V)
    width = warpgroups * COLUMNS

    def body(q_ref, w_ref, kg_ref, do_ref, decay_ref, aq_ref, beta_ref, *refs):
        last_ref = refs[0] if last_gradient is not None else None
        states_ref, start_ref, ss = refs[last_gradient is not None :]
        b, h, block, wg = (lax.axis_index(name) for name in ("b", "h", "block", "wg"))
        mine = pl.ds(block * width + wg * COLUMNS, COLUMNS)

        def run(pipeline):
            if last_ref is None:
                gradient = plgpu.layout_cast(jnp.zeros((COLUMNS, K), f32), TILE)
            else:
                gradient = _load_transposed(last_ref.at[b, h, :, mine])
            gradient = pipeline(gradient)
            start = start_ref.at[b, h, :, mine].T
            start[...] = plgpu.layout_cast(gradient, TILE_TRANSPOSED)
            plgpu.wait_smem_to_gmem(0)

        def step(index, q, w, kg, do, decay, aq, beta, gradient):
            n = N - 1 - index[0]
            rounded = gradient.astype(bf16)
            tile = ss.at[wg, lax.rem(n, 2)]
            plgpu.wait_smem_to_gmem(1, wait_read_only=True)
            tile[...] = rounded
            do_mine = plgpu.load(do.at[:, pl.ds(wg * COLUMNS, COLUMNS)].T, layout=TILE)
            y = product((do_mine, aq), (rounded, kg.T))
            error = y * mosaic.per_column(mosaic.load(beta, PER_COLUMN), COLUMNS)
            kept = gradient * mosaic.per_column(mosaic.load(decay, PER_COLUMN), COLUMNS)
            gradient = product((do_mine, q), ((-error).astype(bf16), w), init=kept)
            plgpu.commit_smem()
            plgpu.copy_smem_to_gmem(tile, states_ref.at[b, h, n, mine])
            return gradient

        last = N - 1
        _pipeline(
            step, run, N, warpgroups, [q_ref, w_ref, kg_ref, do_ref, decay_ref, aq_ref, beta_ref],
            [
                _tokens(b, h, K, last=last),
                _tokens(b, h, K, last=last),
                _tokens(b, h, K, last=last),
                _tokens(b, h, width, block, last=last),
                plgpu.BlockSpec((None, None, None, K), lambda n: (b, h, last - n, 0)),
                _square(b, h, last=last),
                plgpu.BlockSpec((None, None, CHUNK), lambda n: (b, h, last - n)),
            ],
        )  # fmt: skip

    out_type = [SDS((B, HV, N, V, K), bf16), SDS((B, HV, K, V), f32)]
    scratch = [mosaic.tile(COLUMNS, K, warpgroups, 2)]
    last = [] if last_gradient is None else [last_gradient]
    return _kernel(body, out_type, scratch, (B, HV, V // width), warpgroups)(
        q, w, kg, do, decay, aq, beta, *last
    )


def _warpgroups(heads, V):
    """Compute warpgroups of a CTA: two share a chunk's operands, but also the tensor cores, so that
    with few heads, when the chain of chunks is all the time there is, each has a CTA of its own."""
    full = heads * V // (2 * COLUMNS) >= PROCESSORS // 2
    return 2 if V % (2 * COLUMNS) == 0 and full else 1


def _load_transposed(ref):
    """A float32 [K, columns] ref as a [columns, K] tile."""
    return plgpu.layout_cast(mosaic.load(ref.T, TILE_TRANSPOSED, optimized=False), TILE)


def _tokens(b, h, width, block=0, *, last=None):
    """One chunk of a [B, T, H, D] array, `width` features at `block`; in reverse with `last`."""
    chunk = (lambda n: n) if last is None else (lambda n: last - n)
    return plgpu.BlockSpec(
        (None, CHUNK, None, width), lambda n: (b, chunk(n), h, block), transforms=TRANSFORMS
    )


def _square(b, h, *, last=None):
    """One chunk's [64, 64] matrix of a [B, H, N, 64, 64] array; in reverse with `last`."""
    chunk = (lambda n: n) if last is None else (lambda n: last - n)
    return plgpu.BlockSpec(
        (None, None, None, CHUNK, CHUNK), lambda n: (b, h, chunk(n), 0, 0), transforms=TRANSFORMS
    )


def _pipeline(step, run, chunks, warpgroups, refs, specs):
    plgpu.emit_pipeline_warp_specialized(
        step,
        grid=(chunks,),
        in_specs=specs,
        compute_context=run,
        num_compute_wgs=warpgroups,
        memory_registers=LOADER_REGISTERS,
        wg_axis="wg",
        max_concurrent_steps=min(2, chunks),
    )(*refs)


def _kernel(body, out_type, scratch, grid, warpgroups):
    return mosaic.kernel(
        body,
        out_type=out_type,
        scratch_types=scratch,
        grid=grid,
        grid_names=("b", "h", "block"),
        num_threads=warpgroups + 1,
        thread_name="wg",
    )
