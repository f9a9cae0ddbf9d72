"""What the kernels of one token of a layer share: where they serve, derivatives, norms and gates.

These kernels have all of a layer's parts around its step. Each CTA has a whole head, because heads
are normalised.
"""

import jax
import jax.numpy as jnp
from jax import lax
from jax.custom_batching import custom_vmap

from jla._core.interpreter import interpreting
from jla._core.whole import carries_shardings
from jla.pallas.common import mosaic
from jla.pallas.common.mosaic import f32

EPSILON = 1e-6  # of the l2 norm, as `jla._core.parts` has it
LARGEST = 128  # features of a head


def unsupported_here(*arrays):
    """Why there are no such kernels where they would run, or None: nothing splits them yet."""
    if any(isinstance(x, jax.Array) and carries_shardings(x) for x in arrays):
        return "types carry shardings, and the kernels of one token are not split over devices"
    if interpreting():
        return None
    if (devices := jax.device_count()) != 1:
        return f"there are {devices} devices, and the kernels of one token are not split over them"
    if not jax.sharding.get_abstract_mesh().empty:
        return "there is a mesh, and the kernels of one token are not split over one"
    return None


def unsupported_heads(**sizes):
    """Why kernels cannot serve heads of these features, by name, or None."""
    for name, size in sizes.items():
        if size % 16 or size > LARGEST:
            return f"{name}={size}, and the token's kernel takes multiples of 16 up to {LARGEST}"
    return None


def by_formula(kernel, formula, *arrays):
    """kernel(*arrays), a tuple of arrays; under vmap, and its derivatives, formula(*arrays)."""
    run = custom_vmap(lambda *arrays: kernel(*arrays))

    @run.def_vmap
    def _(size, in_batched, *arrays):
        axes = [0 if batched else None for batched in in_batched]
        out = jax.vmap(formula, axes, axis_size=size)(*arrays)
        return out, jax.tree.map(lambda _: True, out)

    call = jax.custom_jvp(lambda *arrays: run(*arrays))

    @call.defjvp
    def _(primals, tangents):
        return call(*primals), jax.jvp(formula, primals, tangents)[1]

    return call(*arrays)


def load(ref, layout):
    """A row of features from GMEM, as float32."""
    return mosaic.load(ref, layout, optimized=False)


def unit(x):
    """A head's vector over its length."""
    return x * length_inverse(x)


def length_inverse(x):
    """One over the length of a head's vector."""
    return lax.rsqrt(jnp.sum(x * x) + EPSILON)


def normed(x, scale, epsilon):
    """A head's RMSNorm."""
    return x * lax.rsqrt(jnp.sum(x * x) * (1.0 / x.shape[0]) + epsilon) * scale


def softplus(x):
    """log(1 + exp(x)), of large x too."""
    return jnp.maximum(x, 0.0) + jnp.log(1.0 + jnp.exp(0.0 - jnp.abs(x)))


def scalar(x):
    """A number from GMEM, as float32."""
    return x.astype(f32)
