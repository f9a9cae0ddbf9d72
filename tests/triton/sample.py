"""A kernel that has all that `launch.call` takes, for its tests."""

import jax
import jax.numpy as jnp
import triton
import triton.language as tl

from jla.triton import configs, launch

CONFIG = configs.Config({"BLOCK": 64, "UNUSED": 1}, warps=1, stages=1)


@triton.jit
def accumulate(n, x, factor, state, o, new_state, BLOCK: tl.constexpr, UNUSED: tl.constexpr):
    """state += factor x, and o what it was, the first n places of each."""
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    before = tl.load(state + i, i < n, 0.0)
    tl.store(o + i, before.to(o.dtype.element_ty), i < n)
    tl.store(state + i, before + factor * tl.load(x + i, i < n, 0.0).to(tl.float32), i < n)


def accumulated(n, x, factor, state):
    """o, with 16 bits as x, and the new state."""
    outputs = [jax.ShapeDtypeStruct(x.shape, x.dtype), jax.ShapeDtypeStruct(x.shape, jnp.float32)]
    return launch.call(
        accumulate,
        *(n, x, factor, state),
        grid=(triton.cdiv(n, 32),),
        outputs=outputs,
        config=CONFIG,
        constants=dict(BLOCK=32),
        in_place={3: 1},
    )
