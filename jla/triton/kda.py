"""Kimi Delta Attention as Triton kernels."""

import functools

import jax
import triton

from jla._core.axes import KDA, letters, of_step
from jla.reference import kda as reference
from jla.triton import configs, launch, steps
from jla.triton.kernels import kda_step as step

__all__ = ["kda_step", "unsupported"]

SDS = jax.ShapeDtypeStruct

_STEP = of_step(KDA)
_STEP_INPUTS = letters(_STEP, "q k v g beta state")
_STEP_OUTPUTS = letters(_STEP, "o state")


def unsupported(name, *arrays):
    """Why the kernels of the function `name` cannot serve these arguments, or None: they serve
    all that the public function takes."""
    return None


@functools.partial(jax.jit, static_argnames="scale")
def kda_step(q, k, v, g, beta, state, *, scale):
    """One token in one kernel. See `jla.kda_step`.

    All arithmetic is float32, whatever the inputs' dtype. The state is overwritten where its buffer
    is donated or is a temporary of the caller's program, and copied before the kernel otherwise.

    Floor: the state is read once and written once, 8 HV K V bytes a row, and everything else is
    small. B=128 HV=16 K=V=128 has 0.272 GB: 0.063 ms on an H200 (4.3 TB/s), 0.14 ms on an A100
    of 1.9 TB/s, 0.32 ms on an L40S of 0.86 TB/s. About 5 operations an element of the state. For
    all kinds of GPU 117 to 132 registers a thread, nothing spilled, and 1 KB of shared memory.

    Derivatives are those of the reference's formula, in XLA.
    """
    run, formula = (functools.partial(x, scale=scale) for x in (_step, reference.kda_step))
    return steps.differentiable(run, formula, _STEP_INPUTS, _STEP_OUTPUTS)(q, k, v, g, beta, state)


def _step(q, k, v, g, beta, state, *, scale):
    B, HV, K, V = state.shape
    config = configs.config("kda_step", launch.target())
    rows = triton.next_power_of_2(K)
    # Of twice as many rows half as many columns: what a program holds in registers stays the same.
    width = min(config.blocks["BV"] * 128 // max(rows, 128), triton.next_power_of_2(V))
    return tuple(
        launch.call(
            step.kda_step,
            *(q, k, v, g, beta, state),
            grid=(B * HV * triton.cdiv(V, width),),
            outputs=[SDS(v.shape, v.dtype), SDS(state.shape, state.dtype)],
            config=config,
            constants=dict(scale=scale, H=q.shape[1], HV=HV, K=K, V=V, BK=rows, BV=width),
            in_place={5: 1},
        )
    )
