"""One token of Gated Slot Attention as a Pallas kernel: one pass over both states, in place."""

import functools

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from jla._core.axes import GSA, letters, of_step
from jla._core.pools import of_pool
from jla._core.shardwise import shardwise
from jla._core.states import GSAState
from jla.pallas.common import mosaic, pools, scratch, token
from jla.pallas.common.mosaic import f32, per_column, per_row
from jla.pallas.common.tiles import step_width
from jla.reference import gsa as reference

MULTIPLE = 16  # of K, V and M

_AXES = of_step(GSA)
_INPUTS = letters(_AXES, "q k v s g state.hk state.hv")
_OUTPUTS = letters(_AXES, "o state.hk state.hv")
_POOL_INPUTS = letters(of_pool(_AXES), "q k v s g state.hk state.hv slots")
_POOL_OUTPUTS = letters(of_pool(_AXES), "o state.hk state.hv")


def unsupported(q, k, v, s, *_):
    """Why the kernel cannot serve these arguments, or None."""
    K, V, M = q.shape[-1], v.shape[-1], s.shape[-1]
    if K % MULTIPLE or V % MULTIPLE or M % MULTIPLE:
        return (
            f"K={K}, V={V} and M={M}, and the step's kernel takes multiples of {MULTIPLE} "
            "(padding would copy the states)"
        )
    return None


@functools.partial(jax.jit, static_argnames="scale")
def gsa_step(q, k, v, s, g, state, *, scale, slots=None):
    """One token in one kernel. See `jla.gsa_step`.

        Hk <- Hk Diag(exp g) + k s^T;   Hv <- Diag(exp g) Hv + s v^T
        p = softmax(scale Hk^T q);      o = Hv^T p

    One CTA of a warpgroup has a head's states, in tiles of up to 8192 elements that stay in
    registers from the load to the store: a warp holds all rows of a quarter of the columns, so that
    sums over rows are shuffles inside the warp. Only the logits cross warps, by way of SMEM. The
    first tile of Hv is on its way while Hk is worked on. All arithmetic is float32.

    The states are aliased to the new ones. They are overwritten where their buffers are donated or
    are temporaries of the caller's program, and copied before the kernel otherwise. Of a pool each
    CTA reads and writes the row that its slot names.

    Floor at B=128 H=16 K=V=128 M=64: 0.272 GB, 0.063 ms at 4.3 TB/s.

    Derivatives are those of the reference's formula, in XLA.
    """
    if slots is None:
        o, hk, hv = _differentiable(scale, _INPUTS, _OUTPUTS)(q, k, v, s, g, *state)
    else:
        step = _differentiable(scale, _POOL_INPUTS, _POOL_OUTPUTS)
        o, hk, hv = step(q, k, v, s, g, *state, slots)
    return o, GSAState(hk, hv)


@functools.partial(jax.jit, static_argnames=("normalizer", "scale"))
def gsa_token(q, k, v, f, state, *, normalizer, scale):
    """`gsa_step` of a layer's gates. See `jla._token.gsa_token`."""
    run = functools.partial(_step, g=None, scale=scale, normalizer=normalizer)

    def kernel(q, k, v, f, hk, hv):
        return run(q, k, v, f, hk=hk, hv=hv)

    def formula(q, k, v, f, hk, hv):
        options = dict(normalizer=normalizer, scale=scale)
        o, state = reference.gsa_token(q, k, v, f, GSAState(hk, hv), **options)
        return o, *state

    o, hk, hv = token.by_formula(kernel, formula, q, k, v, f, *state)
    return o, GSAState(hk, hv)


@functools.cache
def _differentiable(scale, inputs, outputs):
    run = functools.partial(_step, scale=scale)
    step = jax.custom_jvp(lambda *arrays: shardwise(run, inputs, outputs)(*arrays))

    def formula(q, k, v, s, g, hk, hv, slots=None):
        state = GSAState(hk, hv)
        o, state = reference.gsa_step(q, k, v, s, g, state, scale=scale, slots=slots)
        return o, *state

    @step.defjvp
    def _(primals, tangents):
        return step(*primals), jax.jvp(formula, primals, tangents)[1]

    return step


def _step(q, k, v, s, g, hk, hv, slots=None, *, scale, normalizer=None):
    """The kernel call; with a normalizer, s is the projection that the gates are made of, and g is
    None."""
    R, H, K, M = hk.shape
    (B, HQ, _), V = q.shape, v.shape[-1]
    group = HQ // H
    load = functools.partial(mosaic.load, optimized=False)
    key_width, value_width = step_width(K, M), step_width(M, V)
    of_keys, of_values = (mosaic.columns_by_warp(x) for x in (key_width, value_width))

    def gates(refs, place, layout):
        """A token's decays and what it writes."""
        writes = load(refs.s.at[place], layout)
        if normalizer is None:
            return jnp.exp(load(refs.g.at[place], layout)), writes
        decay = jnp.exp(token.softplus(0.0 - writes) * (-1.0 / normalizer))
        return decay, 1.0 - decay

    def body(refs):
        b, h = lax.axis_index("b"), lax.axis_index("h")

        def advance(row):
            def value_tile(ref, i):
                return ref.at[row, h, :, pl.ds(i * value_width, value_width)]

            values = load(value_tile(refs.hv, 0), of_values)
            key = per_row(load(refs.k.at[b, h], of_keys.reduce(1)), key_width)
            for i in range(M // key_width):
                columns = pl.ds(i * key_width, key_width)
                decay, writes = gates(refs, (b, h, columns), of_keys.reduce(0))
                state = load(refs.hk.at[row, h, :, columns], of_keys) * per_column(decay, K)
                state = state + key * per_column(writes, K)
                mosaic.store(refs.new_hk.at[row, h, :, columns], state)
                for j in range(group):
                    query = per_row(load(refs.q.at[b, h * group + j], of_keys.reduce(1)), key_width)
                    refs.logits[j].at[columns][...] = scale * jnp.sum(state * query, axis=0)
            plgpu.commit_smem()

            of_slots = gates(refs, (b, h), of_values.reduce(1))
            decay, writes = (per_row(x, value_width) for x in of_slots)
            for i in range(V // value_width):
                columns = pl.ds(i * value_width, value_width)
                if i:
                    values = load(value_tile(refs.hv, i), of_values)
                value = per_column(load(refs.v.at[b, h, columns], of_values.reduce(0)), M)
                state = values * decay + writes * value
                mosaic.store(value_tile(refs.new_hv, i), state)
                for j in range(group):
                    logit = per_row(load(refs.logits[j], of_values.reduce(1)), value_width)
                    p = jnp.exp(logit - per_column(jnp.max(logit, axis=0), M))
                    o = jnp.sum(p * state, axis=0) / jnp.sum(p, axis=0)
                    mosaic.store(refs.o.at[b, h * group + j, columns], o.astype(v.dtype))

        def idle():
            for i in range(V // value_width):
                columns = pl.ds(i * value_width, value_width)
                zeros = mosaic.zeros((value_width,), of_values.reduce(0), v.dtype)
                for j in range(group):
                    mosaic.store(refs.o.at[b, h * group + j, columns], zeros)

        pools.on_row(refs.slots, b, R, advance, idle)
        parts = pools.columns(of_keys, key_width, M, h)
        pools.keep_rest(refs.slots, b, refs.hk, refs.new_hk, *parts)
        parts = pools.columns(of_values, value_width, V, h)
        pools.keep_rest(refs.slots, b, refs.hv, refs.new_hv, *parts)

    out = scratch.kernel(
        body,
        inputs=dict(q=q, k=k, v=v, s=s, g=g, hk=hk, hv=hv, slots=slots),
        outputs=dict(
            o=jax.ShapeDtypeStruct((B, HQ, V), v.dtype),
            new_hk=jax.ShapeDtypeStruct(hk.shape, f32),
            new_hv=jax.ShapeDtypeStruct(hv.shape, f32),
        ),
        scratch=dict(logits=[plgpu.SMEM((M,), f32) for _ in range(group)]),
        in_place=dict(hk="new_hk", hv="new_hv"),
        grid=(B, H),
        grid_names=("b", "h"),
    )
    return tuple(out)
