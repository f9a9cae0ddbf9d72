"""The gradients of what happens inside a leaf, by one kernel: dq, dk, dw, dbeta of its 128 tokens.

With N = (I + strict_lower(diag(beta) W W^T))^-1, M = N diag(beta), A = lower(Q W^T) and
C = strict_lower(W K^T), `leaf` makes

    own = Q K^T - A M C,   Q~ = Q - A M W,   K~ = K - C^T M^T W,   H = I - W^T M W

and their gradients a (of Q~), c (of K~), dO (of own) and dH give, in this order,

    Z  = -(A^T dO + W c^T)              X  = -(A^T a + W dH)
    dC = strict_lower(N^T Z)            dU = N^T X
    dS = strict_lower(-dC (M C)^T - dU (M W)^T)
    J  = dC K + dU + dS W               the gradient of diag(beta) W
    dA = lower(-dO (M C)^T - a (M W)^T)
    dQ = a + dO K + dA W                dK = c + dO^T Q + (beta dC)^T W
    dW = beta J + dA^T Q - (M C) c - (M W) dH^T + (beta dS)^T W
    dbeta = rowsum(W J)

Nothing is divided by beta, and W W^T is not made. Matrices of tokens by tokens are triangular: of
their four 64 x 64 blocks three are kept, 00, 10 and 11.
"""

import functools

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from jla.pallas.common import chunks, mosaic
from jla.pallas.common.chunks import CHUNK
from jla.pallas.common.mosaic import PER_ROW, TILE, f16, f32, load, per_row, product
from jla.pallas.path_attention import levels
from jla.pallas.path_attention.levels import LEAF

SDS = jax.ShapeDtypeStruct
LARGEST = 0.25  # of float16 gradients, so that sums of 128 terms with |q| < 2000 stay in range


def leaf_gradients(
    q, k, w, beta, inverses, dqueries, dkeys, own, transforms, scale, *, dtype
):  # fmt: skip
    """The gradients of a leaf's inputs.

    Args:
      q: [B, T, HQ, K]. k, w: [B, T, H, K]. Each bf16 or float16. T a multiple of 8.
      beta: [B, H, 128 P] float32. inverses: N of each chunk, [B, H, 2 P, 64, 64] float16.
      dqueries, dkeys, transforms: gradients in two parts, as `query_gradients`, `key_gradients` and
        `transform_gradients` return them.
      own: the gradient of the leaves' own logits and its rows' largest elements, as
        `query_gradients` returns them.
      scale: what the gradients are multiplied with in the end, [B, H] float32.
      dtype: of dq, dk and dw; 16 bits.

    Returns:
      dq, dk, dw and dbeta [B, T, H] float32.

    A CTA is a leaf and a query head, four warpgroups: (row of chunks) x (tile of 64 features, or
    column of chunks in a triangle). SMEM holds w, beta w, two tiles of 128 x 128 for what comes and
    goes, and four triangles of three 64 x 64 blocks; k comes twice (from L2). What waits for its
    turn lies in registers, as float16.
    """
    (B, T, HQ, K), H = q.shape, k.shape[2]
    group, P = HQ // H, beta.shape[2] // LEAF
    k_tiles = K // CHUNK
    shrink, grow, of_transform = _scales(dqueries[1], dkeys[1], own[1], transforms[1], scale, P)

    def body(
        q_ref, k_ref, w_ref, inverse_ref, beta_ref, a_ref, a_factors, c_ref, c_factors,
        own_ref, dh_ref, shrink_ref, grow_ref, ratio_ref, dq_out, dk_out, dw_out, dbeta_out,
        region_w, bw, region_1, region_2, triangles, n, bc, zeros,
        loaded, a_loaded, c_loaded, dh_loaded, again, shared,
    ):  # fmt: skip
        b, head, leaf, wg = (lax.axis_index(name) for name in ("b", "h", "leaf", "wg"))
        h, member = lax.div(head, jnp.int32(group)), lax.rem(head, jnp.int32(group))
        (w, raw_w), (first, _, raw_first, out_first) = region_w, region_1
        second, raw_query, raw_second, out_second = region_2
        (lower, other_lower), out_lower = triangles
        dh_block = dh_ref.at[b, h, levels.beside(leaf, P)]
        query_place = levels.first_query(leaf, P)
        key_place = levels.first_key(leaf, P)
        shrink, grow, ratio = (x[b, h, leaf] for x in (shrink_ref, grow_ref, ratio_ref))
        # What belongs to the keys counts for one head of the group.
        once = jnp.where(member == 0, 1.0, 0.0).astype(f32)

        def here():
            """This warpgroup's row of chunks, its column, and the column of features that exists.

            By a number that no compiler sees through: else the descriptors of all tiles are made
            once, for which there are no registers.
            """
            me = wg + zeros[wg]
            row, column = lax.shift_right_logical(me, 1), lax.bitwise_and(me, 1)
            return row, column, jnp.minimum(column, k_tiles - 1)

        def meet():
            plgpu.commit_smem()
            plgpu.barrier_arrive(shared)
            plgpu.barrier_wait(shared)
            return here()

        def rows_of(r):
            return pl.ds(leaf * LEAF + r * CHUNK, CHUNK)

        def version_rows(place, r):
            return pl.ds(jnp.maximum(place, 0) * LEAF + r * CHUNK, CHUNK)

        def in_block(at, f):
            """f() where the warpgroup has a block of the triangle, else zeros."""
            value = lax.cond(at[1] <= at[0], lambda: _packed(f()), _nothing)
            return lax.optimization_barrier(value)

        def in_tile(at, f):
            """f() where the warpgroup has a tile of features, else zeros."""
            return f() if k_tiles == 2 else lax.cond(at[1] < k_tiles, f, _nothing)

        def when_block(at, f):
            pl.when(at[1] <= at[0])(f)

        def when_tile(at, f):
            f() if k_tiles == 2 else pl.when(at[1] < k_tiles)(f)

        def put(at, target, value):
            """Stores a tile's columns of features."""
            r, _, t = at

            def store():
                target.at[r * k_tiles + t][...] = value

            when_tile(at, store)

        def put_block(at, target, value):
            r, c, _ = at

            def store():
                target.at[r + c][...] = value

            when_block(at, store)

        def of(x, r, t):
            """A tile of 64 tokens by 64 features."""
            return x.at[r * k_tiles + t]

        def along(x, r, y, c):
            """The pairs of x_r y_c^T."""
            return [(of(x, r, k), of(y, c, k).T) for k in range(k_tiles)]

        def times_lower(triangle, x, at):
            """Row r of (triangle x)."""
            r, _, t = at
            return 0, r + 1, lambda m: (triangle.at[r + m], of(x, m, t))

        def times_upper(triangle, x, at):
            """Row r of (triangle^T x)."""
            r, _, t = at
            return r, 2, lambda m: (triangle.at[r + m].T, of(x, m, t))

        def lower_lower(left, right, at):
            """A block of (left right^T)."""
            r, c, _ = at
            return 0, c + 1, lambda m: (left.at[r + m], right.at[c + m].T)

        def upper_lower(left, right, at):
            """A block, on or below the diagonal, of (left^T right)."""
            r, c, _ = at
            return r, 2, lambda m: (left.at[r + m].T, right.at[m + c])

        def rescaled(at, ref, place, factors, head, more, added):
            """Brings a version's gradient to the leaf's unit, in its place; adds it to `added`."""
            r, _, t = at
            factor = load(factors.at[b, head, version_rows(place, r)], PER_ROW, optimized=False)
            # No read of a tile that another warpgroup changes.
            x = in_tile(at, lambda: plgpu.load(of(ref, r, t), layout=TILE)).astype(f32)
            x *= per_row(factor * more, CHUNK)
            present = jnp.broadcast_to(place >= 0, x.shape)
            x = lax.optimization_barrier(jnp.where(present, x, 0.0))
            put(at, ref, _packed(x))
            return _packed(x + _unpacked(added))

        def send(at, staging, out, value):
            r, _, t = at

            def copy():
                tile = of(staging, r, t)
                tile[...] = value
                plgpu.commit_smem()
                columns = pl.ds(t * CHUNK, CHUNK)
                plgpu.copy_smem_to_gmem(tile, out.at[b, rows_of(r), head, columns])

            when_tile(at, copy)

        def fetch(at, source, target, barrier):
            """Loads this warpgroup's tile."""
            r, _, t = at
            columns = pl.ds(t * CHUNK, CHUNK)
            copy = functools.partial(
                plgpu.copy_gmem_to_smem, source(columns), of(target, r, t), barrier
            )
            when_tile(at, copy)

        zeros[wg] = jnp.int32(0)
        plgpu.commit_smem()

        at = r, c, t = here()
        fetch(at, lambda columns: w_ref.at[b, rows_of(r), h, columns], raw_w, loaded)
        fetch(at, lambda columns: k_ref.at[b, rows_of(r), h, columns], raw_first, loaded)
        fetch(at, lambda columns: q_ref.at[b, rows_of(r), head, columns], raw_query, loaded)

        @pl.when(r == c)
        def _():
            plgpu.copy_gmem_to_smem(inverse_ref.at[b, h, 2 * leaf + r], n.at[2 * r], loaded)

        @functools.partial(when_block, at)
        def _():
            source = own_ref.at[b, head, leaf, r + c]
            plgpu.copy_gmem_to_smem(source, other_lower.at[r + c], loaded)

        strength = load(beta_ref.at[b, h, rows_of(r)], PER_ROW, optimized=False)
        plgpu.barrier_wait(loaded)
        given = load(of(raw_w, r, t))
        weak = _packed(given * per_row(strength, CHUNK))
        given = _packed(given)
        key, query = (_packed(load(of(x, r, t))) for x in (raw_first, raw_query))

        @pl.when(r == c)
        def _():
            n.at[2 * r][...] = _packed(-load(n.at[2 * r]))

        @functools.partial(when_block, at)
        def _():
            other_lower.at[r + c][...] = _packed(load(other_lower.at[r + c]) * shrink)

        at = meet()
        for target, value in ((w, given), (bw, weak), (first, key), (second, query)):
            put(at, target, value)
        at = r, c, t = meet()

        # beta C, and the inverse's block between the chunks; what dO gives to dQ.
        @functools.partial(when_block, at)
        def _():
            x = product(*along(bw, r, first, c))
            bc.at[r + c][...] = _packed(_triangle(x, r, c, strict=True))

        @pl.when(c > r)
        def _():
            x = product(*along(bw, 1, w, 0)).astype(f16)
            n.at[1][...] = product((x, n.at[0])).astype(f16)
            plgpu.commit_smem()
            x = product((n.at[2], n.at[1])).astype(f16)
            plgpu.commit_smem()  # all warps have read it
            n.at[1][...] = x

        dq = _packed(_total(times_lower(other_lower, first, at)))
        at = r, c, t = meet()
        fetch(
            at,
            lambda columns: a_ref.at[b, head, version_rows(query_place, r), columns],
            first,
            a_loaded,
        )

        @functools.partial(when_block, at)
        def _():
            x = product(*along(second, r, w, c))
            lower.at[r + c][...] = _packed(_triangle(x, r, c))

        dk = _packed(_total(times_upper(other_lower, second, at)))
        plgpu.barrier_wait(a_loaded)
        dq = rescaled(at, first, query_place, a_factors, head, shrink, dq)
        at = r, c, t = meet()

        z = in_block(at, lambda: _total(upper_lower(lower, other_lower, at)))
        x = _packed(_total(times_upper(lower, first, at)))

        def with_rest(left, triangle):
            x = product(*along(left, r, bw, c))
            return _total(lower_lower(triangle, bc, at), init=x)

        g = in_block(at, lambda: with_rest(first, other_lower))
        at = r, c, t = meet()
        fetch(
            at, lambda columns: c_ref.at[b, h, version_rows(key_place, r), columns], first, c_loaded
        )
        put_block(at, other_lower, g)
        at = r, c, t = meet()

        def from_inverse(strict):
            x = _total(lower_lower(other_lower if not strict else lower, n, at))
            return _packed(_triangle(x, r, c, strict=strict))

        when_block(at, lambda: put_block(at, lower, from_inverse(False)))
        at = r, c, t = meet()
        dw = _packed(_total(times_upper(lower, second, at)))
        dq = _total(times_lower(lower, w, at), init=_unpacked(dq))
        dq = lax.optimization_barrier((dq * grow).astype(dtype))
        at = r, c, t = meet()

        @pl.when(jnp.maximum(r, c) < k_tiles)
        def _():
            block = pl.ds(r * CHUNK, CHUNK), pl.ds(c * CHUNK, CHUNK)
            plgpu.copy_gmem_to_smem(dh_block.at[*block], of(second, r, c), dh_loaded)

        send(at, out_lower, dq_out, dq)
        plgpu.barrier_wait(c_loaded)
        dk = rescaled(at, first, key_place, c_factors, h, shrink * once, dk)
        at = r, c, t = meet()
        z = in_block(at, lambda: product(*along(w, r, first, c)) + _unpacked(z))
        plgpu.barrier_wait(dh_loaded)
        dh = [(of(second, k, t), of(second, t, k).T) for k in range(k_tiles)]
        y = product(*((of(bw, r, k), right) for k, (_, right) in enumerate(dh))) * (ratio * once)
        y = _packed(_total(times_lower(bc, first, at), init=y))
        moved = product(*((of(w, r, k), right) for k, (right, _) in enumerate(dh)))
        x = _packed(moved * (ratio * once) + _unpacked(x))
        plgpu.wait_smem_to_gmem(0, wait_read_only=True)
        at = meet()
        put_block(at, lower, z)
        put(at, first, x)
        put(at, second, y)
        at = r, c, t = meet()

        dw = _packed(_total(times_lower(n, second, at), init=_unpacked(dw)))

        @functools.partial(when_block, at)
        def _():
            x = _total(upper_lower(n, lower, at))
            other_lower.at[r + c][...] = _packed(_triangle(x, r, c, strict=True))

        du = _packed(_total(times_upper(n, first, at)))
        at = r, c, t = meet()
        fetch(at, lambda columns: k_ref.at[b, rows_of(r), h, columns], raw_second, again)
        put(at, first, du)
        at = r, c, t = meet()
        when_block(at, lambda: put_block(at, lower, _packed(with_rest(first, other_lower))))
        plgpu.barrier_wait(again)
        key = _packed(load(of(raw_second, r, t)))
        at = r, c, t = meet()
        put(at, second, key)
        when_block(at, lambda: put_block(at, bc, from_inverse(True)))
        at = r, c, t = meet()
        j = _total(times_lower(other_lower, second, at), init=_unpacked(du))
        j = _total(times_lower(bc, w, at), init=j)
        strength = load(beta_ref.at[b, h, rows_of(r)], PER_ROW, optimized=False)
        dbeta = (load(of(w, r, t)) * j).sum(axis=1) * grow

        @functools.partial(when_tile, at)
        def _():
            dbeta_out.at[b, head, t, rows_of(r)][...] = dbeta

        dw = j * per_row(strength, CHUNK) + _unpacked(dw)
        dw = _total(times_upper(bc, bw, at), init=dw)
        dw = lax.optimization_barrier((dw * grow).astype(dtype))
        dk = _total(times_upper(other_lower, bw, at), init=_unpacked(dk))
        send(at, out_first, dk_out, (dk * grow).astype(dtype))
        at = meet()
        send(at, out_second, dw_out, dw)
        plgpu.wait_smem_to_gmem(0, wait_read_only=True)

    def tiles(dtype):
        return mosaic.tile(CHUNK, CHUNK, 2 * k_tiles, dtype=dtype)

    triangle = mosaic.tile(CHUNK, CHUNK, 3, dtype=f16)
    region = plgpu.RefUnion(*map(tiles, (f16, q.dtype, k.dtype, dtype)))
    like_q = SDS(q.shape, dtype)
    dq, dk, dw, dbeta = mosaic.kernel(
        body,
        automatic_barriers=False,
        reductions_cross_warps=False,
        out_type=[like_q, like_q, like_q, SDS((B, HQ, k_tiles, P * LEAF), f32)],
        scratch_types=[
            plgpu.RefUnion(tiles(f16), tiles(w.dtype)),
            tiles(f16),
            region,
            region,
            plgpu.RefUnion([triangle, triangle], tiles(dtype)),
            triangle,
            triangle,
            plgpu.SMEM((4,), jnp.int32),
            plgpu.Barrier(num_arrivals=6 * k_tiles + 5),
            *[plgpu.Barrier(num_arrivals=2 * k_tiles)] * 2,
            plgpu.Barrier(num_arrivals=k_tiles * k_tiles),
            plgpu.Barrier(num_arrivals=2 * k_tiles),
            plgpu.Barrier(num_arrivals=4),
        ],
        grid=(B, P, HQ),
        grid_names=("b", "leaf", "h"),
        num_threads=4,
        thread_name="wg",
    )(
        q, k, w, inverses, beta, *dqueries, *dkeys, own[0], transforms[0],
        shrink, grow, of_transform,
    )  # fmt: skip
    dbeta = dbeta.sum(2).swapaxes(1, 2)[:, :T]
    if group == 1:
        return dq, dk, dw, dbeta

    def of_group(x):
        x = x.reshape(B, T, H, group, *x.shape[3:])
        return x.sum(3, dtype=f32).astype(x.dtype)

    return dq, *(of_group(x) for x in (dk, dw, dbeta))


def _total(terms, init=None):
    """The sum of a triangle's products, by (start, stop, the pair i), plus `init`."""
    start, stop, pair = terms
    if init is None:
        init = plgpu.layout_cast(jnp.zeros((CHUNK, CHUNK), f32), TILE)
    return lax.fori_loop(start, stop, lambda i, total: product(pair(i), init=total), init)


def _nothing():
    return plgpu.layout_cast(jnp.zeros((CHUNK, CHUNK), f16), TILE)


def _packed(x):
    """x as float16, two in a register: the compiler, if it sees them, takes a register for each."""
    return lax.optimization_barrier(x.astype(f16))


def _unpacked(x):
    """x as float32, and not before it is asked for."""
    return lax.optimization_barrier(x).astype(f32)


def _triangle(x, r, c, *, strict=False):
    """Block (r, c) of a lower triangle: what is above the diagonal becomes zero.

    Opaque, for LLVM would rather select among float16, one by one.
    """
    i = chunks.tokens() + (jnp.uint32(CHUNK) * (r - c).astype(jnp.uint32) + (0 if strict else 1))
    below = mosaic.in_interval(jnp.zeros_like(i), i, CHUNK)
    return lax.optimization_barrier(jnp.where(below, x, 0.0))


def _scales(query_factors, key_factors, largest_own, transform_factors, scale, leaves):
    """Each leaf's unit of gradients: what brings them to float16, back, and dH to the unit."""
    B, H = scale.shape

    def largest(x, axis=-1):
        return x.max(axis)

    def of_leaves(factors, place):
        x = largest(factors.reshape(B, H, -1, factors.shape[-1] // LEAF, LEAF), (2, 4))
        places = jax.vmap(lambda i: place(i, leaves))(jnp.arange(leaves, dtype=jnp.int32))
        return jnp.where(places >= 0, x[..., jnp.maximum(places, 0)], 0.0)

    unit = largest(largest_own.reshape(B, H, -1, leaves, LEAF), (2, 4))
    transform_factors = transform_factors[:, :, :leaves]
    unit = jnp.maximum(unit, transform_factors)
    unit = jnp.maximum(unit, of_leaves(query_factors, levels.first_query))
    unit = jnp.maximum(unit, of_leaves(key_factors, levels.first_key))
    unit = jnp.maximum(unit, 1e-30) / LARGEST
    return 1.0 / unit, unit * scale[..., None], transform_factors / unit
