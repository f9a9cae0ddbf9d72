"""MesaNet, token by token: the definition that everything else is tested against."""

import functools

import jax
import jax.numpy as jnp
from jax import lax

from jla._core import packed, pools
from jla._core.parts import l2norm
from jla._core.states import MesaState, with_rank, zero_mesa_state
from jla.reference import layers

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
    # A diagonal for each row: the gradient's sum over rows is then one of vectors, not of matrices.
    ridge = jnp.broadcast_to(lamb, k.shape)[..., None] * jnp.eye(k.shape[-1], dtype=f32)[None, None]
    x = jnp.linalg.solve(kk + ridge, q[..., None])[..., 0]
    o = _einsum("bhk,bhkv->bhv", x, kv)
    return o.astype(dtype), MesaState(kk, kv)


@pools.on_rows(shared=[5])
def mesa_step_by_row(q, k, v, g, beta, lamb, state, *, cg_steps):
    """`mesa_step` with a ridge for each row, [B, H, K]."""
    one = jax.vmap(functools.partial(mesa_step, cg_steps=cg_steps))
    rows = [x[:, None] for x in (q, k, v, g, beta)]
    o, state = one(*rows, lamb, MesaState(*(x[:, None] for x in state)))
    return o[:, 0], MesaState(*(x[:, 0] for x in state))


def mesa_token(
    q, k, v, a, a_bias, b, b_bias, lambda_params, gate, norm_scale, state,
    *, lower_bound, cg_steps, epsilon, dtype, step=mesa_step,
):  # fmt: skip
    """See `jla._token.mesa_token`; `step` is the implementation's."""
    q, k = l2norm(q), l2norm(k)
    a, b = (x.astype(f32) + with_rank(y.astype(f32), 2) for x, y in ((a, a_bias), (b, b_bias)))
    g, beta = jax.nn.log_sigmoid(a), jax.nn.sigmoid(b)
    lamb = jax.nn.softplus(lambda_params) + lower_bound
    o, state = step(q, k, v, g, beta, lamb, state, cg_steps=cg_steps)
    y = layers.rms_norm(o, norm_scale, gate, epsilon=epsilon, activation="silu")
    return y.astype(dtype), state


@functools.partial(jax.jit, static_argnames="cg_steps")
def mesa_net(q, k, v, g, beta, lamb, initial_state, segment_ids, *, cg_steps):
    """`lax.scan` over the tokens. See `jla.mesa_net`."""
    if initial_state is None:
        initial_state = zero_mesa_state(k[:, 0], v[:, 0])

    def step(*arrays):
        *arrays, state = arrays
        return mesa_step(*arrays, lamb, state, cg_steps=cg_steps)

    token, marks = packed.by_token(step, initial_state, segment_ids, v)
    time_major = tuple(jnp.moveaxis(x, 1, 0) for x in (q, k, v, g, beta, marks))
    state, o = lax.scan(token, initial_state, time_major)
    return jnp.moveaxis(o, 0, 1), state
