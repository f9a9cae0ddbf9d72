"""One token of KDA: one pass over the state, which is updated in place."""

import triton
import triton.language as tl


@triton.jit
def kda_step(
    q, k, v, g, beta, state,  # pointers, see `jla.kda_step`
    o, new_state,  # [B, HV, V]; the state's, which is written through `state`
    scale: tl.constexpr, H: tl.constexpr, HV: tl.constexpr, K: tl.constexpr, V: tl.constexpr,
    BK: tl.constexpr, BV: tl.constexpr,
):  # fmt: skip
    """A program updates BV columns of one value head's state [K, V], with all K rows.

    Both sums over K, for the error and for the output, are taken of the decayed state, so that
    they need one exchange between warps: with D the decayed state, e the error and S the new state,

        e = v - D^T k;   S = D + beta k e^T;   S^T q = D^T q + (q . k) beta e

    BK and BV are powers of 2, BK at least K; what lies beyond K and V is masked.
    """
    blocks: tl.constexpr = (V + BV - 1) // BV
    program = tl.program_id(0)
    head = program // blocks  # b * HV + the value head
    _advance(
        q, k, v, g, beta, state, o, head, head, program % blocks, scale, H, HV, K, V, BK, BV
    )  # fmt: skip


@triton.jit
def kda_step_on_pool(
    q, k, v, g, beta, state, slots, R, o, new_state,
    scale: tl.constexpr, H: tl.constexpr, HV: tl.constexpr, K: tl.constexpr, V: tl.constexpr,
    BK: tl.constexpr, BV: tl.constexpr,
):  # fmt: skip
    """`kda_step` of a pool of R rows, of which a program has the one that `slots`, [B], names."""
    blocks: tl.constexpr = (V + BV - 1) // BV
    program = tl.program_id(0)
    head = program // blocks
    row = tl.load(slots + head // HV)
    if (row >= 0) & (row < R):
        _advance(
            q, k, v, g, beta, state, o, head, row * HV + head % HV, program % blocks,
            scale, H, HV, K, V, BK, BV,
        )  # fmt: skip
    else:
        columns = program % blocks * BV + tl.arange(0, BV)
        tl.store(o + head * V + columns, tl.zeros((BV,), o.dtype.element_ty), columns < V)


@triton.jit
def _advance(
    q, k, v, g, beta, state, o, head, head_of_state, block,
    scale: tl.constexpr, H: tl.constexpr, HV: tl.constexpr, K: tl.constexpr, V: tl.constexpr,
    BK: tl.constexpr, BV: tl.constexpr,
):  # fmt: skip
    key_head = head // HV * H + head % HV // (HV // H)
    rows, columns = tl.arange(0, BK), block * BV + tl.arange(0, BV)
    in_k, in_v = rows < K, columns < V
    inside = in_k[:, None] & in_v[None, :]
    place = state + head_of_state.to(tl.int64) * (K * V) + (rows[:, None] * V + columns[None, :])
    # First, for it takes longest: the others' barriers then pass while it is on its way.
    before = tl.load(place, inside, 0.0)
    query = tl.load(q + key_head * K + rows, in_k, 0.0).to(tl.float32)
    key = tl.load(k + key_head * K + rows, in_k, 0.0).to(tl.float32)
    decay = tl.exp(tl.load(g + head * K + rows, in_k, 0.0))
    decayed = before * decay[:, None]
    write = tl.load(v + head * V + columns, in_v, 0.0).to(tl.float32)
    write -= tl.sum(decayed * key[:, None], 0)
    write *= tl.load(beta + head).to(tl.float32)
    read = tl.sum(decayed * query[:, None], 0) + tl.sum(query * key, 0) * write
    tl.store(place, decayed + key[:, None] * write[None, :], inside)
    tl.store(o + head * V + columns, (scale * read).to(o.dtype.element_ty), in_v)
