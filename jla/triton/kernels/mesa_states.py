"""MesaNet's two states from chunk to chunk, and their gradients in reverse."""

import triton
import triton.language as tl

from jla.triton.kernels.mesa_pieces import decays_to_end, load_square, load_tile, store_square
from jla.triton.kernels.pieces import chunks_of_piece, state_of_piece

# The most that an element of S, stored as float16, may be.
UNIT = tl.constexpr(32768.0)


@triton.jit
def states_kernel(
    left_ptr, x_ptr, y_ptr, g_ptr, weight_ptr, other_ptr, x_start_ptr, y_start_ptr, spans_ptr,
    T, H, N,
    x_states_ptr, scale_ptr, y_states_ptr, x_end_ptr, y_end_ptr,
    K: tl.constexpr, V: tl.constexpr, P: tl.constexpr, BK: tl.constexpr, BC: tl.constexpr,
    C: tl.constexpr, KEEP: tl.constexpr, REVERSE: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """A pair of states X [K, K], Y [K, V] from chunk to chunk, BC columns of one of them:

        X <- exp(G_end) X + (w l)^T x;   Y <- exp(G_end) Y + (w l)^T y

        forward:  X = Hkk, Y = Hkv, l = x = k, y = v, w_j = beta_j exp(G_end - G_j)
        REVERSE:  X = -dHkk^T, Y = dHkv, l the solutions, x those of the backward pass, y = do,
                  w = exp(G), times what l and x have been divided by

    Args:
      left, x, y: [B, T, H, K], [B, T, H, K], [B, T, H, V].
      weight, other: forward beta and the square of each token's largest element of k, [B, H, TP];
        in reverse what l and x have been divided by.
      x_start, y_start: the states before the first chunk, float32; in reverse after the last.
      P: with pieces, see `chunks_of_piece`, the first and last states are those of each, [B, H, P,
        ...].
      x_states, y_states: receive the states before each chunk (in reverse: after it), [B, H, N,
        K, K] and [B, H, N, K, V].
      KEEP: without it states start from zeros, and the last ones alone are written: a first pass.
      scale: forward it receives what x_states are divided by, [B, H, N]: powers of two for float16,
        and 1.

    At B=8 T=4096 H=16 K=V=128, bf16: 0.27 GB are read twice (from L2) and 0.54 GB written, 0.19 ms
    at 4.3 TB/s; 512 chains of 64 chunks, two at a time on a multiprocessor, 0.3 ms were expected.
    29 to 53 KB of shared memory (float32: 73), 250 registers, and 64 to 192 bytes spilled on
    sm_80, 89, 100 and 120. A first pass reads as much and writes nothing, 0.06 ms; 25 to 50 KB, 150
    to 255 registers, up to 32 bytes (float32: 96).
    """
    blocks: tl.constexpr = (K + BC - 1) // BC + (V + BC - 1) // BC
    block, bh = tl.program_id(0) % blocks, (tl.program_id(0) // blocks).to(tl.int64)
    if block * BC < K:
        _columns(
            block, bh, left_ptr, x_ptr, g_ptr, weight_ptr, other_ptr, x_start_ptr, spans_ptr,
            T, H, N, x_states_ptr, scale_ptr, x_end_ptr, K, K, P, BK, BC, C, True,
            KEEP, REVERSE, PRECISION,
        )  # fmt: skip
    else:
        _columns(
            block - (K + BC - 1) // BC, bh, left_ptr, y_ptr, g_ptr, weight_ptr, other_ptr,
            y_start_ptr, spans_ptr, T, H, N, y_states_ptr, scale_ptr, y_end_ptr, K, V, P, BK, BC, C,
            False, KEEP, REVERSE, PRECISION,
        )  # fmt: skip


@triton.jit
def _columns(
    block, bh, left_ptr, right_ptr, g_ptr, weight_ptr, other_ptr, start_ptr, spans_ptr, T, H, N,
    states_ptr, scale_ptr, end_ptr,
    K: tl.constexpr, D: tl.constexpr, P: tl.constexpr, BK: tl.constexpr, BC: tl.constexpr,
    C: tl.constexpr, OF_X: tl.constexpr, KEEP: tl.constexpr, REVERSE: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    token, row, column = tl.arange(0, C), tl.arange(0, BK), block * BC + tl.arange(0, BC)
    out = states_ptr.dtype.element_ty
    operand = left_ptr.dtype.element_ty
    if REVERSE:
        operand = out
    elif right_ptr.dtype.element_ty != operand:
        operand = tl.bfloat16  # of float16 keys and bfloat16 values
    begin, after, p = chunks_of_piece(spans_ptr, bh // H, N, P)
    number = state_of_piece(bh, p, P)
    state = tl.zeros((BK, BC), tl.float32)
    if KEEP:
        state = load_square(start_ptr, number, row, column, K, D)
    if KEEP and OF_X and not REVERSE:
        # No element of a positive definite matrix exceeds its largest on the diagonal. Of that this
        # is a bound: at most K times too large, which takes none of float16's digits.
        bound = tl.load(start_ptr + number * (K * K) + row * (K + 1), mask=row < K, other=0.0)
        bound = tl.max(bound, 0)
    for step in range(0, after - begin):
        n = begin + step
        if REVERSE:
            n = after - 1 - step
        first = (bh // H * T + n * C) * H + bh % H
        # Turned already in memory: so its copy to shared memory is asynchronous.
        at = left_ptr + first * K + ((token * H * K)[None, :] + row[:, None])
        real = (n * C + token < T)[None, :] & (row < K)[:, None]
        left = tl.load(at, mask=real, other=0.0).to(operand)
        right = load_tile(right_ptr, first, token, column, n, T, H, C, D).to(tl.float32)
        vector = (bh * N + n) * C
        g = tl.load(g_ptr + vector + token)
        weight = tl.load(weight_ptr + vector + token)
        if REVERSE:
            weight *= tl.exp(tl.cumsum(g, 0))
            if OF_X:
                weight *= tl.load(other_ptr + vector + token)
        else:
            weight *= decays_to_end(g_ptr + vector, C)
        decay = tl.exp(tl.sum(g, 0))

        if KEEP and OF_X and not REVERSE:
            scale = 1.0
            if out == tl.float16:
                exponent = tl.maximum(bound, 1e-30).to(tl.int32, bitcast=True) & 0x7F800000
                scale = exponent.to(tl.float32, bitcast=True) * (2.0 / UNIT)
            store_square(states_ptr, state * (1.0 / scale), bh * N + n, row, column, K, D)
            if block == 0:
                tl.store(scale_ptr + bh * N + n, scale)
            largest = tl.load(other_ptr + vector + token)
            bound = bound * decay + tl.sum(weight * largest, 0)
        elif KEEP:
            store_square(states_ptr, state, bh * N + n, row, column, K, D)
        weighted = (right * weight[:, None]).to(operand)
        state = tl.dot(left, weighted, acc=state * decay, input_precision=PRECISION)
    store_square(end_ptr, state, number, row, column, K, D)
