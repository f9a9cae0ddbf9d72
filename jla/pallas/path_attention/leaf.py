"""What happens inside the leaves of the tree: each chunk's inverse, then leaves of two chunks.

With N = (I + strict_lower(diag(beta) W W^T))^-1, M = N diag(beta) and W' = M W, the transform of a
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
from jla.pallas.common.mosaic import PER_ROW, f16, f32, load, per_row, product
from jla.pallas.common.scratch import barrier_for, fetch
from jla.pallas.path_attention import dyadic, leaf_phases
from jla.pallas.path_attention.dyadic import LEAF

SDS = jax.ShapeDtypeStruct


def inverses(w, beta):
    """(I + strict_lower(diag(beta) W W^T))^-1 of every chunk of 64 tokens.

    A float32 w is rounded to float16; beta |w|^2 stays what it was, so that reflections are ones.

    Args:
      w: [B, T, H, K], 16 bits or float32, K a multiple of 64, T a multiple of 8.
      beta: [B, H, TP] float32; TP is T padded with zeros to whole leaves.

    Returns:
      [B, H, TP / 64, 64, 64] float16: with unit rows of w no element is larger than beta. And, if w
      is float32, its float16 and the factors for beta, [B, H, TP] float32; else w and None.

    One warpgroup a chunk; SMEM 32 KB, 48 KB of a float32 w. Floor at B=8 T=4096 H=16 K=128: 201 MB,
    0.05 ms; 469 MB, 0.11 ms.
    """
    (B, _, H, K), N, rounds = w.shape, beta.shape[2] // CHUNK, w.dtype == f32
    k_tiles = K // TILE_WIDTH
    whole = plgpu.SMEM((CHUNK, K), f32, transforms=mosaic.TRANSFORMS_F32)
    two_tiles = mosaic.tile(CHUNK, CHUNK, 2, dtype=f16)
    out = scratch.kernel(
        _inverse,
        inputs=dict(w=w, beta=beta),
        outputs=dict(
            inverses=SDS((B, H, N, CHUNK, CHUNK), f16),
            rounded=SDS(w.shape, f16) if rounds else None,
            ratio=SDS(beta.shape, f32) if rounds else None,
        ),
        scratch=dict(
            w_tiles=mosaic.tile(CHUNK, TILE_WIDTH, k_tiles, dtype=f16 if rounds else w.dtype),
            region=dict(given=whole, two=two_tiles) if rounds else dict(two=two_tiles),
            w_loaded=barrier_for(dict(w=1 if rounds else k_tiles)),
        ),
        automatic_barriers=False,
        reductions_cross_warps=False,
        grid=(B, N, H),
        grid_names=("b", "n", "h"),
    )
    return (out.inverses, out.rounded, out.ratio) if rounds else (out.inverses, w, None)


def _inverse(refs):
    """A chunk's."""
    b, n, h = (lax.axis_index(name) for name in ("b", "n", "h"))
    rows, tiles = pl.ds(n * CHUNK, CHUNK), range(refs.w_tiles.shape[0])
    w, columns = [refs.w_tiles.at[i] for i in tiles], [leaf_phases.columns(i) for i in tiles]
    if refs.rounded is None:
        fetch(dict(w=[(refs.w.at[b, rows, h, columns[i]], w[i]) for i in tiles]), refs.w_loaded)
    else:
        fetch(dict(w=(refs.w.at[b, rows, h], refs.region.given)), refs.w_loaded)
    strength = load(refs.beta.at[b, h, rows], PER_ROW, optimized=False)
    plgpu.barrier_wait(refs.w_loaded)
    if refs.rounded is not None:
        ratio = _round(refs.region.given, w)
        refs.ratio.at[b, h, rows][...] = ratio
        strength *= ratio
        for tile, at in zip(w, columns, strict=True):
            plgpu.copy_smem_to_gmem(tile, refs.rounded.at[b, rows, h, at])
    a = product(*((x, x.T) for x in w))
    x = _unit_triangular_inverse(a * per_row(strength, CHUNK), refs.region.two)
    staging = refs.region.two.at[0]
    staging[...] = x.astype(f16)
    plgpu.commit_smem()
    plgpu.copy_smem_to_gmem(staging, refs.inverses.at[b, h, n])
    plgpu.wait_smem_to_gmem(0, wait_read_only=True)


def _round(given, tiles):
    """Stores w as float16; returns what its rows' squares have shrunk by."""
    before = after = None
    for i, tile in enumerate(tiles):
        x = load(given.at[:, leaf_phases.columns(i)])
        tile[...] = y = x.astype(f16)
        squares = [(z * z).sum(axis=1) for z in (x, y.astype(f32))]
        before, after = (
            z if s is None else s + z for s, z in zip((before, after), squares, strict=True)
        )
    plgpu.commit_smem()
    return before / jnp.where(after == 0.0, 1.0, after)


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

    Of a chunk alone, with A = lower(Q W^T) and C = strict_lower(W K^T):

        logits = Q K^T - A M C;   Q~ = Q - A W';   K~ = K - (M C)^T W

    Then the second chunk's queries see the first's keys as Q~_1 K~_0^T, Q~_1 is moved on by H_0,
    and K~_0 by H_1; see `leaf_phases`.

    Args:
      q: [B, T, HQ, K], bf16 or float16. k, w: [B, T, H, K], each of q's type or float16; both
        float16 if only k is. K 64 or 128, T a multiple of 8.
      inverse: as `inverses` returns it. beta: as it takes it.
      gates: None, or for each query head, [B, HQ, TP], the sum of the leaf's gates up to and with
        each token's, float32, and the place in its leaf of the first token that it sees, uint32.
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

    SMEM at K=128: 216 KB. Floor at B=8 T=4096 H=HQ=16 K=128: 0.97 GB, 0.12 TFLOP, 0.23 ms.
    """
    (B, _, HQ, K), (H, N) = q.shape, inverse.shape[1:3]
    P, k_tiles = N // 2, K // TILE_WIDTH
    since, earliest = (None, None) if gates is None else gates
    leaves_of_queries, leaves_of_keys = sum(dyadic.query_counts(P)), sum(dyadic.key_counts(P))
    return scratch.kernel(
        functools.partial(leaf_phases.body, group=HQ // H, scale=scale),
        inputs=dict(
            q=q,
            k=k,
            w=w,
            inverse=inverse,
            beta=beta,
            since_rows=since,
            since_columns=since,
            earliest=earliest,
        ),
        outputs=dict(
            queries=SDS((B, HQ, max(leaves_of_queries, 1) * LEAF, K), f16),
            keys=SDS((B, H, max(leaves_of_keys, 1) * LEAF, K), f16),
            logits=SDS((B, HQ, P, 3, CHUNK, CHUNK), f16),
            tops=SDS((B, HQ, P, 3, CHUNK), f32),
            transforms=SDS((B, H, sum(dyadic.block_counts(P)), K, K), f16),
        ),
        scratch=_scratch(k_tiles, q.dtype, w.dtype),
        automatic_barriers=False,
        grid=(B, P, H),
        grid_names=("b", "leaf", "h"),
        num_threads=4,
        thread_name="wg",
    )


def _scratch(k_tiles, q_dtype, w_dtype):
    """Tiles of both chunks, [2, k_tiles, 64, 64] of features; `leaf_phases` says what they hold."""

    def features(dtype=f16):
        return mosaic.tile(CHUNK, TILE_WIDTH, 2, k_tiles, dtype=dtype)

    def triangles():
        return mosaic.tile(CHUNK, CHUNK, 2, dtype=f16)

    def made(stages=()):
        """By one warpgroup, whose arrival is awaited by others."""
        return plgpu.Barrier(num_barriers=stages)

    return dict(
        sq=features(q_dtype),
        sk=features(w_dtype),
        sw=features(),
        smw=features(),
        sinverse=triangles(),
        smc=triangles(),
        sk_moved=features(),
        se=mosaic.tile(CHUNK, CHUNK, dtype=f16),
        staging=mosaic.tile(CHUNK, TILE_WIDTH, 2, dtype=f16),
        q_loaded=barrier_for(dict(q=k_tiles), 2),
        k_loaded=barrier_for(dict(k=k_tiles), 2),
        w_loaded=barrier_for(dict(w=k_tiles), 2),
        inverse_loaded=barrier_for(["inverse"], 2),
        mc_made=made(2),
        mw_made=made(2),
        k_made=made(),
        e_made=made(),
        mw_moved=made(),
    )
