"""What MesaNet's tokens read with their solutions, and its gradient."""

import triton
import triton.language as tl

from jla.triton.kernels.mesa_pieces import load_square, load_tile, pair_decays, place, store_tile


@triton.jit
def read_kernel(
    x_ptr, x_scale_ptr, k_ptr, v_ptr, g_ptr, beta_ptr, s_ptr, T, H, N,
    o_ptr,
    D: tl.constexpr, E: tl.constexpr, BC: tl.constexpr, BI: tl.constexpr, C: tl.constexpr,
    TURNED: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """BC columns of o_t = exp(G_t) x_t S + sum_j M[t, j] (x_t . k_j) v_j, for a chunk.

    Forward x are the solutions and S = Hkv. TURNED, for the backward pass, x are the gradients do,
    k the values, v the keys, and S = Hkv^T.

    Args:
      x, k: [B, T, H, D], of one dtype. v, o: [B, T, H, E]. g, beta: [B, H, TP].
      x_scale: what x has been divided by, [B, H, TP]; TURNED it is not read.
      s: [B, H, N, D, E] (TURNED: E, D); its dtype is that of the operands of its product.

    At B=8 T=4096 H=16 K=V=128 in bf16: 0.8 GB, 0.19 ms at 4.3 TB/s. 32 to 64 KB of shared memory
    and 136 to 255 registers, nothing spilled (float32: up to 120 bytes).
    """
    block, n, _, number, first = place(T, H, N, (E + BC - 1) // BC, C)
    operand = s_ptr.dtype.element_ty
    token, column, part = tl.arange(0, C), block * BC + tl.arange(0, BC), tl.arange(0, BI)
    scores = tl.zeros((C, C), tl.float32)
    o = tl.zeros((C, BC), tl.float32)
    for i in range(0, D, BI):
        x = load_tile(x_ptr, first, token, i + part, n, T, H, C, D)
        k = load_tile(k_ptr, first, token, i + part, n, T, H, C, D)
        if TURNED:
            s = tl.trans(load_square(s_ptr, number, column, i + part, E, D))
        else:
            s = load_square(s_ptr, number, i + part, column, D, E)
        scores = tl.dot(x, tl.trans(k), acc=scores, input_precision=PRECISION)
        o = tl.dot(x.to(operand), s, acc=o, input_precision=PRECISION)
    g = tl.load(g_ptr + number * C + token)
    beta = tl.load(beta_ptr + number * C + token)
    scores *= pair_decays(g, C) * beta[None, :]
    o *= tl.exp(tl.cumsum(g, 0))[:, None]
    v = load_tile(v_ptr, first, token, column, n, T, H, C, E)
    if TURNED:  # v are keys, and gradients may be too small for their float16
        v = v.to(operand)
    o = tl.dot(scores.to(v.dtype), v, acc=o, input_precision=PRECISION)
    if not TURNED:
        o *= tl.load(x_scale_ptr + number * C + token)[:, None]
    store_tile(o_ptr, o, first, token, column, n, T, H, C, E)
