"""Gated Slot Attention's forward pass: the states, then everything else of all chunks at once."""

import triton
import triton.language as tl

from jla.triton.kernels.gsa_slots import (
    CHUNK,
    LEVELS,
    LOG2E,
    NOT_A_NUMBER,
    STRONGEST,
    UNIT,
    decay,
    decay_from_start,
    diagonal,
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
    states_of,
    store_tile,
    zeros,
)


@triton.jit
def gsa_sums(g_ptr, T, sums_ptr, H: tl.constexpr, M: tl.constexpr, BM: tl.constexpr):
    """G, [B, T, H, M] int32, from the log decays g. A program a chunk and head.

    Every log decay is rounded to a unit, and the sum of what the roundings left is rounded once: so
    G errs by a unit, and equal weak gates do not add up their roundings.
    """
    b, n, h = program(T, H)
    g = load_tile(g_ptr, b, n, h, T, 0, H, M, BM)
    exact = tl.maximum(g * LOG2E, STRONGEST) / UNIT
    rounded = exact.to(tl.int32)
    rest = tl.cumsum(exact - rounded.to(tl.float32), axis=0) - 0.5  # so that it rounds
    sums = tl.cumsum(rounded, axis=0) + rest.to(tl.int32)
    sums = tl.where(tl.cumsum((g != g).to(tl.int32), axis=0) > 0, NOT_A_NUMBER, sums)
    store_tile(sums_ptr, sums, b, n, h, T, 0, H, M, BM)


@triton.jit
def gsa_states(
    keys_ptr, values_ptr, by_key_ptr, by_value_ptr, sums_ptr, hk_ptr, hv_ptr, T,
    key_states_ptr, value_states_ptr, hk_end_ptr, hv_end_ptr,
    HQ: tl.constexpr, H: tl.constexpr, D: tl.constexpr, M: tl.constexpr, BD: tl.constexpr,
    BM: tl.constexpr, KEYS: tl.constexpr, VALUES: tl.constexpr, START: tl.constexpr,
    REVERSE: tl.constexpr, FLOAT32: tl.constexpr,
):  # fmt: skip
    """Carries the states from chunk to chunk: Hk and the transposed Hv obey one rule,

        X <- X Diag(exp G_end) + sum_i x_i^T (w_i exp(G_end - G_i))

    with x, w = k, s or v, s. In reverse so do their gradients, with exp(G_i) for exp(G_end - G_i),
    and x, w = q, dlogits or do, p. A program has BD features of one head's Hk or Hv in registers,
    and needs nothing of the others.

    Args:
      keys, values: x, [B, T, HQ, D]; by_key, by_value: w, [B, T, HQ, M]. HQ is H unless reversed.
      hk, hv: with START, the states at the start; in reverse, the gradients of those at the end.
      key_states, value_states: each chunk's state before it, and in reverse the gradient of that
        after it, [B, H, chunks, D, M].
      hk_end, hv_end: the states at the end; in reverse, the gradients of those at the start.
      KEYS, VALUES: 1 for the states that this call has, one of them or both.
    """
    blocks: tl.constexpr = (D + BD - 1) // BD
    block = tl.program_id(0) % (blocks * (KEYS + VALUES))
    bh = (tl.program_id(0) // (blocks * (KEYS + VALUES))).to(tl.int64)
    b, h = bh // H, (bh % H).to(tl.int32)
    x_ptr, w_ptr, states_ptr = keys_ptr, by_key_ptr, key_states_ptr
    start_ptr, end_ptr = hk_ptr, hk_end_ptr
    is_value = block >= blocks * KEYS
    if is_value:
        x_ptr, w_ptr, states_ptr = values_ptr, by_value_ptr, value_states_ptr
        start_ptr, end_ptr = hv_ptr, hv_end_ptr
    feature = block % blocks * BD
    d, m = feature + tl.arange(0, BD)[:, None], tl.arange(0, BM)[None, :]
    # Hk is [K, M], Hv is [M, V].
    whole, inside = bh * (D * M) + tl.where(is_value, d + m * D, d * M + m), (d < D) & (m < M)
    state = zeros(BD, BM)
    if START:
        state += tl.load(start_ptr + whole, mask=inside, other=0.0)
    chunks, rows = tl.cdiv(T, CHUNK), tl.arange(0, CHUNK)
    GROUP: tl.constexpr = HQ // H
    for step in range(0, chunks * GROUP):
        member, n = step % GROUP, step // GROUP
        if REVERSE:
            n = chunks - 1 - n
        pointers, mask = states_of(states_ptr, b, n, h, T, feature, H, D, M, BD, BM)
        sums = load_sums(sums_ptr, b, n, h, T, rows, H, M, BM)
        last = load_last_sums(sums_ptr, b, n, h, T, H, M, BM)
        if REVERSE:
            factor = decay(sums)
        else:
            factor = decay(last[None, :] - sums)
        whole_decay = decay_from_start(last)
        if GROUP > 1:  # the queries that share a head follow one another
            mask = mask & (member == 0)
            whole_decay = tl.where(member == 0, whole_decay, 1.0)
        tl.store(pointers, state.to(states_ptr.dtype.element_ty), mask=mask)
        x = load_tile(x_ptr, b, n, h * GROUP + member, T, feature, HQ, D, BD)
        w = load_tile(w_ptr, b, n, h * GROUP + member, T, 0, HQ, M, BM).to(tl.float32)
        state = product(tl.trans(x), w * factor, state * whole_decay[None, :], FLOAT32)
    tl.store(end_ptr + whole, state, mask=inside)


@triton.jit
def gsa_outputs(
    q_ptr, k_ptr, v_ptr, s_ptr, sums_ptr, key_states_ptr, value_states_ptr, T,
    o_ptr, p_ptr,
    scale: tl.constexpr, HQ: tl.constexpr, H: tl.constexpr, K: tl.constexpr, V: tl.constexpr,
    M: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr, BM: tl.constexpr, KEEP: tl.constexpr,
    FLOAT32: tl.constexpr,
):  # fmt: skip
    """The outputs of all chunks, whose states are known. With j <= i the chunk's tokens,

    1.  logits_i = scale (exp(G_i) (q_i Hk) + sum_j (q_i . k_j) s_j exp(G_i - G_j))
    2.  p_i = softmax(logits_i);   A[i, j] = sum_m p_i s_j exp(G_i - G_j)
    3.  o_i = (p_i exp(G_i)) Hv + sum_j A[i, j] v_j

    A program a chunk and query head. p, [B, T, HQ, M], is returned with KEEP.
    """
    b, n, head = program(T, HQ)
    h = head // (HQ // H)
    s = load_tile(s_ptr, b, n, h, T, 0, H, M, BM).to(tl.float32)
    sums = load_sums(sums_ptr, b, n, h, T, tl.arange(0, CHUNK), H, M, BM)

    # 1. The logits.
    logits = read(
        q_ptr, k_ptr, key_states_ptr, s, sums, sums_ptr, b, n, head, h, T,
        HQ, H, K, M, BK, BM, FLOAT32,
    )  # fmt: skip

    # 2. p and A.
    logits = tl.where((tl.arange(0, BM) < M)[None, :], scale * logits, float("-inf"))
    p = tl.exp2((logits - tl.max(logits, axis=1)[:, None]) * LOG2E)
    p = operand(p / tl.sum(p, axis=1)[:, None], FLOAT32)
    if KEEP:
        store_tile(p_ptr, p, b, n, head, T, 0, HQ, M, BM)
    p = p.to(tl.float32)
    scores = tl.where(diagonal(), tl.sum(p * s, axis=1)[:, None], 0.0)
    for level in tl.range(0, LEVELS, num_stages=1):
        factor = level_decay(sums, sums_ptr, b, n, h, T, 1 << level, H, M, BM)
        pairs = product(p * factor, tl.trans(factor * s), zeros(CHUNK, CHUNK), FLOAT32)
        scores = tl.where(level_pairs(1 << level), pairs, scores)

    # 3. o.
    p, scores = operand(p * decay(sums), FLOAT32), operand(scores, FLOAT32)
    for feature in range(0, V, BV):
        states = load_states(value_states_ptr, b, n, h, T, feature, H, V, M, BV, BM)
        o = product(p, tl.trans(states), zeros(CHUNK, BV), FLOAT32)
        v = load_tile(v_ptr, b, n, h, T, feature, H, V, BV)
        o = product(scores, v, o, FLOAT32)
        store_tile(o_ptr, o, b, n, head, T, feature, HQ, V, BV)
