"""One token of log-linear attention as a Pallas kernel: one pass over the levels in use."""

import functools

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from jla.pallas.common import mosaic, pools, scratch
from jla.pallas.common.mosaic import f32, per_column, per_row
from jla.pallas.common.scratch import barrier_for, fetch
from jla.pallas.common.tiles import step_width
from jla.pallas.common.token import load
from jla.pallas.log_linear.stream import lowest_bit, without_lowest_bit
from jla.reference import log_linear as reference

SDS = jax.ShapeDtypeStruct
MULTIPLE = 16  # of K and V
STAGES = 3  # levels that are loaded at once


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
def log_linear_step(q, k, v, g, level_scales, state, *, slots=None):
    """One token in one kernel. See `jla.log_linear_step`.

    Level l is in use where bit l - 1 of the row's position is set; the others are not read. Of
    those in use the lowest, as many as the position has trailing ones, merge into the level above
    them. Of a `LazyLogLinearState` that is all that is written; the sums of log decays beside the
    levels are XLA's. Of a `LogLinearState` the other levels in use decay, and those that merged
    become zeros.

    One warpgroup has up to 8192 elements of every level of a head. The levels in use come to SMEM
    one after another, `STAGES` of them on their way at once, and are 64 registers a thread each
    when their turn comes; the sum of those that merge is as many. A warp holds all rows of a
    quarter of the columns, so that q^T S is shuffles inside the warp. All arithmetic is float32.

    The state is aliased to the new one. It is overwritten where its buffer is donated or is a
    temporary of the caller's program, and copied before the kernel otherwise. Where the two are the
    same memory, levels not in use stay as they are; where they are not, they become zeros, and a
    lazy state's levels that are kept are copied. Of a pool each CTA reads and writes the row that
    its slot names.

    At B=128 H=16 K=V=128 a level is 0.134 GB, and takes 0.43 operations a byte, far below what
    memory gives. Floors at 4.3 TB/s, and predictions at the 3.85 TB/s that this kernel had when it
    moved 25 levels in 0.876 ms:

        lazy, position 4095: 12 read, 1 written, 1.74 GB     0.41 ms, 0.45 predicted
        lazy, 6 of 12 levels in use: 7 moved, 0.94 GB        0.22 ms, 0.25 predicted
        not lazy, position 4095: 12 read, 13 written         0.78 ms, 0.876 measured

    Derivatives are those of the reference's formula, in XLA.
    """
    return reference.stepped_by_kernel(_run, q, k, v, g, level_scales, state, slots)


def _run(q, k, v, decays, level_scales, levels, position, slots=None, *, lazy):
    """The kernel call."""
    (B, H, V), K = v.shape, levels.shape[3]
    width = step_width(K, V)
    out = scratch.kernel(
        functools.partial(_body, lazy=lazy),
        inputs=dict(
            position=position,
            q=q,
            k=k,
            v=v,
            decays=decays,
            scales=level_scales,
            levels=levels,
            slots=slots,
        ),
        outputs=dict(o=SDS(v.shape, v.dtype), new_levels=SDS(levels.shape, levels.dtype)),
        scratch=dict(
            ring=plgpu.SMEM((STAGES, K, width), f32),
            loaded=barrier_for(["level"], STAGES),
        ),
        in_place=dict(levels="new_levels"),
        grid=(B, H, V // width),
        grid_names=("b", "h", "part"),
    )
    return out.o, out.new_levels


class Given:
    """What the step takes of one token's head, as it is given."""

    def __init__(self, refs, b, h):
        self.refs, self.place = refs, (b, h)

    def log_decay(self, level):
        return self.refs.decays[*self.place, level]

    def scale(self, level):
        return self.refs.scales[*self.place, level].astype(f32)

    def value(self, columns, layout):
        return load(self.refs.v.at[*self.place, columns], layout)

    def output(self, o, columns, layout):
        """What becomes of the head's output."""
        return o


def _body(refs, *, lazy):
    b, h, part = (lax.axis_index(name) for name in ("b", "h", "part"))
    (R, _, L, _, _), width = refs.levels.shape, refs.ring.shape[2]
    layout = mosaic.columns_by_warp(width)

    def idle():
        zeros = mosaic.zeros((width,), layout.reduce(0), refs.o.dtype)
        mosaic.store(refs.o.at[b, h, pl.ds(part * width, width)], zeros)

    def copy(source, target, row):
        def one(level, carry):
            at = h, level, slice(None), pl.ds(part * width, width)
            pools.tile(layout, *at)(source, target, row)
            return carry

        lax.fori_loop(0, L, one, None)

    on_row = functools.partial(advance, refs, b, h, part, Given(refs, b, h), lazy=lazy)
    pools.on_row(refs.slots, b, R, on_row, idle)
    pools.keep_rest(refs.slots, b, refs.levels, refs.new_levels, copy)


def advance(refs, b, h, part, given, row, *, lazy):
    """A part of one head of one batch row, whose levels are in this row of the levels."""
    _, H, L, K, _ = refs.levels.shape
    group, width, top = H // refs.q.shape[1], refs.ring.shape[2], L - 1
    layout = mosaic.columns_by_warp(width)
    by_row, by_column = layout.reduce(1), layout.reduce(0)
    key_head, mine = lax.div(h, group), pl.ds(part * width, width)
    position = refs.position[b]
    bits = lax.bitwise_and(position, (1 << top) - 1)
    ones = lowest_bit(bits + 1)
    start = functools.partial(_fetch, refs, (row, h), mine)
    put = functools.partial(_put, refs, (row, h), mine)

    ahead = bits
    for i in range(STAGES):
        ahead = start(jnp.int32(i), ahead)
    nothing = jnp.zeros((K, width), f32)
    same = _same_memory(
        refs.levels.at[row, h, 0, 0, mine], refs.new_levels.at[row, h, 0, 0, mine], by_column
    )
    rest = lax.bitwise_and(bits, bits + 1)  # without the trailing ones
    # What merges in a state that is not lazy becomes zeros when it has been read.
    _clear(put, rest if lazy else bits, ones, same, nothing, L)

    query = per_row(load(refs.q.at[b, key_head], by_row), width)
    key = per_row(load(refs.k.at[b, key_head], by_row), width)
    own = key * per_column(given.value(mine, by_column), K)

    def take(step, level, ahead, o):
        """A level, its decay, and what the token reads of it."""
        slot = lax.rem(step, STAGES)
        # Before the wait: they come from L2.
        decay = jnp.exp(given.log_decay(level))
        weight = decay * given.scale(level)
        plgpu.barrier_wait(refs.loaded.at[slot])
        x = load(refs.ring.at[slot], layout)
        plgpu.commit_smem()  # all warps have read this slot
        ahead = start(step, ahead)
        o += weight * jnp.sum(query * x, axis=0)
        return x, decay, ahead, o

    def merge(step, carry):
        o, ahead, merged = carry
        x, decay, ahead, o = take(step, step + 1, ahead, o)
        if not lazy:
            put(step + 1, nothing)
        return o, ahead, merged + decay * x

    def keep(carry):
        o, ahead, step, rest = carry
        level = lowest_bit(rest) + 1
        x, decay, ahead, o = take(step, level, ahead, o)
        if lazy:
            pl.when(~same)(lambda: put(level, x))
        else:
            put(level, decay * x)
        return o, ahead, step + 1, without_lowest_bit(rest)

    o = given.scale(0) * jnp.sum(query * own, axis=0)
    o, ahead, merged = lax.fori_loop(0, ones, merge, (o, ahead, own))
    pl.when(ones < top)(lambda: put(ones + 1, merged))
    o, *_ = lax.while_loop(lambda carry: carry[3] > 0, keep, (o, ahead, ones, rest))

    o = given.output(o, mine, by_column)
    # As the definition: what L levels do not serve is no number.
    beyond = lax.shift_right_logical(position, top) != 0
    o = jnp.where(jnp.broadcast_to(beyond, o.shape), jnp.nan, o)
    mosaic.store(refs.o.at[b, h, mine], o.astype(refs.o.dtype))
    if not lazy:  # where the position says it
        pl.when(beyond | (position + 1 < 0))(lambda: _fill(put, jnp.nan, L, (K, width)))


def _fetch(refs, head, mine, step, ahead):
    """Starts to load the lowest level of `ahead`, if there is one; the rest of them."""
    slot = lax.rem(step, STAGES)

    @pl.when(ahead > 0)
    def _():
        source = refs.levels.at[*head, lowest_bit(ahead) + 1, :, mine]
        fetch(dict(level=(source, refs.ring.at[slot])), refs.loaded.at[slot])

    return without_lowest_bit(ahead)


def _put(refs, head, mine, level, x):
    layout = mosaic.columns_by_warp(x.shape[1])
    mosaic.store(refs.new_levels.at[*head, level, :, mine], plgpu.layout_cast(x, layout))


def _clear(put, bits, ones, same, nothing, L):
    """Zeros for the levels without a bit, unless they are there by being the same memory."""

    def clear(level, carry):
        in_use = lax.bitwise_and(lax.shift_right_logical(2 * bits, level), 1) == 1
        pl.when(~(same | in_use | (level == ones + 1)))(lambda: put(level, nothing))
        return carry

    lax.fori_loop(0, L, clear, None)


def _fill(put, value, L, shape):
    def fill(level, carry):
        put(level, jnp.full(shape, value, f32))
        return carry

    lax.fori_loop(0, L, fill, None)


def _same_memory(source, target, layout):
    """Whether two refs of numbers are the same memory: whether a write to one shows in the other.

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
