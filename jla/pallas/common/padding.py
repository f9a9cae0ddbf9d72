"""Padding of arrays [B, T, heads, features] to whole tiles, around the kernels."""

import jax.numpy as jnp

from jla.pallas.common.chunks import TILE_WIDTH
from jla.pallas.common.mosaic import TILE_ROWS
from jla.pallas.common.recurrence import NARROW


def missing_tokens(tokens):
    """How many tokens fill up a tile's rows."""
    return -tokens % TILE_ROWS


def missing_features(features):
    """How many features fill up the tiles: of 64, and beyond 128 of 128."""
    return -features % (TILE_WIDTH if features <= NARROW else NARROW)


def pad(x, *, tokens=0, features=0, axis=-1):
    """Adds zeros: so many tokens on axis 1 and so many features on `axis`."""
    if not tokens and not features:
        return x
    widths = [(0, 0)] * x.ndim
    widths[1] = (0, tokens)
    if features:
        widths[axis] = (0, features)
    return jnp.pad(x, widths)
