"""One token from a lazy cache in two kernels: `token` makes the queries, and this one reads.

    s = scale (q^T (I + D)) keys^T + decays   of the settled keys, piece by piece
    s = scale q recent^T + decays             of the recent ones, one piece more
    keys <- keys (I + D)^T                    of a row whose 64th token this is

A CTA has a piece of one key head's cached tokens, as in `step`; the first CTA of a head has the
recent ones. Where the row's keys move on, a CTA moves those of its piece, which nobody else reads,
when it has read them: see `settle`. So a step is two launches, whatever it has to do.

    phase       | reads                                | writes
    ------------+--------------------------------------+------------------------------
    read_recent | recent, values                       | o, top, total
    read_piece  | keys, values                         | o, top, total
    move_piece  | keys, all_recent, all_change         | settled_key
"""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from jla._core import path_step as around
from jla._core.cache import RECENT, LazyPathCache, counted, first_recent
from jla._core.path_lazy import is_full
from jla.pallas.common import mosaic, pools, scratch
from jla.pallas.common import token as of_layers
from jla.pallas.common.mosaic import f16, f32
from jla.pallas.common.scratch import barrier_for, fetch
from jla.pallas.path_attention import settle
from jla.pallas.path_attention import step as steps
from jla.pallas.path_attention.token import after_token
from jla.reference import path_attention as reference

SDS = jax.ShapeDtypeStruct
IN_SMEM = 128  # cached tokens, keys and values, that a CTA has in SMEM
RESIDENT = 264  # CTAs at one time: two on each of an H200's 132 multiprocessors
MOVING = 4  # query heads to a key head at most, for the kernel to move keys: registers
LONGEST = 1024  # cached tokens of a CTA where all CTAs run at one time


@functools.partial(jax.jit, static_argnames="scale")
def path_token(q, k, v, w, b, b_bias, cache, *, scale):
    """See `jla._token.path_token`.

    `token.after_token` also normalises w and makes beta, with the approximate exp2.

    Derivatives, and vmap, are those of the definition's formula, in XLA.
    """
    arrays, structure = jax.tree.flatten(cache)

    def run(step, q, k, v, w, b, b_bias, *arrays):
        cache = jax.tree.unflatten(structure, arrays)
        o, cache = step(q, k, v, w, b, b_bias, cache, scale=scale)
        return o, *jax.tree.leaves(cache)

    def kernels(q, k, v, w, b, b_bias, cache, *, scale):
        o, after = lazy_step(q, k, v, w, b, None, cache, scale=scale, b_bias=b_bias)
        return o, after._replace(length=counted(cache.length, 1))

    kernel, formula = (functools.partial(run, x) for x in (kernels, reference.path_token))
    o, *after = of_layers.by_formula(kernel, formula, q, k, v, w, b, b_bias, *arrays)
    return o, jax.tree.unflatten(structure, after)


def unsupported_token(q, k, v, cache):
    """Why `path_token` cannot serve these arguments, or None."""
    if not isinstance(cache, LazyPathCache) or cache.decay is not None:
        return "the token's kernels take a LazyPathCache without decays"
    if q.shape[1] > around.MOST_QUERIES * k.shape[1]:
        return f"{q.shape[1]} query heads to {k.shape[1]} key heads are more than eight to one"
    return of_layers.unsupported_here() or steps.unsupported(q, v)


def lazy_step(q, k, v, w, beta, g, cache, *, scale, b_bias=None):
    """The output and the cache's arrays; of one device, at most eight query heads to a key head.

    With `b_bias` w and beta are as `token.after_token` takes them then.
    """
    (_, S, _, K), length = cache.key.shape, cache.length
    decay, added = cache.decay, None
    if g is not None:
        decay, added = around.with_decay(g, decay, length, scale)
        added = jnp.pad(jnp.swapaxes(added, 1, 2), ((0, 0), (0, 0), (0, -S % 4)))
    before = cache.recent, cache.change, cache.value, length
    token = after_token(q, k, v, w, beta, *before, b_bias)
    moves = K % 64 == 0 and S % mosaic.TILE_ROWS == 0 and q.shape[1] <= MOVING * k.shape[1]
    arrays = token.back, q, token.new_recent, cache.key, token.new_value, length, added
    *pieces, key = attend(*arrays, token.all_recent, token.all_change, scale=scale, moves=moves)
    o = around.joined(*pieces)
    o = jnp.where((length < S)[:, None, None], o, jnp.nan).astype(v.dtype)
    if not moves:
        # A barrier, so that the kernel has read the keys and they can be moved in place.
        o, full = lax.optimization_barrier((o, is_full(counted(length, 1), S)))
        first = first_recent(length, S)
        key = settle.moved_on(key, token.all_recent, token.all_change, first, full)
    after = dict(key=key, value=token.new_value, decay=decay)
    return o, cache._replace(**after, recent=token.new_recent, change=token.new_change)


def piece_size(B, S, H):
    """Cached tokens of a CTA: whole tiles of `settle`.

    All CTAs run at one time if that gives none too many tokens, so that none waits for its turn and
    the last ones do not run by themselves. Elsewhere as `step` has it.
    """
    free = max(RESIDENT - B * H, 1)
    size = -(-S * B * H // free)
    if size > LONGEST:
        size = min(steps.LONGEST, max(steps.SHORTEST, S * B * H // steps.CTAS))
    return -(-size // settle.ROWS) * settle.ROWS


def attend(back, q, recent, key, value, length, added, all_recent, all_change, *, scale, moves):
    """The kernel call.

    Args:
      back, q: [B, HQ, K]: the queries for the settled keys and for the recent ones.
      recent, value: after the token. length: before it.
      added: the decays as they are added to logits, [B, HQ, S or more], or None.
      all_recent, all_change: see `token.after_token`.
      moves: whether the kernel moves the keys of rows that move on.

    Returns:
      For each piece of the cache the sum of values, [B, HQ, pieces, V], the largest logit and the
      sum of exponentials, [B, HQ, pieces], all in base 2; and the keys.

    SMEM: 96 KB, 2 CTAs a multiprocessor. Floor at B=1 S=16384 H=HQ=8 K=V=128, 16-bit keys: 67 MB,
    16 us at 4.3 TB/s; with float32 keys 101 MB, 23 us. Every 64th token 134 or 235 MB.
    """
    (_, S, H, K), V, (B, HQ, _) = key.shape, value.shape[-1], q.shape
    group, size = HQ // H, piece_size(B, S, H)
    rows = 32 if group <= 2 else 16
    stages = IN_SMEM // rows
    shape = B, HQ, pl.cdiv(S, size) + 1
    transforms = mosaic.TRANSFORMS_F32 if key.dtype == f32 else mosaic.TRANSFORMS
    moving = [
        plgpu.SMEM((1, settle.ROWS, K), key.dtype, transforms=transforms),
        mosaic.tile(K, K, dtype=f16),
        mosaic.tile(K, K, dtype=f16),
    ]
    reading = dict(
        settled=[
            steps.tiles((stages, rows, K), key.dtype),
            values := steps.tiles((stages, rows, V), value.dtype),
        ],
        recent=[steps.tiles((RECENT // rows, rows, K), f32), values],
    )
    layouts = steps.Layouts(steps.rows_by_warp(rows, K), steps.rows_by_warp(rows, V))
    out = scratch.kernel(
        functools.partial(_body, group=group, size=size, scale=scale, layouts=layouts),
        inputs=dict(
            length=length,
            back=back,
            q=q,
            recent=recent,
            key=key,
            value=value,
            added=added,
            all_recent=all_recent,
            all_change=all_change if moves else None,
        ),
        outputs=dict(
            o=SDS((*shape, V), f32),
            top=SDS(shape, f32),
            total=SDS(shape, f32),
            settled_key=SDS(key.shape, key.dtype) if moves else None,
        ),
        scratch=dict(
            smem=reading | (dict(moving=moving) if moves else {}),
            sums=None if added is None else plgpu.SMEM((stages, group, rows), f32),
            loaded=barrier_for(dict(key=1, value=1, added=added is not None), stages),
            tile_loaded=barrier_for(["key"], 1) if moves else None,
        ),
        in_place=dict(key="settled_key") if moves else {},
        grid=(B, shape[-1], H),
        grid_names=("b", "piece", "h"),
    )
    pieces = (x.reshape(B, H, group, *x.shape[2:]) for x in (out.o, out.top, out.total))
    return *pieces, out.settled_key if moves else key


class Reading(NamedTuple):
    """The refs of `step`'s functions, of the settled keys or of the recent ones."""

    q: jax.Array
    key: jax.Array
    value: jax.Array
    added: jax.Array | None
    o: jax.Array
    top: jax.Array
    total: jax.Array
    keys: jax.Array
    values: jax.Array
    sums: jax.Array | None
    loaded: jax.Array
    new_key: None = None


def _body(refs, *, group, size, scale, layouts):
    b, number, h = (lax.axis_index(name) for name in ("b", "piece", "h"))
    length, S = refs.length[b], refs.key.shape[1]
    first = lax.div(jnp.minimum(length, S), jnp.int32(RECENT)) * RECENT
    of_cta = functools.partial(steps.Piece, layouts=layouts, group=group, scale=scale)

    def piece(q, key, tiles, start, end, most):
        keys, values = tiles
        rows = keys.shape[1]
        out = refs.o, refs.top, refs.total
        own = Reading(q, key, refs.value, refs.added, *out, keys, values, refs.sums, refs.loaded)
        count = jnp.clip(lax.div(end - start + (rows - 1), jnp.int32(rows)), 0, most // rows)
        at = dict(b=b, row=b, h=h, number=number, length=length)
        return of_cta(own, **at, size=most, start=start, end=end, tiles=count)

    full = (lax.rem(length + 1, jnp.int32(RECENT)) == 0) & (length < S)

    @pl.when(number == 0)
    def _():
        end = jnp.minimum(length, S - 1) + 1
        own = piece(refs.q, refs.recent, refs.smem.recent, first, end, RECENT)
        load_recent(own, refs.all_recent, full)
        read_recent(own)

    @pl.when(number > 0)
    def _():
        start = (number - 1) * size
        read_piece(piece(refs.back, refs.key, refs.smem.settled, start, first, size))
        if refs.settled_key is not None:
            pl.when(full)(lambda: move_piece(refs, b, h, start, first, size))
            pl.when(~full)(lambda: keep_piece(refs, b, h, start, size, layouts))


def load_recent(piece, all_recent, full):
    """Starts the loads of the recent keys and their values. They are in `all_recent` where the
    row's keys move on."""
    refs, rows = piece.refs, piece.rows
    for i in range(RECENT // rows):
        tokens, slot = pl.ds(piece.start + i * rows, rows), refs.loaded.at[i]
        at = piece.b, pl.ds(i * rows, rows), piece.h

        def load_keys(source, i=i, at=at, slot=slot):
            fetch(dict(key=(source.at[*at], refs.keys.at[i])), slot, partial=True)

        pl.when(full)(functools.partial(load_keys, all_recent))
        pl.when(~full)(functools.partial(load_keys, refs.key))
        loads = dict(value=(refs.value.at[piece.b, tokens, piece.h], refs.values.at[i]))
        if refs.added is not None:
            heads = pl.ds(piece.h * piece.group, piece.group)
            loads |= dict(added=(refs.added.at[piece.b, heads, tokens], refs.sums.at[i]))
        fetch(loads, slot, partial=True)


def read_recent(piece):
    """The recent keys' part of the outputs."""
    softmax = steps.start(piece)
    for i in range(RECENT // piece.rows):
        softmax = steps.read_tile(piece, None, jnp.int32(i), softmax)
    steps.store_softmax(piece, softmax)


def read_piece(piece):
    """The settled keys' part of the outputs, of the CTA's piece."""
    for i in range(piece.stages):
        pl.when(i < piece.tiles)(functools.partial(steps.load_tile, piece, jnp.int32(i)))
    step = functools.partial(steps.tile, piece, None)
    steps.store_softmax(piece, lax.fori_loop(0, piece.tiles, step, steps.start(piece)))


def move_piece(refs, b, h, start, first, size):
    """Moves the piece's keys on, and the recent ones to their places; see `settle`."""
    keys, high, low = refs.smem.moving
    own = settle.Refs(
        refs.key,
        refs.all_recent,
        refs.all_change,
        refs.settled_key,
        keys,
        high,
        low,
        refs.tile_loaded,
    )
    start, last = (lax.div(x, jnp.int32(settle.ROWS)) for x in (start, first))
    piece = settle.Piece(own, b, h, start, last)
    plgpu.commit_smem()  # all warps have read the piece
    settle.move_one_by_one(piece, jnp.clip(last + 1 - start, 0, size // settle.ROWS))


def keep_piece(refs, b, h, start, size, layouts):
    """Copies the piece's keys, unless the new ones are in the same memory. Slow, and seldom: see
    `mosaic.kernel`."""

    def copy_rest():
        def one(i, carry):
            pools.tile(layouts.by_column, start + i, h)(refs.key, refs.settled_key, b)
            return carry

        lax.fori_loop(0, jnp.minimum(size, refs.key.shape[1] - start), one, None)

    pools.unless_same_memory(refs.key, refs.settled_key, copy_rest)
