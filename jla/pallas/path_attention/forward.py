"""Softmax attention over the tree's levels: flash attention whose queries and keys change.

Each leaf of 128 queries attends to its own tokens, whose logits are given, and, level by level, to
the left sibling's keys:

    logits = scale q k^T + gates of the query + gates of the key      (base 2)
    top' = max(top, max(logits));   p = exp2(logits - top');   r = exp2(top - top')
    acc <- r acc + p v;   total <- r total + sum(p)
    o = acc / total;   log-sum-exp = top + log2(total)

A CTA is a leaf of queries: two warpgroups of 64 that compute, and one that loads. Leaf p has p
tiles of 128 keys, as in flash attention; heads are the fastest in launch order and long leaves come
first, so that what runs at one time shares its keys in L2.

    phase       | reads, and who loads it (else it is in GMEM)     | writes
    ------------+--------------------------------------------------+---------------------
    own_softmax | sv: v: load_all; own, tops                       | acc, top, total
    tile        | sq: q, squery_gates: load_queries                | acc, top, total
                | sk: k, skey_gates: load_keys; sv: v: load_values |
    send        |                                                  | slot 0 of sv: o; lse

sq, sk and sv are rings, see `rings`: a tile is overwritten when it has been read.
"""

import functools

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
)
from jla.pallas.path_attention import dyadic, rings
from jla.pallas.path_attention.dyadic import LEAF
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
STAGES = 2  # tiles of keys and values in SMEM


def forward(q, k, v, own, gates, *, scale):
    """Attention over the tree.

    Args:
      q: [B, HQ, R, K] float16, all levels' query versions; see `levels`.
      k: [B, H, S, K] float16, all levels' key versions.
      v: [B, T, H, V] bf16, T a multiple of 8.
      own: the leaves' own logits in two parts, as `leaf.leaves` returns them.
      gates: None, or the sums of the gates from the level's middle to each query, [B, HQ, R], and
        from each key to the middle, [B, HQ, S], float32, -inf allowed.
      scale: positive, base 2.

    Returns:
      o [B, T, HQ, V] bf16, and the logits' log-sum-exp in base 2, [B, HQ, 128 P] float32.

    SMEM at K=V=128: queries 64 KB (this level's and the next's), keys and values 128 KB.
    """
    (B, T, H, V), (HQ, P), K = v.shape, own[0].shape[1:3], q.shape[-1]
    query_gates, key_gates = (None, None) if gates is None else gates
    gated = gates is not None
    q_loaded, q_used = rings.barriers(dict(q=2, gates=2 * gated), 2)
    k_loaded, k_used = rings.barriers(dict(k=1, gates=gated), STAGES)
    v_loaded, v_used = rings.barriers(["v"], STAGES)
    both = plgpu.Barrier(num_arrivals=rings.COMPUTING)
    out = scratch.kernel(
        functools.partial(_body, group=HQ // H, scale=scale),
        inputs=dict(
            q=q, k=k, v=v, own=own[0], tops=own[1], query_gates=query_gates, key_gates=key_gates
        ),
        outputs=dict(o=SDS((B, T, HQ, V), bf16), lse=SDS((B, HQ, P * LEAF), f32)),
        scratch=dict(
            sq=mosaic.tile(ROWS, K, 2, 2, dtype=f16),
            sk=mosaic.tile(LEAF, K, STAGES, dtype=f16),
            sv=mosaic.tile(LEAF, V, STAGES),
            squery_gates=plgpu.SMEM((2, 2, ROWS), f32) if gated else None,
            skey_gates=plgpu.SMEM((STAGES, LEAF), f32) if gated else None,
            q_loaded=q_loaded,
            k_loaded=k_loaded,
            v_loaded=v_loaded,
            q_used=q_used,
            k_used=k_used,
            v_used=v_used,
            turn=both,
            done=both,
        ),
        grid=(B, P, HQ),
        grid_names=("b", "leaf", "h"),
        num_threads=3,
        thread_name="wg",
    )
    return tuple(out)


def _body(refs, *, group, scale):
    # Keys have the values' numbers, and there are none beside the leaf's own values, number 0.
    leaf = leaf_of(refs, scale, first_keys=1)
    pl.when(leaf.wg == 2)(lambda: load_all(leaf, group))
    pl.when(leaf.wg < 2)(lambda: compute(leaf))


# The loader.


def load_all(leaf, group):
    """All loads, in the order in which the other warpgroups wait for them."""
    plgpu.set_max_registers(LOADER_REGISTERS, action="decrease")
    h = key_head(leaf, group)
    load_values(leaf, h, leaf.number, jnp.int32(0))
    of_level = functools.partial(load_level, leaf, h)
    n, versions = lax.fori_loop(0, leaf.levels, of_level, (jnp.int32(1), jnp.int32(0)))
    leaf.keys.drain(n)
    leaf.values.drain(n)
    leaf.queries.drain(versions)


def load_level(leaf, h, m, carry):
    """The leaf's queries of level m, and the left sibling's keys and values."""
    n, versions = carry
    right = dyadic.at_bit(leaf.number, m)

    @pl.when(right == 1)
    def _():
        slot = leaf.queries.free(versions)
        first = dyadic.place(dyadic.query_counts(leaf.leaves), leaf.number, m) * LEAF
        load_queries(leaf, lambda half: pl.ds(first + half * ROWS, ROWS), slot)

    sibling = dyadic.block(leaf.number, m)
    first = dyadic.offset(dyadic.key_counts(leaf.leaves), m) + lax.shift_left(sibling, m)

    def load_tile(i, n):
        load_keys(leaf, h, first, i, n)
        load_values(leaf, h, lax.shift_left(sibling, m + 1) + i, n)
        return n + 1

    return lax.fori_loop(0, lax.shift_left(right, m), load_tile, n), versions + right


# The warpgroups that compute, each on its 64 queries. They alternate: one multiplies while the
# other takes its softmax.


def take_turns(leaf):
    """Waits for the other warpgroup."""
    plgpu.barrier_arrive(leaf.refs.turn)
    plgpu.barrier_wait(leaf.refs.turn)


def compute(leaf):
    """The softmax over the leaf's own tokens and all levels; acc, top, total as above."""
    plgpu.set_max_registers(COMPUTE_REGISTERS, action="increase")
    rows = leaf.rows(leaf.wg)
    acc, top, total = own_softmax(leaf)
    pl.when(leaf.number > 0)(lambda: leaf.keys.wait(1))
    pl.when(leaf.wg == 1)(lambda: take_turns(leaf))
    start = acc, top, total, jnp.int32(1), jnp.int32(0)
    of_level = functools.partial(compute_level, leaf)
    acc, top, total, *_ = lax.fori_loop(0, leaf.levels, of_level, start)
    pl.when(leaf.wg == 0)(lambda: take_turns(leaf))
    send(leaf, rows, acc, top, total)


def own_softmax(leaf):
    """acc, top and total of the leaf's own logits."""
    refs, at = leaf.refs, (leaf.b, leaf.head, leaf.number)
    own, tops = refs.own.at[*at], refs.tops.at[*at]
    top = own_top(tops, leaf.wg)
    p = own_exp2(own, tops, leaf.wg, top)
    total = p.sum(axis=1)
    leaf.values.wait(0)
    acc = product((p.astype(bf16), refs.sv.at[0]))
    leaf.values.hand_back(0)
    return acc, top, total


def compute_level(leaf, m, carry):
    """The left sibling's keys of level m."""
    *softmax, n, versions = carry
    right = dyadic.at_bit(leaf.number, m)
    version = leaf.queries.slot(versions)
    pl.when(right == 1)(lambda: leaf.queries.wait(version))
    tiles = lax.shift_left(right, m)
    of_tile = functools.partial(tile, leaf, version)
    *softmax, n = lax.fori_loop(0, tiles, lambda _, x: of_tile(x), (*softmax, n))
    pl.when(right == 1)(lambda: leaf.queries.hand_back(version))
    return *softmax, n, versions + right


def tile(leaf, version, carry):
    """128 keys, number n in their ring; the level's queries are in slot `version` of theirs."""
    refs = leaf.refs
    acc, top, total, n = carry
    slot, width = leaf.keys.slot(n), refs.sv.shape[-1]
    queries = refs.sq.at[version, leaf.wg]
    turns = functools.partial(take_turns, leaf)
    s = product((queries, refs.sk.at[slot].T), meanwhile=turns)
    if refs.skey_gates is not None:
        by_key = load(refs.skey_gates.at[slot], PER_COLUMN)
        by_query = load(refs.squery_gates.at[version, leaf.wg], PER_ROW)
        s = s * leaf.scale + per_column(by_key, ROWS)
        highest = jnp.maximum(top, s.max(axis=1) + by_query)
        p = jnp.exp2(s + per_row(by_query - highest, LEAF))
    else:
        highest = jnp.maximum(top, s.max(axis=1) * leaf.scale)
        p = jnp.exp2(s * leaf.scale - per_row(highest, LEAF))
    leaf.keys.hand_back(slot)
    shrink = jnp.exp2(top - highest)
    acc *= per_row(shrink, width)
    total = total * shrink + p.sum(axis=1)
    p = p.astype(bf16)
    # Keeps the compiler from moving any of this to after the barriers.
    acc, total, highest, p = lax.optimization_barrier((acc, total, highest, p))
    plgpu.barrier_arrive(refs.turn)
    leaf.values.wait(slot)
    plgpu.barrier_wait(refs.turn)

    def next_keys():
        following = leaf.keys.slot(n + 1)
        pl.when(n < leaf.number)(lambda: leaf.keys.wait(following))

    acc = product((p, refs.sv.at[slot]), init=acc, meanwhile=next_keys)
    leaf.values.hand_back(slot)
    return acc, highest, total, n + 1


def send(leaf, rows, acc, top, total):
    """o = acc / total, by way of the values' tile, and the log-sum-exp."""
    refs = leaf.refs
    mosaic.hand_back(refs.done)
    plgpu.barrier_wait(refs.done)  # all values are read: o can take their place
    so = refs.sv.at[0, pl.ds(leaf.wg * ROWS, ROWS)]
    so[...] = (acc / per_row(total, refs.sv.shape[-1])).astype(bf16)
    plgpu.commit_smem()
    plgpu.copy_smem_to_gmem(so, refs.o.at[leaf.b, rows, leaf.head])
    refs.lse.at[leaf.b, leaf.head, rows][...] = top + jnp.log2(total)
    plgpu.wait_smem_to_gmem(0, wait_read_only=True)


def own_top(tops, chunk):
    """The largest of the leaf's own logits, for each query of a chunk."""
    return jnp.maximum(*(load(tops.at[i * chunk], PER_ROW, optimized=False) for i in (1, 2)))


def own_exp2(own, tops, chunk, minus):
    """exp2(logits - minus) for a chunk of queries and the leaf's keys; `minus` is PER_ROW.

    The second chunk's blocks are the last two; the first's is the first, and zeros.
    """

    def block(i):
        top = load(tops.at[i], PER_ROW, optimized=False)
        return jnp.exp2(load(own.at[i], optimized=False) + per_row(top - minus, ROWS))

    def nothing():
        return plgpu.layout_cast(jnp.zeros((ROWS, ROWS), f32), WGMMA_LAYOUT)

    return jnp.concatenate([block(chunk), lax.cond(chunk == 1, lambda: block(2), nothing)], 1)
