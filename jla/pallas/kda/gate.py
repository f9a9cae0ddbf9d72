"""KDA's gate, which makes log decays of a projection, and its gradients, each in one kernel.

With f the raw projection, `jla.kda_gate` makes the log decays; the kernels of KDA take them in base
2, in float16 (`chunks.decay_operand`). Both forms are then

    log decay = F phi(z),  z = a f + b;    phi(z) = log2(1 + 2^z)  or, with a bound,  1 / (1 + 2^-z)

with a, b, F of each head and feature. 2^-|z| is made by the slow unit, and of it a polynomial makes
the logarithm, with all its digits where z is very negative.

A CTA has 128 columns of the [T, HV K] matrix of a batch row, and walks along several tiles of them,
with a ring of SLOTS tiles in SMEM. A thread has the same four columns in all rows, so that their
factors, and the sums that are gradients of these, stay in registers.

Floor at B=16 T=4096 HV=8 K=128, f in bfloat16: f and the result 268 MB, 0.062 ms at 4.3 TB/s; the
gradients 0.125 ms. 56 and 71 registers (56 and 109 with a bound).
"""

import functools
import math

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from jla._core.segments import segment_starts
from jla._core.shardwise import shardwise
from jla.pallas.common import mosaic, scratch
from jla.pallas.common.chunks import CHUNK, LOG2E, STRONGEST
from jla.pallas.common.mosaic import f16, f32, per_column, per_row
from jla.pallas.common.scratch import barrier_for, fetch_each

SDS = jax.ShapeDtypeStruct
LN2 = math.log(2)
ROWS, SLOTS = 32, 3  # of a tile; tiles of an array in SMEM
STEPS = 8  # tiles of a CTA, each of which writes two rows of float32 sums in the backward pass
# Rows that a warpgroup has at once: to load eight, Mosaic would swizzle the tile.
GROUP = 4
AT_ONCE = 4  # groups that are worked on side by side
# log2(1 + e) / e for 0 <= e <= 1, to a relative 8.5e-6.
LOG2_1P = (1.44268286, -0.720426142, 0.469173998, -0.303036034, 0.146032706, -0.0344358385)

_F, _COEFFICIENTS, _BORDERS = "B T H K", "B C H K", "B TP"


def unsupported(f):
    """Why the kernels cannot make the gates of this projection, or None: then the formula does."""
    if f.dtype not in (jnp.bfloat16, f16):
        return f"f is {f.dtype}, and the kernels take bfloat16 and float16"
    if f.shape[-1] % 64:
        return f"f has {f.shape[-1]} features, and the kernels take multiples of 64"
    if f.shape[1] == 1:
        return "there is one token, whose decays XLA makes together with what stands around them"
    return None


def coefficients(A_log, dt_bias, lower_bound):
    """a, b and F for each head and feature, [3, HV, K] float32."""
    rate = jnp.broadcast_to(jnp.exp(A_log)[:, None], dt_bias.shape)
    if lower_bound is None:
        return jnp.stack([jnp.full_like(rate, LOG2E), LOG2E * dt_bias, -rate])
    a = LOG2E * rate
    return jnp.stack([a, a * dt_bias, jnp.full_like(rate, LOG2E * lower_bound)])


def borders(segment_ids, B, T):
    """[B, TP] float32, TP whole chunks: -inf at the tokens whose f does not matter, and else 0.

    They are those that begin a segment, whose log decays are -inf, and those behind the last. None
    if there are none.
    """
    behind = -T % CHUNK
    if segment_ids is None:
        if not behind:
            return None
        starts = jnp.zeros((B, T), bool)
    else:
        starts = segment_starts(segment_ids)
    starts = jnp.pad(starts, ((0, 0), (0, behind)), constant_values=True)
    return jnp.where(starts, -jnp.inf, 0.0).astype(f32)


def decay_operand(f, coefficients, borders, *, bounded):
    """The log decays as `chunks.decay_operand` returns them.

    Args:
      f: [B, T, HV, K], 16 bits, K a multiple of 64. coefficients: [B, 3, HV, K] float32.
      borders: from the function of this name. bounded: the form.

    Returns:
      [B, T, HV, K] float16.
    """
    run = functools.partial(_decay_operand, bounded=bounded)
    arrays, axes = _with_borders((f, coefficients), (_F, _COEFFICIENTS), borders)
    return shardwise(run, axes, (_F,))(*arrays)[0]


def gradients(f, coefficients, borders, dg, *, bounded):
    """The gradients of f and the coefficients; dg [B, TP, HV, K] float32, that of
    natural-log decays.

    Of the coefficients' gradients the one of that which is a constant in this form is zero.
    """
    run = functools.partial(_gradients, bounded=bounded)
    inputs = (f, coefficients, dg), (_F, _COEFFICIENTS, "B TP H K")
    arrays, axes = _with_borders(*inputs, borders)
    return shardwise(run, axes, (_F, _COEFFICIENTS))(*arrays)


def _with_borders(arrays, axes, borders):
    return (arrays, axes) if borders is None else ((*arrays, borders), (*axes, _BORDERS))


def decays(f, coefficients, *border, bounded):
    """Elements of the decay operand; of f and the coefficients float32, or vectors to go with it.

    border: a number to be added to the log decay, or none.
    """
    a, b, factor = coefficients
    z = a * f + b
    value = factor * (_sigmoid(z) if bounded else _softplus(z)[0])
    for x in border:
        value = value + x
    return jnp.maximum(value.astype(f16), STRONGEST)


def _decay_operand(f, coefficients, *borders, bounded):
    def gate(coefficients, f, *border, sums):
        return decays(f, coefficients, *border, bounded=bounded), sums

    return _elementwise(gate, (f, *borders), coefficients, f16)


def _gradients(f, coefficients, dg, *borders, bounded):
    """With s the sigmoid 1 / (1 + 2^-z), u = dg s, and with a bound u = dg s (1 - s):

    df = c u,  c = a F ln 2 or, with a bound, a F (ln 2)^2
    db = c / a sum(u);   dF = ln 2 sum(dg phi)   or, with a bound,   da = c / a sum(u f)
    """
    scale = LN2 * LN2 if bounded else LN2

    def gradients(coefficients, f, dg, *border, sums):
        a, b, factor = coefficients
        for x in border:
            dg = jnp.where(x < 0.0, 0.0, dg)
        z = a * f + b
        if bounded:
            s = _sigmoid(z)
            u = dg * (s * (1.0 - s))
            other = u * f
        else:
            value, s = _softplus(z)
            u = dg * s
            other = dg * value
        return (a * factor * scale) * u, [sums[0] + u, sums[1] + other]

    df, sums = _elementwise(gradients, (f, dg, *borders), coefficients, f.dtype, 2)
    by_z, other = scale * coefficients[:, 2] * sums[:, 0], sums[:, 1]
    zero = jnp.zeros_like(by_z)
    if bounded:
        by_coefficient = scale * coefficients[:, 2] * other, by_z, zero
    else:
        by_coefficient = zero, by_z, scale * other
    return df, jnp.stack(by_coefficient, axis=1)


def _elementwise(function, arrays, coefficients, dtype, sums=0):
    """A function of all elements of several arrays, and its sums over tokens.

    Args:
      function: takes the three coefficients, an element of each array, and `sums`, a list; returns
        an element of the result and the sums with its shares.
      arrays: the first is [B, T, HV, K], others are [B, TP, HV, K] or [B, TP], TP at least T.
      coefficients: [B, 3, HV, K] float32. dtype: the result's. sums: how many there are.

    Returns:
      The result, [B, T, HV, K], and if there are any the sums, [B, sums, HV, K] float32: of the
      shares that each CTA writes, added up by XLA: no atomics, the same bits every time.
    """
    B, T, *heads = arrays[0].shape
    size = math.prod(heads)
    width = 128 if size % 128 == 0 else 64
    blocks = pl.cdiv(pl.cdiv(T, ROWS), STEPS)

    def flat(x):
        return x.reshape(*x.shape[:2], -1) if x.ndim > 2 else x

    def ring(x):
        return plgpu.SMEM((SLOTS, ROWS, *([width] if x.ndim > 2 else [])), x.dtype)

    # The result takes the place of the first array's elements if their dtypes agree.
    own = None if dtype == arrays[0].dtype else plgpu.SMEM((SLOTS, ROWS, width), dtype)
    out = scratch.kernel(
        functools.partial(_walk_along, function, width=width, number_of_sums=sums),
        inputs=dict(arrays=list(map(flat, arrays)), coefficients=flat(coefficients)),
        outputs=dict(
            out=SDS((B, T, size), dtype),
            shares=SDS((B, blocks, sums, size), f32) if sums else None,
        ),
        scratch=dict(
            rings=list(map(ring, arrays)),
            own=own,
            loaded=barrier_for(dict(arrays=len(arrays)), SLOTS),
        ),
        automatic_barriers=False,
        reductions_cross_warps=bool(sums),
        grid=(B, blocks, size // width),
        grid_names=("b", "n", "c"),
    )
    result = out.out.reshape(B, T, *heads)
    return (result, out.shares.sum(axis=1).reshape(B, sums, *heads)) if sums else (result,)


def _walk_along(function, refs, *, width, number_of_sums):
    """The body of `_elementwise`: a CTA's `width` columns, tile by tile."""
    T = refs.out.shape[1]
    layout = mosaic.rows_by_warp(width, vector=width // 32)
    made = refs.rings[0] if refs.own is None else refs.own
    b, n = lax.axis_index("b"), lax.axis_index("n")
    columns = pl.ds(lax.axis_index("c") * width, width)
    first = n * STEPS
    factors = (
        mosaic.load(refs.coefficients.at[b, i, columns], layout.reduce(0), optimized=False)
        for i in range(3)
    )
    factors = [per_column(x, GROUP) for x in factors]

    def load(i, slot):
        rows = pl.ds((first + i) * ROWS, ROWS)
        fetch_each(
            (
                (ref.at[(b, rows, columns)[: len(ref.shape)]], tile.at[slot])
                for ref, tile in zip(refs.arrays, refs.rings, strict=True)
            ),
            refs.loaded.at[slot],
        )

    def step(_, slot, sums):
        for start in range(0, ROWS, GROUP * AT_ONCE):
            groups = [pl.ds(start + i * GROUP, GROUP) for i in range(AT_ONCE)]
            operands = [[read(tile, slot, rows) for tile in refs.rings] for rows in groups]
            for rows, values in zip(groups, operands, strict=True):
                value, sums = function(factors, *values, sums=sums)
                # The thread that writes here was the last to read here.
                mosaic.store(made.at[slot, rows], value.astype(made.dtype))
        return sums

    def read(tile, slot, rows):
        if len(tile.shape) > 2:
            return mosaic.load(tile.at[slot, rows], layout, optimized=False)
        vector = mosaic.load(tile.at[slot, rows], layout.reduce(1), optimized=False)
        return per_row(vector, width)

    def store(i, slot):
        start = (first + i) * ROWS

        def copy(row, rows):
            plgpu.copy_smem_to_gmem(
                made.at[slot, pl.ds(row, rows)],
                refs.out.at[b, pl.ds(start + row, rows), columns],
            )

        mosaic.cut_off(copy, ROWS, T - start)

    zeros = plgpu.layout_cast(jnp.zeros((GROUP, width), f32), layout)
    count = jnp.minimum(STEPS, pl.cdiv(T, ROWS) - first)
    sums = [zeros] * number_of_sums
    totals = mosaic.walk(step, sums, count, load, store, refs.loaded, SLOTS)
    for i, total in enumerate(totals):
        mosaic.store(refs.shares.at[b, n, i, columns], total.sum(axis=0))


def _softplus(z):
    """log2(1 + 2^z) and its slope, the sigmoid 1 / (1 + 2^-z)."""
    e = jnp.exp2(0.0 - jnp.abs(z))  # a negation would be an operation of its own
    series = functools.reduce(lambda p, c: p * e + c, reversed(LOG2_1P))
    root = lax.rsqrt(1.0 + e)  # of a reciprocal: one operation, where a division takes eight
    return jnp.maximum(z, 0.0) + e * series, jnp.where(z < 0.0, e, 1.0) * (root * root)


def _sigmoid(z):
    root = lax.rsqrt(1.0 + jnp.exp2(-z))
    return root * root
