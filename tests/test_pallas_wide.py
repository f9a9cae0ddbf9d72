"""K and V of 256: that the kernels fit. The contract's tests check their values."""

import jax
import jax.numpy as jnp

from jla.pallas.kda import kda

f32, bf16 = jnp.float32, jnp.bfloat16


def test_lowers_for_cuda():
    """Lowering checks layouts and the size of SMEM, which the interpreter does not."""
    B, T, H, HV, D = 32, 128, 1, 2, 256  # heads enough for two warpgroups in the recurrence's CTAs
    shapes = ((B, T, H, D), bf16), ((B, T, HV, D), bf16), ((B, T, HV, D), f32), ((B, T, HV), f32)
    q, v, g, beta = (jax.ShapeDtypeStruct(*shape) for shape in shapes)

    @jax.jit
    def run(*args):
        outputs, vjp = jax.vjp(lambda *args: kda(*args, None, None, scale=1.0), *args)
        return vjp(outputs)

    text = run.trace(q, q, v, g, beta).lower(lowering_platforms=("cuda",)).as_text()
    # prepare, the recurrence forward and backward, and two kernels for a chunk's gradients.
    assert text.count("@mosaic_gpu") == 5
