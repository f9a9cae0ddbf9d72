"""The backward pass of `forward` by leaves of keys; see `backward`.

A CTA is a leaf of keys: two warpgroups of 64 that compute, and one that loads. With u for `unit`:

    own logits   p^T = exp2(own - lse)^T;      dv += p^T do
    each level   dk <- dk H                    from the level above to this one's keys
                 p^T = exp2(logits - lse)^T;   dv += p^T do
                 ds^T = u p^T (v do^T - delta);   dk += ds^T q

The leaf's own queries pass first; then, level by level from the top, the right sibling's queries,
those of the head's query heads one after another, in tiles of 64.

    phase       | reads, and who loads it (else it is in GMEM)      | writes
    ------------+---------------------------------------------------+----------------
    own_tile    | sdo, lse_and_delta: load_gradients; own, tops     | dv
    move        | sq: H, 64 rows at a time: load_level              | dk
    tile        | sk: k, sq: q, sgates: load_level; sv: v: load_all | dk, dv, sums
                | sdo, lse_and_delta: load_gradients                |
    send_keys   |                                                   | sk: dk; factors
    send_values |                                                   | sv: dv

sq, sdo and sk are rings, see `rings`: a tile is overwritten when it has been read or sent. dv stays
in registers to the end, and dk from level to level.
"""

import dataclasses
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
    bf16,
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
from jla.pallas.path_attention.query_leaves import COMPUTE_REGISTERS, LOADER_REGISTERS, ROWS

SDS = jax.ShapeDtypeStruct
STAGES = 2  # tiles of 64 queries and outputs' gradients in SMEM


def key_gradients(q, k, v, own, gates, do, lse, delta, unit, transforms, *, scale):
    """The gradients of keys, values and the keys' gates.

    Args as `query_gradients` takes them.

    Returns:
      unit * dk in two parts, [B, H, S, K] float16 and [B, H, S] float32; dv [B, T, H, V] bf16; and
      with gates (or None) unit * (the sums of ds over the queries) [B, HQ, S] float32; ds without
      scale.

    SMEM at K=V=128: keys 64 KB (this level's and the next's), values 32 KB, queries and do 32 KB a
    stage.
    """
    (B, _, H, V), (HQ, P), K = v.shape, own[0].shape[1:3], q.shape[-1]
    query_gates, key_gates = (None, None) if gates is None else gates
    gated = gates is not None
    q_loaded, q_used = rings.barriers(["q", "gates"] if gated else ["q"], STAGES)
    do_loaded, do_used = rings.barriers(["do", "lse", "delta"], STAGES)
    k_loaded, k_used = rings.barriers(["first half", "second half"], 2)
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
        ),
        outputs=dict(
            dk=SDS(k.shape, f16),
            factors=SDS(k.shape[:-1], f32),
            dv=SDS(v.shape, bf16),
            sums=SDS(key_gates.shape, f32) if gated else None,
        ),
        scratch=dict(
            sq=mosaic.tile(ROWS, K, STAGES, dtype=f16),
            sdo=mosaic.tile(ROWS, V, STAGES),
            sk=mosaic.tile(ROWS, K, 2, 2, dtype=f16),
            sv=mosaic.tile(ROWS, V, 2),
            lse_and_delta=plgpu.SMEM((STAGES, 2, ROWS), f32),
            sgates=plgpu.SMEM((STAGES, ROWS), f32) if gated else None,
            q_loaded=q_loaded,
            do_loaded=do_loaded,
            k_loaded=k_loaded,
            v_loaded=barrier_for(["first half", "second half"]),
            q_used=q_used,
            do_used=do_used,
            k_used=k_used,
        ),
        grid=(B, P, H),
        grid_names=("b", "leaf", "h"),
        num_threads=3,
        thread_name="wg",
    )
    return out.dk, out.factors, out.dv, out.sums


@dataclasses.dataclass(frozen=True)
class Leaf:
    """A CTA's leaf of keys."""

    refs: Any
    b: Any
    h: Any  # the head of keys
    wg: Any  # computing: 0 or 1, the half of the leaf
    number: Any
    leaves: int  # of a row
    group: int  # query heads of a head of keys
    scale: float
    queries: rings.Ring
    gradients: rings.Ring
    keys: rings.Ring

    @property
    def parts(self):
        """Tiles of 64 rows of H."""
        return self.refs.sq.shape[-1] // ROWS

    def rows(self, half):
        """The tokens of one half of the leaf."""
        return pl.ds(self.number * LEAF + half * ROWS, ROWS)

    def version_rows(self, m, half):
        """The rows of one half of the leaf's keys at level m."""
        return dyadic.rows(dyadic.key_counts(self.leaves), self.number, m, half)


class Done(NamedTuple):
    """How many tiles have passed through each ring."""

    queries: Any
    gradients: Any
    keys: Any


class Level(NamedTuple):
    """A level: which leaves have queries for the leaf's keys."""

    m: Any
    first: Any  # leaf of the right sibling
    tiles: Any  # of 64 queries, in each query head; 0 if the leaf is a right half
    present: Any  # whether there are any: 1 or 0
    moved: Any  # whether, then, dk comes from a level above: 1 or 0


class Place(NamedTuple):
    """Where a query head's tiles are at a level."""

    version: Any  # the slot of the level's keys
    rows: Any  # of these keys and of their gates
    head: Any
    member: Any  # the head's number in its group
    tiles: Any  # of each head
    done: Any  # before the group's first tile


def _level(leaf, i, done):
    """The i-th level from the top."""
    m = dyadic.number(leaf.leaves) - 1 - i
    first = lax.shift_left(dyadic.block(leaf.number, m) * 2 + 1, m)
    count = jnp.clip(leaf.leaves - first, 0, lax.shift_left(jnp.int32(1), m))
    tiles = 2 * jnp.where(dyadic.at_bit(leaf.number, m) == 0, count, 0)
    present = jnp.minimum(tiles, 1)
    return Level(m, first, tiles, present, present * jnp.minimum(done.keys, 1))


def _after(leaf, done, level):
    """The tiles that have passed after a level, whose H has been counted already."""
    tiles = leaf.group * level.tiles
    return Done(done.queries + tiles, done.gradients + tiles, done.keys + level.present)


def _start(leaf):
    """The tiles that have passed before the first level: the leaf's own gradients."""
    return Done(jnp.int32(0), jnp.int32(2 * leaf.group), jnp.int32(0))


def _body(refs, *, group, scale):
    b, h, wg, number = (lax.axis_index(name) for name in ("b", "h", "wg", "leaf"))
    queries = rings.Ring(refs.q_loaded, refs.q_used)
    gradients = rings.Ring(refs.do_loaded, refs.do_used)
    keys = rings.Ring(refs.k_loaded, refs.k_used)
    leaves = refs.own.shape[2]
    leaf = Leaf(refs, b, h, wg, number, leaves, group, scale, queries, gradients, keys)
    pl.when(wg == 2)(lambda: load_all(leaf))
    pl.when(wg < 2)(lambda: compute(leaf))


# The loader.


def load_all(leaf):
    """All loads, in the order in which the other warpgroups wait for them."""
    plgpu.set_max_registers(LOADER_REGISTERS, action="decrease")
    refs = leaf.refs
    for half in range(2):
        v = refs.v.at[leaf.b, leaf.rows(half), leaf.h], refs.sv.at[half]
        fetch(dict(v=v), refs.v_loaded, partial=True)

    def load_own(n, _):
        head, half = leaf.h * leaf.group + lax.div(n, jnp.int32(2)), lax.rem(n, jnp.int32(2))
        load_gradients(leaf, head, leaf.number * LEAF + half * ROWS, n)

    lax.fori_loop(0, 2 * leaf.group, load_own, None)
    count = dyadic.number(leaf.leaves)
    done = lax.fori_loop(0, count, functools.partial(load_level, leaf), _start(leaf))
    leaf.queries.drain(done.queries)
    leaf.gradients.drain(done.gradients)
    leaf.keys.drain(done.keys)


def load_gradients(leaf, head, row, n):
    """do, lse and delta of 64 queries, as tile n."""
    refs, slot, rows = leaf.refs, leaf.gradients.free(n), pl.ds(row, ROWS)
    vectors = refs.lse_and_delta
    fetch(
        dict(
            do=(refs.do.at[leaf.b, rows, head], refs.sdo.at[slot]),
            lse=(refs.lse.at[leaf.b, head, rows], vectors.at[slot, 0]),
            delta=(refs.delta.at[leaf.b, head, rows], vectors.at[slot, 1]),
        ),
        refs.do_loaded.at[slot],
    )


def load_level(leaf, i, done):
    """The leaf's keys, H of the right sibling as if it were queries, and the sibling's queries."""
    refs, level = leaf.refs, _level(leaf, i, done)
    m, at = level.m, dyadic.block(leaf.number, level.m)
    place = dyadic.offset(dyadic.query_counts(leaf.leaves), m) + lax.shift_left(at, m)

    @pl.when(level.present == 1)
    def _():
        slot = leaf.keys.free(done.keys)
        for half in range(2):
            k = refs.k.at[leaf.b, leaf.h, leaf.version_rows(m, half)], refs.sk.at[slot, half]
            fetch(dict(k=k), refs.k_loaded.at[slot], partial=True)

    @pl.when(level.moved == 1)
    def _():
        sibling = dyadic.offset(dyadic.block_counts(leaf.leaves), m) + 2 * at + 1
        for part in range(leaf.parts):
            slot = leaf.queries.free(done.queries + part)
            source = refs.transforms.at[leaf.b, leaf.h, sibling]
            load_rows(source, part * ROWS, refs.sq.at[slot], refs.q_loaded.at[slot])

    done = done._replace(queries=done.queries + level.moved * leaf.parts)

    def of_head(member, _):
        head = leaf.h * leaf.group + member

        def load_queries(i, _):
            slot = leaf.queries.free(done.queries + member * level.tiles + i)
            rows = pl.ds(place * LEAF + i * ROWS, ROWS)
            loads = dict(q=(refs.q.at[leaf.b, head, rows], refs.sq.at[slot]))
            if refs.query_gates is not None:
                loads |= dict(gates=(refs.query_gates.at[leaf.b, head, rows], refs.sgates.at[slot]))
            fetch(loads, refs.q_loaded.at[slot])
            row = level.first * LEAF + i * ROWS
            load_gradients(leaf, head, row, done.gradients + member * level.tiles + i)

        lax.fori_loop(0, level.tiles, load_queries, None)

    lax.fori_loop(0, leaf.group, of_head, None)
    return _after(leaf, done, level)


# The warpgroups that compute, each on its 64 keys.


def compute(leaf):
    """dk of all levels, and dv."""
    plgpu.set_max_registers(COMPUTE_REGISTERS, action="increase")
    refs = leaf.refs
    unit = refs.unit[leaf.b, leaf.h]
    plgpu.barrier_wait(refs.v_loaded)
    dv = plgpu.layout_cast(jnp.zeros((ROWS, refs.sv.shape[-1]), f32), WGMMA_LAYOUT)
    dv = lax.fori_loop(0, 2 * leaf.group, functools.partial(own_tile, leaf), dv)
    dk = plgpu.layout_cast(jnp.zeros((ROWS, refs.sk.shape[-1]), f32), WGMMA_LAYOUT)
    of_level = functools.partial(compute_level, leaf, unit)
    start = dk, dv, _start(leaf)
    _, dv, _ = lax.fori_loop(0, dyadic.number(leaf.leaves), of_level, start)
    send_values(leaf, dv)


def own_tile(leaf, n, dv):
    """dv += p^T do, for a tile of the leaf's own queries."""
    refs = leaf.refs
    head, half = leaf.h * leaf.group + lax.div(n, jnp.int32(2)), lax.rem(n, jnp.int32(2))
    slot, at = leaf.gradients.slot(n), (leaf.b, head, leaf.number, half + leaf.wg)
    leaf.gradients.wait(slot)

    def block(_, dv):
        by_query = load(refs.tops.at[*at], PER_COLUMN, optimized=False)
        by_query -= load(refs.lse_and_delta.at[slot, 0], PER_COLUMN)
        logits = mosaic.load_transposed(refs.own.at[*at])
        p = jnp.exp2(logits + per_column(by_query, ROWS)).astype(bf16)
        return product((p, refs.sdo.at[slot]), init=dv)

    # The first chunk's queries do not see the second's keys.
    dv = lax.fori_loop(0, jnp.where(half >= leaf.wg, 1, 0), block, dv)
    leaf.gradients.hand_back(slot)
    return dv


def compute_level(leaf, unit, i, carry):
    """What the right sibling's queries of the i-th level from the top add to dk and dv."""
    dk, dv, done = carry
    level, version = _level(leaf, i, done), leaf.keys.slot(done.keys)
    pl.when(level.present == 1)(lambda: leaf.keys.wait(version))
    rows = leaf.version_rows(level.m, leaf.wg)
    move_dk = functools.partial(move, leaf, done.queries)
    dk = lax.fori_loop(0, level.moved, lambda _, dk: move_dk(dk), dk)
    done = done._replace(queries=done.queries + level.moved * leaf.parts)

    def of_head(member, carry):
        head = leaf.h * leaf.group + member
        sums = plgpu.layout_cast(jnp.zeros((ROWS,), f32), PER_ROW)
        place = Place(version, rows, head, member, level.tiles, done)
        of_tile = functools.partial(tile, leaf, unit, place)
        dk, dv, sums = lax.fori_loop(0, level.tiles, of_tile, (*carry, sums))
        if leaf.refs.sums is not None:

            @pl.when(level.tiles > 0)
            def _():
                leaf.refs.sums.at[leaf.b, head, rows][...] = sums

        return dk, dv

    dk, dv = lax.fori_loop(0, leaf.group, of_head, (dk, dv))
    pl.when(level.present == 1)(lambda: send_keys(leaf, version, rows, dk))
    return dk, dv, _after(leaf, done, level)


def move(leaf, n, dk):
    """dk H, with H in the ring of queries from tile n on."""
    small, factor = normalised(dk)
    moved = None
    for part in range(leaf.parts):
        slot = leaf.queries.slot(n + part)
        leaf.queries.wait(slot)
        columns = small[:, part * ROWS : (part + 1) * ROWS]
        moved = product((columns, leaf.refs.sq.at[slot]), init=moved)
        leaf.queries.hand_back(slot)
    return moved * per_row(factor, dk.shape[1])


def tile(leaf, unit, place, i, carry):
    """dv += p^T do, ds^T = unit p^T (v do^T - delta) and dk += ds^T q, for 64 queries."""
    refs, version, done = leaf.refs, place.version, place.done
    dk, dv, sums = carry
    slot = leaf.queries.slot(done.queries + place.member * place.tiles + i)
    do_slot = leaf.gradients.slot(done.gradients + place.member * place.tiles + i)
    leaf.queries.wait(slot)
    s = product((refs.sk.at[version, leaf.wg], refs.sq.at[slot].T)) * leaf.scale
    leaf.gradients.wait(do_slot)
    vectors = refs.lse_and_delta.at[do_slot]
    by_query = -load(vectors.at[0], PER_COLUMN)
    if refs.sgates is not None:
        by_query += load(refs.sgates.at[slot], PER_COLUMN)
        by_key = load(refs.key_gates.at[leaf.b, place.head, place.rows], PER_ROW, optimized=False)
        s += per_row(by_key, ROWS)
    delta = per_column(load(vectors.at[1], PER_COLUMN) * unit, ROWS)
    dp, p = product_beside(
        (refs.sv.at[leaf.wg], refs.sdo.at[do_slot].T),
        lambda: jnp.exp2(s + per_column(by_query, ROWS)),
    )
    dv, ds = product_beside(
        (p.astype(bf16), refs.sdo.at[do_slot]), lambda: p * (dp * unit - delta), init=dv
    )
    leaf.gradients.hand_back(do_slot)
    if refs.sgates is not None:
        sums += ds.sum(axis=1)
    dk = product((ds.astype(f16), refs.sq.at[slot]), init=dk)
    leaf.queries.hand_back(slot)
    return dk, dv, sums


def send_keys(leaf, version, rows, dk):
    """dk of a level, in two parts, the first by way of its keys' tile."""
    refs = leaf.refs
    small, factor = normalised(dk)
    refs.factors.at[leaf.b, leaf.h, rows][...] = factor
    staging = refs.sk.at[version, leaf.wg]
    staging[...] = small
    plgpu.commit_smem()
    plgpu.copy_smem_to_gmem(staging, refs.dk.at[leaf.b, leaf.h, rows])
    plgpu.wait_smem_to_gmem(0, wait_read_only=True)
    leaf.keys.hand_back(version)


def send_values(leaf, dv):
    """dv, by way of its values' tile."""
    refs = leaf.refs
    staging = refs.sv.at[leaf.wg]
    staging[...] = dv.astype(bf16)
    plgpu.commit_smem()
    plgpu.copy_smem_to_gmem(staging, refs.dv.at[leaf.b, leaf.rows(leaf.wg), leaf.h])
    plgpu.wait_smem_to_gmem(0, wait_read_only=True)
