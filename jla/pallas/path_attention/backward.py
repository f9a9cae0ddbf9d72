"""What the two kernels of `forward`'s backward pass share: a leaf of queries, a leaf of keys.

`query_gradients` and `key_gradients` make the probabilities again from the log-sum-exp. The
gradients of logits are rounded to float16 as wgmma's operands, as queries and keys are; `unit`, a
power of two for each key head, brings them into float16's range, and all gradients are in that
unit.

Levels are processed from the top down. A version is the version of the level below times a matrix,
so the lower one's gradient starts with the upper one's times the transposed matrix: the gradient
written for a level includes everything that depends on that version. Each row is written as float16
of at most 1 and a float32 factor, the row's largest element.
"""

import jax.numpy as jnp
from jax.experimental import pallas as pl

from jla.pallas.common.mosaic import f16, per_row
from jla.pallas.common.scratch import fetch

LEAST = 1e-30  # so that no row is divided by zero


def load_rows(source, first, target, barrier):
    """Loads rows of a block's H, in as many copies as the barrier of the target's ring awaits."""
    copies = barrier.dtype.num_arrivals
    part = target.shape[0] // copies
    targets = [target.at[pl.ds(i * part, part)] for i in range(copies)]
    sources = [source.at[pl.ds(first + i * part, part)] for i in range(copies)]
    fetch(dict(h=list(zip(sources, targets, strict=True))), barrier)


def normalised(x):
    """A tile as float16 of at most 1, and float32 factors of its rows."""
    factor = jnp.maximum(jnp.abs(x).max(axis=1), LEAST)
    return (x * per_row(1.0 / factor, x.shape[1])).astype(f16), factor
