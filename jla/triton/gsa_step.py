"""GSA's step as a Triton kernel."""

import functools

import jax
import jax.numpy as jnp
import triton

from jla._core import steps
from jla._core.axes import GSA, of_step
from jla._core.states import GSAState
from jla.reference import gsa as reference
from jla.triton import configs, launch
from jla.triton.kernels import gsa_step as kernels

SDS = jax.ShapeDtypeStruct
f32 = jnp.float32

TILE = 8192  # elements of a state that a program holds at a time

_STATES = "state.hk state.hv"


@functools.partial(jax.jit, static_argnames="scale")
def gsa_step(q, k, v, s, g, state, *, scale, slots=None):
    """One token in one kernel. See `jla.gsa_step`.

    All arithmetic is float32, whatever the inputs' dtype. The states are overwritten where their
    buffers are donated or are temporaries of the caller's program, and copied before the kernel
    otherwise.

    Floor: both states are read once and written once, 8 H M (K + V) bytes a row, and everything
    else is small. B=128 H=16 K=V=128 M=64 has 0.268 GB: 0.063 ms on an H200 (4.3 TB/s).

    Derivatives are those of the reference's formula, in XLA.
    """
    run, formula = (functools.partial(x, scale=scale) for x in (_step, _formula))
    names, arrays = f"q k v s g {_STATES}", (q, k, v, s, g, *state)
    axes, results = of_step(GSA), f"o {_STATES}"
    o, hk, hv = steps.call(run, formula, axes, names, results, *arrays, slots=slots)
    return o, GSAState(hk, hv)


def _formula(q, k, v, s, g, hk, hv, slots=None, *, scale):
    options = dict(scale=scale, slots=slots)
    o, state = reference.gsa_step(q, k, v, s, g, GSAState(hk, hv), **options)
    return o, *state


def _step(q, k, v, s, g, hk, hv, slots=None, *, scale):
    (H, K, M), V, (B, HQ, _) = hk.shape[1:], v.shape[-1], q.shape
    kernel, on_pool = kernels.gsa_step, ()
    if slots is not None:
        kernel, on_pool = kernels.gsa_step_on_pool, (slots, hk.shape[0])
    power = triton.next_power_of_2
    BM = power(M)
    return tuple(
        launch.call(
            kernel,
            *(q, k, v, s, g, hk, hv, *on_pool),
            grid=(B * H,),
            outputs=[SDS((B, HQ, V), v.dtype), SDS(hk.shape, f32), SDS(hv.shape, f32)],
            config=configs.config("gsa_step", launch.target()),
            constants=dict(
                **dict(scale=scale, HQ=HQ, H=H, K=K, V=V, M=M, BM=BM, BG=power(HQ // H)),
                **dict(BK=min(power(K), TILE // BM), BV=min(power(V), TILE // BM)),
            ),
            in_place={5: 1, 6: 2},
        )
    )
