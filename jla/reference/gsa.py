"""Gated Slot Attention, token by token: the definition that everything else is tested against."""

import functools

import jax
import jax.numpy as jnp
from jax import lax

from jla._core import packed, pools
from jla._core.segments import segment_starts
from jla._core.states import GSAState, repeated, zero_gsa_state

f32 = jnp.float32
_einsum = functools.partial(jnp.einsum, precision=lax.Precision.HIGHEST)


@pools.on_rows()
@functools.partial(jax.jit, static_argnames="scale")
def gsa_step(q, k, v, s, g, state, *, scale):
    """One token. See `jla.gsa_step`."""
    group = q.shape[1] // k.shape[1]
    dtype = v.dtype
    q, k, v, s = (x.astype(f32) for x in (q, k, v, s))
    decay = jnp.exp(g)
    hk = state.hk * decay[..., None, :] + k[..., :, None] * s[..., None, :]
    hv = decay[..., :, None] * state.hv + s[..., :, None] * v[..., None, :]
    keys, values = (repeated(x, group, axis=1) for x in (hk, hv))
    p = jax.nn.softmax(scale * _einsum("bhk,bhkm->bhm", q, keys), axis=-1)
    o = _einsum("bhm,bhmv->bhv", p, values)
    return o.astype(dtype), GSAState(hk, hv)


def gsa_token(q, k, v, f, state, *, normalizer, scale):
    """See `jla._token.gsa_token`."""
    g = jax.nn.log_sigmoid(f.astype(f32)) / normalizer
    return gsa_step(q, k, v, -jnp.expm1(g), g, state, scale=scale)


@functools.partial(jax.jit, static_argnames="scale")
def gsa(q, k, v, s, g, initial_state, segment_ids, *, scale):
    """`lax.scan` over the tokens. See `jla.gsa`."""
    if g is None:
        starts = jnp.zeros(s.shape[:2], bool)
        if segment_ids is not None:
            starts = segment_starts(segment_ids)
        s, g = _abc_gates(s.astype(f32), starts)
    if initial_state is None:
        initial_state = zero_gsa_state(k[:, 0], g[:, 0], v[:, 0])
    step = functools.partial(gsa_step, scale=scale)
    token, marks = packed.by_token(step, initial_state, segment_ids, v)
    time_major = tuple(jnp.moveaxis(x, 1, 0) for x in (q, k, v, s, g, marks))
    state, o = lax.scan(token, initial_state, time_major)
    return jnp.moveaxis(o, 0, 1), state


def _abc_gates(s, starts):
    """ABC's writes and decays: `exp(s_t - z_t)` and `z_{t-1} - z_t`, z the running logsumexp."""
    first = starts.at[:, 0].set(True)

    def token(z_before, inputs):
        s, first = inputs
        first = first[:, None, None]
        z = jnp.where(first, s, jnp.logaddexp(z_before, s))
        return z, (jnp.exp(s - z), jnp.where(first, 0.0, z_before - z))

    time_major = jnp.moveaxis(s, 1, 0), jnp.moveaxis(first, 1, 0)
    _, gates = lax.scan(token, s[:, 0], time_major)
    return tuple(jnp.moveaxis(x, 0, 1) for x in gates)
