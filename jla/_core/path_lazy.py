"""What a token does to a `LazyPathCache` beside its attention, in plain jax.numpy."""

import functools

import jax
import jax.numpy as jnp
from jax import lax

from jla._core.cache import RECENT, LazyPathCache, first_recent, moved_by, with_rows
from jla._core.types import Array, Lengths, MapChanges, RecentKeys

f32, i32 = jnp.float32, jnp.int32
_einsum = functools.partial(jnp.einsum, precision=lax.Precision.HIGHEST)


def after_token(
    recent: RecentKeys,
    change: MapChanges,
    length: Lengths,
    capacity: int,
    q: Array,
    k: Array,
    w: Array,
    beta: Array,
) -> tuple[RecentKeys, MapChanges, jax.Array]:
    """The recent keys and the maps after a token, and its queries for the settled keys.

    Args:
      recent, change, length: of the cache before the token. q, k, w, beta: the token's, float32.

    Returns:
      The new `recent`, zeros where no token is; the new `change`; and q (I + change), [B, HQ, K].
    """
    first = first_recent(length, capacity)
    place = first[:, None] + jnp.arange(RECENT, dtype=i32)[None]
    here, before = (x[..., None, None] for x in (place == length[:, None], place < length[:, None]))
    recent = jnp.where(before, recent, 0.0)
    overlap = beta[:, None] * jnp.sum(recent * w[:, None], axis=-1)
    recent = recent - overlap[..., None] * w[:, None]
    recent = jnp.where(here, k[:, None], recent)

    # One reading of `change` for all vectors: w^T (I + change) and q^T (I + change).
    (B, HQ, K), H = q.shape, k.shape[1]
    vectors = jnp.concatenate([w[:, :, None], q.reshape(B, H, HQ // H, K)], axis=2)
    before_token = vectors + _einsum("bhnk,bhkl->bhnl", vectors, change)
    written = before_token[:, :, :1]
    change = change - (beta[..., None] * w)[..., None] * written
    overlap = beta[:, :, None] * jnp.sum(vectors[:, :, 1:] * w[:, :, None], axis=-1)
    back = before_token[:, :, 1:] - overlap[..., None] * written
    return recent, change, back.reshape(B, HQ, K)


def is_full(length: Lengths, capacity: int) -> jax.Array:
    """Whether the row's last token, of `length` so far, is one with which all keys move on."""
    return (length > 0) & (length % RECENT == 0) & (length <= capacity)


def folded(cache: LazyPathCache) -> LazyPathCache:
    """The cache with all keys moved on where the last token was the 64th since they were.

    Nothing of the keys is touched, or read, if it was in no row.
    """
    S = cache.key.shape[1]
    full = is_full(cache.length, S)
    first = cache.length - RECENT

    def move(key: jax.Array) -> jax.Array:
        settled = jnp.arange(S, dtype=i32)[None] < first[:, None]
        moved = jnp.where(settled[..., None, None], key, 0).astype(f32)
        moved = with_rows(moved_by(moved, cache.change), cache.recent, first)
        return jnp.where(full[:, None, None, None], moved.astype(key.dtype), key)

    key = lax.cond(jnp.any(full), move, lambda key: key, cache.key)
    recent, change = emptied(full, cache.recent, cache.change)
    return cache._replace(key=key, recent=recent, change=change)


def emptied(
    full: jax.Array, recent: RecentKeys, change: MapChanges
) -> tuple[RecentKeys, MapChanges]:
    """Both as after no token, in the rows whose keys have moved on."""
    full = full[:, None, None, None]
    return jnp.where(full, 0.0, recent), jnp.where(full, 0.0, change)
