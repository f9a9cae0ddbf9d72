"""What a token does to a lazy cache's recent keys, maps and values, in one small kernel.

    w = l2norm(w);   beta = 2 sigmoid(b + b_bias)        in a layer, whose w and b come as they are

    recent <- recent (I - beta w w^T), and the new token's own key
    written = w^T (I + D);   D <- D - beta w written;   back = q^T (I + D) - beta (q . w) written

D is `change`. With the 64th token both begin anew, and what they were goes to the kernel that moves
the settled keys, `lazy_step.attend`. The value gets its place in the cache.

A CTA has some columns of one head's D, and some of its recent keys: columns of D are independent of
one another, and so are keys.
"""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from jla._core.cache import RECENT
from jla.pallas.common import mosaic, pools, scratch, token
from jla.pallas.common.mosaic import f32, per_column, per_row
from jla.pallas.common.scratch import barrier_for, fetch

SDS = jax.ShapeDtypeStruct
WIDTH = 32  # columns of a CTA

_load = functools.partial(mosaic.load, optimized=False)


def after_token(q, k, v, w, beta, recent, change, value, length, b_bias=None):
    """The cache's arrays after a token, and what reads and moves its settled keys.

    Args:
      q: [B, HQ, K]. k, w: [B, H, K]. v: [B, H, V]. beta: [B, H].
      b_bias: None, or [H], float32: w has any length, then, and beta is b.
      recent, change, value, length: of the cache before the token.

    Returns:
      A named tuple: `back`, the queries for the settled keys, [B, HQ, K], float32; `new_recent`,
      `new_change`, `new_value`; and, written for the rows whose keys move on, `all_recent` and
      `all_change`: the former two as they would be had they not begun anew.

    Floor at B=1 H=8 K=128: 1.6 MB, a launch. At B=64 H=16: 0.21 GB, 0.05 ms.
    """
    (B, HQ, K), (_, H, V) = q.shape, v.shape
    width = min(K, WIDTH)
    parts = K // width
    by_warp = mosaic.columns_by_warp(width)
    return scratch.kernel(
        functools.partial(_body, layouts=Layouts(by_warp, mosaic.rows_by_warp(K)), parts=parts),
        inputs=dict(
            length=length,
            q=q,
            k=k,
            v=v,
            w=w,
            beta=beta,
            recent=recent,
            change=change,
            value=value,
            b_bias=b_bias,
        ),
        outputs=dict(
            back=SDS((B, HQ, K), f32),
            new_recent=SDS(recent.shape, f32),
            new_change=SDS(change.shape, f32),
            new_value=SDS(value.shape, value.dtype),
            all_recent=SDS(recent.shape, f32),
            all_change=SDS(change.shape, f32),
        ),
        scratch=dict(row=plgpu.SMEM((1, V), value.dtype), loaded=barrier_for(["v"])),
        in_place=dict(recent="new_recent", change="new_change", value="new_value"),
        grid=(B, parts, H),
        grid_names=("b", "part", "h"),
    )


@dataclasses.dataclass(frozen=True)
class Layouts:
    """How a CTA's columns of the maps and its recent keys lie in registers."""

    maps: Any
    keys: Any


@dataclasses.dataclass(frozen=True)
class Part:
    """A CTA's part of one head."""

    refs: Any
    layouts: Layouts
    b: Any
    h: Any
    number: Any
    parts: int
    length: Any  # tokens before this one
    full: Any  # whether this one is the last before all keys move on
    beta: Any
    per_length: Any  # one over the length of w as it was given, or None

    @property
    def capacity(self):
        return self.refs.value.shape[1]

    def w(self, layout, at=slice(None)):
        """w, or its columns `at`."""
        x = _load(self.refs.w.at[self.b, self.h, at], layout)
        return x if self.per_length is None else x * self.per_length


def _body(refs, *, layouts, parts):
    b, number, h = (lax.axis_index(name) for name in ("b", "part", "h"))
    length, S = refs.length[b], refs.value.shape[1]
    full = (lax.rem(length + 1, jnp.int32(RECENT)) == 0) & (length < S)
    beta, per_length = refs.beta[b, h].astype(f32), None
    if refs.b_bias is not None:
        beta = 2.0 * mosaic.sigmoid(beta + refs.b_bias[h])
        given = _load(refs.w.at[b, h], layouts.maps.reduce(1))
        per_length = token.length_inverse(given)
    part = Part(refs, layouts, b, h, number, parts, length, full, beta, per_length)
    pl.when(number == 0)(lambda: store_value(part))
    move_recent(part)
    move_maps(part)
    plgpu.wait_smem_to_gmem(0)


def store_value(part):
    """The token's value, to its place; and all others, if the new values are other memory."""
    refs, (b, h) = part.refs, (part.b, part.h)

    def put(source, place):
        fetch(dict(v=(source, refs.row)), refs.loaded)
        plgpu.barrier_wait(refs.loaded)
        plgpu.copy_smem_to_gmem(refs.row, refs.new_value.at[b, pl.ds(place, 1), h])
        plgpu.wait_smem_to_gmem(0)

    def copy_rest():
        def one(place, carry):
            pl.when(place != part.length)(lambda: put(refs.value.at[b, pl.ds(place, 1), h], place))
            return carry

        lax.fori_loop(0, part.capacity, one, None)

    pools.unless_same_memory(refs.value, refs.new_value, copy_rest)
    pl.when(part.length < part.capacity)(lambda: put(refs.v.at[b, pl.ds(h, 1)], part.length))


def move_recent(part):
    """The part's recent keys after the token."""
    refs, (b, h), layout = part.refs, (part.b, part.h), part.layouts.keys
    rows, K = RECENT // part.parts, refs.k.shape[-1]
    by_row, by_column = layout.reduce(1), layout.reduce(0)
    at = b, pl.ds(part.number * rows, rows), h
    first = lax.div(jnp.minimum(part.length, part.capacity), jnp.int32(RECENT)) * RECENT
    iota = plgpu.broadcasted_iota(jnp.int32, (rows,), 0, layout=by_row)
    place = per_row(first + part.number * rows + iota, K)
    w = per_column(part.w(by_column), rows)
    k = per_column(_load(refs.k.at[b, h], by_column), rows)
    # Behind the last token may be anything, and 0 times it is not always 0.
    keys = jnp.where(place < part.length, _load(refs.recent.at[*at], layout), 0.0)
    overlap = part.beta * jnp.sum(keys * w, axis=1)
    keys = jnp.where(place == part.length, k, keys - per_row(overlap, K) * w)
    _put(part, refs.new_recent.at[*at], refs.all_recent.at[*at], keys)


def move_maps(part):
    """The part's columns of the maps after the token, and of the queries for the settled keys."""
    refs, (b, h), layout = part.refs, (part.b, part.h), part.layouts.maps
    K = refs.k.shape[-1]
    width, group = K // part.parts, refs.q.shape[1] // refs.k.shape[1]
    by_row, by_column = layout.reduce(1), layout.reduce(0)
    columns = pl.ds(part.number * width, width)
    beta, w = part.beta, part.w(by_row)
    change = _load(refs.change.at[b, h, :, columns], layout)

    def through(vector, own):
        """vector^T (I + D), in the part's columns; `own` is the vector there."""
        return own + jnp.sum(change * per_row(vector, width), axis=0)

    written = through(w, part.w(by_column, columns))
    for j in range(group):
        head = h * group + j
        query = _load(refs.q.at[b, head], by_row)
        overlap = beta * jnp.sum(query * w)
        own = _load(refs.q.at[b, head, columns], by_column)
        back = through(query, own) - overlap * written
        mosaic.store(refs.back.at[b, head, columns], back)
    new = change - per_row(beta * w, width) * per_column(written, K)
    at = b, h, slice(None), columns
    _put(part, refs.new_change.at[*at], refs.all_change.at[*at], new)


def _put(part, ref, ref_of_all, x):
    """Stores what begins anew with the token that is the last before all keys move on."""
    pl.when(part.full)(lambda: mosaic.store(ref_of_all, x))
    kept = jnp.where(jnp.broadcast_to(part.full, x.shape), 0.0, x)
    mosaic.store(ref, kept)
