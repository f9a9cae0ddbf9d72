"""PaTH's forward pass over the tree: flash attention whose queries and keys change by level."""

import triton
import triton.language as tl

from jla.triton.kernels.path_tree import LEAF, key_place, query_place, tile, tokens
from jla.triton.kernels.pieces import dot_add, zeros


@triton.jit
def _attend(highest, total, acc, logits, v):
    """The online softmax's next keys."""
    new = tl.maximum(highest, tl.max(logits, axis=1))
    p, kept = tl.exp2(logits - new[:, None]), tl.exp2(highest - new)
    total = total * kept + tl.sum(p, axis=1)
    return new, total, dot_add(p.to(v.dtype), v, acc * kept[:, None])


@triton.jit
def path_forward(
    queries_ptr, keys_ptr, v_ptr, own_ptr, highest_ptr, from_middle_ptr, to_middle_ptr,
    levels, P, R, S,
    o_ptr, lse_ptr,
    HQ: tl.constexpr, H: tl.constexpr, K: tl.constexpr, V: tl.constexpr, BLOCK: tl.constexpr,
    BI: tl.constexpr, GATES: tl.constexpr,
):  # fmt: skip
    """The outputs and the logits' log-sum-exp in base 2. A program has BLOCK queries of one head.

    BLOCK tokens are a part of a leaf, or two leaves: these differ at level 0 alone. Keys come BI at
    a time.

    0.55 TFLOP, floor 0.70 ms, predicted 1.6, as sm_80 2.6; 209, 209, 199 registers, 64,
    64, 128 KB.

    Args:
      from_middle, to_middle: with GATES, the gates from a level's middle to each query version's
        token, [B, HQ, 64 R], and from each key version's to the middle, [B, HQ, 64 S].
    """
    LEAVES: tl.constexpr = (BLOCK + 63) // 64
    blocks = P * LEAF // BLOCK
    program = tl.program_id(0)
    head, first = program // blocks, (blocks - 1 - program % blocks) * BLOCK
    h, b = head % HQ, head // HQ
    kh = h // (HQ // H)
    leaf, key_head = first // LEAF, b * H + kh
    rows = tl.arange(0, BLOCK)
    i, inside = tl.arange(0, BI), first % LEAF

    row = (head * P * LEAF + first).to(tl.int64)
    highest = tl.load(highest_ptr + row + rows)
    total = tl.zeros((BLOCK,), tl.float32)
    acc = zeros(BLOCK, V)
    for n in tl.static_range(LEAVES):
        for at in range(0, LEAF, BI):
            mine = (rows // LEAF == n)[:, None] & (i >= 0)[None, :]
            places = own_ptr + (row + rows)[:, None] * LEAF + (at + i)[None, :]
            p = tl.load(places, mask=mine, other=0.0)
            v = tl.load(tokens(v_ptr, b, kh, (leaf + n) * LEAF + at, P, 0, H, V, BI, V))
            total += tl.sum(p.to(tl.float32), axis=1)
            acc = dot_add(p.to(v.dtype), v, acc)

    if LEAVES == 2:
        right = (rows >= LEAF)[:, None]
        query = (head * R + query_place(leaf + 1, 0, P) - 1) * LEAF
        q = tl.load(tile(queries_ptr, query, 0, K, BLOCK, K), mask=right, other=0.0)
        key = (key_head * S + key_place(leaf, 0, P)) * LEAF
        if GATES:
            gates = tl.load(from_middle_ptr + query.to(tl.int64) + rows, rows >= LEAF, 0.0)
            gate = (head * S + key_place(leaf, 0, P)) * LEAF
        for at in range(0, LEAF, BI):
            k = tl.load(tile(keys_ptr, key + at, 0, K, BI, K))
            v = tl.load(tokens(v_ptr, b, kh, leaf * LEAF + at, P, 0, H, V, BI, V))
            logits = dot_add(q, tl.trans(k), zeros(BLOCK, BI))
            if GATES:
                logits += gates[:, None]
                logits += tl.load(to_middle_ptr + (gate + at).to(tl.int64) + i)[None, :]
            logits = tl.where(right, logits, float("-inf"))
            highest, total, acc = _attend(highest, total, acc, logits, v)

    for level in range(LEAVES - 1, levels):
        if ((leaf >> level) & 1) == 1:
            query = (head * R + query_place(leaf, level, P)) * LEAF + inside
            q = tl.load(tile(queries_ptr, query, 0, K, BLOCK, K))
            start = ((leaf >> level) - 1) << level
            place = key_place(start, level, P)
            key, gate = (key_head * S + place) * LEAF, (head * S + place) * LEAF
            if GATES:
                gates = tl.load(from_middle_ptr + query.to(tl.int64) + rows)
            for at in range(0, (1 << level) * LEAF, BI):
                k = tl.load(tile(keys_ptr, key + at, 0, K, BI, K))
                v = tl.load(tokens(v_ptr, b, kh, start * LEAF + at, P, 0, H, V, BI, V))
                logits = dot_add(q, tl.trans(k), zeros(BLOCK, BI))
                if GATES:
                    logits += gates[:, None]
                    logits += tl.load(to_middle_ptr + (gate + at).to(tl.int64) + i)[None, :]
                highest, total, acc = _attend(highest, total, acc, logits, v)

    o = (acc / total[:, None]).to(o_ptr.dtype.element_ty)
    tl.store(tokens(o_ptr, b, h, first, P, 0, HQ, V, BLOCK, V), o)
    tl.store(lse_ptr + row + rows, highest + tl.log2(total))
