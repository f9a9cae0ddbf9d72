"""One token of a layer of KDA as a Pallas kernel: norms of q and k, gates, step, gated norm."""

import functools

import jax
import jax.numpy as jnp
from jax import lax

from jla.pallas.common import mosaic, scratch, token
from jla.pallas.common.mosaic import f32, per_row
from jla.pallas.common.token import load
from jla.pallas.kda.step import advance
from jla.reference import kda as reference

SDS = jax.ShapeDtypeStruct


def unsupported(q, k, v, *_):
    """Why the kernel cannot serve these arguments, or None."""
    return token.unsupported_here() or token.unsupported_heads(K=q.shape[-1], V=v.shape[-1])


@functools.partial(jax.jit, static_argnames=("lower_bound", "strength", "epsilon", "dtype"))
def kda_token(
    q, k, v, f, A_log, dt_bias, b, gate, gate_bias, norm_scale, state,
    *, lower_bound, strength, epsilon, dtype,
):  # fmt: skip
    """See `jla._token.kda_token`.

    The step is that of `step.kda_step`, but a CTA has all K x V elements of a state: 128 registers
    a thread, where K = V = 128. The gates are made as the layer's formula makes them, with the
    approximate exp2 and log2; all arithmetic is float32, and the step's output is not rounded
    before its norm.

    Floor at B=64 HV=8 K=V=128: 67 MB, 0.0156 ms at 4.3 TB/s; predicted 0.019 ms. At B=1 a head's
    64 KB come by one multiprocessor: 0.003 ms.

    Derivatives, and vmap, are those of the reference's formula, in XLA.
    """
    options = dict(lower_bound=lower_bound, strength=strength, epsilon=epsilon, dtype=dtype)
    if gate_bias is None:
        gate_bias = jnp.zeros(gate.shape[1:], f32)
    arrays = q, k, v, f, A_log, dt_bias, b, gate, gate_bias, norm_scale, state
    kernel, formula = (functools.partial(x, **options) for x in (_run, reference.kda_token))
    return token.by_formula(kernel, formula, *arrays)


def _run(
    q, k, v, f, A_log, dt_bias, b, gate, gate_bias, norm_scale, state,
    *, lower_bound, strength, epsilon, dtype,
):  # fmt: skip
    """The kernel call."""
    (B, HV, V), K = v.shape, q.shape[-1]
    group = HV // q.shape[1]
    layout = mosaic.columns_by_warp(V)
    by_row, by_column = layout.reduce(1), layout.reduce(0)

    def log_decay(refs, b, h):
        shifted = load(refs.f.at[b, h], by_row) + load(refs.dt_bias.at[h], by_row)
        rate = jnp.exp(refs.A_log[h])
        if lower_bound is None:
            return token.softplus(shifted) * (0.0 - rate)
        return lower_bound * mosaic.sigmoid(rate * shifted)

    def body(refs):
        b, h = lax.axis_index("b"), lax.axis_index("h")
        state = load(refs.state.at[b, h], layout)
        key = token.unit(load(refs.k.at[b, lax.div(h, group)], by_row))
        query = token.unit(load(refs.q.at[b, lax.div(h, group)], by_row))
        decay = per_row(jnp.exp(log_decay(refs, b, h)), V)
        beta = strength * mosaic.sigmoid(refs.b[b, h].astype(f32))
        value = load(refs.v.at[b, h], by_column)
        state, o = advance(state, decay, per_row(query, V), per_row(key, V), value, beta)
        mosaic.store(refs.new_state.at[b, h], state)
        o = token.normed(o * K**-0.5, load(refs.norm_scale, by_column), epsilon)
        shifted = load(refs.gate.at[b, h], by_column) + load(refs.gate_bias.at[h], by_column)
        mosaic.store(refs.o.at[b, h], (o * mosaic.sigmoid(shifted)).astype(dtype))

    out = scratch.kernel(
        body,
        inputs=dict(
            q=q, k=k, v=v, f=f, A_log=A_log, dt_bias=dt_bias, b=b, gate=gate, gate_bias=gate_bias,
            norm_scale=norm_scale, state=state,
        ),
        outputs=dict(o=SDS(v.shape, dtype), new_state=SDS(state.shape, state.dtype)),
        scratch={},
        in_place=dict(state="new_state"),
        grid=(B, HV),
        grid_names=("b", "h"),
    )  # fmt: skip
    return out.o, out.new_state
