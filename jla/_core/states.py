"""Recurrent states."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import export

from jla._core.types import (
    Array,
    KeyProducts,
    Keys,
    Levels,
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
    position `2**(L-1)` all are zeros: L levels are full, and no token can follow.

    Example:
      levels = jnp.zeros((2, 4, 15, 16, 16))  # for 16384 tokens
      empty = jla.LogLinearState(levels, position=jnp.zeros(2, jnp.int32))

    Attributes:
      levels: [B, H, L, K, V], float32.
      position: the number of tokens so far, [B], int32.
    """

    levels: Levels
    position: Positions


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


for _state in (GSAState, LogLinearState, MesaState):
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
