"""PaTH attention's step as a Triton kernel."""

import functools

import jax
import jax.numpy as jnp
import triton
from jax import lax

from jla._core.axes import PATH, letters, of_step
from jla._core.cache import PathCache, counted
from jla.reference import path_attention as reference
from jla.triton import configs, launch, steps
from jla.triton.kernels import path_step as kernels

SDS = jax.ShapeDtypeStruct
f32 = jnp.float32

LOG2E = 1.4426950408889634
MOST_QUERIES = 8  # query heads of a key head in one pass
SHORTEST, LONGEST = 256, 2048  # cached tokens of a program
PROGRAMS = 2048
TILE = 4096  # elements of the widest tile that a program holds

_AXES = of_step(PATH)
_OUTPUTS = letters(_AXES, "o cache.key cache.value")
_DECAY = _AXES["cache.decay"]
_INPUTS = letters(_AXES, "q k v w beta cache.key cache.value cache.length g cache.decay")


@functools.partial(jax.jit, static_argnames="scale")
def path_step(q, k, v, w, beta, g, cache, *, scale):
    """One token in one kernel. See `jla.path_step`.

    All arithmetic is float32, whatever the inputs' dtype. The keys are overwritten where their
    buffer is donated or is a temporary of the caller's program, and copied before the kernel
    otherwise. The value goes to its place by a scatter before the kernel and the decays are a sum;
    XLA does both in place where it may, and joins the softmaxes of the kernel's pieces.

    Floor: the keys read and written and the values read, for the tokens that there are. B=64 H=16
    K=V=128 with 8192 tokens of bfloat16 values has 10.7 GB: 2.50 ms on an H200 (4.3 TB/s).

    Derivatives are those of the reference's formula, in XLA.
    """
    arrays, results = [q, k, v, w, beta, cache.key, cache.value, cache.length], list(_OUTPUTS)
    if g is not None:
        arrays += [g, cache.decay]
        results.append(_DECAY)
    run, formula = (functools.partial(x, scale=scale) for x in (_run, _formula))
    step = steps.differentiable(run, formula, _INPUTS[: len(arrays)], tuple(results))
    o, key, value, *decay = step(*arrays)
    return o, PathCache(key, value, *(decay or [None]), counted(cache.length, 1))


def _formula(q, k, v, w, beta, key, value, length, g=None, decay=None, *, scale):
    cache = PathCache(key, value, decay, length)
    o, cache = reference.path_step(q, k, v, w, beta, g, cache, scale=scale)
    return tuple(x for x in (o, *cache[:3]) if x is not None)


def _run(q, k, v, w, beta, key, value, length, g=None, decay=None, *, scale):
    """The output and the cache's arrays."""
    (B, S, H, V), HQ = value.shape, q.shape[1]
    value = value.at[jnp.arange(B, dtype=jnp.int32), length].set(v, mode="drop")
    added = None
    if g is not None:
        before = (jnp.arange(S, dtype=jnp.int32)[None] < length[:, None])[..., None]
        # A barrier, so that the kernel's operand reads the sums and they can be made in place.
        decay = lax.optimization_barrier(jnp.where(before, decay + g[:, None], 0.0))
        added = scale * LOG2E * decay
    outputs = []
    for first in range(0, HQ // H, MOST_QUERIES):
        *softmax, key = _pass(
            q, k, w, beta, key, value, length, added, scale=scale * LOG2E, first=first
        )
        o, highest, total = softmax  # [B, H, pieces, group, ...]
        weight = jnp.exp2(highest - jnp.max(highest, axis=2, keepdims=True))
        total = jnp.sum(weight * total, axis=2)
        outputs.append(jnp.sum(weight[..., None] * o, axis=2) / total[..., None])
    o = jnp.concatenate(outputs, axis=2).reshape(B, HQ, V)
    o = jnp.where((length < S)[:, None, None], o, jnp.nan).astype(v.dtype)
    return (o, key, value) if g is None else (o, key, value, decay)


def _pass(q, k, w, beta, key, value, length, added, *, scale, first):
    """The kernel call for some query heads of every group, from `first` on.

    Returns:
      For each piece of the cache the sum of values, [B, H, pieces, group, V], the largest logit and
      the sum of exponentials, [B, H, pieces, group], all in base 2; and the keys.
    """
    (B, S, H, K), V, HQ = key.shape, value.shape[-1], q.shape[1]
    group = min(MOST_QUERIES, HQ // H - first)
    size = min(LONGEST, max(SHORTEST, S * B * H // PROGRAMS // SHORTEST * SHORTEST))
    shape = B, H, triton.cdiv(S, size), group
    BG, BK, BV = map(triton.next_power_of_2, (group, K, V))
    outputs = [SDS((*shape, V), f32), SDS(shape, f32), SDS(shape, f32), SDS(key.shape, f32)]
    return launch.call(
        kernels.path_step,
        *(q, k, w, beta, key, value, length, q if added is None else added, S),
        grid=(B * H * shape[2],),
        outputs=outputs,
        config=configs.config("path_step", launch.target()),
        constants=dict(
            **dict(SCALE=scale, HQ=HQ, H=H, K=K, V=V, GROUP=group, FIRST=first, PIECE=size),
            **dict(BG=BG, BK=BK, BV=BV, BS=max(1, TILE // (BG * max(BK, BV)))),
            **dict(MOVED=first > 0, GATES=added is not None),
        ),
        in_place={4: 3},
    )
