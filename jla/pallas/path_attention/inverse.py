"""The inverse of a chunk's unit lower triangular matrix, as a function with a gradient."""

import jax
import jax.numpy as jnp
from jax import lax

from jla.pallas.common import chunks, mosaic
from jla.pallas.common.chunks import CHUNK
from jla.pallas.common.mosaic import TILE, f32, load

SDS = jax.ShapeDtypeStruct


@jax.custom_vjp
def inverse(a):
    """(I + a)^-1 for strictly lower triangular a, [B, H, N, 64, 64] float32; to 2**-16.

    One warpgroup a chunk. Bytes at B=8 T=4096 H=16: 134 MB read, 134 MB written, 0.06 ms.
    """
    B, H, N = a.shape[:3]

    def body(a_ref, out, scratch):
        at = tuple(lax.axis_index(name) for name in ("b", "n", "h"))
        at = at[0], at[2], at[1]
        x = load(a_ref.at[at], TILE, optimized=False)
        out.at[at][...] = chunks.unit_triangular_inverse(x, (scratch.at[0], scratch.at[1]))

    return mosaic.kernel(
        body,
        out_type=SDS(a.shape, f32),
        scratch_types=[mosaic.tile(CHUNK, CHUNK, 2)],
        grid=(B, N, H),
        grid_names=("b", "n", "h"),
    )(a)


def _forward(a):
    x = inverse(a)
    return x, x


def _backward(x, dx):
    transposed = jnp.swapaxes(x, -1, -2)
    return (-jnp.matmul(transposed, jnp.matmul(dx, transposed)),)


inverse.defvjp(_forward, _backward)
