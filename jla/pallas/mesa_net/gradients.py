"""The gradients of a chunk's keys, values, decays and betas, once all solves are known."""

import collections

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from jla.pallas.common import chunks, mosaic, scratch
from jla.pallas.common.chunks import CHUNK, TILE_WIDTH
from jla.pallas.common.mosaic import (
    PER_COLUMN,
    PER_ROW,
    bf16,
    f16,
    f32,
    load,
    per_column,
    per_row,
    product,
)
from jla.pallas.common.scratch import barrier_for, fetch
from jla.pallas.common.tiles import columns, smem_tiles
from jla.pallas.mesa_net.solve import put

SDS = jax.ShapeDtypeStruct

# Where a CTA's chunk is in the arrays: batch row, chunk, head and the chunk's tokens.
Place = collections.namedtuple("Place", "b n h rows")


def chunk_gradients(
    k, v, do, x, y, cumulated, until, later, beta, kk, kk_scale, kv, kv_scale, dkk, dkv
):  # fmt: skip
    """Gradients of one chunk's inputs. With x, y the solutions of both passes, the loss sees A_t
    as -y_t A_t x_t; so with D[t, j] = exp(G_t - G_j) for j <= t, M = D beta, all sums over t,

        1.  a = x k^T;   u = do v^T;   c = y k^T;   dM = a (u - c)
            dv_j = sum M a do_t;   dk_j = sum M (u - c) x_t - sum M a y_t;   dbeta_j = sum D dM
        2.  and with w_j = beta_j exp(G_end - G_j), what is written to the states:
            dv_j += w_j dHkv^T k_j;   dk_j += w_j (dHkk k_j + dHkk^T k_j + dHkv v_j)
            dbeta_j += exp(G_end - G_j) (k_j dHkk k_j + k_j dHkv v_j)
        3.  the border: <dHkk, Hkk> + <dHkv, Hkv>

    Args:
      k, v, do, x, y: as in `solve.output_gradients`.
      cumulated: G in base 2; later: exp(G_end - G); beta: [B, H, TP] float32.
      until: the place in its chunk of the last token that reads each token, [B, H, TP] uint32.
      kk, kk_scale, kv, kv_scale: as `states.forward` returned them.
      dkk, dkv: -dHkk^T and dHkv, as `states.reverse` returned them.

    Returns:
      dk [B, T, H, K], dv [B, T, H, V] bf16, and [B, H, TP] float32: both parts of dbeta, by reads
      and by what is written; the sums of M dM over j < t, by t, and by j; and what sums over the
      chunk to 3. with the states before it and the gradients of those after it.

    Everything is transposed, [j, t]: what is summed over t then is a register operand. One
    warpgroup a chunk, 96 KB of SMEM at K=V=128: two chunks share a multiprocessor. Floor at B=8
    T=4096 H=16 K=V=128: 2.0 GB, 0.47 ms at 4.3 TB/s.
    """
    (B, T, H, K), V, TP = k.shape, v.shape[-1], beta.shape[-1]
    vector = SDS((B, H, TP), f32)
    out = scratch.kernel(
        _body,
        inputs=dict(
            **dict(k=k, v=v, do=do, x=x, y=y),
            **dict(cumulated=cumulated, cumulated_by_column=cumulated),
            **dict(until=until, later=later, beta=beta),
            **dict(kk=kk, kk_scale=kk_scale, kv=kv, kv_scale=kv_scale, dkk=dkk, dkv=dkv),
        ),
        outputs=dict(
            **dict(dk=SDS((B, T, H, K), bf16), dv=SDS((B, T, H, V), bf16)),
            **dict.fromkeys(("direct", "written", "reads", "read", "border"), vector),
        ),
        scratch=_scratch(K // TILE_WIDTH, V // TILE_WIDTH),
        automatic_barriers=False,
        grid=(B, TP // CHUNK, H),
        grid_names=("b", "n", "h"),
    )
    return tuple(out)


def _scratch(k_tiles, v_tiles):
    kk, kv = k_tiles * k_tiles, k_tiles * v_tiles
    tokens = dict(k=k_tiles, v=v_tiles, x=k_tiles, y=k_tiles, do=v_tiles)
    return dict(
        sk=smem_tiles(k_tiles, dtype=f16),  # k, then the states' tiles
        sv=smem_tiles(v_tiles, dtype=f16),  # v, likewise
        work=smem_tiles(max(2 * k_tiles + v_tiles, kk + kv)),  # x, y, do, then dHkk, dHkv
        loaded=barrier_for(tokens),
        gradients_loaded=barrier_for(dict(dkk=kk, dkv=kv)),
        states_loaded=[barrier_for(dict(states=len(x))) for x in _rounds(k_tiles, v_tiles)],
    )


def _rounds(k_tiles, v_tiles):
    """The states' tiles, (is it Hkk, row, column), in rounds of as many as there are tiles for keys
    and values."""
    states = [(True, i, j) for i in range(k_tiles) for j in range(k_tiles)]
    states += [(False, i, j) for i in range(k_tiles) for j in range(v_tiles)]
    room = k_tiles + v_tiles
    return [states[i : i + room] for i in range(0, len(states), room)]


def _body(refs):
    b, n, h = (lax.axis_index(name) for name in ("b", "n", "h"))
    place = Place(b, n, h, pl.ds(n * CHUNK, CHUNK))
    k_tiles, v_tiles = len(refs.sk), len(refs.sv)
    work = refs.work
    sx, sy, sdo = work[:k_tiles], work[k_tiles : 2 * k_tiles], work[2 * k_tiles :][:v_tiles]
    squares = [(i, j) for i in range(k_tiles) for j in range(k_tiles)]
    oblongs = [(i, j) for i in range(k_tiles) for j in range(v_tiles)]
    sdkk = dict(zip(squares, work, strict=False))
    sdkv = dict(zip(oblongs, work[len(squares) :], strict=False))

    def of_tokens(ref, targets):
        sources = (ref.at[b, place.rows, h, columns(i)] for i in range(len(targets)))
        return list(zip(sources, targets, strict=True))

    def of_states(ref, targets):
        return [(ref.at[b, h, n, columns(i), columns(j)], x) for (i, j), x in targets.items()]

    tokens = dict(k=refs.sk, v=refs.sv, x=sx, y=sy, do=sdo)
    loads = {name: of_tokens(getattr(refs, name), tiles) for name, tiles in tokens.items()}
    fetch(loads, refs.loaded)
    beta = per_row(_vector(refs.beta, place), TILE_WIDTH)
    decay, token, until = _decays(refs, place)
    plgpu.barrier_wait(refs.loaded)
    dk, dv = _through_pairs(refs, place, (sx, sy, sdo), beta, decay, token, until)
    plgpu.commit_smem()  # all warps are done with x, y and do
    fetch(dict(dkk=of_states(refs.dkk, sdkk), dkv=of_states(refs.dkv, sdkv)), refs.gradients_loaded)
    dk, dv = _through_states(refs, place, sdkk, sdkv, beta, dk, dv)
    refs.border.at[b, h, place.rows][...] = _border(refs, place, sdkk, sdkv)
    plgpu.commit_smem()
    put(work, dk, refs.dk.at[b, place.rows, h])
    put(work[k_tiles:], dv, refs.dv.at[b, place.rows, h])
    plgpu.wait_smem_to_gmem(0, wait_read_only=True)


def _vector(ref, place, layout=PER_ROW):
    """The chunk's part of [B, H, TP]."""
    return load(ref.at[place.b, place.h, place.rows], layout, optimized=False)


def _decays(refs, place):
    """D transposed, [j, t]; the tokens' places in the chunk, and how far those that read them
    are."""
    by_column = per_column(_vector(refs.cumulated_by_column, place, PER_COLUMN), CHUNK)
    difference = by_column - per_row(_vector(refs.cumulated, place), CHUNK)
    decay = jnp.exp2(jnp.minimum(difference, 0.0))
    token = chunks.tokens()
    until = refs.until.at[place.b, place.h, place.rows]
    until = plgpu.load(until, layout=PER_ROW, optimized=False) - token
    decay = jnp.where(mosaic.in_interval(token, until + 1, CHUNK), decay, 0.0)
    return decay, token, until


def _through_pairs(refs, place, tokens, beta, decay, token, until):
    """1. dk and dv by the chunk's own pairs, as lists of bf16 tiles; stores direct, reads, read."""
    b, _, h, rows = place
    sx, sy, sdo = tokens
    keys, values = ([load(tile).astype(bf16) for tile in x] for x in (refs.sk, refs.sv))
    scores = product(*((key, x.T) for key, x in zip(keys, sx, strict=True)))
    change = product(*((value, z.T) for value, z in zip(values, sdo, strict=True)))
    change -= product(*((key, y.T) for key, y in zip(keys, sy, strict=True)))
    change *= decay
    pairs = scores * change
    refs.direct.at[b, h, rows][...] = jnp.sum(pairs, axis=1)
    # A token decays nothing of its own; its part would only have to cancel.
    pairs = jnp.where(mosaic.in_interval(token + 1, until, CHUNK), pairs * beta, 0.0)
    refs.reads.at[b, h, rows][...] = jnp.sum(pairs, axis=0)
    refs.read.at[b, h, rows][...] = jnp.sum(pairs, axis=1)
    change = (change * beta).astype(bf16)
    unread = (-scores * decay * beta).astype(bf16)
    # Rounded to be held: registers are short.
    dk = [product((change, x), (unread, y)).astype(bf16) for x, y in zip(sx, sy, strict=True)]
    dv = [(-product((unread, z))).astype(bf16) for z in sdo]
    return dk, dv


def _through_states(refs, place, sdkk, sdkv, beta, dk, dv):
    """2. dk and dv with what the states add; stores written, their part of dbeta."""
    later = per_row(_vector(refs.later, place), TILE_WIDTH)
    keys, values = ([(load(tile) * later).astype(bf16) for tile in x] for x in (refs.sk, refs.sv))
    plgpu.barrier_wait(refs.gradients_loaded)
    # Added up as they come: registers are short.
    written = mosaic.zeros((CHUNK, TILE_WIDTH), mosaic.WGMMA_LAYOUT)
    new_dk, new_dv = [], []
    for i, x in enumerate(dk):
        through_kk = product(
            *((key, sdkk[j, i]) for j, key in enumerate(keys)),
            *((key, sdkk[i, j].T) for j, key in enumerate(keys)),
        )
        written -= 0.5 * through_kk * load(refs.sk[i])
        through_kv = product(*((value, sdkv[i, j].T) for j, value in enumerate(values)))
        new_dk.append((x.astype(f32) + beta * (through_kv - through_kk)).astype(bf16))
    for j, x in enumerate(dv):
        through_kv = product(*((key, sdkv[i, j]) for i, key in enumerate(keys)))
        written += through_kv * load(refs.sv[j])
        new_dv.append((x.astype(f32) + beta * through_kv).astype(bf16))
    refs.written.at[place.b, place.h, place.rows][...] = jnp.sum(written, axis=1)
    return new_dk, new_dv


def _border(refs, place, sdkk, sdkv):
    """3. The sums over rows of states and gradients; the states come where keys and values were."""
    b, n, h, _ = place
    room = (*refs.sk, *refs.sv)
    border = jnp.zeros((CHUNK,), f32)
    border = plgpu.layout_cast(border, PER_ROW)
    rounds = _rounds(len(refs.sk), len(refs.sv))
    for states, barrier in zip(rounds, refs.states_loaded, strict=True):
        plgpu.commit_smem()  # all warps are done with what was there
        copies = []
        for (is_kk, i, j), tile in zip(states, room, strict=False):
            source = (refs.kk if is_kk else refs.kv).at[b, h, n, columns(i), columns(j)]
            copies.append((source, tile))
        fetch(dict(states=copies), barrier)
        plgpu.barrier_wait(barrier)
        for (is_kk, i, j), tile in zip(states, room, strict=False):
            if is_kk:
                gradient, scale = sdkk[i, j], -refs.kk_scale[b, h, n, i]
            else:
                gradient, scale = sdkv[i, j], refs.kv_scale[b, h, n, i]
            border += scale * jnp.sum(load(tile) * load(gradient), axis=1)
    return border
