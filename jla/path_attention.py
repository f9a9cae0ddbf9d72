"""PaTH attention (arXiv 2505.16381)."""

import functools
from typing import overload

import jax.numpy as jnp
import numpy as np

from jla._core import axes, checking, checks, path_ring, pools, sequence
from jla._core.cache import RECENT, LazyPathCache, PathCache
from jla._core.types import (
    Array,
    Directions,
    Implementation,
    Keys,
    LogDecays,
    Outputs,
    Queries,
    SegmentIds,
    Sizes,
    Slots,
    Strengths,
    Values,
)
from jla._dispatch import choose

__all__ = ["LazyPathCache", "PathCache", "path_attention", "path_step"]

f32 = jnp.float32

AXES = axes.PATH
_AXES_WITH_LAZY = {**AXES, **axes.LAZY_PATH}
_AXES_OF_STEP = axes.of_step(_AXES_WITH_LAZY)


# The type of the second result is that of `cache`. The function itself is below.
@overload
def path_attention(
    q: Queries,
    k: Keys,
    v: Values,
    w: Directions,
    beta: Strengths,
    g: LogDecays | None = None,
    *,
    scale: float | None = None,
    cache: None = None,
    segment_ids: SegmentIds | None = None,
    axis_name: str | None = None,
    implementation: Implementation | None = None,
) -> tuple[Outputs, None]: ...


@overload
def path_attention(
    q: Queries,
    k: Keys,
    v: Values,
    w: Directions,
    beta: Strengths,
    g: LogDecays | None = None,
    *,
    scale: float | None = None,
    cache: PathCache | LazyPathCache,
    segment_ids: SegmentIds | None = None,
    axis_name: str | None = None,
    implementation: Implementation | None = None,
) -> tuple[Outputs, PathCache]: ...


@checks.named
def path_attention(
    q: Queries,
    k: Keys,
    v: Values,
    w: Directions,
    beta: Strengths,
    g: LogDecays | None = None,
    *,
    scale: float | None = None,
    cache: PathCache | LazyPathCache | None = None,
    segment_ids: SegmentIds | None = None,
    axis_name: str | None = None,
    implementation: Implementation | None = None,
) -> tuple[Outputs, PathCache | None]:
    """PaTH: causal softmax attention whose position encoding is a product of the tokens' own maps.

    Every token has a Householder-like map P_t, and between a query and a key lie the maps of all
    tokens after the key:

        P_t = I - beta_t w_t w_t^T
        logit_ts = scale (q_t . (P_t P_{t-1} ... P_{s+1} k_s) + G_t - G_s),   s <= t
        G_t = sum_{i <= t} g_i
        o_t = sum_s softmax_s(logit_ts) v_s

    With `g` this is PaTH-FoX, which forgets; without, the G are 0. A recurrence computes the same:
    at each token multiply every key so far by P_t, append k_t and v_t, and attend. `cache` holds
    these keys and values, and decoding is this recurrence (`jla.path_step`).

    The rows of `w` must have length 1 (the layer normalises them). With `beta` near 2 a map is a
    reflection, and if w is longer by 1e-3, as rounding to bfloat16 can make it, the keys along it
    grow by twice as much at each such token: normalise w in float32 and leave it there.

    Shape letters: `B` batch, `T` time, `HQ` query heads, `H` key/value heads, `K` key dimension,
    `V` value dimension, `S` the cache's capacity. Query head `j` uses key/value head
    `j // (HQ // H)`.

    With `cache` the new tokens follow those in it, row by row, and the returned cache has them
    appended. A border of `segment_ids` empties the cache: the given one belongs to a row's first
    segment, and the returned one holds the last segment alone. A token that finds the cache full is
    not appended, and no other is overwritten: its output and those after it are NaN, and `length`
    continues to count. Where the lengths are known, outside of jit, a cache that is too small
    raises ValueError instead.

    Time is axis 1 and heads are axis 2. Transpose arrays [B, H, T, ...] with `x.swapaxes(1, 2)`: if
    no size disagrees, the two orders cannot be told apart, and nothing is raised.

    Example:
      q = k = v = jnp.ones((2, 8, 4, 16))  # [B, T, H, K]
      w, beta = jnp.full((2, 8, 4, 16), 0.25), jnp.ones((2, 8, 4))
      o, _ = jla.path_attention(q, k, v, w, beta)  # [2, 8, 4, 16]

    Args:
      q: queries, [B, T, HQ, K], bfloat16, float16 or float32; HQ is a multiple of H, K is 16 to
        256.
      k: keys, [B, T, H, K], of q's dtype.
      v: values, [B, T, H, V], of q's dtype; V is 16 to 256.
      w: the maps' directions, [B, T, H, K], rows of length 1, float32 or q's dtype; used in
        float32.
      beta: the maps' strengths, [B, T, H], 0 to 2, float32 or q's dtype; used in float32.
      g: natural-log decays, [B, T, HQ], float32, `g <= 0`; or None.
      scale: factor of the logits, decays included, a Python number; `K**-0.5` if None.
      cache: the tokens before the first, a `PathCache` (empty for a prefill), with `decay` if and
        only if there is a g; or a `LazyPathCache`, which steps left; or None. The returned cache is
        a `PathCache`, or then None too.
      segment_ids: integers [B, T]: equal neighbours are one segment, and nothing crosses a border.
      axis_name: inside `jax.shard_map`, the manual axis of the mesh that T is split over: each
        device has the next T / P tokens. Where H is a multiple of P the devices exchange heads for
        time, else keys move from device to device. There can be no cache. None: T is whole.
        `jla.sharded` takes whole arrays.
      implementation: "reference" (a scan over tokens, float32), "xla" (chunkwise, any device),
        "pallas" (kernels for Hopper GPUs), "triton" (kernels for NVIDIA GPUs from Ampere on, with
        the extra jla[triton]), or None for the first of "pallas", "triton" and "xla" that supports
        these arguments here.

    Returns:
      The outputs, [B, T, HQ, V], of v's dtype, and the `PathCache` after the last token, or None.

    Raises:
      TypeError: an argument is no array or has a dtype that is not listed here, or `cache` is no
        `PathCache`.
      ValueError: shapes that disagree, K or V outside 16 to 256, a cache that is too small, or with
        `decay` where there is no g or the reverse, an unknown implementation.
      NotImplementedError: the named implementation cannot do this; the message says what can.
    """
    factor = _check_run(q, k, v, w, beta, g, cache, segment_ids, scale)
    if axis_name is not None:
        _check_exchange(axis_name, cache)
    if isinstance(cache, LazyPathCache):
        cache = cache.settled()
    if cache is not None:
        check_room(cache, q.shape[1], segment_ids)
    return run(q, k, v, w, beta, g, cache, segment_ids, factor, implementation, axis_name)


@checks.named
def path_step[Cache: (PathCache, LazyPathCache)](
    q: Queries,
    k: Keys,
    v: Values,
    w: Directions,
    beta: Strengths,
    g: LogDecays | None,
    cache: Cache,
    *,
    scale: float | None = None,
    slots: Slots | None = None,
    implementation: Implementation | None = None,
) -> tuple[Outputs, Cache]:
    """One token of `jla.path_attention`, for decoding: `T` steps are one run over `T` tokens.

    Multiplies every cached key by this token's map, appends the token and attends to all. From a
    lazy cache it multiplies the last keys alone, and all with each 64th token.

    Example:
      q = k = v = jnp.ones((2, 4, 16))
      w, beta = jnp.full((2, 4, 16), 0.25), jnp.ones((2, 4))
      cache = jla.PathCache.empty(2, capacity=8, heads=4, key_dim=16, value_dim=16)
      o, cache = jla.path_step(q, k, v, w, beta, None, cache)  # [2, 4, 16]

    Args:
      q: query, [B, HQ, K], bfloat16, float16 or float32.
      k: key, [B, H, K], of q's dtype.
      v: value, [B, H, V], of q's dtype.
      w: the map's direction, [B, H, K], rows of length 1, float32 or q's dtype.
      beta: the map's strength, [B, H], 0 to 2, float32 or q's dtype.
      g: natural-log decays, [B, HQ], float32, `g <= 0`; or None.
      cache: the `PathCache` that `path_attention` or the last step returned, or an empty one.
        Or a `LazyPathCache`: what `.lazy()` of it is, or the last step returned. Donate it to jit,
        and it is updated in place. A full one is treated as in `path_attention`.
      scale: as in `path_attention`.
      slots: None, or int32 [B]: `cache` is then a pool of R rows, [R, S, H, K] and so on, and row i
        starts from the cache in row `slots[i]` and writes there. -1 is a row without a sequence:
        its output is zero, and nothing is written. All else of the pool stays as it is; see
        docs/pools.md. A `LazyPathCache` is no pool.
      implementation: as in `path_attention`.

    Returns:
      The output, [B, HQ, V], of v's dtype, and the new cache, of the kind given; with slots the
      whole pool.

    Raises:
      TypeError, ValueError, NotImplementedError: as `path_attention`. ValueError: slots that are
        known and equal, or outside -1 to R - 1.
    """
    factor = _check_step(q, k, v, w, beta, g, cache, scale, slots)
    check_room(cache, 1, slots=slots)
    return step(q, k, v, w, beta, g, cache, factor, implementation, slots)


def run(
    q: Queries,
    k: Keys,
    v: Values,
    w: Directions,
    beta: Strengths,
    g: LogDecays | None,
    cache: PathCache | None,
    segment_ids: SegmentIds | None,
    scale: float,
    implementation: Implementation | None,
    axis_name: str | None = None,
) -> tuple[Outputs, PathCache | None]:
    """`path_attention` on arguments that were checked, with room or not."""
    _check_values("jla.path_attention", q, k, v, w, beta, g, cache)
    chosen = choose("path_attention", implementation, q, k, v, w, beta, g, cache)
    whole = functools.partial(chosen, scale=scale)
    if axis_name is None:
        return whole(q, k, v, w, beta, g, cache, segment_ids)
    arrays = q, k, v, w, beta, g
    if k.shape[2] % sequence.devices_of(axis_name) == 0:
        return sequence.by_heads(whole, arrays, segment_ids, axis_name), None
    arrays = sequence.varying(arrays, axis_name)
    o, logsumexp = whole(*arrays, None, segment_ids, logsumexps=True)
    o = path_ring.with_left(o, logsumexp, *arrays, segment_ids, axis_name, scale=scale)
    return o.astype(v.dtype), None


def step[Cache: (PathCache, LazyPathCache)](
    q: Queries,
    k: Keys,
    v: Values,
    w: Directions,
    beta: Strengths,
    g: LogDecays | None,
    cache: Cache,
    scale: float,
    implementation: Implementation | None,
    slots: Slots | None = None,
) -> tuple[Outputs, Cache]:
    """`path_step` on arguments that were checked, with room or not."""
    if slots is not None and isinstance(cache, LazyPathCache):
        raise NotImplementedError(
            "slots must be None with a LazyPathCache, got an array: a pool's rows are those of a "
            "PathCache; make the pool without .lazy() (the layer without lazy_keys), or call with "
            "the whole cache"
        )
    _check_values("jla.path_step", q, k, v, w, beta, g, cache, slots)
    on_pool = checks.given(slots=slots)
    chosen = choose("path_step", implementation, q, k, v, w, beta, g, cache, **on_pool)
    return chosen(q, k, v, w, beta, g, cache, scale=scale, **on_pool)


def _check_values(
    name: str,
    q: Queries,
    k: Keys,
    v: Values,
    w: Directions,
    beta: Strengths,
    g: LogDecays | None,
    cache: PathCache | LazyPathCache | None,
    slots: Slots | None = None,
) -> None:
    arguments = dict(q=q, k=k, v=v, w=w, beta=beta, g=g, cache=cache)
    checking.values(name, unit="w", most_beta=2, slots=slots, **arguments)


def check_room(
    cache: PathCache | LazyPathCache,
    tokens: int | Array,
    segment_ids: SegmentIds | None = None,
    *,
    slots: Slots | None = None,
    set_by: str = "the capacity of PathCache.empty",
) -> None:
    """Raises ValueError if the cache is known to be too small.

    Args:
      cache: a `PathCache`.
      tokens: how many each row will get, an integer or int32 [B].
      slots: of rows of a pool, or None. Those without a sequence need no room.
      segment_ids: integers [B, T], of these tokens first of all, or None.
      set_by: what the caller sets the room by, for the message.
    """
    known = [cache.length, tokens, *checks.given(segment_ids=segment_ids, slots=slots).values()]
    if not all(map(checks.known, known)):
        return
    length, tokens = np.asarray(cache.length, np.int64), np.asarray(tokens)
    if slots is not None:
        rows = np.asarray(slots)
        length = np.where(rows < 0, -tokens, length[rows])
    needed = length + tokens
    if segment_ids is not None:
        # How far each row's segments reach, the first of them from the cached tokens on.
        ids = np.asarray(segment_ids)
        T: int = ids.shape[1]
        place = np.arange(T)
        starts = np.pad(ids[:, 1:] != ids[:, :-1], ((0, 0), (1, 0)))
        start = np.maximum.accumulate(np.where(starts, place, -length[:, None]), axis=1)
        there = place < tokens[..., None]
        needed = np.max(np.where(there, place - start + 1, 0), axis=1)
    capacity = cache.key.shape[1]
    row = int(np.argmax(needed))
    if needed[row] > capacity:
        raise ValueError(
            f"cache has room for {capacity} tokens, but row {row} has {length[row]} in it and "
            f"needs room for {needed[row]}; {set_by} sets the room"
        )


def _check_run(
    q: Queries,
    k: Keys,
    v: Values,
    w: Directions,
    beta: Strengths,
    g: LogDecays | None,
    cache: PathCache | LazyPathCache | None,
    segment_ids: SegmentIds | None,
    scale: float | None,
) -> float:
    """Checks the arguments of a run; returns the scale."""
    optional = checks.given(g=g)
    if cache is not None:
        optional |= _cache_fields(cache, g)
        if jnp.ndim(cache.length) == 2:
            raise NotImplementedError(
                f"cache has an axis of segments (length of shape {jnp.shape(cache.length)}), which "
                "is not supported: give each segment a row and a cache of its own, [B, S, ...], "
                "without segment_ids"
            )
    optional |= checks.given(segment_ids=segment_ids)
    sizes = checks.check_axes(_AXES_WITH_LAZY, q=q, k=k, v=v, w=w, beta=beta, **optional)
    if segment_ids is not None:
        checks.check_segment_ids(segment_ids)
    return _check_common(q, k, v, w, beta, g, cache, sizes, scale)


def _check_exchange(axis_name: str, cache: PathCache | LazyPathCache | None) -> None:
    """Raises ValueError without such an axis, and NotImplementedError with a cache."""
    sequence.devices_of(axis_name)
    if cache is not None:
        raise NotImplementedError(
            f"cache must be None with axis_name = {axis_name!r}, got a PathCache: a cache is not "
            "split over devices. Fill it on one device, without axis_name"
        )


def _check_step(
    q: Queries,
    k: Keys,
    v: Values,
    w: Directions,
    beta: Strengths,
    g: LogDecays | None,
    cache: PathCache | LazyPathCache,
    scale: float | None,
    slots: Slots | None,
) -> float:
    """Checks the arguments of a step; returns the scale."""
    optional = checks.given(g=g) | _cache_fields(cache, g)
    sizes = pools.check_axes(_AXES_OF_STEP, slots, q=q, k=k, v=v, w=w, beta=beta, **optional)
    return _check_common(q, k, v, w, beta, g, cache, sizes, scale)


def _cache_fields(cache: PathCache | LazyPathCache, g: LogDecays | None) -> dict[str, object]:
    """A cache's arrays by name. Checks that it is one, lazy or not, with gates where there is a
    g."""
    if not isinstance(cache, LazyPathCache):
        checks.check_state("cache", cache, PathCache)
    if (cache.decay is None) != (g is None):
        has, lacks = ("g", "cache.decay") if cache.decay is None else ("cache.decay", "g")
        raise ValueError(
            f"{lacks} is None, but {has} is not: a cache with gates needs a g, and one without "
            "(PathCache.empty without query_heads) none"
        )
    fields = checks.state_fields("cache", cache)
    return fields if g is not None else {n: x for n, x in fields.items() if n != "cache.decay"}


def _check_common(
    q: Queries,
    k: Keys,
    v: Values,
    w: Directions,
    beta: Strengths,
    g: LogDecays | None,
    cache: PathCache | LazyPathCache | None,
    sizes: Sizes,
    scale: float | None,
) -> float:
    """Checks what the run and the step share; returns the scale."""
    checks.check_same_dtype(q=q, k=k, v=v)
    checks.check_dtype("w", w, [f32, q.dtype])
    checks.check_dtype("beta", beta, [f32, q.dtype])
    if g is not None:
        checks.check_dtype("g", g, [f32])
    if cache is not None:
        is_lazy = isinstance(cache, LazyPathCache)
        checks.check_dtype("cache.key", cache.key, [f32, v.dtype] if is_lazy else [f32])
        checks.check_dtype("cache.value", cache.value, [v.dtype])
        if isinstance(cache, LazyPathCache):
            checks.check_dtype("cache.recent", cache.recent, [f32])
            checks.check_dtype("cache.change", cache.change, [f32])
            if sizes["C"] != RECENT:
                raise ValueError(
                    f"cache.recent [B, C, H, K] must have C = {RECENT}, got shape "
                    f"{cache.recent.shape}; PathCache.lazy makes it"
                )
        if cache.decay is not None:
            checks.check_dtype("cache.decay", cache.decay, [f32])
        checks.check_dtype("cache.length", cache.length, [jnp.int32])
    for letter in "KV":
        checks.check_head_dim(letter, sizes[letter])
    checks.check_multiple("HQ", sizes["HQ"], "H", sizes["H"])
    return checks.check_scale(scale, sizes["K"] ** -0.5)
