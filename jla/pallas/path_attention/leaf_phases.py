"""The phases of `leaf.leaves`: a leaf's two chunks, 0 and 1, with two warpgroups each.

With A = lower(Q W^T), C = strict_lower(W K^T), M = N diag(beta) and W' = M W of each chunk:

    logits_00 and logits_11 = Q K^T - A (M C)
    K~ = K - (M C)^T W
    E  = -W'_1 K~_0^T
    logits_10    = Q_1 K~_0^T + A_1 E                          that is (Q_1 - A_1 W'_1) K~_0^T
    K~_0 H_1^T   = K~_0 + E^T W_1
    W'_1 H_0     = W'_1 - (W'_1 W_0^T) W'_0
    Q~_0         = Q_0 - A_0 W'_0
    Q~_1 H_0     = Q_1 - (Q_1 W_0^T) W'_0 - A_1 (W'_1 H_0)
    H_1 H_0      = I - W_0^T W'_0 - W_1^T (W'_1 H_0)

Warpgroups 0 and 1 have the chunks' keys, 2 and 3 their queries, one query head of the group after
another. Each works on its chunk's tiles, and waits for a barrier before it reads what another
warpgroup wrote. What the tiles of the phase's chunk hold at its end, `r`: as before, and read;
`.`: as before; in brackets what is to be converted:

    phase        | chunk | sq    sk sw smw       sinverse   smc  sk_moved se | arrives at
    -------------+-------+---------------------------------------------------+-----------------
    load_chunk   | both  | (W K) K  W            N                           |
    make_mc      | both  | Q     r  .            r          -M C             | mc_made
    make_mw      | both  | .     .  r  -W'       .          .                | mw_made
    make_keys    | both  | .     r  r  .         .          r    K~          | k_made, by 0
    move_between | 1     | .     .  .  -W'_1 H_0 .          .    r        E  | e_made, mw_moved
    send_first   | 0     | .     .  r  r         K~_0 H_1^T .    r        r  |
                 |       |                       then H                      |
    send_second  | 1     | .     .  r  r         .          .    H        .  |

What a phase reads of the other chunk: move_between K~_0, W_0 and W'_0, send_first W_1 and W'_1 H_0,
send_second W_0 and W'_0. The queries read all but sinverse and, of chunk 1, sk_moved; they write
`staging` alone.
"""

import dataclasses
import functools
from typing import Any

import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from jla.pallas.common import chunks, mosaic
from jla.pallas.common.chunks import CHUNK, TILE_WIDTH
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
)
from jla.pallas.common.scratch import fetch
from jla.pallas.path_attention import dyadic
from jla.pallas.path_attention.dyadic import LEAF

KEY_REGISTERS, QUERY_REGISTERS = 112, 144
NOTHING = -1e30  # the largest logit of a row that sees no key


def columns(tile):
    """The features of a tile."""
    return pl.ds(tile * TILE_WIDTH, TILE_WIDTH)


@dataclasses.dataclass(frozen=True)
class Chunk:
    """A warpgroup's chunk, and where it is."""

    refs: Any
    b: Any
    leaf: Any
    h: Any  # the head of keys
    number: Any  # 0 or 1, in the leaf
    tokens: Any  # of the row, a slice
    group: int  # query heads of a head of keys
    scale: float

    @property
    def leaves(self):
        """The number of leaves of a row."""
        return self.refs.logits.shape[2]

    def of(self, ref, number=None):
        """The tiles of features of this chunk, or of chunk `number`."""
        number = self.number if number is None else number
        return [ref.at[number, i] for i in range(ref.shape[1])]

    def fetch(self, name, head, tiles, barrier):
        """Starts the loads of the chunk's tiles of an input."""
        source = getattr(self.refs, name).at[self.b, self.tokens, head]
        pairs = [(source.at[:, columns(i)], tile) for i, tile in enumerate(tiles)]
        fetch({name: pairs}, barrier.at[self.number])

    def send(self, tile, target, head, leaf_of_versions, i):
        """Stores a tile of a version, if there is one."""

        @pl.when(leaf_of_versions >= 0)
        def _():
            rows = pl.ds(leaf_of_versions * LEAF + self.number * CHUNK, CHUNK)
            plgpu.copy_smem_to_gmem(tile, target.at[self.b, head, rows, columns(i)])


def body(refs, *, group, scale):
    """All phases, by warpgroup."""
    b, leaf, h, wg = (lax.axis_index(name) for name in ("b", "leaf", "h", "wg"))

    def of_chunk(number, phases):
        tokens = pl.ds(leaf * LEAF + number * CHUNK, CHUNK)
        phases(Chunk(refs, b, leaf, h, number, tokens, group, scale))

    pl.when(wg < 2)(lambda: of_chunk(lax.rem(wg, jnp.int32(2)), of_keys))
    for i in range(2, 4):
        pl.when(wg == i)(functools.partial(of_chunk, i % 2, of_queries))


def of_keys(own):
    """The phases of a chunk's keys."""
    plgpu.set_max_registers(KEY_REGISTERS, action="decrease")
    refs = own.refs
    w, strength = load_chunk(own)
    m = make_mc(own, w, strength)
    make_mw(own, m)
    make_keys(own)
    # After this the inverses are no longer needed, and the first chunk writes over their tiles.
    plgpu.barrier_wait(refs.mw_made.at[1 - own.number])
    version = dyadic.first_key(own.leaf, own.leaves)

    @pl.when(own.number == 0)
    def _():
        plgpu.barrier_arrive(refs.k_made)
        send_first(own, version)

    @pl.when(own.number == 1)
    def _():
        send_keys(own, own.of(refs.sk_moved), version)
        move_between(own)
        send_second(own)


def load_chunk(own):
    """W as float16, K in W's type as given; returns W as given, and beta. Q is on its way.

    What is bf16 and needed as float16 lies where the queries will: the keys or, whose bf16 tile one
    product takes, w.
    """
    refs = own.refs
    query, key, w = (own.of(x) for x in (refs.sq, refs.sk, refs.sw))
    converts_w, converts_keys = refs.w.dtype != f16, refs.k.dtype != refs.w.dtype
    given_w, given_key = query if converts_w else w, query if converts_keys else key
    own.fetch("w", own.h, given_w, refs.w_loaded)
    own.fetch("k", own.h, given_key, refs.k_loaded)
    source = refs.inverse.at[own.b, own.h, 2 * own.leaf + own.number]
    inverse = source, refs.sinverse.at[own.number]
    fetch(dict(inverse=inverse), refs.inverse_loaded.at[own.number])
    strength = load(refs.beta.at[own.b, own.h, own.tokens], PER_COLUMN, optimized=False)
    plgpu.barrier_wait(refs.w_loaded.at[own.number])
    given = [plgpu.load(x, layout=WGMMA_LAYOUT) for x in given_w]
    if converts_w:
        for x, y in zip(given, w, strict=True):
            y[...] = x.astype(f16)
        plgpu.commit_smem()
    plgpu.barrier_wait(refs.k_loaded.at[own.number])
    if converts_keys:
        for x, y in zip(given_key, key, strict=True):
            y[...] = plgpu.load(x, layout=WGMMA_LAYOUT).astype(f16)
        plgpu.commit_smem()
    own.fetch("q", own.h * own.group, query, refs.q_loaded)
    return given, strength


def make_mc(own, w, strength):
    """-M C, with C = strict_lower(W K^T); returns M = N diag(beta), float16."""
    refs = own.refs
    mc = refs.smc.at[own.number]
    wk = _along(w, own.of(refs.sk))
    mc[...] = jnp.where(chunks.up_to(strict=True), -wk, 0.0).astype(f16)
    plgpu.commit_smem()
    plgpu.barrier_wait(refs.inverse_loaded.at[own.number])
    m = (load(refs.sinverse.at[own.number]) * per_column(strength, CHUNK)).astype(f16)
    minus_mc = product((m, mc)).astype(f16)
    plgpu.commit_smem()
    mc[...] = minus_mc
    plgpu.commit_smem()
    plgpu.barrier_arrive(refs.mc_made.at[own.number])
    return m


def make_mw(own, m):
    """-W' = -M W."""
    refs = own.refs
    for w, mw in zip(own.of(refs.sw), own.of(refs.smw), strict=True):
        mw[...] = (-product((m, w))).astype(f16)
    plgpu.commit_smem()
    plgpu.barrier_arrive(refs.mw_made.at[own.number])


def make_keys(own):
    """K~ = K - (M C)^T W."""
    refs = own.refs
    mc = refs.smc.at[own.number]
    for k, w, moved in zip(*(own.of(x) for x in (refs.sk, refs.sw, refs.sk_moved)), strict=True):
        moved[...] = (load(k) + product((mc.T, w))).astype(f16)
    plgpu.commit_smem()


def send_keys(own, tiles, version):
    """Sends a chunk's keys at the leaf's end."""
    for i, tile in enumerate(tiles):
        own.send(tile, own.refs.keys, own.h, version, i)


def send_first(own, version):
    """K~_0 H_1^T = K~_0 + E^T W_1, and the first 64 rows of H; of the first chunk."""
    refs = own.refs
    moved, second_w = own.of(refs.sk_moved), own.of(refs.sw, 1)
    spare = [refs.sinverse.at[i] for i in range(len(moved))]
    plgpu.barrier_wait(refs.e_made)
    for k, w, target in zip(moved, second_w, spare, strict=True):
        target[...] = (load(k) + product((refs.se.T, w))).astype(f16)
    plgpu.commit_smem()
    send_keys(own, spare, version)
    plgpu.barrier_wait(refs.mw_moved)
    send_transform(own, spare)
    plgpu.wait_smem_to_gmem(0, wait_read_only=True)


def move_between(own):
    """E = -W'_1 K~_0^T and -W'_1 H_0 = -W'_1 + (W'_1 W_0^T) W'_0; of the second chunk."""
    refs = own.refs
    mw = own.of(refs.smw)
    first_keys, first_w, first_mw = (own.of(x, 0) for x in (refs.sk_moved, refs.sw, refs.smw))
    plgpu.barrier_wait(refs.k_made)
    refs.se[...] = _along(mw, first_keys).astype(f16)
    plgpu.commit_smem()
    plgpu.barrier_arrive(refs.e_made)
    back = _along(mw, first_w).astype(f16)
    for x, y in zip(mw, first_mw, strict=True):
        x[...] = (load(x) + product((back, y))).astype(f16)
    plgpu.commit_smem()
    plgpu.barrier_arrive(refs.mw_moved)


def send_second(own):
    """The other 64 rows of H, if there are; of the second chunk."""
    spare = own.of(own.refs.sk_moved)
    if len(spare) > 1:
        send_transform(own, spare)
    plgpu.wait_smem_to_gmem(0, wait_read_only=True)


def send_transform(own, spare):
    """Some 64 rows of H = I - W_0^T W'_0 - W_1^T (W'_1 H_0), as many as the chunk's number says."""
    refs = own.refs
    first_mw, second_mw = own.of(refs.smw, 0), own.of(refs.smw, 1)
    for i, tile in enumerate(spare):
        identity = jnp.where(chunks.diagonal(), (own.number == i).astype(f32), 0.0)
        left, right = refs.sw.at[0, own.number].T, refs.sw.at[1, own.number].T
        h = identity + product((left, first_mw[i]), (right, second_mw[i]))
        if i == 0:
            plgpu.wait_smem_to_gmem(0, wait_read_only=True)
            plgpu.commit_smem()
        tile[...] = h.astype(f16)
    plgpu.commit_smem()
    for i, tile in enumerate(spare):
        target = refs.transforms.at[own.b, own.h, own.leaf, columns(own.number), columns(i)]
        plgpu.copy_smem_to_gmem(tile, target)


def of_queries(own):
    """The phases of a chunk's queries."""
    plgpu.set_max_registers(QUERY_REGISTERS, action="increase")
    lax.fori_loop(0, own.group, lambda member, _: of_query_head(own, member), None)
    plgpu.wait_smem_to_gmem(0, wait_read_only=True)


def of_query_head(own, member):
    """Logits and first versions of one query head; then the next one's queries are on their way."""
    refs = own.refs
    head, is_first = own.h * own.group + member, member == 0
    query, mw = own.of(refs.sq), own.of(refs.smw)
    plgpu.barrier_wait(refs.q_loaded.at[own.number])
    rounded = [plgpu.load(x, layout=WGMMA_LAYOUT).astype(f16) for x in query]

    @pl.when(is_first)
    def _():
        plgpu.barrier_wait(refs.mw_made.at[own.number])
        plgpu.barrier_wait(refs.mc_made.at[own.number])

    # A, and the chunk's own logits Q K^T - A (M C).
    qw = _along(rounded, own.of(refs.sw))
    a = jnp.where(chunks.up_to(), qw, 0.0).astype(f16)
    same = refs.q.dtype == refs.w.dtype  # the keys' type by now
    qk = _pairs(query if same else rounded, own.of(refs.sk))
    put_logits(own, head, product(*qk, (a, refs.smc.at[own.number])), diagonal=True)

    if own.number == 0:
        put_queries(own, head, (a, mw))
    else:
        of_second_queries(own, head, rounded, a, is_first)

    @pl.when(member + 1 < own.group)
    def _():
        plgpu.commit_smem()
        own.fetch("q", head + 1, query, refs.q_loaded)


def of_second_queries(own, head, q, a, is_first):
    """logits_10 = Q_1 K~_0^T + A_1 E, and Q~_1 H_0 = Q_1 - (Q_1 W_0^T) W'_0 - A_1 (W'_1 H_0)."""
    refs = own.refs
    first_keys, first_w, first_mw = (own.of(x, 0) for x in (refs.sk_moved, refs.sw, refs.smw))

    @pl.when(is_first)
    def _():
        for barrier in (refs.mw_made.at[0], refs.k_made, refs.e_made):
            plgpu.barrier_wait(barrier)

    put_logits(own, head, product(*_pairs(q, first_keys), (a, refs.se)), diagonal=False)
    of_first = _along(q, first_w).astype(f16)
    pl.when(is_first)(lambda: plgpu.barrier_wait(refs.mw_moved))
    put_queries(own, head, (of_first, first_mw), (a, own.of(refs.smw)))


def put_logits(own, head, logits, *, diagonal):
    """Stores logits for the own chunk of keys, or for the first, with scale and gates."""
    refs, chunk_of_keys = own.refs, own.number if diagonal else 0
    x = logits * own.scale
    if refs.since_rows is not None:
        of_head = own.b, head
        keys = pl.ds(own.leaf * LEAF + chunk_of_keys * CHUNK, CHUNK)
        since = load(refs.since_rows.at[*of_head].at[own.tokens], PER_ROW, optimized=False)
        by_query = per_row(since, CHUNK)
        before = load(refs.since_columns.at[*of_head].at[keys], PER_COLUMN, optimized=False)
        x += by_query - per_column(before, CHUNK)
        seen_from = refs.earliest.at[*of_head].at[own.tokens]
        earliest = plgpu.load(seen_from, layout=PER_ROW, optimized=False)
        x = jnp.where(_seen(chunk_of_keys, earliest, diagonal=diagonal), x, -jnp.inf)
    elif diagonal:
        x = jnp.where(chunks.up_to(), x, -jnp.inf)
    at = own.b, head, own.leaf, own.number + chunk_of_keys
    top = jnp.maximum(x.max(axis=1), NOTHING)
    refs.tops.at[*at][...] = top
    mosaic.store(refs.logits.at[*at], (x - per_row(top, CHUNK)).astype(f16))


def put_queries(own, head, *pairs):
    """Sends Q plus the sum of x y, y in tiles of features: the queries at the leaf's start."""
    refs = own.refs
    version = dyadic.first_query(own.leaf, own.leaves)
    staging = refs.staging.at[own.number]
    for i, query in enumerate(own.of(refs.sq)):
        q = load(query) + product(*((x, y[i]) for x, y in pairs))
        plgpu.wait_smem_to_gmem(0, wait_read_only=True)
        plgpu.commit_smem()
        staging[...] = q.astype(f16)
        plgpu.commit_smem()
        own.send(staging, refs.queries, head, version, i)


def _seen(chunk_of_keys, earliest, *, diagonal):
    """[t, s]: whether t sees s, for t and s of two chunks of a leaf, the same or an earlier one.

    `earliest` is the place in the leaf of the first token that t sees.
    """
    before = jnp.broadcast_to(jnp.uint32(CHUNK) * jnp.uint32(chunk_of_keys), (CHUNK,))
    start = jnp.minimum(jnp.where(earliest > before, earliest - before, 0), CHUNK)
    end = chunks.tokens() + 1 if diagonal else jnp.full_like(start, CHUNK)
    return mosaic.in_interval(start, end - start, CHUNK)


def _pairs(x, y):
    """The pairs of x y^T, in tiles of features."""
    return [(a, b.T) for a, b in zip(x, y, strict=True)]


def _along(x, y):
    """x y^T."""
    return product(*_pairs(x, y))
