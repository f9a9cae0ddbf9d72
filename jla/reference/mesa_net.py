"""MesaNet, token by token: the definition that everything else is tested against."""

import functools

import jax
import jax.numpy as jnp
from jax import lax

from jla._core import pools
from jla._core.segments import segment_starts
from jla._core.states import MesaState, zero_mesa_state

f32 = jnp.float32
_einsum = functools.partial(jnp.einsum, precision=lax.Precision.HIGHEST)


@pools.on_rows(shared=[5])
@functools.partial(jax.jit, static_argnames="cg_steps")
def mesa_step(q, k, v, g, beta, lamb, state, *, cg_steps):
    """One token. See `jla.mesa_step`."""
    del cg_steps  # the solution is exact
    dtype = v.dtype
    q, k, v, beta = (x.astype(f32) for x in (q, k, v, beta))
    decay = jnp.exp(g)[..., None, None]
    write = beta[..., None, None] * k[..., :, None]
    kk = decay * state.kk + write * k[..., None, :]
    kv = decay * state.kv + write * v[..., None, :]
    ridge = lamb[..., None] * jnp.eye(k.shape[-1], dtype=f32)[None]
    x = jnp.linalg.solve(kk + ridge[None], q[..., None])[..., 0]
    o = _einsum("bhk,bhkv->bhv", x, kv)
    return o.astype(dtype), MesaState(kk, kv)


@functools.partial(jax.jit, static_argnames="cg_steps")
def mesa_net(q, k, v, g, beta, lamb, initial_state, segment_ids, *, cg_steps):
    """`lax.scan` over the tokens. See `jla.mesa_net`."""
    if segment_ids is None:
        starts = jnp.zeros(v.shape[:2], bool)
    else:
        starts = segment_starts(segment_ids)
    if initial_state is None:
        initial_state = zero_mesa_state(k[:, 0], v[:, 0])

    def token(state, inputs):
        *arrays, start = inputs
        state = jax.tree.map(lambda x: jnp.where(start[:, None, None, None], 0.0, x), state)
        o, state = mesa_step(*arrays, lamb, state, cg_steps=cg_steps)
        return state, o

    time_major = tuple(jnp.moveaxis(x, 1, 0) for x in (q, k, v, g, beta, starts))
    state, o = lax.scan(token, initial_state, time_major)
    return jnp.moveaxis(o, 0, 1), state
