"""The caches of PaTH attention."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import export, lax
from jax.typing import DTypeLike

from jla._core import checks
from jla._core.states import zero_state
from jla._core.types import (
    CachedDecays,
    CachedKeys,
    CachedValues,
    Lengths,
    MapChanges,
    RecentKeys,
)

# A lazy cache's keys move on when so many tokens have followed.
RECENT = 64


class PathCache(NamedTuple):
    """The earlier tokens of PaTH attention, in buffers of a fixed capacity `S`.

    A row's tokens are in the first `length` places, in their order; from there on everything is
    zero. Rows may have different lengths. For decoding, `lazy` makes the form of it whose steps
    write the last keys alone.

    Example:
      cache = jla.PathCache.empty(2, capacity=8, heads=4, key_dim=16, value_dim=16)
      key = cache.key  # [2, 8, 4, 16]

    Attributes:
      key: [B, S, H, K], float32: each key as the row's last token sees it, P_last ... P_{s+1} k_s.
        Every later token multiplies it once more, so it is float32 whatever the dtype of k: in
        bfloat16 thousands of roundings would add up.
      value: [B, S, H, V], of v's dtype.
      decay: [B, S, HQ], float32: the sum of the log decays after each token, up to the row's last;
        never positive. None without log decays.
      length: [B], int32: how many tokens each row has seen. Above `S`, that many did not fit. It
        stops at the largest int32.
    """

    key: CachedKeys
    value: CachedValues
    decay: CachedDecays | None
    length: Lengths

    @classmethod
    @checks.named
    def empty(
        cls,
        batch: int,
        capacity: int,
        heads: int,
        key_dim: int,
        value_dim: int,
        *,
        query_heads: int | None = None,
        dtype: DTypeLike = jnp.float32,
    ) -> "PathCache":
        """A cache without tokens.

        Args:
          batch: B.
          capacity: S, the most tokens a row can hold.
          heads: H, the key/value heads.
          key_dim: K.
          value_dim: V.
          query_heads: HQ, for a cache with `decay`; or None.
          dtype: of v.

        Raises:
          TypeError: a size is no Python integer (nor a symbolic dimension of `jax.export`), or
            `dtype` none that v can have.
          ValueError: a size below 1.
        """
        sizes = dict(
            batch=batch, capacity=capacity, heads=heads, key_dim=key_dim, value_dim=value_dim
        )
        if query_heads is not None:
            sizes |= dict(query_heads=query_heads)
        for name, size in sizes.items():
            if not export.is_symbolic_dim(size):
                checks.check_count(name, size)
        checks.check_float_dtype("dtype", dtype)
        decay = None
        if query_heads is not None:
            decay = jnp.zeros((batch, capacity, query_heads), jnp.float32)
        return cls(
            key=jnp.zeros((batch, capacity, heads, key_dim), jnp.float32),
            value=jnp.zeros((batch, capacity, heads, value_dim), dtype),
            decay=decay,
            length=jnp.zeros(batch, jnp.int32),
        )

    def lazy(self, key_dtype: DTypeLike = jnp.float32) -> "LazyPathCache":
        """The same cache in the form that steps change least of.

        Args:
          key_dtype: of the keys: float32, or the values' dtype. With 16 bits a step reads a third
            less; the keys are rounded now and once in 64 tokens; see docs/path_attention.md.

        Raises:
          TypeError: another dtype.
        """
        checks.check_dtype("key_dtype", jnp.zeros((), key_dtype), [jnp.float32, self.value.dtype])
        key = without_rest(self).key
        first = first_recent(self.length, key.shape[1])
        recent = rows_from(key, first, RECENT)
        return LazyPathCache(
            key.astype(key_dtype),
            self.value,
            self.decay,
            self.length,
            jnp.where(_are_recent(self, first), recent, 0.0),
            zero_state(key[:, 0], key[:, 0]),
        )


class LazyPathCache(NamedTuple):
    """The earlier tokens of PaTH attention for decoding: most keys are moved on all at once.

    With `n` tokens in a row, `c = n // 64 * 64` of them have their keys in `key` as token `c - 1`
    sees them. The others' keys are in `recent`, as the row's last token sees them, and the product
    of these tokens' maps is `I + change`. So a query reads the former as `q^T (I + change)` and the
    latter as it is, a step writes the latter alone, and with each 64th token all keys of its row
    become what that token sees. An empty cache is zeros.

    Example:
      cache = jla.PathCache.empty(2, capacity=8, heads=4, key_dim=16, value_dim=16).lazy()
      exact = cache.settled()

    Attributes:
      key: [B, S, H, K], float32 or of v's dtype. The places from `c` on hold anything, and nothing
        reads them.
      value: [B, S, H, V], of v's dtype.
      decay: [B, S, HQ], float32, as of a `PathCache`. None without log decays.
      length: [B], int32: how many tokens each row has seen, as of a `PathCache`.
      recent: [B, 64, H, K], float32: the keys of the tokens from `c` on.
      change: [B, H, K, K], float32: P_last ... P_{c+1} - I.
    """

    key: CachedKeys
    value: CachedValues
    decay: CachedDecays | None
    length: Lengths
    recent: RecentKeys
    change: MapChanges

    def settled(self) -> PathCache:
        """The `PathCache` that this stands for: all keys as the row's last token sees them."""
        S = self.key.shape[1]
        first = first_recent(self.length, S)
        key = self.key.astype(jnp.float32)
        # Mostly before the first token of all, or after a prompt: nothing has to move.
        key = lax.cond(
            jnp.any((first > 0) & (self.length > first)),
            moved_by,
            lambda key, change: key,
            key,
            self.change,
        )
        recent = jnp.where(_are_recent(self, first), self.recent, 0.0)
        key = with_rows(key, recent, first)
        return without_rest(PathCache(key, self.value, self.decay, self.length))


def first_recent(length: Lengths, capacity: int) -> jax.Array:
    """The first token, [B], whose key a lazy cache of this capacity keeps apart."""
    return jnp.minimum(length, capacity) // RECENT * RECENT


def _are_recent(cache: PathCache | LazyPathCache, first: jax.Array) -> jax.Array:
    """Which of the places from the `first` [B] on hold tokens, bool [B, 64, 1, 1]."""
    held = jnp.minimum(cache.length, cache.key.shape[1])
    return (jnp.arange(RECENT, dtype=jnp.int32)[None] < (held - first)[:, None])[..., None, None]


def moved_by(key: CachedKeys, change: MapChanges, precision: str = "highest") -> jax.Array:
    """The keys [B, S, H, K], float32, multiplied by `I + change`."""
    with jax.default_matmul_precision(precision):
        return key + jnp.einsum("bshk,bhlk->bshl", key, change)


def rows_from(x: jax.Array, first: jax.Array, count: int) -> jax.Array:
    """So many of the rows of x [B, S, ...] from place `first` [B] on; beyond the end anything."""
    place = first[:, None] + jnp.arange(count, dtype=jnp.int32)[None]
    return jax.vmap(lambda x, i: x.at[i].get(mode="clip"))(x, place)


def with_rows(x: jax.Array, rows: jax.Array, first: jax.Array) -> jax.Array:
    """x [B, S, ...] with `rows` [B, n, ...] in the places from `first` [B] on, none beyond S."""
    place = first[:, None] + jnp.arange(rows.shape[1], dtype=jnp.int32)[None]
    return jax.vmap(lambda x, i, y: x.at[i].set(y, mode="drop"))(x, place, rows)


def places(cache: PathCache | LazyPathCache) -> jax.Array:
    """The numbers of the cache's places, 0 to S - 1: int32 [1, S]."""
    return jnp.arange(cache.key.shape[1], dtype=jnp.int32)[None]


for _cache in (LazyPathCache, PathCache):
    export.register_namedtuple_serialization(_cache, serialized_name=f"jla.{_cache.__name__}")


def without_rest(cache: PathCache) -> PathCache:
    """The cache with zeros from `length` on, whatever those places hold.

    A weight of 0 is not enough where they hold NaN: 0 times NaN is NaN.
    """
    kept = places(cache) < cache.length[:, None]

    def cleared(x: jax.Array) -> jax.Array:
        return jnp.where(kept.reshape(*kept.shape, *[1] * (x.ndim - 2)), x, 0)

    return PathCache(
        cleared(cache.key),
        cleared(cache.value),
        None if cache.decay is None else cleared(cache.decay),
        cache.length,
    )


def counted(length: Lengths, tokens: int) -> jax.Array:
    """The length after so many more tokens, at most the largest int32: a negative one would look
    like an empty cache's."""
    return jnp.minimum(length, jnp.iinfo(jnp.int32).max - tokens) + tokens
