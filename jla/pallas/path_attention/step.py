"""One token of PaTH attention as a Pallas kernel: one pass over the cached keys and values."""

import functools

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.mosaic.gpu import TiledLayout
from jax.experimental.pallas import mosaic_gpu as plgpu

from jla._core.axes import PATH, letters, of_step
from jla._core.cache import PathCache, counted
from jla._core.shardwise import shardwise
from jla.pallas.common import mosaic
from jla.pallas.common.chunks import LOG2E
from jla.pallas.common.mosaic import f32, per_column, per_row
from jla.reference import path_attention as reference

SDS = jax.ShapeDtypeStruct
HEAD_DIMENSIONS = (16, 32, 64, 128)
IN_SMEM = 128  # cached tokens, keys and values, that a CTA has in SMEM
MOST_QUERIES = 8  # query heads of a key head in one pass
SHORTEST, LONGEST = 256, 2048  # cached tokens of a CTA
CTAS = 2112  # eight rounds of two on each of the card's 132 multiprocessors
NEVER = -1e30  # below all logits, and finite

_AXES = of_step(PATH)
_OUTPUTS = letters(_AXES, "o cache.key cache.value")
_DECAY = _AXES["cache.decay"]
_INPUTS = letters(_AXES, "q k v w beta cache.key cache.value cache.length g cache.decay")


def unsupported(q, v):
    """Why the kernel cannot serve these arguments, or None."""
    K, V = q.shape[-1], v.shape[-1]
    if K not in HEAD_DIMENSIONS or V not in HEAD_DIMENSIONS:
        return (
            f"K={K} and V={V}, and the step's kernel takes 16, 32, 64 and 128 "
            "(padding would copy the cache)"
        )
    return None


@functools.partial(jax.jit, static_argnames="scale")
def path_step(q, k, v, w, beta, g, cache, *, scale):
    """One token in one kernel. See `jla.path_step`.

    A CTA of one warpgroup has a piece of one key head's cached tokens. Tiles of keys and values
    come to SMEM one after another, several of them on their way at once. A tile of keys is
    multiplied by I - beta w w^T, goes back to its place in SMEM and from there to the cache, and
    gives the logits of the group's query heads. A warp has whole rows of a tile, so that all sums
    over K are shuffles inside it, and each place in the tile keeps a softmax and a sum of values of
    its own until the piece ends: no warp waits for another's numbers. XLA joins the pieces. All
    arithmetic is float32.

    Only tiles that hold tokens are read. The keys are aliased to the new keys: overwritten where
    their buffer is donated or a temporary of the caller's program, copied before the kernel
    otherwise. Where XLA drops the alias, the rest of the new buffer is filled with zeros.

    The value goes to its place by a scatter before the kernel, the decays are a sum; XLA does both
    in place where it may. The decays' transpose, which the kernel reads, is 1/128 of the keys.

    Bytes at B=64 S=8192 H=HQ=16 K=V=128, all of it used: keys 4.29 GB read, 4.29 GB written, values
    2.15 GB read: 10.7 GB, 2.50 ms at 4.3 TB/s. SMEM: 96 KB, 2 CTAs a multiprocessor. Prediction:
    2.75 ms.

    Derivatives are those of the reference's formula, in XLA.
    """
    o, key, value, decay = _differentiable(scale)(q, k, v, w, beta, g, *cache)
    return o, PathCache(key, value, decay, counted(cache.length, 1))


@functools.cache
def _differentiable(scale):
    step = jax.custom_jvp(functools.partial(_step, scale=scale))

    @step.defjvp
    def _(primals, tangents):
        *_, length = primals

        def formula(q, k, v, w, beta, g, *cache):
            cache = PathCache(*cache, length)
            o, cache = reference.path_step(q, k, v, w, beta, g, cache, scale=scale)
            return o, *cache[:3]

        return step(*primals), jax.jvp(formula, primals[:-1], tangents[:-1])[1]

    return step


def _step(q, k, v, w, beta, g, key, value, decay, length, *, scale):
    arrays, results = [q, k, v, w, beta, key, value, length], list(_OUTPUTS)
    if g is not None:
        arrays += [g, decay]
        results.append(_DECAY)
    run = functools.partial(_run, scale=scale)
    o, key, value, *decay = shardwise(run, _INPUTS[: len(arrays)], tuple(results))(*arrays)
    return o, key, value, decay[0] if decay else None


def _run(q, k, v, w, beta, key, value, length, g=None, decay=None, *, scale):
    """The output and the cache's arrays."""
    (B, S, H, V), HQ = value.shape, q.shape[1]
    value = value.at[jnp.arange(B, dtype=jnp.int32), length].set(v, mode="drop")
    added = None
    if g is not None:
        before = (jnp.arange(S, dtype=jnp.int32)[None] < length[:, None])[..., None]
        # A barrier, so that the transpose reads the sums and they can be made in place.
        decay = lax.optimization_barrier(jnp.where(before, decay + g[:, None], 0.0))
        # TMA wants rows of whole 16 bytes.
        added = jnp.pad(scale * LOG2E * jnp.swapaxes(decay, 1, 2), ((0, 0), (0, 0), (0, -S % 4)))

    def heads(x, part):
        """Of each group of query heads, those of the part."""
        x = x.reshape(B, H, HQ // H, -1)[:, :, part]
        return x.reshape(B, -1, x.shape[-1])

    outputs = []
    for first in range(0, HQ // H, MOST_QUERIES):
        part = slice(first, first + MOST_QUERIES)
        some = None if added is None else heads(added, part)
        arrays = heads(q, part), k, w, beta, key, value, length, some
        *softmax, key = _pass(*arrays, scale=scale, moved=first > 0)
        o, top, total = (x.reshape(B, H, -1, *x.shape[2:]) for x in softmax)
        weight = jnp.exp2(top - jnp.max(top, axis=-1, keepdims=True))
        total = jnp.sum(weight * total, axis=-1, keepdims=True)
        outputs.append(jnp.sum(weight[..., None] * o, axis=-2) / total)
    o = jnp.concatenate(outputs, axis=2).reshape(B, HQ, V)
    o = jnp.where((length < S)[:, None, None], o, jnp.nan).astype(v.dtype)
    return (o, key, value) if g is None else (o, key, value, decay)


def _pass(q, k, w, beta, key, value, length, added, *, scale, moved):
    """The kernel call.

    Args:
      moved: whether the keys are new already, and not to be written.

    Returns:
      For each piece of the cache the sum of values, [B, HQ, pieces, V], the largest logit and the
      sum of exponentials, [B, HQ, pieces], all in base 2; and the keys.
    """
    (B, S, H, K), V, HQ = key.shape, value.shape[-1], q.shape[1]
    group, gated = HQ // H, added is not None
    rows = 32 if group <= 2 else 16  # of a tile: a thread has rows * group * V / 128 sums of values
    stages = IN_SMEM // rows
    size = min(LONGEST, max(SHORTEST, S * B * H // CTAS // SHORTEST * SHORTEST))
    pieces = pl.cdiv(S, size)
    of_keys, of_values = _rows_by_warp(rows, K), _rows_by_warp(rows, V)
    by_row, by_column = of_keys.reduce(1), of_keys.reduce(0)
    load = functools.partial(mosaic.load, optimized=False)

    def body(length_ref, q_ref, k_ref, w_ref, beta_ref, key_ref, value_ref, *refs):
        if gated:
            added_ref, *refs = refs
        o_ref, top_ref, total_ref, *refs = refs
        if not moved:
            key_out, *refs = refs
        keys, values, *refs = refs
        if gated:
            sums, *refs = refs
        (loaded,) = refs
        b, h, piece = (lax.axis_index(name) for name in ("b", "h", "piece"))
        length, start = length_ref[b], piece * size
        end = jnp.minimum(length, S - 1) + 1
        tiles = jnp.clip(lax.div(end - start + (rows - 1), rows), 0, size // rows)

        def at(ref, i):
            return ref.at[b, pl.ds(start + i * rows, rows), h]

        def put(source, i):
            """Stores a tile of keys, but not beyond the cache's end."""
            if H > 1 or S % rows == 0:
                plgpu.copy_smem_to_gmem(source, at(key_out, i))
                return
            # One head's rows lie one behind the other. Mosaic cuts such a piece off at the array's
            # end alone: it would overwrite the next row's cache.
            left = S - (start + i * rows)
            pl.when(left >= rows)(lambda: plgpu.copy_smem_to_gmem(source, at(key_out, i)))

            @pl.when(left < rows)
            def _():
                def put_one(r, carry):
                    place = pl.ds(start + i * rows + r, 1)
                    plgpu.copy_smem_to_gmem(source.at[pl.ds(r, 1)], key_out.at[b, place, h])
                    return carry

                lax.fori_loop(0, left, put_one, None)

        def fetch(i):
            slot = lax.rem(i, stages)
            barrier = loaded.at[slot]
            plgpu.copy_gmem_to_smem(at(key_ref, i), keys.at[slot], barrier)
            plgpu.copy_gmem_to_smem(at(value_ref, i), values.at[slot], barrier)
            if gated:
                source = added_ref.at[b, pl.ds(h * group, group), pl.ds(start + i * rows, rows)]
                plgpu.copy_gmem_to_smem(source, sums.at[slot], barrier)

        for i in range(stages):
            pl.when(i < tiles)(functools.partial(fetch, jnp.int32(i)))

        strength = beta_ref[b, h].astype(f32)
        direction = per_column(load(w_ref.at[b, h], by_column), rows)
        own = per_column(load(k_ref.at[b, h], by_column), rows)

        def tile(i, carry):
            slot = lax.rem(i, stages)
            place = start + i * rows
            place = place + plgpu.broadcasted_iota(jnp.int32, (rows,), 0, layout=by_row)
            plgpu.barrier_wait(loaded.at[slot])
            x = load(keys.at[slot], of_keys)
            if not moved:
                overlap = strength * jnp.sum(x * direction, axis=1)
                x = x - per_row(overlap, K) * direction
                at_row = per_row(place, K)
                x = jnp.where(at_row < length, x, jnp.where(at_row == length, own, 0.0))
                keys.at[slot][...] = x
            # Behind the last token may be anything, and 0 times it is not always 0.
            v = jnp.where(per_row(place, V) < end, load(values.at[slot], of_values), 0.0)
            softmax = []
            for j, (top, total, acc) in enumerate(carry):
                query = per_column(load(q_ref.at[b, h * group + j], by_column), rows)
                s = scale * LOG2E * jnp.sum(x * query, axis=1)
                if gated:
                    s += load(sums.at[slot, j], by_row)
                s = jnp.where(place < end, s, -jnp.inf)
                highest = jnp.maximum(top, s)
                p, shrink = jnp.exp2(s - highest), jnp.exp2(top - highest)
                acc = acc * per_row(shrink, V) + per_row(p, V) * v
                softmax.append((highest, total * shrink + p, acc))
            plgpu.commit_smem()  # and all warps have read the tile
            if not moved:
                put(keys.at[slot], i)
                # The tile before has left SMEM, this one may still be on its way.
                plgpu.wait_smem_to_gmem(1, wait_read_only=True)
            following = i + (stages - 1)
            pl.when((i > 0) & (following < tiles))(lambda: fetch(following))
            return tuple(softmax)

        nothing = (
            plgpu.layout_cast(jnp.full((rows,), NEVER, f32), by_row),
            plgpu.layout_cast(jnp.zeros((rows,), f32), by_row),
            plgpu.layout_cast(jnp.zeros((rows, V), f32), of_values),
        )
        softmax = lax.fori_loop(0, tiles, tile, (nothing,) * group)

        for j, (top, total, acc) in enumerate(softmax):
            highest = jnp.max(top)
            weight = jnp.exp2(top - highest)
            at_head = b, h * group + j, piece
            mosaic.store(o_ref.at[at_head], jnp.sum(acc * per_row(weight, V), axis=0))
            top_ref[at_head] = highest
            total_ref[at_head] = jnp.sum(total * weight)

        if not moved:
            last = jnp.minimum(S, start + size)

            @pl.when(start + tiles * rows < last)
            def _():
                place = start + tiles * rows
                same = _same_memory(key_ref.at[b, place, h], key_out.at[b, place, h], by_column)

                @pl.when(~same)
                def _():
                    plgpu.wait_smem_to_gmem(0)
                    zeros = plgpu.layout_cast(jnp.zeros((rows, K), f32), of_keys)
                    keys.at[0][...] = zeros
                    plgpu.commit_smem()

                    def clear(i, carry):
                        put(keys.at[0], i)
                        return carry

                    lax.fori_loop(tiles, pl.cdiv(last - start, rows), clear, None)

            plgpu.wait_smem_to_gmem(0)

    scratch = [
        plgpu.SMEM((stages, rows, K), f32, transforms=(plgpu.TilingTransform((1, K)),)),
        plgpu.SMEM((stages, rows, V), value.dtype, transforms=(plgpu.TilingTransform((1, V)),)),
    ]
    if gated:
        scratch.append(plgpu.SMEM((stages, group, rows), f32))
    shape = B, HQ, pieces
    out = [SDS((*shape, V), f32), SDS(shape, f32), SDS(shape, f32)]
    call = mosaic.kernel(
        body,
        out_type=out if moved else [*out, SDS(key.shape, f32)],
        in_place={} if moved else {5: 3},
        scratch_types=[*scratch, plgpu.Barrier(num_arrivals=2 + gated, num_barriers=stages)],
        grid=(B, pieces, H),
        grid_names=("b", "piece", "h"),
    )
    new = call(length, q, k, w, beta, key, value, *((added,) if gated else ()))
    return (*new, key) if moved else new


def _same_memory(source, target, layout):
    """Whether two refs of zeros, float32 vectors, are the same memory; the target stays zero.

    A number written to the one is looked for in the other.
    """
    ones = plgpu.layout_cast(jnp.ones(target.shape, f32), layout)
    mosaic.store(target, ones)
    plgpu.commit_smem()  # and a barrier
    same = source[0] == 1.0
    plgpu.commit_smem()
    mosaic.store(target, 0.0 * ones)
    return same


def _rows_by_warp(rows, width):
    """The layout of a [rows, width] tile over one warpgroup: a quarter of the rows a warp.

    A row belongs to eight lanes; so their sums along rows lie alike for all widths.
    """
    vector = min(width // 8, 4)  # sums over rows have scratch for four
    tiling = plgpu.Tiling(((rows, width), (rows // 4, width), (4, 8 * vector), (vector,)))
    # (..., warp, 1, row, column, lane's row, lane's column, element)
    layout = TiledLayout(tiling, (-7,), (-3, -2), -1, _check_canonical=False).canonicalize()
    return plgpu.Layout.TILED(layout.tiling, layout.warp_dims, layout.lane_dims, layout.vector_dim)
