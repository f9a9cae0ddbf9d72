"""The keys of a lazy cache's rows that move on: all at once, in place, once in 64 tokens.

    key <- key + key D^T,  with I + D the maps since they did;  then the 64 recent keys

A key is factor (high + low) with float16 parts of at most 1, and D = high + low: three products of
them leave out 2^-22 of the change.

CTAs take pieces of a head's keys, one after another, of the rows that move on, of which mostly
there are none:

    phase      | reads                                | writes
    -----------+--------------------------------------+----------------------------
    make_parts | change                               | high, low
    load_tile  |                                      | keys, a slot
    tile       | keys, high, low; of the last, recent | keys, in their slot
    store_tile | keys                                 | new_key in GMEM
"""

import dataclasses
import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from jla._core import path_step as around
from jla.pallas.common import mosaic, pools, scratch
from jla.pallas.common.mosaic import f16, f32, load, per_row, product
from jla.pallas.common.scratch import barrier_for, fetch

SDS = jax.ShapeDtypeStruct
ROWS = 64  # of a tile: as many as there are recent keys
PIECE = 32  # tiles of a piece, at most
CTAS = 132  # as an H200 has multiprocessors
SLOTS = 4
LEAST = 1e-30  # so that no row is divided by zero


def moved_on(key, recent, change, first, full):
    """The keys with those of the `full` rows moved on; see `jla._core.path_step.moved_on`.

    Args:
      key: [B, S, H, K], float32 or 16 bits. recent: [B, 64, H, K]. change: [B, H, K, K]; float32.
      first: [B], int32: how many of a row's keys are settled, a multiple of 64.
      full: [B], bool: whether the row has 64 recent keys, which then move into `key`.

    SMEM at K=128: 192 KB. Floor at B=64 S=8192 H=16, all rows: 8.6 GB, 2.0 ms; no row: a launch.
    """
    _, S, _, K = key.shape
    if K % 64 or S % mosaic.TILE_ROWS:
        return around.moved_on(key, recent, change, first, full)
    tiles = pl.cdiv(S, ROWS)
    size = pl.cdiv(tiles, pl.cdiv(tiles, PIECE))
    transforms = mosaic.TRANSFORMS_F32 if key.dtype == f32 else mosaic.TRANSFORMS
    rows, count = _numbers(full)
    out = scratch.kernel(
        functools.partial(_body, size=size, pieces=pl.cdiv(tiles, size)),
        inputs=dict(
            rows=rows,
            count=count,
            full=full.astype(jnp.int32),
            first=first,
            key=key,
            recent=recent,
            change=change,
        ),
        outputs=dict(new_key=SDS(key.shape, key.dtype)),
        scratch=dict(
            keys=plgpu.SMEM((SLOTS, ROWS, K), key.dtype, transforms=transforms),
            high=mosaic.tile(K, K, dtype=f16),
            low=mosaic.tile(K, K, dtype=f16),
            loaded=barrier_for(["key"], SLOTS),
        ),
        in_place=dict(key="new_key"),
        reductions_cross_warps=False,
        grid=(CTAS,),
        grid_names=("cta",),
    )
    return out.new_key


def _numbers(full):
    """The numbers of the rows that are full, one behind another, [B], and their count, [1]."""
    number = jnp.arange(full.shape[0], dtype=jnp.int32)
    before = jnp.sum(full[None] & (number[None] < number[:, None]), axis=1, dtype=jnp.int32)
    at = full[None] & (before[None] == number[:, None])
    return jnp.sum(jnp.where(at, number[None], 0), axis=1), jnp.sum(full, dtype=jnp.int32)[None]


class Refs(NamedTuple):
    """What a piece's phases read and write."""

    key: Any
    recent: Any
    change: Any
    new_key: Any
    keys: Any
    high: Any
    low: Any
    loaded: Any


@dataclasses.dataclass(frozen=True)
class Piece:
    """Some tiles of a head's keys."""

    refs: Any
    b: Any
    h: Any
    start: Any  # the first tile
    last: Any  # the row's last tile, which the recent keys become

    def rows(self, i):
        """Where tile i of the piece is in a row."""
        return pl.ds((self.start + i) * ROWS, ROWS)


def _body(refs, *, size, pieces):
    cta, H = lax.axis_index("cta"), refs.key.shape[2]
    of_row = pieces * H

    def one(i, carry):
        item = cta + i * CTAS
        rest = lax.rem(item, jnp.int32(of_row))
        b = refs.rows[lax.div(item, jnp.int32(of_row))]
        start, last = lax.div(rest, jnp.int32(H)) * size, lax.div(refs.first[b], jnp.int32(ROWS))
        piece = Piece(refs, b, lax.rem(rest, jnp.int32(H)), start, last)
        _move(piece, jnp.clip(last + 1 - start, 0, size))
        return carry

    items = refs.count[0] * of_row
    lax.fori_loop(0, jnp.maximum(lax.div(items - cta + (CTAS - 1), jnp.int32(CTAS)), 0), one, None)
    _keep_rest(refs, cta)


def _keep_rest(refs, cta):
    """Copies the rows that do not move on, unless the new keys are in the same memory: then they
    are there already. This is slow, and seldom: see `mosaic.kernel`."""
    B, S, H, _ = refs.key.shape

    def of_row(b, carry):
        def copy(i, carry):
            place = lax.div(i, jnp.int32(H)), lax.rem(i, jnp.int32(H))
            pools.tile(mosaic.PER_COLUMN, *place)(refs.key, refs.new_key, b)
            return carry

        # A CTA has every 132nd token.
        tokens = lax.div(S - cta + (CTAS - 1), jnp.int32(CTAS))

        @pl.when(refs.full[b] == 0)
        def _():
            lax.fori_loop(0, tokens * H, lambda i, x: copy(_strided(i, cta, H), x), carry)

        return carry

    def copy_rows():
        lax.fori_loop(0, B, of_row, None)

    pools.unless_same_memory(refs.key, refs.new_key, copy_rows)


def _strided(i, cta, heads):
    """Token and head, as one number, of the i-th of those that a CTA copies."""
    heads = jnp.int32(heads)
    return (cta + lax.div(i, heads) * CTAS) * heads + lax.rem(i, heads)


def _move(piece, count):
    """Moves so many tiles of the piece."""
    refs = piece.refs

    @pl.when(count > 0)
    def _():
        make_parts(piece)
        of_piece = (functools.partial(f, piece) for f in (tile, load_tile, store_tile))
        step, load_one, store_one = of_piece
        mosaic.walk(step, None, count, load_one, store_one, refs.loaded, SLOTS)


def move_one_by_one(piece, count):
    """As `_move`, with one slot in SMEM; for a CTA that has others beside it."""

    def turn(i, carry):
        load_tile(piece, i, 0)
        plgpu.barrier_wait(piece.refs.loaded.at[0])
        tile(piece, i, 0, None)
        plgpu.commit_smem()
        store_tile(piece, i, 0)
        plgpu.wait_smem_to_gmem(0, wait_read_only=True)
        return carry

    @pl.when(count > 0)
    def _():
        make_parts(piece)
        lax.fori_loop(0, count, turn, None)
        plgpu.wait_smem_to_gmem(0)


def make_parts(piece):
    """D = high + low."""
    refs = piece.refs
    for i in range(refs.high.shape[0] // ROWS):
        rows = pl.ds(i * ROWS, ROWS)
        d = load(refs.change.at[piece.b, piece.h, rows], optimized=False)
        refs.high.at[rows][...], refs.low.at[rows][...] = _parts(d)
    plgpu.commit_smem()


def load_tile(piece, i, slot):
    """Starts the load of tile i; of the last, not what it is to be."""
    refs = piece.refs
    source = refs.key.at[piece.b, piece.rows(i), piece.h]
    fetch(dict(key=(source, refs.keys.at[slot])), refs.loaded.at[slot])


def tile(piece, i, slot, _):
    """The new keys of tile i."""
    refs = piece.refs
    keys = refs.keys.at[slot]

    def recent():
        return load(refs.recent.at[piece.b, :, piece.h], optimized=False)

    def moved():
        x = load(keys)
        K = x.shape[1]
        factor = jnp.maximum(jnp.abs(x).max(axis=1), LEAST)
        high, low = _parts(x * per_row(1.0 / factor, K))
        to_high, to_low = refs.high.T, refs.low.T
        change = product((high, to_high), (high, to_low), (low, to_high)) * per_row(factor, K)
        return load(keys) + change  # once more: for x there are no registers

    keys[...] = lax.cond(piece.start + i == piece.last, recent, moved).astype(keys.dtype)


def store_tile(piece, i, slot):
    """Stores the new keys of tile i."""
    refs = piece.refs
    plgpu.copy_smem_to_gmem(refs.keys.at[slot], refs.new_key.at[piece.b, piece.rows(i), piece.h])


def _parts(x):
    """A float32 tile as the sum of two of float16."""
    high = x.astype(f16)
    return high, (x - high.astype(f32)).astype(f16)
