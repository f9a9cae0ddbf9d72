"""PaTH's backward pass over the tree: gradients of versions, of values and of transforms.

Probabilities are made again from the log-sum-exp. Levels are processed from the top down: a version
is the version of the level below times a matrix, so the lower one's gradient starts with the upper
one's times the transposed matrix, and the gradient written for a level includes everything that
depends on that version. Each row is written as numbers of at most 1, of the operands' dtype, and a
float32 factor.

The gradients of logits are operands of products, and float16 for 16-bit inputs. `unit`, a power of
two for each key head, brings them into its range; all gradients here are in that unit, and those of
natural, not of base-2 logits: `path_leaf_gradients` makes the last factors good.

Args of the kernels, besides `path_forward`'s:
  do: [B, 64 P, HQ, V]. lse, delta: [B, HQ, 64 P]; delta in the unit. unit: [B, H].
"""

import triton
import triton.language as tl

from jla.triton.kernels.path_tree import (
    LEAF,
    key_place,
    lowest_bit,
    normalised,
    query_place,
    sibling,
    tile,
    tokens,
    transform_place,
)
from jla.triton.kernels.pieces import dot_add, zeros


@triton.jit
def _moved_back(
    gradients_ptr, row, factor, transforms_ptr, transform, K: tl.constexpr,
    ROWS: tl.constexpr, BH: tl.constexpr, KEYS: tl.constexpr,
):  # fmt: skip
    """The upper version's gradient times the transposed transform; zeros for a negative row."""
    x = zeros(ROWS, K)
    # The number of features must not be what the levels' loop carries: Triton 3.6 takes for unused
    # what is only the end of an inner loop, and makes the loop over no features.
    for k in range(0, tl.where(row < 0, 0, K), BH):
        part = tl.load(tile(gradients_ptr, row, k, K, ROWS, BH))
        if KEYS:
            x = dot_add(part, tl.load(tile(transforms_ptr, transform + k, 0, K, BH, K)), x)
        else:
            h = tl.load(tile(transforms_ptr, transform, k, K, K, BH))
            x = dot_add(part, tl.trans(h), x)
    return x * factor[:, None]


@triton.jit
def _attend_back(
    acc, q, do, shift, delta, unit, keys_ptr, key, v_ptr, b, kh, first, to_middle_ptr, gate, count,
    P, H: tl.constexpr, K: tl.constexpr, V: tl.constexpr, BLOCK: tl.constexpr, BI: tl.constexpr,
    GATES: tl.constexpr, DTYPE: tl.constexpr,
):  # fmt: skip
    """acc and the logits' gradients times `count` keys, and their sums over the keys.

    Args:
      shift: what to add to a row's logits; -inf in rows that see none of the keys.
      key, first, gate: the first key's row in its versions, its token, its row in `to_middle`.
    """
    i = tl.arange(0, BI)
    sums = tl.zeros((BLOCK,), tl.float32)
    for at in range(0, count, BI):
        k = tl.load(tile(keys_ptr, key + at, 0, K, BI, K))
        v = tl.load(tokens(v_ptr, b, kh, first + at, P, 0, H, V, BI, V))
        logits = dot_add(q, tl.trans(k), zeros(BLOCK, BI))
        dp = dot_add(do, tl.trans(v), zeros(BLOCK, BI))
        logits += shift[:, None]
        if GATES:
            logits += tl.load(to_middle_ptr + (gate + at).to(tl.int64) + i)[None, :]
        ds = tl.exp2(logits) * (dp * unit - delta[:, None])
        if GATES:
            sums += tl.sum(ds, axis=1)
        acc = dot_add(ds.to(DTYPE), k, acc)
    return acc, sums


@triton.jit
def path_query_gradients(
    queries_ptr, keys_ptr, v_ptr, do_ptr, lse_ptr, delta_ptr, unit_ptr, transforms_ptr,
    from_middle_ptr, to_middle_ptr, levels, P, R, S, N,
    gradients_ptr, factors_ptr, sums_ptr,
    HQ: tl.constexpr, H: tl.constexpr, K: tl.constexpr, V: tl.constexpr, BLOCK: tl.constexpr,
    BI: tl.constexpr, BH: tl.constexpr, GATES: tl.constexpr,
):  # fmt: skip
    """The gradients of all query versions, and with GATES of `from_middle` (sums).

    A program has BLOCK queries of one head, as in `path_forward`.

    0.82 TFLOP, floor 1.06 ms, predicted 2.5, as sm_80 4.5; 236, 248, 237 registers, 80,
    80, 128 KB.
    """
    DTYPE: tl.constexpr = gradients_ptr.dtype.element_ty
    LEAVES: tl.constexpr = (BLOCK + 63) // 64
    blocks = P * LEAF // BLOCK
    program = tl.program_id(0)
    head, first = program // blocks, (blocks - 1 - program % blocks) * BLOCK
    h, b = head % HQ, head // HQ
    kh = h // (HQ // H)
    leaf, key_head, inside = first // LEAF, b * H + kh, first % LEAF
    rows = tl.arange(0, BLOCK)
    row = (head * P * LEAF + first).to(tl.int64)
    do = tl.load(tokens(do_ptr, b, h, first, P, 0, HQ, V, BLOCK, V))
    lse = tl.load(lse_ptr + row + rows)
    delta = tl.load(delta_ptr + row + rows)
    unit = tl.load(unit_ptr + key_head)
    factor = tl.zeros((BLOCK,), tl.float32)
    above = leaf * 0 - 1  # the row of the version above; none yet

    for x in range(levels - (LEAVES - 1)):
        level = levels - 1 - x
        if ((leaf >> level) & 1) == 1:
            start = ((leaf >> level) - 1) << level
            transform = (key_head * N + transform_place(start >> level, level, P)) * K
            acc = _moved_back(
                gradients_ptr, above, factor, transforms_ptr, transform, K, BLOCK, BH, False
            )
            query = (head * R + query_place(leaf, level, P)) * LEAF + inside
            q = tl.load(tile(queries_ptr, query, 0, K, BLOCK, K))
            place, shift = key_place(start, level, P), -lse
            if GATES:
                shift += tl.load(from_middle_ptr + query.to(tl.int64) + rows)
            acc, sums = _attend_back(
                acc, q, do, shift, delta, unit, keys_ptr, (key_head * S + place) * LEAF, v_ptr,
                b, kh, start * LEAF, to_middle_ptr, (head * S + place) * LEAF, (1 << level) * LEAF,
                P, H, K, V, BLOCK, BI, GATES, DTYPE,
            )  # fmt: skip
            scaled, factor = normalised(acc, DTYPE)
            tl.store(tile(gradients_ptr, query, 0, K, BLOCK, K), scaled)
            tl.store(factors_ptr + query.to(tl.int64) + rows, factor)
            if GATES:
                tl.store(sums_ptr + query.to(tl.int64) + rows, sums)
            above = query
        tl.debug_barrier()

    if LEAVES == 2:
        right = rows >= LEAF
        transform = (key_head * N + leaf) * K
        acc = _moved_back(
            gradients_ptr, above, factor, transforms_ptr, transform, K, BLOCK, BH, False
        )
        query = (head * R + query_place(leaf + 1, 0, P) - 1) * LEAF
        q = tl.load(tile(queries_ptr, query, 0, K, BLOCK, K), mask=right[:, None], other=0.0)
        place, shift = key_place(leaf, 0, P), tl.where(right, -lse, float("-inf"))
        if GATES:
            shift += tl.load(from_middle_ptr + query.to(tl.int64) + rows, right, 0.0)
        acc, sums = _attend_back(
            acc, q, do, shift, delta, unit, keys_ptr, (key_head * S + place) * LEAF, v_ptr,
            b, kh, leaf * LEAF, to_middle_ptr, (head * S + place) * LEAF, LEAF,
            P, H, K, V, BLOCK, BI, GATES, DTYPE,
        )  # fmt: skip
        scaled, factor = normalised(acc, DTYPE)
        tl.store(tile(gradients_ptr, query, 0, K, BLOCK, K), scaled, mask=right[:, None])
        tl.store(factors_ptr + query.to(tl.int64) + rows, factor, mask=right)
        if GATES:
            tl.store(sums_ptr + query.to(tl.int64) + rows, sums, mask=right)


@triton.jit
def _own_values(
    own_ptr, highest_ptr, lse_ptr, do_ptr, b, kh, first, P, HQ: tl.constexpr, H: tl.constexpr,
    V: tl.constexpr, BLOCK: tl.constexpr, BI: tl.constexpr,
):  # fmt: skip
    """The gradient of the values that comes from their own leaves' queries."""
    rows, i = tl.arange(0, BLOCK), tl.arange(0, BI)
    leaf, inside = first // LEAF, first % LEAF
    dv = zeros(BLOCK, V)
    for h in range(kh * (HQ // H), (kh + 1) * (HQ // H)):
        for n in tl.static_range((BLOCK + 63) // 64):
            mine = (rows // LEAF == n)[:, None] & (i >= 0)[None, :]
            for at in range(0, LEAF, BI):
                query = ((b * HQ + h) * P + leaf + n).to(tl.int64) * LEAF + at
                places = own_ptr + (query + i)[None, :] * LEAF + (inside + rows)[:, None] % LEAF
                p = tl.load(places, mask=mine, other=0.0).to(tl.float32)
                kept = tl.load(highest_ptr + query + i) - tl.load(lse_ptr + query + i)
                p *= tl.exp2(kept)[None, :]
                start = (leaf + n) * LEAF + at
                do = tl.load(tokens(do_ptr, b, h, start, P, 0, HQ, V, BI, V))
                dv = dot_add(p.to(do.dtype), do, dv)
    return dv


@triton.jit
def _attended_back(
    acc, dv, k, v, gates, unit, queries_ptr, query, do_ptr, b, h, first, lse_ptr, delta_ptr, token,
    from_middle_ptr, count, P, HQ: tl.constexpr, K: tl.constexpr, V: tl.constexpr,
    BLOCK: tl.constexpr, BI: tl.constexpr, GATES: tl.constexpr, MASKED: tl.constexpr,
    DTYPE: tl.constexpr,
):  # fmt: skip
    """acc and dv, and what `count` queries of a head add to them, and sums over the queries.

    Args:
      gates: what to add to a row's logits; MASKED: -inf in rows that none of the queries sees.
      query, first, token: the first query's row in its versions, its token, its row in lse.
    """
    i = tl.arange(0, BI)
    sums = tl.zeros((BLOCK,), tl.float32)
    for at in range(0, count, BI):
        q = tl.load(tile(queries_ptr, query + at, 0, K, BI, K))
        do = tl.load(tokens(do_ptr, b, h, first + at, P, 0, HQ, V, BI, V))
        shift = -tl.load(lse_ptr + token + at + i)
        delta = tl.load(delta_ptr + token + at + i)
        logits = dot_add(k, tl.trans(q), zeros(BLOCK, BI))
        if GATES:
            shift += tl.load(from_middle_ptr + (query + at).to(tl.int64) + i)
        if GATES or MASKED:
            logits += gates[:, None]
        p = tl.exp2(logits + shift[None, :])
        dv = dot_add(p.to(do.dtype), do, dv)
        dp = dot_add(v, tl.trans(do), zeros(BLOCK, BI))
        ds = p * (dp * unit - delta[None, :])
        if GATES:
            sums += tl.sum(ds, axis=1)
        acc = dot_add(ds.to(DTYPE), q, acc)
    return acc, dv, sums


@triton.jit
def _of_queries(
    acc, dv, k, v, factor, unit, queries_ptr, do_ptr, lse_ptr, delta_ptr,
    from_middle_ptr, to_middle_ptr, sums_ptr, b, kh, place, inside, level, start, end, P, R, S,
    HQ: tl.constexpr, H: tl.constexpr, K: tl.constexpr, V: tl.constexpr, BLOCK: tl.constexpr,
    BI: tl.constexpr, GATES: tl.constexpr, MASKED: tl.constexpr, DTYPE: tl.constexpr,
):  # fmt: skip
    """acc and dv with what the `end` queries from leaf `start` on, of all heads, add. MASKED: from
    the next leaf on, and to the first leaf's keys alone."""
    NEXT: tl.constexpr = 1 if MASKED else 0
    rows = tl.arange(0, BLOCK)
    left = rows < LEAF
    for h in range(kh * (HQ // H), (kh + 1) * (HQ // H)):
        head = b * HQ + h
        gate = ((head * S + place) * LEAF + inside).to(tl.int64)
        gates = factor
        if MASKED:
            gates = tl.where(left, 0.0, float("-inf"))
            if GATES:
                gates += tl.load(to_middle_ptr + gate + rows, left, 0.0)
        elif GATES:
            gates = tl.load(to_middle_ptr + gate + rows)
        acc, dv, sums = _attended_back(
            acc, dv, k, v, gates, unit,
            queries_ptr, (head * R + query_place(start + NEXT, level, P)) * LEAF,
            do_ptr, b, h, (start + NEXT) * LEAF,
            lse_ptr, delta_ptr, (head * P + start + NEXT).to(tl.int64) * LEAF,
            from_middle_ptr, end, P, HQ, K, V, BLOCK, BI, GATES, MASKED, DTYPE,
        )  # fmt: skip
        if GATES and MASKED:
            tl.store(sums_ptr + gate + rows, sums, mask=left)
        elif GATES:
            tl.store(sums_ptr + gate + rows, sums)
    return acc, dv


@triton.jit
def path_key_gradients(
    queries_ptr, keys_ptr, v_ptr, do_ptr, lse_ptr, delta_ptr, unit_ptr, transforms_ptr, own_ptr,
    highest_ptr, from_middle_ptr, to_middle_ptr, levels, P, R, S, N,
    gradients_ptr, factors_ptr, dv_ptr, sums_ptr,
    HQ: tl.constexpr, H: tl.constexpr, K: tl.constexpr, V: tl.constexpr, BLOCK: tl.constexpr,
    BI: tl.constexpr, BH: tl.constexpr, GATES: tl.constexpr,
):  # fmt: skip
    """The gradients of all key versions and of the values, and with GATES of `to_middle` (sums).

    A program has BLOCK keys of one head, as `path_forward` has queries; queries come BI at a time.

    1.10 TFLOP, floor 1.41 ms, predicted 4, as sm_80 6; 255 registers, of which 120, 96,
    296 bytes spill with gates, 80, 80, 129 KB.
    """
    DTYPE: tl.constexpr = gradients_ptr.dtype.element_ty
    LEAVES: tl.constexpr = (BLOCK + 63) // 64
    blocks = P * LEAF // BLOCK
    program = tl.program_id(0)
    key_head, first = program // blocks, program % blocks * BLOCK
    kh, b = key_head % H, key_head // H
    leaf, inside = first // LEAF, first % LEAF
    rows = tl.arange(0, BLOCK)
    unit = tl.load(unit_ptr + key_head)
    factor = tl.zeros((BLOCK,), tl.float32)
    above = leaf * 0 - 1  # the row of the version above; none yet
    dv = _own_values(own_ptr, highest_ptr, lse_ptr, do_ptr, b, kh, first, P, HQ, H, V, BLOCK, BI)
    v = tl.load(tokens(v_ptr, b, kh, first, P, 0, H, V, BLOCK, V))

    for x in range(levels - (LEAVES - 1)):
        level = levels - 1 - x
        start = sibling(leaf, level)
        if (((leaf >> level) & 1) == 0) & (start < P):
            transform = (key_head * N + transform_place(start >> level, level, P)) * K
            acc = _moved_back(
                gradients_ptr, above, factor, transforms_ptr, transform, K, BLOCK, BH, True
            )
            place = key_place(leaf, level, P)
            key = (key_head * S + place) * LEAF + inside
            k = tl.load(tile(keys_ptr, key, 0, K, BLOCK, K))
            end = tl.minimum(1 << level, P - start) * LEAF
            acc, dv = _of_queries(
                acc, dv, k, v, factor, unit, queries_ptr, do_ptr, lse_ptr, delta_ptr,
                from_middle_ptr, to_middle_ptr, sums_ptr, b, kh, place, inside, level, start, end,
                P, R, S, HQ, H, K, V, BLOCK, BI, GATES, False, DTYPE,
            )  # fmt: skip
            scaled, factor = normalised(acc, DTYPE)
            tl.store(tile(gradients_ptr, key, 0, K, BLOCK, K), scaled)
            tl.store(factors_ptr + key.to(tl.int64) + rows, factor)
            above = key
        tl.debug_barrier()

    if LEAVES == 2:
        left = rows < LEAF
        transform = (key_head * N + leaf + 1) * K
        acc = _moved_back(
            gradients_ptr, above, factor, transforms_ptr, transform, K, BLOCK, BH, True
        )
        place = key_place(leaf, 0, P)
        key = (key_head * S + place) * LEAF
        k = tl.load(tile(keys_ptr, key, 0, K, BLOCK, K), mask=left[:, None], other=0.0)
        acc, dv = _of_queries(
            acc, dv, k, v, factor, unit, queries_ptr, do_ptr, lse_ptr, delta_ptr,
            from_middle_ptr, to_middle_ptr, sums_ptr, b, kh, place, 0, 0, leaf, LEAF,
            P, R, S, HQ, H, K, V, BLOCK, BI, GATES, True, DTYPE,
        )  # fmt: skip
        scaled, factor = normalised(acc, DTYPE)
        tl.store(tile(gradients_ptr, key, 0, K, BLOCK, K), scaled, mask=left[:, None])
        tl.store(factors_ptr + key.to(tl.int64) + rows, factor, mask=left)

    dv = dv.to(dv_ptr.dtype.element_ty)
    tl.store(tokens(dv_ptr, b, kh, first, P, 0, H, V, BLOCK, V), dv)


@triton.jit
def _of_rows(
    acc, left_ptr, left_row, right_ptr, right_row, factors_ptr, factors_row, count, row, column,
    K: tl.constexpr, BK: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """acc + left^T Diag(factors) right, for BK columns of each."""
    for at in range(0, count, LEAF):
        left = tl.load(tile(left_ptr, left_row + at, row, K, LEAF, BK)).to(tl.float32)
        right = tl.load(tile(right_ptr, right_row + at, column, K, LEAF, BK)).to(tl.float32)
        factors = tl.load(factors_ptr + (factors_row + at).to(tl.int64) + tl.arange(0, LEAF))
        right *= factors[:, None]
        acc = tl.dot(tl.trans(left), right, acc=acc, input_precision=PRECISION)
    return acc


@triton.jit
def path_transform_gradients(
    queries_ptr, dqueries_ptr, query_factors_ptr, keys_ptr, dkeys_ptr, key_factors_ptr,
    transforms_ptr, parents_ptr, number, P, R, S, N,
    gradients_ptr,
    HQ: tl.constexpr, H: tl.constexpr, K: tl.constexpr, BK: tl.constexpr, PARENTS: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """The gradient of H of a level's blocks, [B, H, blocks, K, K] float32, from the level above's.

    A left half's H moves the queries of its right half to the next level at which they have a
    version, a right half's the keys of its left half; and both are factors of their block's H. A
    program makes a tile of BK x BK.

    All levels 2.9 GB, 0.1 TFLOP of TF32, floor 0.67 ms, predicted 1.2; 168, 166, 128
    registers, 24, 24, 40 KB.

    Args:
      number: the level + 2. Numbers of 1 and multiples of 16 are compiled for themselves.
    """
    level = number - 2
    tiles: tl.constexpr = K // BK
    GROUP: tl.constexpr = HQ // H
    program, blocks = tl.program_id(0), P >> level
    part = program % (tiles * tiles)
    block, key_head = program // (tiles * tiles) % blocks, program // (tiles * tiles) // blocks
    row, column = part // tiles * BK, part % tiles * BK
    parent = block >> 1
    acc = zeros(BK, BK)
    if (block & 1) == 0:
        start = (block + 1) << level
        upper = level + 1 + lowest_bit(tl.where(parent == 0, 1, parent))
        count = tl.where(parent == 0, 0, tl.minimum(1 << level, P - start)) * LEAF
        for member in range(GROUP):
            head = (key_head // H) * HQ + key_head % H * GROUP + member
            query = (head * R + query_place(start, level, P)) * LEAF
            moved = (head * R + query_place(start, upper, P)) * LEAF
            acc = _of_rows(
                acc, queries_ptr, query, dqueries_ptr, moved, query_factors_ptr, moved, count,
                row, column, K, BK, PRECISION,
            )  # fmt: skip
    else:
        start = (block - 1) << level
        upper = level + 1 + lowest_bit(~parent)
        count = tl.where(sibling(start, upper) < P, 1 << level, 0) * LEAF
        key = (key_head * S + key_place(start, level, P)) * LEAF
        moved = (key_head * S + key_place(start, upper, P)) * LEAF
        acc = _of_rows(
            acc, dkeys_ptr, moved, keys_ptr, key, key_factors_ptr, moved, count,
            row, column, K, BK, PRECISION,
        )  # fmt: skip
    if PARENTS:
        if parent < (P >> (level + 1)):
            above = (key_head * (P >> (level + 1)) + parent) * K
            other = (key_head * N + transform_place(block ^ 1, level, P)) * K
            for k in range(0, K, BK):
                if (block & 1) == 0:
                    h = tl.load(tile(transforms_ptr, other + k, row, K, BK, BK)).to(tl.float32)
                    dh = tl.load(tile(parents_ptr, above + k, column, K, BK, BK))
                    acc = tl.dot(tl.trans(h), dh, acc=acc, input_precision=PRECISION)
                else:
                    dh = tl.load(tile(parents_ptr, above + row, k, K, BK, BK))
                    h = tl.load(tile(transforms_ptr, other + column, k, K, BK, BK)).to(tl.float32)
                    acc = tl.dot(dh, tl.trans(h), acc=acc, input_precision=PRECISION)
    tl.store(tile(gradients_ptr, (key_head * blocks + block) * K + row, column, K, BK, BK), acc)
