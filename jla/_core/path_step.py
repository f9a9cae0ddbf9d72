"""One token of PaTH around its kernel, in XLA: the cache's values and decays, and the joining of
the pieces in which the kernel reads the cache."""

import functools

import jax.numpy as jnp
from jax import lax

from jla._core import pools
from jla._core.axes import PATH, letters, of_step
from jla._core.cache import PathCache, counted
from jla._core.steps import differentiable

MOST_QUERIES = 8  # query heads of a key head in one pass
LOG2E = 1.4426950408889634

_AXES = of_step(PATH)
_OUTPUTS = "o cache.key cache.value"
_INPUTS = "q k v w beta cache.key cache.value cache.length"


def path_step(attend, formula, q, k, v, w, beta, g, cache, *, scale, slots=None):
    """`jla.path_step` with a kernel.

    The value goes to its place by a scatter before the kernel, and the decays are a sum: XLA does
    both in place where it may.

    Args:
      attend: the kernel, for some of each key head's query heads at a time:
        `attend(q, k, w, beta, key, value, length, added, scale=, first=)`, with `value` and the
        decays `added` (times `scale`, in base 2, [B, S, HQ]; or None) as they are after this token,
        and `key` as `first`, the number of the pass's first query head in its group, says: 0, then
        the kernel moves the keys, and else an earlier pass has. It returns for each piece of the
        cache the sum of values, [B, H, group, pieces, V], the largest logit in base 2 and the sum
        of exponentials, [B, H, group, pieces]; and the new keys. With `slots=` key and value are
        pools; length and added are the rows'. Of a row without a sequence it may return anything.
      formula: the definition's function, for derivatives.
    """
    arrays, inputs, outputs = [q, k, v, w, beta, *cache[:2], cache.length], _INPUTS, _OUTPUTS
    axes, options = _AXES, dict(scale=scale)
    if g is not None:
        arrays += [g, cache.decay]
        inputs, outputs = f"{inputs} g cache.decay", f"{outputs} cache.decay"
    if slots is not None:
        arrays.append(slots)
        axes, inputs = pools.of_pool(_AXES), f"{inputs} slots"
        options |= dict(on_pool=True)
    run = functools.partial(_run, attend, **options)
    derived = functools.partial(_formula, formula, **options)
    step = differentiable(run, derived, letters(axes, inputs), letters(axes, outputs))
    o, key, value, *decay = step(*arrays)
    if slots is None:
        length = counted(cache.length, 1)
    else:
        length = pools.put(cache.length, counted(pools.take(cache.length, slots), 1), slots)
    return o, PathCache(key, value, decay[0] if decay else None, length)


def _optional(rest, on_pool):
    """g, the decays and the slots, or None, of the operands behind the cache's length."""
    *gates, slots = rest if on_pool else (*rest, None)
    return *(gates or (None, None)), slots


def _formula(formula, q, k, v, w, beta, key, value, length, *rest, scale, on_pool=False):
    g, decay, slots = _optional(rest, on_pool)
    cache = PathCache(key, value, decay, length)
    o, cache = formula(q, k, v, w, beta, g, cache, scale=scale, slots=slots)
    return tuple(x for x in (o, *cache[:3]) if x is not None)


def _run(attend, q, k, v, w, beta, key, value, length, *rest, scale, on_pool=False):
    """The output and the cache's arrays, for the rows and heads of one device."""
    g, decay, slots = _optional(rest, on_pool)
    if slots is not None:
        return _run_on_pool(attend, q, k, v, w, beta, key, value, length, g, decay, slots, scale)
    B, S = value.shape[:2]
    value = value.at[jnp.arange(B, dtype=jnp.int32), length].set(v, mode="drop")
    added = None
    if g is not None:
        before = (jnp.arange(S, dtype=jnp.int32)[None] < length[:, None])[..., None]
        # A barrier, so that the kernel's operand reads the sums and they can be made in place.
        decay = lax.optimization_barrier(jnp.where(before, decay + g[:, None], 0.0))
        added = scale * LOG2E * decay
    attend = functools.partial(attend, scale=scale)
    o, key = _joined(attend, q, k, w, beta, key, value, length, added)
    o = jnp.where((length < S)[:, None, None], o, jnp.nan).astype(v.dtype)
    return (o, key, value) if g is None else (o, key, value, decay)


def _run_on_pool(attend, q, k, v, w, beta, key, value, length, g, decay, slots, scale):
    """`_run` of a pool's rows. Of its decays, a small part of it, the rows are gathered."""
    R, S = value.shape[:2]
    length = pools.take(length, slots)
    value = value.at[pools.rows(slots, R), length].set(v, mode="drop")
    added = None
    if g is not None:
        before = (jnp.arange(S, dtype=jnp.int32)[None] < length[:, None])[..., None]
        of_rows = jnp.where(before, pools.take(decay, slots) + g[:, None], 0.0)
        of_rows = lax.optimization_barrier(of_rows)  # as in `_run`
        decay, added = pools.put(decay, of_rows, slots), scale * LOG2E * of_rows
    attend = functools.partial(attend, scale=scale, slots=slots)
    o, key = _joined(attend, q, k, w, beta, key, value, length, added)
    o = jnp.where((length < S)[:, None, None], o, jnp.nan).astype(v.dtype)
    o = pools.zero_unless(pools.live(slots, R), o)
    return (o, key, value) if g is None else (o, key, value, decay)


def _joined(attend, q, k, w, beta, key, value, length, added):
    """The outputs in float32, of all query heads, and the new keys."""
    (H, V), (B, HQ, _) = value.shape[2:], q.shape
    outputs = []
    for first in range(0, HQ // H, MOST_QUERIES):
        *softmax, key = attend(q, k, w, beta, key, value, length, added, first=first)
        o, highest, total = softmax
        weight = jnp.exp2(highest - jnp.max(highest, axis=-1, keepdims=True))
        total = jnp.sum(weight * total, axis=-1, keepdims=True)
        outputs.append(jnp.sum(weight[..., None] * o, axis=-2) / total)
    return jnp.concatenate(outputs, axis=2).reshape(B, HQ, V), key
