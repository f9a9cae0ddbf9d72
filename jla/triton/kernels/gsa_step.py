"""One token of Gated Slot Attention: one pass over both states, which are updated in place."""

import triton
import triton.language as tl


@triton.jit
def gsa_step(
    q, k, v, s, g, hk, hv,  # pointers, see `jla.gsa_step`
    o, new_hk, new_hv,  # [B, HQ, V]; the states', which are written through `hk` and `hv`
    scale: tl.constexpr, HQ: tl.constexpr, H: tl.constexpr, K: tl.constexpr, V: tl.constexpr,
    M: tl.constexpr, BM: tl.constexpr, BG: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr,
):  # fmt: skip
    """A program updates both states of a head, BK rows of Hk and BV columns of Hv at a time:

        Hk <- Hk Diag(exp g) + k s^T;   Hv <- Diag(exp g) Hv + s v^T
        p = softmax(scale Hk^T q);      o = Hv^T p

    BM and BG, powers of two, hold the slots and the query heads of a head; what lies beyond is
    masked.
    """
    head = tl.program_id(0)  # b * H + the head
    _advance(
        q, k, v, s, g, hk, hv, o, head, head, scale, HQ, H, K, V, M, BM, BG, BK, BV
    )  # fmt: skip


@triton.jit
def gsa_step_on_pool(
    q, k, v, s, g, hk, hv, slots, R, o, new_hk, new_hv,
    scale: tl.constexpr, HQ: tl.constexpr, H: tl.constexpr, K: tl.constexpr, V: tl.constexpr,
    M: tl.constexpr, BM: tl.constexpr, BG: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr,
):  # fmt: skip
    """`gsa_step` of a pool of R rows, of which a program has the one that `slots`, [B], names."""
    GROUP: tl.constexpr = HQ // H
    head = tl.program_id(0)
    row = tl.load(slots + head // H)
    if (row >= 0) & (row < R):
        _advance(
            q, k, v, s, g, hk, hv, o, head, row * H + head % H,
            scale, HQ, H, K, V, M, BM, BG, BK, BV,
        )  # fmt: skip
    else:
        for column in range(0, V, BV):
            columns = column + tl.arange(0, BV)
            for member in range(0, GROUP):
                place = o + (head * GROUP + member) * V + columns
                tl.store(place, tl.zeros((BV,), o.dtype.element_ty), columns < V)


@triton.jit
def _advance(
    q, k, v, s, g, hk, hv, o, head, head_of_state,
    scale: tl.constexpr, HQ: tl.constexpr, H: tl.constexpr, K: tl.constexpr, V: tl.constexpr,
    M: tl.constexpr, BM: tl.constexpr, BG: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr,
):  # fmt: skip
    GROUP: tl.constexpr = HQ // H
    m, members = tl.arange(0, BM), tl.arange(0, BG)[:, None]
    in_m = m < M
    decay = tl.exp(tl.load(g + head * M + m, in_m, 0.0))
    writes = tl.load(s + head * M + m, in_m, 0.0).to(tl.float32)
    logits = tl.zeros((BG, BM), tl.float32)
    for row in range(0, K, BK):
        rows = row + tl.arange(0, BK)
        in_k = rows < K
        inside = in_k[:, None] & in_m[None, :]
        place = hk + head_of_state.to(tl.int64) * (K * M) + (rows[:, None] * M + m[None, :])
        key = tl.load(k + head * K + rows, in_k, 0.0).to(tl.float32)
        state = tl.load(place, inside, 0.0) * decay[None, :] + key[:, None] * writes[None, :]
        tl.store(place, state, inside)
        for member in range(0, GROUP):
            query = tl.load(q + (head * GROUP + member) * K + rows, in_k, 0.0).to(tl.float32)
            logit = tl.sum(state * query[:, None], 0)
            logits += tl.where(members == member, logit[None, :], 0.0)
    logits = tl.where(in_m[None, :], scale * logits, float("-inf"))
    p = tl.exp(logits - tl.max(logits, 1)[:, None])
    p /= tl.sum(p, 1)[:, None]
    for column in range(0, V, BV):
        columns = column + tl.arange(0, BV)
        in_v = columns < V
        inside = in_m[:, None] & in_v[None, :]
        place = hv + head_of_state.to(tl.int64) * (M * V) + (m[:, None] * V + columns[None, :])
        value = tl.load(v + head * V + columns, in_v, 0.0).to(tl.float32)
        state = tl.load(place, inside, 0.0) * decay[:, None] + writes[:, None] * value[None, :]
        tl.store(place, state, inside)
        for member in range(0, GROUP):
            weights = tl.sum(tl.where(members == member, p, 0.0), 0)
            read = tl.sum(state * weights[:, None], 0)
            place_o = o + (head * GROUP + member) * V + columns
            tl.store(place_o, read.to(o.dtype.element_ty), in_v)
