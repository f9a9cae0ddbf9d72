"""PaTH's leaves of 64 tokens, and the versions of their queries and keys along the tree.

With A = strict_lower(Diag(beta) W W^T) and M = (I + A)^-1 Diag(beta), of a leaf's tokens,

    W' = M W,   X = M strict_lower(W K^T),   L = lower(Q W^T)
    Q~ = scale (Q - L W'),   K~ = K - X^T W,   H = I - W^T W'
    own logits = scale (Q K^T - L X)

Q~ are the queries as the leaf's start sees them, K~ the keys as its end does, and H is the product
of the leaf's maps. `path_tree` has the tree and the parameters.
"""

import triton
import triton.language as tl

from jla.triton.kernels.path_tree import (
    LEAF,
    first_key,
    first_query,
    key_place,
    lowest_bit,
    query_place,
    sibling,
    square,
    tile,
    tokens,
    transform_place,
)
from jla.triton.kernels.pieces import before, dot_add, identity, zeros


@triton.jit
def _up_to():
    """[t, s]: s <= t. As `pieces.up_to`, whose order of operations compiles to other code here."""
    return tl.arange(0, LEAF)[None, :] <= tl.arange(0, LEAF)[:, None]


@triton.jit
def _level_pairs(level):
    """[t, s]: t in the right half and s in the left half of a block of 2**(level + 1) tokens."""
    half = tl.arange(0, LEAF)[:, None] >> level
    return (tl.arange(0, LEAF)[None, :] >> level) == tl.where((half & 1) == 1, half - 1, -1)


@triton.jit
def path_inverses(
    w_ptr, beta_ptr, P, inverse_ptr, H: tl.constexpr, K: tl.constexpr, BK: tl.constexpr
):  # fmt: skip
    """(I + A)^-1 of every leaf. A program a leaf and key head.

    Block substitution: X is the inverse of the diagonal blocks of 2**level, and X - X L X, with L
    the part of A that joins two of them, that of the blocks twice as large. For unit rows of w no
    partial inverse has an element above beta, so 16-bit operands are float16.

    0.2 GB, floor 0.05 ms, predicted 0.15; 177, 212, 156 registers, 16, 16, 8 KB.
    """
    DTYPE: tl.constexpr = inverse_ptr.dtype.element_ty
    place = tl.program_id(0)
    leaf, h, b = place % P, place // P % H, place // P // H
    overlap = zeros(LEAF, LEAF)
    for column in range(0, K, BK):
        w = tl.load(tokens(w_ptr, b, h, leaf * LEAF, P, column, H, K, LEAF, BK)).to(DTYPE)
        overlap = dot_add(w, tl.trans(w), overlap)
    t = tl.arange(0, LEAF)
    beta = tl.load(beta_ptr + (b * P * LEAF + leaf * LEAF + t).to(tl.int64) * H + h)
    a = beta[:, None] * overlap
    x = identity() - tl.where(_level_pairs(0), a, 0.0)
    for level in range(1, 6):
        joined = tl.where(_level_pairs(level), a, 0.0).to(DTYPE)
        rounded = x.to(DTYPE)
        part = dot_add(joined, rounded, zeros(LEAF, LEAF)).to(DTYPE)
        x -= dot_add(rounded, part, zeros(LEAF, LEAF))
    tl.store(square(inverse_ptr, place), x.to(DTYPE))


@triton.jit
def path_leaf_keys(
    k_ptr, w_ptr, beta_ptr, inverse_ptr, P, S, N,
    inner_ptr, writes_ptr, keys_ptr, transforms_ptr,
    H: tl.constexpr, K: tl.constexpr, BK: tl.constexpr,
):  # fmt: skip
    """X, W', the first key version and H of every leaf. A program a leaf and key head.

    0.9 GB, floor 0.22 ms, predicted 0.4; 246, 246, 128 registers, 16, 16, 32 KB.
    """
    DTYPE: tl.constexpr = inner_ptr.dtype.element_ty
    place = tl.program_id(0)
    leaf, head = place % P, place // P
    h, b = head % H, head // H
    t = tl.arange(0, LEAF)
    beta = tl.load(beta_ptr + (b * P * LEAF + leaf * LEAF + t).to(tl.int64) * H + h)
    m = (tl.load(square(inverse_ptr, place)).to(tl.float32) * beta[None, :]).to(DTYPE)
    overlap = zeros(LEAF, LEAF)
    for column in range(0, K, BK):
        w = tl.load(tokens(w_ptr, b, h, leaf * LEAF, P, column, H, K, LEAF, BK)).to(DTYPE)
        k = tl.load(tokens(k_ptr, b, h, leaf * LEAF, P, column, H, K, LEAF, BK)).to(DTYPE)
        overlap = dot_add(w, tl.trans(k), overlap)
    inner = dot_add(m, tl.where(before(), overlap, 0.0).to(DTYPE), zeros(LEAF, LEAF)).to(DTYPE)
    tl.store(square(inner_ptr, place), inner)
    key = (head * S + first_key(leaf, P)) * LEAF
    transform = (head * N + leaf) * K
    for column in range(0, K, BK):
        w = tl.load(tokens(w_ptr, b, h, leaf * LEAF, P, column, H, K, LEAF, BK)).to(DTYPE)
        writes = dot_add(m, w, zeros(LEAF, BK)).to(DTYPE)
        tl.store(tile(writes_ptr, place * LEAF, column, K, LEAF, BK), writes)
        k = tl.load(tokens(k_ptr, b, h, leaf * LEAF, P, column, H, K, LEAF, BK)).to(tl.float32)
        moved = k - dot_add(tl.trans(inner), w, zeros(LEAF, BK))
        if leaf + 1 < P:
            tl.store(tile(keys_ptr, key, column, K, LEAF, BK), moved.to(DTYPE))
        for row in range(0, K, BK):
            w = tl.load(tokens(w_ptr, b, h, leaf * LEAF, P, row, H, K, LEAF, BK)).to(DTYPE)
            x = -dot_add(tl.trans(w), writes, zeros(BK, BK))
            i, j = row + tl.arange(0, BK)[:, None], column + tl.arange(0, BK)[None, :]
            x += tl.where(i == j, 1.0, 0.0)
            tl.store(tile(transforms_ptr, transform + row, column, K, BK, BK), x.to(DTYPE))


@triton.jit
def path_leaf_queries(
    q_ptr, k_ptr, w_ptr, g_ptr, inner_ptr, writes_ptr, P, R,
    queries_ptr, own_ptr, highest_ptr,
    SCALE: tl.constexpr, HQ: tl.constexpr, H: tl.constexpr, K: tl.constexpr, BK: tl.constexpr,
    GATES: tl.constexpr,
):  # fmt: skip
    """The first query version and the own probabilities of every leaf. A program a leaf and head.

    0.8 GB, floor 0.19 ms, predicted 0.4; 168, 168, 156 registers, 16 KB.

    Args:
      g: gates of the logits, scaled and in base 2, [B, 64 P, HQ] float32.
      queries: scaled by SCALE, so that their logits are in base 2.
      own: exp2 of the own logits relative to the row's largest, `highest` [B, HQ, 64 P].
    """
    DTYPE: tl.constexpr = own_ptr.dtype.element_ty
    place = tl.program_id(0)
    leaf, head = place % P, place // P
    h, b = head % HQ, head // HQ
    kh = h // (HQ // H)
    shared = (b * H + kh) * P + leaf
    passed, logits = zeros(LEAF, LEAF), zeros(LEAF, LEAF)
    for column in range(0, K, BK):
        q = tl.load(tokens(q_ptr, b, h, leaf * LEAF, P, column, HQ, K, LEAF, BK)).to(DTYPE)
        w = tl.load(tokens(w_ptr, b, kh, leaf * LEAF, P, column, H, K, LEAF, BK)).to(DTYPE)
        k = tl.load(tokens(k_ptr, b, kh, leaf * LEAF, P, column, H, K, LEAF, BK)).to(DTYPE)
        passed = dot_add(q, tl.trans(w), passed)
        logits = dot_add(q, tl.trans(k), logits)
    passed = tl.where(_up_to(), passed, 0.0).to(DTYPE)
    logits -= dot_add(passed, tl.load(square(inner_ptr, shared)), zeros(LEAF, LEAF))
    logits *= SCALE
    t = tl.arange(0, LEAF)
    if GATES:
        # Sums of those gates alone that lie between key and query.
        g = tl.load(g_ptr + (b * P * LEAF + leaf * LEAF + t).to(tl.int64) * HQ + h)
        logits += tl.cumsum(tl.where(before(), g[:, None], 0.0), axis=0)
    logits = tl.where(_up_to(), logits, float("-inf"))
    highest = tl.max(logits, axis=1)
    tl.store(square(own_ptr, place), tl.exp2(logits - highest[:, None]).to(DTYPE))
    tl.store(highest_ptr + place.to(tl.int64) * LEAF + t, highest)
    if leaf > 0:
        row = (head * R + first_query(leaf, P)) * LEAF
        for column in range(0, K, BK):
            writes = tl.load(tile(writes_ptr, shared * LEAF, column, K, LEAF, BK))
            q = tl.load(tokens(q_ptr, b, h, leaf * LEAF, P, column, HQ, K, LEAF, BK))
            moved = q.to(tl.float32) - dot_add(passed, writes, zeros(LEAF, BK))
            tl.store(tile(queries_ptr, row, column, K, LEAF, BK), (SCALE * moved).to(DTYPE))


@triton.jit
def path_joined(transforms_ptr, number, P, N, new_ptr, K: tl.constexpr, BK: tl.constexpr):
    """H of the level's blocks: of their right halves times that of their left halves.

    In place. A program makes a tile of BK x BK.

    All levels 0.75 GB, floor 0.17 ms, predicted 0.25; 80, 80, 58 registers, 16, 16, 32
    KB.

    Args:
      number: the level + 2. Numbers of 1 and multiples of 16 are compiled for themselves.
    """
    level = number - 2
    DTYPE: tl.constexpr = transforms_ptr.dtype.element_ty
    tiles: tl.constexpr = K // BK
    program, count = tl.program_id(0), P >> level
    part, block, head = program % (tiles * tiles), program // (tiles * tiles) % count, 0
    head = program // (tiles * tiles) // count
    row, column = part // tiles * BK, part % tiles * BK
    left = (head * N + transform_place(2 * block, level - 1, P)) * K
    x = zeros(BK, BK)
    for k in range(0, K, BK):
        right = tl.load(tile(transforms_ptr, left + K + row, k, K, BK, BK))
        x = dot_add(right, tl.load(tile(transforms_ptr, left + k, column, K, BK, BK)), x)
    new = (head * N + transform_place(block, level, P)) * K
    tl.store(tile(transforms_ptr, new + row, column, K, BK, BK), x.to(DTYPE))


@triton.jit
def path_chains(
    versions_ptr, transforms_ptr, levels, P, VERSIONS, N, new_ptr,
    HEADS: tl.constexpr, H: tl.constexpr, K: tl.constexpr, BK: tl.constexpr, KEYS: tl.constexpr,
):  # fmt: skip
    """A leaf's other versions, each from the one of the level below. In place.

    A program a leaf and head. Through memory from level to level, because a product needs the rows
    in parts.

    Both calls 1.1 GB and H from L2, floor 0.25 ms, predicted 0.6; 160, 160, 106
    registers, 12, 12, 24 KB.
    """
    DTYPE: tl.constexpr = versions_ptr.dtype.element_ty
    place = tl.program_id(0)
    leaf, head = place % P, place // P
    kh = head // HEADS * H + head % HEADS // (HEADS // H)
    for level in range(levels - 1):
        half = leaf >> level
        above = half >> 1
        if KEYS:
            above = ~above
        upper = level + 1 + lowest_bit(tl.where(above == 0, 1, above))
        if KEYS:
            moves = ((half & 1) == 0) & (sibling(leaf, upper) < P)
            source, target = key_place(leaf, level, P), key_place(leaf, upper, P)
            other = half + 1
        else:
            moves = ((half & 1) == 1) & (above != 0)
            source, target = query_place(leaf, level, P), query_place(leaf, upper, P)
            other = half - 1
        if moves:
            source, target = (head * VERSIONS + source) * LEAF, (head * VERSIONS + target) * LEAF
            row = (kh * N + transform_place(other, level, P)) * K
            x = zeros(LEAF, K)
            for k in range(0, K, BK):
                part = tl.load(tile(versions_ptr, source, k, K, LEAF, BK))
                if KEYS:
                    factor = tl.trans(tl.load(tile(transforms_ptr, row, k, K, K, BK)))
                else:
                    factor = tl.load(tile(transforms_ptr, row + k, 0, K, BK, K))
                x = dot_add(part, factor, x)
            tl.store(tile(versions_ptr, target, 0, K, LEAF, K), x.to(DTYPE))
        tl.debug_barrier()
