"""The solves of all chunks whose states are known, by conjugate gradients: forward and backward.

Inside the kernels lamb is 1: queries and keys come divided by sqrt(lamb), which preconditions with
Diag(lamb) and costs the iterations nothing. With S the state before the chunk and M[t, j] =
beta_j exp(G_t - G_j) for j <= t,

    A_t x = exp(G_t) S x + sum_j M[t, j] k_j (k_j . x) + x

is for all rows at once two products with S and with the keys. Rows are independent: a row's
operands are scaled by its own norm, and it stops by its own residual.
"""

import functools

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from jla.pallas.common import chunks, mosaic, scratch
from jla.pallas.common.chunks import CHUNK, TILE_WIDTH
from jla.pallas.common.mosaic import (
    PER_COLUMN,
    PER_ROW,
    WGMMA_LAYOUT,
    bf16,
    f16,
    f32,
    per_column,
    per_row,
    product,
)
from jla.pallas.common.scratch import barrier_for, fetch
from jla.pallas.common.tiles import SMALLEST, columns

SDS = jax.ShapeDtypeStruct
# A row stops when its residual is this much smaller than its right-hand side: about what float16
# operands reach, and a quarter of bfloat16's rounding.
TOLERANCE = 5e-4
AT_ONCE = 2  # iterations between two looks at whether all rows have stopped


def outputs(
    q, k, v, scale, cumulated, decays, since, beta, kk, kk_scale, kv, kv_scale,
    *, steps, tolerance, keep,
):  # fmt: skip
    """The outputs of all chunks:

        1.  x_t = A_t^-1 q_t
        2.  o_t = exp(G_t) x_t Hkv + sum_j M[t, j] (x_t . k_j) v_j

    Args:
      q: [B, T, H, K] bf16. k, v: as in `states.forward`.
      scale: lamb^-1/2, [B, H, K] float32: it makes q what k already is.
      cumulated, decays: G in base 2, at most 0, and exp(G), [B, H, TP] float32. beta: [B, H, TP].
      since: the place in its chunk of the first token that each token reads, [B, H, TP] uint32.
      kk, kk_scale, kv, kv_scale: as `states.forward` returned them.
      steps: the most iterations. tolerance: 0 makes all of them.
      keep: whether to return x, for the backward pass.

    Returns:
      o [B, T, H, V] and, with `keep`, x [B, T, H, K], bf16.

    One warpgroup a chunk; 91 KB of SMEM at K=V=128, so that two chunks share a multiprocessor. An
    iteration has no barrier: what changes is in registers (half of x in SMEM, each thread its own
    elements), what wgmma reads from SMEM stays. Floor at B=8 T=4096 H=16 K=128: 4.2 MFLOP an
    iteration and chunk, with 30 iterations 1.03 TFLOP, 1.3 ms at 780 TFLOP/s. An iteration is 840
    instructions a warp; predicted: 2.0 ms with 30.
    """
    (B, T, H, K), V, TP = q.shape, v.shape[-1], beta.shape[-1]
    out = scratch.kernel(
        functools.partial(_outputs_body, steps=steps, tolerance=tolerance),
        inputs=dict(
            **dict(q=q, k=k, v=v, scale=scale),
            **_of_pairs(cumulated, decays, since, beta),
            **dict(kk=kk, kk_scale=kk_scale, kv=kv, kv_scale=kv_scale),
        ),
        outputs=dict(
            o=SDS((B, T, H, V), bf16),
            x=SDS((B, T, H, K), bf16) if keep else None,
        ),
        scratch=dict(
            **_scratch(K, V),
            loaded=barrier_for(["q"]),
            keys_loaded=barrier_for(["k", "kk"]),
            values_loaded=barrier_for(["kv", "v"]),
        ),
        automatic_barriers=False,
        grid=(B, TP // CHUNK, H),
        grid_names=("b", "n", "h"),
    )
    return tuple(x for x in out if x is not None)


def _of_pairs(cumulated, decays, since, beta):
    """The operands that `_put_pairs` and `solve` have in common, by name."""
    both = dict(cumulated=cumulated, cumulated_by_column=cumulated)
    return both | dict(decays=decays, since=since, beta=beta)


def _outputs_body(refs, *, steps, tolerance):
    b, n, h = (lax.axis_index(name) for name in ("b", "n", "h"))
    rows = pl.ds(n * CHUNK, CHUNK)
    keep = refs.x is not None
    sk, ss, so = refs.sk, refs.ss, refs.so
    k_tiles = so.keys.shape[1] // TILE_WIDTH

    fetch(dict(q=(refs.q.at[b, rows, h], so.keys)), refs.loaded)
    keys = (refs.k.at[b, rows, h], sk.keys)
    fetch(dict(k=keys, kk=(refs.kk.at[b, h, n], ss.keys)), refs.keys_loaded)
    decay = mosaic.load(refs.decays.at[b, h, rows], PER_ROW, optimized=False)
    _put_pairs(refs, b, h, rows)

    # 1. x, from queries divided by sqrt(lamb).
    plgpu.barrier_wait(refs.loaded)
    scale = mosaic.load(refs.scale.at[b, h], PER_COLUMN, optimized=False)
    query, size = normalised(mosaic.load(so.keys) * per_column(scale, CHUNK))
    plgpu.barrier_wait(refs.keys_loaded)
    scale = with_one_scale(ss.keys, [refs.kk_scale[b, h, n, i] for i in range(k_tiles)])
    x = solve(query, refs, decay * scale, steps=steps, tolerance=tolerance)
    x, x_size = all_normalised(x)
    plgpu.commit_smem()  # all warps are done with Hkk and q

    # 2. o.
    fetch(dict(kv=(refs.kv.at[b, h, n], ss.values)), refs.values_loaded, partial=True)
    size = size * x_size
    if keep:
        for i, y in enumerate(x):
            so.keys.at[:, columns(i)][...] = (y * per_row(size, TILE_WIDTH)).astype(bf16)
        send(so.keys, refs.x.at[b, rows, h])
    x = [y.astype(f16) for y in x]
    scores = product(*((y, sk.keys.at[:, columns(i)].T) for i, y in enumerate(x)))
    scores = (scores * mosaic.load(refs.sm)).astype(f16)
    plgpu.commit_smem()  # and with the keys
    fetch(dict(v=(refs.v.at[b, rows, h], sk.values)), refs.values_loaded, partial=True)
    if keep:
        plgpu.wait_smem_to_gmem(0, wait_read_only=True)
    plgpu.barrier_wait(refs.values_loaded)
    total, V = None, sk.values.shape[1]
    for i, y in enumerate(x):
        part = product((y, ss.values.at[columns(i)]))
        part *= per_row(decay * refs.kv_scale[b, h, n, i], V)
        total = part if total is None else total + part
    o = product((scores, sk.values), init=total) * per_row(size, V)
    so.values[...] = o.astype(bf16)
    send(so.values, refs.o.at[b, rows, h])
    plgpu.wait_smem_to_gmem(0, wait_read_only=True)


def output_gradients(
    k, v, do, x, cumulated, decays, since, beta, kk, kk_scale, kv, kv_scale,
    *, steps, tolerance,
):  # fmt: skip
    """The backward pass's solves, with dx the gradient of o through x:

        1.  dx_t = exp(G_t) Hkv do_t + sum_j M[t, j] (do_t . v_j) k_j
        2.  y_t = A_t^-1 dx_t
        3.  dG_t = exp(G_t) (x_t Hkv do_t - y_t Hkk x_t)       through the states' decay alone

    Args:
      do: [B, T, H, V] bf16. x: as `outputs` returned it.
      Others as in `outputs`.

    Returns:
      y [B, T, H, K] bf16, the gradient of q; dG, [B, H, TP] float32; and each chunk's sum of y x,
      [B, H, N, K] float32, for the gradient of lamb.

    As `outputs`, with 2 KB of SMEM more for sums over rows.
    """
    (B, T, H, K), V, TP = k.shape, v.shape[-1], beta.shape[-1]
    out = scratch.kernel(
        functools.partial(_gradients_body, steps=steps, tolerance=tolerance),
        inputs=dict(
            **dict(k=k, v=v, do=do, x=x),
            **_of_pairs(cumulated, decays, since, beta),
            **dict(kk=kk, kk_scale=kk_scale, kv=kv, kv_scale=kv_scale),
        ),
        outputs=dict(
            y=SDS((B, T, H, K), bf16),
            through_decays=SDS((B, H, TP), f32),
            products=SDS((B, H, TP // CHUNK, K), f32),
        ),
        scratch=dict(
            **_scratch(K, V),
            values_loaded=barrier_for(["do", "v", "kv"]),
            keys_loaded=barrier_for(["k", "x", "kk"]),
        ),
        automatic_barriers=False,
        grid=(B, TP // CHUNK, H),
        grid_names=("b", "n", "h"),
    )
    return tuple(out)


def _gradients_body(refs, *, steps, tolerance):
    b, n, h = (lax.axis_index(name) for name in ("b", "n", "h"))
    rows = pl.ds(n * CHUNK, CHUNK)
    sk, ss, so = refs.sk, refs.ss, refs.so
    K = so.keys.shape[1]
    k_tiles = K // TILE_WIDTH

    values = dict(do=(refs.do.at[b, rows, h], so.values), v=(refs.v.at[b, rows, h], sk.values))
    fetch(values | dict(kv=(refs.kv.at[b, h, n], ss.values)), refs.values_loaded)
    decay = mosaic.load(refs.decays.at[b, h, rows], PER_ROW, optimized=False)
    _put_pairs(refs, b, h, rows)

    # 1. dx, in two parts: what comes through the state, and through the chunk's own pairs.
    plgpu.barrier_wait(refs.values_loaded)
    do, do_size = normalised(mosaic.load(so.values))
    do = do.astype(f16)
    scores, scores_size = normalised(product((do, sk.values.T)) * mosaic.load(refs.sm))
    scores = scores.astype(f16)
    carried = []
    for i in range(k_tiles):
        part = product((do, ss.values.at[columns(i)].T))
        carried.append(part * per_row(decay * refs.kv_scale[b, h, n, i], TILE_WIDTH))
    plgpu.commit_smem()  # all warps are done with do, v and Hkv
    keys = dict(k=(refs.k.at[b, rows, h], sk.keys), x=(refs.x.at[b, rows, h], so.keys))
    fetch(keys | dict(kk=(refs.kk.at[b, h, n], ss.keys)), refs.keys_loaded)
    plgpu.barrier_wait(refs.keys_loaded)
    solution = [so.keys.at[:, columns(i)] for i in range(k_tiles)]
    through_kv = row_sum([x * mosaic.load(y) for x, y in zip(carried, solution, strict=True)])
    through_kv *= do_size
    own = product((scores, sk.keys)) * per_row(scores_size, K)

    # 2. y.
    dx, size = normalised(mosaic.beside(carried) + own)
    scale = with_one_scale(ss.keys, [refs.kk_scale[b, h, n, i] for i in range(k_tiles)])
    y = solve(dx, refs, decay * scale, steps=steps, tolerance=tolerance)
    y, y_size = all_normalised(y)
    size = size * y_size * do_size

    # 3. dG, and the sums of y x.
    rounded = [z.astype(f16) for z in y]
    through_kk = []
    for i, x in enumerate(solution):
        part = product(*((z, ss.keys.at[columns(i), columns(j)].T) for j, z in enumerate(rounded)))
        through_kk.append(part * per_row(decay * scale, TILE_WIDTH) * mosaic.load(x))
    refs.through_decays.at[b, h, rows][...] = through_kv - row_sum(through_kk) * size
    y = [z * per_row(size, TILE_WIDTH) for z in y]
    for i, (z, x) in enumerate(zip(y, solution, strict=True)):
        products = jnp.sum(z * mosaic.load(x), axis=0)
        refs.products.at[b, h, n, columns(i)][...] = products
    plgpu.commit_smem()  # all warps have read x
    for z, tile in zip(y, solution, strict=True):
        tile[...] = z.astype(bf16)
    send(so.keys, refs.y.at[b, rows, h])
    plgpu.wait_smem_to_gmem(0, wait_read_only=True)


def _scratch(K, V):
    def either(rows, dtype):
        return dict(
            keys=mosaic.tile(rows, K, dtype=dtype), values=mosaic.tile(rows, V, dtype=dtype)
        )

    return dict(
        sk=either(CHUNK, f16),
        ss=dict(keys=mosaic.tile(K, K, dtype=f16), values=mosaic.tile(K, V, dtype=f16)),
        sx=[float_tile()] if K > TILE_WIDTH else [],  # the second half of the solution
        sm=mosaic.tile(CHUNK, CHUNK, dtype=f16),  # M
        so=either(CHUNK, bf16),  # other operands, and results
    )


def float_tile():
    """A float32 SMEM tile, [64, 64], of which each thread reads and writes its own elements.

    Rows are 8 elements longer: then a wgmma accumulator's go in and out without bank conflicts and
    without the exchange between lanes that a swizzled tile costs.
    """
    return plgpu.SMEM((CHUNK, TILE_WIDTH + 8), f32)


def own_elements(tile):
    """The [64, 64] of a `float_tile`."""
    return tile.at[:, pl.ds(0, TILE_WIDTH)]


def load_own(tile):
    return mosaic.load(own_elements(tile), optimized=False)


def send(tile, out):
    """Sends what was stored in a tile to memory."""
    plgpu.commit_smem()
    plgpu.copy_smem_to_gmem(tile, out)


def put(buffers, values, out):
    """Sends tiles to memory as bf16, through SMEM that is not read any more."""
    used = buffers[: len(values)]
    for tile, value in zip(used, values, strict=True):
        tile[...] = value.astype(bf16)
    plgpu.commit_smem()
    for i, tile in enumerate(used):
        plgpu.copy_smem_to_gmem(tile, out.at[:, columns(i)])


def _put_pairs(refs, b, h, rows):
    """M[t, j] = beta_j exp(G_t - G_j) for since_t <= j <= t, else 0, to `refs.sm`."""

    def vector(ref, layout):
        return mosaic.load(ref.at[b, h, rows], layout, optimized=False)

    row = vector(refs.cumulated, PER_ROW)
    column = vector(refs.cumulated_by_column, PER_COLUMN)
    difference = jnp.minimum(per_row(row, CHUNK) - per_column(column, CHUNK), 0.0)
    m = jnp.exp2(difference)
    m *= per_column(vector(refs.beta, PER_COLUMN), CHUNK)
    since = plgpu.load(refs.since.at[b, h, rows], layout=PER_ROW, optimized=False)
    reads = mosaic.in_interval(since, chunks.tokens() + 1 - since, CHUNK)
    refs.sm[...] = jnp.where(reads, m, 0.0).astype(f16)
    plgpu.commit_smem()


def row_sum(tiles):
    """The sum over all columns of the tiles."""
    total = tiles[0]
    for x in tiles[1:]:
        total = total + x
    return jnp.sum(total, axis=1)


def normalised(rows):
    """The rows divided by their largest magnitudes, and those."""
    (rows,), largest = all_normalised([rows])
    return rows, largest


def all_normalised(tiles):
    """The same, of tiles side by side."""
    largest = jnp.abs(tiles[0])
    for x in tiles[1:]:
        largest = jnp.maximum(largest, jnp.abs(x))
    largest = jnp.maximum(jnp.max(largest, axis=1), SMALLEST)
    inverse = per_row(1.0 / largest, tiles[0].shape[1])
    return [x * inverse for x in tiles], largest


def with_one_scale(state, scales):
    """Gives all of S one scale, such that its largest element is 1; returns that scale."""
    if len(scales) > 1:
        largest = functools.reduce(jnp.maximum, scales)
        for i, scale in enumerate(scales):
            tile = state.at[columns(i)]
            tile[...] = (mosaic.load(tile) * (scale / largest)).astype(f16)
        plgpu.commit_smem()
        return largest
    return scales[0]


def solve(b, refs, factor, *, steps, tolerance):
    """Conjugate gradients: x with A_t x_t = b_t, from zero, as tiles of [64, 64].

    A direction p is rounded to float16 with its row scaled to norm one or a little more, and the
    rounded one *is* the direction: its product is exact but for the rounding of S and of the
    scores, which therefore is what bounds the residual.

    In registers are r (64 a thread), A p (64), p (32, as float32 64 where nothing else is large)
    and half of x (32). The other half of x is in SMEM: with all of it there, SMEM would have as
    much to do for x as for the products.

    Args:
      b: the right-hand side, float32, [64, K].
      refs: sk.keys, ss.keys: the keys and S, which is symmetric. sm: M. sx: a `float_tile`, or none
        where K is 64.
      factor: exp(G_t) times what S has been divided by, a vector along rows.
    """
    sk, ss, sm, K = refs.sk.keys, refs.ss.keys, refs.sm, b.shape[1]
    second = [own_elements(tile) for tile in refs.sx]

    def tile(x, i):
        return lax.slice(x, (0, i * TILE_WIDTH), (CHUNK, (i + 1) * TILE_WIDTH))

    zeros = b - b  # NaN where b is, whose row stops at once
    for half in second:
        half[...] = tile(zeros, 1)
    size = jnp.sum(b * b, axis=1)
    stop = tolerance * tolerance * size
    inverse = lax.rsqrt(jnp.maximum(size, SMALLEST))
    live = jnp.where(size > stop, 1.0, 0.0)

    def times(p):
        """A_t p_t - p_t for all rows t."""
        # Zeros that differ from those of S p below: with the same, ptxas writes all of both.
        zeros = plgpu.layout_cast(jnp.full((CHUNK, CHUNK), -0.0, f32), WGMMA_LAYOUT)
        s = product((p, sk.T), init=zeros)

        def masked():
            return s.astype(f16) * plgpu.load(sm, layout=WGMMA_LAYOUT)

        y, scores = mosaic.product_beside((p, ss), masked)
        return product((scores, sk), init=y * per_row(factor, K))

    def iterate(_, carry):
        r, p, x, size, inverse, live = carry
        y = times(p)
        p = p.astype(f32)
        y = y + p
        curvature = jnp.sum(p * y, axis=1)
        root = lax.rsqrt(jnp.maximum(curvature, SMALLEST))  # its square is cheaper than a quotient
        alpha = jnp.where(curvature > SMALLEST, live * size * inverse * root * root, 0.0)
        wide = per_row(alpha, TILE_WIDTH)
        for half in second:
            half[...] = mosaic.load(half, optimized=False) + wide * tile(p, 1)
        x = x + wide * tile(p, 0)
        r = r - per_row(alpha, K) * y
        size = jnp.sum(r * r, axis=1)
        live = jnp.where(size > stop, live, 0.0)
        new = lax.rsqrt(jnp.maximum(size, SMALLEST))
        p = r * per_row(new, K) + p * per_row(size * new * inverse, K)
        return r, p.astype(f16), x, size, new, live

    def going(carry):
        step, anyone = carry[:2]
        return (step < steps) & (anyone > 0.0)

    def iterations(carry):
        step, _, *rest = carry
        count = jnp.minimum(AT_ONCE, steps - step)
        rest = lax.fori_loop(0, count, iterate, tuple(rest))
        return step + count, jnp.max(rest[-1]), *rest

    p = (b * per_row(inverse, K)).astype(f16)
    start = (jnp.int32(0), jnp.max(live), b, p, tile(zeros, 0), size, inverse, live)
    x = lax.while_loop(going, iterations, start)[4]
    return [x, *(mosaic.load(half, optimized=False) for half in second)]
