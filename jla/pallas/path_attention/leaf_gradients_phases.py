"""The phases of `leaf_gradients`: dq, dk, dw and dbeta of a leaf, by four warpgroups.

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

Nothing is divided by beta, and W W^T is not made. In the kernel M C = N (beta C) and
M W = N (beta W), with which

    E  = a (beta W)^T + dO (beta C)^T   dA = -lower(E N^T)
    F  = dU (beta W)^T + dC (beta C)^T  dS = -strict_lower(F N^T)
    Y  = (beta W) dH^T + (beta C) c     N Y = (M W) dH^T + (M C) c

A CTA is a leaf and a query head, with four warpgroups; `leaf_tiles` says which has what. They meet
at the start of each phase but the first: all have then written what is read in it, and read what is
overwritten. For each phase the table has what the regions of SMEM hold at its end.

    r     read, and the same as before       (K)   on its way between GMEM and SMEM
    .     the same as before

    phase        | w  beta_w  first  second  lower  other  inverse  beta_c | in registers
    -------------+---------------------------------------------------------+--------------------
    load_inputs  | (W)        (K)    (Q)            dO     -N_ii           | W, beta W, K, Q
    keep_inputs  | W  beta W  K      Q       .      .      .        .      |
    start_dq     | r  r       r      .       .      r      -N_10    beta C | dO K
    start_dk     | r  .       a      r       A      r      .        .      | dO^T Q, a + dO K
    make_e       | .  r       r      .       r      r      .        r      | A^T dO, A^T a, E
    keep_e       | .  .       (c)    .       .      E      .        .      |
    make_da      | .  .       (c)    .       dA     r      r        .      |
    finish_dq    | r  .       (c)    r       r      .      .        .      | dA^T Q, dQ
    send_dq      | .  .       c      (dH)    (dQ)   (dQ)   .        .      | c + dO^T Q
    make_xyz     | r  r       r      dH      (dQ)   (dQ)   .        r      | -Z, -X, Y
    keep_xyz     | .  .       -X     Y       -Z            .        .      |
    make_dc_du   | .  .       r      r       r      dC     r        .      | dA^T Q - N Y, dU
    keep_du      | .  .       dU     (K)     .      .      .        .      |
    make_f       | .  r       r      (K)     F      r      .        r      | K
    make_ds      | .  .       .      K       r      .      r        dS     |
    finish_dk_dw | r  r       (dK)   r       .      r      .        r      | dW
    send_dw      | .  .       (dK)   (dW)    .      .      .        .      |

c and dH belong to the keys: they count for one query head of a group.
"""

import dataclasses
import functools
from typing import Any

import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from jla.pallas.common.chunks import CHUNK
from jla.pallas.common.mosaic import PER_ROW, WGMMA_LAYOUT, f16, f32, load, per_row, product
from jla.pallas.path_attention import dyadic
from jla.pallas.path_attention.dyadic import LEAF
from jla.pallas.path_attention.leaf_tiles import (
    ROWS,
    along_features,
    fetch_tile,
    here,
    in_block,
    in_tile,
    lower_lower,
    lower_times,
    own_block,
    own_tile,
    packed,
    put,
    put_block,
    send_tile,
    tile_of,
    total,
    triangle,
    unpacked,
    upper_lower,
    upper_times,
    when_block,
    when_tile,
)


@dataclasses.dataclass(frozen=True)
class Leaf:
    """What is the same in all phases of a CTA, and in all its warpgroups but `wg`."""

    refs: Any
    b: Any
    head: Any  # the query head
    h: Any  # the head of keys and values
    number: Any
    wg: Any
    dh: Any  # the ref of dH
    query_place: Any  # of the first query version, or -1; see `levels`
    key_place: Any
    shrink: Any  # brings gradients to the leaf's unit
    grow: Any  # and back, with the scale
    ratio: Any  # brings dH to the leaf's unit
    once: Any  # 1 for the first query head of a group, 0 for the others

    @property
    def w(self):
        return self.refs.w_region.tiles

    @property
    def first(self):
        return self.refs.first.tiles

    @property
    def second(self):
        return self.refs.second.tiles

    @property
    def lower(self):
        return self.refs.triangles.lower_and_other[0]

    @property
    def other(self):
        return self.refs.triangles.lower_and_other[1]

    def here(self):
        return here(self.wg, self.refs.zeros, self.refs.beta_w.shape[0] // ROWS)

    def rows(self, row):
        """The tokens of a row of chunks."""
        return pl.ds(self.number * LEAF + row * CHUNK, CHUNK)


def _leaf(refs, group):
    """The CTA's leaf."""
    b, head, number, wg = (lax.axis_index(name) for name in ("b", "h", "leaf", "wg"))
    h, member = lax.div(head, jnp.int32(group)), lax.rem(head, jnp.int32(group))
    leaves = refs.beta.shape[2] // LEAF
    dh = refs.dh.at[b, h, dyadic.beside(number, leaves)]
    places = dyadic.first_query(number, leaves), dyadic.first_key(number, leaves)
    shrink, grow, ratio = (x[b, h, number] for x in (refs.shrink, refs.grow, refs.ratio))
    once = jnp.where(member == 0, 1.0, 0.0).astype(f32)
    return Leaf(refs, b, head, h, number, wg, dh, *places, shrink, grow, ratio, once)


def body(refs, *, group):
    """All phases. dq, dk and dw: the sum so far, in the leaf's unit until it is finished."""
    leaf = _leaf(refs, group)
    w, beta_w, k, q = load_inputs(leaf)
    keep_inputs(leaf, w, beta_w, k, q)
    dq = start_dq(leaf)
    dk, dq = start_dk(leaf, dq)
    of_z, of_x, e = make_e(leaf)
    keep_e(leaf, e)
    make_da(leaf)
    dw, dq = finish_dq(leaf, dq)
    dk = send_dq(leaf, dq, dk)
    minus_z, minus_x, y = make_xyz(leaf, of_z, of_x)
    keep_xyz(leaf, minus_x, y, minus_z)
    dw, du = make_dc_du(leaf, dw)
    keep_du(leaf, du)
    make_ds(leaf, make_f(leaf))
    dw = finish_dk_dw(leaf, du, dk, dw)
    send_dw(leaf, dw)


def meet(leaf):
    """Waits for the other warpgroups: what they wrote can be read. Returns the place, anew."""
    plgpu.commit_smem()
    plgpu.barrier_arrive(leaf.refs.shared)
    plgpu.barrier_wait(leaf.refs.shared)
    return leaf.here()


def load_inputs(leaf):
    """W, beta W, K, Q in registers, because they are converted; -N of the chunks, dO in SMEM."""
    refs = leaf.refs
    refs.zeros[leaf.wg] = jnp.int32(0)
    plgpu.commit_smem()
    at = leaf.here()
    for source, head, target in (
        (refs.w, leaf.h, refs.w_region.given),
        (refs.k, leaf.h, refs.first.k),
        (refs.q, leaf.head, refs.second.q),
    ):
        fetch_tile(at, _tokens(leaf, at, source, head), target, refs.loaded)

    @pl.when(at.row == at.column)
    def _():
        source = refs.inverses.at[leaf.b, leaf.h, 2 * leaf.number + at.row]
        plgpu.copy_gmem_to_smem(source, refs.inverse.at[2 * at.row], refs.loaded)

    @functools.partial(when_block, at)
    def _():
        source = refs.own.at[leaf.b, leaf.head, leaf.number, at.row + at.column]
        plgpu.copy_gmem_to_smem(source, own_block(at, leaf.other), refs.loaded)

    strength = _strength(leaf, at)
    plgpu.barrier_wait(refs.loaded)
    given = load(own_tile(at, refs.w_region.given))
    beta_w = packed(given * per_row(strength, CHUNK))
    w = packed(given)
    k, q = (packed(load(own_tile(at, x))) for x in (refs.first.k, refs.second.q))

    @pl.when(at.row == at.column)
    def _():
        refs.inverse.at[2 * at.row][...] = packed(-load(refs.inverse.at[2 * at.row]))

    @functools.partial(when_block, at)
    def _():
        own_block(at, leaf.other)[...] = packed(load(own_block(at, leaf.other)) * leaf.shrink)

    return w, beta_w, k, q


def keep_inputs(leaf, w, beta_w, k, q):
    """W, beta W, K and Q to SMEM, as float16."""
    at = meet(leaf)
    put(at, leaf.w, w)
    put(at, leaf.refs.beta_w, beta_w)
    put(at, leaf.first, k)
    put(at, leaf.second, q)


def start_dq(leaf):
    """beta C = strict_lower((beta W) K^T), -N's block between the chunks; returns dO K."""
    at = meet(leaf)
    beta_w, inverse, beta_c = leaf.refs.beta_w, leaf.refs.inverse, leaf.refs.beta_c

    @functools.partial(when_block, at)
    def _():
        x = product(*along_features(beta_w, at.row, leaf.first, at.column))
        own_block(at, beta_c)[...] = packed(triangle(x, at, strict=True))

    # N_10 = -N_11 (beta W)_1 W_0^T N_00, by the warpgroup that has no block.
    @pl.when(at.column > at.row)
    def _():
        x = product(*along_features(beta_w, 1, leaf.w, 0)).astype(f16)
        inverse.at[1][...] = product((x, inverse.at[0])).astype(f16)
        plgpu.commit_smem()
        x = product((inverse.at[2], inverse.at[1])).astype(f16)
        plgpu.commit_smem()  # all warps have read it
        inverse.at[1][...] = x

    return packed(total(lower_times(leaf.other, leaf.first, at)))


def start_dk(leaf, dq):
    """A = lower(Q W^T); returns dO^T Q, and dq + a."""
    at, refs = meet(leaf), leaf.refs
    source = _versions(leaf, at, refs.a, leaf.head, leaf.query_place)
    fetch_tile(at, source, leaf.first, refs.a_loaded)

    @functools.partial(when_block, at)
    def _():
        x = product(*along_features(leaf.second, at.row, leaf.w, at.column))
        own_block(at, leaf.lower)[...] = packed(triangle(x, at))

    dk = packed(total(upper_times(leaf.other, leaf.second, at)))
    plgpu.barrier_wait(refs.a_loaded)
    place = leaf.query_place
    return dk, _rescaled(leaf, at, place, refs.a_factors, leaf.head, leaf.shrink, dq)


def make_e(leaf):
    """Returns A^T dO, A^T a and E = a (beta W)^T + dO (beta C)^T."""
    at = meet(leaf)
    of_z = in_block(at, lambda: total(upper_lower(leaf.lower, leaf.other, at)))
    of_x = packed(total(upper_times(leaf.lower, leaf.first, at)))
    return of_z, of_x, in_block(at, lambda: _by_beta(leaf, at, leaf.first, leaf.other))


def keep_e(leaf, e):
    """E to SMEM; c is on its way."""
    at, refs = meet(leaf), leaf.refs
    source = _versions(leaf, at, refs.c, leaf.h, leaf.key_place)
    fetch_tile(at, source, leaf.first, refs.c_loaded)
    put_block(at, leaf.other, e)


def make_da(leaf):
    """dA = -lower(E N^T)."""
    at = meet(leaf)
    when_block(at, lambda: put_block(at, leaf.lower, _by_inverse(leaf, at, leaf.other)))


def finish_dq(leaf, dq):
    """Returns dA^T Q, and dQ = (a + dO K) + dA W, scaled."""
    at = meet(leaf)
    dw = packed(total(upper_times(leaf.lower, leaf.second, at)))
    dq = total(lower_times(leaf.lower, leaf.w, at), init=unpacked(dq))
    return dw, lax.optimization_barrier((dq * leaf.grow).astype(leaf.refs.dq.dtype))


def send_dq(leaf, dq, dk):
    """Sends dQ; returns dk + c. dH is on its way."""
    at, refs = meet(leaf), leaf.refs
    k_tiles = at.k_tiles

    @pl.when(jnp.maximum(at.row, at.column) < k_tiles)
    def _():
        block = pl.ds(at.row * CHUNK, CHUNK), pl.ds(at.column * CHUNK, CHUNK)
        target = tile_of(leaf.second, at.row, at.column)
        plgpu.copy_gmem_to_smem(leaf.dh.at[*block], target, refs.dh_loaded)

    send_tile(at, dq, refs.triangles.out, _tokens(leaf, at, refs.dq, leaf.head))
    plgpu.barrier_wait(refs.c_loaded)
    place, more = leaf.key_place, leaf.shrink * leaf.once
    return _rescaled(leaf, at, place, refs.c_factors, leaf.h, more, dk)


def make_xyz(leaf, of_z, of_x):
    """Returns -Z = A^T dO + W c^T, -X = A^T a + W dH and Y = (beta W) dH^T + (beta C) c."""
    at, refs = meet(leaf), leaf.refs
    row, features = at.row, at.features
    minus_z = in_block(
        at, lambda: product(*along_features(leaf.w, row, leaf.first, at.column)) + unpacked(of_z)
    )
    plgpu.barrier_wait(refs.dh_loaded)
    tiles = range(at.k_tiles)
    dh = [(tile_of(leaf.second, i, features), tile_of(leaf.second, features, i).T) for i in tiles]
    y = product(*((tile_of(refs.beta_w, row, i), right) for i, (_, right) in enumerate(dh)))
    y *= leaf.ratio * leaf.once
    y = packed(total(lower_times(refs.beta_c, leaf.first, at), init=y))
    moved = product(*((tile_of(leaf.w, row, i), right) for i, (right, _) in enumerate(dh)))
    minus_x = packed(moved * (leaf.ratio * leaf.once) + unpacked(of_x))
    plgpu.wait_smem_to_gmem(0, wait_read_only=True)
    return minus_z, minus_x, y


def keep_xyz(leaf, minus_x, y, minus_z):
    """-X, Y and -Z to SMEM, over dQ, which has been read."""
    at = meet(leaf)
    put_block(at, leaf.lower, minus_z)
    put(at, leaf.first, minus_x)
    put(at, leaf.second, y)


def make_dc_du(leaf, dw):
    """dC = strict_lower(N^T Z); returns dw - N Y, and dU = N^T X."""
    at = meet(leaf)
    inverse = leaf.refs.inverse
    dw = packed(total(lower_times(inverse, leaf.second, at), init=unpacked(dw)))

    @functools.partial(when_block, at)
    def _():
        x = total(upper_lower(inverse, leaf.lower, at))
        own_block(at, leaf.other)[...] = packed(triangle(x, at, strict=True))

    return dw, packed(total(upper_times(inverse, leaf.first, at)))


def keep_du(leaf, du):
    """dU to SMEM; the keys are on their way, once more."""
    at, refs = meet(leaf), leaf.refs
    fetch_tile(at, _tokens(leaf, at, refs.k, leaf.h), refs.second.k, refs.k_loaded_again)
    put(at, leaf.first, du)


def make_f(leaf):
    """F = dU (beta W)^T + dC (beta C)^T; returns K."""
    at, refs = meet(leaf), leaf.refs
    when_block(
        at,
        lambda: put_block(at, leaf.lower, packed(_by_beta(leaf, at, leaf.first, leaf.other))),
    )
    plgpu.barrier_wait(refs.k_loaded_again)
    return packed(load(own_tile(at, refs.second.k)))


def make_ds(leaf, k):
    """dS = -strict_lower(F N^T); K to SMEM."""
    at = meet(leaf)
    put(at, leaf.second, k)
    ds = functools.partial(_by_inverse, leaf, at, leaf.lower, strict=True)
    when_block(at, lambda: put_block(at, leaf.refs.beta_c, ds()))


def finish_dk_dw(leaf, du, dk, dw):
    """J = dC K + dU + dS W; dbeta = rowsum(W J); sends dk + (beta dC)^T W.

    Returns dW = dw + beta J + (beta dS)^T W, scaled.
    """
    at, refs = meet(leaf), leaf.refs
    ds, dc = refs.beta_c, leaf.other
    j = total(lower_times(dc, leaf.second, at), init=unpacked(du))
    j = total(lower_times(ds, leaf.w, at), init=j)
    strength = _strength(leaf, at)
    dbeta = (load(own_tile(at, leaf.w)) * j).sum(axis=1) * leaf.grow

    @functools.partial(when_tile, at)
    def _():
        refs.dbeta.at[leaf.b, leaf.head, at.features, leaf.rows(at.row)][...] = dbeta

    dw = j * per_row(strength, CHUNK) + unpacked(dw)
    dw = total(upper_times(ds, refs.beta_w, at), init=dw)
    dw = lax.optimization_barrier((dw * leaf.grow).astype(refs.dw.dtype))
    dk = total(upper_times(dc, refs.beta_w, at), init=unpacked(dk))
    dk = (dk * leaf.grow).astype(refs.dk.dtype)
    send_tile(at, dk, refs.first.out, _tokens(leaf, at, refs.dk, leaf.head))
    return dw


def send_dw(leaf, dw):
    """Sends dW."""
    at, refs = meet(leaf), leaf.refs
    send_tile(at, dw, refs.second.out, _tokens(leaf, at, refs.dw, leaf.head))
    plgpu.wait_smem_to_gmem(0, wait_read_only=True)


# What several phases do.


def _tokens(leaf, at, ref, head):
    """columns -> these columns of the warpgroup's tokens, in GMEM."""
    return lambda columns: ref.at[leaf.b, leaf.rows(at.row), head, columns]


def _version_rows(place, row):
    return pl.ds(jnp.maximum(place, 0) * LEAF + row * CHUNK, CHUNK)


def _versions(leaf, at, ref, head, place):
    """columns -> these columns of the warpgroup's part of a version, in GMEM."""
    return lambda columns: ref.at[leaf.b, head, _version_rows(place, at.row), columns]


def _strength(leaf, at):
    """beta of the warpgroup's tokens."""
    return load(leaf.refs.beta.at[leaf.b, leaf.h, leaf.rows(at.row)], PER_ROW, optimized=False)


def _rescaled(leaf, at, place, factors, head, more, added):
    """Brings a version's gradient, in region `first`, to the leaf's unit; returns it plus `added`.

    Zero where the leaf has no version.
    """
    rows = _version_rows(place, at.row)
    factor = load(factors.at[leaf.b, head, rows], PER_ROW, optimized=False)
    # No read of a tile that another warpgroup changes.
    x = in_tile(at, lambda: plgpu.load(own_tile(at, leaf.first), layout=WGMMA_LAYOUT)).astype(f32)
    x *= per_row(factor * more, CHUNK)
    present = jnp.broadcast_to(place >= 0, x.shape)
    x = lax.optimization_barrier(jnp.where(present, x, 0.0))
    put(at, leaf.first, packed(x))
    return packed(x + unpacked(added))


def _by_beta(leaf, at, x, d):
    """The block of x (beta W)^T + d (beta C)^T, for x of features and a triangle d."""
    of_w = product(*along_features(x, at.row, leaf.refs.beta_w, at.column))
    return total(lower_lower(d, leaf.refs.beta_c, at), init=of_w)


def _by_inverse(leaf, at, d, *, strict=False):
    """The block of -lower(d N^T), or -strict_lower, for a triangle d."""
    x = total(lower_lower(d, leaf.refs.inverse, at))
    return packed(triangle(x, at, strict=strict))
