"""One token of PaTH around its kernel, in XLA: the cache's values and decays, and the joining of
the pieces in which the kernel reads the cache."""

import functools

import jax.numpy as jnp
from jax import lax

from jla._core.axes import PATH, letters, of_step
from jla._core.cache import PathCache, counted
from jla._core.steps import differentiable

MOST_QUERIES = 8  # query heads of a key head in one pass
LOG2E = 1.4426950408889634

_AXES = of_step(PATH)
_OUTPUTS = letters(_AXES, "o cache.key cache.value")
_DECAY = _AXES["cache.decay"]
_INPUTS = letters(_AXES, "q k v w beta cache.key cache.value cache.length g cache.decay")


def path_step(attend, formula, q, k, v, w, beta, g, cache, *, scale):
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
        of exponentials, [B, H, group, pieces]; and the new keys.
      formula: the definition's function, for derivatives.
    """
    arrays, results = [q, k, v, w, beta, cache.key, cache.value, cache.length], list(_OUTPUTS)
    if g is not None:
        arrays += [g, cache.decay]
        results.append(_DECAY)
    run = functools.partial(_run, attend, scale=scale)
    derived = functools.partial(_formula, formula, scale=scale)
    step = differentiable(run, derived, _INPUTS[: len(arrays)], tuple(results))
    o, key, value, *decay = step(*arrays)
    return o, PathCache(key, value, decay[0] if decay else None, counted(cache.length, 1))


def _formula(formula, q, k, v, w, beta, key, value, length, g=None, decay=None, *, scale):
    cache = PathCache(key, value, decay, length)
    o, cache = formula(q, k, v, w, beta, g, cache, scale=scale)
    return tuple(x for x in (o, *cache[:3]) if x is not None)


def _run(attend, q, k, v, w, beta, key, value, length, g=None, decay=None, *, scale):
    """The output and the cache's arrays, for the rows and heads of one device."""
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
        *softmax, key = attend(q, k, w, beta, key, value, length, added, scale=scale, first=first)
        o, highest, total = softmax
        weight = jnp.exp2(highest - jnp.max(highest, axis=-1, keepdims=True))
        total = jnp.sum(weight * total, axis=-1, keepdims=True)
        outputs.append(jnp.sum(weight[..., None] * o, axis=-2) / total)
    o = jnp.concatenate(outputs, axis=2).reshape(B, HQ, V)
    o = jnp.where((length < S)[:, None, None], o, jnp.nan).astype(v.dtype)
    return (o, key, value) if g is None else (o, key, value, decay)
