"""One token of PaTH around its kernel, in XLA: the cache's values and decays, and the joining of
the pieces in which the kernel reads the cache."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from jla._core import pools
from jla._core.axes import LAZY_PATH, PATH, letters, of_step
from jla._core.cache import (
    RECENT,
    LazyPathCache,
    PathCache,
    counted,
    first_recent,
    rows_from,
    with_rows,
)
from jla._core.path_lazy import after_token, emptied, is_full
from jla._core.steps import differentiable

MOST_QUERIES = 8  # query heads of a key head in one pass
LOG2E = 1.4426950408889634
NEVER = -1e30  # below all logits, and finite

_AXES = of_step({**PATH, **LAZY_PATH})
_OUTPUTS = "o cache.key cache.value"
_INPUTS = "q k v w beta cache.key cache.value cache.length"


def path_step(
    attend, formula, q, k, v, w, beta, g, cache, *, scale, slots=None, lazy=None, move_on=None
):  # fmt: skip
    """`jla.path_step` with a kernel, from a cache of either kind; of a lazy one there are no pools.

    The value goes to its place by a scatter before the kernel, and the decays are a sum: XLA does
    both in place where it may.

    Args:
      attend: the kernel, for some of each key head's query heads at a time:
        `attend(q, k, w, beta, key, value, length, added, scale=, first=, moved=)`, with `value` and
        the decays `added` (times `scale`, in base 2, [B, S, HQ]; or None) as they are after this
        token; `first` is the number of the pass's first query head in its group, and `moved` says
        that `key` is as after this token, too, and is not to be written. If not, the kernel moves
        the keys and adds the token's. It reads the places up to `length` and with it. It returns
        for each piece of the cache the sum of values, [B, H, group, pieces, V], the largest logit
        in base 2 and the sum of exponentials, [B, H, group, pieces]; and the new keys. With
        `slots=` key and value are pools; length and added are the rows'. Of a row without a
        sequence it may return anything.
      formula: the definition's function, for derivatives.
      lazy: a function that does what `_lazy` does, of at most MOST_QUERIES query heads to a key
        head; or None.
      move_on: a kernel that does what `moved_on` does, or None.
    """
    if isinstance(cache, LazyPathCache):
        if lazy is None or q.shape[1] // k.shape[1] > MOST_QUERIES:
            lazy = functools.partial(_lazy, attend, move_on or moved_on)
        return _lazy_step(lazy, formula, q, k, v, w, beta, g, cache, scale)
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
    S = value.shape[1]
    value, decay, added = _appended(v, g, value, decay, length, scale)
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


def _appended(v, g, value, decay, length, scale):
    """The values and decays after this token, and the latter as the kernels add them to logits."""
    value = value.at[jnp.arange(value.shape[0], dtype=jnp.int32), length].set(v, mode="drop")
    return value, *((None, None) if g is None else with_decay(g, decay, length, scale))


def with_decay(g, decay, length, scale):
    """The decays after this token, and as the kernels add them to logits."""
    before = (jnp.arange(decay.shape[1], dtype=jnp.int32)[None] < length[:, None])[..., None]
    # A barrier, so that the kernel's operand reads the sums and they can be made in place.
    decay = lax.optimization_barrier(jnp.where(before, decay + g[:, None], 0.0))
    return decay, scale * LOG2E * decay


def _joined(attend, q, k, w, beta, key, value, length, added, more=None):
    """The outputs in float32, of all query heads, and the new keys.

    Args:
      more: one piece more of what the queries read, as `attend` returns it of all heads; then the
        keys are moved already.
    """
    (H, V), (B, HQ, _) = value.shape[2:], q.shape
    outputs = []
    for first in range(0, HQ // H, MOST_QUERIES):
        moved = first > 0 or more is not None
        *softmax, key = attend(q, k, w, beta, key, value, length, added, first=first, moved=moved)
        if more is not None:
            rest = (x[:, :, first : first + MOST_QUERIES] for x in more)
            softmax = [jnp.concatenate(x, axis=3) for x in zip(softmax, rest, strict=True)]
        outputs.append(_sum_of_pieces(*softmax))
    return jnp.concatenate(outputs, axis=2).reshape(B, HQ, V), key


def _sum_of_pieces(o, highest, total):
    weight = jnp.exp2(highest - jnp.max(highest, axis=-1, keepdims=True))
    total = jnp.sum(weight * total, axis=-1, keepdims=True)
    return jnp.sum(weight[..., None] * o, axis=-2) / total


def joined(o, highest, total):
    """The outputs [B, HQ, V] of all pieces, that a kernel returns as [B, H, group, pieces, ...]."""
    o = _sum_of_pieces(o, highest, total)
    B, H, group, V = o.shape
    return o.reshape(B, H * group, V)


def _lazy_step(lazy, formula, q, k, v, w, beta, g, cache, scale):
    """`path_step` from and to a `LazyPathCache`."""
    given = cache._asdict()
    if g is None:
        del given["decay"]
    arrays = dict(q=q, k=k, v=v, w=w, beta=beta) | given | ({} if g is None else dict(g=g))
    results = tuple(name for name in given if name != "length")
    run, derived = (
        functools.partial(_named, f, tuple(arrays), results, scale=scale) for f in (lazy, formula)
    )
    operands = tuple(_AXES.get(name, _AXES.get(f"cache.{name}")) for name in arrays)
    outputs = letters(_AXES, " ".join(("o", *(f"cache.{name}" for name in results))))
    o, *new = differentiable(run, derived, operands, outputs)(*arrays.values())
    after: dict[str, Any] = dict(decay=None) | dict(zip(results, new, strict=True))
    return o, LazyPathCache(**after, length=counted(cache.length, 1))


def _named(step, names, results, *arrays, scale):
    """A step of arrays with these names: the output, and those of the cache's arrays after it."""
    given: dict[str, Any] = dict(decay=None, g=None)
    given |= dict(zip(names, arrays, strict=True))
    cache = LazyPathCache(**{name: given.pop(name) for name in LazyPathCache._fields})
    o, cache = step(**given, cache=cache, scale=scale)
    return o, *(getattr(cache, name) for name in results)


def _lazy(attend, move_on, q, k, v, w, beta, g, cache, *, scale):
    """The output and the cache's arrays, for the rows and heads of one device.

    The kernel reads the settled keys alone, and writes none. The recent keys, one of 128 bytes of
    a long row's, are XLA's; `move_on` moves the keys of those rows that do.
    """
    S, length = cache.value.shape[1], cache.length
    value, decay, added = _appended(v, g, cache.value, cache.decay, length, scale)
    of_token = (x.astype(jnp.float32) for x in (q, k, w, beta))
    recent, change, back = after_token(cache.recent, cache.change, length, S, *of_token)
    settled = first_recent(length, S)
    own = _read_recent(q, recent, value, added, settled, length, scale)
    attend = functools.partial(attend, scale=scale)
    arrays = back, k, w, beta, cache.key, value, settled - 1, added
    o, key = _joined(attend, *arrays, more=own)
    o = jnp.where((length < S)[:, None, None], o, jnp.nan).astype(v.dtype)
    # A barrier, so that the kernel has read the keys and they can be moved in place.
    o, full = lax.optimization_barrier((o, is_full(counted(length, 1), S)))
    key = move_on(key, recent, change, settled, full)
    recent, change = emptied(full, recent, change)
    return o, cache._replace(key=key, value=value, decay=decay, recent=recent, change=change)


def _read_recent(q, recent, value, added, first, length, scale):
    """What the queries read of the recent keys, as one piece; `first` and `length` of the cache.

    Sums rather than products: XLA makes them where the keys and values lie.
    """
    (B, HQ, K), H = q.shape, recent.shape[2]
    place = first[:, None] + jnp.arange(RECENT, dtype=jnp.int32)[None]
    there = (place <= jnp.minimum(length, value.shape[1] - 1)[:, None])[..., None, None]
    q = q.astype(jnp.float32).reshape(B, 1, H, HQ // H, K)
    s = scale * LOG2E * jnp.sum(q * recent[:, :, :, None], axis=-1)  # [B, 64, H, group]
    if added is not None:
        s += rows_from(added, first, RECENT).reshape(s.shape)
    s = jnp.where(there, s, NEVER)
    highest = jnp.max(s, axis=1, keepdims=True)
    p = jnp.where(there, jnp.exp2(s - highest), 0.0)
    values = jnp.where(there, rows_from(value, first, RECENT), 0).astype(jnp.float32)
    o = jnp.sum(p[..., None] * values[:, :, :, None], axis=1)
    total = jnp.sum(p, axis=1, keepdims=True)
    return o[..., None, :], *(jnp.moveaxis(x, 1, 3) for x in (highest, total))


def moved_on(key, recent, change, first, full):
    """The keys with those of the `full` rows moved on to the last token, in place, row by row.

    Args:
      key, recent, change: of the cache, after the token.
      first: [B], int32: how many of a row's keys are settled, a multiple of 64.
      full: [B], bool: whether the row has 64 recent keys, which then move into `key`.
    """
    (_, S, H, K), i32 = key.shape, jnp.int32
    settled = jnp.arange(S, dtype=i32)[None] < first[:, None]
    # On tensor cores: products of three parts of 8 bits have all digits of float32, of two parts
    # more than those of the keys.
    precision = "BF16_BF16_F32_X6" if key.dtype == jnp.float32 else "BF16_BF16_F32_X3"

    def move(left):
        key, full = left
        row = jnp.argmax(full).astype(i32)
        there, maps, new, begin = (
            lax.dynamic_slice_in_dim(x, row, 1) for x in (settled, change, recent, first)
        )

        # Head by head: for products of all heads XLA would have all keys lie in another order, and
        # copy them before and after the loop, in every step.
        def move_head(h, key):
            at = row, i32(0), h, i32(0)
            maps_h = lax.dynamic_slice_in_dim(maps, h, 1, 1)
            new_h = lax.dynamic_slice_in_dim(new, h, 1, 2)
            x = lax.dynamic_slice(key, at, (1, S, 1, K)).reshape(1, S, K)
            x = jnp.where(there[..., None], x, 0).astype(jnp.float32)
            with jax.default_matmul_precision(precision):
                x = x + jnp.einsum("bsk,blk->bsl", x, maps_h[:, 0])
            x = with_rows(x, new_h[:, :, 0], begin)
            return lax.dynamic_update_slice(key, x.astype(key.dtype).reshape(1, S, 1, K), at)

        key = lax.fori_loop(0, H, move_head, key)
        return key, full & (jnp.arange(full.shape[0], dtype=i32) != row)

    return lax.while_loop(lambda left: jnp.any(left[1]), move, (key, full))[0]
