"""One token of PaTH attention as a Pallas kernel: one pass over the cached keys and values.

    keys <- keys (I - beta w w^T), and the new token's own
    s = scale q keys^T + decays;   top' = max(top, s);   p = exp2(s - top')
    acc <- exp2(top - top') acc + p values;   total <- exp2(top - top') total + p

A CTA has a piece of one key head's tokens, and goes through it tile by tile:

    phase         | reads                                       | writes
    --------------+---------------------------------------------+-------------------------------
    load_tile     |                                             | keys, values, sums: a slot each
    tile          | keys, values (in their slot)                | keys: the new ones
      move        | keys                                        |
      attend      | the new keys and values in registers, sums  | top, total, acc in registers
      store_tile  | keys                                        | new_key in GMEM
    store_softmax |                                             | o, top, total in GMEM
    clear_rest    |                                             | new_key: zeros, by slot 0 of keys
"""

import dataclasses
import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.mosaic.gpu import TiledLayout
from jax.experimental.pallas import mosaic_gpu as plgpu

from jla._core import path_step as around
from jla.pallas.common import mosaic, pools, scratch
from jla.pallas.common.chunks import LOG2E
from jla.pallas.common.mosaic import f32, per_column, per_row
from jla.pallas.common.scratch import barrier_for, fetch
from jla.pallas.path_attention.settle import moved_on
from jla.reference import path_attention as reference

SDS = jax.ShapeDtypeStruct
HEAD_DIMENSIONS = (16, 32, 64, 128)
IN_SMEM = 128  # cached tokens, keys and values, that a CTA has in SMEM
SHORTEST, LONGEST = 256, 2048  # cached tokens of a CTA
CTAS = 2112  # eight rounds of two on each of an H200's 132 multiprocessors
NEVER = -1e30  # below all logits, and finite


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
def path_step(q, k, v, w, beta, g, cache, *, scale, slots=None):
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
    otherwise. Where XLA drops the alias, the rest of the new buffer is filled with zeros. Of a pool
    each CTA reads and writes the row that its slot names.

    `around.path_step` is what XLA does. The decays' transpose, which the kernel reads, is 1/128 of
    the keys.

    SMEM: 96 KB, 2 CTAs a multiprocessor. Floor at B=64 S=8192 H=HQ=16 K=V=128, all of it used:
    10.7 GB, 2.50 ms.

    Derivatives are those of the reference's formula, in XLA.
    """
    # Here, as it is made of this module's functions.
    from jla.pallas.path_attention.lazy_step import lazy_step

    options = dict(scale=scale, lazy=lazy_step, move_on=moved_on)
    options |= {} if slots is None else dict(slots=slots)
    return around.path_step(_attend, reference.path_step, q, k, v, w, beta, g, cache, **options)


_load = functools.partial(mosaic.load, optimized=False)


def _attend(q, k, w, beta, key, value, length, added, *, scale, first, moved, slots=None):
    """The kernel for some query heads of every group; see `around.path_step`."""
    (S, H), (B, HQ, _) = key.shape[1:3], q.shape

    def heads(x):
        x = x.reshape(B, H, HQ // H, -1)[:, :, first : first + around.MOST_QUERIES]
        return x.reshape(B, -1, x.shape[-1])

    if added is not None:
        # TMA wants rows of whole 16 bytes.
        added = heads(jnp.pad(jnp.swapaxes(added, 1, 2), ((0, 0), (0, 0), (0, -S % 4))))
    arrays = heads(q), k, w, beta, key, value, length, added, slots
    *softmax, key = _pass(*arrays, scale=scale, moved=moved)
    return *(x.reshape(B, H, -1, *x.shape[2:]) for x in softmax), key


def _pass(q, k, w, beta, key, value, length, added, slots, *, scale, moved):
    """The kernel call.

    Args:
      moved: whether the keys are new already, and not to be written.

    Returns:
      For each piece of the cache the sum of values, [B, HQ, pieces, V], the largest logit and the
      sum of exponentials, [B, HQ, pieces], all in base 2; and the keys.
    """
    (_, S, H, K), V, (B, HQ, _) = key.shape, value.shape[-1], q.shape
    group = HQ // H
    rows = 32 if group <= 2 else 16  # of a tile: a thread has rows * group * V / 128 sums of values
    stages = IN_SMEM // rows
    size = min(LONGEST, max(SHORTEST, S * B * H // CTAS // SHORTEST * SHORTEST))
    shape = B, HQ, pl.cdiv(S, size)
    layouts = Layouts(rows_by_warp(rows, K), rows_by_warp(rows, V))
    out = scratch.kernel(
        functools.partial(_body, group=group, size=size, scale=scale, layouts=layouts),
        inputs=dict(
            length=length,
            q=q,
            k=k,
            w=w,
            beta=beta,
            key=key,
            value=value,
            added=added,
            slots=slots,
        ),
        outputs=dict(
            o=SDS((*shape, V), f32),
            top=SDS(shape, f32),
            total=SDS(shape, f32),
            new_key=None if moved else SDS(key.shape, f32),
        ),
        scratch=dict(
            keys=tiles((stages, rows, K), key.dtype),
            values=tiles((stages, rows, V), value.dtype),
            sums=None if added is None else plgpu.SMEM((stages, group, rows), f32),
            loaded=barrier_for(dict(key=1, value=1, added=added is not None), stages),
        ),
        in_place={} if moved else dict(key="new_key"),
        grid=(B, shape[-1], H),
        grid_names=("b", "piece", "h"),
    )
    return out.o, out.top, out.total, key if moved else out.new_key


def tiles(shape, dtype):
    return plgpu.SMEM(shape, dtype, transforms=(plgpu.TilingTransform((1, shape[-1])),))


@dataclasses.dataclass(frozen=True)
class Layouts:
    """How tiles of keys and of values lie in registers."""

    keys: Any
    values: Any

    @property
    def by_row(self):
        return self.keys.reduce(1)

    @property
    def by_column(self):
        return self.keys.reduce(0)


@dataclasses.dataclass(frozen=True)
class Piece:
    """A CTA's piece of one key head's cached tokens."""

    refs: Any
    layouts: Layouts
    group: int  # query heads
    size: int  # tokens
    scale: float
    b: Any
    row: Any  # of the cache
    h: Any
    number: Any
    length: Any  # tokens that were cached before
    start: Any  # the first token
    end: Any  # of the row's tokens, with the new one
    tiles: Any  # that hold tokens

    @property
    def stages(self):
        return self.refs.keys.shape[0]

    @property
    def rows(self):
        """Tokens of a tile."""
        return self.refs.keys.shape[1]

    @property
    def capacity(self):
        return self.refs.key.shape[1]

    def at(self, ref, i):
        """Tile i of an array of the cache."""
        return ref.at[self.row, pl.ds(self.start + i * self.rows, self.rows), self.h]

    def slot(self, i):
        """The place of tile i in SMEM."""
        return lax.rem(i, self.stages)


class Token(NamedTuple):
    """The new token: what moves the keys, and its own key, in all rows of a tile."""

    beta: Any
    w: Any
    k: Any


def _body(refs, *, group, size, scale, layouts):
    b, h, number = (lax.axis_index(name) for name in ("b", "h", "piece"))

    def advance(row):
        _advance(_piece(refs, group, size, scale, layouts, b, row, h, number))

    def copy(source, target, row):
        def one(i, carry):
            pools.tile(layouts.by_column, number * size + i, h)(source, target, row)
            return carry

        lax.fori_loop(0, jnp.minimum(size, refs.key.shape[1] - number * size), one, None)

    pools.on_row(refs.slots, b, refs.key.shape[0], advance, lambda: None)
    if refs.new_key is not None:
        pools.keep_rest(refs.slots, b, refs.key, refs.new_key, copy)


def _advance(piece):
    refs = piece.refs
    for i in range(piece.stages):
        pl.when(i < piece.tiles)(functools.partial(load_tile, piece, jnp.int32(i)))
    token = _token(piece)
    softmax = lax.fori_loop(0, piece.tiles, functools.partial(tile, piece, token), start(piece))
    store_softmax(piece, softmax)
    if refs.new_key is not None:
        clear_rest(piece)
        plgpu.wait_smem_to_gmem(0)


def _piece(refs, group, size, scale, layouts, b, row, h, number):
    """The CTA's piece."""
    (_, rows, _), S = refs.keys.shape, refs.key.shape[1]
    length, start = refs.length[b], number * size
    end = jnp.minimum(length, S - 1) + 1
    tiles = jnp.clip(lax.div(end - start + (rows - 1), rows), 0, size // rows)
    return Piece(refs, layouts, group, size, scale, b, row, h, number, length, start, end, tiles)


def _token(piece):
    """The new token's beta, w and k."""
    refs, at, by_column = piece.refs, (piece.b, piece.h), piece.layouts.by_column
    beta = refs.beta[*at].astype(f32)
    w = per_column(_load(refs.w.at[*at], by_column), piece.rows)
    return Token(beta, w, per_column(_load(refs.k.at[*at], by_column), piece.rows))


def start(piece):
    """For each query head the largest logits, sums of exponentials and of values: of no token."""
    rows, V, layouts = piece.rows, piece.refs.values.shape[2], piece.layouts
    nothing = (
        plgpu.layout_cast(jnp.full((rows,), NEVER, f32), layouts.by_row),
        plgpu.layout_cast(jnp.zeros((rows,), f32), layouts.by_row),
        plgpu.layout_cast(jnp.zeros((rows, V), f32), layouts.values),
    )
    return (nothing,) * piece.group


def load_tile(piece, i):
    """Starts the loads of tile i."""
    refs, slot = piece.refs, piece.slot(i)
    loads = dict(
        key=(piece.at(refs.key, i), refs.keys.at[slot]),
        value=(piece.at(refs.value, i), refs.values.at[slot]),
    )
    if refs.added is not None:
        heads = pl.ds(piece.h * piece.group, piece.group)
        tokens = pl.ds(piece.start + i * piece.rows, piece.rows)
        loads |= dict(added=(refs.added.at[piece.b, heads, tokens], refs.sums.at[slot]))
    fetch(loads, refs.loaded.at[slot])


def store_tile(piece, source, i):
    """Stores tile i of the new keys, but not beyond the cache's end."""
    target, (S, H) = piece.refs.new_key, piece.refs.key.shape[1:3]
    if H > 1 or S % piece.rows == 0:
        plgpu.copy_smem_to_gmem(source, piece.at(target, i))
        return
    # One head's rows lie one behind the other. Mosaic cuts such a piece off at the array's
    # end alone: it would overwrite the next row's cache.
    left = S - (piece.start + i * piece.rows)
    pl.when(left >= piece.rows)(lambda: plgpu.copy_smem_to_gmem(source, piece.at(target, i)))

    @pl.when(left < piece.rows)
    def _():
        def put_one(r, carry):
            place = pl.ds(piece.start + i * piece.rows + r, 1)
            one = target.at[piece.row, place, piece.h]
            plgpu.copy_smem_to_gmem(source.at[pl.ds(r, 1)], one)
            return carry

        lax.fori_loop(0, left, put_one, None)


def tile(piece, token, i, softmax):
    """Moves the keys of tile i, stores them, and adds its tokens to each head's softmax."""
    refs, slot = piece.refs, piece.slot(i)
    softmax = read_tile(piece, token, i, softmax)
    plgpu.commit_smem()  # and all warps have read the tile
    if refs.new_key is not None:
        store_tile(piece, refs.keys.at[slot], i)
        # The tile before has left SMEM, this one may still be on its way.
        plgpu.wait_smem_to_gmem(1, wait_read_only=True)
    following = i + (piece.stages - 1)
    pl.when((i > 0) & (following < piece.tiles))(lambda: load_tile(piece, following))
    return softmax


def read_tile(piece, token, i, softmax):
    """Moves the keys of tile i, in SMEM, and adds its tokens to each head's softmax."""
    refs, slot = piece.refs, piece.slot(i)
    first = piece.start + i * piece.rows
    iota = plgpu.broadcasted_iota(jnp.int32, (piece.rows,), 0, layout=piece.layouts.by_row)
    place = first + iota
    plgpu.barrier_wait(refs.loaded.at[slot])
    keys = _load(refs.keys.at[slot], piece.layouts.keys)
    if refs.new_key is not None:
        keys = move(piece, token, place, keys)
        refs.keys.at[slot][...] = keys
    # Behind the last token may be anything, and 0 times it is not always 0.
    there = per_row(place, refs.values.shape[2]) < piece.end
    values = jnp.where(there, _load(refs.values.at[slot], piece.layouts.values), 0.0)
    return tuple(
        attend(piece, j, of_head, slot, place, keys, values) for j, of_head in enumerate(softmax)
    )


def move(piece, token, place, keys):
    """keys (I - beta w w^T); the new token's own; and 0 behind it."""
    K = keys.shape[1]
    overlap = token.beta * jnp.sum(keys * token.w, axis=1)
    keys = keys - per_row(overlap, K) * token.w
    at_row, length = per_row(place, K), piece.length
    return jnp.where(at_row < length, keys, jnp.where(at_row == length, token.k, 0.0))


def attend(piece, j, softmax, slot, place, keys, values):
    """One query head's softmax with a tile's tokens, each row of the tile by itself."""
    refs, layouts, (top, total, acc) = piece.refs, piece.layouts, softmax
    query = _load(refs.q.at[piece.b, piece.h * piece.group + j], layouts.by_column)
    s = piece.scale * LOG2E * jnp.sum(keys * per_column(query, piece.rows), axis=1)
    if refs.sums is not None:
        s += _load(refs.sums.at[slot, j], layouts.by_row)
    s = jnp.where(place < piece.end, s, -jnp.inf)
    highest = jnp.maximum(top, s)
    p, shrink = jnp.exp2(s - highest), jnp.exp2(top - highest)
    V = values.shape[1]
    acc = acc * per_row(shrink, V) + per_row(p, V) * values
    return highest, total * shrink + p, acc


def store_softmax(piece, softmax):
    """Joins the rows of the tiles: the piece's outputs, for each query head."""
    refs = piece.refs
    for j, (top, total, acc) in enumerate(softmax):
        highest = jnp.max(top)
        weight = jnp.exp2(top - highest)
        at_head = piece.b, piece.h * piece.group + j, piece.number
        mosaic.store(refs.o.at[at_head], jnp.sum(acc * per_row(weight, acc.shape[1]), axis=0))
        refs.top[at_head] = highest
        refs.total[at_head] = jnp.sum(total * weight)


def clear_rest(piece):
    """Fills the rest of the piece's new keys with zeros, if they are not the old ones' memory."""
    refs, layouts = piece.refs, piece.layouts
    last = jnp.minimum(piece.capacity, piece.start + piece.size)

    @pl.when(piece.start + piece.tiles * piece.rows < last)
    def _():
        place = piece.start + piece.tiles * piece.rows
        at = piece.row, place, piece.h
        same = _same_memory(refs.key.at[*at], refs.new_key.at[*at], layouts.by_column)

        @pl.when(~same)
        def _():
            plgpu.wait_smem_to_gmem(0)
            zeros = plgpu.layout_cast(jnp.zeros(refs.keys.shape[1:], f32), layouts.keys)
            refs.keys.at[0][...] = zeros
            plgpu.commit_smem()

            def clear(i, carry):
                store_tile(piece, refs.keys.at[0], i)
                return carry

            tiles = pl.cdiv(last - piece.start, piece.rows)
            lax.fori_loop(piece.tiles, tiles, clear, None)


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


def rows_by_warp(rows, width):
    """The layout of a [rows, width] tile over one warpgroup: a quarter of the rows a warp.

    A row belongs to eight lanes; so their sums along rows lie alike for all widths.
    """
    vector = min(width // 8, 4)  # sums over rows have scratch for four
    tiling = plgpu.Tiling(((rows, width), (rows // 4, width), (4, 8 * vector), (vector,)))
    # (..., warp, 1, row, column, lane's row, lane's column, element)
    layout = TiledLayout(tiling, (-7,), (-3, -2), -1, _check_canonical=False).canonicalize()
    return plgpu.Layout.TILED(layout.tiling, layout.warp_dims, layout.lane_dims, layout.vector_dim)
