"""The cache of PaTH attention."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import export
from jax.typing import DTypeLike

from jla._core import checks
from jla._core.types import CachedDecays, CachedKeys, CachedValues, Lengths


class PathCache(NamedTuple):
    """The earlier tokens of PaTH attention, in buffers of a fixed capacity `S`.

    A row's tokens are in the first `length` places, in their order; from there on everything is
    zero. Rows may have different lengths.

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


def places(cache: PathCache) -> jax.Array:
    """The numbers of the cache's places, 0 to S - 1: int32 [1, S]."""
    return jnp.arange(cache.key.shape[1], dtype=jnp.int32)[None]


export.register_namedtuple_serialization(PathCache, serialized_name="jla.PathCache")


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
