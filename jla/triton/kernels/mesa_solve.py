"""MesaNet's solves: conjugate gradients for all tokens of a chunk.

lamb is one here: right-hand sides, keys and states come divided by sqrt(lamb). With S the state
before the chunk and M[t, j] = beta_j exp(g_{j+1} + ... + g_t) for j <= t,

    A_t x = P_t S x + sum_j M[t, j] k_j (k_j . x) + x,    P_t = exp(g_1 + ... + g_t)

Rows are independent: a row's direction is scaled by its own norm, and its own residual stops it.
"""

import triton
import triton.language as tl

from jla.triton.kernels.mesa_pieces import (
    load_square,
    load_tile,
    pair_decays,
    place,
    rows_of,
    store_tile,
)

SMALLEST = tl.constexpr(1e-30)
AT_ONCE = tl.constexpr(2)  # iterations between two looks at whether all rows have stopped


@triton.jit
def solve_kernel(
    b_ptr, scale_ptr, k_ptr, g_ptr, beta_ptr, s_ptr, s_scale_ptr, T, H, N, steps,
    x_ptr, x_scale_ptr, work_ptr,
    K: tl.constexpr, BK: tl.constexpr, C: tl.constexpr, ROWS: tl.constexpr, BI: tl.constexpr,
    WHOLE: tl.constexpr, SCALED: tl.constexpr, TOLERANCE: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """x_t = A_t^-1 b_t for ROWS tokens of a chunk.

    Args:
      b: right-hand sides, [B, T, H, K]; with SCALED they are multiplied by `scale`, [B, H, K].
      k: keys, [B, T, H, K], of the dtype of the products' operands. g, beta: [B, H, TP].
      s: S, [B, H, N, K, K], divided by s_scale, [B, H, N].
      x, x_scale: receive the solutions, [B, T, H, K], divided by x_scale, [B, H, TP]: of float16
        the largest magnitude of each is 1. Of float32 x_scale is 1.
      steps: the most iterations. TOLERANCE: of a row's residual, in units of its right-hand side.
      work: with WHOLE nothing; else room for directions and scores, [B, H, N, C, BK + C].
      WHOLE: S and the keys stay in shared memory. Else they are read again in each iteration, BI
        rows at a time, and what they are multiplied by goes through `work`.

    At B=8 T=4096 H=16 K=128 in 16 bits: an iteration is 4.2 MFLOP a chunk, 30 are 1.03 TFLOP, 1.3
    ms at 780 TFLOP/s; memory, 0.7 GB, is little beside it. 32 rows because 64 do not fit into
    registers (530 bytes spilled, as wgmma too), so that it is mma.sync everywhere: 1.7 ms at what
    that reaches on an H200. Shared memory is read 224 KB a chunk and iteration, 2.2 ms. With two
    programs on a multiprocessor, between whose products lie five barriers, 4 to 6 ms were expected.
    At K=128: 72 KB of shared memory; 250 registers with 4 warps (sm_80, 90, 100), 188 to 202 with
    8 (sm_89, 120), nothing spilled. Without WHOLE 16 to 22 KB, 200 to 255 registers.
    """
    block, n, bh, number, first = place(T, H, N, C // ROWS, C)
    operand = k_ptr.dtype.element_ty
    token, row, d = tl.arange(0, C), block * ROWS + tl.arange(0, ROWS), tl.arange(0, BK)
    if WHOLE:
        s = load_square(s_ptr, number, d, d, K, K)
        k = load_tile(k_ptr, first, token, d, n, T, H, C, K)
    g = tl.load(g_ptr + number * C + token)
    beta = tl.load(beta_ptr + number * C + token)
    m = rows_of(pair_decays(g, C) * beta[None, :], block, C, ROWS).to(operand)
    # P_t S: sums up to t, as those of the pairs.
    past = tl.sum(tl.where(token[None, :] <= row[:, None], g[None, :], 0.0), 1)
    factor = tl.exp(past) * tl.load(s_scale_ptr + number)

    b = load_tile(b_ptr, first, row, d, n, T, H, C, K).to(tl.float32)
    if SCALED:
        b *= tl.load(scale_ptr + bh * K + d, mask=d < K, other=0.0)[None, :]
    # Rows are divided by their largest magnitude: squares of small numbers would vanish.
    largest = tl.maximum(tl.max(tl.abs(b), 1), SMALLEST)
    b *= (1.0 / largest)[:, None]

    # The direction of row t is norm_t p_t. It is rounded, and the rounded one is the direction: so
    # rounding costs a little conjugacy, and no consistency of residual and solution.
    size = tl.sum(b * b, 1)
    stop = size * (TOLERANCE * TOLERANCE)
    norm = tl.sqrt(size)
    r = b
    x = b - b  # zeros; NaN where b is, whose row stops at once
    p = (b * (1.0 / tl.maximum(norm, SMALLEST))[:, None]).to(operand)
    live = tl.where(size > stop, 1.0, 0.0)
    going = tl.max(live, 0)
    step = 0
    while (step < steps) & (going > 0.0):
        count = tl.minimum(AT_ONCE, steps - step)
        for _ in range(0, count):
            p32 = p.to(tl.float32)
            if WHOLE:
                scores = tl.dot(p, tl.trans(k), input_precision=PRECISION).to(operand) * m
                y = tl.dot(p, s, input_precision=PRECISION) * factor[:, None] + p32
                y = tl.dot(scores, k, acc=y, input_precision=PRECISION)
            else:
                y = _times(
                    p, m, factor, k_ptr, s_ptr, work_ptr, number, first, row, n, T, H,
                    K, BK, C, ROWS, BI, PRECISION,
                )  # fmt: skip
            x, r, p, norm, live = _moved(x, r, p32, y, norm, live, stop, operand)
        step += count
        going = tl.max(live, 0)
    _store(x_ptr, x_scale_ptr, x, largest, number, first, row, d, n, T, H, C, K, operand)


@triton.jit
def _moved(x, r, p, y, norm, live, stop, OPERAND: tl.constexpr):
    """An iteration's solutions, residuals, directions, norms and rows that go on, y being A p."""
    curvature = tl.sum(p * y, 1)
    definite = curvature > 0.0
    alpha = live * norm / tl.where(definite, curvature, 1.0)
    alpha = tl.where(definite, alpha, 0.0)
    x += alpha[:, None] * p
    r -= alpha[:, None] * y
    size = tl.sum(r * r, 1)
    new = tl.sqrt(size)
    live = tl.where(size > stop, live, 0.0)
    # A row that has stopped does not change, and its direction stays finite.
    old = tl.where(live > 0.0, new / tl.maximum(norm, SMALLEST), 0.0)
    p = (r * (1.0 / tl.maximum(new, SMALLEST))[:, None] + p * old[:, None]).to(OPERAND)
    return x, r, p, new, live


@triton.jit
def _store(
    x_ptr, x_scale_ptr, x, largest, number, first, row, d, n, T, H,
    C: tl.constexpr, K: tl.constexpr, OPERAND: tl.constexpr,
):  # fmt: skip
    """Stores the solutions, whose right-hand sides were divided by `largest`."""
    if OPERAND == tl.float16:
        size = tl.maximum(tl.max(tl.abs(x), 1), SMALLEST)
        x *= (1.0 / size)[:, None]
        tl.store(x_scale_ptr + number * C + row, size * largest)
    else:
        x *= largest[:, None]
        tl.store(x_scale_ptr + number * C + row, largest - largest + 1.0)
    store_tile(x_ptr, x, first, row, d, n, T, H, C, K)


@triton.jit
def _times(
    p, m, factor, k_ptr, s_ptr, work_ptr, number, first, row, n, T, H,
    K: tl.constexpr, BK: tl.constexpr, C: tl.constexpr, ROWS: tl.constexpr, BI: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """A_t p_t for all rows t, with S and keys from memory."""
    token, d = tl.arange(0, C), tl.arange(0, BK)
    part = tl.arange(0, BI)
    work_ptr += (number * C + row)[:, None] * (BK + C)
    tl.debug_barrier()  # all have read what was there
    tl.store(work_ptr + d[None, :], p)
    tl.debug_barrier()
    y = tl.zeros((ROWS, BK), tl.float32)
    scores = tl.zeros((ROWS, C), tl.float32)
    for i in range(0, K, BI):
        direction = tl.load(work_ptr + i + part[None, :])
        s = load_square(s_ptr, number, i + part, d, K, K)
        k = load_tile(k_ptr, first, token, i + part, n, T, H, C, K)
        y = tl.dot(direction, s, acc=y, input_precision=PRECISION)
        scores = tl.dot(direction, tl.trans(k), acc=scores, input_precision=PRECISION)
    y = y * factor[:, None] + p.to(tl.float32)
    tl.store(work_ptr + BK + token[None, :], scores.to(p.dtype) * m)
    tl.debug_barrier()
    for j in range(0, C, BI):
        score = tl.load(work_ptr + BK + j + part[None, :])
        k = load_tile(k_ptr, first, j + part, d, n, T, H, C, K)
        y = tl.dot(score, k, acc=y, input_precision=PRECISION)
    return y
