"""KDA's backward pass in five kernels; docs/kernels/kda.md derives the formulas.

`gradient_recurrence` carries the state's gradient back through the chunks. Then, from the states
before and the gradients after each chunk, `errors` makes all sums over K, for the gradients of v
and beta, and `query_gradients` and `key_gradients` all sums over V. Between them `score_gradients`
makes the gradients of a chunk's squares.
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
    before,
    chunk_tile,
    chunks_of_piece,
    dot,
    dot_add,
    level_pairs,
    load_diagonal,
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
    sum_columns_add,
    token_tile,
    up_to,
)


@triton.jit
def kda_gradient_recurrence(
    query_ptr, read_ptr, write_ptr, do_ptr, scores_ptr, decay_ptr, beta_ptr, end_ptr,
    spans_ptr, T,
    gradients_ptr, start_ptr,
    WHOLE: tl.constexpr, HV: tl.constexpr, K: tl.constexpr, V: tl.constexpr,
    P: tl.constexpr, BV: tl.constexpr,
):  # fmt: skip
    """Runs the chunks in reverse; dS is the gradient of the state after the chunk:

        dE = beta (Aq^T do + kg dS);   dS <- Diag(decay) dS + q~^T do - w^T dE

    A program has BV columns of dS, transposed, as `kda_recurrence` those of S.

    Returns dS of each chunk, [B, HV, N, V, K] in the inputs' dtype, and the gradient of the initial
    state, [B, HV, K, V] float32. P as in `kda_recurrence`.

    Floor at B=8 T=4096 HV=16 K=V=128 in bfloat16: 0.87 GB, 0.20 ms at 4.3 TB/s; 0.06 TFLOP. 255
    registers and 72 KB for the smaller classes, 198 and 176 KB on sm_90.
    """
    N = tl.cdiv(T, CHUNK)
    part, h, _, b = place(V // BV, 1, HV)
    dtype: tl.constexpr = query_ptr.dtype.element_ty
    column = part * BV
    kk, vv = tl.arange(0, K), tl.arange(0, BV)
    first, last, p = chunks_of_piece(spans_ptr, b, N, P)
    matrix = state_of_piece((b * HV + h).to(tl.int64), p, P) * K * V + column
    matrix += kk[:, None] * V + vv[None, :]
    gradient = tl.trans(tl.load(end_ptr + matrix))
    for step in range(0, last - first):
        n = last - 1 - step
        rounded = gradient.to(dtype)
        base = gradients_ptr + (((b * HV + h) * N + n).to(tl.int64) * V + column) * K
        tl.store(base + vv[:, None] * K + kk[None, :], rounded)
        write = tl.load(chunk_tile(write_ptr, b, n, h, 0, N, HV, K, K))
        of_error = dot(rounded, tl.trans(write))
        do = tl.trans(load_tokens(token_tile(do_ptr, b, n, h, column, T, HV, V, BV), n, T, WHOLE))
        scores = tl.load(chunk_tile(scores_ptr, b, n, h, 0, N, HV, CHUNK, CHUNK))
        of_error = product_add(do, scores, of_error)
        beta = load_scalars(beta_ptr, b, n, h, T, HV)
        of_error = (of_error * -beta[None, :]).to(dtype)
        decay = tl.load(decay_ptr + ((b * HV + h) * N + n).to(tl.int64) * K + kk)
        query = tl.load(chunk_tile(query_ptr, b, n, h, 0, N, HV, K, K))
        gradient = product_add(do, query, gradient * decay[None, :])
        read = tl.load(chunk_tile(read_ptr, b, n, h, 0, N, HV, K, K))
        gradient = dot_add(of_error, read, gradient)
    tl.store(start_ptr + matrix, tl.trans(gradient))


@triton.jit
def kda_gradient_transitions(
    query_ptr, read_ptr, write_ptr, do_ptr, scores_ptr, decay_ptr, beta_ptr, end_ptr, T,
    factor_ptr, term_ptr,
    WHOLE: tl.constexpr, HV: tl.constexpr, K: tl.constexpr, V: tl.constexpr, BV: tl.constexpr,
):  # fmt: skip
    """What all chunks do to the state's gradient, by `kda_gradient_recurrence`'s rule: M^T, and
    where they take the gradient `end`. Programs and results are as those of `kda_transitions`.
    """
    N = tl.cdiv(T, CHUNK)
    part, h, _, b = place((V + K) // BV, 1, HV)
    dtype: tl.constexpr = query_ptr.dtype.element_ty
    of_values = part < V // BV
    column = tl.where(of_values, part, part - V // BV) * BV
    of_do = tl.where(of_values, column, 0)
    kk, vv = tl.arange(0, K), tl.arange(0, BV)
    matrix = (b * HV + h).to(tl.int64) * K + kk[:, None]
    own = (kk[None, :] == column + vv[:, None]) & (part >= V // BV)
    end = tl.trans(tl.load(end_ptr + matrix * V + of_do + vv[None, :]))
    gradient = tl.where(of_values, end, tl.where(own, 1.0, 0.0))
    for step in range(0, N):
        n = N - 1 - step
        write = tl.load(chunk_tile(write_ptr, b, n, h, 0, N, HV, K, K))
        of_error = dot(gradient.to(dtype), tl.trans(write))
        do = load_tokens(token_tile(do_ptr, b, n, h, of_do, T, HV, V, BV), n, T, WHOLE)
        do = tl.where(of_values, tl.trans(do).to(tl.float32), 0.0).to(dtype)
        scores = tl.load(chunk_tile(scores_ptr, b, n, h, 0, N, HV, CHUNK, CHUNK))
        of_error = product_add(do, scores, of_error)
        beta = load_scalars(beta_ptr, b, n, h, T, HV)
        of_error = (of_error * -beta[None, :]).to(dtype)
        decay = tl.load(decay_ptr + ((b * HV + h) * N + n).to(tl.int64) * K + kk)
        query = tl.load(chunk_tile(query_ptr, b, n, h, 0, N, HV, K, K))
        gradient = product_add(do, query, gradient * decay[None, :])
        read = tl.load(chunk_tile(read_ptr, b, n, h, 0, N, HV, K, K))
        gradient = dot_add(of_error, read, gradient)
    if of_values:
        tl.store(term_ptr + matrix * V + column + vv[None, :], tl.trans(gradient))
    else:
        tl.store(factor_ptr + matrix * K + column + vv[None, :], tl.trans(gradient))


@triton.jit
def kda_errors(
    v_ptr, do_ptr, read_ptr, write_ptr, states_ptr, gradients_ptr,
    inverse_ptr, key_scores_ptr, scores_ptr, beta_ptr, T,
    dv_ptr, written_ptr, dbeta_ptr,
    WHOLE: tl.constexpr, HV: tl.constexpr, K: tl.constexpr, V: tl.constexpr,
    BK: tl.constexpr, BV: tl.constexpr,
):  # fmt: skip
    """What a chunk wrote, and the gradients of v and beta. With S before the chunk and dS after it:

        E = X v - w S;   y = Aq^T do + kg dS;   dv = X^T (beta y)
        z = y - A^T dv;   dbeta = rowsum(E z)

    A program BV value columns of a chunk and value head; its tiles are transposed, columns by
    tokens, so that all but squares and keys stays in registers.

    Returns dv [B, T, HV, V], beta E [B, HV, N * 64, V], and dbeta [V / BV, B, T, HV] float32, to be
    summed over the blocks of columns.

    Floor, as above: 1.54 GB, 0.36 ms; 0.07 TFLOP. 128 to 152 registers and 12 KB for the smaller
    classes, 176 and 40 KB on sm_90.
    """
    N = tl.cdiv(T, CHUNK)
    part, h, n, b = place(V // BV, N, HV)
    dtype: tl.constexpr = v_ptr.dtype.element_ty
    column = part * BV
    matrix = ((b * HV + h) * N + n).to(tl.int64) * (V * K) + column * K
    matrix += tl.arange(0, BV)[:, None] * K + tl.arange(0, BK)[None, :]
    y = tl.zeros((BV, CHUNK), tl.float32)
    for feature in range(0, K, BK):
        write = tl.load(chunk_tile(write_ptr, b, n, h, feature, N, HV, K, BK))
        y = dot_add(tl.load(gradients_ptr + matrix + feature), tl.trans(write), y)
    scores = tl.load(chunk_tile(scores_ptr, b, n, h, 0, N, HV, CHUNK, CHUNK))
    do = load_tokens(token_tile(do_ptr, b, n, h, column, T, HV, V, BV), n, T, WHOLE)
    y = dot_add(tl.trans(do), scores, y)
    beta = load_scalars(beta_ptr, b, n, h, T, HV)[None, :]
    inverse = tl.load(chunk_tile(inverse_ptr, b, n, h, 0, N, HV, CHUNK, CHUNK))
    dv = dot((y * beta).to(dtype), inverse).to(dtype)
    dv_pointers = token_tile(dv_ptr, b, n, h, column, T, HV, V, BV)
    store_tokens(dv_pointers, tl.trans(dv), n, T, WHOLE)
    key_scores = tl.load(chunk_tile(key_scores_ptr, b, n, h, 0, N, HV, CHUNK, CHUNK))
    z = y - dot(dv, key_scores)
    known = tl.zeros((BV, CHUNK), tl.float32)
    for feature in range(0, K, BK):
        read = tl.load(chunk_tile(read_ptr, b, n, h, feature, N, HV, K, BK))
        known = dot_add(tl.load(states_ptr + matrix + feature), tl.trans(read), known)
    v = load_tokens(token_tile(v_ptr, b, n, h, column, T, HV, V, BV), n, T, WHOLE)
    error = dot(tl.trans(v), tl.trans(inverse)) - known
    written = (error * beta).to(dtype)
    tl.store(chunk_tile(written_ptr, b, n, h, column, N, HV, V, BV), tl.trans(written))
    t = tl.arange(0, CHUNK) + n * CHUNK
    rows = tl.num_programs(0) // (V // BV * N * HV)  # B
    dbeta_ptr += ((part * rows + b) * T + t).to(tl.int64) * HV + h
    tl.store(dbeta_ptr, tl.sum(error * z, 0), mask=t < T)


@triton.jit
def kda_score_gradients(
    do_ptr, dv_ptr, written_ptr, T,
    dscores_ptr, dkey_scores_ptr,
    WHOLE: tl.constexpr, HV: tl.constexpr, V: tl.constexpr, SCALE: tl.constexpr, BV: tl.constexpr,
):  # fmt: skip
    """The gradients of a chunk's scores:

        dAq = scale tril(do (beta E)^T);   dA = -stril(dv (beta E)^T)

    A program a chunk and value head. Returns dAq and dA.

    Floor, as above: 0.54 GB, 0.12 ms; 0.02 TFLOP. 96 to 158 registers, 24 to 48 KB.
    """
    N = tl.cdiv(T, CHUNK)
    _, h, n, b = place(1, N, HV)
    dtype: tl.constexpr = do_ptr.dtype.element_ty
    by_query = tl.zeros((CHUNK, CHUNK), tl.float32)
    by_key = tl.zeros((CHUNK, CHUNK), tl.float32)
    for column in range(0, V, BV):
        written = tl.trans(tl.load(chunk_tile(written_ptr, b, n, h, column, N, HV, V, BV)))
        do = load_tokens(token_tile(do_ptr, b, n, h, column, T, HV, V, BV), n, T, WHOLE)
        by_query = dot_add(do, written, by_query)
        dv = load_tokens(token_tile(dv_ptr, b, n, h, column, T, HV, V, BV), n, T, WHOLE)
        by_key = dot_add(dv, written, by_key)
    by_query = tl.where(up_to(), by_query * SCALE, 0.0).to(dtype)
    tl.store(chunk_tile(dscores_ptr, b, n, h, 0, N, HV, CHUNK, CHUNK), by_query)
    by_key = tl.where(before(), -by_key, 0.0).to(dtype)
    tl.store(chunk_tile(dkey_scores_ptr, b, n, h, 0, N, HV, CHUNK, CHUNK), by_key)


@triton.jit
def kda_query_gradients(
    q_ptr, k_ptr, g_ptr, do_ptr, states_ptr, dscores_ptr, masks_ptr, sums_ptr, T,
    dq_ptr, dg_ptr,
    WHOLE: tl.constexpr, H: tl.constexpr, HV: tl.constexpr, K: tl.constexpr, V: tl.constexpr,
    SCALE: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr,
):  # fmt: skip
    """The gradient of q and what it means for the log decays: through the states, dq~ = do S^T, and
    through the scores, by the products that `kda_scores` makes.

    What a decayed product contributes to the gradient of its log decays is itself times its
    gradient, for each of them. These are summed without subtractions, but for neighbours' keys,
    whose decays are not strong.

    A program BK features of a chunk and value head; its tiles are transposed, features by tokens,
    so that all but masks, states and the scores' gradients stays in registers.

    Returns dq [B, T, HV, K], of each value head, and its part of dg, [B, T, HV, K] float32.

    Floor, as above: 1.27 GB, 0.30 ms; 0.11 TFLOP, 0.15 where decays are strong. 255 registers,
    up to 24 bytes spilled, 28 KB.
    """
    N = tl.cdiv(T, CHUNK)
    part, h, n, b = place(K // BK, N, HV)
    dtype: tl.constexpr = q_ptr.dtype.element_ty
    column = part * BK
    key_head = h // (HV // H)
    matrix = ((b * HV + h) * N + n).to(tl.int64) * (V * K) + column
    matrix += tl.arange(0, BV)[:, None] * K + tl.arange(0, BK)[None, :]
    dq = tl.zeros((BK, CHUNK), tl.float32)
    for value in range(0, V, BV):
        do = load_tokens(token_tile(do_ptr, b, n, h, value, T, HV, V, BV), n, T, WHOLE)
        dq = product_add(tl.trans(tl.load(states_ptr + matrix + value * K)), tl.trans(do), dq)
    g = tl.trans(load_tokens(token_tile(g_ptr, b, n, h, column, T, HV, K, BK), n, T, WHOLE))
    dq *= tl.exp2(sum_columns(g, tl.trans(load_mask(masks_ptr, UP_TO)))) * SCALE
    q = tl.trans(load_tokens(token_tile(q_ptr, b, n, key_head, column, T, H, K, BK), n, T, WHOLE))
    dg = sum_columns((q.to(tl.float32) * dq).to(dtype), load_mask(sums_ptr, UP_TO))
    # Neighbours.
    k = tl.trans(load_tokens(token_tile(k_ptr, b, n, key_head, column, T, H, K, BK), n, T, WHOLE))
    dscores = tl.load(chunk_tile(dscores_ptr, b, n, h, 0, N, HV, CHUNK, CHUNK))
    log_decay = sum_columns(g, tl.trans(load_mask(masks_ptr, NEAR_MASK)))
    least = tl.min(log_decay, 0)
    far = least < -LIMIT
    read, written = near_decays(log_decay)
    by_query = tl.where(near_pairs(least >= -LIMIT), dscores, 0.0)
    change = product(k * written.to(dtype), tl.trans(by_query)) * read
    dq += change
    dg = sum_columns_add((q.to(tl.float32) * change).to(dtype), load_mask(sums_ptr, NEAR_MASK), dg)
    # All others level by level of the tree.
    for level in range(tl.where(tl.min(least, 0) < -LIMIT, 0, NEAR), LEVELS):
        decay = tl.exp2(sum_columns(g, tl.trans(load_mask(masks_ptr, level))))
        by_query = tl.where(level_pairs(level, far), dscores, 0.0)
        change = product(k * decay.to(dtype), tl.trans(by_query)) * decay
        dq += change
        dg = sum_columns_add((q.to(tl.float32) * change).to(dtype), load_mask(sums_ptr, level), dg)
    store_tokens(token_tile(dg_ptr, b, n, h, column, T, HV, K, BK), tl.trans(dg), n, T, WHOLE)
    # The scores' diagonal knows no decay.
    dq += load_diagonal(dscores_ptr, b, n, h, N, HV)[None, :] * k.to(tl.float32)
    store_tokens(token_tile(dq_ptr, b, n, h, column, T, HV, K, BK), tl.trans(dq), n, T, WHOLE)


@triton.jit
def kda_key_gradients(
    q_ptr, k_ptr, g_ptr, dv_ptr, written_ptr, states_ptr, gradients_ptr,
    dkey_scores_ptr, dscores_ptr, masks_ptr, sums_ptr, part_ptr, T,
    dk_ptr, dg_ptr,
    WHOLE: tl.constexpr, H: tl.constexpr, HV: tl.constexpr, K: tl.constexpr, V: tl.constexpr,
    BK: tl.constexpr, BV: tl.constexpr,
):  # fmt: skip
    """The gradients of k and the log decays, as `kda_query_gradients`: through the states,

        dk~ = -dv S^T;   dkg = (beta E) dS^T

    and through the scores, where keys are read and where they read.

    Returns dk [B, T, HV, K], of each value head, and dg [B, T, HV, K] float32: the sum of `part`,
    what `kda_query_gradients` returned, and what keys mean for it.

    Floor, as above: 2.0 GB, 0.47 ms; 0.21 TFLOP, 0.29 where decays are strong. 255 registers, up to
    336 bytes spilled, 28 KB: with 8 warps none, and the backward pass took 8 ms instead of 5.6.
    """
    N = tl.cdiv(T, CHUNK)
    part, h, n, b = place(K // BK, N, HV)
    dtype: tl.constexpr = q_ptr.dtype.element_ty
    column = part * BK
    key_head = h // (HV // H)
    matrix = ((b * HV + h) * N + n).to(tl.int64) * (V * K) + column
    matrix += tl.arange(0, BV)[:, None] * K + tl.arange(0, BK)[None, :]
    dread = tl.zeros((BK, CHUNK), tl.float32)
    dwritten = tl.zeros((BK, CHUNK), tl.float32)
    carried = tl.zeros((BK, BV), tl.float32)
    for value in range(0, V, BV):
        state = tl.trans(tl.load(states_ptr + matrix + value * K))
        gradient = tl.trans(tl.load(gradients_ptr + matrix + value * K))
        carried += state.to(tl.float32) * gradient.to(tl.float32)
        dv = load_tokens(token_tile(dv_ptr, b, n, h, value, T, HV, V, BV), n, T, WHOLE)
        dread = product_add(state, tl.trans(dv), dread)
        errors = tl.load(chunk_tile(written_ptr, b, n, h, value, N, HV, V, BV))
        dwritten = product_add(gradient, tl.trans(errors), dwritten)
    # A reader's product counts for the decays up to it, a writer's for those after it.
    g = tl.trans(load_tokens(token_tile(g_ptr, b, n, h, column, T, HV, K, BK), n, T, WHOLE))
    k = tl.trans(load_tokens(token_tile(k_ptr, b, n, key_head, column, T, H, K, BK), n, T, WHOLE))
    dk = dread * -tl.exp2(sum_columns(g, tl.trans(load_mask(masks_ptr, UP_TO))))
    dg = sum_columns((k.to(tl.float32) * dk).to(dtype), load_mask(sums_ptr, UP_TO))
    dwritten *= tl.exp2(sum_columns(g, tl.trans(load_mask(masks_ptr, AFTER))))
    dk += dwritten
    dg = sum_columns_add((k.to(tl.float32) * dwritten).to(dtype), load_mask(sums_ptr, AFTER), dg)
    dg += (tl.sum(carried, 1) * tl.exp2(tl.sum(g.to(tl.float32), 1)))[:, None]
    # Neighbours: what enters a block of them and does not leave it cancels in its sum.
    log_decay = sum_columns(g, tl.trans(load_mask(masks_ptr, NEAR_MASK)))
    least = tl.min(log_decay, 0)
    far = least < -LIMIT
    read, written = near_decays(log_decay)
    pairs = near_pairs(least >= -LIMIT)
    dkey_scores = tl.load(chunk_tile(dkey_scores_ptr, b, n, h, 0, N, HV, CHUNK, CHUNK))
    by_key = tl.where(pairs, dkey_scores, 0.0)
    dread = product(k * written.to(dtype), tl.trans(by_key)) * read
    dk += dread
    dg = sum_columns_add((k.to(tl.float32) * dread).to(dtype), load_mask(sums_ptr, NEAR_MASK), dg)
    dwritten = product(k * read.to(dtype), by_key)
    q = tl.trans(load_tokens(token_tile(q_ptr, b, n, key_head, column, T, H, K, BK), n, T, WHOLE))
    dscores = tl.load(chunk_tile(dscores_ptr, b, n, h, 0, N, HV, CHUNK, CHUNK))
    dwritten = product_add(q * read.to(dtype), tl.where(pairs, dscores, 0.0), dwritten) * written
    dk += dwritten
    dg = sum_columns_add(
        (k.to(tl.float32) * -dwritten).to(dtype), load_mask(sums_ptr, NEAR_MASK), dg
    )
    # All others level by level of the tree.
    for level in range(tl.where(tl.min(least, 0) < -LIMIT, 0, NEAR), LEVELS):
        decay = tl.exp2(sum_columns(g, tl.trans(load_mask(masks_ptr, level))))
        pairs = level_pairs(level, far)
        by_key = tl.where(pairs, dkey_scores, 0.0)
        keys = k * decay.to(dtype)
        change = dot_add(keys, by_key, dot(keys, tl.trans(by_key)))
        queries = q * decay.to(dtype)
        change = product_add(queries, tl.where(pairs, dscores, 0.0), change) * decay
        dk += change
        dg = sum_columns_add((k.to(tl.float32) * change).to(dtype), load_mask(sums_ptr, level), dg)
    of_queries = load_tokens(token_tile(part_ptr, b, n, h, column, T, HV, K, BK), n, T, WHOLE)
    dg = tl.trans(dg) + of_queries
    store_tokens(token_tile(dg_ptr, b, n, h, column, T, HV, K, BK), dg, n, T, WHOLE)
    # The scores' diagonal knows no decay.
    dk += load_diagonal(dscores_ptr, b, n, h, N, HV)[None, :] * q.to(tl.float32)
    store_tokens(token_tile(dk_ptr, b, n, h, column, T, HV, K, BK), tl.trans(dk), n, T, WHOLE)
