"""The backward pass of `forward` by leaves of queries; see `backward`.

A CTA is a leaf of queries: two warpgroups of 64 that compute, and one that loads; in the order of
`forward`'s. With u for `unit`:

    own logits   p = exp2(own - lse);      ds = u p (do v^T - delta), which is stored
    each level   dq <- dq H^T              from the level above to this one's queries
                 p = exp2(logits - lse);   ds = u p (do v^T - delta);   dq += ds k

The leaf's own keys come first; then, level by level from the top, the left sibling's keys and
values in tiles of 128.

    phase        | reads, and who loads it (else it is in GMEM)         | writes
    -------------+------------------------------------------------------+----------------------
    own_logits   | sdo: do, sv: v: load_all; own, tops, lse, delta      | down, in own's place
    move         | sk: H: load_level                                    | dq
    tile         | sq: q, squery_gates: load_queries; sdo: do: load_all | dq, sums
                 | sk: k, skey_gates: load_keys; sv: v: load_values     |
    send_queries |                                                      | sq: dq; factors, sums

sq, sk and sv are rings, see `rings`: a tile is overwritten when it has been read or sent. dq stays
in registers from level to level. There is no room for 2 KB more of SMEM, so that the sums of ds for
the queries' gates are made in parts, each in the registers of one thread.
"""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from jla.pallas.common import mosaic, scratch
from jla.pallas.common.mosaic import (
    PER_COLUMN,
    PER_ROW,
    WGMMA_LAYOUT,
    f16,
    f32,
    load,
    per_column,
    per_row,
    product,
    product_beside,
)
from jla.pallas.common.scratch import barrier_for, fetch
from jla.pallas.path_attention import dyadic, rings
from jla.pallas.path_attention.backward import load_rows, normalised
from jla.pallas.path_attention.dyadic import LEAF
from jla.pallas.path_attention.forward import own_exp2
from jla.pallas.path_attention.query_leaves import (
    COMPUTE_REGISTERS,
    LOADER_REGISTERS,
    ROWS,
    key_head,
    leaf_of,
    load_keys,
    load_queries,
    load_values,
)

SDS = jax.ShapeDtypeStruct
KEY_STAGES = 2  # tiles of 128 keys and values in SMEM
PARTS = 8  # of a sum along rows, each in the registers of one thread


def query_gradients(q, k, v, own, gates, do, lse, delta, unit, transforms, after, *, scale):
    """The gradients of queries, of their gates, and of the leaves' own logits.

    Args:
      q, k, v, own, gates: as `forward.forward` takes them.
      do: [B, T, HQ, V] bf16.
      lse, delta: the log-sum-exp and the sum of do o, [B, HQ, 128 P] float32.
      unit: [B, H] float32, with which no ds leaves float16's range.
      transforms: H of all blocks [B, H, blocks, K, K] float16, see `dyadic.block_counts`.
      after: an array that is not read: a result of the last other kernel that reads own, so that
        XLA knows that own may be overwritten.

    Returns:
      unit * dq in two parts, [B, HQ, R, K] float16 and [B, HQ, R] float32; unit * (ds of the own
      logits), [B, HQ, P, 3, 64, 64] float16, in the memory of own, and its rows' largest elements
      [B, HQ, 128 P] float32; and, with gates (or None), unit * (the sums of ds over each eighth
      key) [B, HQ, R, 8] float32; ds without scale.

    SMEM at K=V=128: queries 64 KB (this level's and the next's), do 32 KB, keys and values 128 KB.
    """
    (B, _, H, V), (HQ, P), K = v.shape, own[0].shape[1:3], q.shape[-1]
    query_gates, key_gates = (None, None) if gates is None else gates
    gated = gates is not None
    q_loaded, q_used = rings.barriers(dict(q=2, gates=2 * gated), 2)
    k_loaded, k_used = rings.barriers(dict(k=1, gates=gated), KEY_STAGES)
    v_loaded, v_used = rings.barriers(["v"], KEY_STAGES)
    out = scratch.kernel(
        functools.partial(_body, group=HQ // H, scale=scale),
        inputs=dict(
            q=q,
            k=k,
            v=v,
            own=own[0],
            tops=own[1],
            do=do,
            lse=lse,
            delta=delta,
            unit=unit,
            query_gates=query_gates,
            key_gates=key_gates,
            transforms=transforms,
            after=after,
        ),
        outputs=dict(
            dq=SDS(q.shape, f16),
            factors=SDS(q.shape[:-1], f32),
            down=SDS(own[0].shape, f16),
            largest=SDS((B, HQ, P * LEAF), f32),
            sums=SDS((*query_gates.shape, PARTS), f32) if gated else None,
        ),
        scratch=dict(
            sq=mosaic.tile(ROWS, K, 2, 2, dtype=f16),
            sk=mosaic.tile(LEAF, K, KEY_STAGES, dtype=f16),
            sv=mosaic.tile(LEAF, V, KEY_STAGES),
            sdo=mosaic.tile(ROWS, V, 2),
            squery_gates=plgpu.SMEM((2, 2, ROWS), f32) if gated else None,
            skey_gates=plgpu.SMEM((KEY_STAGES, LEAF), f32) if gated else None,
            q_loaded=q_loaded,
            k_loaded=k_loaded,
            v_loaded=v_loaded,
            do_loaded=barrier_for(dict(do=2)),
            q_used=q_used,
            k_used=k_used,
            v_used=v_used,
        ),
        in_place=dict(own="down"),
        reductions_cross_warps=False,
        grid=(B, P, HQ),
        grid_names=("b", "leaf", "h"),
        num_threads=3,
        thread_name="wg",
    )
    return out.dq, out.factors, out.down, out.largest, out.sums


class Done(NamedTuple):
    """How many tiles have passed through each ring."""

    keys: Any
    values: Any
    queries: Any


class Level(NamedTuple):
    """A level: whether the leaf's queries see keys there."""

    m: Any
    right: Any  # 1 or 0: whether the leaf is in the right half, and sees the left one
    moved: Any  # 1 or 0: whether, then, dq comes from a level above


class Own(NamedTuple):
    """What a warpgroup keeps of its 64 queries, PER_ROW, and the head's unit."""

    lse: Any
    delta: Any  # in the unit
    unit: Any


def _start():
    """Before the first level: the leaf's own values have passed."""
    return Done(keys=jnp.int32(0), values=jnp.int32(1), queries=jnp.int32(0))


def _level(leaf, i, done):
    """The i-th level from the top."""
    m = leaf.levels - 1 - i
    right = dyadic.at_bit(leaf.number, m)
    return Level(m, right, right * jnp.minimum(done.queries, 1))


def _after(done, level, tiles):
    """What has passed after a level of so many tiles of keys."""
    keys = done.keys + level.moved + tiles
    return Done(keys, done.values + tiles, done.queries + level.right)


def _body(refs, *, group, scale):
    leaf = leaf_of(refs, scale)
    h = key_head(leaf, group)
    pl.when(leaf.wg == 2)(lambda: load_all(leaf, h))
    pl.when(leaf.wg < 2)(lambda: compute(leaf, h))


# The loader.


def load_all(leaf, h):
    """All loads, in the order in which the other warpgroups wait for them."""
    plgpu.set_max_registers(LOADER_REGISTERS, action="decrease")
    refs = leaf.refs
    for half in range(2):
        do = refs.do.at[leaf.b, leaf.rows(half), leaf.head], refs.sdo.at[half]
        fetch(dict(do=do), refs.do_loaded, partial=True)
    load_values(leaf, h, leaf.number, jnp.int32(0))
    of_level = functools.partial(load_level, leaf, h)
    done = lax.fori_loop(0, leaf.levels, of_level, _start())
    leaf.keys.drain(done.keys)
    leaf.values.drain(done.values)
    leaf.queries.drain(done.queries)


def load_level(leaf, h, i, done):
    """The leaf's queries; H of the left sibling as if it were keys; its keys and values."""
    refs, level = leaf.refs, _level(leaf, i, done)
    m = level.m
    rows = functools.partial(leaf.version_rows, m)
    pl.when(level.right == 1)(lambda: load_queries(leaf, rows, leaf.queries.free(done.queries)))
    sibling = dyadic.block(leaf.number, m)
    first = dyadic.offset(dyadic.key_counts(leaf.leaves), m) + lax.shift_left(sibling, m)

    @pl.when(level.moved == 1)
    def _():
        slot = leaf.keys.free(done.keys)
        block = dyadic.offset(dyadic.block_counts(leaf.leaves), m) + 2 * sibling
        target = refs.sk.at[slot, pl.ds(0, refs.sk.shape[-1])]
        load_rows(refs.transforms.at[leaf.b, h, block], 0, target, refs.k_loaded.at[slot])

    def load_tile(i, _):
        load_keys(leaf, h, first, i, done.keys + level.moved + i)
        load_values(leaf, h, lax.shift_left(sibling, m + 1) + i, done.values + i)

    tiles = lax.shift_left(level.right, m)
    lax.fori_loop(0, tiles, load_tile, None)
    return _after(done, level, tiles)


# The warpgroups that compute, each on its 64 queries.


def compute(leaf, h):
    """ds of the leaf's own logits, then dq of all levels."""
    plgpu.set_max_registers(COMPUTE_REGISTERS, action="increase")
    own = own_logits(leaf, h)
    dq = plgpu.layout_cast(jnp.zeros((ROWS, leaf.refs.sq.shape[-1]), f32), WGMMA_LAYOUT)
    of_level = functools.partial(compute_level, leaf, own)
    lax.fori_loop(0, leaf.levels, of_level, (dq, _start()))


def own_logits(leaf, h):
    """Stores ds of the leaf's own logits and its rows' largest elements; returns `Own`."""
    refs, rows = leaf.refs, leaf.rows(leaf.wg)
    at = leaf.b, leaf.head, rows
    unit = refs.unit[leaf.b, h]
    lse = load(refs.lse.at[*at], PER_ROW, optimized=False)
    delta = load(refs.delta.at[*at], PER_ROW, optimized=False) * unit
    of_leaf = leaf.b, leaf.head, leaf.number
    p = own_exp2(refs.own.at[*of_leaf], refs.tops.at[*of_leaf], leaf.wg, lse)
    plgpu.barrier_wait(refs.do_loaded)
    leaf.values.wait(0)
    dp = product((refs.sdo.at[leaf.wg], refs.sv.at[0].T))
    leaf.values.hand_back(0)
    ds = p * (dp * unit - per_row(delta, LEAF))
    refs.largest.at[*at][...] = jnp.abs(ds).max(axis=1)
    down = ds.astype(f16)
    mosaic.store(refs.down.at[*of_leaf, leaf.wg], down[:, :ROWS])

    @pl.when(leaf.wg == 1)
    def _():
        mosaic.store(refs.down.at[*of_leaf, 2], down[:, ROWS:])

    return Own(lse, delta, unit)


def compute_level(leaf, own, i, carry):
    """What the left sibling's keys of the i-th level from the top add to dq."""
    dq, done = carry
    level = _level(leaf, i, done)
    version = leaf.queries.slot(done.queries)
    pl.when(level.right == 1)(lambda: leaf.queries.wait(version))
    dq = lax.fori_loop(0, level.moved, lambda _, dq: move(leaf, done.keys, dq), dq)
    sums = plgpu.layout_cast(jnp.zeros((ROWS, PARTS), f32), WGMMA_LAYOUT)
    tiles = lax.shift_left(level.right, level.m)
    of_tile = functools.partial(tile, leaf, own, version, level, done)
    dq, sums = lax.fori_loop(0, tiles, of_tile, (dq, sums))
    pl.when(level.right == 1)(lambda: send_queries(leaf, level.m, version, dq, sums))
    return dq, _after(done, level, tiles)


def move(leaf, n, dq):
    """dq H^T, with H as tile n of the keys."""
    slot, width = leaf.keys.slot(n), dq.shape[1]
    small, factor = normalised(dq)
    leaf.keys.wait(slot)
    h = leaf.refs.sk.at[slot, pl.ds(0, width)]
    moved = product((small, h.T)) * per_row(factor, width)
    leaf.keys.hand_back(slot)
    return moved


def tile(leaf, own, version, level, done, i, carry):
    """ds = unit p (do v^T - delta) and dq += ds k, for the i-th 128 keys of a level.

    Args:
      version: the slot of the level's queries.
      carry: dq and, in parts, the sums of ds.
    """
    refs = leaf.refs
    dq, sums = carry
    key_slot = leaf.keys.slot(done.keys + level.moved + i)
    slot = leaf.values.slot(done.values + i)
    leaf.keys.wait(key_slot)
    s = product((refs.sq.at[version, leaf.wg], refs.sk.at[key_slot].T)) * leaf.scale
    if refs.skey_gates is not None:
        s += per_column(load(refs.skey_gates.at[key_slot], PER_COLUMN), ROWS)
        by_query = load(refs.squery_gates.at[version, leaf.wg], PER_ROW) - own.lse
    else:
        by_query = -own.lse
    leaf.values.wait(slot)
    dp, p = product_beside(
        (refs.sdo.at[leaf.wg], refs.sv.at[slot].T), lambda: jnp.exp2(s + per_row(by_query, LEAF))
    )
    leaf.values.hand_back(slot)
    ds = p * (dp * own.unit - per_row(own.delta, LEAF))
    if refs.skey_gates is not None:
        sums += _folded(ds)
    dq = product((ds.astype(f16), refs.sk.at[key_slot]), init=dq)
    leaf.keys.hand_back(key_slot)
    return dq, sums


def send_queries(leaf, m, version, dq, sums):
    """dq of level m, in two parts, the first by way of its queries' tile; and the sums of ds."""
    refs, at = leaf.refs, (leaf.b, leaf.head, leaf.version_rows(m, leaf.wg))
    small, factor = normalised(dq)
    refs.factors.at[*at][...] = factor
    staging = refs.sq.at[version, leaf.wg]
    staging[...] = small
    plgpu.commit_smem()
    plgpu.copy_smem_to_gmem(staging, refs.dq.at[*at])
    if refs.sums is not None:
        refs.sums.at[*at][...] = sums
    plgpu.wait_smem_to_gmem(0, wait_read_only=True)
    leaf.queries.hand_back(version)


def _folded(x):
    """The sums of every eighth column of a tile."""
    while (width := x.shape[1] // 2) >= PARTS:
        x = x[:, :width] + x[:, width:]
    return x
