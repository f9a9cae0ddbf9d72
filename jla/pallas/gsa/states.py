"""The two states of Gated Slot Attention from chunk to chunk, and their gradients in reverse.

Both states, and both of their gradients, follow one rule. With X [D, M], a row for each feature
and a column for each slot (X = Hk, or X = Hv^T), a chunk's features x [64, D], and a number w
for each slot, [64, M]:

    forward:  X <- X Diag(exp G_end) + x^T (w exp(G_end - G))     x = k or v, w = s
    reverse:  X <- X Diag(exp G_end) + x^T (w exp(G))             x = q or do, w = dlogits or p

It is linear and depends on no query, and its factors are diagonal, so that a long sequence of few
heads can be cut into pieces: one pass makes each piece's end from zeros, elementwise products join
them, and a second pass runs all pieces from their true starts.
"""

import collections
import functools

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from jla._core.exchange import join
from jla.pallas.common import chunks, mosaic, scratch
from jla.pallas.common.chunks import CHUNK, TILE_WIDTH
from jla.pallas.common.mosaic import WGMMA_LAYOUT, bf16, f16, f32
from jla.pallas.common.pieces import number_of_pairs, pieces_first, rows_first
from jla.pallas.common.recurrence import piece
from jla.pallas.common.scratch import barrier_for, fetch_each
from jla.pallas.common.tiles import columns, smem_tiles

SDS = jax.ShapeDtypeStruct


def through_chunks(
    features, by_slot, log_decays, starts,
    *, reverse=False, made=None, pieces=None, spans=None,
):  # fmt: skip
    """Both states before each chunk, and the last; in reverse, the gradients of those after it.

    Args:
      features: x of either state, [B, T, HX, K] and [B, T, HX, V] bf16, HX a multiple of H; what
        the heads of a group contribute is added.
      by_slot: w of either state, [B, T, HX, M] bf16.
      log_decays: [B, T, H, M] float16, from `chunks.decay_operand`.
      starts: the first states, [B, H, K, M] and [B, H, M, V] float32, or None for zeros.
      made: what `summary` has made of each piece, or None.
      pieces: for tests; by default their number follows from the shapes.
      spans: None, or each piece's first chunk and its number of chunks, [B, P, 2] int32. Then
        `starts` are those of each piece, [B, H, P, K, M] and [B, H, P, M, V].

    Returns:
      X at the chunks' borders, [B, H, N, K, M] and [B, H, N, V, M] bf16, and the last states, as
      `starts`.
    """
    if spans is not None:
        starts, P = pieces_first(*starts), spans.shape[1]
        options = dict(reverse=reverse, spans=spans)
        *states, hk, hv = _run(features, by_slot, log_decays, starts, P, **options)
        return *states, *rows_first(hk, hv)
    B, _, H, M = log_decays.shape
    K, V = (x.shape[-1] for x in features)
    pieces = pieces or (made[0].shape[2] if made else _pieces(features, log_decays))
    if starts is None:
        starts = jnp.zeros((B, H, K, M), f32), jnp.zeros((B, H, M, V), f32)
    starts = tuple(x[None] for x in starts)
    if pieces > 1:
        if made is None:
            *ends, decays = _run(features, by_slot, log_decays, None, pieces, reverse=reverse)
            decays = jnp.exp2(decays[..., 0, :])  # all rows are the same
        else:
            followed = slice(1, None) if reverse else slice(-1)
            *ends, decays = (x[followed] for x in pieces_first(*made))
        starts = _join(ends, decays, starts, reverse=reverse)
    *states, hk, hv = _run(features, by_slot, log_decays, starts, pieces, reverse=reverse)
    last = 0 if reverse else -1
    return (*states, hk[last], hv[last])


def summary(features, by_slot, log_decays, starts=None, *, reverse=False):
    """What the whole sequence does to the states: how they decay, [B, H, M], and what it makes of
    `starts` (None: of zeros), [B, H, K, M] and [B, H, M, V]; float32. And of each piece what it
    makes of zeros, and how they decay, [B, H, P, ...]. In reverse, of the gradients of the states.

    The arguments are those of `through_chunks`.
    """
    B, _, H, M = log_decays.shape
    K, V = (x.shape[-1] for x in features)
    if starts is None:
        starts = jnp.zeros((B, H, K, M), f32), jnp.zeros((B, H, M, V), f32)
    pieces = _pieces(features, log_decays)
    *ends, sums = _run(features, by_slot, log_decays, None, pieces, reverse=reverse, every=True)
    decays, last = jnp.exp2(sums[..., 0, :]), 0 if reverse else -1
    hk, hv = _join(ends, decays, [x[None] for x in starts], reverse=reverse)
    return jnp.prod(decays, axis=0), hk[last], hv[last], *rows_first(*ends, decays)


def _pieces(features, log_decays):
    """How many pieces, by the shapes."""
    B, T, H, M = log_decays.shape
    K, V = (x.shape[-1] for x in features)
    return number_of_pairs(B * H * _blocks(K, V, M), _chunks(T))


def _join(ends, decays, starts, *, reverse):
    """The states that the pieces start from, by X <- decay X + end over the pieces before."""
    return tuple(
        join(jnp.expand_dims(decays, axis), end, start[0], reverse=reverse)
        for end, start, axis in zip(ends, starts, (3, 4), strict=True)
    )


def _width(K, V, M):
    """Features of one warpgroup: 64 registers a thread hold its part of the state."""
    return 2 * TILE_WIDTH if M == TILE_WIDTH and not (K % 128 or V % 128) else TILE_WIDTH


def _blocks(K, V, M):
    return (K + V) // _width(K, V, M)


def _run(features, by_slot, log_decays, starts, pieces, *, reverse, every=False, spans=None):
    """The kernel: all pieces from `starts`, [P, B, H, ...], with the states at the chunks' borders
    and the pieces' last states, [P, B, H, ...]; or from zeros (None) all pieces that others follow.
    Then it returns their last states, [P - 1, ...], and sums of log decays, [P - 1, B, H, 64, M]
    in equal rows; of `every` piece, P of them.

    One warpgroup has 128 features of either state (64 if M > 64) in registers for a whole piece.
    The chunk's operands are loaded two chunks ahead into a ring of three (two if M > 64); w is
    decayed in place. Floor at B=8 T=4096 H=16 K=V=128 M=64: forward 0.67 GB, 0.156 ms at 4.3 TB/s,
    in reverse 67 MB more; 450 instructions a warp and chunk.
    """
    B, T, H, M = log_decays.shape
    K, V = (x.shape[-1] for x in features)
    group = features[0].shape[2] // H
    N, width = _chunks(T), _width(K, V, M)
    tiles, m_tiles = width // TILE_WIDTH, M // TILE_WIDTH
    stages = 3 if M == TILE_WIDTH else 2
    keep = starts is not None
    P = pieces if keep or every else pieces - 1
    skipped = pieces - P if reverse else 0
    hk_start, hv_start = starts if keep else (None, None)
    out = scratch.kernel(
        functools.partial(
            _body,
            of_piece=lambda p, *span: piece(p + skipped, pieces, N, *span),
            group=group,
            reverse=reverse,
        ),
        inputs=dict(
            **dict(keys=features[0], values=features[1], by_key=by_slot[0], by_value=by_slot[1]),
            **dict(decay_operand=log_decays, hk_start=hk_start, hv_start=hv_start, spans=spans),
        ),
        outputs=dict(
            hk_states=SDS((B, H, N, K, M), bf16) if keep else None,
            hv_states=SDS((B, H, N, V, M), bf16) if keep else None,
            **dict(hk_end=SDS((P, B, H, K, M), f32), hv_end=SDS((P, B, H, M, V), f32)),
            sums=None if keep else SDS((P, B, H, CHUNK, M), f32),
        ),
        scratch=dict(
            sx=smem_tiles(tiles, stages),
            sw=smem_tiles(m_tiles, stages),  # w, then w with its decays
            sg=smem_tiles(m_tiles, stages, dtype=f16),  # of `decay_operand`
            so=[smem_tiles(tiles) for _ in range(m_tiles)],
            loaded=barrier_for(dict(x=tiles, w=m_tiles, decay_operand=m_tiles), stages),
        ),
        grid=(P, B, H, _blocks(K, V, M)),
        grid_names=("p", "b", "h", "block"),
    )
    return tuple(x for x in out if x is not None)


# A state's side of the kernel: whether this CTA has a part of this state, the arrays that it is
# made of and returned as, and the CTA's first feature. The CTAs of Hk come before those of Hv.
Side = collections.namedtuple("Side", "mine x w start states end feature")


def _sides(refs, block):
    width = len(refs.sx) * TILE_WIDTH
    key_blocks = refs.keys.shape[3] // width
    of_keys = refs.keys, refs.by_key, refs.hk_start, refs.hk_states, refs.hk_end
    of_values = refs.values, refs.by_value, refs.hv_start, refs.hv_states, refs.hv_end
    return (
        Side(block < key_blocks, *of_keys, block * width),
        Side(block >= key_blocks, *of_values, (block - key_blocks) * width),
    )


def _body(refs, *, of_piece, group, reverse):
    p, b, h, block = (lax.axis_index(name) for name in ("p", "b", "h", "block"))
    first, count = of_piece(p, refs.spans, b)
    tiles, m_tiles, stages = len(refs.sx), len(refs.sg), refs.sg[0].shape[0]
    keep = refs.hk_states is not None
    steps = count * group
    sides = _sides(refs, block)

    def chunk(step):
        i = _divide(step, group)
        return first + (count - 1 - i if reverse else i)

    def load(step):
        slot, rows = _modulo(step, stages), pl.ds(chunk(step) * CHUNK, CHUNK)
        _fetch(refs, sides, (b, rows, h), h * group + _modulo(step, group), slot)

    mask = chunks.mask_operand(chunks.up_to() if reverse else chunks.from_on(strict=True))
    everything = chunks.mask_operand(chunks.everywhere())

    def step(index, carry):
        state, sums = carry
        following = index + stages - 1
        pl.when(following < steps)(lambda: load(following))
        slot = _modulo(index, stages)
        first_of_chunk = _modulo(index, group) == 0
        if keep:

            @pl.when(first_of_chunk)
            def _():
                _round(refs, state)
                _send(refs, sides, (b, h, chunk(index)))

        plgpu.barrier_wait(refs.loaded.at[slot])
        # w exp(G_end - G), or w exp(G).
        for m in range(m_tiles):
            decay = chunks.decays(mask, refs.sg[m].at[slot]).astype(bf16)
            w = plgpu.load(refs.sw[m].at[slot], layout=WGMMA_LAYOUT)
            refs.sw[m].at[slot][...] = w * decay
        plgpu.commit_smem()
        # X <- X Diag(exp G_end) + x^T w
        new, new_sums = [], []
        for m in range(m_tiles):
            total = mosaic.product((everything, refs.sg[m].at[slot]))
            if group > 1:  # the chunk's decay counts once
                total = jnp.where(jnp.broadcast_to(first_of_chunk, total.shape), total, 0.0)
            if not keep:
                new_sums.append(sums[m] + total)
            total = jnp.exp2(total)
            for i in range(tiles):
                kept = state[m * tiles + i] * total
                pair = refs.sx[i].at[slot].T, refs.sw[m].at[slot]
                new.append(mosaic.product(pair, init=kept))
        plgpu.commit_smem()  # all warps are done with this slot
        return tuple(new), tuple(new_sums)

    for i in range(stages - 1):
        pl.when(i < steps)(lambda i=i: load(i))
    state = _load_state(refs, sides, (p, b, h)) if keep else _zeros(m_tiles * tiles)
    sums = () if keep else _zeros(m_tiles)
    state, sums = lax.fori_loop(0, steps, step, (state, sums))
    _store_state(refs, sides, (p, b, h), state)
    if keep:
        plgpu.wait_smem_to_gmem(0)
    else:

        @pl.when(block == 0)
        def _():
            for m in range(m_tiles):
                refs.sums[p, b, h, :, columns(m)] = sums[m]


def _zeros(number):
    zero = jnp.zeros((TILE_WIDTH, TILE_WIDTH), f32)
    return tuple(plgpu.layout_cast(zero, WGMMA_LAYOUT) for _ in range(number))


def _fetch(refs, sides, place, head, slot):
    """Starts to load a chunk: x and w of this CTA's state, of one of the group's heads."""
    b, rows, h = place

    def of_side(side):
        for i, tile in enumerate(refs.sx):
            part = pl.ds(side.feature + i * TILE_WIDTH, TILE_WIDTH)
            yield side.x.at[b, rows, head, part], tile.at[slot]
        for m, tile in enumerate(refs.sw):
            yield side.w.at[b, rows, head, columns(m)], tile.at[slot]

    for side in sides:  # of which one is this CTA's

        @pl.when(side.mine)
        def _(side=side):
            fetch_each(of_side(side), refs.loaded.at[slot], partial=True)

    log_decays = (
        (refs.decay_operand.at[b, rows, h, columns(m)], tile.at[slot])
        for m, tile in enumerate(refs.sg)
    )
    fetch_each(log_decays, refs.loaded.at[slot], partial=True)


def _round(refs, state):
    """Rounds the state to SMEM."""
    tiles = len(refs.sx)
    plgpu.wait_smem_to_gmem(0, wait_read_only=True)
    for m, buffers in enumerate(refs.so):
        for i, buffer in enumerate(buffers):
            buffer[...] = state[m * tiles + i].astype(bf16)
    plgpu.commit_smem()


def _send(refs, sides, place):
    """Sends the rounded state to memory; place: batch row, head and chunk."""

    def send(side):
        for m, buffers in enumerate(refs.so):
            for i, buffer in enumerate(buffers):
                part = pl.ds(side.feature + i * TILE_WIDTH, TILE_WIDTH)
                plgpu.copy_smem_to_gmem(buffer, side.states.at[*place, part, columns(m)])

    for side in sides:
        pl.when(side.mine)(lambda side=side: send(side))


def _order(refs):
    """The slot tile and the feature tile of each of a state's tiles."""
    return [(m, i) for m in range(len(refs.sg)) for i in range(len(refs.sx))]


def _rows_of(ref, place, feature, m, i):
    return ref.at[*place, pl.ds(feature + i * TILE_WIDTH, TILE_WIDTH), columns(m)]


def _columns_of(ref, place, feature, m, i):
    return ref.at[*place, columns(m), pl.ds(feature + i * TILE_WIDTH, TILE_WIDTH)]


def _load_state(refs, sides, place):
    """The state's tiles that the piece starts from; Hv is kept transposed."""
    keys, values = sides

    def of_keys():
        parts = (_rows_of(keys.start, place, keys.feature, *at) for at in _order(refs))
        return tuple(mosaic.load(part, optimized=False) for part in parts)

    def of_values():
        parts = (_columns_of(values.start, place, values.feature, *at) for at in _order(refs))
        return tuple(mosaic.load_transposed(part) for part in parts)

    return lax.cond(keys.mine, of_keys, of_values)


def _store_state(refs, sides, place, state):
    keys, values = sides

    @pl.when(keys.mine)
    def _():
        for at, x in zip(_order(refs), state, strict=True):
            _rows_of(keys.end, place, keys.feature, *at)[...] = x

    @pl.when(values.mine)
    def _():
        for at, x in zip(_order(refs), state, strict=True):
            mosaic.store_transposed(_columns_of(values.end, place, values.feature, *at), x)


def _chunks(T):
    return -(-T // CHUNK)


def _divide(x, y):
    return x // y if isinstance(x, int) else lax.div(x, jnp.int32(y))


def _modulo(x, y):
    return x % y if isinstance(x, int) else lax.rem(x, jnp.int32(y))
