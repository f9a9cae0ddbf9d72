"""What happens inside the leaves of the tree: each chunk's inverse, then leaves of two chunks.

With A = strict_lower(diag(beta) W W^T), M = (I + A)^-1 diag(beta) and W' = M W, the transform of a
chunk or a leaf is H = P_n ... P_1 = I - W^T W', of norm at most one if w has unit rows and beta is
in [0, 2]. The product of two chunks' transforms is of that form, too:

    H_1 H_0 = I - W_0^T W'_0 - W_1^T W'_1 H_0

Operands are float16, sums float32; two that came as bfloat16 are multiplied as they are.
"""

import functools

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from jla.pallas.common import chunks, mosaic, scratch
from jla.pallas.common.chunks import CHUNK, LEVELS, TILE_WIDTH
from jla.pallas.common.mosaic import (
    PER_COLUMN,
    PER_ROW,
    TILE,
    f16,
    f32,
    load,
    per_column,
    per_row,
    product,
)
from jla.pallas.common.scratch import barrier_for, fetch
from jla.pallas.path_attention import levels
from jla.pallas.path_attention.levels import LEAF

SDS = jax.ShapeDtypeStruct
KEY_REGISTERS, QUERY_REGISTERS = 112, 144
NOTHING = -1e30  # the largest logit of a row that sees no key


def _columns(tile):
    return pl.ds(tile * TILE_WIDTH, TILE_WIDTH)


def inverses(w, beta):
    """(I + strict_lower(diag(beta) W W^T))^-1 of every chunk of 64 tokens.

    Args:
      w: [B, T, H, K], 16 bits, K a multiple of 64, T a multiple of 8. beta: [B, H, L] float32; L is
        T padded with zeros to whole leaves.

    Returns:
      [B, H, L / 64, 64, 64] float16. With unit rows of w no element is larger than beta.

    One warpgroup a chunk, 32 KB of SMEM. Bytes at B=8 T=4096 H=16 K=128: 201 MB, 0.05 ms. Twelve
    products follow one another, 4000 clocks; with four chunks a multiprocessor 0.05 ms as well.
    """
    (B, _, H, K), N = w.shape, beta.shape[2] // CHUNK
    k_tiles = K // TILE_WIDTH

    tiles = range(k_tiles)

    def body(refs):
        b, n, h = (lax.axis_index(name) for name in ("b", "n", "h"))
        rows = pl.ds(n * CHUNK, CHUNK)
        w = [refs.w_tiles.at[i] for i in tiles]
        of_w = [(refs.w.at[b, rows, h, _columns(i)], w[i]) for i in tiles]
        fetch(dict(w=of_w), refs.w_loaded)
        strength = load(refs.beta.at[b, h, rows], PER_ROW, optimized=False)
        plgpu.barrier_wait(refs.w_loaded)
        a = product(*((x, x.T) for x in w))
        x = _unit_triangular_inverse(a * per_row(strength, CHUNK), refs.two_tiles)
        staging = refs.two_tiles.at[0]
        staging[...] = x.astype(f16)
        plgpu.commit_smem()
        plgpu.copy_smem_to_gmem(staging, refs.inverses.at[b, h, n])
        plgpu.wait_smem_to_gmem(0, wait_read_only=True)

    out = scratch.kernel(
        body,
        inputs=dict(w=w, beta=beta),
        outputs=dict(inverses=SDS((B, H, N, CHUNK, CHUNK), f16)),
        scratch=dict(
            w_tiles=mosaic.tile(CHUNK, TILE_WIDTH, k_tiles, dtype=w.dtype),
            two_tiles=mosaic.tile(CHUNK, CHUNK, 2, dtype=f16),
            w_loaded=barrier_for(dict(w=k_tiles)),
        ),
        automatic_barriers=False,
        grid=(B, N, H),
        grid_names=("b", "n", "h"),
    )
    return out.inverses


def _unit_triangular_inverse(a, tiles):
    """`chunks.unit_triangular_inverse` where no partial inverse has large elements.

    Each is a chunk's whose other maps are the identity, and those elements are at most beta: so
    float16 operands neither overflow nor need a Newton step.
    """

    a = a.astype(f16)

    def level_step(level, x):
        joined = jnp.where(chunks.level_pairs(level), a, jnp.float16(0.0))
        rounded = x.astype(f16)
        first, second = tiles.at[0], tiles.at[1]
        # A barrier of the warpgroup stands between any product and the next store to its tile.
        first[...] = rounded
        plgpu.commit_smem()
        second[...] = product((joined, first)).astype(f16)
        plgpu.commit_smem()
        return x - product((rounded, second))

    eye = jnp.where(chunks.diagonal(), 1.0, 0.0).astype(f32)
    x = eye - jnp.where(chunks.level_pairs(0), a.astype(f32), 0.0)
    return lax.fori_loop(1, LEVELS, level_step, x)


# Under jit, so that both passes of a program have one kernel, lowered and compiled once.
@functools.partial(jax.jit, static_argnames="scale")
def leaves(q, k, w, inverse, beta, gates, *, scale):
    """The leaves' own logits and transforms; queries from the leaf's start, keys from its end.

    Of a chunk alone, with lower and strict_lower for r <= t and r > s:

        logits = Q K^T - lower(Q W^T) M strict_lower(W K^T)
        Q~ = Q - lower(Q W^T) W';   K~ = K - (M strict_lower(W K^T))^T W

    Then the second chunk's queries see the first's keys as Q~_1 K~_0^T, Q~_1 is moved on by H_0,
    and K~_0 by H_1.

    Args:
      q: [B, T, HQ, K], bf16 or float16. k, w: [B, T, H, K], each of q's type or float16; both
        float16 if only k is. K 64 or 128, T a multiple of 8.
      inverse: as `inverses` returns it. beta: as it takes it.
      gates: None, or for each query head [B, HQ, L] the sum of the leaf's gates up to and with each
        token's, float32, and the place in its leaf of the first token that it sees, uint32.
      scale: of the logits, positive, base 2.

    Returns:
      [B, HQ, R, K] and [B, H, S, K] float16, all levels' query and key versions, of which each
      leaf's first is written, see `levels`; the leaves' own logits with scale and gates, in base 2,
      in two parts, see below; and for H of all levels' blocks [B, H, blocks, K, K] float16, of
      which the leaves' are written.

      The logits are by chunks of queries and of keys, 00, 10 and 11: relative to the largest of
      their row in the chunk of keys, [B, HQ, P, 3, 64, 64] float16, -inf where s > t; and those
      largest, [B, HQ, P, 3, 64] float32, finite where nothing is seen. So a large one keeps its
      digits: exp2 of it errs by 1e-4 at most.

    Four warpgroups a leaf, one for each chunk's keys and one for its queries; 216 KB of SMEM at
    K=128. Traffic at B=8 T=4096 H=HQ=16 K=128: q, k, w and three of what is written 134 MB each,
    logits 101, inverses 67: 0.97 GB, 0.23 ms at 4.3 TB/s. Products 0.12 TFLOP, 0.15 ms.
    """
    (B, _, HQ, K), (H, N) = q.shape, inverse.shape[1:3]
    P, group, k_tiles = N // 2, HQ // H, K // TILE_WIDTH
    gated = gates is not None
    converts = k.dtype != w.dtype
    tiles = range(k_tiles)

    def body(q_ref, k_ref, w_ref, inverse_ref, beta_ref, *refs):
        gate_refs, refs = (refs[:3], refs[3:]) if gated else (None, refs)
        queries, keys, own, tops, transforms, sq, sk, sw, smw, sx, sa, skc, se, so, *barriers = refs
        q_loaded, k_loaded, w_loaded, x_loaded, a_made, w_made, kc_made, e_made, moved = barriers
        b, leaf, h, wg = (lax.axis_index(name) for name in ("b", "leaf", "h", "wg"))
        chunk = lax.rem(wg, jnp.int32(2))
        rows = pl.ds(leaf * LEAF + chunk * CHUNK, CHUNK)

        def of(ref, chunk):
            return [ref.at[chunk, i] for i in tiles]

        query, key, w, mw, made = (of(ref, chunk) for ref in (sq, sk, sw, smw, skc))
        first_w, first_mw, first_keys = (of(ref, 0) for ref in (sw, smw, skc))
        second_w, second_mw = of(sw, 1), of(smw, 1)

        def fetch(ref, head, tiles, barrier):
            for i, tile in enumerate(tiles):
                plgpu.copy_gmem_to_smem(ref.at[b, rows, head, _columns(i)], tile, barrier.at[chunk])

        def write(tile, ref, head, slot, i):
            @pl.when(slot >= 0)
            def _():
                at = pl.ds(slot * LEAF + chunk * CHUNK, CHUNK)
                plgpu.copy_smem_to_gmem(tile, ref.at[b, head, at, _columns(i)])

        def of_keys():
            plgpu.set_max_registers(KEY_REGISTERS, action="decrease")
            a = sa.at[chunk]
            # What is bf16 and needed as float16 lies where the queries will: the keys or, whose
            # bf16 tile one product takes, w.
            given_w, given_key = w if w_ref.dtype == f16 else query, query if converts else key
            fetch(w_ref, h, given_w, w_loaded)
            fetch(k_ref, h, given_key, k_loaded)
            source, barrier = inverse_ref.at[b, h, 2 * leaf + chunk], x_loaded.at[chunk]
            plgpu.copy_gmem_to_smem(source, sx.at[chunk], barrier)
            strength = load(beta_ref.at[b, h, rows], PER_COLUMN, optimized=False)
            plgpu.barrier_wait(w_loaded.at[chunk])
            given = [plgpu.load(x, layout=TILE) for x in given_w]
            if given_w is not w:
                for x, y in zip(given, w, strict=True):
                    y[...] = x.astype(f16)
                plgpu.commit_smem()
            plgpu.barrier_wait(k_loaded.at[chunk])
            if converts:
                for x, y in zip(given_key, key, strict=True):
                    y[...] = plgpu.load(x, layout=TILE).astype(f16)
                plgpu.commit_smem()
            fetch(q_ref, h * group, query, q_loaded)
            wk = product(*((x, y.T) for x, y in zip(given, key, strict=True)))
            a[...] = jnp.where(chunks.up_to(strict=True), -wk, 0.0).astype(f16)
            plgpu.commit_smem()
            plgpu.barrier_wait(x_loaded.at[chunk])
            m = (load(sx.at[chunk]) * per_column(strength, CHUNK)).astype(f16)
            mwk = product((m, a)).astype(f16)
            plgpu.commit_smem()
            a[...] = mwk
            plgpu.commit_smem()
            plgpu.barrier_arrive(a_made.at[chunk])
            for x, y in zip(w, mw, strict=True):
                y[...] = (-product((m, x))).astype(f16)
            plgpu.commit_smem()
            plgpu.barrier_arrive(w_made.at[chunk])
            for x, y, z in zip(key, w, made, strict=True):
                z[...] = (load(x) + product((a.T, y))).astype(f16)
            plgpu.commit_smem()
            # After this nobody needs the inverses, and the first chunk writes by their tiles.
            plgpu.barrier_wait(w_made.at[1 - chunk])
            slot = levels.first_key(leaf, P)

            @pl.when(chunk == 0)
            def _():
                plgpu.barrier_arrive(kc_made)
                plgpu.barrier_wait(e_made)
                for i in tiles:
                    moved_keys = load(made[i]) + product((se.T, second_w[i]))
                    sx.at[i][...] = moved_keys.astype(f16)
                plgpu.commit_smem()
                for i in tiles:
                    write(sx.at[i], keys, h, slot, i)
                plgpu.barrier_wait(moved)
                put_transform([sx.at[i] for i in tiles])
                plgpu.wait_smem_to_gmem(0, wait_read_only=True)

            @pl.when(chunk == 1)
            def _():
                for i in tiles:
                    write(made[i], keys, h, slot, i)
                plgpu.barrier_wait(kc_made)
                se[...] = product(*((x, y.T) for x, y in zip(mw, first_keys, strict=True))).astype(
                    f16
                )
                plgpu.commit_smem()
                plgpu.barrier_arrive(e_made)
                back = product(*((x, y.T) for x, y in zip(mw, first_w, strict=True))).astype(f16)
                for x, y in zip(mw, first_mw, strict=True):
                    x[...] = (load(x) + product((back, y))).astype(f16)
                plgpu.commit_smem()
                plgpu.barrier_arrive(moved)
                pl.when(k_tiles > 1)(lambda: put_transform(made))
                plgpu.wait_smem_to_gmem(0, wait_read_only=True)

        def put_transform(spare):
            """Some 64 rows of H."""
            for i in tiles:
                identity = jnp.where(chunks.diagonal(), (chunk == i).astype(f32), 0.0)
                left, right = sw.at[0, chunk].T, sw.at[1, chunk].T
                out = identity + product((left, first_mw[i]), (right, second_mw[i]))
                if i == 0:
                    plgpu.wait_smem_to_gmem(0, wait_read_only=True)
                    plgpu.commit_smem()
                spare[i][...] = out.astype(f16)
            plgpu.commit_smem()
            for i in tiles:
                target = transforms.at[b, h, leaf, _columns(chunk), _columns(i)]
                plgpu.copy_smem_to_gmem(spare[i], target)

        def of_queries():
            plgpu.set_max_registers(QUERY_REGISTERS, action="increase")

            def of_head(member, _):
                head, first = h * group + member, member == 0

                def put_logits(x, chunk_of_keys):
                    x *= scale
                    if gated:
                        since, since_too, earliest = (ref.at[b, head] for ref in gate_refs)
                        columns = pl.ds(leaf * LEAF + chunk_of_keys * CHUNK, CHUNK)
                        since = per_row(load(since.at[rows], PER_ROW, optimized=False), CHUNK)
                        before = load(since_too.at[columns], PER_COLUMN, optimized=False)
                        x += since - per_column(before, CHUNK)
                        earliest = plgpu.load(earliest.at[rows], layout=PER_ROW, optimized=False)
                        x = jnp.where(_seen(chunk, chunk_of_keys, earliest), x, -jnp.inf)
                    elif chunk_of_keys is chunk:
                        x = jnp.where(chunks.up_to(), x, -jnp.inf)
                    at, top = (b, head, leaf, chunk + chunk_of_keys), x.max(axis=1)
                    top = jnp.maximum(top, NOTHING)
                    tops.at[*at][...] = top
                    mosaic.store(own.at[*at], (x - per_row(top, CHUNK)).astype(f16))

                def put_queries(*pairs):
                    slot = levels.first_query(leaf, P)
                    for i in tiles:
                        x = load(query[i]) + product(*((x, y[i]) for x, y in pairs))
                        plgpu.wait_smem_to_gmem(0, wait_read_only=True)
                        plgpu.commit_smem()
                        so.at[chunk][...] = x.astype(f16)
                        plgpu.commit_smem()
                        write(so.at[chunk], queries, head, slot, i)

                plgpu.barrier_wait(q_loaded.at[chunk])
                rounded = [plgpu.load(x, layout=TILE).astype(f16) for x in query]

                @pl.when(first)
                def _():
                    plgpu.barrier_wait(w_made.at[chunk])
                    plgpu.barrier_wait(a_made.at[chunk])

                qw = product(*((x, y.T) for x, y in zip(rounded, w, strict=True)))
                qw = jnp.where(chunks.up_to(), qw, 0.0).astype(f16)
                same = q_ref.dtype == w_ref.dtype  # the keys' type by now
                pairs = [(x, y.T) for x, y in zip(query if same else rounded, key, strict=True)]
                put_logits(product(*pairs, (qw, sa.at[chunk])), chunk)

                pl.when(chunk == 0)(lambda: put_queries((qw, mw)))

                @pl.when(chunk == 1)
                def _():
                    @pl.when(first)
                    def _():
                        for barrier in (w_made.at[0], kc_made, e_made):
                            plgpu.barrier_wait(barrier)

                    pairs = [(x, y.T) for x, y in zip(rounded, first_keys, strict=True)]
                    put_logits(product(*pairs, (qw, se)), 0)
                    earlier = product(*((x, y.T) for x, y in zip(rounded, first_w, strict=True)))
                    earlier = earlier.astype(f16)
                    pl.when(first)(lambda: plgpu.barrier_wait(moved))
                    put_queries((earlier, first_mw), (qw, mw))

                @pl.when(member + 1 < group)
                def _():
                    plgpu.commit_smem()
                    fetch(q_ref, head + 1, query, q_loaded)

            lax.fori_loop(0, group, of_head, None)
            plgpu.wait_smem_to_gmem(0, wait_read_only=True)

        pl.when(wg < 2)(of_keys)
        pl.when(wg >= 2)(of_queries)

    query_leaves, key_leaves = levels.query_counts(P), levels.key_counts(P)
    arguments = (q, k, w, inverse, beta)
    if gated:
        since, earliest = gates
        arguments += since, since, earliest
    one, two = plgpu.Barrier(), plgpu.Barrier(num_barriers=2)
    loads = plgpu.Barrier(num_arrivals=k_tiles, num_barriers=2)
    half = (CHUNK, TILE_WIDTH, 2, k_tiles)
    return mosaic.kernel(
        body,
        automatic_barriers=False,
        out_type=[
            SDS((B, HQ, max(sum(query_leaves), 1) * LEAF, K), f16),
            SDS((B, H, max(sum(key_leaves), 1) * LEAF, K), f16),
            SDS((B, HQ, P, 3, CHUNK, CHUNK), f16),
            SDS((B, HQ, P, 3, CHUNK), f32),
            SDS((B, H, sum(levels.block_counts(P)), K, K), f16),
        ],
        scratch_types=[
            *[mosaic.tile(*half, dtype=x.dtype) for x in (q, w)],
            *[mosaic.tile(*half, dtype=f16)] * 2,
            *[mosaic.tile(CHUNK, CHUNK, 2, dtype=f16)] * 2,
            mosaic.tile(*half, dtype=f16),
            mosaic.tile(CHUNK, CHUNK, dtype=f16),
            mosaic.tile(CHUNK, TILE_WIDTH, 2, dtype=f16),
            *[loads] * 3,
            *[two] * 3,
            *[one] * 3,
        ],
        grid=(B, P, H),
        grid_names=("b", "leaf", "h"),
        num_threads=4,
        thread_name="wg",
    )(*arguments)


def _seen(chunk, chunk_of_keys, earliest):
    """[t, s]: whether t sees s, for t and s of two chunks of a leaf, s's not the later one.

    `earliest` is the place in the leaf of the first token that t sees.
    """
    before = jnp.broadcast_to(jnp.uint32(CHUNK) * jnp.uint32(chunk_of_keys), (CHUNK,))
    start = jnp.minimum(jnp.where(earliest > before, earliest - before, 0), CHUNK)
    end = chunks.tokens() + 1 if chunk_of_keys is chunk else jnp.full_like(start, CHUNK)
    return mosaic.in_interval(start, end - start, CHUNK)
