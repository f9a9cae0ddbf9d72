"""One token of log-linear attention as a Pallas kernel: one pass over the levels in use."""

import functools

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from jla._core.axes import LOG_LINEAR, letters, of_step, with_value_heads
from jla._core.shardwise import shardwise
from jla._core.states import LogLinearState, moved_on
from jla.pallas.common import mosaic
from jla.pallas.common.mosaic import f32, per_column, per_row
from jla.pallas.common.tiles import step_width
from jla.pallas.log_linear.stream import lowest_bit, without_lowest_bit
from jla.reference import log_linear as reference

MULTIPLE = 16  # of K and V
STAGES = 3  # levels that are loaded at once

_AXES = with_value_heads(of_step(LOG_LINEAR))
_INPUTS = letters(_AXES, "q k v g level_scales state.levels state.position")
_OUTPUTS = letters(_AXES, "o state.levels")


def unsupported(q, v):
    """Why the kernel cannot serve these arguments, or None."""
    K, V = q.shape[-1], v.shape[-1]
    if K % MULTIPLE or V % MULTIPLE:
        return (
            f"K={K} and V={V}, and the step's kernel takes multiples of {MULTIPLE} "
            "(padding would copy the state)"
        )
    return None


@jax.jit
def log_linear_step(q, k, v, g, level_scales, state):
    """One token in one kernel. See `jla.log_linear_step`.

    Level l is in use where bit l - 1 of the row's position is set; the others hold zeros, as in
    every state that jla returned, and are not read. Of those in use the lowest, as many as the
    position has trailing ones, merge into the level above them and leave zeros; the rest decay.

    One warpgroup has up to 8192 elements of every level of a head. The levels in use come to SMEM
    one after another, `STAGES` of them on their way at once, and are 64 registers a thread each
    when their turn comes; the sum of those that merge is as many. A warp holds all rows of a
    quarter of the columns, so that q^T S is shuffles inside the warp. All arithmetic is float32.

    The state is aliased to the new one. It is overwritten where its buffer is donated or is a
    temporary of the caller's program, and copied before the kernel otherwise. Where the two are the
    same memory, levels not in use stay as they are; where they are not, they become zeros.

    Bytes at B=128 H=16 K=V=128, position 4095: twelve levels of 134 MB read, twelve (of zeros) and
    the merged one written: 3.36 GB, 0.78 ms at 4.3 TB/s; one pass over the live levels, read and
    written, is 0.75 ms. Prediction: 0.85 ms.

    Derivatives are those of the reference's formula, in XLA.
    """
    o, levels = _step(q, k, v, g, level_scales, state.levels, state.position)
    return o, LogLinearState(levels, moved_on(state.position, 1))


@jax.custom_jvp
def _step(q, k, v, g, level_scales, levels, position):
    run = shardwise(_run, _INPUTS, _OUTPUTS)
    return run(q, k, v, g, level_scales, levels, position)


@_step.defjvp
def _(primals, tangents):
    *_, position = primals

    def formula(*arrays):
        *arrays, levels = arrays
        o, state = reference.log_linear_step(*arrays, LogLinearState(levels, position))
        return o, state.levels

    return _step(*primals), jax.jvp(formula, primals[:-1], tangents[:-1])[1]


def _run(q, k, v, g, level_scales, levels, position):
    """The kernel call."""
    B, H, L, K, V = levels.shape
    group, width, top = H // q.shape[1], step_width(K, V), L - 1
    layout = mosaic.columns_by_warp(width)
    by_row, by_column = layout.reduce(1), layout.reduce(0)
    load = functools.partial(mosaic.load, optimized=False)

    def body(
        position_ref, q_ref, k_ref, v_ref, g_ref, scales_ref, levels_ref, o_ref, levels_out, ring,
        loaded,
    ):  # fmt: skip
        b, h, part = (lax.axis_index(name) for name in ("b", "h", "part"))
        key_head, mine = lax.div(h, group), pl.ds(part * width, width)
        position = position_ref[b]
        bits = lax.bitwise_and(position, (1 << top) - 1)
        ones = lowest_bit(bits + 1)

        def tile(ref, level):
            return ref.at[b, h, level, :, mine]

        def put(level, x):
            mosaic.store(tile(levels_out, level), plgpu.layout_cast(x, layout))

        def fetch(step, ahead):
            """Starts to load the lowest level of `ahead`, if there is one; the rest of them."""
            slot = lax.rem(step, STAGES)

            @pl.when(ahead > 0)
            def _():
                source = tile(levels_ref, lowest_bit(ahead) + 1)
                plgpu.copy_gmem_to_smem(source, ring.at[slot], loaded.at[slot])

            return without_lowest_bit(ahead)

        ahead = bits
        for i in range(STAGES):
            ahead = fetch(jnp.int32(i), ahead)

        nothing = jnp.zeros((K, width), f32)
        same = _same_memory(
            levels_ref.at[b, h, 0, 0, mine], levels_out.at[b, h, 0, 0, mine], by_column
        )

        def clear(level, carry):
            in_use = lax.bitwise_and(lax.shift_right_logical(2 * bits, level), 1) == 1
            pl.when(~(same | in_use | (level == ones + 1)))(lambda: put(level, nothing))
            return carry

        lax.fori_loop(0, L, clear, None)

        decay = jnp.exp(g_ref[b, h])
        query = per_row(load(q_ref.at[b, key_head], by_row), width)
        key = per_row(load(k_ref.at[b, key_head], by_row), width)
        own = key * per_column(load(v_ref.at[b, h, mine], by_column), K)

        def take(step, level, ahead, o):
            """A level, decayed, and what the token reads of it."""
            slot = lax.rem(step, STAGES)
            plgpu.barrier_wait(loaded.at[slot])
            x = decay * load(ring.at[slot], layout)
            plgpu.commit_smem()  # all warps have read this slot
            ahead = fetch(step, ahead)
            o += scales_ref[b, h, level].astype(f32) * jnp.sum(query * x, axis=0)
            return x, ahead, o

        def merge(step, carry):
            o, ahead, merged = carry
            x, ahead, o = take(step, step + 1, ahead, o)
            put(step + 1, nothing)
            return o, ahead, merged + x

        def keep(carry):
            o, ahead, step, rest = carry
            level = lowest_bit(rest) + 1
            x, ahead, o = take(step, level, ahead, o)
            put(level, x)
            return o, ahead, step + 1, without_lowest_bit(rest)

        o = scales_ref[b, h, 0].astype(f32) * jnp.sum(query * own, axis=0)
        o, ahead, merged = lax.fori_loop(0, ones, merge, (o, ahead, own))
        pl.when(ones < top)(lambda: put(ones + 1, merged))
        rest = lax.bitwise_and(bits, bits + 1)  # without the trailing ones
        o, *_ = lax.while_loop(lambda carry: carry[3] > 0, keep, (o, ahead, ones, rest))

        # As the definition: what L levels do not serve is no number.
        beyond = lax.shift_right_logical(position, top) != 0
        o = jnp.where(jnp.broadcast_to(beyond, o.shape), jnp.nan, o)
        mosaic.store(o_ref.at[b, h, mine], o.astype(v.dtype))

        @pl.when(beyond | (position + 1 < 0))
        def _():
            def fill(level, carry):
                put(level, jnp.full((K, width), jnp.nan, f32))
                return carry

            lax.fori_loop(0, L, fill, None)

    step = mosaic.kernel(
        body,
        out_type=tuple(jax.ShapeDtypeStruct(x.shape, x.dtype) for x in (v, levels)),
        in_place={6: 1},
        scratch_types=[
            plgpu.SMEM((STAGES, K, width), f32),
            plgpu.Barrier(num_barriers=STAGES),
        ],
        grid=(B, H, V // width),
        grid_names=("b", "h", "part"),
    )
    return step(position, q, k, v, g, level_scales, levels)


def _same_memory(source, target, layout):
    """Whether two refs of numbers are the same memory: is what is written to the one in the other?

    The target then holds zeros. The layout is that of either.
    """
    before = source[0] == 0
    plgpu.commit_smem()  # all that is wanted of it is the barrier
    ones = (mosaic.load(source, layout, optimized=False) == 0).astype(f32)
    mosaic.store(target, ones)
    plgpu.commit_smem()
    same = (source[0] == 0) != before
    plgpu.commit_smem()
    mosaic.store(target, plgpu.layout_cast(jnp.zeros(ones.shape, f32), layout))
    return same
