"""The gradients of all chunks: as readers (of q and the reading weights) and as written tokens.

Both work with the same pairs, the one by rows, the other transposed, so that what is summed is
always a row of a register tile.
"""

import functools

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental.pallas import mosaic_gpu as plgpu

from jla.pallas.common import chunks, scratch
from jla.pallas.common.chunks import CHUNK, LEVELS, TILE_WIDTH
from jla.pallas.common.mosaic import (
    PER_COLUMN,
    PER_ROW,
    bf16,
    f32,
    load,
    per_column,
    per_row,
    product,
)
from jla.pallas.common.tiles import columns, row_sum
from jla.pallas.log_linear import stream

SDS = jax.ShapeDtypeStruct


def reader_gradients(
    q, k, v, do, weights, states, live, others, reads, *, per, inside, above, skip
):  # fmt: skip
    """With a = q_t . k_s, u = do_t . v_s and the weights as in `outputs.outputs`,

    1.  dq_t = sum_s u w_l[t] w_l[s] k_s + sum_m w_l(m)[t] S_m do_t
    2.  dw_l[t] = sum_s a u w_l[s],   or   q_t S_m do_t

    Args: as of `outputs.outputs`; do: [B, T, H, V] bf16; skip: whether o has the term D v_t.

    Returns:
      dq for each head, [B, T, H, K] bf16, and [B, H, N, P, 64] float32, of which only the planes of
      levels at which a token reads are written, of other devices' those that `reads` says; with
      `skip` also the last one: do_t . v_t.

    As `outputs`, with do beside q: 104 KB of SMEM at K=V=128, two chunks a multiprocessor. Floor at
    B=8 T=4096 H=16 HK=1 K=V=128, leaf blocks of 256: 0.47 GB, 0.11 ms at 4.3 TB/s.
    """
    B, T, H, V = v.shape
    HK, K = q.shape[2:]
    N, P = weights.shape[2:4]
    k_tiles, v_tiles = K // TILE_WIDTH, V // TILE_WIDTH
    body = functools.partial(
        _reader_body, group=H // HK, per=per, inside=inside, above=above, skip=skip
    )
    out = scratch.kernel(
        stream.of_live_chunks(body),
        inputs=dict(
            **dict(live=live, q=q, k=k, v=v, do=do, weights=weights, states=states),
            **dict(others=others, reads=reads),
        ),
        outputs=dict(dq=SDS((B, T, H, K), bf16), dw=SDS((B, H, N, P, CHUNK), f32)),
        scratch=stream.scratch(dict(sq=k_tiles, sdo=v_tiles), k_tiles, v_tiles, P),
        automatic_barriers=False,
        grid=(B, N, H),
        grid_names=("b", "n", "h"),
    )
    return out.dq, out.dw


def _reader_body(_, refs, *, group, per, inside, above, skip):
    at = stream.place(group)
    stream.fetch_own(refs, at, (refs.q, refs.sq), (refs.do, refs.sdo))

    def fetch_chunk(j, slot):
        stream.fetch_chunk(refs, at, refs.k, refs.v, j, slot)

    def fetch_state(states, slot):
        stream.fetch_node(refs, at, above, states, slot)

    dq, changes = stream.back(
        at.n, per, stream.read_states(refs, at, per, above),
        fetch_chunk, fetch_state if refs.states is not None else None,
        functools.partial(_read_own, refs, at, inside, skip),
        functools.partial(_read_chunk, refs, at),
        functools.partial(_read_state, refs, at, inside),
    )  # fmt: skip
    for i, x in enumerate(changes):
        _put(refs, at, LEVELS + 1 + i, x)
    _send([(refs.sq, dq, refs.dq.at[at.b, at.rows, at.h])])


def _read_own(refs, at, inside, skip, slot):
    """1 and 2 for the pairs of the chunk itself: dq, and zeros for the levels above it."""
    plgpu.barrier_wait(refs.near)
    a, u, keys, _ = _pairs(refs, slot, refs.sq, refs.sdo)
    changes = a * u
    own, weights = _own(refs.srow, changes)
    _put(refs, at, 0, own)
    if skip:
        of_skip = jnp.sum(jnp.where(chunks.diagonal(), u, 0.0), axis=1)
        _put(refs, at, refs.dw.shape[3] - 1, of_skip)
    weights = _put_levels(refs, at, changes, weights, reverse=False)
    da = (u * weights).astype(bf16)
    dq = tuple(product((da, key)) for key in keys)
    return dq, _zeros(inside)


def _read_chunk(refs, at, j, slot, carry):
    """Those with chunk j."""
    dq, changes = carry
    level = stream.level_between(at.n, j)
    a, u, keys, _ = _pairs(refs, slot, refs.sq, refs.sdo)
    u *= per_column(load(refs.other.at[slot], PER_COLUMN), CHUNK)
    change = jnp.sum(a * u, axis=1)
    u *= per_row(load(refs.srow.at[level], PER_ROW), CHUNK)
    da = u.astype(bf16)
    dq = tuple(product((da, key), init=x) for key, x in zip(keys, dq, strict=True))
    return dq, _added(changes, level, change)


def _read_state(refs, at, inside, states, slot, carry):
    """Those with the first of the states that are left."""
    dq, changes = carry
    plane = inside + 1 + stream.lowest_bit(states)
    row = per_row(load(refs.srow.at[plane], PER_ROW), TILE_WIDTH)
    plgpu.barrier_wait(refs.state_loaded.at[slot])
    through = _through_state(refs, slot, refs.sdo, len(dq))
    _put(refs, at, plane, row_sum([load(x) * y for x, y in zip(refs.sq, through, strict=True)]))
    return tuple(x + row * y for x, y in zip(dq, through, strict=True)), changes


def writer_gradients(q, k, v, do, weights, gradients, skip, live, *, per, inside):
    """With a, u and w as in `reader_gradients`, d the decay of a token's writes to the end of its
    leaf block (the last plane of the weights), dS the gradient of the block's state,

    1.  dk_s = sum_t u w_l[t] w_l[s] q_t + d[s] dS v_s
    2.  dv_s = sum_t a w_l[t] w_l[s] do_t + d[s] k_s dS + D do_s
    3.  dw_l[s] = sum_t a u w_l[t];   dd[s] = k_s dS v_s

    Args: as of `outputs.outputs`; do: [B, T, H, V] bf16; gradients: dS, [B, H, n, V, K]
    bf16, of the first n leaf blocks, or None.

    Returns:
      dk for each head, [B, T, H, K], dv [B, T, H, V] bf16, and [B, H, N, P, 64] float32, of which
      only the planes of levels at which a token is read, and the last, are written.

    SMEM as `reader_gradients`, k and v for q and do. Floor at B=8 T=4096 H=16 HK=1 K=V=128, leaf
    blocks of 256: 0.6 GB, 0.14 ms at 4.3 TB/s.
    """
    B, T, H, V = v.shape
    HK, K = q.shape[2:]
    N, P = weights.shape[2:4]
    k_tiles, v_tiles = K // TILE_WIDTH, V // TILE_WIDTH
    body = functools.partial(_writer_body, group=H // HK, per=per, inside=inside)
    out = scratch.kernel(
        stream.of_live_chunks(body),
        inputs=dict(
            **dict(live=live, q=q, k=k, v=v, do=do, weights=weights, gradients=gradients, skip=skip)
        ),
        outputs=dict(
            dk=SDS((B, T, H, K), bf16),
            dv=SDS((B, T, H, V), bf16),
            dw=SDS((B, H, N, P, CHUNK), f32),
        ),
        scratch=stream.scratch(dict(sk=k_tiles, sv=v_tiles), k_tiles, v_tiles, P),
        automatic_barriers=False,
        grid=(B, N, H),
        grid_names=("b", "n", "h"),
    )
    return out.dk, out.dv, out.dw


def _writer_body(until, refs, *, group, per, inside):
    at = stream.place(group)
    blocks = 0 if refs.gradients is None else refs.gradients.shape[2]
    stream.fetch_own(refs, at, (refs.k, refs.sk), (refs.v, refs.sv))

    def fetch_chunk(i, slot):
        stream.fetch_chunk(refs, at, refs.q, refs.do, i, slot)

    def fetch_gradient(slot):
        gradient = refs.gradients.at[at.b, at.h, lax.div(at.n, jnp.int32(per))]
        stream.fetch_state(refs, gradient, slot)

    last = refs.dw.shape[3] - 1
    _put(refs, at, last, plgpu.layout_cast(jnp.zeros((CHUNK,), f32), PER_ROW))
    dk, dv, changes = stream.forth(
        at.n, per, until - 1, blocks, fetch_chunk,
        fetch_gradient if refs.gradients is not None else None,
        functools.partial(_write_own, refs, at, inside),
        functools.partial(_write_chunk, refs, at),
        functools.partial(_write_state, refs, at),
    )  # fmt: skip
    for i, x in enumerate(changes):
        _put(refs, at, LEVELS + 1 + i, x)
    plgpu.commit_smem()
    dk_out, dv_out = (x.at[at.b, at.rows, at.h] for x in (refs.dk, refs.dv))
    _send([(refs.sk, dk, dk_out), (refs.sv, dv, dv_out)])


def _write_own(refs, at, inside, slot):
    """1 to 3 for the pairs of the chunk itself, and D: dk, dv, zeros for the levels above it."""
    plgpu.barrier_wait(refs.near)
    a, u, queries, dos = _pairs(refs, slot, refs.sk, refs.sv)
    changes = a * u
    _, weights = _own(refs.srow, changes)
    weights = _put_levels(refs, at, changes, weights, reverse=True)
    own = None if refs.skip is None else refs.skip[at.b, 0, at.h, 0]
    da = (u * weights).astype(bf16)
    p = stream.plus_skip(a * weights, own).astype(bf16)
    dk = tuple(product((da, x)) for x in queries)
    dv = tuple(product((p, x)) for x in dos)
    return dk, dv, _zeros(inside)


def _write_chunk(refs, at, i, slot, carry):
    """Those with chunk i."""
    dk, dv, changes = carry
    level = stream.level_between(at.n, i)
    a, u, queries, dos = _pairs(refs, slot, refs.sk, refs.sv)
    row = per_row(load(refs.srow.at[level], PER_ROW), CHUNK)
    column = per_column(load(refs.other.at[slot], PER_COLUMN), CHUNK)
    a *= column
    change = jnp.sum(a * u, axis=1)
    p, da = (a * row).astype(bf16), (u * (column * row)).astype(bf16)
    dk = tuple(product((da, y), init=x) for x, y in zip(dk, queries, strict=True))
    dv = tuple(product((p, y), init=x) for x, y in zip(dv, dos, strict=True))
    return dk, dv, _added(changes, level, change)


def _write_state(refs, at, slot, carry):
    """What the gradient of the leaf block's state adds: d, and its gradient dd."""
    dk, dv, changes = carry
    last = refs.dw.shape[3] - 1
    row = per_row(load(refs.srow.at[last], PER_ROW), TILE_WIDTH)
    keys = [(load(x) * row).astype(bf16) for x in refs.sk]
    plgpu.barrier_wait(refs.state_loaded.at[slot])
    tiles = [tile.at[slot].T for tile in refs.ring]
    dv = tuple(
        product(*zip(keys, tiles[i * len(keys) : (i + 1) * len(keys)], strict=True), init=y)
        for i, y in enumerate(dv)
    )
    through = _through_state(refs, slot, refs.sv, len(dk))
    _put(refs, at, last, row_sum([load(x) * y for x, y in zip(refs.sk, through, strict=True)]))
    return tuple(x + row * y for x, y in zip(dk, through, strict=True)), dv, changes


def _put(refs, at, plane, value):
    refs.dw.at[at.b, at.h, at.n, plane][...] = value


def _pairs(refs, slot, by_key_head, by_head):
    """a and u, or their transposes, of the own tiles and those of a slot; and the latter."""
    plgpu.barrier_wait(refs.loaded.at[slot])
    tiles = [tile.at[slot] for tile in refs.ring]
    k_tiles = len(by_key_head)
    a = product(*((x, y.T) for x, y in zip(by_key_head, tiles[:k_tiles], strict=True)))
    u = product(*((x, y.T) for x, y in zip(by_head, tiles[k_tiles:], strict=True)))
    return a, u, tiles[:k_tiles], tiles[k_tiles:]


def _put_levels(refs, at, changes, weights, *, reverse):
    """Stores dw of the levels inside the chunk; returns the weights with those of all levels."""

    def level_step(level, weights):
        weights, mask, column = stream.diagonal_level(
            level, refs.srow, refs.scolumn, weights, reverse
        )
        _put(refs, at, level + 1, jnp.sum(jnp.where(mask, changes * column, 0.0), axis=1))
        return weights

    return lax.fori_loop(0, LEVELS, level_step, weights)


def _zeros(inside):
    """The sums for dw of the levels of a leaf block above a chunk's."""
    zeros = plgpu.layout_cast(jnp.zeros((CHUNK,), f32), PER_ROW)
    return (zeros,) * (inside - LEVELS)


def _added(changes, level, change):
    """The sums, with `change` added to that of the level."""
    return tuple(
        x + jnp.where(jnp.broadcast_to(level == LEVELS + 1 + i, x.shape), change, 0.0)
        for i, x in enumerate(changes)
    )


def _through_state(refs, slot, rows, k_tiles):
    """The rows, [64, V] in tiles, times the state of a slot."""
    return [
        product(*((x, refs.ring[i * k_tiles + j].at[slot]) for i, x in enumerate(rows)))
        for j in range(k_tiles)
    ]


def _own(srow, changes):
    """Of each token with itself: the gradient of its weight, and the weights, on the diagonal."""
    weights = per_row(load(srow.at[0], PER_ROW), CHUNK)
    mask = chunks.diagonal()
    change = jnp.sum(jnp.where(mask, changes, 0.0), axis=1)
    return change, jnp.where(mask, weights, 0.0)


def _send(results):
    """Sends tiles to memory as bf16, through SMEM that is not read any more."""
    for buffers, values, _ in results:
        for buffer, value in zip(buffers, values, strict=True):
            buffer[...] = value.astype(bf16)
    plgpu.commit_smem()
    for buffers, _, out in results:
        for i, buffer in enumerate(buffers):
            plgpu.copy_smem_to_gmem(buffer, out.at[:, columns(i)])
    plgpu.wait_smem_to_gmem(0, wait_read_only=True)
