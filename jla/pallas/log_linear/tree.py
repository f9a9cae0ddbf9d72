"""The binary tree of leaf blocks' states: what is where, and which CTA sums it.

A node of height m is 2**m leaf blocks, its state the decayed sum of its halves'. Only left halves
are read, by the blocks of their right siblings: block i reads, for each set bit m of i, the node
that ends at block i >> m << m. They are kept by height, and with n = blocks - 1 leaf blocks before
the last there are n in all: ((n >> m) + 1) >> 1 of height m.
"""

import jax.numpy as jnp
from jax import lax

SPAN = 32  # chunks at most that one job of the states' gradient sums over
OTHERS_SPAN = 128  # the same for the states of other devices, which all chunks may read


def place(n, block, height):
    """Where the states have the left node of this height that `block` is below, or whose right
    sibling it is below."""
    before = n - lax.shift_right_logical(jnp.int32(n), height)
    return before + lax.shift_right_logical(block, height + 1)


def leaf_jobs(per, plane):
    """What `sums.weighted_sums` sums for a leaf block's state: first chunk, chunks, plane."""
    return lambda block: (block * per, jnp.int32(per), jnp.int32(plane))


def heights(per, blocks):
    """For each height of the tree the nodes that are read, and the parts that each one's readers
    come in for `reader_jobs`."""
    n = blocks - 1
    return [(((n >> m) + 1) >> 1, -(-(per << m) // SPAN)) for m in range(n.bit_length())]


def others_parts(chunks):
    """The parts in which `reader_jobs` has the readers of another device's state: all chunks."""
    return -(-chunks // OTHERS_SPAN)


def others_counts(reads, others):
    """The chunks of those jobs that read, [B, H, J] int32, from `level_weights.others_read`.

    The chunks that read another device's state are the first ones.
    """
    parts = others_parts(reads.shape[2])
    reads = jnp.pad(reads, [(0, 0), (0, 0), (0, parts * OTHERS_SPAN - reads.shape[2])])
    reads = reads.reshape(*reads.shape[:2], 1, parts, OTHERS_SPAN)
    level = lax.broadcasted_iota(jnp.int32, (1, 1, others, 1, 1), 2)
    counts = jnp.sum((reads >> level) & 1, axis=4, dtype=jnp.int32)
    return counts.reshape(*counts.shape[:2], -1)


def reader_jobs(chunks, per, blocks, inside, others=0):
    """As `leaf_jobs` for the gradients of the states that are read: their readers, in parts.

    Behind those of the tree come those of so many states of other devices.
    """
    above = (blocks - 1).bit_length()

    def job(j):
        at, found = 0, (jnp.int32(0),) * 3
        for m, (nodes, parts) in enumerate(heights(per, blocks)):
            node, part = lax.div(j - at, jnp.int32(parts)), lax.rem(j - at, jnp.int32(parts))
            start = ((2 * node + 1) << m) * per
            first = start + part * SPAN
            count = jnp.minimum(jnp.minimum(start + (per << m), chunks) - first, SPAN)
            this = first, jnp.maximum(count, 0), jnp.int32(inside + 1 + m)
            found = tuple(jnp.where(j >= at, x, y) for x, y in zip(this, found, strict=True))
            at += nodes * parts
        if others:
            parts = jnp.int32(others_parts(chunks))
            first = lax.rem(j - at, parts) * OTHERS_SPAN
            plane = inside + 1 + above + lax.div(j - at, parts)
            this = first, jnp.minimum(chunks - first, OTHERS_SPAN), plane
            found = tuple(jnp.where(j >= at, x, y) for x, y in zip(this, found, strict=True))
        return found

    return job


def live_counts(live, jobs, job):
    """The chunks of each job up to its last that holds tokens, [B, jobs] int32.

    Args:
      live: from `weights.live`; None (all chunks) gives None. jobs: their number. job: as
        `sums.weighted_sums` takes it.
    """
    if live is None:
        return None
    first, count, _ = job(jnp.arange(jobs, dtype=jnp.int32))
    chunk = jnp.arange(live.shape[1], dtype=jnp.int32)
    place = chunk[None] - jnp.broadcast_to(first, jobs)[:, None]
    mine = (place >= 0) & (place < jnp.broadcast_to(count, jobs)[:, None])
    return jnp.max(jnp.where(mine[None] & (live[:, None] > 0), place + 1, 0), axis=2)
