"""Recurrent states."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import export, lax

from jla._core.types import (
    Array,
    KeyProducts,
    Keys,
    LevelDecays,
    Levels,
    LogDecays,
    Positions,
    SlotKeys,
    SlotValues,
    SlotWrites,
    ValueProducts,
    Values,
)


class GSAState(NamedTuple):
    """The state of Gated Slot Attention, float32: the slots' keys and values.

    Example:
      empty = jla.GSAState(hk=jnp.zeros((2, 4, 16, 32)), hv=jnp.zeros((2, 4, 32, 16)))

    Attributes:
      hk: [B, H, K, M].
      hv: [B, H, M, V].
    """

    hk: SlotKeys
    hv: SlotValues


class LogLinearState(NamedTuple):
    """The state of log-linear attention: one decayed sum of `k v^T` for each Fenwick bucket.

    Level `l >= 1` is in use where bit `l - 1` of `position` is set, and then holds the `2**(l-1)`
    tokens of its bucket. The others, level 0 among them, are zeros, and nothing reads them. At
    position `2**(L-1)` all are zeros: L levels are full, and no token can follow. For decoding,
    `lazy` makes the form of it whose steps move half the bytes.

    Example:
      levels = jnp.zeros((2, 4, 15, 16, 16))  # for 16384 tokens
      empty = jla.LogLinearState(levels, position=jnp.zeros(2, jnp.int32))

    Attributes:
      levels: [B, H, L, K, V], float32.
      position: the number of tokens so far, [B], int32.
    """

    levels: Levels
    position: Positions

    def lazy(self) -> "LazyLogLinearState":
        """The same state in the form that steps change least of."""
        nothing = jnp.where(False, self.levels[..., 0, 0], 0.0)  # sharded as the levels are
        return LazyLogLinearState(self.levels, self.position, nothing)


class LazyLogLinearState(NamedTuple):
    """The state of log-linear attention for decoding: a level's decays are summed beside it.

    Where a `LogLinearState` has a level, this has one that is still to be decayed by
    `exp(log_decays)`. So a token writes one level alone, that into which others merge, and leaves
    all else in place. What is in use is told by `position` as there; levels that are not in use
    hold anything, and nothing reads them.

    Example:
      levels = jnp.zeros((2, 4, 15, 16, 16))  # for 16384 tokens
      state = jla.LogLinearState(levels, position=jnp.zeros(2, jnp.int32)).lazy()
      exact = state.settled()

    Attributes:
      levels: [B, H, L, K, V], float32.
      position: the number of tokens so far, [B], int32.
      log_decays: [B, H, L], float32, at most 0.
    """

    levels: Levels
    position: Positions
    log_decays: LevelDecays

    def settled(self) -> LogLinearState:
        """The `LogLinearState` that this stands for: its levels decayed, zeros where none is."""
        L = self.levels.shape[2]
        used = levels_in_use(self.position, L)[:, None]
        decay = jnp.exp(jnp.where(used, self.log_decays, 0.0))[..., None, None]
        levels = decay * jnp.where(used[..., None, None], self.levels, 0.0)
        return with_outgrown(levels, self.position)


class MesaState(NamedTuple):
    """The state of MesaNet, float32: decayed sums of `k k^T` and of `k v^T`.

    Example:
      empty = jla.MesaState(kk=jnp.zeros((2, 4, 16, 16)), kv=jnp.zeros((2, 4, 16, 16)))

    Attributes:
      kk: [B, H, K, K], symmetric and without negative eigenvalues.
      kv: [B, H, K, V].
    """

    kk: KeyProducts
    kv: ValueProducts


for _state in (GSAState, LazyLogLinearState, LogLinearState, MesaState):
    export.register_namedtuple_serialization(_state, serialized_name=f"jla.{_state.__name__}")


def zero_state(key: Array, value: Array) -> jax.Array:
    """Zeros [..., K, V], float32, sharded as one token's `key` [..., K] and `value` [..., V] are.

    `jnp.zeros` would be replicated: with explicit shardings, and inside `shard_map`, a scan refuses
    a carry that starts replicated and ends sharded. A select inherits its operand's sharding, and
    here ignores the operand's values.
    """
    key, value = (jax.lax.stop_gradient(x.astype(jnp.float32)) for x in (key, value))
    return hidden(jnp.where(False, key[..., :, None] * value[..., None, :], 0.0))


def hidden[Tree](x: Tree) -> Tree:
    """`x`, hidden from the compiler's constant folding, and its tangents and cotangents too.

    Without this, XLA's CPU compiler (jaxlib 0.11.2 and 0.12) reads beyond a buffer where a batched
    product has a right operand that is the same in all columns, as zeros and ones are, and a
    reduction follows: the results are arbitrary numbers. See docs/jax.md. Arrays that may be
    constants, or have constant gradients (that of a sum is ones), are hidden where they are in
    memory anyway.
    """
    return jax.tree.map(jax.lax.optimization_barrier, x)


def repeated(x: jax.Array, times: int, axis: int) -> jax.Array:
    """`jnp.repeat` along a counted axis. Where types carry shardings, `jnp.repeat` needs its
    result's sharding as an argument; a broadcast and a reshape infer it."""
    if times == 1:
        return x
    shape = list(x.shape)
    x = jnp.broadcast_to(
        jnp.expand_dims(x, axis + 1), (*shape[: axis + 1], times, *shape[axis + 1 :])
    )
    shape[axis] *= times
    return x.reshape(shape)


def moved_on(position: Positions, tokens: int | jax.Array) -> jax.Array:
    """The position after so many more tokens. Beyond int32 it is negative and stays so; levels
    serve no negative position."""
    return jnp.where(position < 0, position, position + tokens)


def levels_in_use(position: Positions, L: int) -> jax.Array:
    """Which of L levels hold something after `position` tokens [B]: bool [B, L]."""
    level = jnp.arange(L, dtype=jnp.int32)[None]
    bits = position[:, None] >> jnp.maximum(level - 1, 0)
    return (level > 0) & (bits % 2 == 1)


def bit_length(x: jax.Array) -> jax.Array:
    """As `int.bit_length`, of int32 that are not negative."""
    return 32 - lax.clz(x)


def merging_into(position: Positions) -> jax.Array:
    """The level into which the token at a position merges those below: 1 plus the number of the
    position's trailing ones. [B], int32."""
    return lax.population_count(position & ~(position + 1)) + 1


def used_levels(state: LogLinearState) -> Levels:
    """The levels whose bit of the position is set; the others are zeros."""
    used = levels_in_use(state.position, state.levels.shape[2])
    return jnp.where(used[:, None, :, None, None], state.levels, 0.0)


def outgrown(position: Positions, L: int) -> jax.Array:
    """Whether L levels do not serve a position: from 2**(L-1) on, and below 0."""
    return position >> (L - 1) != 0


def with_outgrown(levels: Levels, position: Positions) -> LogLinearState:
    """The state; its levels are NaN where L do not serve the last token's position."""
    last = jnp.where(position > 0, position - 1, position)
    lost = outgrown(last, levels.shape[2])[:, None, None, None, None]
    return LogLinearState(jnp.where(lost, jnp.nan, levels), position)


def lazy_decays(
    g: LogDecays, log_decays: LevelDecays, position: Positions
) -> tuple[LevelDecays, LevelDecays]:
    """The sums of log decays of a lazy state's levels as a token reads them, and after it.

    Zeros where nothing is in use; sums of numbers of one sign alone.

    Args:
      g: the token's, [B, H]. log_decays, position: the state's.
    """
    L = log_decays.shape[2]
    used = levels_in_use(position, L)[:, None]
    sums = jnp.where(used, log_decays + g[..., None], 0.0)
    level = jnp.arange(L, dtype=jnp.int32)[None]
    kept = (level > merging_into(position)[:, None])[:, None]
    return sums, jnp.where(kept, sums, 0.0)


def with_rank(x: Array, ndim: int) -> jax.Array:
    """x with axes of size 1 before its own, `ndim` in all; `jax_numpy_rank_promotion="raise"` asks
    for them."""
    return jnp.expand_dims(x, tuple(range(ndim - x.ndim)))


def zero_gsa_state(key: Keys, slots: SlotWrites, value: Values) -> GSAState:
    """An empty `GSAState`, sharded as one token's `key`, `slots` [..., M] and `value` are."""
    return GSAState(zero_state(key, slots), zero_state(slots, value))


def zero_log_linear_state(key: jax.Array, value: jax.Array, L: int) -> LogLinearState:
    """An empty `LogLinearState` of L levels, sharded as one token's `key` [B, HK, K] and `value`
    [B, H, V] are; the position is replicated."""
    B, H, V = value.shape
    zero = zero_state(repeated(key, H // key.shape[1], axis=1), value)
    levels = jnp.broadcast_to(zero[:, :, None], (B, H, L, key.shape[2], V))
    return LogLinearState(levels, jnp.zeros(B, jnp.int32))


def zero_mesa_state(key: Keys, value: Values) -> MesaState:
    """An empty `MesaState`, sharded as one token's `key` and `value` are."""
    return MesaState(zero_state(key, key), zero_state(key, value))
