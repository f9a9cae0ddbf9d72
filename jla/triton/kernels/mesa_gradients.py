"""The gradients of a chunk's keys, values, decays and betas, once all of MesaNet's solves are
known."""

import triton
import triton.language as tl

from jla.triton.kernels.mesa_pieces import (
    decays_to_end,
    load_square,
    load_tile,
    pair_decays_turned,
    place,
    store_tile,
)


@triton.jit
def gradients_kernel(
    k_ptr, v_ptr, do_ptr, x_ptr, x_scale_ptr, y_ptr, y_scale_ptr, g_ptr, beta_ptr, scale_ptr,
    kk_ptr, kk_scale_ptr, kv_ptr, dkk_ptr, dkv_ptr, T, H, N,
    dk_ptr, dv_ptr, direct_ptr, written_ptr, reads_ptr, read_ptr, through_ptr, border_ptr,
    products_ptr,
    K: tl.constexpr, V: tl.constexpr, BC: tl.constexpr, BI: tl.constexpr, C: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """BC columns of a chunk's dk or dv. With x, y the solutions of both passes, the loss sees A_t
    as -y_t A_t x_t; so with D[t, j] = exp(G_t - G_j) for j <= t, M = D beta, all sums over t,

        1.  a = x k^T;   u = do v^T;   c = y k^T;   dM = a (u - c)
            dv_j = sum M a do_t;   dk_j = sum M (u - c) x_t - sum M a y_t;   dbeta_j = sum D dM
        2.  and with w_j = beta_j exp(G_end - G_j), what is written to the states:
            dv_j += w_j dHkv^T k_j;   dk_j += w_j (dHkk k_j + dHkk^T k_j + dHkv v_j)
            dbeta_j += exp(G_end - G_j) (k_j dHkk k_j + k_j dHkv v_j)
        3.  of the log decays: exp(G_t) (x_t Hkv do_t - y_t Hkk x_t), through the states' decay, and
            the border, <dHkk, Hkk> + <dHkv, Hkv>

    Args:
      x_scale, y_scale: what x and y have been divided by, [B, H, TP]. scale: lamb^-1/2, [B, H, K],
        by which dk is multiplied.
      kk, kk_scale, kv: the states before the chunks. dkk, dkv: -dHkk^T and dHkv after them; their
        dtype is that of the operands of products with gradients.
      direct, reads, read: receive the part of dbeta in 1., and the sums of M dM over j < t, by t
        and by j, [B, H, TP]. The others receive parts, one for each block of columns: written, of
        dbeta in 2., [B, H, blocks of K, TP]; through [B, H, blocks of K and V, TP]; border [B, H,
        N, blocks of K and V]; products: sums of y x over the chunk, [B, H, N, K].

    At B=8 T=4096 H=16 K=V=128 in bf16: 2.0 GB, 0.47 ms at 4.3 TB/s; operands are read two or three
    times, from L2: 0.8 ms were expected. 32 to 60 KB of shared memory, 255 registers, 32 to 152
    bytes spilled (sm_100: none).
    """
    k_blocks: tl.constexpr = (K + BC - 1) // BC
    blocks: tl.constexpr = k_blocks + (V + BC - 1) // BC
    block, n, bh, number, first = place(T, H, N, blocks, C)
    if block * BC < K:
        _of_keys(
            block, n, bh, number, first, k_ptr, v_ptr, do_ptr, x_ptr, x_scale_ptr, y_ptr,
            y_scale_ptr, g_ptr, beta_ptr, scale_ptr, kk_ptr, kk_scale_ptr, dkk_ptr, dkv_ptr,
            T, H, N, dk_ptr, direct_ptr, written_ptr, reads_ptr, read_ptr, through_ptr, border_ptr,
            products_ptr, K, V, BC, BI, C, PRECISION,
        )  # fmt: skip
    else:
        _of_values(
            block - k_blocks, n, bh, number, first, k_ptr, do_ptr, x_ptr, x_scale_ptr, g_ptr,
            beta_ptr, kv_ptr, dkv_ptr, T, H, N, dv_ptr, through_ptr, border_ptr,
            K, V, BC, BI, C, PRECISION,
        )  # fmt: skip


@triton.jit
def _of_keys(
    block, n, bh, number, first, k_ptr, v_ptr, do_ptr, x_ptr, x_scale_ptr, y_ptr, y_scale_ptr,
    g_ptr, beta_ptr, scale_ptr, kk_ptr, kk_scale_ptr, dkk_ptr, dkv_ptr, T, H, N, dk_ptr,
    direct_ptr, written_ptr, reads_ptr, read_ptr, through_ptr, border_ptr, products_ptr,
    K: tl.constexpr, V: tl.constexpr, BC: tl.constexpr, BI: tl.constexpr, C: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    operand = dkk_ptr.dtype.element_ty
    token, column, part = tl.arange(0, C), block * BC + tl.arange(0, BC), tl.arange(0, BI)
    k_blocks: tl.constexpr = (K + BC - 1) // BC
    blocks: tl.constexpr = k_blocks + (V + BC - 1) // BC
    g = tl.load(g_ptr + number * C + token)
    beta = tl.load(beta_ptr + number * C + token)
    x_scale = tl.load(x_scale_ptr + number * C + token)
    y_scale = tl.load(y_scale_ptr + number * C + token)

    # 3. with x Hkk, and what is written: k (dHkk + dHkk^T), up to its sign.
    read = tl.zeros((C, BC), tl.float32)
    dk = tl.zeros((C, BC), tl.float32)
    border = tl.zeros((BI, BC), tl.float32)
    for i in range(0, K, BI):
        x = load_tile(x_ptr, first, token, i + part, n, T, H, C, K)
        k = load_tile(k_ptr, first, token, i + part, n, T, H, C, K).to(operand)
        kk = load_square(kk_ptr, number, i + part, column, K, K)
        dkk = load_square(dkk_ptr, number, i + part, column, K, K)
        border += kk.to(tl.float32) * dkk.to(tl.float32)
        read = tl.dot(x, kk, acc=read, input_precision=PRECISION)
        dk = tl.dot(k, dkk, acc=dk, input_precision=PRECISION)
        turned = load_square(dkk_ptr, number, column, i + part, K, K)
        dk = tl.dot(k, tl.trans(turned), acc=dk, input_precision=PRECISION)
    kk_scale = tl.load(kk_scale_ptr + number)
    tl.store(border_ptr + number * blocks + block, -kk_scale * tl.sum(tl.sum(border, 1), 0))
    my_x = load_tile(x_ptr, first, token, column, n, T, H, C, K).to(tl.float32)
    my_y = load_tile(y_ptr, first, token, column, n, T, H, C, K).to(tl.float32)
    my_k = load_tile(k_ptr, first, token, column, n, T, H, C, K).to(tl.float32)
    scales = x_scale * y_scale
    products = tl.sum(my_x * my_y * scales[:, None], 0)
    tl.store(products_ptr + number * K + column, products, mask=column < K)
    through = -kk_scale * tl.exp(tl.cumsum(g, 0)) * scales * tl.sum(read * my_y, 1)
    vector = (bh * blocks + block) * (N * C) + n * C + token
    tl.store(through_ptr + vector, through)
    later = decays_to_end(g_ptr + number * C, C)
    written = 0.5 * tl.sum(dk * my_k, 1)
    dk = -dk
    for i in range(0, V, BI):
        v = load_tile(v_ptr, first, token, i + part, n, T, H, C, V).to(operand)
        dkv = load_square(dkv_ptr, number, column, i + part, K, V)
        dk = tl.dot(v, tl.trans(dkv), acc=dk, input_precision=PRECISION)
    written = later * (written + tl.sum(dk * my_k, 1))
    vector = (bh * k_blocks + block) * (N * C) + n * C + token
    tl.store(written_ptr + vector, written)
    dk *= (later * beta)[:, None]

    # 1. Pairs are transposed, [j, t].
    a, change = _pairs(
        k_ptr, v_ptr, do_ptr, x_ptr, x_scale, y_ptr, y_scale, first, n, T, H, K, V, BI, C, PRECISION
    )  # fmt: skip
    decay = pair_decays_turned(g, C)
    change *= decay
    if block == 0:
        pairs = a * change
        tl.store(direct_ptr + number * C + token, tl.sum(pairs, 1))
        # A token decays nothing of its own; its part would only have to cancel.
        pairs = tl.where(token[:, None] == token[None, :], 0.0, pairs * beta[:, None])
        tl.store(reads_ptr + number * C + token, tl.sum(pairs, 0))
        tl.store(read_ptr + number * C + token, tl.sum(pairs, 1))
    # Loaded again: registers are short.
    my_x = load_tile(x_ptr, first, token, column, n, T, H, C, K).to(operand)
    change *= beta[:, None] * x_scale[None, :]
    dk = tl.dot(change.to(operand), my_x, acc=dk, input_precision=PRECISION)
    my_y = load_tile(y_ptr, first, token, column, n, T, H, C, K).to(operand)
    a *= -decay * beta[:, None] * y_scale[None, :]
    dk = tl.dot(a.to(operand), my_y, acc=dk, input_precision=PRECISION)
    dk *= tl.load(scale_ptr + bh * K + column, mask=column < K, other=0.0)[None, :]
    store_tile(dk_ptr, dk, first, token, column, n, T, H, C, K)


@triton.jit
def _pairs(
    k_ptr, v_ptr, do_ptr, x_ptr, x_scale, y_ptr, y_scale, first, n, T, H,
    K: tl.constexpr, V: tl.constexpr, BI: tl.constexpr, C: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """k_j . x_t, and the gradient by the pair's decay, v_j . do_t - k_j . y_t; [j, t]."""
    token, part = tl.arange(0, C), tl.arange(0, BI)
    a = tl.zeros((C, C), tl.float32)
    change = tl.zeros((C, C), tl.float32)
    for i in range(0, K, BI):
        x = load_tile(x_ptr, first, token, i + part, n, T, H, C, K)
        y = load_tile(y_ptr, first, token, i + part, n, T, H, C, K)
        k = load_tile(k_ptr, first, token, i + part, n, T, H, C, K)
        a = tl.dot(k, tl.trans(x), acc=a, input_precision=PRECISION)
        change = tl.dot(k, tl.trans(y), acc=change, input_precision=PRECISION)
    a *= x_scale[None, :]
    change *= -y_scale[None, :]
    for i in range(0, V, BI):
        v = load_tile(v_ptr, first, token, i + part, n, T, H, C, V)
        do = load_tile(do_ptr, first, token, i + part, n, T, H, C, V)
        change = tl.dot(v, tl.trans(do), acc=change, input_precision=PRECISION)
    return a, change


@triton.jit
def _of_values(
    block, n, bh, number, first, k_ptr, do_ptr, x_ptr, x_scale_ptr, g_ptr, beta_ptr, kv_ptr,
    dkv_ptr, T, H, N, dv_ptr, through_ptr, border_ptr,
    K: tl.constexpr, V: tl.constexpr, BC: tl.constexpr, BI: tl.constexpr, C: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    operand = dkv_ptr.dtype.element_ty
    token, column, part = tl.arange(0, C), block * BC + tl.arange(0, BC), tl.arange(0, BI)
    k_blocks: tl.constexpr = (K + BC - 1) // BC
    blocks: tl.constexpr = k_blocks + (V + BC - 1) // BC
    g = tl.load(g_ptr + number * C + token)
    beta = tl.load(beta_ptr + number * C + token)
    x_scale = tl.load(x_scale_ptr + number * C + token)

    read = tl.zeros((C, BC), tl.float32)
    dv = tl.zeros((C, BC), tl.float32)
    a = tl.zeros((C, C), tl.float32)
    border = tl.zeros((BI, BC), tl.float32)
    for i in range(0, K, BI):
        x = load_tile(x_ptr, first, token, i + part, n, T, H, C, K)
        k = load_tile(k_ptr, first, token, i + part, n, T, H, C, K)
        kv = load_square(kv_ptr, number, i + part, column, K, V)
        dkv = load_square(dkv_ptr, number, i + part, column, K, V)
        border += kv.to(tl.float32) * dkv.to(tl.float32)
        read = tl.dot(x.to(operand), kv, acc=read, input_precision=PRECISION)
        dv = tl.dot(k.to(operand), dkv, acc=dv, input_precision=PRECISION)
        a = tl.dot(k, tl.trans(x), acc=a, input_precision=PRECISION)
    tl.store(border_ptr + number * blocks + k_blocks + block, tl.sum(tl.sum(border, 1), 0))
    do = load_tile(do_ptr, first, token, column, n, T, H, C, V)
    through = tl.exp(tl.cumsum(g, 0)) * x_scale * tl.sum(read * do.to(tl.float32), 1)
    vector = (bh * blocks + k_blocks + block) * (N * C) + n * C + token
    tl.store(through_ptr + vector, through)
    dv *= (decays_to_end(g_ptr + number * C, C) * beta)[:, None]
    a *= pair_decays_turned(g, C) * beta[:, None] * x_scale[None, :]
    dv = tl.dot(a.to(operand), do.to(operand), acc=dv, input_precision=PRECISION)
    store_tile(dv_ptr, dv, first, token, column, n, T, H, C, V)
