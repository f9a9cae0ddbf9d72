"""The layers' own kernels refuse forward mode by name; tests/contract has the mechanisms."""

import jax
import jax.numpy as jnp
import pytest

import jla.pallas
from jla.pallas.kda import kda_from_projection
from jla.pallas.layers.gated_norm import gated_norm
from jla.pallas.layers.rms_norm import rms_norm, rms_norm_branch
from jla.pallas.layers.short_convolution import short_convolution
from jla.pallas.log_linear import log_linear_mamba2

bf16, f32 = jnp.bfloat16, jnp.float32
X, SCALE = ((1, 32, 2, 64), bf16), ((64,), f32)
KEYS, HEADS, LEVELS = ((1, 32, 1, 32), bf16), ((1, 32, 2), f32), ((1, 32, 2, 6), bf16)


def kda(q, f, A_log, dt_bias, beta):
    options = dict(scale=1.0, lower_bound=None)
    return kda_from_projection(q, q, q, f, A_log, dt_bias, beta, None, None, **options)


def mamba2(q, u, g, logits, skip):
    return log_linear_mamba2(q, q, u, g, logits, g, skip, None)


@pytest.mark.parametrize(
    "run, name, shapes",
    [
        pytest.param(lambda *a: rms_norm(*a, epsilon=1e-6), "RMSNorm", (X, SCALE, X), id="norm"),
        pytest.param(
            lambda *a: rms_norm_branch(*a, epsilon=1e-6),
            "RMSNorm.branch",
            (X, SCALE, X),
            id="branch",
        ),
        pytest.param(
            lambda *a: gated_norm(*a, epsilon=1e-6),
            "LogLinearMamba2's norm",
            (X, X, ((2, 64), f32)),
            id="gated_norm",
        ),
        pytest.param(
            lambda *a: short_convolution(*a, normalize=True),
            "short convolution",
            (X, ((4, 2, 64), f32)),
            id="convolution",
        ),
        pytest.param(kda, "jla.kda", (X, X, ((2,), f32), ((2, 64), f32), HEADS), id="kda"),
        pytest.param(
            mamba2, "log_linear_attention", (KEYS, X, HEADS, LEVELS, ((2,), f32)), id="mamba2"
        ),
    ],
)
def test_refused_by_name(run, name, shapes):
    x = tuple(jax.ShapeDtypeStruct(*shape) for shape in shapes)
    with jla.pallas.interpret():
        with pytest.raises(NotImplementedError, match=f"{name}: .*forward-mode"):
            jax.jit(lambda *x: jax.jvp(run, x, x)).lower(*x)

        def gradient(*x):
            return jax.grad(lambda x: jnp.sum(jax.tree.leaves(run(*x))[0].astype(f32)))(x)

        jax.eval_shape(gradient, *x)
        with pytest.raises(NotImplementedError, match="derivatives of derivatives"):
            jax.eval_shape(lambda *x: jax.jvp(gradient, x, x), *x)
