"""MesaNet by chunks, solved by conjugate gradients; docs/mesa_net.md derives the formulas."""

import functools

import jax
import jax.numpy as jnp
from jax import lax

from jla._core import blockwise, packed, pools
from jla._core.lengths import chunk_size
from jla._core.segments import segment_starts
from jla._core.states import MesaState, hidden, zero_mesa_state
from jla.reference import mesa_net as reference
from jla.xla.conjugate_gradients import SOLUTION, solve

__all__ = ["mesa_net", "mesa_step", "mesa_token"]

f32 = jnp.float32
# All products: what one rounds, the next iterations of conjugate gradients cannot repair.
_einsum = functools.partial(jnp.einsum, precision=lax.Precision.HIGHEST)

# Tokens in a chunk. Its first state costs every token 2 K^2 operations an iteration, its own keys
# 4 CHUNK K, and there are two states a chunk in memory.
CHUNK = 64


def tolerance(dtype):
    """The relative residual at which a token stops, for inputs of this dtype.

    In float32, rounding leaves little less; bfloat16 and float16 round the outputs to 4e-3 and
    5e-4. docs/mesa_net.md measures the errors that result.
    """
    return 1e-6 if jnp.dtype(dtype) == f32 else 1e-4


@pools.on_rows(shared=[5])
@functools.partial(jax.jit, static_argnames="cg_steps")
def mesa_step(q, k, v, g, beta, lamb, state, *, cg_steps):
    """One token. See `jla.mesa_step`."""
    dtype = v.dtype
    q, k, v, beta = (x.astype(f32) for x in (q, k, v, beta))
    decay = jnp.exp(g)[..., None, None]
    write = beta[..., None, None] * k[..., :, None]
    kk = decay * state.kk + write * k[..., None, :]
    kv = decay * state.kv + write * v[..., None, :]
    x = solve(_times_state, cg_steps, tolerance(dtype), (kk, lamb), lamb[None], q)
    return _einsum("bhk,bhkv->bhv", x, kv).astype(dtype), MesaState(kk, kv)


def _times_state(matrix, x):
    """(Hkk + Diag(lamb)) x for x [B, H, K]."""
    kk, lamb = matrix
    return _einsum("bhkl,bhl->bhk", kk, x) + lamb[None] * x


def mesa_token(*arrays, **options):
    """See `jla._token.mesa_token`."""
    return reference.mesa_token(*arrays, **options, step=mesa_step)


@functools.partial(jax.jit, static_argnames="cg_steps")
def mesa_net(q, k, v, g, beta, lamb, initial_state, segment_ids, *, cg_steps):
    """All chunks at once, but for the states. See `jla.mesa_net`.

    It is checkpointed: the backward pass keeps the inputs and the solution x, and computes the
    chunks' states and decays again; solving again would cost `cg_steps` times as much.
    """
    size = chunk_size(q.shape[1], CHUNK)
    policy = jax.checkpoint_policies.save_only_these_names(SOLUTION)
    checkpointed = jax.checkpoint(functools.partial(_run, cg_steps, size), policy=policy)
    run = functools.partial(checkpointed, lamb)
    if packed.count(initial_state) is not None:
        return packed.by_chunks(run, (q, k, v, g, beta), initial_state, segment_ids, size)
    if segment_ids is not None:
        g = jnp.where(segment_starts(segment_ids)[..., None], -jnp.inf, g)
    if initial_state is None:
        initial_state = zero_mesa_state(k[:, 0], v[:, 0])
    return run(q, k, v, g, beta, initial_state, None)


def _run(cg_steps, size, lamb, q, k, v, g, beta, state, owner):
    T, dtype = q.shape[1], v.dtype

    def by_chunk(x):
        """[B, T, H, D] to [B, H, N, C, D]; the tokens that are missing from the last are zeros."""
        x = blockwise.split(x.astype(f32), size * -(-T // size))[0]
        return blockwise.blocks(x, size)

    q, k, v, g, beta = map(by_chunk, (q, k, v, g[..., None], beta[..., None]))
    decay, prefix = _decays(g)
    weights = decay * jnp.swapaxes(beta, -1, -2)
    suffix = jnp.swapaxes(decay[..., -1:, :], -1, -2)

    writes = suffix * beta * k
    states, state = _entering(
        hidden(state),
        MesaState(*(_einsum("bhnck,bhncd->bhnkd", writes, x) for x in (k, v))),
        prefix[..., -1:, :],
        owner,
    )
    # For each row of the batch, as the solver's other operands: in a shard_map over rows all
    # operands of its loop must vary over the same axes.
    lamb = jnp.where(False, q[:, :, :1, :1], lamb[:, None, None, :])
    matrix = states.kk, prefix, weights, k, lamb
    x = solve(_times_chunk, cg_steps, tolerance(dtype), matrix, lamb, q)
    o = prefix * _einsum("bhnck,bhnkv->bhncv", x, states.kv)
    o = o + _einsum("bhnij,bhnjv->bhniv", _scores(weights, x, k), v)
    o = o.reshape(*o.shape[:2], -1, o.shape[-1])
    return blockwise.merge(o[None], T).astype(dtype), hidden(state)


def _decays(g):
    """From the log decays [..., C, 1], the decay from token j to token t, [..., C, C] with zeros
    where j > t, and from the chunk's start to each token (its own included), [..., C, 1].

    Each is the exponential of a sum of its own gates: a difference of two longer sums would keep no
    digit beside a strong gate.
    """
    C = g.shape[-2]
    sums = jnp.cumsum(jnp.where(jnp.tri(C, k=-1, dtype=bool), g, 0.0), axis=-2)
    decay = jnp.where(jnp.tri(C, dtype=bool), jnp.exp(sums), 0.0)
    return decay, jnp.exp(jnp.cumsum(g, axis=-2))


def _times_chunk(matrix, x):
    """(Hkk_t + Diag(lamb)) x_t for the tokens of all chunks, x [B, H, N, C, K]."""
    kk, prefix, weights, k, lamb = matrix
    before = prefix * _einsum("bhnkl,bhncl->bhnck", kk, x)
    return before + _einsum("bhnij,bhnjk->bhnik", _scores(weights, x, k), k) + lamb * x


def _scores(weights, x, k):
    return weights * _einsum("bhnik,bhnjk->bhnij", x, k)


def _entering(state, writes, total, owner):
    """The states that enter the chunks, [B, H, N, K, ...], and the one that leaves the last.

    With an owner of each chunk, [B, N], `state` is those of all segments.
    """

    def chunk(states, inputs):
        (writes, total), owner = inputs
        state = packed.take(states, owner)
        after = jax.tree.map(lambda x, write: total * x + write, state, writes)
        return packed.put(states, after, owner), state

    chunk_major = jax.tree.map(lambda x: jnp.moveaxis(x, 2, 0), (writes, total))
    owner = None if owner is None else jnp.moveaxis(owner, 1, 0)
    state, states = lax.scan(chunk, state, (chunk_major, owner))
    return jax.tree.map(lambda x: jnp.moveaxis(x, 0, 2), states), state
