"""One token of log-linear Mamba-2 as a Pallas kernel: gates, step and skip."""

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental.pallas import mosaic_gpu as plgpu

from jla._core.parts import mamba2_gates
from jla._core.states import LazyLogLinearState, lazy_decays, moved_on
from jla.pallas.common import scratch, token
from jla.pallas.common.mosaic import f32
from jla.pallas.common.scratch import barrier_for
from jla.pallas.common.tiles import step_width
from jla.pallas.common.token import load
from jla.pallas.log_linear import step
from jla.reference import log_linear as reference

SDS = jax.ShapeDtypeStruct


def unsupported(q, k, u, *_):
    """Why the kernel cannot serve these arguments, or None."""
    return token.unsupported_here() or step.unsupported(q, u)


@jax.jit
def log_linear_token(q, k, u, d, logits, A_log, dt_bias, level_weight, skip, state):
    """See `jla._token.log_linear_token`, and for the kernel `step.log_linear_step` of a lazy state.

    The sums of log decays after the token, and the position, are XLA's, beside the kernel.

    Derivatives, and vmap, are those of the reference's formula, in XLA.
    """

    def formula(q, k, u, d, logits, A_log, dt_bias, level_weight, skip, *state):
        arrays = q, k, u, d, logits, A_log, dt_bias, level_weight, skip
        o, state = reference.log_linear_token(*arrays, LazyLogLinearState(*state))
        return o, *state

    arrays = q, k, u, d, logits, A_log, dt_bias, level_weight, skip, *state
    o, *new = token.by_formula(_run, formula, *arrays)
    return o, LazyLogLinearState(*new)


def _run(q, k, u, d, logits, A_log, dt_bias, level_weight, skip, levels, position, log_decays):
    """The kernel call, and what lies beside it."""
    (B, H, V), K = u.shape, levels.shape[3]
    width = step_width(K, V)
    out = scratch.kernel(
        _body,
        inputs=dict(
            position=position, q=q, k=k, u=u, d=d, logits=logits, A_log=A_log, dt_bias=dt_bias,
            level_weight=level_weight, skip=skip, log_decays=log_decays, levels=levels,
        ),
        outputs=dict(o=SDS(u.shape, u.dtype), new_levels=SDS(levels.shape, levels.dtype)),
        scratch=dict(
            ring=plgpu.SMEM((step.STAGES, K, width), f32),
            loaded=barrier_for(["level"], step.STAGES),
        ),
        in_place=dict(levels="new_levels"),
        grid=(B, H, V // width),
        grid_names=("b", "h", "part"),
    )  # fmt: skip
    _, g = mamba2_gates(d, A_log, dt_bias)
    _, after = lazy_decays(g, log_decays, position)
    return out.o, out.new_levels, moved_on(position, 1), after


def _body(refs):
    b, h, part = (lax.axis_index(name) for name in ("b", "h", "part"))
    step.advance(refs, b, h, part, _Made(refs, b, h), b, lazy=True)


class _Made(step.Given):
    """What the step takes, made of a layer's projections."""

    def __init__(self, refs, b, h):
        super().__init__(refs, b, h)
        self.head = h
        self.dt = token.softplus(refs.d[b, h].astype(f32) + refs.dt_bias[h])
        self.g = self.dt * (0.0 - jnp.exp(refs.A_log[h]))

    def log_decay(self, level):
        return self.refs.log_decays[*self.place, level] + self.g

    def scale(self, level):
        logit = self.refs.logits[*self.place, level].astype(f32)
        return token.softplus(logit * self.refs.level_weight[self.head, level])

    def value(self, columns, layout):
        return load(self.refs.u.at[*self.place, columns], layout) * self.dt

    def output(self, o, columns, layout):
        skip = self.refs.skip[self.head]
        return o + skip * load(self.refs.u.at[*self.place, columns], layout)
