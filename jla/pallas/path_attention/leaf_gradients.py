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

import types

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from jla.pallas import chunks, mosaic
from jla.pallas.chunks import CHUNK
from jla.pallas.mosaic import (
    PER_COLUMN,
    PER_ROW,
    f16,
    f32,
    load,
    per_column,
    per_row,
    product,
)
from jla.pallas.path_attention import levels
from jla.pallas.path_attention.levels import LEAF

SDS = jax.ShapeDtypeStruct
LARGEST = 0.25  # of float16 gradients, so that sums of 128 terms with |q| < 2000 stay in range


def leaf_gradients(
    q, k, w, beta, inverses, dqueries, dkeys, own, transforms, scale, *, dtype
):  # fmt: skip
    """The gradients of a leaf's inputs.

    Args:
      q: [B, T, HQ, K]. k, w: [B, T, H, K]. All of one 16-bit type, T a multiple of 8.
      beta: [B, H, 128 P] float32. inverses: N of each chunk, [B, H, 2 P, 64, 64] float16.
      dqueries, dkeys, transforms: gradients in two parts, as `backward` and `transform_gradients`
        return them.
      own: the gradient of the leaves' own logits and its rows' largest elements, as `backward`
        returns them.
      scale: what the gradients are multiplied with in the end, [B, H] float32.
      dtype: of dq, dk and dw; 16 bits.

    Returns:
      dq, dk, dw and dbeta [B, T, H] float32.

    A CTA is a leaf and a query head, two warpgroups with a chunk of 64 rows each. SMEM holds seven
    tiles of 128 x 128, so q, k, c and dH come twice (from L2).
    """
    (B, T, HQ, K), H = q.shape, k.shape[2]
    group, P = HQ // H, beta.shape[2] // LEAF
    k_tiles = K // CHUNK
    shrink, grow, of_transform = _scales(dqueries[1], dkeys[1], own[1], transforms[1], scale, P)

    def body(
        q_ref, k_ref, w_ref, inverse_ref, beta_ref, a_ref, a_factors, c_ref, c_factors,
        own_ref, dh_ref, shrink_ref, grow_ref, ratio_ref, dq_out, dk_out, dw_out, dbeta_out,
        stream, keys, whole_w, lower_n, lower_mc, mw, pair, first, second, of_a, of_c, of_dh,
        again, shared, zeros,
    ):  # fmt: skip
        b, head, leaf, wg = (lax.axis_index(name) for name in ("b", "h", "leaf", "wg"))
        h, member = lax.div(head, jnp.int32(group)), lax.rem(head, jnp.int32(group))
        stream_16, stream_raw, lower_z, dq_and_dk = zip(*stream, strict=True)
        keys_16, keys_raw, lower_ds, dh, dw_tile = zip(*keys, strict=True)
        w, raw_w = zip(*whole_w, strict=True)
        (lower_a, lower_do), late_dh = zip(*pair, strict=True)
        lower_z, lower_ds = ([*x[0], *x[1]] for x in (lower_z, lower_ds))
        tiles = {
            "stream": stream_16,
            "raw_stream": stream_raw,
            "z": lower_z,
            "dq_and_dk": dq_and_dk,
            "keys": keys_16,
            "raw_keys": keys_raw,
            "ds": lower_ds,
            "dh": dh,
            "dw": dw_tile,
            "w": w,
            "raw_w": raw_w,
            "n": lower_n,
            "mc": lower_mc,
            "mw": mw,
            "a": lower_a,
            "do": lower_do,
            "late_dh": late_dh,
        }
        query_place = levels.first_query(leaf, P)
        key_place = levels.first_key(leaf, P)
        shrink, grow, ratio = (x[b, h, leaf] for x in (shrink_ref, grow_ref, ratio_ref))
        # What belongs to the keys counts for one head of the group.
        once = jnp.where(member == 0, 1.0, 0.0).astype(f32)

        def views():
            """The tiles, by an index that no compiler sees through: else the descriptors of all
            tiles are made once, for which there are no registers."""
            zero = zeros[wg]
            return types.SimpleNamespace(
                **{name: [x.at[zero] for x in of_name] for name, of_name in tiles.items()}
            )

        def meet():
            plgpu.commit_smem()
            plgpu.barrier_arrive(shared)
            plgpu.barrier_wait(shared)
            return views()

        def rows(i):
            return pl.ds(leaf * LEAF + i * CHUNK, CHUNK)

        def fetch_tokens(ref, at, targets, barrier):
            for i, target in enumerate(targets):
                plgpu.copy_gmem_to_smem(ref.at[b, rows(i), at], target, barrier)

        def fetch_version(ref, at, place, targets, barrier):
            for i, target in enumerate(targets):
                source = pl.ds(jnp.maximum(place, 0) * LEAF + i * CHUNK, CHUNK)
                plgpu.copy_gmem_to_smem(ref.at[b, at, source], target, barrier)

        def work(me):
            """What warpgroup `me` does: all rows of chunk `me`."""
            mine, issues = rows(me), me == 0
            blocks = range(_block(me, 0), _block(me, me) + 1)  # of this row, in triangles

            def rescale(ref, place, factors, at, more):
                """A version's gradient in the leaf's unit; none is zero."""
                source = pl.ds(jnp.maximum(place, 0) * LEAF + me * CHUNK, CHUNK)
                factor = load(factors.at[b, at, source], PER_ROW, optimized=False)
                x = load(ref) * per_row(factor * more, K)
                present = jnp.broadcast_to(place >= 0, x.shape)
                ref[...] = _packed(lax.optimization_barrier(jnp.where(present, x, 0.0)))

            def fetch_transform(targets, *before):
                for i in range(k_tiles):
                    source = dh_ref.at[(b, h, leaf, *before, pl.ds(i * CHUNK, CHUNK))]
                    plgpu.copy_gmem_to_smem(source, targets[i], of_dh)

            def store(out, at, staging, value):
                staging[me][...] = (value * grow).astype(dtype)
                plgpu.commit_smem()
                plgpu.copy_smem_to_gmem(staging[me], out.at[b, mine, at])

            s = views()
            if issues:
                fetch_tokens(w_ref, h, s.raw_w, first)
                fetch_tokens(k_ref, h, s.raw_keys, first)
                for i in range(2):
                    source, target = inverse_ref.at[b, h, 2 * leaf + i], s.n[_block(i, i)]
                    plgpu.copy_gmem_to_smem(source, target, first)
                fetch_tokens(q_ref, head, s.raw_stream, second)
                for i in range(2):
                    for j in range(i + 1):
                        at = pl.ds(i * CHUNK, CHUNK), pl.ds(j * CHUNK, CHUNK)
                        source = own_ref.at[(b, head, leaf, *at)]
                        plgpu.copy_gmem_to_smem(source, s.do[_block(i, j)], second)
            strength = load(beta_ref.at[b, h, mine], PER_ROW, optimized=False)
            plgpu.barrier_wait(first)
            _convert(s.raw_w[me], s.w[me])
            _convert(s.raw_keys[me], s.keys[me])
            s = meet()

            # C, and the inverse's block between the chunks.
            for i, at in enumerate(blocks):
                c = product((s.w[me], s.keys[i].T))
                s.a[at][...] = _triangle(c, i == me, strict=True).astype(f16)
            if me == 1:
                between = product((s.w[1], s.w[0].T)) * per_row(strength, CHUNK)
                between = product((between.astype(f16), s.n[0]))
                s.n[1][...] = between.astype(f16)
                plgpu.commit_smem()
                between = product((s.n[2], s.n[1]))
                plgpu.commit_smem()  # all warps have read it
                s.n[1][...] = (-between).astype(f16)
            plgpu.barrier_wait(second)
            _convert(s.raw_stream[me], s.stream[me])
            for at in blocks:
                s.do[at][...] = (load(s.do[at]) * shrink).astype(f16)
            s = meet()

            # -M C and -M W; then A takes the place of C.
            negative = []
            for i, at in enumerate(blocks):
                columns = load(beta_ref.at[b, h, rows(i)], PER_COLUMN, optimized=False)
                negative.append(_packed(load(s.n[at]) * -per_column(columns, CHUNK)))
            for i, at in enumerate(blocks):
                pairs = [(negative[j], s.a[_block(j, i)]) for j in range(i, me + 1)]
                s.mc[at][...] = product(*pairs).astype(f16)
            s.mw[me][...] = product(*zip(negative, s.w[: me + 1], strict=True)).astype(f16)
            a = []
            for i in range(me + 1):
                x = product((s.stream[me], s.w[i].T))
                a.append(_packed(_triangle(x, i == me)))
            s = meet()
            if issues:
                fetch_version(a_ref, head, query_place, s.stream, of_a)
            for at, x in zip(blocks, a, strict=True):
                s.a[at][...] = x
            plgpu.barrier_wait(of_a)
            rescale(s.stream[me], query_place, a_factors, head, shrink)
            s = meet()

            # What A and dO give to Z and X; dA, which takes the place of A; dQ.
            def with_transposed(left, right):
                """The blocks of row `me` of left^T right, both lower triangles, on and below
                the diagonal; a row of tiles for `right` gives the row of tiles."""
                return [
                    product(*((left[_block(j, me)].T, right[_block(j, i)]) for j in range(me, 2)))
                    for i in range(me + 1)
                ]

            z = [_packed(x) for x in with_transposed(s.a, s.do)]
            x = product(*((s.a[_block(j, me)].T, s.stream[j]) for j in range(me, 2)))
            x = _packed(x)
            da = []
            for i in range(me + 1):
                pairs = [(s.do[_block(me, j)], s.mc[_block(i, j)].T) for j in range(i + 1)]
                gradient = product(*pairs, (s.stream[me], s.mw[i].T))
                da.append(_packed(_triangle(gradient, i == me)))
            s = meet()
            for at, gradient in zip(blocks, da, strict=True):
                s.a[at][...] = gradient
            plgpu.commit_smem()
            dq = product(
                *((s.do[at], s.keys[i]) for i, at in enumerate(blocks)),
                *((s.a[at], s.w[i]) for i, at in enumerate(blocks)),
                init=load(s.stream[me]),
            )
            store(dq_out, head, s.dq_and_dk, dq)
            plgpu.wait_smem_to_gmem(0, wait_read_only=True)
            s = meet()

            if issues:
                fetch_version(c_ref, h, key_place, s.stream, of_c)
                fetch_transform(s.dh)
            plgpu.barrier_wait(of_c)
            rescale(s.stream[me], key_place, c_factors, h, shrink * once)
            s = meet()
            z = [
                _packed(-(product((s.w[me], s.stream[i].T)) + part.astype(f32)))
                for i, part in enumerate(z)
            ]
            plgpu.barrier_wait(of_dh)
            columns = [pl.ds(i * CHUNK, CHUNK) for i in range(k_tiles)]
            moved = product(*((s.w[me].at[:, at], s.dh[i]) for i, at in enumerate(columns)))
            x = _packed(moved * (-ratio * once) - x.astype(f32))
            s = meet()
            for at, value in zip(blocks, z, strict=True):
                s.z[at][...] = value
            s.keys[me][...] = x
            s = meet()

            dc = with_transposed(s.n, s.z)
            dc = [_packed(_triangle(y, i == me, strict=True)) for i, y in enumerate(dc)]
            du = product(*((s.n[_block(j, me)].T, s.keys[j]) for j in range(me, 2)))
            du = _packed(du)
            ds = []
            for i in range(me + 1):
                pairs = [(dc[j], s.mc[_block(i, j)].T) for j in range(i + 1)]
                gradient = product(*pairs, (du, s.mw[i].T))
                ds.append(_packed(_triangle(gradient, i == me, strict=True)))
            s = meet()
            if issues:
                fetch_tokens(k_ref, h, s.raw_keys, again)
                fetch_tokens(q_ref, head, s.raw_stream, again)
            columns = per_row(strength, CHUNK)
            for at, gradient in zip(blocks, dc, strict=True):
                s.n[at][...] = (gradient.astype(f32) * columns).astype(f16)
            plgpu.barrier_wait(again)
            _convert(s.raw_keys[me], s.keys[me])
            plgpu.commit_smem()
            _convert(s.raw_stream[me], s.stream[me])
            s = meet()
            j = du.astype(f32) + product(
                *zip(dc, s.keys[: me + 1], strict=True), *zip(ds, s.w[: me + 1], strict=True)
            )
            dbeta = (load(s.w[me]) * j).sum(axis=1) * grow
            dbeta_out.at[b, head, mine][...] = dbeta
            upwards = range(me, 2)
            dw = product(
                *((s.a[_block(i, me)].T, s.stream[i]) for i in upwards),
                init=j * per_row(strength, K),
            )
            dk = product(
                *((s.do[_block(i, me)].T, s.stream[i]) for i in upwards),
                *((s.n[_block(i, me)].T, s.w[i]) for i in upwards),
            )
            s = meet()
            if issues:
                fetch_version(c_ref, h, key_place, s.stream, of_c)
                fetch_transform(s.late_dh, slice(None))
            for at, gradient in zip(blocks, ds, strict=True):
                s.ds[at][...] = (gradient.astype(f32) * columns).astype(f16)
            plgpu.barrier_wait(of_c)
            rescale(s.stream[me], key_place, c_factors, h, shrink * once)
            s = meet()
            dk += load(s.stream[me])
            dw = product(
                *((s.mc[at], s.stream[i]) for i, at in enumerate(blocks)),
                *((s.ds[_block(i, me)].T, s.w[i]) for i in upwards),
                init=dw,
            )
            of_unit = (load(s.mw[me]) * (ratio * once)).astype(f16)
            plgpu.barrier_wait(of_dh)
            columns = [slice(i * CHUNK, (i + 1) * CHUNK) for i in range(k_tiles)]
            pairs = ((of_unit[:, at], s.late_dh[i].T) for i, at in enumerate(columns))
            dw = product(*pairs, init=dw)
            s = meet()
            store(dk_out, head, s.dq_and_dk, dk)
            store(dw_out, head, s.dw, dw)
            plgpu.wait_smem_to_gmem(0, wait_read_only=True)

        zeros[wg] = jnp.int32(0)
        plgpu.commit_smem()
        pl.when(wg == 0)(lambda: work(0))
        pl.when(wg == 1)(lambda: work(1))

    def rows_of(*dtypes):
        return [mosaic.tile(CHUNK, K, 1, dtype=dtype) for dtype in dtypes]

    def blocks(n):
        return [mosaic.tile(CHUNK, CHUNK, 1, dtype=f16) for _ in range(n)]

    # Tiles that share memory, of each chunk; the interpreter sees races between chunks otherwise.
    both = (1, 2)  # blocks in a triangle's row
    given = q.dtype
    like_q = SDS(q.shape, dtype)
    dq, dk, dw, dbeta = mosaic.kernel(
        body,
        automatic_barriers=False,
        reductions_cross_warps=False,
        out_type=[like_q, like_q, like_q, SDS((B, HQ, P * LEAF), f32)],
        scratch_types=[
            [plgpu.RefUnion(*rows_of(f16, given), blocks(n), *rows_of(dtype)) for n in both],
            [plgpu.RefUnion(*rows_of(f16, given), blocks(n), *rows_of(f16, dtype)) for n in both],
            [plgpu.RefUnion(*rows_of(f16, given)) for _ in both],
            blocks(3),
            blocks(3),
            rows_of(f16, f16),
            [plgpu.RefUnion(blocks(3), mosaic.tile(K, CHUNK, 1, dtype=f16)) for _ in both],
            plgpu.Barrier(num_arrivals=6),
            plgpu.Barrier(num_arrivals=5),
            plgpu.Barrier(num_arrivals=2),
            plgpu.Barrier(num_arrivals=2),
            plgpu.Barrier(num_arrivals=k_tiles),
            plgpu.Barrier(num_arrivals=4),
            plgpu.Barrier(num_arrivals=2),
            plgpu.SMEM((2,), jnp.int32),
        ],
        grid=(B, P, HQ),
        grid_names=("b", "leaf", "h"),
        num_threads=2,
        thread_name="wg",
    )(
        q, k, w, inverses, beta, *dqueries, *dkeys, own[0], transforms[0],
        shrink, grow, of_transform,
    )  # fmt: skip
    dbeta = dbeta.swapaxes(1, 2)[:, :T]
    if group == 1:
        return dq, dk, dw, dbeta

    def of_group(x):
        x = x.reshape(B, T, H, group, *x.shape[3:])
        return x.sum(3, dtype=f32).astype(x.dtype)

    return dq, *(of_group(x) for x in (dk, dw, dbeta))


def _block(i, j):
    """Where the block in row i and column j of a triangle is in its list of three."""
    return i * (i + 1) // 2 + j


def _packed(x):
    """x as float16, two in a register: the compiler, if it sees them, takes a register for each."""
    return lax.optimization_barrier(x.astype(f16))


def _convert(source, target):
    """A tile as float16 in the same place."""
    target[...] = load(source).astype(f16)


def _triangle(x, diagonal, *, strict=False):
    """A 64 x 64 block of a lower triangle: one on the diagonal loses what is above it.

    Opaque, for LLVM would rather select among float16, one by one.
    """
    if not diagonal:
        return x
    return lax.optimization_barrier(jnp.where(chunks.up_to(strict=strict), x, 0.0))


def _scales(query_factors, key_factors, largest_own, transform_factors, scale, leaves):
    """Each leaf's unit of gradients: what brings them to float16, back, and dH to the unit."""
    B, H = scale.shape

    def largest(x, axis=-1):
        return x.max(axis)

    def of_leaves(factors, place):
        x = largest(factors.reshape(B, H, -1, factors.shape[-1] // LEAF, LEAF), (2, 4))
        places = jnp.stack([place(jnp.int32(i), leaves) for i in range(leaves)])
        return jnp.where(places >= 0, x[..., jnp.maximum(places, 0)], 0.0)

    unit = largest(largest_own.reshape(B, H, -1, leaves, LEAF), (2, 4))
    unit = jnp.maximum(unit, transform_factors)
    unit = jnp.maximum(unit, of_leaves(query_factors, levels.first_query))
    unit = jnp.maximum(unit, of_leaves(key_factors, levels.first_key))
    unit = jnp.maximum(unit, 1e-30) / LARGEST
    return 1.0 / unit, unit * scale[..., None], transform_factors / unit
