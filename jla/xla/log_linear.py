"""Log-linear attention by chunks and a tree of states; docs/log_linear.md derives the formulas."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from jla._core import blockwise, packed_levels
from jla._core.lengths import chunk_size, is_symbolic_dim
from jla._core.parts import mamba2_operands
from jla._core.states import repeated
from jla.reference.log_linear import log_linear_step, log_linear_token

# The step is the definition's.
__all__ = ["log_linear_attention", "log_linear_mamba2", "log_linear_step", "log_linear_token"]

f32 = jnp.float32

# Tokens in a chunk. Inside it a token costs 2 CHUNK (K + V) operations, every level above it K V on
# average, and the tree has two states a chunk.
CHUNK = 64


@jax.jit
def log_linear_attention(q, k, v, g, level_scales, initial_state, segment_ids):
    """Tokens in aligned slots, all chunks at once. See `jla.log_linear_attention`."""
    return packed_levels.run_aligned(_core, q, k, v, g, level_scales, initial_state, segment_ids)


def log_linear_mamba2(q, k, u, g, logits, dt, skip, segment_ids):
    """`log_linear_attention` with Mamba-2's values and skip. See `jla._fused.log_linear_mamba2`."""
    v, level_scales, skipped = mamba2_operands(u, logits, dt, skip)
    o, _ = log_linear_attention(q, k, v, g, level_scales, None, segment_ids)
    return (o.astype(f32) + skipped).astype(u.dtype)


@jax.checkpoint
def _core(q, k, v, g, level_scales, *, occupied, value_scales):
    """The outputs of aligned sequences, see `alignment.run_aligned`; only inputs are kept."""
    del occupied, value_scales  # empty slots hold zeros, and the values come scaled
    (B, N, H, V), HK, dtype = v.shape, q.shape[2], v.dtype
    size = chunk_size(N, CHUNK)
    inside = size.bit_length()  # the levels of a chunk's own tokens: 0 to log2(size)
    L = level_scales.shape[3]
    level_scales = jnp.pad(level_scales, [(0, 0)] * 3 + [(0, max(0, inside - L))])

    def tokens(x):
        """[B, N, heads, D] to [B, heads, n C, D]; tokens missing from the last chunk are zeros."""
        return blockwise.split(x.astype(f32), size * -(-N // size))[0]

    by_chunk = functools.partial(blockwise.blocks, s=size)
    q, k, g, scales = map(tokens, (q, k, g[..., None], level_scales))
    decay, prefix = _decays(by_chunk(g))
    weights = decay * _scale_matrix(by_chunk(scales))
    scores = blockwise.pair_products(by_chunk(q), by_chunk(k))
    scores = weights * repeated(scores, H // HK, axis=1)
    o = scores @ by_chunk(tokens(v))
    o = blockwise.merge(o.reshape(1, B, H, -1, V), N)

    heights, read = L - inside, _read_in_order
    if not is_symbolic_dim(N):
        heights, read = min(heights, (-(-N // size) - 1).bit_length()), _read_tree
    if heights > 0:
        # The values of the heads that share a key head lie side by side, as if they were one's.
        v = tokens(v.reshape(B, N, HK, H // HK, V).reshape(B, N, HK, -1))
        to_end = blockwise.transposed(decay[..., -1:, :]).reshape(g.shape)
        states = blockwise.transposed(by_chunk(k)) @ by_chunk(_wide(to_end, HK, V) * v)
        total, prefix = prefix[..., -1, :], prefix.reshape(g.shape)
        weights = [scales[..., inside + m :][..., :1] * prefix for m in range(heights)]
        before = blockwise.merge(read(q, states, weights, total)[None], N)
        o = o + before.reshape(B, N, HK, H // HK, V).reshape(B, N, H, V)
    return o.astype(dtype)


def _decays(g):
    """From the log decays [..., C, 1], the decay from token s to token t, [..., C, C] with zeros
    where s > t, and from the chunk's start to each token (its own included), [..., C, 1].

    Each is the exponential of a sum of its own gates: a difference of two longer sums would keep no
    digit beside a strong gate, and could not be taken of two that hold a gate of -inf.
    """
    C = g.shape[-2]
    later = np.tri(C, k=-1, dtype=bool)
    sums = lax.cumsum(jnp.where(later, g, 0.0), axis=g.ndim - 2)
    return jnp.where(np.tri(C, dtype=bool), jnp.exp(sums), 0.0), jnp.exp(lax.cumsum(g, g.ndim - 2))


def _scale_matrix(scales):
    """The scale with which token t reads token s of its chunk, from [..., C, L] to [..., C, C];
    entries above the diagonal have no meaning."""
    C = scales.shape[-2]
    index = np.arange(C)
    level = np.frexp(index[:, None] ^ index)[1]  # the bit length
    return sum(jnp.where(level == l, scales[..., l : l + 1], 0.0) for l in range(C.bit_length()))


def _wide(x, HK, V):
    """A number for each head, [B, H, L, 1], at each dimension of its values, [B, HK, L, G V]."""
    B, H, L, _ = x.shape
    x = jnp.swapaxes(x.reshape(B, HK, H // HK, L), 2, 3)
    return repeated(x, V, axis=3)


def _read_tree(q, states, weights, total):
    """What the tokens read from the chunks before theirs, [B, HK, n C, G V].

    A node of height m is 2**m chunks; its state is the sum of its tokens' `k v^T`, decayed to its
    end. Every left sibling is read by the tokens of the right one.

    Args:
      q: [B, HK, n C, K].
      states: the chunks', [B, HK, n, K, G V].
      weights: for each height, the level's scale times the decay from the chunk's start to the
        token, [B, H, n C, 1].
      total: the decay over each chunk, [B, H, n, 1].
    """
    (B, HK), (H, n) = q.shape[:2], total.shape[1:3]
    size, V = q.shape[2] // n, states.shape[-1] * HK // H
    # With a power of two of chunks, every node of these two has a sibling. They are small.
    padding = [(0, 0), (0, 0), (0, (1 << (n - 1).bit_length()) - n), (0, 0)]
    total = jnp.pad(total, padding, constant_values=1.0)
    to_chunk = jnp.ones_like(total)  # the decay from the start of a chunk's node to the chunk

    o = 0.0
    for m, weight in enumerate(weights):
        weight = weight * repeated(to_chunk[:, :, :n], size, axis=2)
        o = o + _read_left(q, states, _wide(weight, HK, V), size << m)
        left, right = (x[..., 0, :] for x in blockwise.halves(total, 1))
        pairs = states.shape[2] // 2
        if pairs == 0:
            break
        older, newer = _siblings(states[:, :, : 2 * pairs])
        states = _wide(right[:, :, :pairs], HK, V)[..., None, :] * older + newer
        # In a right node, all come after the left one.
        passed = jnp.stack([jnp.ones_like(left), left], axis=3).reshape(B, H, -1, 1)
        to_chunk = to_chunk * repeated(passed, 1 << m, axis=2)
        total = left * right
    return o


def _read_in_order(q, states, weights, total):
    """As `_read_tree`, chunk by chunk as the definition goes token by token: for a symbolic number
    of chunks, of which no tree can be made.

    The levels above a chunk's own, decayed to the chunk's start, are carried along, zeros where the
    chunk's number has no bit.
    """
    (B, HK), (H, n) = q.shape[:2], total.shape[1:3]
    V, height = states.shape[-1] * HK // H, jnp.arange(len(weights), dtype=jnp.int32)
    wide = functools.partial(_wide, HK=HK, V=V)

    def by_level(mask):
        return mask[:, None, None, None, None]

    @jax.checkpoint
    def chunk(levels, inputs):
        index, q, state, weights, total = inputs
        read = jnp.sum(jax.vmap(wide)(weights) * (q @ levels), axis=0)
        levels = wide(total[:, :, None])[None] * levels
        ones = lax.population_count(index & ~(index + 1))  # trailing ones: the levels that merge
        merged = state + jnp.sum(jnp.where(by_level(height < ones), levels, 0.0), axis=0)
        levels = jnp.where(by_level(height > ones), levels, 0.0)
        return jnp.where(by_level(height == ones), merged, levels), read

    weights = jnp.stack([blockwise.blocks(x, q.shape[2] // n) for x in weights])
    inputs = jnp.moveaxis(blockwise.blocks(q, q.shape[2] // n), 2, 0), jnp.moveaxis(states, 2, 0)
    inputs = *inputs, jnp.moveaxis(weights, 3, 0), jnp.moveaxis(total, 2, 0)
    nothing = jnp.where(False, states[:, :, 0], 0.0)
    nothing = jnp.broadcast_to(nothing, (len(weights), *nothing.shape))
    _, read = lax.scan(chunk, nothing, (jnp.arange(n, dtype=jnp.int32), *inputs))
    read = jnp.moveaxis(read, 0, 2)
    return read.reshape(B, HK, -1, read.shape[-1])


@functools.partial(jax.checkpoint, static_argnums=3)
def _read_left(q, states, weights, rows):
    """What the tokens of right nodes, `rows` in each, read from their left siblings; others zero.

    The last right node may be cut short.
    """
    T, outputs = q.shape[2], []
    whole = T // (2 * rows)
    cut = 2 * rows * whole
    if whole:
        left, _ = _siblings(states[:, :, : 2 * whole])
        (_, q_right), (_, weights_right) = (
            blockwise.halves(x[:, :, :cut], rows) for x in (q, weights)
        )
        read = weights_right * (q_right @ left)
        read = jnp.concatenate([jnp.zeros_like(read), read], axis=3)
        outputs.append(read.reshape(*read.shape[:2], cut, -1))
    if T > cut:
        start = min(T, cut + rows)
        outputs.append(jnp.zeros_like(weights[:, :, cut:start]))
        if T > start:
            read = q[:, :, start:] @ states[:, :, 2 * whole]
            outputs.append(weights[:, :, start:] * read)
    return jnp.concatenate(outputs, axis=2)


def _siblings(x):
    """The left and right of neighbouring nodes: [B, HK, 2n, K, V] to two [B, HK, n, K, V]."""
    x = x.reshape(*x.shape[:2], -1, 2, *x.shape[3:])
    return (half.squeeze(3) for half in jnp.split(x, 2, axis=3))
