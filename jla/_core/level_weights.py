"""What XLA makes of log decays and level scales before the kernels: one weight a token and level.

At level l >= 1 blocks of 2**l positions have a left and a right half. A token of the right half
reads the left half, with weight lambda[t, l] exp(the log decays from the block's middle to itself);
one of the left half is read, with weight exp(those after itself, to the middle). Every pair of
tokens meets at one level, and its weight is the product of the two. All sums are of numbers of one
sign and none is a difference of others.
"""

import jax.numpy as jnp
import numpy as np
from jax import lax

f32 = jnp.float32

CHUNK = 64  # tokens of a chunk of the kernels
LEVELS = 6  # log2(CHUNK): the levels at which tokens of one chunk meet
LOG2E = 1.4426950408889634

# exp2 of it is zero in float32, so it is as good as any stronger decay, and no sum is infinite.
STRONGEST = -200.0
VANISHED = -150.0  # of numbers up to it, in base 2, exp2 is zero in float32


def division(tokens, leaf):
    """How T tokens are divided: chunks, chunks of a leaf block, leaf blocks."""
    chunks = -(-tokens // CHUNK)
    per = min(leaf // CHUNK, _power_of_two_from(chunks))
    return chunks, per, -(-chunks // per)


def levels_of(per, blocks):
    """The levels inside a leaf block, and those above."""
    return LEVELS + (per - 1).bit_length(), (blocks - 1).bit_length()


def weights(g, level_scales, leaf, value_scales=None, activation=None, others=None):
    """All weights of a core's tokens, and the decays between leaf blocks; differentiable.

    Plane 0 is lambda of level 0, plane l the weights of level l. The last one is the decay of a
    token's writes to the end of its leaf block.

    Args:
      g: [B, T, H] float32 log decays; -inf starts a segment.
      level_scales: [B, T, H, L].
      value_scales: what each token's value is multiplied by, [B, T, H] float32, in all the weights
        with which it is read; None: ones.
      activation: what is still to be done to the level scales, of [B, H, N, L, 64] float32: it is
        made where they are used, and the transposition before has the fewer bytes; None: nothing.
      others: (level, count): that many more planes, before the last, are of states from before the
        first token, which are read at the levels from that on; all chunks are then whole leaf
        blocks. None: there are none.

    Returns:
      [B, H, N, P, 64] float32, by chunks and planes; [B, H, blocks - 1] float32, as Mosaic's
      `tree_states` takes it, or None if there is one block. With others [B, H, blocks], for a tree
      of all blocks, and a third: the sums of log decays, in base 2, of all tokens before a chunk
      and of all tokens, [B, H, N + 1].
    """
    B, T, H = g.shape
    N, per, blocks = division(T, leaf)
    inside, above = levels_of(per, blocks)
    levels = inside + above

    def by_chunk(x):
        """[B, T, H, n] to [B, H, N, n, 64]; what is missing is zero."""
        x = jnp.pad(x, ((0, 0), (0, N * CHUNK - T), (0, 0), (0, 0)))
        return x.reshape(B, N, CHUNK, H, -1).transpose(0, 3, 1, 4, 2)

    log_decays = by_chunk(jnp.maximum(g * LOG2E, STRONGEST)[..., None])[..., 0, :]
    masks = _masks_of_levels()
    sums = jnp.einsum("bhns,mts->bhnmt", log_decays, masks, precision=lax.Precision.HIGHEST)
    up_to, after = sums[..., LEVELS : LEVELS + 1, :], sums[..., LEVELS + 1 :, :]
    before_chunk, after_chunk = _around(log_decays.sum(-1), levels - LEVELS + 1)
    scales = by_chunk(level_scales).astype(f32)
    if activation is not None:
        scales = activation(scales)
    level, count = (levels + 1, 0) if others is None else others
    scales = _of_levels(scales, levels, level, count)
    writes = 1.0 if value_scales is None else by_chunk(value_scales[..., None])

    # What the levels inside of a chunk have in common with the others is the form alone: apart,
    # each of them is one pass over what it needs.
    near = reading(N, levels)[:, :LEVELS]
    far = reading(N, levels + count)[:, LEVELS:]
    if count:
        far |= lax.broadcasted_iota(jnp.int32, far.shape, 1) >= levels - LEVELS
    around = (_far(x, count) for x in (before_chunk, after_chunk))
    exponents = jnp.where(far, *map(jnp.add, (up_to, after), around))
    to_end = after + after_chunk[..., inside - LEVELS, None, :]
    planes_of_weights = [
        scales[..., :1, :] * writes,
        jnp.where(near, scales[..., 1 : LEVELS + 1, :], writes) * jnp.exp2(sums[..., :LEVELS, :]),
        jnp.where(far, scales[..., LEVELS + 1 :, :], writes) * jnp.exp2(exponents),
        writes * jnp.exp2(to_end),
    ]
    # XLA has a fast kernel for this with up to four parts.
    w = jnp.concatenate(planes_of_weights, axis=-2)
    log_decays = log_decays.reshape(B, H, -1)
    if others is None:
        return w, _between_blocks(log_decays, per * CHUNK, blocks)
    before = before_chunk[..., -1, 0]
    total = before[..., -1:] + log_decays[..., -CHUNK:].sum(-1, keepdims=True)
    before = jnp.concatenate([before, total], axis=-1)
    return w, _between_blocks(log_decays, per * CHUNK, blocks + 1), before


def others_read(before, others):
    """Which of other devices' states each chunk reads, [B, H, N] int32.

    Args:
      before: the sums of log decays before each chunk, in base 2, from `weights`. others: which
        there are, int32: bit m stands for the m-th.

    Where all has decayed to exactly 0, nothing is read. It says so of the gates before the chunk.
    """
    return jnp.where(before > VANISHED, others, 0)


def _of_levels(scales, levels, level, count):
    """The planes 0 to `levels` of scales [..., L, 64], zeros where there is none, and the `count`
    planes from `level` on."""
    if level == levels + 1:
        levels, count = levels + count, 0
    missing = max(0, levels + 1 - scales.shape[-2])
    first = jnp.pad(scales, [(0, 0)] * 3 + [(0, missing), (0, 0)])[..., : levels + 1, :]
    if not count:
        return first
    return jnp.concatenate([first, scales[..., level : level + count, :]], axis=-2)


def _far(sums, count):
    """Of `_around`'s sums, all blocks' but the whole sequence's, and that so many times."""
    if count == 0:
        return sums[..., :-1, :]
    return jnp.concatenate([sums] + [sums[..., -1:, :]] * (count - 1), axis=-2)


def reading(chunks, levels):
    """[N, levels, 64]: whether bit l - 1 of a position is set: whether it reads at level l."""
    position = lax.broadcasted_iota(jnp.int32, (chunks, levels, CHUNK), 0) * CHUNK
    position += lax.broadcasted_iota(jnp.int32, (chunks, levels, CHUNK), 2)
    bit = lax.broadcasted_iota(jnp.int32, (chunks, levels, CHUNK), 1)
    return (position >> bit) & 1 == 1


def live(occupied, per):
    """Of each chunk that holds tokens, the number of chunks up to the last such one of its leaf
    block; 0 of the others. [B, N] int32.

    Args:
      occupied: whether there is a token in a slot, [B, T] bool. per: chunks of a leaf block.
    """
    B, T = occupied.shape
    chunks, _, blocks = division(T, per * CHUNK)
    occupied = jnp.pad(occupied, ((0, 0), (0, blocks * per * CHUNK - T)))
    any_token = occupied.reshape(B, blocks, per, CHUNK).any(3)
    number = jnp.arange(1, blocks * per + 1, dtype=jnp.int32).reshape(blocks, per)
    last = jnp.max(jnp.where(any_token, number, 0), axis=2, keepdims=True)
    return jnp.where(any_token, last, 0).reshape(B, -1)[:, :chunks]


def gradient_of_weights(by_reads, by_read, live, inside, above, others=None):
    """The weights' gradient from that of the tokens that read and that of those that are read.

    What a kernel left unwritten is selected away. `others`: from `others_read`, or None.
    """
    N, levels = by_reads.shape[2], by_reads.shape[3] - 2
    reads = reading(N, levels)
    zeros = jnp.zeros((), f32)
    own = slice(1, inside + 1)
    inner = jnp.where(reads[:, :inside], by_reads[..., own, :], by_read[..., own, :])
    reads = reads[:, inside:]
    if others is not None:
        bit = lax.broadcasted_iota(jnp.int32, reads.shape, 1) - above
        bits = jnp.where(bit >= 0, 1 << jnp.maximum(bit, 0), 0)[None, None]
        reads = reads[None, None] | (others[..., None, None] & bits != 0)
    outer = jnp.where(reads, by_reads[..., inside + 1 : -1, :], zeros)
    parts = [by_reads[..., :1, :], inner, outer, by_read[..., -1:, :]]
    gradient = jnp.concatenate(parts, axis=-2)
    if live is None:
        return gradient
    return jnp.where(live[:, None, :, None, None] > 0, gradient, zeros)


def gradient_of_skip(by_reads, live):
    """The gradient of the skip's weight, [B, 1, H, 1], from what `reader_gradients` wrote."""
    of_tokens = by_reads[..., -1, :]
    if live is not None:
        of_tokens = jnp.where(live[:, None, :, None] > 0, of_tokens, 0.0)
    return of_tokens.sum((2, 3))[:, None, :, None]


def _masks_of_levels():
    """[8, t, s]: which log decays s are in token t's exponent, at each level of a chunk; which ones
    are up to t, and which after it.

    At a level a token of the right half has those from the block's middle to itself, one of the
    left half those after itself, to the middle.
    """
    t, s = np.arange(CHUNK)[:, None], np.arange(CHUNK)
    masks = [(t >> j == s >> j) & np.where(t >> j & 1, s <= t, s > t) for j in range(LEVELS)]
    return jnp.asarray(np.stack([*masks, s <= t, s > t]), f32)


def _around(x, levels):
    """The sums before and after each element of x, [..., n], in its aligned block of 2**j.

    j = 0 to levels - 1; both [..., n, levels, 1]. Sums inside 64 are a product with masks; those of
    blocks of 64 follow by the same rule from the sums of 64.
    """
    n = x.shape[-1]
    x = jnp.pad(x, [(0, 0)] * (x.ndim - 1) + [(0, -n % CHUNK)])
    x = x.reshape(*x.shape[:-1], -1, CHUNK)
    inner = min(levels, LEVELS + 1)
    sums = jnp.einsum("...s,mts->...tm", x, _masks(inner), precision=lax.Precision.HIGHEST)
    sides = sums[..., :inner], sums[..., inner:]  # [..., n / 64, 64, levels]
    if levels > inner:
        outer = (far[..., None, 1:, 0] for far in _around(x.sum(-1), levels - LEVELS))
        sides = (
            jnp.concatenate([near, far + near[..., LEVELS:]], axis=-1)
            for near, far in zip(sides, outer, strict=True)
        )
    return tuple(side.reshape(*side.shape[:-3], -1, levels)[..., :n, :, None] for side in sides)


def _masks(levels):
    """[2 levels, t, s]: whether s lies before, and then after, t in its aligned block of 2**j."""
    t, s = np.arange(CHUNK)[:, None], np.arange(CHUNK)
    blocks = [t >> j == s >> j for j in range(levels)]
    masks = [b & (s < t) for b in blocks] + [b & (s > t) for b in blocks]
    return jnp.asarray(np.stack(masks), f32)


def _between_blocks(log_decays, leaf, blocks):
    """The decay over the right sibling of each node that is read; the order is `tree`'s."""
    if blocks == 1:
        return None
    total = log_decays[..., : (blocks - 1) * leaf]
    total = total.reshape(*total.shape[:-1], blocks - 1, leaf).sum(-1)
    out = []
    while n := total.shape[-1]:
        right = total[..., 1::2]
        out.append(jnp.pad(right, ((0, 0), (0, 0), (0, n % 2))))
        total = total[..., 0 : n - n % 2 : 2] + right
    return jnp.exp2(jnp.concatenate(out, axis=-1))


def _power_of_two_from(n):
    return 1 << (n - 1).bit_length()
