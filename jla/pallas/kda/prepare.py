"""KDA's chunk-local preparation: everything of a chunk that needs no state."""

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from jla.pallas.common import chunks, mosaic
from jla.pallas.common.chunks import CHUNK, LEVELS, TILE_WIDTH
from jla.pallas.common.mosaic import PER_COLUMN, TILE, bf16, f16, f32, load, per_column

SDS = jax.ShapeDtypeStruct


def prepare(q, k, v, gates, beta, *, scale, keep):
    """Chunk-local part of KDA's forward pass.

    With G the cumulated log decays of the chunk:

        A[i, j] = sum_k k_i k_j exp(G_i - G_j)   (j < i);   M = I + A diag(beta)
        u  = M^-1 v                                the errors that a zero state would leave
        w  = M^-1 k~,  k~ = k exp(G)               how the carried state changes them
        q~ = scale q exp(G);  kg = k exp(G_end - G);  decay = exp(G_end)
        Aq[i, j] = scale sum_k q_i k_j exp(G_i - G_j)   (j <= i)

    Args:
      q, k: [B, T, H, K] bf16, K a multiple of 64, T a multiple of 8. v: [B, T, HV, V] bf16.
      gates: [B, T, HV, K] float16, from `chunks.gates`.
      beta: [B, HV, L] float32; L is T padded with zeros to whole chunks.
      keep: whether to return M^-1 and A, for the backward pass.

    Returns:
      q~, w [B, L, HV, K], u [B, L, HV, V], kg [B, L, HV, K] bf16, decay [B, HV, N, K] float32,
      Aq and, with `keep`, M^-1 and A [B, HV, N, 64, 64] bf16.

    One warpgroup a chunk; 72 KB of SMEM at K=V=128 (q, k, gates, three work tiles), 255 registers,
    so that two chunks share a multiprocessor. Traffic at B=8 T=4096 HV=16 K=V=128: q, k, v, gates,
    q~, w, u, kg 134 MB each, Aq 67 MB, M^-1 and A if kept, too: 1.14 GB, 0.27 ms at 4.3 TB/s.
    Operations: 8000 instructions a warp and chunk, at the 1.6 a clock of eight warps 0.74 ms: that
    is what it takes.
    """
    (B, _, H, K), L = q.shape, beta.shape[2]
    HV, V = v.shape[2:]
    N, group = L // CHUNK, HV // H
    k_tiles, v_tiles = K // TILE_WIDTH, V // TILE_WIDTH

    # The kernel awaits by hand (`commit_smem` is a barrier of the warpgroup, too) whatever it
    # overwrites in SMEM; Mosaic's own barriers, two for each store, would cost it 5%.
    def body(
        q_ref, k_ref, v_ref, gates_ref, beta_ref,
        q_out, w_out, u_out, kg_out, decay_out, aq_out, *refs,
    ):  # fmt: skip
        kept, (sk, sq, sg, work, loaded, v_loaded) = refs[:-6], refs[-6:]
        b, n, h = (lax.axis_index(name) for name in ("b", "n", "h"))
        rows = pl.ds(n * CHUNK, CHUNK)

        def columns(tile):
            return pl.ds(tile * TILE_WIDTH, TILE_WIDTH)

        def put(tile, value, out):
            """Stores a value through an SMEM tile that nobody reads any more."""
            tile[...] = value.astype(bf16)
            plgpu.commit_smem()
            plgpu.copy_smem_to_gmem(tile, out)

        spare = work.at[max(k_tiles, 2)]
        for i in range(k_tiles):
            for source, head, target in (
                (q_ref, h // group, sq), (k_ref, h // group, sk), (gates_ref, h, sg),
            ):  # fmt: skip
                plgpu.copy_gmem_to_smem(source.at[b, rows, head, columns(i)], target.at[i], loaded)
        plgpu.barrier_wait(loaded)

        a, aq = _scores(sq, sk, work, sg, k_tiles)
        plgpu.commit_smem()
        put(spare, aq * scale, aq_out.at[b, h, n])
        if keep:
            put(work.at[1], a, kept[1].at[b, h, n])

        earlier, later = (chunks.weights(x) for x in (chunks.up_to(), chunks.from_on(strict=True)))
        for i in range(k_tiles):
            before = chunks.decays(earlier, sg.at[i])
            sq.at[i][...] = (load(sq.at[i]) * before * scale).astype(bf16)
            after = chunks.decays(later, sg.at[i])
            key = load(sk.at[i])
            sk.at[i][...] = (key * before).astype(bf16)
            if i:
                plgpu.wait_smem_to_gmem(0, wait_read_only=True)
            put(work.at[0], key * after, kg_out.at[b, rows, h, columns(i)])
            plgpu.copy_smem_to_gmem(sq.at[i], q_out.at[b, rows, h, columns(i)])
            # The sum over the chunk, as a sum along rows: along columns it would cross warps.
            decay_out.at[b, h, n, columns(i)][...] = jnp.exp2(load(sg.at[i].T).sum(axis=1))
        beta = per_column(load(beta_ref.at[b, h, rows], PER_COLUMN, optimized=False), CHUNK)
        plgpu.wait_smem_to_gmem(0, wait_read_only=True)
        for i in range(v_tiles):
            plgpu.copy_gmem_to_smem(v_ref.at[b, rows, h, columns(i)], sq.at[i], v_loaded)

        inverse = chunks.unit_triangular_inverse(a * beta, (work.at[0], work.at[1])).astype(bf16)
        plgpu.commit_smem()
        if keep:
            put(spare, inverse, kept[0].at[b, h, n])
        for i in range(k_tiles):
            w = mosaic.product((inverse, sk.at[i]))
            put(work.at[i], w, w_out.at[b, rows, h, columns(i)])
        plgpu.barrier_wait(v_loaded)
        for i in range(v_tiles):
            u = mosaic.product((inverse, sq.at[i]))
            put(sk.at[i], u, u_out.at[b, rows, h, columns(i)])
        plgpu.wait_smem_to_gmem(0, wait_read_only=True)

    keys, values = SDS((B, L, HV, K), bf16), SDS((B, L, HV, V), bf16)
    squares = SDS((B, HV, N, CHUNK, CHUNK), bf16)
    wide = max(k_tiles, v_tiles)
    return mosaic.kernel(
        body,
        automatic_barriers=False,
        out_type=[
            *(keys, keys, values, keys),
            SDS((B, HV, N, K), f32),
            *[squares] * (3 if keep else 1),
        ],
        scratch_types=[
            mosaic.tile(CHUNK, TILE_WIDTH, wide),
            mosaic.tile(CHUNK, TILE_WIDTH, wide),
            mosaic.tile(CHUNK, TILE_WIDTH, k_tiles, dtype=f16),
            mosaic.tile(CHUNK, TILE_WIDTH, max(k_tiles, 2) + 1),
            plgpu.Barrier(num_arrivals=3 * k_tiles),
            plgpu.Barrier(num_arrivals=v_tiles),
        ],
        grid=(B, N, HV),
        grid_names=("b", "n", "h"),
    )(q, k, v, gates, beta)


def _scores(sq, sk, work, sg, k_tiles):
    """The decayed products of keys with keys (j < i) and of queries with keys (j <= i).

    Level by level of the tree of references (see `chunks.level_decay_mask`), so that no exponent
    is ever positive. A level also writes the pairs of tokens that are further apart than its
    blocks; what it writes there is overwritten by the level that they belong to.
    """
    tiles = range(k_tiles)
    # The diagonal knows no decay.
    own = mosaic.product(*((sq.at[i], sk.at[i].T) for i in tiles))
    queries = jnp.where(chunks.diagonal(), own, 0.0)

    def level_step(level, scores):
        by_key, by_query = scores
        mask = chunks.weights(chunks.level_decay_mask(level))
        plgpu.commit_smem()
        queries = []
        for i in tiles:
            decay = chunks.decays(mask, sg.at[i]).astype(bf16)
            work.at[i][...] = plgpu.load(sk.at[i], layout=TILE) * decay
            queries.append(plgpu.load(sq.at[i], layout=TILE) * decay)
        plgpu.commit_smem()
        keys = [work.at[i] for i in tiles]
        earlier = chunks.before_half(level)
        product = mosaic.product(*((x, x.T) for x in keys))
        by_key = jnp.where(earlier, product, by_key)
        product = mosaic.product(*((x, y.T) for x, y in zip(queries, keys, strict=True)))
        return by_key, jnp.where(earlier, product, by_query)

    return lax.fori_loop(0, LEVELS, level_step, (jnp.zeros_like(own), queries))
