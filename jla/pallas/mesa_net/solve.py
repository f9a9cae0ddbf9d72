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
from jla.pallas.common.scratch import barrier_for, fetch, fetch_each
from jla.pallas.common.tiles import SMALLEST, columns, smem_tiles

SDS = jax.ShapeDtypeStruct
# A row stops when its residual is this much smaller than its right-hand side: about what float16
# operands reach, and a quarter of bfloat16's rounding.
TOLERANCE = 5e-4
# S's largest element in its float16 tiles. exp(G_t) times what they were divided by is float16 too:
# its last digit, 2**-24, is this times less than that of S's elements, and S may be 1e6.
UNIT = 16.0
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

    One warpgroup a chunk; 104 KB of SMEM at K=V=128, so that two chunks share a multiprocessor. An
    iteration has no barrier: what changes is in registers (x in SMEM, each thread its own
    elements), what wgmma reads from SMEM stays. Floor at B=8 T=4096 H=16 K=128: 4.2 MFLOP an
    iteration and chunk, with 30 iterations 1.03 TFLOP, 1.3 ms at 780 TFLOP/s.
    """
    (B, T, H, K), V, TP = q.shape, v.shape[-1], beta.shape[-1]
    k_tiles, v_tiles = K // TILE_WIDTH, V // TILE_WIDTH
    out = scratch.kernel(
        functools.partial(_outputs_body, v_tiles=v_tiles, steps=steps, tolerance=tolerance),
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
            **_scratch(k_tiles, max(k_tiles, v_tiles)),
            loaded=barrier_for(dict(q=k_tiles)),
            keys_loaded=barrier_for(dict(k=k_tiles, kk=k_tiles * k_tiles)),
            values_loaded=barrier_for(dict(kv=k_tiles * v_tiles, v=v_tiles)),
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


def _outputs_body(refs, *, v_tiles, steps, tolerance):
    b, n, h = (lax.axis_index(name) for name in ("b", "n", "h"))
    rows = pl.ds(n * CHUNK, CHUNK)
    k_tiles, keep = len(refs.ss), refs.x is not None
    sk, ss, so = refs.sk, refs.ss, refs.so

    def loads():
        q_loaded, keys_loaded = range(2)
        for i in range(k_tiles):
            yield refs.q.at[b, rows, h, columns(i)], so[i], q_loaded
            yield refs.k.at[b, rows, h, columns(i)], sk[i], keys_loaded
        for i in range(k_tiles):
            for j in range(k_tiles):
                yield refs.kk.at[b, h, n, columns(i), columns(j)], ss[i][j], keys_loaded

    fetch_each(loads(), refs.loaded, refs.keys_loaded)
    decay = mosaic.load(refs.decays.at[b, h, rows], PER_ROW, optimized=False)
    _put_pairs(refs, b, h, rows)

    # 1. x, from queries divided by sqrt(lamb).
    plgpu.barrier_wait(refs.loaded)
    query = []
    for i in range(k_tiles):
        scale = mosaic.load(refs.scale.at[b, h, columns(i)], PER_COLUMN, optimized=False)
        query.append(mosaic.load(so[i]) * per_column(scale, CHUNK))
    query, size = normalised(query)
    plgpu.barrier_wait(refs.keys_loaded)
    scale = with_one_scale(ss, [refs.kk_scale[b, h, n, i] for i in range(k_tiles)])
    solve(query, refs, decay, scale, steps=steps, tolerance=tolerance)
    x, x_size = normalised([load_own(tile) for tile in refs.sx[:k_tiles]])
    plgpu.commit_smem()  # all warps are done with Hkk and q

    # 2. o.
    kv = [
        (refs.kv.at[b, h, n, columns(i), columns(j)], ss[i][j])
        for i in range(k_tiles)
        for j in range(v_tiles)
    ]
    fetch(dict(kv=kv), refs.values_loaded, partial=True)
    size = size * x_size
    if keep:
        put(so, [y * per_row(size, TILE_WIDTH) for y in x], refs.x.at[b, rows, h])
    x = [y.astype(f16) for y in x]
    scores = product(*((y, z.T) for y, z in zip(x, sk[:k_tiles], strict=True)))
    scores = (scores * mosaic.load(refs.sm)).astype(f16)
    plgpu.commit_smem()  # and with the keys
    v = [(refs.v.at[b, rows, h, columns(j)], sk[j]) for j in range(v_tiles)]
    fetch(dict(v=v), refs.values_loaded, partial=True)
    if keep:
        plgpu.wait_smem_to_gmem(0, wait_read_only=True)
    plgpu.barrier_wait(refs.values_loaded)
    o = []
    for j in range(v_tiles):
        total = None
        for i in range(k_tiles):
            part = product((x[i], ss[i][j]))
            part *= per_row(decay * refs.kv_scale[b, h, n, i], TILE_WIDTH)
            total = part if total is None else total + part
        o.append(product((scores, sk[j]), init=total) * per_row(size, TILE_WIDTH))
    put(so, o, refs.o.at[b, rows, h])
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
    k_tiles, v_tiles = K // TILE_WIDTH, V // TILE_WIDTH
    out = scratch.kernel(
        functools.partial(_gradients_body, v_tiles=v_tiles, steps=steps, tolerance=tolerance),
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
            **_scratch(k_tiles, max(k_tiles, v_tiles)),
            values_loaded=barrier_for(dict(do=v_tiles, v=v_tiles, kv=k_tiles * v_tiles)),
            keys_loaded=barrier_for(dict(k=k_tiles, x=k_tiles, kk=k_tiles * k_tiles)),
        ),
        automatic_barriers=False,
        grid=(B, TP // CHUNK, H),
        grid_names=("b", "n", "h"),
    )
    return tuple(out)


def _gradients_body(refs, *, v_tiles, steps, tolerance):
    b, n, h = (lax.axis_index(name) for name in ("b", "n", "h"))
    rows = pl.ds(n * CHUNK, CHUNK)
    k_tiles = len(refs.ss)
    sk, ss, so = refs.sk, refs.ss, refs.so

    def values():
        for j in range(v_tiles):
            yield refs.do.at[b, rows, h, columns(j)], so[j]
            yield refs.v.at[b, rows, h, columns(j)], sk[j]
            for i in range(k_tiles):
                yield refs.kv.at[b, h, n, columns(i), columns(j)], ss[i][j]

    def keys():
        for i in range(k_tiles):
            yield refs.k.at[b, rows, h, columns(i)], sk[i]
            yield refs.x.at[b, rows, h, columns(i)], so[i]
            for j in range(k_tiles):
                yield refs.kk.at[b, h, n, columns(i), columns(j)], ss[i][j]

    fetch_each(values(), refs.values_loaded)
    decay = mosaic.load(refs.decays.at[b, h, rows], PER_ROW, optimized=False)
    _put_pairs(refs, b, h, rows)

    # 1. dx, in two parts: what comes through the state, and through the chunk's own pairs.
    plgpu.barrier_wait(refs.values_loaded)
    do, do_size = normalised([mosaic.load(tile) for tile in so[:v_tiles]])
    do = [z.astype(f16) for z in do]
    scores = product(*((z, v.T) for z, v in zip(do, sk, strict=False)))
    (scores,), scores_size = normalised([scores * mosaic.load(refs.sm)])
    scores = scores.astype(f16)
    carried = []
    for i in range(k_tiles):
        part = product(*((z, kv.T) for z, kv in zip(do, ss[i], strict=False)))
        carried.append(part * per_row(decay * refs.kv_scale[b, h, n, i], TILE_WIDTH))
    plgpu.commit_smem()  # all warps are done with do, v and Hkv
    fetch_each(keys(), refs.keys_loaded)
    plgpu.barrier_wait(refs.keys_loaded)
    through_kv = row_sum([x * mosaic.load(so[i]) for i, x in enumerate(carried)]) * do_size
    own = per_row(scores_size, TILE_WIDTH)
    dx = [x + own * product((scores, sk[i])) for i, x in enumerate(carried)]

    # 2. y.
    dx, size = normalised(dx)
    scale = with_one_scale(ss, [refs.kk_scale[b, h, n, i] for i in range(k_tiles)])
    solve(dx, refs, decay, scale, steps=steps, tolerance=tolerance)
    y, y_size = normalised([load_own(tile) for tile in refs.sx])
    size = size * y_size * do_size

    # 3. dG, and the sums of y x.
    rounded = [z.astype(f16) for z in y]
    through_kk = []
    for i in range(k_tiles):
        part = product(*((z, kk.T) for z, kk in zip(rounded, ss[i], strict=False)))
        through_kk.append(part * per_row(decay * scale, TILE_WIDTH) * mosaic.load(so[i]))
    refs.through_decays.at[b, h, rows][...] = through_kv - row_sum(through_kk) * size
    y = [z * per_row(size, TILE_WIDTH) for z in y]
    for i, z in enumerate(y):
        products = jnp.sum(z * mosaic.load(so[i]), axis=0)
        refs.products.at[b, h, n, columns(i)][...] = products
    plgpu.commit_smem()  # all warps have read x
    put(so, y, refs.y.at[b, rows, h])
    plgpu.wait_smem_to_gmem(0, wait_read_only=True)


def _scratch(k_tiles, wide):
    return dict(
        sk=smem_tiles(wide, dtype=f16),  # the keys, or the values
        ss=[smem_tiles(wide, dtype=f16) for _ in range(k_tiles)],  # a state
        sx=[float_tile() for _ in range(k_tiles)],  # the solution in float32
        sm=mosaic.tile(CHUNK, CHUNK, dtype=f16),  # M
        so=smem_tiles(wide),  # other operands, and results
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
    largest = jnp.abs(rows[0])
    for x in rows[1:]:
        largest = jnp.maximum(largest, jnp.abs(x))
    largest = jnp.maximum(jnp.max(largest, axis=1), SMALLEST)
    inverse = per_row(1.0 / largest, TILE_WIDTH)
    return [x * inverse for x in rows], largest


def times(p, p32, refs, factor):
    """A_t p_t for all rows t, from p in float16 and in float32."""
    sk, ss, sm = refs.sk, refs.ss, refs.sm
    scores = product(*((x, y.T) for x, y in zip(p, sk, strict=False)))
    scores = scores.astype(f16) * plgpu.load(sm, layout=WGMMA_LAYOUT)
    scaled = [x * per_row(factor, TILE_WIDTH) for x in p]
    pairs = [
        [(scores, keys), *((x, y.T) for x, y in zip(scaled, row, strict=False))]
        for keys, row in zip(sk, ss[: len(p)], strict=False)
    ]
    return mosaic.products(pairs, p32)


def with_one_scale(ss, scales):
    """Gives all of S one scale, such that its largest element is UNIT; returns that scale."""
    largest = functools.reduce(jnp.maximum, scales)
    for row, scale in zip(ss, scales, strict=False):
        factor = UNIT * (scale / largest)
        for tile in row[: len(scales)]:
            tile[...] = (mosaic.load(tile) * factor).astype(f16)
    plgpu.commit_smem()
    return largest / UNIT


def solve(b, refs, decay, scale, *, steps, tolerance):
    """Conjugate gradients: x with A_t x_t = b_t, from zero, left in `refs.sx`.

    A direction is rounded to float16 with its row scaled to norm one or a little more (less where
    S is large, lest exp(G_t) p leave float16), and the rounded one *is* the direction: its product
    is exact but for the rounding of exp(G_t) p, of S and of the scores, which therefore is what
    bounds the residual.

    Args:
      b: the right-hand side, float32 tiles of [64, 64] that together are [64, K].
      refs: sk, ss: tiles of the keys and of S, by rows and columns; S is symmetric. sm: M. sx:
        float32 tiles.
      decay, scale: exp(G_t), a vector along rows; what S's tiles have been divided by.
    """
    sx = refs.sx
    for tile, x in zip(sx, b, strict=True):
        own_elements(tile)[...] = x - x  # zeros; NaN where x is, whose row stops at once
    size = row_sum([x * x for x in b])
    stop = tolerance * tolerance * size
    norm = jnp.sqrt(size)
    unit = jnp.minimum(1.0, 1.0 / scale)
    factor = jnp.minimum(decay * scale, float(jnp.finfo(f16).max)).astype(f16)
    first = per_row(unit / jnp.maximum(norm, SMALLEST), TILE_WIDTH)
    p = tuple((x * first).astype(f16) for x in b)
    live = jnp.where(size > stop, 1.0, 0.0)

    def iterate(_, carry):
        r, p, norm, live = carry
        p32 = [x.astype(f32) for x in p]
        y = times(p, p32, refs, factor)
        curvature = row_sum([a * c for a, c in zip(p32, y, strict=True)])
        alpha = jnp.where(curvature > 0.0, live * unit * norm / curvature, 0.0)
        alpha = per_row(alpha, TILE_WIDTH)
        for tile, x in zip(sx, p32, strict=True):
            own_elements(tile)[...] = load_own(tile) + alpha * x
        r = tuple(a - alpha * c for a, c in zip(r, y, strict=True))
        size = row_sum([x * x for x in r])
        new = jnp.sqrt(size)
        live = jnp.where(size > stop, live, 0.0)
        old = per_row(new / jnp.maximum(norm, SMALLEST), TILE_WIDTH)
        inverse = per_row(unit / jnp.maximum(new, SMALLEST), TILE_WIDTH)
        p = tuple((a * inverse + c * old).astype(f16) for a, c in zip(r, p32, strict=True))
        return r, p, new, live

    def going(carry):
        step, anyone = carry[:2]
        return (step < steps) & (anyone > 0.0)

    def iterations(carry):
        step, _, *rest = carry
        count = jnp.minimum(AT_ONCE, steps - step)
        rest = lax.fori_loop(0, count, iterate, tuple(rest))
        return step + count, jnp.max(rest[-1]), *rest

    start = (jnp.int32(0), jnp.max(live), tuple(b), p, norm, live)
    lax.while_loop(going, iterations, start)
