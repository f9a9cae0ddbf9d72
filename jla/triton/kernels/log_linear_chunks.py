"""Log-linear attention by chunks of 64 tokens: sums, outputs, and gradients of keys and queries.

Position t reads s at the level l in whose bit l - 1, their highest different one, t has a 1 and s a
0. A token has one weight a level: w_l[t] with which it reads where its bit is 1, w_l[s] with which
it is read where it is 0, and w_0 for itself (`jla._core.level_weights`). With a_ts = q_t . k_s,

    o_t = w_0[t] a_tt v_t + sum_s w_l(t,s)[t] w_l(t,s)[s] a_ts v_s

Tokens of one chunk meet at the levels 1 to 6, and are pairs of a [64, 64] tile. Chunks meet above:
a node of 2**m chunks on whose left side chunk j is (bit m of j is 0) is read by the 2**m chunks
after it, all at level 7 + m, through its state S = sum_s w[s] k_s v_s^T. A node is known by its
last chunk, which has m trailing ones.

The backward pass is the same with the roles exchanged. Written tokens receive from those that read
them what those receive from the ones they read: REVERSE, in which a token's partners come after it.
With u_ts = do_t . v_s, and G = sum_t w[t] q_t do_t^T over the readers of a node,

                         forward                               REVERSE
    log_linear_sums      S of k, v over the node               G of q, do over the chunks after it
    log_linear_outputs   o_t = sum_s w w a_ts v_s + w q_t S    dv_s = sum_t w w a_ts do_t + w k_s G
    log_linear_gradients dq_t = sum_s w w u_ts k_s + w S do_t  dk_s = sum_t w w u_ts q_t + w G v_s
                         dw[t] = sum_s a u w[s], q_t S do_t    dw[s] = sum_t a u w[t], k_s G v_s

No exponential is taken here; every weight is at most its level scale. All products take operands of
the inputs' dtype, float32 as three TF32 products, and add in float32.
"""

import triton
import triton.language as tl

from jla.triton.kernels.pieces import (
    CHUNK,
    LEVELS,
    dot,
    dot_add,
    real_columns,
    real_tokens,
    same,
)


@triton.jit
def log_linear_sums(
    y, z, w,  # [B, T, H, K], [B, T, HV, V], [B, HV, N, P, 64]
    T, N,  # numbers
    states,  # [B, HV, N - 1, K, V], by a node's last chunk
    REVERSE: tl.constexpr, H: tl.constexpr, HV: tl.constexpr, K: tl.constexpr, V: tl.constexpr,
    P: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr,
):  # fmt: skip
    """A program makes [BK, BV] of one node's state, chunk by chunk; of a head, whose tokens several
    nodes read, the largest are first.

    Of a full tree of N chunks there are N / 2 * log2 N products of [BK, 64] and [64, BV] for a head
    and block. At B=8 T=4096 HV=16 K=V=128 that is 52 GFLOP (0.07 ms at 780 TFLOPS); 0.13 GB are
    read and 0.26 GB written (0.09 ms at 4.3 TB/s), and 1.2 GB come from L2. Measured on an H200, as
    compiled for 8.0: 0.31 ms. At K = V = 128 in bfloat16, as compiled for 8.0 and 8.9 | 9.0 | 10.0:
    161 | 134 | 96 registers, 24 | 48 | 48 KB of shared memory, nothing spilled.
    """
    blocks_k: tl.constexpr = (K + BK - 1) // BK
    blocks_v: tl.constexpr = (V + BV - 1) // BV
    program = tl.program_id(0)
    at_v = program % blocks_v * BV
    at_k = program // blocks_v % blocks_k * BK
    # The nodes of a head by size: 1 of the largest, then 2 of half its size, and so on.
    program = program // (blocks_v * blocks_k)
    top = _highest_bit(N - 1)
    nodes = (2 << top) - 1
    head, rank = program // nodes, program % nodes + 1
    b, h = head // HV, head % HV
    depth = _highest_bit(rank)
    size = 1 << (top - depth)
    first = (rank - (1 << depth)) * 2 * size
    last = first + size - 1
    if last < N - 1:
        from_chunk, until = first, first + size
        if REVERSE:
            from_chunk, until = first + size, tl.minimum(first + 2 * size, N)
        plane = LEVELS + _highest_bit(size) + 1
        weights = w + ((head * N + from_chunk).to(tl.int64) * P + plane) * CHUNK
        acc = tl.zeros((BK, BV), tl.float32)
        for n in range(from_chunk, until):
            left = _load_columns(y, b, n, h // (HV // H), at_k, T, H, K, BK)
            right = _load(z, b, n, h, at_v, T, HV, V, BV)
            weight = tl.load(weights + tl.arange(0, CHUNK))
            right = (right * weight[:, None]).to(right.dtype)
            acc = dot_add(left, right, acc)
            weights += P * CHUNK
        place, inside = _state_tile(states, head, last, N, at_k, at_v, K, V, BK, BV)
        tl.store(place, acc.to(states.dtype.element_ty), inside)


@triton.jit
def log_linear_outputs(
    x, y, z, w,  # [B, T, H, K] of its own tokens and of their partners, [B, T, HV, V], weights
    states, live,  # see `log_linear_sums`; [B, N] int32, 0 for chunks without tokens
    T, N,
    o,  # [B, T, HV, V]
    REVERSE: tl.constexpr, SKIP: tl.constexpr, H: tl.constexpr, HV: tl.constexpr, K: tl.constexpr,
    V: tl.constexpr, P: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr,
):  # fmt: skip
    """A program makes BV columns of a chunk's outputs (of dv in REVERSE).

    It reads as many states as its chunk's number has ones (in REVERSE zeros), log2(N) / 2 on
    average: at B=8 T=4096 HV=16 K=V=128 three, 52 GFLOP, and 17 GFLOP for the pairs of the chunk
    (0.09 ms at 780 TFLOPS). 0.27 GB of values and 0.26 GB of states come and go (0.13 ms at 4.3
    TB/s); states come 3 times from L2. Two blocks of V make the scores twice, 17 GFLOP more, and
    take few registers. Measured as compiled for 8.0: 0.38 ms. 164 | 143 | 158 registers, 48 | 64 |
    64 KB, nothing spilled. With SKIP, chunks without tokens stay unwritten.
    """
    blocks_k: tl.constexpr = (K + BK - 1) // BK
    blocks_v: tl.constexpr = (V + BV - 1) // BV
    at_v, n, b, h = _place(N, blocks_v, BV, HV)
    if SKIP:
        if tl.load(live + b * N + n) == 0:
            return
    key_head, head = h // (HV // H), b * HV + h
    weights = w + (head * N + n).to(tl.int64) * (P * CHUNK)
    own = _load(x, b, n, key_head, 0, T, H, K, BK)
    scores = _apart(own, tl.trans(_load(y, b, n, key_head, 0, T, H, K, BK)), T)
    for i in range(1, blocks_k):
        partner = _load(y, b, n, key_head, i * BK, T, H, K, BK)
        scores = dot_add(_load(x, b, n, key_head, i * BK, T, H, K, BK), tl.trans(partner), scores)
    values = _load(z, b, n, h, at_v, T, HV, V, BV)
    acc = _apart((scores * _pair_weights(weights, REVERSE)).to(values.dtype), values, T)
    rest = _partners(n, N, REVERSE)
    for _ in range(_count(rest)):
        height = _lowest_bit(rest)
        rest &= rest - 1
        node = _node(n, height, REVERSE)
        weight = tl.load(weights + (LEVELS + 1 + height) * CHUNK + tl.arange(0, CHUNK))
        read = dot(own, _load_state(states, head, node, N, 0, at_v, K, V, BK, BV))
        for i in range(1, blocks_k):
            other = _load(x, b, n, key_head, i * BK, T, H, K, BK)
            state = _load_state(states, head, node, N, i * BK, at_v, K, V, BK, BV)
            read = dot_add(other, state, read)
        acc += weight[:, None] * read
    _store(o, acc, b, n, h, at_v, T, HV, V, BV)


@triton.jit
def log_linear_gradients(
    x, y, own, other, w,  # own: do (in REVERSE v); other: v (do), [B, T, HV, V]
    states, live,
    B, T, N,
    dx, dw,  # [B, T, HV, K]; [blocks of K, B, HV, N, P, 64]
    REVERSE: tl.constexpr, SKIP: tl.constexpr, H: tl.constexpr, HV: tl.constexpr, K: tl.constexpr,
    V: tl.constexpr, P: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr,
):  # fmt: skip
    """A program makes BK columns of a chunk's dq (in REVERSE dk), for each value head by itself,
    and their share of the weights' gradients: only the planes in which its tokens have this role.

    Operations and states as `log_linear_outputs`, and 0.13 GB more to read: 0.16 ms at B=8 T=4096
    HV=16 K=V=128. Measured as compiled for 8.0: 0.77 ms forward, 0.75 in REVERSE. 255 | 255 | 254
    registers, 64 | 80 | 81 KB, 48 | 8 | 0 bytes spilled (with several blocks of K up to 272, in
    float32 up to 600).
    """
    blocks_k: tl.constexpr = (K + BK - 1) // BK
    blocks_v: tl.constexpr = (V + BV - 1) // BV
    at_k, n, b, h = _place(N, blocks_k, BK, HV)
    if SKIP:
        if tl.load(live + b * N + n) == 0:
            return
    key_head, head = h // (HV // H), b * HV + h
    chunk = (head * N + n).to(tl.int64) * (P * CHUNK)
    weights = w + chunk
    share = dw + (at_k // BK * B * HV).to(tl.int64) * N * (P * CHUNK) + chunk
    mine = _load(x, b, n, key_head, at_k, T, H, K, BK)
    partner = _load(y, b, n, key_head, at_k, T, H, K, BK)
    value = _load(own, b, n, h, 0, T, HV, V, BV)
    u = _apart(value, tl.trans(_load(other, b, n, h, 0, T, HV, V, BV)), T)
    for i in range(1, blocks_v):
        right = tl.trans(_load(other, b, n, h, i * BV, T, HV, V, BV))
        u = dot_add(_load(own, b, n, h, i * BV, T, HV, V, BV), right, u)
    _pair_gradients(u * _apart(mine, tl.trans(partner), T), weights, share, REVERSE)
    acc = _apart((u * _pair_weights(weights, REVERSE)).to(partner.dtype), partner, T)
    rest = _partners(n, N, REVERSE)
    for _ in range(_count(rest)):
        height = _lowest_bit(rest)
        rest &= rest - 1
        node = _node(n, height, REVERSE)
        at_level = (LEVELS + 1 + height) * CHUNK + tl.arange(0, CHUNK)
        weight = tl.load(weights + at_level)
        state = _load_state(states, head, node, N, at_k, 0, K, V, BK, BV)
        through = dot(value, tl.trans(state))
        for i in range(1, blocks_v):
            left = _load(own, b, n, h, i * BV, T, HV, V, BV)
            state = _load_state(states, head, node, N, at_k, i * BV, K, V, BK, BV)
            through = dot_add(left, tl.trans(state), through)
        tl.store(share + at_level, tl.sum(mine * through, 1))
        acc += weight[:, None] * through
    _store(dx, acc, b, n, h, at_k, T, HV, K, BK)


@triton.jit
def _apart(a, b, T):
    """a @ b, in a region of its own, for T is at least 1.

    Where a region has several products that depend on each other, Triton lays all warps along the
    rows, or all along the columns: each warp then reads all of an operand.
    """
    product = tl.zeros((a.shape[0], b.shape[1]), tl.float32)
    if T > 0:
        product = dot(a, b)
    return product


# ------------------------------------------------------------------------------ pairs of a chunk


@triton.jit
def _levels(REVERSE: tl.constexpr):
    """[i, j]: the differing bits of token i, whose program it is, and its partner j; else 0."""
    i, j = tl.arange(0, CHUNK)[:, None], tl.arange(0, CHUNK)[None, :]
    if REVERSE:
        return tl.where(i < j, i ^ j, 0)
    else:
        return tl.where(i > j, i ^ j, 0)


@triton.jit
def _pair_weights(weights, REVERSE: tl.constexpr):
    """[i, j]: the weight of a pair, 0 for what is no pair."""
    t, differing = tl.arange(0, CHUNK), _levels(REVERSE)
    pairs = tl.where(same(), tl.load(weights + t)[:, None], 0.0)
    for level in tl.static_range(LEVELS):
        w = weights + (level + 1) * CHUNK + t
        product = tl.load(w)[:, None] * tl.load(w)[None, :]
        pairs = tl.where((differing >> level) == 1, product, pairs)
    return pairs


@triton.jit
def _pair_gradients(changes, weights, dw, REVERSE: tl.constexpr):
    """Stores the gradients of the weights of the tokens i, from those of the products w[i] w[j]."""
    t, differing = tl.arange(0, CHUNK), _levels(REVERSE)
    if not REVERSE:
        tl.store(dw + t, tl.sum(tl.where(same(), changes, 0.0), 1))
    for level in range(LEVELS):
        at_level = (level + 1) * CHUNK + t
        change = changes * tl.load(weights + at_level)[None, :]
        tl.store(dw + at_level, tl.sum(tl.where((differing >> level) == 1, change, 0.0), 1))


# ------------------------------------------------------------------------------ nodes


@triton.jit
def _partners(n, N, REVERSE: tl.constexpr):
    """The heights of the nodes that chunk n reads, as set bits; in REVERSE of those that it is in
    and that are read: its zeros, up to the highest bit in which the last chunk differs."""
    if REVERSE:
        below = n ^ (N - 1)
        for i in tl.static_range(5):
            below |= below >> (1 << i)
        return below & (n ^ below)
    else:
        return n


@triton.jit
def _node(n, height, REVERSE: tl.constexpr):
    """The last chunk of the node of this height that chunk n reads (in REVERSE: that it is in)."""
    if REVERSE:
        return n | ((1 << height) - 1)
    else:
        return (n >> height << height) - 1


@triton.jit
def _lowest_bit(x):
    """The number of the lowest bit of x > 0 that is set."""
    return _highest_bit(x & -x)


@triton.jit
def _highest_bit(x):
    """The number of the highest bit of x > 0 that is set."""
    number = x * 0
    for i in tl.static_range(5):
        more = ((x >> (16 >> i)) != 0).to(tl.int32) * (16 >> i)
        number += more
        x = x >> more
    return number


@triton.jit
def _count(x):
    """How many bits of x >= 0 are set."""
    x = x - ((x >> 1) & 0x55555555)
    x = (x & 0x33333333) + ((x >> 2) & 0x33333333)
    x = (x + (x >> 4)) & 0x0F0F0F0F
    x = x + (x >> 8)
    return (x + (x >> 16)) & 63


# ------------------------------------------------------------------------------ tiles


@triton.jit
def _place(N, blocks: tl.constexpr, BLOCK: tl.constexpr, HV: tl.constexpr):
    """A program's columns, chunk, row and value head; a head's chunks, which share its states, run
    one after another."""
    program = tl.program_id(0)
    head = program // blocks // N
    return program % blocks * BLOCK, program // blocks % N, head // HV, head % HV


@triton.jit
def _tile(array, b, n, head, column, T, H: tl.constexpr, D: tl.constexpr, BD: tl.constexpr):
    """Pointers to BD columns of a chunk's tokens in [B, T, H, D], and which there are."""
    rows, columns = tl.arange(0, CHUNK), column + tl.arange(0, BD)
    base = array + ((b * T + n * CHUNK).to(tl.int64) * H + head) * D
    inside = real_columns(real_tokens(n, T), columns, D)
    return base + (rows[:, None] * (H * D) + columns[None, :]), inside


@triton.jit
def _load(array, b, n, head, column, T, H: tl.constexpr, D: tl.constexpr, BD: tl.constexpr):
    place, inside = _tile(array, b, n, head, column, T, H, D, BD)
    return tl.load(place, inside, 0.0)


@triton.jit
def _load_columns(array, b, n, head, column, T, H: tl.constexpr, D: tl.constexpr, BD: tl.constexpr):
    """As `_load`, [columns, tokens]; a tile that is transposed later passes through registers."""
    place, inside = _tile(array, b, n, head, column, T, H, D, BD)
    return tl.load(tl.trans(place), tl.trans(inside), 0.0)


@triton.jit
def _store(array, x, b, n, head, column, T, H: tl.constexpr, D: tl.constexpr, BD: tl.constexpr):
    place, inside = _tile(array, b, n, head, column, T, H, D, BD)
    tl.store(place, x.to(array.dtype.element_ty), inside)


@triton.jit
def _state_tile(
    states, head, node, N, at_k, at_v,
    K: tl.constexpr, V: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr,
):  # fmt: skip
    """Pointers to [BK, BV] of a node's state, and which there are."""
    rows, columns = at_k + tl.arange(0, BK), at_v + tl.arange(0, BV)
    # Not `pieces.matrix_tile`, whose order of operations moves instructions of float32 kernels.
    base = states + (head * (N - 1) + node).to(tl.int64) * (K * V)
    inside = (rows < K)[:, None] & (columns < V)[None, :]
    return base + (rows[:, None] * V + columns[None, :]), inside


@triton.jit
def _load_state(
    states, head, node, N, at_k, at_v,
    K: tl.constexpr, V: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr,
):  # fmt: skip
    """What `_state_tile` points to; zeros where there is nothing."""
    place, inside = _state_tile(states, head, node, N, at_k, at_v, K, V, BK, BV)
    if K // BK * BK == K and V // BV * BV == V:
        return tl.load(place)
    else:
        return tl.load(place, inside, 0.0)
