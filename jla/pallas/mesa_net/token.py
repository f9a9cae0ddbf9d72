"""One token of MesaNet's layer as a Pallas kernel: norms of q and k, gates, step, gated norm."""

import functools

import jax
from jax import lax
from jax.experimental.pallas import mosaic_gpu as plgpu

from jla._core.states import MesaState
from jla.pallas.common import mosaic, scratch, token
from jla.pallas.common.mosaic import f32
from jla.pallas.common.token import load
from jla.pallas.mesa_net import step
from jla.reference import mesa_net as reference

SDS = jax.ShapeDtypeStruct


def unsupported(q, k, v, *_):
    """Why the kernel cannot serve these arguments, or None."""
    return token.unsupported_here() or step.unsupported(q, k, v)


@functools.partial(jax.jit, static_argnames=("lower_bound", "cg_steps", "epsilon", "dtype"))
def mesa_token(
    q, k, v, a, a_bias, b, b_bias, lambda_params, gate, norm_scale, state,
    *, lower_bound, cg_steps, epsilon, dtype,
):  # fmt: skip
    """See `jla._token.mesa_token`, and for the kernel `step.mesa_step`.

    Floor at B=64 H=8 K=V=128: 134 MB, 0.031 ms at 4.3 TB/s; 0.037 predicted, as the step's.

    Derivatives, and vmap, are those of the reference's formula, in XLA.
    """
    gates = () if gate is None else (gate,)
    options = dict(steps=cg_steps, tolerance=step.tolerance_of(dtype), dtype=dtype)
    kernel = functools.partial(_run, bound=lower_bound, epsilon=epsilon, **options)

    def formula(q, k, v, a, a_bias, b, b_bias, lambda_params, scale, kk, kv, gate=None):
        arrays = q, k, v, a, a_bias, b, b_bias, lambda_params, gate, scale, MesaState(kk, kv)
        options = dict(lower_bound=lower_bound, cg_steps=cg_steps, epsilon=epsilon)
        options["dtype"] = dtype
        o, state = reference.mesa_token(*arrays, **options)
        return o, *state

    arrays = q, k, v, a, a_bias, b, b_bias, lambda_params, norm_scale, *state, *gates
    o, kk, kv = token.by_formula(kernel, formula, *arrays)
    return o, MesaState(kk, kv)


def _run(
    q, k, v, a, a_bias, b, b_bias, lambda_params, norm_scale, kk, kv, gate=None, *, dtype, **options
):
    """The kernel call."""
    B, H, K = q.shape
    out = scratch.kernel(
        functools.partial(_body, **options),
        inputs=dict(
            q=q, k=k, k_by_column=k, v=v, a=a, a_bias=a_bias, b=b, b_bias=b_bias,
            lambda_params=lambda_params, gate=gate, norm_scale=norm_scale, kk=kk, kv=kv,
        ),
        outputs=dict(
            o=SDS(v.shape, dtype), new_kk=SDS(kk.shape, f32), new_kv=SDS(kv.shape, f32)
        ),
        scratch=dict(vector=plgpu.SMEM((K,), f32)),
        in_place=dict(kk="new_kk", kv="new_kv"),
        grid=(B, H),
        grid_names=("b", "h"),
    )  # fmt: skip
    return tuple(out)


def _body(refs, *, bound, epsilon, **options):
    b, h = lax.axis_index("b"), lax.axis_index("h")
    step.advance(refs, b, h, _Made(refs, b, h, bound, epsilon), b, **options)


class _Made(step.Given):
    """What the step takes, made of a layer's projections."""

    def __init__(self, refs, b, h, bound, epsilon):
        self.refs, self.place, self.head = refs, (b, h), h
        self.bound, self.epsilon = bound, epsilon

        def gate(x, bias):
            return mosaic.sigmoid(x[b, h].astype(f32) + bias[h].astype(f32))

        self.decay, self.strength = gate(refs.a, refs.a_bias), gate(refs.b, refs.b_bias)

    def query(self, layout):
        return token.unit(super().query(layout))

    def key_by_row(self, layout):
        return token.unit(super().key_by_row(layout))

    def key_by_column(self, layout):
        return token.unit(super().key_by_column(layout))

    def ridge(self, layout):
        return token.softplus(load(self.refs.lambda_params.at[self.head], layout)) + self.bound

    def output(self, o, layout):
        o = token.normed(o, load(self.refs.norm_scale, layout), self.epsilon)
        if self.refs.gate is None:
            return o
        gate = load(self.refs.gate.at[self.place], layout)
        return o * gate * mosaic.sigmoid(gate)
