"""One token of log-linear attention: one pass over the levels in use, updated in place."""

import triton
import triton.language as tl


@triton.jit
def log_linear_step(
    q, k, v,  # pointers, see `jla.log_linear_step`
    decays,  # [B, HV, L], the log decays still to be applied to the levels
    level_scales, levels, position,
    o, new_levels,  # [B, HV, V]; the levels', which are written through `levels`
    H: tl.constexpr, HV: tl.constexpr, L: tl.constexpr, K: tl.constexpr, V: tl.constexpr,
    LAZY: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr,
):  # fmt: skip
    """A program updates BV columns of one head's levels [K, V], with all K rows.

    The lowest levels in use, as many as the position has trailing ones, merge into the level above
    them, which is written. Unless LAZY, they leave zeros, and the others decay. Level 0 is the
    token itself.

    BK and BV are powers of 2, BK at least K; what lies beyond K and V is masked.
    """
    blocks: tl.constexpr = (V + BV - 1) // BV
    program = tl.program_id(0)
    head = program // blocks  # b * HV + the value head
    _advance(
        q, k, v, decays, level_scales, levels, position, o, head, head, program % blocks,
        H, HV, L, K, V, LAZY, BK, BV,
    )  # fmt: skip


@triton.jit
def log_linear_step_on_pool(
    q, k, v, decays, level_scales, levels, position, slots, R, o, new_levels,
    H: tl.constexpr, HV: tl.constexpr, L: tl.constexpr, K: tl.constexpr, V: tl.constexpr,
    LAZY: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr,
):  # fmt: skip
    """`log_linear_step` of a pool of R rows of levels, of which a program has the one that `slots`,
    [B], names. The positions are those of the B rows."""
    blocks: tl.constexpr = (V + BV - 1) // BV
    program = tl.program_id(0)
    head = program // blocks
    row = tl.load(slots + head // HV)
    if (row >= 0) & (row < R):
        _advance(
            q, k, v, decays, level_scales, levels, position, o, head, row * HV + head % HV,
            program % blocks, H, HV, L, K, V, LAZY, BK, BV,
        )  # fmt: skip
    else:
        columns = program % blocks * BV + tl.arange(0, BV)
        tl.store(o + head * V + columns, tl.zeros((BV,), o.dtype.element_ty), columns < V)


@triton.jit
def _advance(
    q, k, v, decays, level_scales, levels, position, o, head, head_of_state, block,
    H: tl.constexpr, HV: tl.constexpr, L: tl.constexpr, K: tl.constexpr, V: tl.constexpr,
    LAZY: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr,
):  # fmt: skip
    top: tl.constexpr = L - 1
    key_head = head // HV * H + head % HV // (HV // H)
    rows, columns = tl.arange(0, BK), block * BV + tl.arange(0, BV)
    in_k, in_v = rows < K, columns < V
    inside = in_k[:, None] & in_v[None, :]
    place = levels + head_of_state.to(tl.int64) * (L * K * V)
    place += rows[:, None] * V + columns[None, :]
    scales = level_scales + head * L
    at = tl.load(position + head // HV)
    query = tl.load(q + key_head * K + rows, in_k, 0.0).to(tl.float32)
    key = tl.load(k + key_head * K + rows, in_k, 0.0).to(tl.float32)
    value = tl.load(v + head * V + columns, in_v, 0.0).to(tl.float32)
    # Each element's share of the output, which is summed over K once.
    merged = key[:, None] * value[None, :]
    read = tl.load(scales).to(tl.float32) * merged
    merging = (at >= 0).to(tl.int1)
    for i in range(top):
        used = ((at >> i) & 1) == 1
        merging = merging & used
        if used:
            level = place + (i + 1) * (K * V)
            decay = tl.exp(tl.load(decays + head * L + i + 1))
            x = decay * tl.load(level, inside, 0.0)
            read += tl.load(scales + i + 1).to(tl.float32) * x
            if merging:
                merged += x
                x = tl.zeros((BK, BV), tl.float32)
            if not LAZY:
                tl.store(level, x, inside)
    ones = _trailing_ones(at)
    if ones < top:
        tl.store(place + (ones + 1) * (K * V), merged, inside)
    out = tl.sum(query[:, None] * read, 0)
    # As the definition: what L levels do not serve is no number.
    beyond = (at >> top) != 0
    out = tl.where(beyond, float("nan"), out)
    tl.store(o + head * V + columns, out.to(o.dtype.element_ty), in_v)
    if not LAZY:  # where the position says it
        if beyond | (at == 2147483647):
            for i in range(L):
                tl.store(place + i * (K * V), tl.full((BK, BV), float("nan"), tl.float32), inside)


@triton.jit
def _trailing_ones(x):
    count = x * 0
    for i in tl.static_range(32):
        count += (((x >> i) & 1) == 1).to(tl.int32) * (count == i).to(tl.int32)
    return count
