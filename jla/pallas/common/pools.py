"""A step's kernel on a pool: which row of the pool a CTA has, and what becomes of the other rows.

Without slots a CTA has the row of the state that has the batch row's number.
"""

import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.mosaic import gpu as mgpu
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxlib.mlir import ir
from jaxlib.mlir.dialects import arith, llvm

from jla._core.interpreter import interpreting
from jla.pallas.common import mosaic


def on_row(slots, b, size, step, idle):
    """Calls `step(row)` with the row of the state that batch row b starts from; or `idle()`, if it
    has none.

    Args:
      slots: a ref, int32 [B], or None.
      size: the rows of the pool.
    """
    if slots is None:
        step(b)
        return
    row = slots[b]
    live = (row >= 0) & (row < size)
    pl.when(live)(lambda: step(row))
    pl.when(~live)(idle)


def row_of(slots, b, size):
    """The row of the state that batch row b starts from, and whether it has one: a scalar, or None
    where all have (without slots). Of those that have none it is a row that may be read.

    For kernels that wait for little else: there is no branch between the slot's load and those of
    the row, so that the rest of a token is loaded while the slot is on its way. `on_row` reads
    nothing for a row that has none.
    """
    if slots is None:
        return b, None
    row = slots[b]
    live = (row >= 0) & (row < size)
    return jnp.where(live, row, 0), live


def if_live(live, work):
    """Does the work of `row_of`'s rows that there are."""
    if live is None:
        work()
    else:
        pl.when(live)(work)


def or_zero(live, x):
    """x, or zeros of a batch row that has no row of the pool."""
    return x if live is None else mosaic.where(live, x)


def keep_rest(slots, b, source, target, *copies):
    """Copies the rows of a pool that no slot names, unless the new pool is in the same memory: then
    they are there already.

    Each batch row has its share of them. This is slow, and seldom: see `mosaic.kernel`.

    Args:
      slots: a ref, int32 [B], or None, for which nothing is done.
      source, target: refs of the pool and of the new one.
      copies: each copies a part of a row, `copy(source, target, row)`.
    """
    if slots is None:
        return
    (B,), R = slots.shape, source.shape[0]

    def named(row):
        def compare(i, found):
            return found | (slots[i] == row).astype(jnp.int32)

        return lax.fori_loop(0, B, compare, jnp.int32(0)) != 0

    def copy_rest():
        def one(i, carry):
            row = b + i * B

            @pl.when(~named(row))
            def _():
                for copy in copies:
                    copy(source, target, row)

            return carry

        lax.fori_loop(0, lax.div(R - b + (B - 1), B), one, None)

    unless_same_memory(source, target, copy_rest)


def tile(layout, *place):
    """Copies, for `keep_rest`, the tile at this place of a row, by way of registers."""

    def copy(source, target, row):
        at = row, *place
        x = mosaic.load(source.at[*at], layout, optimized=False)
        mosaic.store(target.at[*at], x.astype(target.dtype))

    return copy


def columns(layout, width, of, h):
    """The `tile`s of head h [rows, of], so many columns each."""
    return [tile(layout, h, slice(None), pl.ds(i, width)) for i in range(0, of, width)]


def unless_same_memory(source, target, work):
    """Does the work if two refs are not in the same memory."""
    if not interpreting():
        pl.when(~_same_memory(source, target))(work)


def _same_memory(source, target):
    """Whether two refs begin at the same address."""
    flag = plgpu.ShapeDtypeStruct((), jnp.int32, layout=plgpu.Layout.WG_SPLAT)

    @plgpu.inline_mgpu(arg_types=(plgpu.RefType(), plgpu.RefType()), return_type=flag)
    def compare(_, x, y):
        i32, i64 = (ir.IntegerType.get_signless(bits) for bits in (32, 64))
        addresses = (llvm.ptrtoint(i64, mgpu.utils.memref_ptr(ref)) for ref in (x, y))
        same = arith.extui(i32, arith.cmpi(arith.CmpIPredicate.eq, *addresses))
        return mgpu.FragmentedArray.splat(same, (), is_signed=True)

    return compare(source, target) == 1
