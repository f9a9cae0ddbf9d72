"""Gated Slot Attention's backward pass inside chunks; `gsa_states` carries gradients between them.

`gsa_logit_gradients` goes back through the second pass to the softmax; then `gsa_states` can carry
both states' gradients back; then `gsa_gradients`, once for each pass, makes the rest.
"""

import triton
import triton.language as tl

from jla.triton.kernels.gsa_slots import (
    CHUNK,
    LEVELS,
    decay,
    decay_from_start,
    level_decay,
    level_pairs,
    load_last_sums,
    load_states,
    load_sums,
    load_tile,
    operand,
    product,
    program,
    read,
    store_tile,
    zeros,
)


@triton.jit
def gsa_logit_gradients(
    do_ptr, v_ptr, s_ptr, sums_ptr, value_states_ptr, p_ptr, T,
    dlogits_ptr,
    scale: tl.constexpr, HQ: tl.constexpr, H: tl.constexpr, V: tl.constexpr, M: tl.constexpr,
    BD: tl.constexpr, BM: tl.constexpr, FLOAT32: tl.constexpr,
):  # fmt: skip
    """The gradients of q . Hk, before the scale, of all chunks. With j <= i the chunk's tokens,

    1.  dp_i = exp(G_i) (do_i Hv^T) + sum_j (do_i . v_j) s_j exp(G_i - G_j)
    2.  dlogits_i = scale p_i (dp_i - p_i . dp_i)

    A program a chunk and query head.
    """
    b, n, head = program(T, HQ)
    h = head // (HQ // H)
    s = load_tile(s_ptr, b, n, h, T, 0, H, M, BM).to(tl.float32)
    sums = load_sums(sums_ptr, b, n, h, T, tl.arange(0, CHUNK), H, M, BM)
    dp = read(
        do_ptr, v_ptr, value_states_ptr, s, sums, sums_ptr, b, n, head, h, T,
        HQ, H, V, M, BD, BM, FLOAT32,
    )  # fmt: skip
    p = load_tile(p_ptr, b, n, head, T, 0, HQ, M, BM).to(tl.float32)
    # The rounded p do not sum to 1; without the division dlogits would not sum to 0, which tells
    # where one slot has nearly all. Rows past T have zeros.
    mean = tl.sum(p * dp, axis=1) / tl.maximum(tl.sum(p, axis=1), 1e-30)
    dlogits = scale * p * (dp - mean[:, None])
    store_tile(dlogits_ptr, dlogits, b, n, head, T, 0, HQ, M, BM)


@triton.jit
def gsa_gradients(
    x_ptr, y_ptr, w_ptr, s_ptr, sums_ptr, states_ptr, gradients_ptr, ds_before_ptr, dg_before_ptr,
    T, dx_ptr, dy_ptr, ds_ptr, dg_ptr,
    HQ: tl.constexpr, H: tl.constexpr, D: tl.constexpr, M: tl.constexpr, BD: tl.constexpr,
    BM: tl.constexpr, ROWS: tl.constexpr, ADD: tl.constexpr, FLOAT32: tl.constexpr,
):  # fmt: skip
    """The gradients of one pass, of the form sum_ij (x_i . y_j) A[i, j] with A from w and s, given
    the state X before each chunk and dX, the gradient of that after it:

    1.  ds = exp(G_end - G) (y dX) + sum_i (x_i . y_j) w_i exp(G_i - G_j)
    2.  dg of a token: the products with w of what later tokens read of X, those with s of what
        earlier tokens write into dX, those of all pairs j < i around it, and of what the chunk
        carries from X to dX.
    3.  dx = A y + (w exp(G)) X^T;   dy = A^T x + (s exp(G_end - G)) dX^T

    A program a chunk and query head.

    Args:
      x: [B, T, HQ, D]. y: [B, T, H, D]. w: [B, T, HQ, M]. s: [B, T, H, M].
      states, gradients: X and dX, [B, H, chunks, D, M].
      ds_before, dg_before: with ADD, what ds and dg are added to, float32.
      dx (with ROWS) and dy: [B, T, HQ, D]; ds and dg: [B, T, HQ, M]. The first of the query heads
        that share a head has what dX gives.
    """
    b, n, head = program(T, HQ)
    h = head // (HQ // H)
    i, j = tl.arange(0, CHUNK)[:, None], tl.arange(0, CHUNK)[None, :]
    sums = load_sums(sums_ptr, b, n, h, T, tl.arange(0, CHUNK), H, M, BM)
    last = load_last_sums(sums_ptr, b, n, h, T, H, M, BM)

    scores, reads, ends = zeros(CHUNK, CHUNK), zeros(CHUNK, BM), zeros(CHUNK, BM)
    carried = tl.zeros((BM,), tl.float32)
    for feature in range(0, D, BD):
        x = load_tile(x_ptr, b, n, head, T, feature, HQ, D, BD)
        y = load_tile(y_ptr, b, n, h, T, feature, H, D, BD)
        scores = product(x, tl.trans(y), scores, FLOAT32)
        states = load_states(states_ptr, b, n, h, T, feature, H, D, M, BD, BM)
        reads = product(x, states, reads, FLOAT32)
        gradients = load_states(gradients_ptr, b, n, h, T, feature, H, D, M, BD, BM)
        ends = product(y, gradients, ends, FLOAT32)
        carried += tl.sum(states.to(tl.float32) * gradients.to(tl.float32), axis=0)
    w = load_tile(w_ptr, b, n, head, T, 0, HQ, M, BM).to(tl.float32)
    s = load_tile(s_ptr, b, n, h, T, 0, H, M, BM).to(tl.float32)
    is_first = tl.where(head % (HQ // H) == 0, 1.0, 0.0)
    ends *= decay(last[None, :] - sums) * is_first
    carried *= decay_from_start(last) * is_first
    ds = ends + tl.sum(tl.where(i == j, scores, 0.0), axis=1)[:, None] * w
    reads *= decay_from_start(sums) * w
    # A sum of the earlier tokens' alone: later ones may be larger by any factor.
    dg = product(tl.where(i > j, 1.0, 0.0), ends * s, zeros(CHUNK, BM), FLOAT32) + carried[None, :]
    a = tl.where(i == j, tl.sum(w * s, axis=1)[:, None], 0.0)
    # For j < i x_i . y_j, for j > i x_j . y_i.
    scores = operand(tl.where(i > j, scores, tl.trans(scores)), FLOAT32)

    # At a level a token either reads or is read, with the same decay: one product serves both.
    for level in tl.range(0, LEVELS, num_stages=1):
        half = 1 << level
        factor = level_decay(sums, sums_ptr, b, n, h, T, half, H, M, BM)
        reader = (i & half) != 0
        decayed = operand(tl.where(reader, w, s) * factor, FLOAT32)
        pairs = product(decayed, tl.trans(decayed), zeros(CHUNK, CHUNK), FLOAT32)
        a = tl.where(level_pairs(half), pairs, a)
        mine = tl.where(((i ^ j) < 2 * half) & ((i ^ j) >= half), scores, 0.0)
        change = product(mine, decayed, zeros(CHUNK, BM), FLOAT32)
        ds += tl.where(reader, 0.0, factor * change)
        # The two tokens of a pair have equal terms here, and these cancel outside of the pair.
        change *= decayed.to(tl.float32)
        reads += tl.where(reader, change, -change)

    dg += tl.cumsum(reads, axis=0, reverse=True)
    if ADD:
        ds += load_tile(ds_before_ptr, b, n, head, T, 0, HQ, M, BM)
        dg += load_tile(dg_before_ptr, b, n, head, T, 0, HQ, M, BM)
    store_tile(ds_ptr, ds, b, n, head, T, 0, HQ, M, BM)
    store_tile(dg_ptr, dg, b, n, head, T, 0, HQ, M, BM)

    a, w = operand(a, FLOAT32), operand(w * decay(sums), FLOAT32)
    s = operand(s * decay(last[None, :] - sums) * is_first, FLOAT32)
    for feature in range(0, D, BD):
        x = load_tile(x_ptr, b, n, head, T, feature, HQ, D, BD)
        gradients = load_states(gradients_ptr, b, n, h, T, feature, H, D, M, BD, BM)
        dy = product(tl.trans(a), x, zeros(CHUNK, BD), FLOAT32)
        dy = product(s, tl.trans(gradients), dy, FLOAT32)
        store_tile(dy_ptr, dy, b, n, head, T, feature, HQ, D, BD)
        if ROWS:
            y = load_tile(y_ptr, b, n, h, T, feature, H, D, BD)
            states = load_states(states_ptr, b, n, h, T, feature, H, D, M, BD, BM)
            dx = product(a, y, zeros(CHUNK, BD), FLOAT32)
            dx = product(w, tl.trans(states), dx, FLOAT32)
            store_tile(dx_ptr, dx, b, n, head, T, feature, HQ, D, BD)
