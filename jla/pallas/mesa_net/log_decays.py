"""What XLA makes of the log decays, [B, H, TP], before the kernels: chunk by chunk.

A segment's start is no decay here: its tokens' sums begin anew. Were it one, strong decays of the
segment before would be in all later sums, and move their rounding.
"""

import jax.numpy as jnp
from jax import lax

from jla.pallas.common.chunks import CHUNK

f32 = jnp.float32


def by_chunk(x):
    """[B, H, TP] as [B, H, N, 64]."""
    return x.reshape(*x.shape[:-1], -1, CHUNK)


def firsts(starts):
    """The place in its chunk of the last of `starts`, [..., TP], up to each token; -1 for none."""
    places = jnp.arange(CHUNK, dtype=jnp.int32)
    places = jnp.where(by_chunk(starts), places, -1)
    return lax.cummax(places, axis=places.ndim - 1).reshape(starts.shape)


def cumulated(g, first):
    """The sums of the log decays after `first` up to each token: what lies elsewhere adds zeros."""
    place = jnp.arange(CHUNK, dtype=jnp.int32)[None, None, None]
    counts = (place[..., None] >= place[..., None, :]) & (
        by_chunk(first)[..., None] < place[..., None, :]
    )
    return jnp.where(counts, by_chunk(g)[..., None, :], 0.0).sum(-1).reshape(g.shape)


def from_start(cumulated, first):
    """At each token, the decay of the state since before the chunk."""
    return jnp.where(first < 0, jnp.exp2(cumulated), 0.0)


def to_end(cumulated, first):
    """The decay of what each token writes, from the token to its chunk's end."""
    cumulated, first = by_chunk(cumulated), by_chunk(first)
    decay = jnp.exp2(jnp.minimum(cumulated[..., -1:] - cumulated, 0.0))
    decay = jnp.where(first == first[..., -1:], decay, 0.0)
    return decay.reshape(*decay.shape[:-2], -1)


def reach(first):
    """The place in its chunk of the first token that each token reads, and of the last that reads
    it, uint32."""
    first = by_chunk(first)
    later = (first[..., None, :] <= first[..., :, None]).sum(-1, dtype=jnp.int32) - 1
    pair = (jnp.maximum(first, 0), later)
    return tuple(x.astype(jnp.uint32).reshape(*x.shape[:-2], -1) for x in pair)
