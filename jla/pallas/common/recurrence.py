"""The state recurrence over chunks, forward and backward, for states of the delta-rule form.

Both kernels keep the transposed state, [64 value columns, K] float32, in the registers of one
warpgroup for the whole sequence; another warpgroup streams the chunks' operands into SMEM. Chunks
follow one another, value columns are independent of one another, and so are pieces of the sequence
whose first states are known: `pieces.py` makes those, where heads are too few to fill the GPU.
"""

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from jla.pallas.common import mosaic
from jla.pallas.common.chunks import CHUNK
from jla.pallas.common.mosaic import PER_COLUMN, TRANSFORMS, WGMMA_LAYOUT, bf16, f32, product

SDS = jax.ShapeDtypeStruct
COLUMNS = 64  # value columns of one warpgroup
# Up to this K the rounded state is a register operand of its products, and SMEM holds the operands
# of two chunks. Beyond, there are no registers for it: it goes through SMEM, which has room for one
# chunk only.
NARROW = 128
LOADER_REGISTERS = 40
PROCESSORS = 132  # multiprocessors of an H100 or H200


def forward(q, w, u, kg, decay, aq, beta, starts, *, length, keep_states):
    """Runs the chunks in order:

        E = u - w S;   o = q S + Aq (beta E);   S <- Diag(decay) S + kg^T (beta E)

    Args:
      q, w, kg: [B, L, HV, K] bf16, L whole chunks. u: [B, L, HV, V] bf16.
      decay: [B, HV, N, K] float32. aq: [B, HV, N, 64, 64] bf16. beta: [B, HV, L] float32.
      starts: the state that each piece of the sequence starts from, [P, B, HV, K, V] float32, or
        None for one piece that starts from zeros.
      length: T, the tokens that o has, a multiple of 8; those beyond write nothing.
      keep_states: whether to return the state that each chunk starts from.

    Returns:
      o [B, T, HV, V] bf16, the last state [B, HV, K, V] float32, and with `keep_states` the states
      before each chunk, transposed: [B, HV, N, V, K] bf16.

    Traffic at B=8 T=4096 HV=16 K=V=128: q, w, u, kg, o 134 MB each, Aq 67 MB: 0.74 GB, 0.17 ms at
    4.3 TB/s; the kept states add 268 MB, 0.06 ms. Operations: 4 products of 64x64x128 a chunk and
    64 columns, 0.07 TFLOP in all: nothing. P * B * HV * V / 128 CTAs, each a chain of N / P chunks.
    """
    B, L, HV, K = q.shape
    V, N, P = u.shape[-1], L // CHUNK, 1 if starts is None else starts.shape[0]
    warpgroups = _warpgroups(P * B * HV, V)
    width = warpgroups * COLUMNS
    wide = K > NARROW

    def body(q_ref, w_ref, u_ref, kg_ref, decay_ref, aq_ref, beta_ref, *refs):
        start_ref = refs[0] if starts is not None else None
        o_ref, last_ref, *refs = refs[starts is not None :]
        states_ref = refs.pop(0) if keep_states else None
        so, *ss = refs
        p, b, h, block, wg = (lax.axis_index(name) for name in ("p", "b", "h", "block", "wg"))
        first, count = piece(p, P, N)
        mine = pl.ds(block * width + wg * COLUMNS, COLUMNS)

        def run(pipeline):
            if start_ref is None:
                state = plgpu.layout_cast(jnp.zeros((COLUMNS, K), f32), WGMMA_LAYOUT)
            else:
                state = mosaic.load_transposed(start_ref.at[p, b, h, :, mine])
            state = pipeline(state)

            @pl.when(p == P - 1)
            def _():
                mosaic.store_transposed(last_ref.at[b, h, :, mine], state)

            plgpu.wait_smem_to_gmem(0)

        def step(index, q, w, u, kg, decay, aq, beta, state):
            n = first + index[0]
            rounded = state.astype(bf16)
            if keep_states or wide:
                plgpu.wait_smem_to_gmem(1, wait_read_only=True)
                ss[0].at[wg][...] = rounded
            if wide:
                plgpu.commit_smem()
                rounded = ss[0].at[wg]
            u_mine = mosaic.load(u.at[:, pl.ds(wg * COLUMNS, COLUMNS)].T)
            error = u_mine - product((rounded, w.T))
            write = error * mosaic.per_column(mosaic.load(beta, PER_COLUMN), COLUMNS)
            write = write.astype(bf16)
            o = product((rounded, q.T), (write, aq.T)).astype(bf16)
            kept = state * mosaic.per_column(mosaic.load(decay, PER_COLUMN), COLUMNS)
            state = product((write, kg), init=kept)
            if not (keep_states or wide):
                plgpu.wait_smem_to_gmem(1, wait_read_only=True)
            tile = so.at[wg, lax.rem(index[0], 2)]
            o_transposed = tile.T
            o_transposed[...] = o
            plgpu.commit_smem()
            if keep_states:
                plgpu.copy_smem_to_gmem(ss[0].at[wg], states_ref.at[b, h, n, mine])
            plgpu.copy_smem_to_gmem(tile, o_ref.at[b, pl.ds(n * CHUNK, CHUNK), h, mine])
            return state

        def chunk(i):
            return first + i

        stream(
            step, run, count, warpgroups,
            [q_ref, w_ref, u_ref, kg_ref, decay_ref, aq_ref, beta_ref],
            [
                tokens(chunk, b, h, K),
                tokens(chunk, b, h, K),
                tokens(chunk, b, h, width, block),
                tokens(chunk, b, h, K),
                features(chunk, b, h, K),
                square(chunk, b, h),
                scalars(chunk, b, h),
            ],
        )  # fmt: skip

    out_type = [SDS((B, length, HV, V), bf16), SDS((B, HV, K, V), f32)]
    scratch = [mosaic.tile(CHUNK, COLUMNS, warpgroups, 2)]
    if keep_states:
        out_type.append(SDS((B, HV, N, V, K), bf16))
    if keep_states or wide:
        scratch.append(mosaic.tile(COLUMNS, K, warpgroups))
    start = [] if starts is None else [starts]
    return kernel(body, out_type, scratch, (P, B, HV, V // width), warpgroups)(
        q, w, u, kg, decay, aq, beta, *start
    )


def backward(q, w, kg, do, decay, aq, beta, ends):
    """Runs the chunks in reverse; dS is the gradient of the state after the chunk:

        dE = beta (Aq^T do + kg dS);   dS <- Diag(decay) dS + q^T do - w^T dE

    Args:
      q, w, kg, decay, aq, beta: as in `forward`. do: [B, T, HV, V] bf16, T at most L.
      ends: gradient of the state after each piece of the sequence, [P, B, HV, K, V] float32.

    Returns:
      The gradient of the state after each chunk, transposed, [B, HV, N, V, K] bf16, and that of the
      initial state, [B, HV, K, V] float32.

    Traffic as `forward`, with `do` in u's place and the state gradients in o's.
    """
    B, L, HV, K = q.shape
    V, N, P = do.shape[-1], L // CHUNK, ends.shape[0]
    warpgroups = _warpgroups(P * B * HV, V)
    width = warpgroups * COLUMNS
    wide = K > NARROW
    buffers = 1 if wide else 2

    def body(
        q_ref, w_ref, kg_ref, do_ref, decay_ref, aq_ref, beta_ref, end_ref,
        states_ref, start_ref, ss,
    ):  # fmt: skip
        p, b, h, block, wg = (lax.axis_index(name) for name in ("p", "b", "h", "block", "wg"))
        first, count = piece(p, P, N)
        last = first + count - 1
        mine = pl.ds(block * width + wg * COLUMNS, COLUMNS)

        def run(pipeline):
            gradient = pipeline(mosaic.load_transposed(end_ref.at[p, b, h, :, mine]))

            @pl.when(p == 0)
            def _():
                mosaic.store_transposed(start_ref.at[b, h, :, mine], gradient)

            plgpu.wait_smem_to_gmem(0)

        def step(index, q, w, kg, do, decay, aq, beta, gradient):
            n = last - index[0]
            rounded = gradient.astype(bf16)
            tile = ss.at[wg, lax.rem(index[0], buffers)]
            plgpu.wait_smem_to_gmem(buffers - 1, wait_read_only=True)
            tile[...] = rounded
            if wide:
                plgpu.commit_smem()
                rounded = tile
            do_mine = plgpu.load(do.at[:, pl.ds(wg * COLUMNS, COLUMNS)].T, layout=WGMMA_LAYOUT)
            y = product((do_mine, aq), (rounded, kg.T))
            error = y * mosaic.per_column(mosaic.load(beta, PER_COLUMN), COLUMNS)
            kept = gradient * mosaic.per_column(mosaic.load(decay, PER_COLUMN), COLUMNS)
            gradient = product((do_mine, q), ((-error).astype(bf16), w), init=kept)
            plgpu.commit_smem()
            plgpu.copy_smem_to_gmem(tile, states_ref.at[b, h, n, mine])
            return gradient

        def chunk(i):
            return last - i

        stream(
            step, run, count, warpgroups,
            [q_ref, w_ref, kg_ref, do_ref, decay_ref, aq_ref, beta_ref],
            [
                tokens(chunk, b, h, K),
                tokens(chunk, b, h, K),
                tokens(chunk, b, h, K),
                tokens(chunk, b, h, width, block),
                features(chunk, b, h, K),
                square(chunk, b, h),
                scalars(chunk, b, h),
            ],
        )  # fmt: skip

    out_type = [SDS((B, HV, N, V, K), bf16), SDS((B, HV, K, V), f32)]
    scratch = [mosaic.tile(COLUMNS, K, warpgroups, buffers)]
    return kernel(body, out_type, scratch, (P, B, HV, V // width), warpgroups)(
        q, w, kg, do, decay, aq, beta, ends
    )


def piece(p, pieces, chunks):
    """The first chunk of piece p and its number of chunks; the last piece may be shorter."""
    length = -(-chunks // pieces)
    first = p * length
    if chunks == pieces * length:
        return first, length
    return first, jnp.minimum(length, chunks - first)


def _warpgroups(heads, V):
    """Compute warpgroups of a CTA: two share a chunk's operands, but also the tensor cores, so that
    with few heads, when the chain of chunks is all the time there is, each has a CTA of its own."""
    full = heads * V // (2 * COLUMNS) >= PROCESSORS // 2
    return 2 if V % (2 * COLUMNS) == 0 and full else 1


# How the pipeline's step i finds its chunk in an array; `chunk` maps i to the chunk's number.


def tokens(chunk, b, h, width, block=0):
    """Of [B, T, H, D]: the chunk's tokens, `width` features at `block`."""
    return plgpu.BlockSpec(
        (None, CHUNK, None, width), lambda i: (b, chunk(i), h, block), transforms=TRANSFORMS
    )


def features(chunk, b, h, width):
    """Of [B, H, N, D]: the chunk's vector."""
    return plgpu.BlockSpec((None, None, None, width), lambda i: (b, h, chunk(i), 0))


def square(chunk, b, h):
    """Of [B, H, N, 64, 64]: the chunk's matrix."""
    return plgpu.BlockSpec(
        (None, None, None, CHUNK, CHUNK), lambda i: (b, h, chunk(i), 0, 0), transforms=TRANSFORMS
    )


def scalars(chunk, b, h):
    """Of [B, H, T]: the chunk's tokens."""
    return plgpu.BlockSpec((None, None, CHUNK), lambda i: (b, h, chunk(i)))


def stream(step, run, chunks, warpgroups, refs, specs):
    """Runs `step` for every chunk while a warpgroup of its own loads the chunks to come."""
    ahead = 1 if max(spec.block_shape[-1] for spec in specs) > NARROW else 2
    plgpu.emit_pipeline_warp_specialized(
        step,
        grid=(chunks,),
        in_specs=specs,
        compute_context=run,
        num_compute_wgs=warpgroups,
        memory_registers=LOADER_REGISTERS,
        wg_axis="wg",
        max_concurrent_steps=min(ahead, chunks) if isinstance(chunks, int) else ahead,
    )(*refs)


def kernel(body, out_type, scratch, grid, warpgroups):
    """A kernel over pieces, batch, heads and blocks of value columns."""
    return mosaic.kernel(
        body,
        out_type=out_type,
        scratch_types=scratch,
        grid=grid,
        grid_names=("p", "b", "h", "block"),
        num_threads=warpgroups + 1,
        thread_name="wg",
    )
