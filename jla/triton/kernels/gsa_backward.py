"""Gated Slot Attention's backward pass inside chunks.

`gsa_read` goes back through the second pass to the softmax; then `gsa_states` can carry both
states' gradients back; then `gsa_gradients`, once for each pass, makes the rest.
"""

import triton
import triton.language as tl

from jla.triton.kernels.gsa_slots import (
    again,
    all_near,
    decay,
    decay_from_start,
    is_reader,
    level_decay,
    level_tile,
    load_last_sums,
    load_states,
    load_sums,
    load_tile,
    made,
    near,
    once_more,
    operand,
    pair_scores,
    product,
    program,
    store_tile,
    sums_from,
)
from jla.triton.kernels.pieces import CHUNK, LEVELS, zeros


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

    A program a chunk and query head. 1.34 GB, 0.31 ms for the keys; 1.47 GB, 0.34 ms for the
    values, without dx and with ADD; 8400 instructions. 255 registers, 280 to 408 bytes spilled, 24
    to 32 KB of shared memory.

    Args:
      x: [B, T, HQ, D]. y: [B, T, H, D]. w: [B, T, HQ, M]. s: [B, T, H, M].
      states, gradients: X and dX, [B, H, chunks, D, M].
      ds_before, dg_before: with ADD, what ds and dg are added to, float32.
      dx (with ROWS) and dy: [B, T, HQ, D]; ds and dg: [B, T, HQ, M]. The first of the query heads
        that share a head has what dX gives.
    """
    b, n, head = program(T, HQ)
    h = head // (HQ // H)
    rows = tl.arange(0, CHUNK)
    i, j = rows[:, None], rows[None, :]
    is_first = tl.where(head % (HQ // H) == 0, 1.0, 0.0)
    scores = zeros(CHUNK, CHUNK)
    for feature in range(0, D, BD):
        x = load_tile(x_ptr, b, n, head, T, feature, HQ, D, BD)
        y = load_tile(y_ptr, b, n, h, T, feature, H, D, BD)
        scores = product(x, tl.trans(y), scores, FLOAT32)
    own = tl.sum(tl.where(i == j, scores, 0.0), axis=1)
    scores = operand(tl.where(i > j, scores, 0.0), FLOAT32)

    # 1. and 2.
    for slot in range(0, M, BM):
        ds, dg = _of_pairs(
            scores, own, w_ptr, s_ptr, sums_ptr, T, b, n, head, h, slot, HQ, H, M, BM, FLOAT32
        )
        reads, carried = zeros(CHUNK, BM), tl.zeros((BM,), tl.float32)
        for feature in range(0, D, BD):
            x = load_tile(x_ptr, b, n, head, T, feature, HQ, D, BD)
            states = load_states(states_ptr, b, n, h, T, feature, slot, H, D, M, BD, BM)
            reads = product(x, states, reads, FLOAT32)
            gradients = load_states(gradients_ptr, b, n, h, T, feature, slot, H, D, M, BD, BM)
            carried += tl.sum(states.to(tl.float32) * gradients.to(tl.float32), axis=0)
        later = once_more(once_more(n))
        reads *= decay_from_start(load_sums(sums_ptr, b, later, h, T, rows, slot, H, M, BM))
        reads *= load_tile(w_ptr, b, later, head, T, slot, HQ, M, BM).to(tl.float32)
        dg = sums_from(dg + reads, FLOAT32)
        last = load_last_sums(sums_ptr, b, n, h, T, slot, H, M, BM)
        dg += (carried * decay_from_start(last) * is_first)[None, :]
        ends = zeros(CHUNK, BM)
        for feature in range(0, D, BD):
            y = load_tile(y_ptr, b, n, h, T, feature, H, D, BD)
            gradients = load_states(gradients_ptr, b, n, h, T, feature, slot, H, D, M, BD, BM)
            ends = product(y, gradients, ends, FLOAT32)
        ends *= is_first * decay(
            last[None, :] - load_sums(sums_ptr, b, later, h, T, rows, slot, H, M, BM)
        )
        ds += ends
        ends *= load_tile(s_ptr, b, later, h, T, slot, H, M, BM).to(tl.float32)
        # The sum of the earlier tokens' terms alone: later ones may be larger by any factor.
        dg = product(tl.where(i > j, 1.0, 0.0), ends, dg, FLOAT32)
        if ADD:
            ds += load_tile(ds_before_ptr, b, n, head, T, slot, HQ, M, BM)
            dg += load_tile(dg_before_ptr, b, n, head, T, slot, HQ, M, BM)
        store_tile(ds_ptr, ds, b, n, head, T, slot, HQ, M, BM)
        store_tile(dg_ptr, dg, b, n, head, T, slot, HQ, M, BM)

    # 3.
    _of_features(
        x_ptr, y_ptr, w_ptr, s_ptr, sums_ptr, states_ptr, gradients_ptr, T, dx_ptr, dy_ptr,
        b, n, head, h, is_first, HQ, H, D, M, BD, BM, ROWS, FLOAT32,
    )  # fmt: skip


@triton.jit
def _of_pairs(
    scores, own, w_ptr, s_ptr, sums_ptr, T, b, n, head, h, slot,
    HQ: tl.constexpr, H: tl.constexpr, M: tl.constexpr, BM: tl.constexpr, FLOAT32: tl.constexpr,
):  # fmt: skip
    """What a chunk's pairs give ds and dg, of `gsa_gradients`; scores are those of j < i, own those
    of j = i."""
    rows = tl.arange(0, CHUNK)
    i, j = rows[:, None], rows[None, :]
    w = load_tile(w_ptr, b, n, head, T, slot, HQ, M, BM).to(tl.float32)
    s = load_tile(s_ptr, b, n, h, T, slot, H, M, BM).to(tl.float32)
    sums = load_sums(sums_ptr, b, n, h, T, rows, slot, H, M, BM)
    # What reads, w exp(G), and what is read, s exp(-G).
    readers, writes = made(w * near(sums, 1), FLOAT32), made(s * near(sums, -1), FLOAT32)
    # A pair's two tokens have equal terms in dg, which cancel outside of the pair.
    change = product(tl.trans(scores), readers, zeros(CHUNK, BM), FLOAT32)
    dg = -writes.to(tl.float32) * change
    at = once_more(n)
    ds = change * near(load_sums(sums_ptr, b, at, h, T, rows, slot, H, M, BM), -1)
    ds += own[:, None] * load_tile(w_ptr, b, at, head, T, slot, HQ, M, BM).to(tl.float32)
    dg += readers.to(tl.float32) * product(scores, writes, zeros(CHUNK, BM), FLOAT32)
    if not all_near(sums_ptr, b, n, h, T, slot, H, M, BM):
        for level in tl.range(0, LEVELS, num_stages=1):
            # A token either reads or is read, with the same decay: one product serves both.
            factor = level_decay(sums_ptr, b, again(n, level), h, T, level, slot, H, M, BM)
            decayed = level_tile(
                w_ptr, s_ptr, factor, b, n, head, h, T, level, slot, HQ, H, M, BM, FLOAT32
            )
            # For j < i x_i . y_j, for j > i x_j . y_i.
            both = tl.where(((i >> level) ^ (j >> level)) == 1, scores + tl.trans(scores), 0.0)
            far = product(both, decayed, zeros(CHUNK, BM), FLOAT32)
            ds += tl.where(is_reader(level), 0.0, factor * far)
            far *= decayed.to(tl.float32)
            dg += tl.where(is_reader(level), far, -far)
    return ds, dg


@triton.jit
def _of_features(
    x_ptr, y_ptr, w_ptr, s_ptr, sums_ptr, states_ptr, gradients_ptr, T, dx_ptr, dy_ptr,
    b, n, head, h, is_first,
    HQ: tl.constexpr, H: tl.constexpr, D: tl.constexpr, M: tl.constexpr, BD: tl.constexpr,
    BM: tl.constexpr, ROWS: tl.constexpr, FLOAT32: tl.constexpr,
):  # fmt: skip
    """dx with ROWS, and dy, of `gsa_gradients`."""
    rows = tl.arange(0, CHUNK)
    a = pair_scores(w_ptr, s_ptr, sums_ptr, b, n, head, h, T, HQ, H, M, BM, FLOAT32)
    for feature in range(0, D, BD):
        x = load_tile(x_ptr, b, n, head, T, feature, HQ, D, BD)
        dy = product(tl.trans(a), x, zeros(CHUNK, BD), FLOAT32)
        for slot in range(0, M, BM):
            after = load_last_sums(sums_ptr, b, n, h, T, slot, H, M, BM)[None, :]
            after = after - load_sums(sums_ptr, b, n, h, T, rows, slot, H, M, BM)
            write = load_tile(s_ptr, b, n, h, T, slot, H, M, BM).to(tl.float32)
            write *= decay(after) * is_first
            gradients = load_states(gradients_ptr, b, n, h, T, feature, slot, H, D, M, BD, BM)
            dy = product(made(write, FLOAT32), tl.trans(gradients), dy, FLOAT32)
        store_tile(dy_ptr, dy, b, n, head, T, feature, HQ, D, BD)
        if ROWS:
            y = load_tile(y_ptr, b, n, h, T, feature, H, D, BD)
            dx = product(a, y, zeros(CHUNK, BD), FLOAT32)
            for slot in range(0, M, BM):
                read = load_tile(w_ptr, b, n, head, T, slot, HQ, M, BM).to(tl.float32)
                read *= decay(load_sums(sums_ptr, b, n, h, T, rows, slot, H, M, BM))
                states = load_states(states_ptr, b, n, h, T, feature, slot, H, D, M, BD, BM)
                dx = product(made(read, FLOAT32), tl.trans(states), dx, FLOAT32)
            store_tile(dx_ptr, dx, b, n, head, T, feature, HQ, D, BD)
