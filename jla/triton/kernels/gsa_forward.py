"""Gated Slot Attention's forward pass: the states, then everything else of all chunks at once."""

import triton
import triton.language as tl

from jla.triton.kernels.gsa_slots import (
    LOG2E,
    NEAR,
    NOT_A_NUMBER,
    STRONGEST,
    UNIT,
    again,
    all_near,
    decay,
    decay_from_start,
    earlier,
    level_decay,
    level_pairs,
    load_last_sums,
    load_states,
    load_sums,
    load_tile,
    made,
    near,
    operand,
    pair_scores,
    product,
    program,
    states_of,
    store_tile,
)
from jla.triton.kernels.pieces import CHUNK, LEVELS, chunks_of_piece, same, state_of_piece, zeros


@triton.jit
def _larger(a, b):
    return tl.maximum(a, b)


@triton.jit
def gsa_sums(
    g_ptr, T, sums_ptr, totals_ptr, H: tl.constexpr, M: tl.constexpr, BM: tl.constexpr
):  # fmt: skip
    """G, [B, T, H, M] int32, from the log decays g, and the chunks' sums of g in base 2,
    [B, chunks, H, M] float32. A program a chunk, head and BM slots.

    Every log decay is rounded down to a unit, and G has the whole units of what that left. Where
    nothing passes, at the start of a segment, the remainders are counted anew: what lies before
    changes no difference behind.

    0.27 GB, 0.06 ms; 2000 instructions, most of them of the three scans. 96 registers at most, 2 KB
    of shared memory.
    """
    tiles: tl.constexpr = (M + BM - 1) // BM
    b, n, part = program(T, H * tiles)
    h, slot = part // tiles, part % tiles * BM
    g = load_tile(g_ptr, b, n, h, T, slot, H, M, BM) * LOG2E
    exact = tl.maximum(g, STRONGEST) / UNIT
    whole = tl.floor(exact)
    rest = tl.cumsum(((exact - whole) * 2**20).to(tl.int32), axis=0)
    rest -= tl.associative_scan(tl.where(g <= STRONGEST, rest, 0), 0, _larger)
    sums = tl.cumsum(whole.to(tl.int32), axis=0) + ((rest + 2**19) >> 20)
    totals, m = tl.sum(g, axis=0), slot + tl.arange(0, BM)
    sums = tl.where((totals != totals)[None, :], NOT_A_NUMBER, sums)
    store_tile(sums_ptr, sums, b, n, h, T, slot, H, M, BM)
    place = ((b * tl.cdiv(T, CHUNK) + n) * H + h) * M + m
    tl.store(totals_ptr + place, totals, mask=m < M)


@triton.jit
def gsa_states(
    keys_ptr, values_ptr, by_key_ptr, by_value_ptr, sums_ptr, totals_ptr, hk_ptr, hv_ptr,
    spans_ptr, T,
    key_states_ptr, value_states_ptr, hk_end_ptr, hv_end_ptr,
    HQ: tl.constexpr, H: tl.constexpr, D: tl.constexpr, M: tl.constexpr, BD: tl.constexpr,
    BM: tl.constexpr, P: tl.constexpr, KEYS: tl.constexpr, VALUES: tl.constexpr,
    START: tl.constexpr, KEEP: tl.constexpr, REVERSE: tl.constexpr, FLOAT32: tl.constexpr,
):  # fmt: skip
    """Carries the states from chunk to chunk: Hk and the transposed Hv obey one rule,

        X <- X Diag(exp G_end) + sum_i x_i^T (w_i exp(G_end - G_i))

    with x, w = k, s or v, s. In reverse so do their gradients, with exp(G_i) for exp(G_end - G_i),
    and x, w = q, dlogits or do, p. A program has BD features and BM slots of one head's Hk or Hv in
    registers, and needs nothing of the others.

    Args:
      keys, values: x, [B, T, HQ, D]; by_key, by_value: w, [B, T, HQ, M]. HQ is H unless reversed.
      hk, hv: with START, the states at the start; in reverse, the gradients of those at the end.
      key_states, value_states: each chunk's state before it, and in reverse the gradient of that
        after it, [B, H, chunks, D, M]. Without KEEP they are not written: a first pass.
      hk_end, hv_end: the states at the end; in reverse, the gradients of those at the start.
      P: with pieces, see `chunks_of_piece`, hk, hv and the ends are those of each, [B, H, P, ...].
      KEYS, VALUES: 1 for the states that this call has, one of them or both.

    Forward 0.74 GB, 0.17 ms; in reverse 0.80 GB, 0.19 ms. 3000 instructions, in four programs a
    head, which read G and w four times, all but once from the cache. 146 to 220 registers, 32 KB of
    shared memory, 48 to 51 on sm_90 and sm_100. A first pass has 0.47 GB, 0.11 ms; 90 to 188
    registers, nothing spilled.
    """
    blocks: tl.constexpr = (D + BD - 1) // BD
    tiles: tl.constexpr = (M + BM - 1) // BM
    parts: tl.constexpr = blocks * (KEYS + VALUES)
    block, slot = tl.program_id(0) % parts, tl.program_id(0) // parts % tiles * BM
    bh = (tl.program_id(0) // (parts * tiles)).to(tl.int64)
    b, h = bh // H, (bh % H).to(tl.int32)
    x_ptr, w_ptr, states_ptr = keys_ptr, by_key_ptr, key_states_ptr
    start_ptr, end_ptr = hk_ptr, hk_end_ptr
    is_value = block >= blocks * KEYS
    if is_value:
        x_ptr, w_ptr, states_ptr = values_ptr, by_value_ptr, value_states_ptr
        start_ptr, end_ptr = hv_ptr, hv_end_ptr
    feature = block % blocks * BD
    d, m = feature + tl.arange(0, BD)[:, None], slot + tl.arange(0, BM)[None, :]
    # Hk is [K, M], Hv is [M, V].
    chunks, rows = tl.cdiv(T, CHUNK), tl.arange(0, CHUNK)
    first, last, p = chunks_of_piece(spans_ptr, b, chunks, P)
    whole, inside = state_of_piece(bh, p, P) * (D * M), (d < D) & (m < M)
    whole += tl.where(is_value, d + m * D, d * M + m)
    state = zeros(BD, BM)
    if START:
        state += tl.load(start_ptr + whole, mask=inside, other=0.0)
    GROUP: tl.constexpr = HQ // H
    for step in range(0, (last - first) * GROUP):
        member, n = step % GROUP, first + step // GROUP
        if REVERSE:
            n = last - 1 - step // GROUP
        pointers, mask = states_of(states_ptr, b, n, h, T, feature, slot, H, D, M, BD, BM)
        sums = load_sums(sums_ptr, b, n, h, T, rows, slot, H, M, BM)
        if REVERSE:
            factor = decay(sums)
        else:
            factor = decay(load_last_sums(sums_ptr, b, n, h, T, slot, H, M, BM)[None, :] - sums)
        # Not of G, whose rounding would add up over the chunks if gates are equal.
        totals = totals_ptr + ((b * chunks + n) * H + h) * M + m
        whole_decay = tl.exp2(tl.load(totals, mask=m < M, other=0.0))
        if GROUP > 1:  # the queries that share a head follow one another
            mask = mask & (member == 0)
            whole_decay = tl.where(member == 0, whole_decay, 1.0)
        if KEEP:
            tl.store(pointers, state.to(states_ptr.dtype.element_ty), mask=mask)
        x = load_tile(x_ptr, b, n, h * GROUP + member, T, feature, HQ, D, BD)
        w = load_tile(w_ptr, b, n, h * GROUP + member, T, slot, HQ, M, BM).to(tl.float32)
        state *= whole_decay
        state = product(tl.trans(x), made(w * factor, FLOAT32), state, FLOAT32)
    tl.store(end_ptr + whole, state, mask=inside)


@triton.jit
def gsa_read(
    x_ptr, y_ptr, s_ptr, sums_ptr, states_ptr, p_ptr, T,
    out_ptr,
    scale: tl.constexpr, HQ: tl.constexpr, H: tl.constexpr, D: tl.constexpr, M: tl.constexpr,
    BD: tl.constexpr, BM: tl.constexpr, FINISH: tl.constexpr, GRADIENT: tl.constexpr,
    FLOAT32: tl.constexpr,
):  # fmt: skip
    """What the slots read. With j <= i the tokens of a chunk,

        r_i = exp(G_i) (x_i X) + sum_j (x_i . y_j) s_j exp(G_i - G_j)

    and from it, with FINISH, p = softmax(scale r) or, with GRADIENT, that of q . Hk, from r the one
    of p, scale p_i (r_i - p_i . r_i). A tile has all slots then.

    Args:
      x: q or do, [B, T, HQ, D]. y: k or v, [B, T, H, D]. states: X, [B, H, chunks, D, M].
      p: with GRADIENT, [B, T, HQ, M].
      out: [B, T, HQ, M].

    A program a chunk, query head and BM slots. 0.67 GB, 0.16 ms, with GRADIENT 0.74 GB, 0.17 ms;
    2800 instructions. 239 to 255 registers, up to 24 bytes spilled (sm_80 alone), 16 KB of shared
    memory.
    """
    tiles: tl.constexpr = (M + BM - 1) // BM
    b, n, part = program(T, HQ * tiles)
    head, slot = part // tiles, part % tiles * BM
    h = head // (HQ // H)
    scores, reads = zeros(CHUNK, CHUNK), zeros(CHUNK, BM)
    for feature in range(0, D, BD):
        x = load_tile(x_ptr, b, n, head, T, feature, HQ, D, BD)
        y = load_tile(y_ptr, b, n, h, T, feature, H, D, BD)
        scores = product(x, tl.trans(y), scores, FLOAT32)
        states = load_states(states_ptr, b, n, h, T, feature, slot, H, D, M, BD, BM)
        reads = product(x, states, reads, FLOAT32)
    own = tl.sum(tl.where(same(), scores, 0.0), axis=1)
    scores = operand(scores, FLOAT32)
    sums = load_sums(sums_ptr, b, n, h, T, tl.arange(0, CHUNK), slot, H, M, BM)
    writes = load_tile(s_ptr, b, n, h, T, slot, H, M, BM).to(tl.float32)
    pairs = tl.where(earlier(), scores, 0.0)
    close = product(pairs, made(writes * near(sums, -1), FLOAT32), zeros(CHUNK, BM), FLOAT32)
    reads = decay_from_start(sums) * (reads + tl.where(sums > NEAR, close, 0.0))
    reads += own[:, None] * writes
    if not all_near(sums_ptr, b, n, h, T, slot, H, M, BM):
        for level in tl.range(0, LEVELS, num_stages=1):
            at = again(n, level)
            factor = level_decay(sums_ptr, b, at, h, T, level, slot, H, M, BM)
            decayed = factor * load_tile(s_ptr, b, at, h, T, slot, H, M, BM).to(tl.float32)
            paired = tl.where(level_pairs(level), scores, 0.0)
            reads += factor * product(paired, made(decayed, FLOAT32), zeros(CHUNK, BM), FLOAT32)
    if FINISH and GRADIENT:
        p = load_tile(p_ptr, b, n, head, T, slot, HQ, M, BM).to(tl.float32)
        # The rounded p do not sum to 1; without the division the result would not sum to 0, which
        # tells where one slot has nearly all. Rows past T have zeros.
        mean = tl.sum(p * reads, axis=1) / tl.maximum(tl.sum(p, axis=1), 1e-30)
        reads = scale * p * (reads - mean[:, None])
    elif FINISH:
        reads = tl.where((tl.arange(0, BM) < M)[None, :], scale * reads, float("-inf"))
        reads = tl.exp2((reads - tl.max(reads, axis=1)[:, None]) * LOG2E)
        reads /= tl.sum(reads, axis=1)[:, None]
    store_tile(out_ptr, reads, b, n, head, T, slot, HQ, M, BM)


@triton.jit
def gsa_outputs(
    p_ptr, v_ptr, s_ptr, sums_ptr, states_ptr, T,
    o_ptr,
    HQ: tl.constexpr, H: tl.constexpr, D: tl.constexpr, M: tl.constexpr,
    BD: tl.constexpr, BM: tl.constexpr, FLOAT32: tl.constexpr,
):  # fmt: skip
    """The outputs. With j <= i the tokens of a chunk and Hv^T the state before it, `states`,

        o_i = (p_i exp(G_i)) Hv + sum_j A[i, j] v_j;   A[i, j] = sum_m p_i s_j exp(G_i - G_j)

    A program a chunk and query head. 0.67 GB, 0.16 ms; 2000 instructions. 199 to 228 registers, 16
    to 18 KB of shared memory.
    """
    b, n, head = program(T, HQ)
    h = head // (HQ // H)
    scores = pair_scores(p_ptr, s_ptr, sums_ptr, b, n, head, h, T, HQ, H, M, BM, FLOAT32)
    rows = tl.arange(0, CHUNK)
    for feature in range(0, D, BD):
        v = load_tile(v_ptr, b, n, h, T, feature, H, D, BD)
        o = product(scores, v, zeros(CHUNK, BD), FLOAT32)
        for slot in range(0, M, BM):
            read = load_tile(p_ptr, b, n, head, T, slot, HQ, M, BM).to(tl.float32)
            read *= decay(load_sums(sums_ptr, b, n, h, T, rows, slot, H, M, BM))
            states = load_states(states_ptr, b, n, h, T, feature, slot, H, D, M, BD, BM)
            o = product(made(read, FLOAT32), tl.trans(states), o, FLOAT32)
        store_tile(o_ptr, o, b, n, head, T, feature, HQ, D, BD)
