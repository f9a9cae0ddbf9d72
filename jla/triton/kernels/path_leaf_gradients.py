"""PaTH's backward pass inside leaves of 64 tokens: from the versions' gradients to the inputs'.

`path_leaves` has the formulas. With D the gradient of the own logits, dQ~, dK~ those of the first
versions and dH that of the leaf's transform,

    E = lower(D X^T + dQ~ W'^T),   dQ = scale (D K + dQ~ - E W)
    dX = -scale L^T D - W dK~^T,   dW' = -scale L^T dQ~ - W dH
    dM = dW' W^T + dX Y^T with Y = strict_lower(W K^T),   dY = strict_lower(M^T dX)
    dK = scale D^T Q + dK~ + dY^T W
    dW = -scale E^T Q - X dK~ - W' dH^T + M^T dW' + dY K + (dG + dG^T) W

where dA = -strict_lower(N^T dM Diag(beta) N^T), N = (I + A)^-1, dG = Diag(beta) dA, and beta has
the sums of N dM over the rows and of dA W W^T over the columns. The scale is that of logits in base
2. Everything is float32; of 16-bit inputs, products are TF32's.
"""

import triton
import triton.language as tl

from jla.triton.kernels.path_tree import (
    LEAF,
    LN2,
    first_key,
    first_query,
    square,
    tile,
    tokens,
)
from jla.triton.kernels.pieces import before, by_row, dot_add, up_to, zeros


@triton.jit
def _dot(a, b, acc, PRECISION: tl.constexpr):
    return tl.dot(a, b, acc=acc, input_precision=PRECISION)


@triton.jit
def _exact(x):
    """A tile of 64 rows, loaded, as a float32 operand: see `by_row`."""
    return by_row(x.to(tl.float32))


@triton.jit
def _gradient_tile(
    gradients_ptr, factors_ptr, row, there, column, D: tl.constexpr, WIDTH: tl.constexpr
):  # fmt: skip
    """A version's gradient; zeros if it is not there."""
    t = tl.arange(0, LEAF)
    mask = t >= tl.where(there, 0, LEAF)
    x = tl.load(tile(gradients_ptr, row, column, D, LEAF, WIDTH), mask=mask[:, None], other=0.0)
    factor = tl.load(factors_ptr + row.to(tl.int64) + t, mask=mask, other=0.0)
    return x.to(tl.float32) * factor[:, None]


@triton.jit
def path_leaf_query_gradients(
    q_ptr, k_ptr, w_ptr, v_ptr, do_ptr, own_ptr, highest_ptr, lse_ptr, delta_ptr, unit_ptr,
    inner_ptr, writes_ptr, gradients_ptr, factors_ptr, P, R,
    passed_ptr, down_ptr, e_ptr, dq_ptr, dg_ptr,
    SCALE: tl.constexpr, HQ: tl.constexpr, H: tl.constexpr, K: tl.constexpr, V: tl.constexpr,
    BK: tl.constexpr, BV: tl.constexpr, GATES: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """L, D and E of every leaf, [B, HQ, P, 64, 64] float32, and the gradient of q.

    And with GATES the own logits' part of that of g, [B, 64 P, HQ]. A program a leaf and head.

    1.6 GB, floor 0.37 ms, predicted 0.8; 168, 168, 155 registers, 32, 32, 64 KB.
    """
    place = tl.program_id(0)
    leaf, head = place % P, place // P
    h, b = head % HQ, head // HQ
    kh = h // (HQ // H)
    shared = (b * H + kh) * P + leaf
    unit = tl.load(unit_ptr + b * H + kh)
    t = tl.arange(0, LEAF)
    row = place.to(tl.int64) * LEAF + t
    dp = zeros(LEAF, LEAF)
    for column in range(0, V, BV):
        v = tl.load(tokens(v_ptr, b, kh, leaf * LEAF, P, column, H, V, LEAF, BV))
        do = tl.load(tokens(do_ptr, b, h, leaf * LEAF, P, column, HQ, V, LEAF, BV))
        dp = dot_add(do, tl.trans(v), dp)
    kept = tl.exp2(tl.load(highest_ptr + row) - tl.load(lse_ptr + row))
    p = _exact(tl.load(square(own_ptr, place))) * kept[:, None]
    down = p * (dp * unit - tl.load(delta_ptr + row)[:, None])
    down = tl.where(up_to(), down, 0.0)
    tl.store(square(down_ptr, place), down)
    if GATES:
        # [r, s]: the gradients of the logits of s that contain the gate of r.
        later = tl.cumsum(tl.where(before(), down, 0.0), axis=0, reverse=True)
        dg = tl.sum(tl.where(before(), later, 0.0), axis=1)
        tl.store(dg_ptr + (b * P * LEAF + leaf * LEAF + t).to(tl.int64) * HQ + h, dg)
    inner = _exact(tl.load(square(inner_ptr, shared)))
    e, passed = _dot(down, tl.trans(inner), zeros(LEAF, LEAF), PRECISION), zeros(LEAF, LEAF)
    version = (head * R + first_query(leaf, P)) * LEAF
    for column in range(0, K, BK):
        moved = _gradient_tile(gradients_ptr, factors_ptr, version, leaf > 0, column, K, BK)
        writes = _exact(tl.load(tile(writes_ptr, shared * LEAF, column, K, LEAF, BK)))
        e = _dot(moved, tl.trans(writes), e, PRECISION)
        q = _exact(tl.load(tokens(q_ptr, b, h, leaf * LEAF, P, column, HQ, K, LEAF, BK)))
        w = _exact(tl.load(tokens(w_ptr, b, kh, leaf * LEAF, P, column, H, K, LEAF, BK)))
        passed = _dot(q, tl.trans(w), passed, PRECISION)
    e = tl.where(up_to(), e, 0.0)
    tl.store(square(e_ptr, place), e)
    tl.store(square(passed_ptr, place), tl.where(up_to(), passed, 0.0))
    for column in range(0, K, BK):
        dq = _gradient_tile(gradients_ptr, factors_ptr, version, leaf > 0, column, K, BK)
        k = _exact(tl.load(tokens(k_ptr, b, kh, leaf * LEAF, P, column, H, K, LEAF, BK)))
        w = _exact(tl.load(tokens(w_ptr, b, kh, leaf * LEAF, P, column, H, K, LEAF, BK)))
        dq = _dot(down, k, dq, PRECISION)
        dq = (dq - _dot(e, w, zeros(LEAF, BK), PRECISION)) * (SCALE * LN2 / unit)
        dq = dq.to(dq_ptr.dtype.element_ty)
        tl.store(tokens(dq_ptr, b, h, leaf * LEAF, P, column, HQ, K, LEAF, BK), dq)


@triton.jit
def path_leaf_transform_gradients(
    q_ptr, w_ptr, beta_ptr, inverse_ptr, inner_ptr, writes_ptr, passed_ptr, down_ptr, e_ptr,
    dqueries_ptr, query_factors_ptr, dkeys_ptr, key_factors_ptr, dtransforms_ptr, P, R, S,
    dinner_ptr, dm_ptr, dw_ptr,
    SCALE: tl.constexpr, HQ: tl.constexpr, H: tl.constexpr, K: tl.constexpr, BK: tl.constexpr,
    TRANSFORMS: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """dX, dW' W^T and the first four terms of dW. A program a leaf and key head.

    2.3 GB, floor 0.53 ms, predicted 1.1; 255, 255, 219 registers, of which 72, 168, 0
    bytes spill, 48, 48, 96 KB.
    """
    GROUP: tl.constexpr = HQ // H
    place = tl.program_id(0)
    leaf, key_head = place % P, place // P
    kh, b = key_head % H, key_head // H
    t = tl.arange(0, LEAF)
    beta = tl.load(beta_ptr + (b * P * LEAF + leaf * LEAF + t).to(tl.int64) * H + kh)
    m = _exact(tl.load(square(inverse_ptr, place))) * beta[None, :]
    inner = _exact(tl.load(square(inner_ptr, place)))
    dinner, dm = zeros(LEAF, LEAF), zeros(LEAF, LEAF)
    for member in range(GROUP):
        own = (b * HQ + kh * GROUP + member) * P + leaf
        passed = tl.load(square(passed_ptr, own)) * SCALE
        dinner = _dot(tl.trans(passed), -tl.load(square(down_ptr, own)), dinner, PRECISION)
    version = (key_head * S + first_key(leaf, P)) * LEAF
    has_version = leaf + 1 < P
    for column in range(0, K, BK):
        w = _exact(tl.load(tokens(w_ptr, b, kh, leaf * LEAF, P, column, H, K, LEAF, BK)))
        moved = -_gradient_tile(dkeys_ptr, key_factors_ptr, version, has_version, column, K, BK)
        dinner = _dot(w, tl.trans(moved), dinner, PRECISION)
        dw = _dot(inner, moved, zeros(LEAF, BK), PRECISION)
        dwrites = zeros(LEAF, BK)
        for member in range(GROUP):
            h = kh * GROUP + member
            own = (b * HQ + h) * P + leaf
            query = ((b * HQ + h) * R + first_query(leaf, P)) * LEAF
            dq = -_gradient_tile(dqueries_ptr, query_factors_ptr, query, leaf > 0, column, K, BK)
            passed = tl.load(square(passed_ptr, own)) * SCALE
            dwrites = _dot(tl.trans(passed), dq, dwrites, PRECISION)
            q = tl.load(tokens(q_ptr, b, h, leaf * LEAF, P, column, HQ, K, LEAF, BK))
            e = tl.load(square(e_ptr, own)) * -SCALE
            dw = _dot(tl.trans(e), _exact(q), dw, PRECISION)
        if TRANSFORMS:
            for k in range(0, K, BK):
                other = tl.load(tokens(w_ptr, b, kh, leaf * LEAF, P, k, H, K, LEAF, BK))
                dh = tl.load(tile(dtransforms_ptr, place * K + k, column, K, BK, BK))
                dwrites = _dot(_exact(-other), dh, dwrites, PRECISION)
                writes = tl.load(tile(writes_ptr, place * LEAF, k, K, LEAF, BK))
                dh = tl.load(tile(dtransforms_ptr, place * K + column, k, K, BK, BK))
                dw = _dot(_exact(-writes), tl.trans(dh), dw, PRECISION)
        dm = _dot(dwrites, tl.trans(w), dm, PRECISION)
        dw = _dot(tl.trans(m), dwrites, dw, PRECISION)
        tl.store(tile(dw_ptr, place * LEAF, column, K, LEAF, BK), dw)
    tl.store(square(dinner_ptr, place), dinner)
    tl.store(square(dm_ptr, place), dm)


@triton.jit
def path_leaf_key_gradients(
    q_ptr, k_ptr, w_ptr, beta_ptr, inverse_ptr, down_ptr, dinner_ptr, dm_ptr, part_ptr,
    dkeys_ptr, key_factors_ptr, unit_ptr, P, S,
    dk_ptr, dw_ptr, dbeta_ptr,
    SCALE: tl.constexpr, HQ: tl.constexpr, H: tl.constexpr, K: tl.constexpr, BK: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """The gradients of k, w (float32) and beta. A program a leaf and key head.

    1.7 GB, floor 0.39 ms, predicted 0.9; 255, 255, 248 registers, of which 128, 72, 0
    bytes spill, 72, 72, 96 KB.
    """
    GROUP: tl.constexpr = HQ // H
    place = tl.program_id(0)
    leaf, key_head = place % P, place // P
    kh, b = key_head % H, key_head // H
    t = tl.arange(0, LEAF)
    token = (b * P * LEAF + leaf * LEAF + t).to(tl.int64) * H + kh
    beta = tl.load(beta_ptr + token)
    inverse = _exact(tl.load(square(inverse_ptr, place)))
    dinner = tl.load(square(dinner_ptr, place))
    y, overlap = zeros(LEAF, LEAF), zeros(LEAF, LEAF)
    for column in range(0, K, BK):
        w = _exact(tl.load(tokens(w_ptr, b, kh, leaf * LEAF, P, column, H, K, LEAF, BK)))
        k = _exact(tl.load(tokens(k_ptr, b, kh, leaf * LEAF, P, column, H, K, LEAF, BK)))
        y = _dot(w, tl.trans(k), y, PRECISION)
        overlap = _dot(w, tl.trans(w), overlap, PRECISION)
    y = tl.where(before(), y, 0.0)
    dm = _dot(dinner, tl.trans(y), tl.load(square(dm_ptr, place)), PRECISION)
    dy = _dot(tl.trans(inverse * beta[None, :]), dinner, zeros(LEAF, LEAF), PRECISION)
    dy = tl.where(before(), dy, 0.0)
    dbeta = tl.sum(inverse * dm, axis=0)
    da = _dot(tl.trans(inverse), dm * beta[None, :], zeros(LEAF, LEAF), PRECISION)
    da = -_dot(da, tl.trans(inverse), zeros(LEAF, LEAF), PRECISION)
    da = tl.where(before(), da, 0.0)
    of_rows = tl.sum(da * overlap, axis=1)
    da *= beta[:, None]
    both = da + tl.trans(da)
    unit = LN2 / tl.load(unit_ptr + key_head)
    # One vector lies along rows, the other along columns.
    tl.store(dbeta_ptr + token, (dbeta + of_rows) * unit)
    version = (key_head * S + first_key(leaf, P)) * LEAF
    for column in range(0, K, BK):
        w = _exact(tl.load(tokens(w_ptr, b, kh, leaf * LEAF, P, column, H, K, LEAF, BK)))
        dk = _gradient_tile(dkeys_ptr, key_factors_ptr, version, leaf + 1 < P, column, K, BK)
        dk = _dot(tl.trans(dy), w, dk, PRECISION)
        for member in range(GROUP):
            h = kh * GROUP + member
            own = (b * HQ + h) * P + leaf
            q = tl.load(tokens(q_ptr, b, h, leaf * LEAF, P, column, HQ, K, LEAF, BK))
            down = tl.load(square(down_ptr, own)) * SCALE
            dk = _dot(tl.trans(down), _exact(q), dk, PRECISION)
        dk = (dk * unit).to(dk_ptr.dtype.element_ty)
        tl.store(tokens(dk_ptr, b, kh, leaf * LEAF, P, column, H, K, LEAF, BK), dk)
        k = _exact(tl.load(tokens(k_ptr, b, kh, leaf * LEAF, P, column, H, K, LEAF, BK)))
        dw = tl.load(tile(part_ptr, place * LEAF, column, K, LEAF, BK))
        dw = _dot(dy, k, dw, PRECISION)
        dw = _dot(both, w, dw, PRECISION) * unit
        tl.store(tokens(dw_ptr, b, kh, leaf * LEAF, P, column, H, K, LEAF, BK), dw)
