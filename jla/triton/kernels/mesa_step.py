"""One token of MesaNet: one pass over both states, which are updated in place."""

import triton
import triton.language as tl


@triton.jit
def mesa_step(
    q, k, v, g, beta, lamb, kk, kv, steps,  # pointers, see `jla.mesa_step`; lamb is [B, H, K]
    o, work, new_kk, new_kv,  # [B, H, V]; the states' are written through `kk` and `kv`
    K: tl.constexpr, V: tl.constexpr, BK: tl.constexpr, BI: tl.constexpr, BV: tl.constexpr,
    WHOLE: tl.constexpr, TOLERANCE: tl.constexpr,
):  # fmt: skip
    """A program has one head. With WHOLE it keeps Hkk in registers; else it reads BI rows of it at
    a time in every iteration, and the direction goes through `work`, [B, H, BK] float32.

    lamb is made one, as in `mesa_solve`. All arithmetic is float32. TOLERANCE: of the residual, in
    units of the query.

    Floor: both states are read and written once, 8 K (K + V) bytes a head: B=128 H=16 K=V=128 has
    0.54 GB, 0.125 ms at 4.3 TB/s; and 2 K^2 operations an iteration, in float32 without matrix
    units, 0.01 ms for the 13 that a residual of 1e-4 takes there. 0.30 ms were measured: sums over
    rows cross eight warps through shared memory, where Triton 3.6 has all lanes of a warp in one
    bank. Four warps with sums of their own are not timed yet (branch triton, 2baee00).
    4 KB of shared memory, 128 registers (sm_80 in bf16 177, sm_100 in float32 199), 16 bytes
    spilled on sm_80 in float32.
    """
    head = tl.program_id(0).to(tl.int64)
    _advance(
        q, k, v, g, beta, lamb, kk, kv, steps, o, work, head, head,
        K, V, BK, BI, BV, WHOLE, TOLERANCE,
    )  # fmt: skip


@triton.jit
def mesa_step_on_pool(
    q, k, v, g, beta, lamb, kk, kv, steps, slots, R, o, work, new_kk, new_kv,
    H: tl.constexpr, K: tl.constexpr, V: tl.constexpr, BK: tl.constexpr, BI: tl.constexpr,
    BV: tl.constexpr, WHOLE: tl.constexpr, TOLERANCE: tl.constexpr,
):  # fmt: skip
    """`mesa_step` of a pool of R rows, of which a program has the one that `slots`, [B], names."""
    program = tl.program_id(0)
    head, row = program.to(tl.int64), tl.load(slots + program // H)
    if (row >= 0) & (row < R):
        of_state = (row * H + program % H).to(tl.int64)
        _advance(
            q, k, v, g, beta, lamb, kk, kv, steps, o, work, head, of_state,
            K, V, BK, BI, BV, WHOLE, TOLERANCE,
        )  # fmt: skip
    else:
        for i in range(0, V, BV):
            part = i + tl.arange(0, BV)
            tl.store(o + head * V + part, tl.zeros((BV,), o.dtype.element_ty), part < V)


@triton.jit
def _advance(
    q, k, v, g, beta, lamb, kk, kv, steps, o, work, head, head_of_state,
    K: tl.constexpr, V: tl.constexpr, BK: tl.constexpr, BI: tl.constexpr, BV: tl.constexpr,
    WHOLE: tl.constexpr, TOLERANCE: tl.constexpr,
):  # fmt: skip
    column = tl.arange(0, BK)
    inside = column < K
    decay = tl.exp(tl.load(g + head))
    strength = tl.load(beta + head).to(tl.float32)
    key = tl.load(k + head * K + column, inside, 0.0).to(tl.float32)
    written = strength * key
    kk += head_of_state * (K * K)
    if WHOLE:
        place = column[:, None] * K + column[None, :]
        both = inside[:, None] & inside[None, :]
        state = decay * tl.load(kk + place, both, 0.0) + written[:, None] * key[None, :]
        tl.store(kk + place, state, both)
    else:
        state = 0.0
        for i in range(0, BK, BI):
            row = i + tl.arange(0, BI)
            place = row[:, None] * K + column[None, :]
            both = (row < K)[:, None] & inside[None, :]
            left = strength * tl.load(k + head * K + row, row < K, 0.0).to(tl.float32)
            block = decay * tl.load(kk + place, both, 0.0) + left[:, None] * key[None, :]
            tl.store(kk + place, block, both)

    scale = tl.rsqrt(tl.load(lamb + head * K + column, inside, 1.0))
    b = tl.load(q + head * K + column, inside, 0.0).to(tl.float32) * scale
    largest = tl.maximum(tl.max(tl.abs(b), 0), 1e-30)
    b *= 1.0 / largest
    size = tl.sum(b * b, 0)
    stop = TOLERANCE * TOLERANCE * size
    x, r, p = b - b, b, b
    step = 0
    while (step < steps) & (size > stop):
        y = _times(state, p * scale, kk, work + head * BK, K, BK, BI, WHOLE) * scale + p
        curvature = tl.sum(p * y, 0)
        alpha = tl.where(curvature > 0.0, size / tl.where(curvature > 0.0, curvature, 1.0), 0.0)
        x += alpha * p
        r -= alpha * y
        new = tl.sum(r * r, 0)
        p = r + (new / size) * p
        size = new
        step += 1
    x *= scale * largest

    kv += head_of_state * (K * V)
    for i in range(0, V, BV):
        part = i + tl.arange(0, BV)
        kv_place = column[:, None] * V + part[None, :]
        real = inside[:, None] & (part < V)[None, :]
        value = tl.load(v + head * V + part, part < V, 0.0).to(tl.float32)
        new_state = decay * tl.load(kv + kv_place, real, 0.0) + written[:, None] * value[None, :]
        tl.store(kv + kv_place, new_state, real)
        read = tl.sum(new_state * x[:, None], 0)
        tl.store(o + head * V + part, read.to(o.dtype.element_ty), part < V)


@triton.jit
def _times(
    state, p, kk, work,
    K: tl.constexpr, BK: tl.constexpr, BI: tl.constexpr, WHOLE: tl.constexpr,
):  # fmt: skip
    """Hkk p, Hkk being symmetric."""
    if WHOLE:
        return tl.sum(state * p[:, None], 0)
    else:
        column = tl.arange(0, BK)
        tl.debug_barrier()  # Hkk is in memory, and all have read what was in `work`
        tl.store(work + column, p)
        tl.debug_barrier()
        y = tl.zeros((BK,), tl.float32)
        for i in range(0, BK, BI):
            row = i + tl.arange(0, BI)
            both = (row < K)[:, None] & (column < K)[None, :]
            block = tl.load(kk + row[:, None] * K + column[None, :], both, 0.0)
            y += tl.sum(block * tl.load(work + row)[:, None], 0)
        return y
