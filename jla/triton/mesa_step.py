"""MesaNet's step as a Triton kernel."""

import functools

import jax
import jax.numpy as jnp
import triton

from jla._core import steps
from jla._core.axes import MESA_NET, of_step
from jla._core.states import MesaState
from jla.reference import mesa_net as reference
from jla.triton import configs, launch
from jla.triton.kernels import mesa_step as kernels

SDS = jax.ShapeDtypeStruct
f32 = jnp.float32

# To `shardwise` each axis of an array has a letter of its own.
_KK = MESA_NET["initial_state.kk"].replace("K K", "K J")
_AXES = of_step(MESA_NET) | {"state.kk": _KK, "lamb": "B H K"}
_STATES = "state.kk state.kv"


@functools.partial(jax.jit, static_argnames="cg_steps")
def mesa_step(q, k, v, g, beta, lamb, state, *, cg_steps, slots=None):
    """One token in one kernel. See `jla.mesa_step`.

    All arithmetic is float32, whatever the inputs' dtype. The states are overwritten where their
    buffers are donated or temporaries of the caller's program, and copied before the kernel
    otherwise. Derivatives are those of the reference's formula, in XLA.
    """
    lamb = jnp.broadcast_to(lamb, q.shape)
    # A row stops when its residual is this much smaller than its query.
    tolerance = 1e-6 if q.dtype == f32 else 1e-4
    run = functools.partial(_step, steps=cg_steps, tolerance=tolerance)
    formula = functools.partial(_formula, steps=cg_steps)
    names, arrays = f"q k v g beta lamb {_STATES}", (q, k, v, g, beta, lamb, *state)
    o, kk, kv = steps.call(run, formula, _AXES, names, f"o {_STATES}", *arrays, slots=slots)
    return o, MesaState(kk, kv)


def _formula(q, k, v, g, beta, lamb, kk, kv, slots=None, *, steps):
    arrays = q, k, v, g, beta, lamb, MesaState(kk, kv)
    o, state = reference.mesa_step_by_row(*arrays, cg_steps=steps, slots=slots)
    return o, *state


def _step(q, k, v, g, beta, lamb, kk, kv, slots=None, *, steps, tolerance):
    """The kernel call."""
    (B, H, K), V = q.shape, v.shape[-1]
    kernel, on_pool, heads = kernels.mesa_step, (), {}
    if slots is not None:
        kernel, on_pool, heads = kernels.mesa_step_on_pool, (slots, kk.shape[0]), dict(H=H)
    config = configs.config("mesa_step", launch.target())
    rows = max(16, triton.next_power_of_2(K))
    whole = rows <= 128
    part = min(config.blocks["BV"] * 128 // max(rows, 128), max(16, triton.next_power_of_2(V)))
    o, _, kk, kv = launch.call(
        kernel,
        *(q, k, v, g, beta, lamb, kk, kv, steps, *on_pool),
        grid=(B * H,),
        outputs=[
            SDS(v.shape, v.dtype),
            SDS((1,) if whole else (B, H, rows), f32),
            SDS(kk.shape, f32),
            SDS(kv.shape, f32),
        ],
        config=config,
        constants=dict(K=K, V=V, BK=rows, BV=part, WHOLE=whole, TOLERANCE=tolerance) | heads,
        in_place={6: 2, 7: 3},
    )
    return o, kk, kv
