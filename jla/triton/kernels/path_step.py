"""One token of PaTH attention: one pass over the cached keys and values."""

import triton
import triton.language as tl

NEVER = tl.constexpr(-1e30)  # below all logits, and finite


@triton.jit
def path_step(
    q_ptr, k_ptr, w_ptr, beta_ptr, key_ptr, value_ptr, length_ptr, added_ptr, S,
    o_ptr, highest_ptr, total_ptr, new_key_ptr,
    SCALE: tl.constexpr, HQ: tl.constexpr, H: tl.constexpr, K: tl.constexpr, V: tl.constexpr,
    GROUP: tl.constexpr, FIRST: tl.constexpr, PIECE: tl.constexpr, BG: tl.constexpr,
    BK: tl.constexpr, BV: tl.constexpr, BS: tl.constexpr, MOVED: tl.constexpr, GATES: tl.constexpr,
):  # fmt: skip
    """Moves PIECE keys of a key head by I - beta w w^T, in place, and attends to them.

        s = scale q keys^T + added;   new = max(highest, s);   p = exp2(s - new)
        o <- exp2(highest - new) o + p values;   total <- exp2(highest - new) total + p

    Tiles of BS keys come one after another; each place in the tile keeps a softmax of its own, so
    that no warp waits for another's before the end. All arithmetic is float32. What lies behind the
    row's tokens is neither read nor written.

    Floor: keys once in and once out, in float32, and values once in, so 8 K + 2 V bytes a token and
    key head with values of 16 bits, at 4.3 TB/s 0.3 ms a million of them at K=V=128. 128 to 149
    registers, 4 KB of shared memory.

    Args:
      key: [B, S, H, K] float32, written through. value: [B, S, H, V], with the new token's.
      length: [B] int32, before this token. added: decays of the logits in base 2, [B, S, HQ].
      o, highest, total: a piece's, [B, H, pieces, GROUP, ...].
      GROUP: query heads in this pass, from FIRST on in their key head's group. MOVED: whether an
        earlier pass has moved the keys.
    """
    b = tl.program_id(0) // H // tl.cdiv(S, PIECE)
    _advance(
        q_ptr, k_ptr, w_ptr, beta_ptr, key_ptr, value_ptr, length_ptr, added_ptr, S,
        o_ptr, highest_ptr, total_ptr, b,
        SCALE, HQ, H, K, V, GROUP, FIRST, PIECE, BG, BK, BV, BS, MOVED, GATES,
    )  # fmt: skip


@triton.jit
def path_step_on_pool(
    q_ptr, k_ptr, w_ptr, beta_ptr, key_ptr, value_ptr, length_ptr, added_ptr, S, slots_ptr, R,
    o_ptr, highest_ptr, total_ptr, new_key_ptr,
    SCALE: tl.constexpr, HQ: tl.constexpr, H: tl.constexpr, K: tl.constexpr, V: tl.constexpr,
    GROUP: tl.constexpr, FIRST: tl.constexpr, PIECE: tl.constexpr, BG: tl.constexpr,
    BK: tl.constexpr, BV: tl.constexpr, BS: tl.constexpr, MOVED: tl.constexpr, GATES: tl.constexpr,
):  # fmt: skip
    """`path_step` of a pool of R rows of keys and values, of which a program has the one that
    `slots`, [B], names. Lengths and decays are those of the B rows. Without a slot it writes
    nothing."""
    row = tl.load(slots_ptr + tl.program_id(0) // H // tl.cdiv(S, PIECE))
    if (row >= 0) & (row < R):
        _advance(
            q_ptr, k_ptr, w_ptr, beta_ptr, key_ptr, value_ptr, length_ptr, added_ptr, S,
            o_ptr, highest_ptr, total_ptr, row,
            SCALE, HQ, H, K, V, GROUP, FIRST, PIECE, BG, BK, BV, BS, MOVED, GATES,
        )  # fmt: skip


@triton.jit
def _advance(
    q_ptr, k_ptr, w_ptr, beta_ptr, key_ptr, value_ptr, length_ptr, added_ptr, S,
    o_ptr, highest_ptr, total_ptr, row_of_cache,
    SCALE: tl.constexpr, HQ: tl.constexpr, H: tl.constexpr, K: tl.constexpr, V: tl.constexpr,
    GROUP: tl.constexpr, FIRST: tl.constexpr, PIECE: tl.constexpr, BG: tl.constexpr,
    BK: tl.constexpr, BV: tl.constexpr, BS: tl.constexpr, MOVED: tl.constexpr, GATES: tl.constexpr,
):  # fmt: skip
    pieces = tl.cdiv(S, PIECE)
    program = tl.program_id(0)
    h, piece, b = program % H, program // H % pieces, program // H // pieces
    group, place = tl.arange(0, BG)[:, None, None], tl.arange(0, BS)[None, :, None]
    kk, vv = tl.arange(0, BK)[None, None, :], tl.arange(0, BV)[None, None, :]
    length = tl.load(length_ptr + b)
    beta = tl.load(beta_ptr + b * H + h).to(tl.float32)
    shared = (b * H + h) * K + kk
    w = tl.load(w_ptr + shared, kk < K, 0.0).to(tl.float32)
    k = tl.load(k_ptr + shared, kk < K, 0.0).to(tl.float32)
    in_group = group < GROUP
    head = h * (HQ // H) + FIRST + group
    q = tl.load(q_ptr + (b * HQ + head) * K + kk, in_group & (kk < K), 0.0).to(tl.float32)
    q *= SCALE
    row, of_cache = b.to(tl.int64) * S, row_of_cache.to(tl.int64) * S
    highest = tl.full((BG, BS, 1), NEVER, tl.float32)
    total = tl.zeros((BG, BS, 1), tl.float32)
    acc = tl.zeros((BG, BS, BV), tl.float32)
    end = tl.minimum(tl.minimum(length + 1, S), (piece + 1) * PIECE)
    for start in range(piece * PIECE, end, BS):
        at = start + place
        there = at < end
        address = (of_cache + at) * H + h
        keys = tl.load(key_ptr + address * K + kk, there & (kk < K), 0.0).to(tl.float32)
        values = tl.load(value_ptr + address * V + vv, there & (vv < V), 0.0).to(tl.float32)
        if not MOVED:
            keys -= beta * tl.sum(keys * w, axis=2, keep_dims=True) * w
            keys = tl.where(at == length, k, keys)
            tl.store(key_ptr + address * K + kk, keys, there & (kk < K))
        logits = tl.sum(keys * q, axis=2, keep_dims=True)
        if GATES:
            logits += tl.load(added_ptr + (row + at) * HQ + head, there & in_group, 0.0)
        new = tl.where(there, tl.maximum(highest, logits), highest)
        p = tl.where(there, tl.exp2(logits - new), 0.0)
        kept = tl.exp2(highest - new)
        total = total * kept + p
        acc = acc * kept + p * values
        highest = new
    top = tl.max(highest, axis=1, keep_dims=True)
    weight = tl.exp2(highest - top)
    out = program * GROUP + group
    acc = tl.sum(acc * weight, axis=1, keep_dims=True)
    total = tl.sum(total * weight, axis=1, keep_dims=True)
    order = (b * H + h) * pieces + piece
    out = order.to(tl.int64) * GROUP + group
    tl.store(o_ptr + out * V + vv, acc, in_group & (vv < V))
    tl.store(highest_ptr + out, top, in_group)
    tl.store(total_ptr + out, total, in_group)
