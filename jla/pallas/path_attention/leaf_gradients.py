"""The gradients of what happens inside a leaf; `leaf_gradients_phases` has the equations."""

import functools

import jax
import jax.numpy as jnp
from jax.experimental.pallas import mosaic_gpu as plgpu

from jla.pallas.common import mosaic, scratch
from jla.pallas.common.chunks import CHUNK
from jla.pallas.common.mosaic import f16, f32
from jla.pallas.common.scratch import barrier_for
from jla.pallas.path_attention import dyadic
from jla.pallas.path_attention import leaf_gradients_phases as phases
from jla.pallas.path_attention.dyadic import LEAF
from jla.pallas.path_attention.leaf_tiles import BLOCKS, ROWS, WARPGROUPS

SDS = jax.ShapeDtypeStruct
LARGEST = 0.25  # of float16 gradients, so that sums of 128 terms with |q| < 2000 stay in range


def leaf_gradients(
    q, k, w, beta, inverses, dqueries, dkeys, own, transforms, scale, *, dtype
):  # fmt: skip
    """dq, dk, dw and dbeta, of what `leaf.leaves` returns.

    Args:
      q: [B, T, HQ, K]. k, w: [B, T, H, K]. Each bf16 or float16. T a multiple of 8.
      beta: [B, H, 128 P] float32. inverses: N of each chunk, [B, H, 2 P, 64, 64] float16.
      dqueries, dkeys, transforms: gradients in two parts, as `query_gradients`, `key_gradients` and
        `transform_gradients` return them.
      own: the gradient of the leaves' own logits and its rows' largest elements, as
        `query_gradients` returns them.
      scale: what the gradients are multiplied with in the end, [B, H] float32.
      dtype: of dq, dk and dw; 16 bits.

    Returns:
      dq, dk, dw and dbeta [B, T, H] float32.

    SMEM at K=128: four regions of 32 KB and four triangles of 24 KB.
    """
    (B, T, HQ, K), (H, P) = q.shape, (k.shape[2], beta.shape[2] // LEAF)
    group, k_tiles = HQ // H, K // CHUNK
    units = _units(dqueries[1], dkeys[1], own[1], transforms[1], scale, P)
    inputs = dict(q=q, k=k, w=w, inverses=inverses, beta=beta)
    inputs |= dict(a=dqueries[0], a_factors=dqueries[1], c=dkeys[0], c_factors=dkeys[1])
    inputs |= dict(own=own[0], dh=transforms[0], **units)
    like_q = SDS(q.shape, dtype)
    out = scratch.kernel(
        functools.partial(phases.body, group=group),
        inputs=inputs,
        outputs=dict(dq=like_q, dk=like_q, dw=like_q, dbeta=SDS((B, HQ, k_tiles, P * LEAF), f32)),
        scratch=_scratch(k_tiles, q.dtype, k.dtype, w.dtype, dtype),
        automatic_barriers=False,
        reductions_cross_warps=False,
        grid=(B, P, HQ),
        grid_names=("b", "leaf", "h"),
        num_threads=WARPGROUPS,
        thread_name="wg",
    )
    dq, dk, dw = out.dq, out.dk, out.dw
    dbeta = out.dbeta.sum(2).swapaxes(1, 2)[:, :T]
    if group == 1:
        return dq, dk, dw, dbeta

    def of_group(x):
        x = x.reshape(B, T, H, group, *x.shape[3:])
        return x.sum(3, dtype=f32).astype(x.dtype)

    return dq, *(of_group(x) for x in (dk, dw, dbeta))


def _scratch(k_tiles, q_dtype, k_dtype, w_dtype, out_dtype):
    """The regions of SMEM, with all that each holds at some time, and the barriers.

    The table in `leaf_gradients_phases` says what each region holds in each phase.
    """
    tiles = ROWS * k_tiles

    def region(dtype=f16):
        return mosaic.tile(CHUNK, CHUNK, tiles, dtype=dtype)

    def features():
        return dict(tiles=region(), q=region(q_dtype), k=region(k_dtype), out=region(out_dtype))

    blocks = mosaic.tile(CHUNK, CHUNK, BLOCKS, dtype=f16)
    return dict(
        w_region=dict(tiles=region(), given=region(w_dtype)),
        beta_w=region(),
        first=features(),
        second=features(),
        triangles=dict(lower_and_other=[blocks, blocks], out=region(out_dtype)),
        inverse=blocks,
        beta_c=blocks,
        zeros=plgpu.SMEM((WARPGROUPS,), jnp.int32),
        loaded=barrier_for(dict(w=tiles, k=tiles, q=tiles, inverses=ROWS, own=BLOCKS)),
        a_loaded=barrier_for(dict(a=tiles)),
        c_loaded=barrier_for(dict(c=tiles)),
        dh_loaded=barrier_for(dict(dh=k_tiles * k_tiles)),
        k_loaded_again=barrier_for(dict(k=tiles)),
        shared=plgpu.Barrier(num_arrivals=WARPGROUPS),
    )


def _units(query_factors, key_factors, largest_own, transform_factors, scale, leaves):
    """Each leaf's unit of gradients: what brings them to float16, back, and dH to the unit."""
    B, H = scale.shape

    def largest(x, axis=-1):
        return x.max(axis)

    def of_leaves(factors, place):
        x = largest(factors.reshape(B, H, -1, factors.shape[-1] // LEAF, LEAF), (2, 4))
        places = jax.vmap(lambda i: place(i, leaves))(jnp.arange(leaves, dtype=jnp.int32))
        return jnp.where(places >= 0, x[..., jnp.maximum(places, 0)], 0.0)

    unit = largest(largest_own.reshape(B, H, -1, leaves, LEAF), (2, 4))
    transform_factors = transform_factors[:, :, :leaves]
    unit = jnp.maximum(unit, transform_factors)
    unit = jnp.maximum(unit, of_leaves(query_factors, dyadic.first_query))
    unit = jnp.maximum(unit, of_leaves(key_factors, dyadic.first_key))
    unit = jnp.maximum(unit, 1e-30) / LARGEST
    return dict(shrink=1.0 / unit, grow=unit * scale[..., None], ratio=transform_factors / unit)
