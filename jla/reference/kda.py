"""Kimi Delta Attention, token by token: the definition that everything else is tested against."""

import functools

import jax
import jax.numpy as jnp
from jax import lax

from jla._core import packed, pools
from jla._core.parts import kda_operands, l2norm
from jla._core.states import repeated, zero_state
from jla.reference import layers

f32 = jnp.float32
_einsum = functools.partial(jnp.einsum, precision=lax.Precision.HIGHEST)


@pools.on_rows()
@functools.partial(jax.jit, static_argnames="scale")
def kda_step(q, k, v, g, beta, state, *, scale):
    """One token. See `jla.kda_step`."""
    group = v.shape[1] // q.shape[1]
    q, k = (repeated(x.astype(f32), group, axis=1) for x in (q, k))
    state = jnp.exp(g)[..., None] * state
    error = v.astype(f32) - _einsum("bhk,bhkv->bhv", k, state)
    write = beta.astype(f32)[..., None] * error
    state = state + k[..., :, None] * write[..., None, :]
    o = scale * _einsum("bhk,bhkv->bhv", q, state)
    return o.astype(v.dtype), state


@functools.partial(jax.jit, static_argnames="scale")
def kda(q, k, v, g, beta, initial_state, segment_ids, *, scale):
    """`lax.scan` over the tokens. See `jla.kda`."""
    if initial_state is None:
        initial_state = zero_state(g[:, 0], v[:, 0])
    step = functools.partial(kda_step, scale=scale)
    token, marks = packed.by_token(step, initial_state, segment_ids, v)
    time_major = tuple(jnp.moveaxis(x, 1, 0) for x in (q, k, v, g, beta, marks))
    state, o = lax.scan(token, initial_state, time_major)
    return jnp.moveaxis(o, 0, 1), state


def kda_from_projection(
    q, k, v, f, A_log, dt_bias, beta, initial_state, segment_ids, real,
    *, scale, lower_bound, normalize=False,
):  # fmt: skip
    """`kda` with the decays of its formula. See `jla._fused.kda_from_projection`."""
    q, k = (l2norm(x) if normalize else x for x in (q, k))
    g, beta = kda_operands(f, A_log, dt_bias, beta, lower_bound, real)
    return kda(q, k, v, g, beta, initial_state, segment_ids, scale=scale)


def kda_token(
    q, k, v, f, A_log, dt_bias, b, gate, gate_bias, norm_scale, state,
    *, lower_bound, strength, epsilon, dtype,
):  # fmt: skip
    """See `jla._token.kda_token`."""
    q, k = l2norm(q), l2norm(k)
    beta = strength * jax.nn.sigmoid(b.astype(f32))
    g, beta = kda_operands(f, A_log, dt_bias, beta, lower_bound)
    o, state = kda_step(q, k, v, g, beta, state, scale=q.shape[-1] ** -0.5)
    y = layers.rms_norm(o, norm_scale, gate, gate_bias, epsilon=epsilon)
    return y.astype(dtype), state
