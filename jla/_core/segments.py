"""Packed sequences: equal neighbours in `segment_ids` are one segment."""

import jax
import jax.numpy as jnp

from jla._core.types import SegmentIds


def segment_starts(segment_ids: SegmentIds) -> jax.Array:
    """Marks the tokens that begin a segment, the row's first token excepted.

    The row's first segment continues the initial state, so its first token is no start.

    Args:
      segment_ids: integers [B, T].

    Returns:
      bool [B, T].
    """
    changed = segment_ids[:, 1:] != segment_ids[:, :-1]
    return jnp.pad(changed, ((0, 0), (1, 0)))


def segment_index(segment_ids: SegmentIds) -> jax.Array:
    """Numbers each row's segments 0, 1, ... in order, whatever ids name them; int32 [B, T]."""
    return jnp.cumsum(segment_starts(segment_ids), axis=1, dtype=jnp.int32)
