"""Mathematics that several implementations share, in plain jax.numpy: the l2 norm, what Kimi Delta
Attention and Mamba-2 make of their projections, ABC's gates, and PaTH's maps and cache.
docs/gsa.md and docs/path_attention.md derive the formulas of the last two."""

import functools

import jax
import jax.numpy as jnp
from jax import lax

from jla._core import blockwise
from jla._core.cache import PathCache, counted, places
from jla._core.lengths import is_symbolic_dim
from jla._core.states import with_rank, zero_state
from jla._core.types import GateBiases, GateRates, RawGates

f32, i32 = jnp.float32, jnp.int32
# For what moves queries and keys: a product of hundreds of maps keeps every rounding.
exactly = functools.partial(jax.default_matmul_precision, "highest")
# The log decay of a segment's first token. Its exponential is 0, as is that of every sum that
# contains it. It is finite, so 0 times it is 0, and sums can be products with a matrix of 0 and 1.
NEVER = -1e30
# Tokens in a chunk: queries are moved past so many keys at once.
CHUNK = 64
# So many steps that follow one another are not a loop.
MOST_STEPS = 16


def l2norm(x, epsilon=1e-6):
    """`x / sqrt(sum(x**2) + epsilon)` over the last axis, computed in float32, in x's dtype."""
    x32 = x.astype(f32)
    squares = jnp.sum(x32 * x32, axis=-1, keepdims=True)
    return (x32 * lax.rsqrt(squares + epsilon)).astype(x.dtype)


def kda_decays(
    f: RawGates, A_log: GateRates, dt_bias: GateBiases, lower_bound: float | None = None
) -> jax.Array:
    """KDA's natural-log decays of the projection f [..., HV, K], float32; see `jla.kda_gate`."""
    shifted = f.astype(f32) + with_rank(dt_bias, f.ndim)
    rate = with_rank(jnp.exp(A_log)[:, None], f.ndim)
    if lower_bound is None:
        return -rate * jax.nn.softplus(shifted)
    return lower_bound * jax.nn.sigmoid(rate * shifted)


def kda_operands(f, A_log, dt_bias, beta, lower_bound=None, real=None):
    """KDA's decays and write strengths; where a token is not `real` [...], if given, both are 0."""
    g = kda_decays(f, A_log, dt_bias, lower_bound)
    if real is None:
        return g, beta
    return jnp.where(real[..., None, None], g, 0.0), jnp.where(real[..., None], beta, 0)


def mamba2_gates(d, A_log, dt_bias):
    """Mamba-2's step sizes and log decays of its projection d [..., H], float32."""
    dt = jax.nn.softplus(d.astype(f32) + with_rank(dt_bias, d.ndim))
    return dt, -with_rank(jnp.exp(A_log), d.ndim) * dt


def mamba2_operands(u, logits, dt, skip):
    """What Mamba-2 gives log-linear attention, and what passes it by.

    Args:
      u: [..., H, V]. logits: [..., H, L]. dt: [..., H], float32. skip: [H] or [H, V], float32.

    Returns:
      The values dt u, in u's dtype, the level scales softplus(logits), and skip u; float32.
    """
    u32 = u.astype(f32)
    values = (dt[..., None] * u32).astype(u.dtype)
    level_scales = jax.nn.softplus(logits.astype(f32))
    skip = skip if skip.ndim == 2 else skip[:, None]
    return values, level_scales, with_rank(skip, u.ndim) * u32


def abc_gates(s, starts=None, past=None):
    """ABC's writes and decays from its logits [B, T, H, M], in float32; see `jla.gsa`.

    With z the running logsumexp and d = s_t - z_{t-1}, the decay z_{t-1} - z_t is -softplus(d) and
    the write exp(s_t - z_t) is sigmoid(d): no difference of two long sums, and never above 0 or 1.

    Args:
      s: [B, T, H, M].
      starts: bool [B, T], the first tokens of segments, or None.
      past: a function of z [B, T, H, M], the running logsumexp of these tokens alone, to that of
        the tokens before, [B, H, M], and whether there are any, [B]; or None: there are none.

    Returns:
      s and g as `jla.gsa` takes them.
    """
    s = s.astype(f32)
    starts = jnp.zeros(s.shape[:2], bool) if starts is None else starts
    first = starts.at[:, 0].set(True)[:, :, None, None]

    def join(left, right):
        (first_left, z_left), (first_right, z_right) = left, right
        z = jnp.where(first_right, z_right, jnp.logaddexp(z_left, z_right))
        return first_left | first_right, z

    if is_symbolic_dim(s.shape[1]):  # which cannot be halved again and again
        z = _scanned(join, first, s)
    else:
        _, z = lax.associative_scan(join, (first, s), axis=1)
    before = z[:, :1]
    if past is not None:
        before, there = (x[:, None] for x in past(z))
        continues = there & (lax.cummax(starts.astype(i32), axis=1) == 0)
        z = jnp.where(continues[:, :, None, None], jnp.logaddexp(before, z), z)
        first = starts.at[:, 0].set(~there[:, 0])[:, :, None, None]
    d = s - jnp.concatenate([before, z[:, :-1]], axis=1)
    return jnp.where(first, 1.0, jax.nn.sigmoid(d)), jnp.where(first, 0.0, -jax.nn.softplus(d))


def _scanned(join, first, s):
    """`lax.associative_scan` over the tokens, one by one."""

    def token(before, inputs):
        new = join(before, inputs)
        return new, new[1]

    time_major = jnp.moveaxis(first, 1, 0), jnp.moveaxis(s, 1, 0)
    # The first token has no earlier ones.
    start = jax.tree.map(lambda x: x[0], time_major)
    return jnp.moveaxis(lax.scan(token, start, time_major)[1], 0, 1)


def prepare(k, w, beta):
    """What the chunks' keys and maps are, whatever the queries; all float32, [..., C, D].

    Returns:
      moved: the keys as the chunk's end sees them.
      writes: W'; the whole chunk's map is I - W^T W'.
      inner: [..., C, C], what one key's later maps take from its products inside the chunk.
    """
    with exactly():
        system = jnp.tril(beta * blockwise.pair_products(w, w), -1)
        triangle = _unit_lower_inverse(system) * blockwise.transposed(beta)
        writes = triangle @ w
        inner = triangle @ jnp.tril(blockwise.pair_products(w, k), -1)
        moved = k - blockwise.transposed(inner) @ w
    return moved, writes, inner


@jax.custom_jvp
def _unit_lower_inverse(matrix):
    """Inverts I + `matrix`, strictly lower triangular, [n, ..., C, C], C a power of two."""
    return _inverse_by_halves(-matrix)


def _inverse_by_halves(matrix):
    """Inverts I - `matrix`.

    With X and Y the inverses of the two diagonal blocks and L the block of `matrix` below, the
    whole inverse has Y L X below. The blocks of one size are inverted together: five steps for 64
    rows; row by row there would be 64.
    """
    half = matrix.shape[-1] // 2
    if half == 1:
        diagonal = jnp.expand_dims(jnp.eye(2, dtype=bool), range(matrix.ndim - 2))
        return jnp.where(diagonal, 1.0, matrix)
    first, below, last = (
        matrix[..., i : i + half, j : j + half] for i, j in ((0, 0), (half, 0), (half, half))
    )
    first, last = _inverse_by_halves(jnp.stack([first, last]))
    with exactly():
        below = lax.batch_matmul(last, lax.batch_matmul(below, first))
    upper = lax.pad(first, f32(0.0), [(0, 0, 0)] * (first.ndim - 1) + [(0, half, 0)])
    lower = lax.concatenate([below, last], first.ndim - 1)
    return lax.concatenate([upper, lower], first.ndim - 2)


@_unit_lower_inverse.defjvp
def _unit_lower_inverse_jvp(primals, tangents):
    inverse = _unit_lower_inverse(*primals)
    with exactly():
        return inverse, -(inverse @ tangents[0] @ inverse)


def sums_after(gates):
    """Sums of the gates [..., C, G]: after each token to its chunk's end, [..., 1, G, C], and of
    all the chunk's, [..., 1, G, 1].

    Every sum of gates here is of those alone that it stands for: a difference of two longer sums
    would keep no digit beside a strong gate.
    """
    later = jnp.triu(jnp.ones((gates.shape[-2],) * 2, f32), 1)
    with exactly():
        after = jnp.einsum("sr,...rg->...gs", later, gates)
    total = blockwise.transposed(jnp.sum(gates, axis=-2, keepdims=True))
    return after[..., None, :, :], total[..., None, :, :]


def fits(cache, starts, T):
    """Whether each token finds room, bool [B, T]."""
    place = jnp.arange(T, dtype=i32)[None]
    # On the right there is room for any length: the sum with a place could leave int32.
    begin = -cache.length[:, None]
    if starts is not None:
        begin = lax.cummax(jnp.where(starts, place, begin), axis=1)
    return place < cache.key.shape[1] + begin


def group_size(N):
    """Of N chunks about sqrt(N) make a group."""
    return N if is_symbolic_dim(N) or N < 4 else 1 << -(-(N - 1).bit_length() // 2)


def in_groups(*chunks):
    """Chunks, each [N, ...] or None, in groups, [size, groups, ...]; the last padded with zeros."""
    size = group_size(jax.tree.leaves(chunks)[0].shape[0])

    def grouped(x):
        if is_symbolic_dim(size):
            return x[:, None]
        x = jnp.pad(x, ((0, -x.shape[0] % size), *[(0, 0)] * (x.ndim - 1)))
        return jnp.swapaxes(x.reshape(-1, size, *x.shape[1:]), 0, 1)

    return jax.tree.map(grouped, chunks)


def ungrouped(x, N):
    """Undoes `in_groups` for one array: [size, groups, ...] to [N, ...]."""
    return x[:, 0] if is_symbolic_dim(N) else jnp.swapaxes(x, 0, 1).reshape(-1, *x.shape[2:])[:N]


def at_the_end(moved, w, writes, g):
    """What the row's last token sees, from groups of chunks, [size, groups, B, H, C, ...].

    All groups' chunks move to their group's end together. The groups' maps are multiplied one after
    another, and all keys then move to the row's end at once: with sqrt(N) chunks in a group,
    2 sqrt(N) products follow one another, and not N.

    Returns:
      The keys and the sums of the gates after each, in spans of tokens as `blockwise.merge` takes
      them, [groups, B, H, L, K] and [groups, B, H, L, G]; all the row's maps as one, [B, H, K, K];
      and the sum of all its gates, [B, H, 1, G]. Sums are None without gates.
    """
    eye = jnp.eye(w.shape[-1], dtype=f32)
    with exactly():
        # The chunks' maps, transposed: P_1^T ... P_C^T.
        maps = with_rank(eye, w.ndim) - blockwise.transposed(writes) @ w
    after = total = None
    if g is not None:
        after, total = (blockwise.transposed(x[..., 0, :, :]) for x in sums_after(g))

    def chunk(later, inputs):
        (sums, later), (moved, maps, after, total) = later, inputs
        with exactly():
            keys, later = moved @ later, maps @ later
        if g is None:
            return (None, later), (keys, None)
        return (sums + total, later), (keys, sums + after)

    def spans(x):
        return x.reshape(*x.shape[:3], -1, x.shape[-1])

    chunks = moved, maps, after, total
    if is_symbolic_dim(w.shape[0]):
        later, last = _nothing_later(maps[0], None if total is None else total[0]), None
    else:  # The last chunk of a group is at its end.
        moved, maps, after, total = jax.tree.map(lambda x: x[-1], chunks)
        chunks = jax.tree.map(lambda x: x[:-1], chunks)
        later, last = (total, maps), (moved, after)
    (total, maps), ends = _from_the_right(chunk, later, chunks, last, axis=3)
    keys, after = jax.tree.map(spans, ends)
    if w.shape[1] > 1:
        keys, after, maps, total = _groups_at_the_end(keys, after, maps, total)
    else:
        maps, total = jax.tree.map(lambda x: x[0], (maps, total))
    return keys, after, blockwise.transposed(maps), total


def _groups_at_the_end(keys, after, maps, total):
    """The groups' keys, sums, transposed maps and all their gates: of the row's end, of the row."""

    def group(later, inputs):
        (sums, later), (total, maps) = later, inputs
        with exactly():
            following = maps @ later
        return (None if sums is None else sums + total, following), (sums, later)

    later = _nothing_later(maps[0], None if total is None else total[0])
    (total, maps), (sums, later) = _from_the_right(group, later, (total, maps), axis=0)
    with exactly():
        keys = keys @ later
    return keys, None if after is None else after + sums, maps, total


def _nothing_later(maps, total):
    """The sum of gates and the map of no token, which lie as those given."""
    w = maps[..., 0, :]
    identity = zero_state(w, w) + with_rank(jnp.eye(w.shape[-1], dtype=f32), maps.ndim)
    return None if total is None else 0.0 * total, identity


def _from_the_right(step, carry, inputs, last=None, *, axis):
    """`lax.scan` from the last to the first, whose results are stacked along `axis`, and `last`, if
    given, behind them.

    A GPU takes some microseconds to start each operation of a loop, and copies what is carried and
    each step's inputs and results: there is none where the steps are few.
    """
    length = jax.tree.leaves(inputs)[0].shape[0]
    if is_symbolic_dim(length) or length > MOST_STEPS:
        unroll = 1 if is_symbolic_dim(length) else 4
        carry, results = lax.scan(step, carry, inputs, reverse=True, unroll=unroll)
        results = jax.tree.map(lambda x: jnp.moveaxis(x, 0, axis), results)
        if last is None:
            return carry, results

        def joined(x, last):
            return jnp.concatenate([x, jnp.expand_dims(last, axis)], axis=axis)

        return carry, jax.tree.map(joined, results, last)
    results = [] if last is None else [last]
    for i in reversed(range(length)):
        carry, result = step(carry, jax.tree.map(lambda x, i=i: x[i], inputs))
        results.insert(0, result)
    return carry, jax.tree.map(lambda *x: jnp.stack(x, axis=axis), *results)


def appended(cache, v, starts, keys, after, maps, total, *, empty=False):
    """The cache with the tokens of each row's last segment, from that segment's first place on;
    `empty` says that no row of the cache has a token yet."""
    (B, T), S = v.shape[:2], cache.key.shape[1]
    kept, border = cache.length, 0
    if starts is not None:
        kept = jnp.where(jnp.any(starts, axis=1), 0, kept)
        border = jnp.max(jnp.where(starts, jnp.arange(T, dtype=i32)[None], 0), axis=1)
    length = counted(kept, T - border)
    is_old = places(cache) < kept[:, None]
    # Where a row begins in its new tokens with S zeros on both sides, each of them at its place.
    begin = S + border - kept

    at_the_front = empty and starts is None and not any(map(is_symbolic_dim, (S, T)))

    def place_tokens(old, new):
        if at_the_front:
            return lax.pad(
                new[:, :S],
                jnp.zeros((), new.dtype),
                [(0, max(S - T, 0) if i == 1 else 0, 0) for i in range(new.ndim)],
            )
        new = jnp.pad(new, [(S if i == 1 else 0,) * 2 for i in range(new.ndim)])
        new = jax.vmap(lambda row, i: lax.dynamic_slice_in_dim(row, i, S))(new, begin)
        return new if empty else jnp.where(is_old.reshape(B, S, *[1] * (new.ndim - 2)), old(), new)

    def moved_keys():
        with exactly():
            return jnp.einsum("bshk,bhlk->bshl", cache.key, maps)

    key = place_tokens(moved_keys, blockwise.merge(keys, T))
    value = place_tokens(lambda: cache.value, v)
    decay = None
    if after is not None:
        after = blockwise.merge(after, T).reshape(B, T, -1)
        total = jnp.swapaxes(total, 1, 2).reshape(B, 1, -1)
        decay = place_tokens(lambda: cache.decay + total, after)
    return PathCache(key, value, decay, length)
