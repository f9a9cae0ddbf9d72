"""jla.kda_gate: both forms, their gradients, their errors."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from comparing import normal

import jla

HV, K = 3, 16


def arguments(dtype=jnp.float32):
    return (3 * normal(0, 2, 5, HV, K)).astype(dtype), normal(1, HV), normal(2, HV, K)


def formula(g, A_log, dt_bias, lower_bound):
    """In float64, with its derivatives in g, A_log and dt_bias."""
    g, A_log, dt_bias = (np.asarray(x, np.float64) for x in (g, A_log, dt_bias))
    x, A = g + dt_bias, np.exp(A_log)[:, None]
    if lower_bound is None:
        softplus = np.logaddexp(0, x)
        return -A * softplus, -A / (1 + np.exp(-x)), -A * softplus
    sigmoid = 1 / (1 + np.exp(-A * x))
    slope = lower_bound * sigmoid * (1 - sigmoid)
    return lower_bound * sigmoid, slope * A, slope * A * x


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
@pytest.mark.parametrize("lower_bound", [None, -5.0, -1])
def test_formula_and_gradients(lower_bound, dtype):
    args = arguments(jnp.dtype(dtype))
    gate, vjp = jax.vjp(lambda *a: jla.kda_gate(*a, lower_bound=lower_bound), *args)
    want, by_g, by_A = formula(*args, lower_bound)
    assert gate.dtype == jnp.float32 and gate.shape == args[0].shape
    assert (gate <= 0).all() and (lower_bound is None or (gate >= lower_bound).all())
    np.testing.assert_allclose(gate, want, rtol=1e-5, atol=1e-6)
    ct = normal(3, *gate.shape)
    gradients = vjp(ct)
    assert gradients[0].dtype == args[0].dtype
    ct = np.asarray(ct, np.float64)
    tolerance = dict(rtol=1e-4, atol=1e-5) if dtype == "float32" else dict(rtol=2e-2, atol=1e-2)
    np.testing.assert_allclose(np.asarray(gradients[0], np.float64), ct * by_g, **tolerance)
    np.testing.assert_allclose(gradients[1], (ct * by_A).sum((0, 1, 3)), rtol=1e-4, atol=1e-4)
    np.testing.assert_allclose(gradients[2], (ct * by_g).sum((0, 1)), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("lower_bound", [None, -5.0])
def test_extreme_projections_stay_finite(lower_bound):
    _, A_log, dt_bias = arguments()
    g = jnp.array([-1e4, 0.0, 1e4])[:, None, None] * jnp.ones((1, HV, K))
    gate, vjp = jax.vjp(lambda *a: jla.kda_gate(*a, lower_bound=lower_bound), g, A_log, dt_bias)
    assert all(jnp.isfinite(x).all() for x in (gate, *vjp(jnp.ones_like(gate))))


@pytest.mark.parametrize(
    "edit, exception, fragments",
    [
        (dict(g=jnp.zeros((2, HV, K), jnp.int32)), TypeError, ("g ", "int32")),
        (dict(g=jnp.zeros(K)), ValueError, ("g ", "HV")),
        (dict(A_log=jnp.zeros((HV, 1))), ValueError, ("A_log", "HV")),
        (dict(A_log=jnp.zeros(HV, jnp.bfloat16)), TypeError, ("A_log", "bfloat16")),
        (dict(dt_bias=jnp.zeros((HV, K + 1))), ValueError, ("dt_bias", "K")),
        (dict(dt_bias=jnp.zeros((HV, K), jnp.float16)), TypeError, ("dt_bias", "float16")),
        (dict(lower_bound=5.0), ValueError, ("lower_bound", "5.0")),
        (dict(lower_bound=0), ValueError, ("lower_bound", "0")),
        (dict(lower_bound="low"), TypeError, ("lower_bound", "str")),
    ],
)
def test_mistakes(edit, exception, fragments):
    good = dict(zip(("g", "A_log", "dt_bias"), arguments(), strict=True))
    with pytest.raises(exception) as caught:
        jla.kda_gate(**(good | edit))
    assert str(caught.value).startswith("jla.kda_gate: ")
    assert all(fragment in str(caught.value) for fragment in fragments)
