"""What Gated Slot Attention does inside one chunk of 64 tokens.

Both passes of GSA, and all their gradients, are parts of one form. For tokens j <= i of a chunk and
slots, with X the state before the chunk and G the log decays summed from the chunk's start,

    sum_i w_i . (exp(G_i) (x_i X) + sum_j (x_i . y_j) s_j exp(G_i - G_j))

with x, y, X, w = q, k, Hk, dlogits in the first pass and do, v, Hv^T, p in the second. The logits
and the gradient of p are its derivative by w (`read`).

A token whose G is above -96 (in base 2), in a slot, reads there through exp(G_i) and exp(-G_j): all
earlier tokens have a G above -96, too, so that no factor leaves the range of bfloat16, and which
way it reads depends on its past alone. The others read through a tree of decays, which a chunk
without such tokens passes over. At level l of the tree, blocks of 2**(l+1) tokens have a left and a
right half, and a token is decayed from itself to the block's middle: a pair with i in the right and
j in the left half has the product of both as its decay, and every pair j < i belongs to one level.

G is kept as an integer: in base 2, in units of 2**-17. So its differences are exact, and a strong
gate costs its neighbours no digit. Log decays are bounded at -254 in base 2, whose exponential is 0
in float32; 64 of them fit into 32 bits.

Rows past T have the last row of G, and zeros of all else: they neither read, write nor decay. All
products take bfloat16 operands and add in float32, float16 inputs included (gradients would leave
float16's range), or float32 operands, as three TF32 products, where the inputs are float32.

The kernels' docstrings say what moves and how long that takes at least on an H200 (4.3 TB/s,
780 TFLOP/s) at B=8 T=4096 HQ=H=16 K=V=128 M=64 in bfloat16, and how many instructions a warp issues
for a chunk and head where all gates are weak; all products together take 0.35 ms at least. As
compiled for 8.0 to 12.0 a thread has up to 255 registers and spills up to 24 bytes in `gsa_read`,
about 400 in `gsa_gradients`, nothing elsewhere; a program has 4 warps and up to 52 KB of shared
memory, so that the classes of memory do not differ. Prediction: 3.5 ms forward and backward.

Parameters of all kernels: T tokens, a number; H heads, HQ query heads, D (or K, V) features, M
slots; BD (or BK, BV) and BM, powers of two, how many of the features and slots a tile has; FLOAT32,
whether the inputs are float32. s, p and dlogits have the operands' dtype.
"""

import triton
import triton.language as tl

from jla.triton.kernels.pieces import (
    CHUNK,
    LEVELS,
    by_row,
    dot_add,
    load_matrix,
    same,
    zeros,
)

UNIT = tl.constexpr(2.0**-17)  # of G
STRONGEST = tl.constexpr(-254.0)
NOT_A_NUMBER = tl.constexpr(-(2**31))  # in G of a chunk with such a log decay
NEAR = tl.constexpr(-96 * 2**17)  # G of tokens that need no tree; 2**96 is less than exp(80)
LOG2E = tl.constexpr(1.4426950408889634)


@triton.jit
def operand(x, FLOAT32: tl.constexpr):
    """x as `product` takes it."""
    if FLOAT32:
        return x.to(tl.float32)
    else:
        return x.to(tl.bfloat16)


@triton.jit
def product(a, b, acc, FLOAT32: tl.constexpr):
    """a @ b + acc, float32."""
    return dot_add(operand(a, FLOAT32), operand(b, FLOAT32), acc)


@triton.jit
def made(x, FLOAT32: tl.constexpr):
    """x, made of what was loaded, as an operand: see `by_row`."""
    return by_row(operand(x, FLOAT32))


@triton.jit
def sums_from(x, FLOAT32: tl.constexpr):
    """Over each token and all later ones; with 16 bits of x, for they cancel."""
    onwards = tl.where(tl.arange(0, CHUNK)[:, None] <= tl.arange(0, CHUNK)[None, :], 1.0, 0.0)
    high = operand(x, FLOAT32)
    sums = product(onwards, high, tl.zeros_like(x), FLOAT32)
    if not FLOAT32:
        sums = product(onwards, x - high.to(tl.float32), sums, FLOAT32)
    return sums


@triton.jit
def program(T, HEADS: tl.constexpr):
    """The batch row, chunk and head of a program. Neighbouring heads lie together in memory."""
    i, chunks = tl.program_id(0), tl.cdiv(T, CHUNK)
    return (i // HEADS // chunks).to(tl.int64), i // HEADS % chunks, i % HEADS


@triton.jit
def tile_of(
    ptr, b, n, h, T, feature, HEADS: tl.constexpr, D: tl.constexpr, BD: tl.constexpr
):  # fmt: skip
    """Pointers to a chunk's BD features, from `feature` on, of [B, T, HEADS, D], and their mask."""
    t, d = tl.arange(0, CHUNK)[:, None], feature + tl.arange(0, BD)[None, :]
    pointers = ptr + ((b * T + n * CHUNK) * HEADS + h) * D + (t * (HEADS * D) + d)
    mask = t < T - n * CHUNK
    if D // BD * BD != D:
        mask = mask & (d < D)
    return pointers, mask


@triton.jit
def load_tile(
    ptr, b, n, h, T, feature, HEADS: tl.constexpr, D: tl.constexpr, BD: tl.constexpr
):  # fmt: skip
    pointers, mask = tile_of(ptr, b, n, h, T, feature, HEADS, D, BD)
    return tl.load(pointers, mask=mask, other=0.0)


@triton.jit
def store_tile(
    ptr, x, b, n, h, T, feature, HEADS: tl.constexpr, D: tl.constexpr, BD: tl.constexpr
):  # fmt: skip
    pointers, mask = tile_of(ptr, b, n, h, T, feature, HEADS, D, BD)
    tl.store(pointers, x.to(ptr.dtype.element_ty), mask=mask)


@triton.jit
def load_sums(
    sums_ptr, b, n, h, T, rows, slot, H: tl.constexpr, M: tl.constexpr, BM: tl.constexpr
):  # fmt: skip
    """Rows of a chunk of G, [rows, BM]."""
    rows, m = tl.minimum(rows, T - n * CHUNK - 1), slot + tl.arange(0, BM)[None, :]
    pointers = sums_ptr + ((b * T + n * CHUNK) * H + h) * M + (rows[:, None] * (H * M) + m)
    if M // BM * BM == M:
        return tl.load(pointers)
    else:
        return tl.load(pointers, mask=m < M, other=0)


@triton.jit
def load_last_sums(
    sums_ptr, b, n, h, T, slot, H: tl.constexpr, M: tl.constexpr, BM: tl.constexpr
):  # fmt: skip
    """The last row of a chunk of G, [BM]."""
    last, m = tl.minimum((n + 1) * CHUNK, T) - 1, slot + tl.arange(0, BM)
    return tl.load(sums_ptr + ((b * T + last) * H + h) * M + m, mask=m < M, other=0)


@triton.jit
def decay(difference):
    """exp of a difference of G that is not positive."""
    return tl.exp2(difference.to(tl.float32) * UNIT)


@triton.jit
def decay_from_start(sums):
    """exp(G); what is not a number in G is none here."""
    return tl.where(sums == NOT_A_NUMBER, float("nan"), decay(sums))


@triton.jit
def near(sums, sign: tl.constexpr):
    """exp(sign G) where G is above -96, and 0 elsewhere."""
    return tl.where(sums > NEAR, decay(sign * tl.maximum(sums, NEAR)), 0.0)


@triton.jit
def all_near(sums_ptr, b, n, h, T, slot, H: tl.constexpr, M: tl.constexpr, BM: tl.constexpr):
    """Whether a chunk's tokens need no tree."""
    return tl.min(load_last_sums(sums_ptr, b, n, h, T, slot, H, M, BM), axis=0) > NEAR


@triton.jit
def level_decay(
    sums_ptr, b, n, h, T, level, slot, H: tl.constexpr, M: tl.constexpr, BM: tl.constexpr
):  # fmt: skip
    """Each token's decay to the middle of its block of two halves, [CHUNK, BM]; 0 where it reads
    without the tree."""
    i = tl.arange(0, CHUNK)
    last_of_left = (i | (2 << level) - 1) - (1 << level)
    sums = load_sums(sums_ptr, b, n, h, T, i, slot, H, M, BM)
    middle = load_sums(sums_ptr, b, n, h, T, last_of_left, slot, H, M, BM)
    reads = is_reader(level) & (sums > NEAR)
    return tl.where(reads, 0.0, decay(-tl.abs(sums - middle)))


@triton.jit
def is_reader(level):
    """[i, 1]: whether a token is in the right half of its block."""
    return ((tl.arange(0, CHUNK)[:, None] >> level) & 1) == 1


@triton.jit
def again(n, level):
    """n. Loads at this place are made at each level: Triton would make those that do not depend on
    the level before the loop, and their tiles would fill the registers."""
    return n + (level >> 3)


@triton.jit
def once_more(n):
    """n. What is loaded at this place is not kept in registers from an earlier load."""
    return n + (tl.num_programs(1) >> 16)


@triton.jit
def states_of(
    ptr, b, n, h, T, feature, slot, H: tl.constexpr, D: tl.constexpr, M: tl.constexpr,
    BD: tl.constexpr, BM: tl.constexpr,
):  # fmt: skip
    """Pointers to BD features and BM slots of a chunk's state, of [B, H, chunks, D, M], and their
    mask."""
    # As `pieces.matrix_tile`, whose order of operations compiles to other code in `gsa_states`.
    d, m = feature + tl.arange(0, BD)[:, None], slot + tl.arange(0, BM)[None, :]
    pointers = ptr + ((b * H + h) * tl.cdiv(T, CHUNK) + n) * (D * M) + (d * M + m)
    return pointers, (d < D) & (m < M)


@triton.jit
def load_states(
    ptr, b, n, h, T, feature, slot, H: tl.constexpr, D: tl.constexpr, M: tl.constexpr,
    BD: tl.constexpr, BM: tl.constexpr,
):  # fmt: skip
    d, m = feature + tl.arange(0, BD), slot + tl.arange(0, BM)
    return load_matrix(ptr + ((b * H + h) * tl.cdiv(T, CHUNK) + n) * (D * M), d, m, D, M)


@triton.jit
def level_pairs(level):
    """[i, j]: i is in the right half of a block and j in its left half."""
    i, j = tl.arange(0, CHUNK)[:, None], tl.arange(0, CHUNK)[None, :]
    return (((i >> level) ^ (j >> level)) == 1) & (j < i)


@triton.jit
def earlier():
    """[i, j]: j < i."""
    return tl.arange(0, CHUNK)[:, None] > tl.arange(0, CHUNK)[None, :]


@triton.jit
def level_tile(
    w_ptr, s_ptr, factor, b, n, head, h, T, level, slot,
    HQ: tl.constexpr, H: tl.constexpr, M: tl.constexpr, BM: tl.constexpr, FLOAT32: tl.constexpr,
):  # fmt: skip
    """w of the tokens that read at a level, s of the others, decayed by `factor`; an operand."""
    at = again(n, level)
    w = load_tile(w_ptr, b, at, head, T, slot, HQ, M, BM)
    s = load_tile(s_ptr, b, at, h, T, slot, H, M, BM)
    return made(tl.where(is_reader(level), w, s).to(tl.float32) * factor, FLOAT32)


@triton.jit
def pair_scores(
    w_ptr, s_ptr, sums_ptr, b, n, head, h, T,
    HQ: tl.constexpr, H: tl.constexpr, M: tl.constexpr, BM: tl.constexpr, FLOAT32: tl.constexpr,
):  # fmt: skip
    """A[i, j] = sum_m w_i s_j exp(G_i - G_j) for j <= i, [CHUNK, CHUNK], as an operand."""
    a = zeros(CHUNK, CHUNK)
    for slot in range(0, M, BM):
        w = load_tile(w_ptr, b, n, head, T, slot, HQ, M, BM).to(tl.float32)
        s = load_tile(s_ptr, b, n, h, T, slot, H, M, BM).to(tl.float32)
        sums = load_sums(sums_ptr, b, n, h, T, tl.arange(0, CHUNK), slot, H, M, BM)
        a += tl.where(same(), tl.sum(w * s, axis=1)[:, None], 0.0)
        w, s = made(w * near(sums, 1), FLOAT32), made(s * near(sums, -1), FLOAT32)
        a += tl.where(earlier(), product(w, tl.trans(s), zeros(CHUNK, CHUNK), FLOAT32), 0.0)
        if not all_near(sums_ptr, b, n, h, T, slot, H, M, BM):
            for level in tl.range(0, LEVELS, num_stages=1):
                factor = level_decay(sums_ptr, b, again(n, level), h, T, level, slot, H, M, BM)
                both = level_tile(
                    w_ptr, s_ptr, factor, b, n, head, h, T, level, slot, HQ, H, M, BM, FLOAT32
                )
                pairs = product(both, tl.trans(both), zeros(CHUNK, CHUNK), FLOAT32)
                a += tl.where(level_pairs(level), pairs, 0.0)
    return operand(a, FLOAT32)
