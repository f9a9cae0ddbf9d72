"""KDA's forward pass in three kernels; docs/kernels/kda.md derives the formulas.

`scores` and `operands` do what a chunk can do without its state, `recurrence` carries the state
through the chunks. Arrays between kernels have whole chunks, [B, HV, N * 64, D]; squares are
[B, HV, N, 64, 64]. g are log decays in base 2, finite; one so strong that its exp2 is 0 starts a
segment. K and V are powers of two.
"""

import triton
import triton.language as tl

from jla.triton.kernels.pieces import (
    AFTER,
    CHUNK,
    LEVELS,
    LIMIT,
    NEAR,
    NEAR_MASK,
    UP_TO,
    chunk_tile,
    chunks_of_piece,
    dot,
    dot_add,
    exact_dot,
    identity,
    level_pairs,
    load_mask,
    load_scalars,
    load_tokens,
    near_decays,
    near_pairs,
    place,
    product,
    product_add,
    state_of_piece,
    store_tokens,
    sum_columns,
    sum_rows,
    token_tile,
    unit_lower_inverse,
)


@triton.jit
def kda_scores(
    q_ptr, k_ptr, v_ptr, g_ptr, beta_ptr, masks_ptr, T,
    scores_ptr, key_scores_ptr, inverse_ptr, u_ptr,
    WHOLE: tl.constexpr, H: tl.constexpr, HV: tl.constexpr, K: tl.constexpr, V: tl.constexpr,
    SCALE: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr,
):  # fmt: skip
    """The decayed products of a chunk's tokens, and the inverse of its triangular system:

        A[i, j]  = sum_k k_i k_j exp(G_i - G_j)           (j < i)
        Aq[i, j] = scale sum_k q_i k_j exp(G_i - G_j)     (j <= i)
        X = (I + A diag(beta))^-1;   u = X v

    A program a chunk and value head. Returns Aq, A, X and u, in the inputs' dtype.

    Floor at B=8 T=4096 HV=16 K=V=128 in bfloat16: 0.87 GB, 0.20 ms at 4.3 TB/s; 0.15 TFLOP where
    decays allow neighbours in one product, else 0.20. 255 registers, 40 to 424 bytes spilled (sm_90
    least, sm_120 most), 24 to 40 KB of shared memory.
    """
    N = tl.cdiv(T, CHUNK)
    _, h, n, b = place(1, N, HV)
    dtype: tl.constexpr = q_ptr.dtype.element_ty
    key_head = h // (HV // H)
    by_key = tl.zeros((CHUNK, CHUNK), tl.float32)
    by_query = tl.zeros((CHUNK, CHUNK), tl.float32)
    own = tl.zeros((CHUNK,), tl.float32)
    for column in range(0, K, BK):
        q = load_tokens(token_tile(q_ptr, b, n, key_head, column, T, H, K, BK), n, T, WHOLE)
        k = load_tokens(token_tile(k_ptr, b, n, key_head, column, T, H, K, BK), n, T, WHOLE)
        g = load_tokens(token_tile(g_ptr, b, n, h, column, T, HV, K, BK), n, T, WHOLE)
        own += tl.sum(q.to(tl.float32) * k.to(tl.float32), 1)
        # Neighbours in one product, where decays allow it.
        log_decay = sum_rows(load_mask(masks_ptr, NEAR_MASK), g)
        least = tl.min(log_decay, 1)
        far = least < -LIMIT
        read, written = near_decays(log_decay)
        earlier = tl.trans(k * written.to(dtype))
        pairs = near_pairs(least >= -LIMIT)
        by_key += tl.where(pairs, exact_dot(k * read.to(dtype), earlier), 0.0)
        by_query += tl.where(pairs, product(q * read.to(dtype), earlier), 0.0)
        # All others level by level of the tree, without a positive exponent.
        for level in range(tl.where(tl.min(least, 0) < -LIMIT, 0, NEAR), LEVELS):
            decay = tl.exp2(sum_rows(load_mask(masks_ptr, level), g)).to(dtype)
            earlier = tl.trans(k * decay)
            pairs = level_pairs(level, far)
            by_key += tl.where(pairs, exact_dot(k * decay, earlier), 0.0)
            by_query += tl.where(pairs, product(q * decay, earlier), 0.0)
    by_query = (by_query + own[:, None] * identity()) * SCALE
    tl.store(chunk_tile(scores_ptr, b, n, h, 0, N, HV, CHUNK, CHUNK), by_query.to(dtype))
    tl.store(chunk_tile(key_scores_ptr, b, n, h, 0, N, HV, CHUNK, CHUNK), by_key.to(dtype))
    beta = load_scalars(beta_ptr, b, n, h, T, HV)
    inverse = unit_lower_inverse(by_key * beta[None, :], dtype).to(dtype)
    tl.store(chunk_tile(inverse_ptr, b, n, h, 0, N, HV, CHUNK, CHUNK), inverse)
    for column in range(0, V, BV):
        v = load_tokens(token_tile(v_ptr, b, n, h, column, T, HV, V, BV), n, T, WHOLE)
        u = product(inverse, v).to(dtype)
        tl.store(chunk_tile(u_ptr, b, n, h, column, N, HV, V, BV), u)


@triton.jit
def kda_operands(
    q_ptr, k_ptr, g_ptr, inverse_ptr, masks_ptr, T,
    query_ptr, read_ptr, write_ptr, decay_ptr,
    WHOLE: tl.constexpr, H: tl.constexpr, HV: tl.constexpr, K: tl.constexpr,
    SCALE: tl.constexpr, BK: tl.constexpr,
):  # fmt: skip
    """What the recurrence multiplies a chunk's state with:

        q~ = scale q exp(G);   w = X (k exp(G));   kg = k exp(G_end - G);   decay = exp(G_end)

    A program BK features of a chunk and value head; its tiles are transposed, features by tokens,
    so that all but masks and X stays in registers. decay is [B, HV, N, K] float32.

    Floor, as above: 0.87 GB, 0.20 ms; 0.03 TFLOP. 125 to 181 registers, 2 to 24 KB.
    """
    N = tl.cdiv(T, CHUNK)
    part, h, n, b = place(K // BK, N, HV)
    dtype: tl.constexpr = q_ptr.dtype.element_ty
    column = part * BK
    key_head = h // (HV // H)
    g = tl.trans(load_tokens(token_tile(g_ptr, b, n, h, column, T, HV, K, BK), n, T, WHOLE))
    k = tl.trans(load_tokens(token_tile(k_ptr, b, n, key_head, column, T, H, K, BK), n, T, WHOLE))
    q = tl.trans(load_tokens(token_tile(q_ptr, b, n, key_head, column, T, H, K, BK), n, T, WHOLE))
    decay = tl.exp2(sum_columns(g, tl.trans(load_mask(masks_ptr, UP_TO))))
    query = (q.to(tl.float32) * decay * SCALE).to(dtype)
    tl.store(chunk_tile(query_ptr, b, n, h, column, N, HV, K, BK), tl.trans(query))
    inverse = tl.load(chunk_tile(inverse_ptr, b, n, h, 0, N, HV, CHUNK, CHUNK))
    read = product((k.to(tl.float32) * decay).to(dtype), tl.trans(inverse)).to(dtype)
    tl.store(chunk_tile(read_ptr, b, n, h, column, N, HV, K, BK), tl.trans(read))
    decay = tl.exp2(sum_columns(g, tl.trans(load_mask(masks_ptr, AFTER))))
    write = (k.to(tl.float32) * decay).to(dtype)
    tl.store(chunk_tile(write_ptr, b, n, h, column, N, HV, K, BK), tl.trans(write))
    total = tl.exp2(tl.sum(g.to(tl.float32), 1))
    decay_ptr += ((b * HV + h) * N + n).to(tl.int64) * K + column
    tl.store(decay_ptr + tl.arange(0, BK), total)


@triton.jit
def kda_recurrence(
    query_ptr, read_ptr, write_ptr, u_ptr, scores_ptr, decay_ptr, beta_ptr, start_ptr,
    spans_ptr, T,
    o_ptr, last_ptr, states_ptr,
    WHOLE: tl.constexpr, HV: tl.constexpr, K: tl.constexpr, V: tl.constexpr,
    KEEP: tl.constexpr, P: tl.constexpr, BV: tl.constexpr,
):  # fmt: skip
    """Runs the chunks in order:

        E = u - w S;   o = q~ S + Aq (beta E);   S <- Diag(decay) S + kg^T (beta E)

    A program has BV columns of one head's state, transposed, [BV, K] float32, in registers: so it
    is the first operand of all its products, and never passes through shared memory.

    Returns o [B, T, HV, V], the last state [B, HV, K, V] float32 and, with KEEP, the states before
    each chunk, transposed, [B, HV, N, V, K] in the inputs' dtype. With P pieces, see
    `chunks_of_piece`, there are P first and last states, [B, HV, P, K, V].

    Floor, as above: 0.75 GB, 0.17 ms, with KEEP 1.02 GB, 0.24 ms; 0.06 TFLOP. 255 registers with up
    to 168 bytes spilled and 72 KB for the smaller classes, 243 and 144 KB on sm_90.
    """
    N = tl.cdiv(T, CHUNK)
    part, h, _, b = place(V // BV, 1, HV)
    dtype: tl.constexpr = query_ptr.dtype.element_ty
    column = part * BV
    kk, vv = tl.arange(0, K), tl.arange(0, BV)
    first, last, p = chunks_of_piece(spans_ptr, b, N, P)
    matrix = state_of_piece((b * HV + h).to(tl.int64), p, P) * K * V + column
    matrix += kk[:, None] * V + vv[None, :]
    state = tl.trans(tl.load(start_ptr + matrix))
    for n in range(first, last):
        rounded = state.to(dtype)
        if KEEP:
            base = states_ptr + (((b * HV + h) * N + n).to(tl.int64) * V + column) * K
            tl.store(base + vv[:, None] * K + kk[None, :], rounded)
        read = tl.load(chunk_tile(read_ptr, b, n, h, 0, N, HV, K, K))
        u = tl.load(chunk_tile(u_ptr, b, n, h, column, N, HV, V, BV))
        error = tl.trans(u).to(tl.float32) - dot(rounded, tl.trans(read))
        beta = load_scalars(beta_ptr, b, n, h, T, HV)
        error = (error * beta[None, :]).to(dtype)
        query = tl.load(chunk_tile(query_ptr, b, n, h, 0, N, HV, K, K))
        o = product(rounded, tl.trans(query))
        scores = tl.load(chunk_tile(scores_ptr, b, n, h, 0, N, HV, CHUNK, CHUNK))
        o = product_add(error, tl.trans(scores), o)
        store_tokens(token_tile(o_ptr, b, n, h, column, T, HV, V, BV), tl.trans(o), n, T, WHOLE)
        decay = tl.load(decay_ptr + ((b * HV + h) * N + n).to(tl.int64) * K + kk)
        write = tl.load(chunk_tile(write_ptr, b, n, h, 0, N, HV, K, K))
        state = dot_add(error, write, state * decay[None, :])
    tl.store(last_ptr + matrix, tl.trans(state))


@triton.jit
def kda_transitions(
    read_ptr, write_ptr, u_ptr, decay_ptr, beta_ptr, T,
    factor_ptr, term_ptr,
    WHOLE: tl.constexpr, HV: tl.constexpr, K: tl.constexpr, V: tl.constexpr, BV: tl.constexpr,
):  # fmt: skip
    """What all chunks do to a state, S <- M S + N, by `kda_recurrence`'s rule without outputs.

    A program has BV columns of N, which starts from zeros, or of M, which starts from the identity
    and with u = 0. Returns M [B, HV, K, K] and N [B, HV, K, V], float32.
    """
    N = tl.cdiv(T, CHUNK)
    part, h, _, b = place((V + K) // BV, 1, HV)
    dtype: tl.constexpr = read_ptr.dtype.element_ty
    of_values = part < V // BV
    column = tl.where(of_values, part, part - V // BV) * BV
    kk, vv = tl.arange(0, K), tl.arange(0, BV)
    own = (kk[None, :] == column + vv[:, None]) & (part >= V // BV)
    state = tl.where(own, 1.0, 0.0)
    for n in range(0, N):
        read = tl.load(chunk_tile(read_ptr, b, n, h, 0, N, HV, K, K))
        # The columns of M read those of u there are, and multiply none of them.
        u_column = tl.where(of_values, column, 0)
        u = tl.load(chunk_tile(u_ptr, b, n, h, u_column, N, HV, V, BV))
        u = tl.where(of_values, tl.trans(u).to(tl.float32), 0.0)
        error = u - dot(state.to(dtype), tl.trans(read))
        beta = load_scalars(beta_ptr, b, n, h, T, HV)
        error = (error * beta[None, :]).to(dtype)
        decay = tl.load(decay_ptr + ((b * HV + h) * N + n).to(tl.int64) * K + kk)
        write = tl.load(chunk_tile(write_ptr, b, n, h, 0, N, HV, K, K))
        state = dot_add(error, write, state * decay[None, :])
    matrix = (b * HV + h).to(tl.int64) * K + kk[:, None]
    if of_values:
        tl.store(term_ptr + matrix * V + column + vv[None, :], tl.trans(state))
    else:
        tl.store(factor_ptr + matrix * K + column + vv[None, :], tl.trans(state))
