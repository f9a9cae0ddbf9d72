"""PaTH attention's step as a Triton kernel."""

import functools

import jax
import jax.numpy as jnp
import triton

from jla._core import path_step as around
from jla.reference import path_attention as reference
from jla.triton import configs, launch
from jla.triton.kernels import path_step as kernels

SDS = jax.ShapeDtypeStruct
f32 = jnp.float32

SHORTEST, LONGEST = 256, 2048  # cached tokens of a program
PROGRAMS = 2048
TILE = 4096  # elements of the widest tile that a program holds


@functools.partial(jax.jit, static_argnames="scale")
def path_step(q, k, v, w, beta, g, cache, *, scale, slots=None):
    """One token in one kernel. See `jla.path_step`.

    All arithmetic is float32, whatever the inputs' dtype. The keys are overwritten where their
    buffer is donated or is a temporary of the caller's program, and copied before the kernel
    otherwise. `around.path_step` is what XLA does.

    Floor: the keys read and written and the values read, for the tokens that there are. B=64 H=16
    K=V=128 with 8192 tokens of bfloat16 values has 10.7 GB: 2.50 ms on an H200 (4.3 TB/s).

    Derivatives are those of the reference's formula, in XLA.
    """
    options = dict(scale=scale) if slots is None else dict(scale=scale, slots=slots)
    return around.path_step(_pass, reference.path_step, q, k, v, w, beta, g, cache, **options)


def _pass(q, k, w, beta, key, value, length, added, *, scale, first, moved, slots=None):
    """The kernel call for some query heads of every group; see `around.path_step`."""
    (S, H, K), V, (B, HQ, _) = key.shape[1:], value.shape[-1], q.shape
    kernel, on_pool = kernels.path_step, ()
    if slots is not None:
        kernel, on_pool = kernels.path_step_on_pool, (slots, key.shape[0])
    group = min(around.MOST_QUERIES, HQ // H - first)
    size = min(LONGEST, max(SHORTEST, S * B * H // PROGRAMS // SHORTEST * SHORTEST))
    shape = B, H, triton.cdiv(S, size), group
    BG, BK, BV = map(triton.next_power_of_2, (group, K, V))
    outputs = [SDS((*shape, V), f32), SDS(shape, f32), SDS(shape, f32), SDS(key.shape, key.dtype)]
    *softmax, key = launch.call(
        kernel,
        *(q, k, w, beta, key, value, length, q if added is None else added, S, *on_pool),
        grid=(B * H * shape[2],),
        outputs=outputs,
        config=configs.config("path_step", launch.target()),
        constants=dict(
            **dict(SCALE=scale * around.LOG2E, HQ=HQ, H=H, K=K, V=V),
            **dict(GROUP=group, FIRST=first, PIECE=size),
            **dict(BG=BG, BK=BK, BV=BV, BS=max(1, TILE // (BG * max(BK, BV)))),
            **dict(MOVED=moved, GATES=added is not None),
        ),
        in_place={4: 3},
    )
    return *(jnp.swapaxes(x, 2, 3) for x in softmax), key
