"""One token of log-linear attention as a Pallas kernel: one pass over the levels in use."""

import functools

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl

from jla._state import LogLinearState
from jla.pallas import mosaic
from jla.pallas.gsa.step import _width as tile_width
from jla.pallas.log_linear.stream import lowest_bit, without_lowest_bit
from jla.pallas.mosaic import f32, per_column, per_row
from jla.pallas.shardwise import shardwise
from jla.reference import log_linear as reference

MULTIPLE = 16  # of K and V


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

    One warpgroup has up to 8192 elements of every level of a head: 64 registers a thread for the
    level that it works on, and as many for the sum of those that merge. A warp holds all rows of a
    quarter of the columns, so that q^T S is shuffles inside the warp. All arithmetic is float32.

    The state is aliased to the new one. It is overwritten where its buffer is donated or is a
    temporary of the caller's program, and copied before the kernel otherwise.

    Bytes at B=128 H=16 K=V=128, position 4095: twelve levels of 134 MB read, twelve (of zeros) and
    the merged one written: 3.36 GB, 0.78 ms at 4.3 TB/s; one pass over the live levels, read and
    written, is 0.75 ms. Prediction: 0.85 ms.

    Derivatives are those of the reference's formula, in XLA.
    """
    o, levels = _step(q, k, v, g, level_scales, state.levels, state.position)
    return o, LogLinearState(levels, state.position + 1)


@jax.custom_jvp
def _step(q, k, v, g, level_scales, levels, position):
    keys, heads = ("one", "H") if q.shape[1] == 1 < v.shape[1] else ("H", "HV")
    q_axes, v_axes, levels_axes = f"B {keys} K", f"B {heads} V", f"B {heads} L K V"
    axes = (q_axes, q_axes, v_axes, f"B {heads}", f"B {heads} L", levels_axes, "B")
    run = shardwise(_run, axes, (v_axes, levels_axes))
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
    group, width, top = H // q.shape[1], tile_width(K, V), L - 1
    layout = mosaic.columns_by_warp(width)
    by_row, by_column = layout.reduce(1), layout.reduce(0)
    load = functools.partial(mosaic.load, optimized=False)

    def body(position_ref, q_ref, k_ref, v_ref, g_ref, scales_ref, levels_ref, o_ref):
        b, h, part = (lax.axis_index(name) for name in ("b", "h", "part"))
        key_head, mine = lax.div(h, group), pl.ds(part * width, width)
        position = position_ref[b]
        bits = lax.bitwise_and(position, (1 << top) - 1)
        ones = lowest_bit(bits + 1)
        decay = jnp.exp(g_ref[b, h])
        query = per_row(load(q_ref.at[b, key_head], by_row), width)
        key = per_row(load(k_ref.at[b, key_head], by_row), width)
        own = key * per_column(load(v_ref.at[b, h, mine], by_column), K)
        nothing = jnp.zeros((K, width), f32)

        def tile(level):
            return levels_ref.at[b, h, level, :, mine]

        def read(o, level, x):
            return o + scales_ref[b, h, level].astype(f32) * jnp.sum(query * x, axis=0)

        def merge(level, carry):
            o, merged = carry
            x = decay * load(tile(level), layout)
            mosaic.store(tile(level), mosaic.plgpu.layout_cast(nothing, layout))
            return read(o, level, x), merged + x

        def keep(carry):
            o, rest = carry
            level = lowest_bit(rest) + 1
            x = decay * load(tile(level), layout)
            mosaic.store(tile(level), x)
            return read(o, level, x), without_lowest_bit(rest)

        o = scales_ref[b, h, 0].astype(f32) * jnp.sum(query * own, axis=0)
        o, merged = lax.fori_loop(1, ones + 1, merge, (o, own))
        pl.when(ones < top)(lambda: mosaic.store(tile(ones + 1), merged))
        rest = lax.bitwise_and(bits, bits + 1)  # without the trailing ones
        o, _ = lax.while_loop(lambda carry: carry[1] > 0, keep, (o, rest))

        # As the definition: what L levels do not hold is no number.
        invalid = jnp.broadcast_to(lax.shift_right_logical(position, top) > 0, o.shape)
        o = jnp.where(invalid, jnp.nan, o)
        mosaic.store(o_ref.at[b, h, mine], o.astype(v.dtype))

        @pl.when(lax.shift_right_logical(position + 1, top) > 0)
        def _():
            nan = mosaic.plgpu.layout_cast(jnp.full((K, width), jnp.nan, f32), layout)

            def fill(level, carry):
                mosaic.store(tile(level), nan)
                return carry

            lax.fori_loop(0, L, fill, None)

    step = mosaic.kernel(
        body,
        out_type=jax.ShapeDtypeStruct(v.shape, v.dtype),
        grid=(B, H, V // width),
        grid_names=("b", "h", "part"),
    )

    # The kernel changes operands that are refs; run_state makes a pure function of that.
    def run(refs):
        levels_ref, o_ref = refs
        o_ref[...] = step(position, q, k, v, g, level_scales, levels_ref)

    levels, o = pl.run_state(run)((levels, jnp.zeros(v.shape, v.dtype)))
    return o, levels
