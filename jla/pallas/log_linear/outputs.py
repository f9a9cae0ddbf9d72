"""The outputs: everything but the states, for all chunks at once."""

import functools

import jax
from jax.experimental.pallas import mosaic_gpu as plgpu

from jla.pallas.common import scratch
from jla.pallas.common.chunks import CHUNK, TILE_WIDTH
from jla.pallas.common.mosaic import (
    PER_COLUMN,
    PER_ROW,
    bf16,
    load,
    per_column,
    per_row,
    product,
)
from jla.pallas.common.tiles import columns
from jla.pallas.log_linear import stream

SDS = jax.ShapeDtypeStruct


def outputs(q, k, v, weights, states, skip, live, others, reads, *, per, inside, above):
    """The outputs of all chunks: with w_l[t] the weights of level l,

        o_t = sum_s (q_t . k_s) w_l[t] w_l[s] v_s + sum_m w_l(m)[t] q_t S_m + D v_t

    over the pairs of t's leaf block, where l is the level at which t and s meet (and lambda[t, 0]
    stands for the weights of t with itself), and over the states S_m of the set bits m of the leaf
    block's number. D is added to the weight of v_t, and rounded with it to bf16.

    Args:
      q, k: [B, T, HK, K] bf16, K 64 or 128; T a multiple of 8. v: [B, T, H, V] bf16.
      weights: [B, H, N, P, 64] float32, from `level_weights.weights`.
      states: [B, H, n, V, K] bf16, from `tree_states`; None where there is one leaf block.
      skip: D, [B, 1, H, 1] float32; None: 0.
      live: [B, N] int32, from `level_weights.live`: which chunks are worth the work; None: all.
      others: states of other devices, [B, H, I, V, K] bf16, which are read as S_m are, with the
        weights of the planes behind those of the tree; None: there are none.
      reads: which of them each chunk reads, as bits of a number, [B, H, N] int32.
      per: chunks of a leaf block; inside: its levels; above: the tree's.

    Returns:
      [B, T, H, V] bf16, of live chunks.

    One warpgroup a chunk, its outputs in 64 registers a thread; 80 KB of SMEM at K=V=128, so that
    two chunks share a multiprocessor. Floor at B=8 T=4096 H=16 HK=1 K=V=128, leaf blocks of 256:
    0.33 GB, 0.08 ms at 4.3 TB/s; from L2 1.2 GB, 0.22 ms at 5.5 TB/s.
    """
    B, T, H, V = v.shape
    HK, K = q.shape[2:]
    N, P = weights.shape[2:4]
    k_tiles, v_tiles = K // TILE_WIDTH, V // TILE_WIDTH
    body = functools.partial(_body, group=H // HK, per=per, inside=inside, above=above)
    out = scratch.kernel(
        stream.of_live_chunks(body),
        inputs=dict(
            **dict(live=live, q=q, k=k, v=v, weights=weights, states=states, skip=skip),
            **dict(others=others, reads=reads),
        ),
        outputs=dict(o=SDS((B, T, H, V), bf16)),
        scratch=stream.scratch(dict(sq=k_tiles), k_tiles, v_tiles, P),
        automatic_barriers=False,
        grid=(B, N, H),
        grid_names=("b", "n", "h"),
    )
    return out.o


def _body(_, refs, *, group, per, inside, above):
    at = stream.place(group)
    stream.fetch_own(refs, at, (refs.q, refs.sq), None)

    def fetch_chunk(j, slot):
        stream.fetch_chunk(refs, at, refs.k, refs.v, j, slot)

    def fetch_state(states, slot):
        stream.fetch_node(refs, at, above, states, slot)

    o = stream.back(
        at.n, per, stream.read_states(refs, at, per, above),
        fetch_chunk, fetch_state if refs.states is not None else None,
        functools.partial(_on_diagonal, refs, at),
        functools.partial(_on_chunk, refs, at),
        functools.partial(_on_state, refs, inside),
    )  # fmt: skip
    buffers = [tile.at[0] for tile in refs.ring[: len(o)]]
    for buffer, x in zip(buffers, o, strict=True):
        buffer[...] = x.astype(bf16)
    plgpu.commit_smem()
    for i, buffer in enumerate(buffers):
        plgpu.copy_smem_to_gmem(buffer, refs.o.at[at.b, at.rows, at.h, columns(i)])
    plgpu.wait_smem_to_gmem(0, wait_read_only=True)


def _scores(refs, slot):
    """q_t . k_s."""
    plgpu.barrier_wait(refs.loaded.at[slot])
    return product(*((x, y.at[slot].T) for x, y in zip(refs.sq, refs.ring, strict=False)))


def _values(refs, slot):
    return [tile.at[slot] for tile in refs.ring[len(refs.sq) :]]


def _on_diagonal(refs, at, slot):
    """The pairs of the chunk itself, and D."""
    plgpu.barrier_wait(refs.near)
    weights = stream.diagonal_weights(refs.srow, refs.scolumn)
    own = None if refs.skip is None else refs.skip[at.b, 0, at.h, 0]
    p = stream.plus_skip(_scores(refs, slot) * weights, own).astype(bf16)
    return tuple(product((p, v)) for v in _values(refs, slot))


def _on_chunk(refs, at, j, slot, o):
    """Those with chunk j."""
    row = load(refs.srow.at[stream.level_between(at.n, j)], PER_ROW)
    p = _scores(refs, slot) * per_row(row, CHUNK)
    p *= per_column(load(refs.other.at[slot], PER_COLUMN), CHUNK)
    p = p.astype(bf16)
    return tuple(product((p, v), init=x) for v, x in zip(_values(refs, slot), o, strict=True))


def _on_state(refs, inside, states, slot, o):
    """The first of the states that are left."""
    row = load(refs.srow.at[inside + 1 + stream.lowest_bit(states)], PER_ROW)
    row = per_row(row, TILE_WIDTH)
    q = [(load(x) * row).astype(bf16) for x in refs.sq]
    plgpu.barrier_wait(refs.state_loaded.at[slot])
    tiles = [tile.at[slot].T for tile in refs.ring]
    return tuple(
        product(*zip(q, tiles[i * len(q) : (i + 1) * len(q)], strict=True), init=total)
        for i, total in enumerate(o)
    )
