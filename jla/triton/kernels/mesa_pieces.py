"""What MesaNet's Triton kernels share: tiles of tokens and of states, and the decays of a chunk.

Vectors are [B, H, TP] float32, TP being T in whole chunks: log decays and betas of tokens that do
not exist are zeros. A log decay of -inf begins a segment.
"""

import triton
import triton.language as tl

from jla.triton.kernels.pieces import load_matrix, matrix_tile, real_columns


@triton.jit
def place(T, H, N, blocks: tl.constexpr, C: tl.constexpr):
    """A program's block, of so many of a chunk, and the numbers of its chunk: in its row; of its
    row and head together; of all chunks; and of its first token in arrays [B, T, H, D] (times D).
    """
    program = tl.program_id(0)
    number = (program // blocks).to(tl.int64)
    n, bh = number % N, number // N
    return program % blocks, n, bh, number, (bh // H * T + n * C) * H + bh % H


@triton.jit
def load_tile(ptr, first, token, d, n, T, H, C: tl.constexpr, D: tl.constexpr):
    """Columns d of these tokens of a chunk in an array [B, T, H, D]; zeros where there are none."""
    ptr += first * D
    real = real_columns((n * C + token < T)[:, None], d, D)
    return tl.load(ptr + (token * H * D)[:, None] + d[None, :], mask=real, other=0.0)


@triton.jit
def store_tile(ptr, x, first, token, d, n, T, H, C: tl.constexpr, D: tl.constexpr):
    """Stores what `load_tile` loads."""
    ptr += first * D
    real = real_columns((n * C + token < T)[:, None], d, D)
    tl.store(ptr + (token * H * D)[:, None] + d[None, :], x.to(ptr.dtype.element_ty), mask=real)


@triton.jit
def load_square(ptr, number, row, column, D: tl.constexpr, E: tl.constexpr):
    """Rows and columns of one of many matrices [D, E]; zeros where there are none."""
    return load_matrix(ptr + number * (D * E), row, column, D, E)


@triton.jit
def store_square(ptr, x, number, row, column, D: tl.constexpr, E: tl.constexpr):
    """Stores what `load_square` loads."""
    pointers, real = matrix_tile(ptr + number * (D * E), row, column, D, E)
    x = x.to(ptr.dtype.element_ty)
    if (D // row.shape[0] * row.shape[0] != D) | (E // column.shape[0] * column.shape[0] != E):
        tl.store(pointers, x, mask=real)
    else:
        tl.store(pointers, x)


@triton.jit
def pair_decays(g, C: tl.constexpr):
    """The decay from token j to token t, [t, j], zero where j > t.

    Each is the exponential of a sum of its own log decays: a difference of two longer sums would
    keep no digit beside a strong one, and none at all beside -inf.
    """
    t, j = tl.arange(0, C)[:, None], tl.arange(0, C)[None, :]
    sums = tl.cumsum(tl.where(t > j, g[:, None], 0.0), 0)
    return tl.where(t >= j, tl.exp(tl.where(t >= j, sums, 0.0)), 0.0)


@triton.jit
def pair_decays_turned(g, C: tl.constexpr):
    """The transpose of `pair_decays`, [j, t]."""
    t, j = tl.arange(0, C)[None, :], tl.arange(0, C)[:, None]
    sums = tl.cumsum(tl.where(t > j, g[None, :], 0.0), 1)
    return tl.where(t >= j, tl.exp(tl.where(t >= j, sums, 0.0)), 0.0)


@triton.jit
def decays_to_end(g_ptr, C: tl.constexpr):
    """The decay from each token of the chunk at `g_ptr` to the chunk's end."""
    token = tl.arange(0, C)
    g = tl.load(g_ptr + token + 1, mask=token + 1 < C, other=0.0)
    return tl.exp(tl.cumsum(g, 0, reverse=True))


@triton.jit
def rows_of(x, block, C: tl.constexpr, ROWS: tl.constexpr):
    """ROWS rows of a [C, C]: those of the block of this number."""
    if ROWS == C:
        return x
    else:
        blocks = tl.reshape(x, (C // ROWS, ROWS, C))
        mine = tl.arange(0, C // ROWS)[:, None, None] == block
        return tl.sum(tl.where(mine, blocks, 0.0), 0)
