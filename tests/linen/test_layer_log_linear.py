"""LogLinearMamba2 alone: its golden vectors, and what its levels do not serve."""

import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from evaluator import evaluated
from layers import D, advance, close, empty_cache, normal, parameters

from jla.linen import LogLinearMamba2

GOLDEN = pathlib.Path(__file__).parent.parent / "golden" / "layers" / "layer_loglinear.npz"


def ported(arrays, heads, state_size):
    """The parameters of fla's layer, as docs/layers.md says to port them."""
    arrays = {name.removeprefix("param_"): x for name, x in arrays.items()}
    params = {name: arrays[name] for name in ("A_log", "dt_bias", "D", "L")}
    inner, L = arrays["norm.weight"].size, arrays["L"].shape[1]
    shapes = dict(z=(heads, inner // heads), v=(heads, inner // heads))
    shapes |= dict(k=(1, state_size), q=(1, state_size), dt=(heads,), level=(heads, L))
    sizes = np.cumsum([np.prod(shape) for shape in shapes.values()])[:-1]
    kernels, biases = (np.split(arrays[f"in_proj.{kind}"], sizes) for kind in ("weight", "bias"))
    for (name, shape), kernel, bias in zip(shapes.items(), kernels, biases, strict=True):
        kernel = kernel.T.reshape(-1, *shape)
        params[f"{name}_proj"] = {"kernel": kernel, "bias": bias.reshape(shape)}
    convolution = arrays["conv1d.weight"][:, 0].T
    splits = [-2 * state_size, -state_size]
    for letter, kernel in zip("vkq", np.split(convolution, splits, axis=1), strict=True):
        kernel = kernel.reshape(len(kernel), heads if letter == "v" else 1, -1)
        params[f"{letter}_conv1d"] = {"kernel": kernel}
    params["o_norm"] = {"scale": arrays["norm.weight"].reshape(heads, -1)}
    kernel = arrays["out_proj.weight"].T.reshape(heads, -1, len(arrays["out_proj.bias"]))
    params["o_proj"] = {"kernel": kernel, "bias": arrays["out_proj.bias"]}
    return jax.tree.map(jnp.asarray, params)


# tests/linen/test_layer_padding.py has both by the layer's definition.
@pytest.mark.parametrize(
    "implementation", [pytest.param("reference", marks=pytest.mark.slow), "xla"]
)
def test_golden_vectors(implementation):
    """Outputs and the inputs' gradients that fla's layer gave with the same weights."""
    arrays = np.load(GOLDEN)
    params = ported({n: arrays[n] for n in arrays if n.startswith("param_")}, 4, 64)
    module = LogLinearMamba2(
        num_heads=4,
        key_dim=64,
        value_dim=64,
        precision="highest",
        implementation=implementation,
    )

    @evaluated
    @jax.jit
    def both(params, x, cotangent):
        y, pull = jax.vjp(lambda x: module.apply({"params": params}, x), x)
        return y, pull(cotangent)[0]

    y, dx = both(params, jnp.asarray(arrays["in_x"]), jnp.asarray(arrays["ct_y"]))
    close(y, arrays["out_y"], 1e-4)
    close(dx, arrays["grad_x"], 1e-4)


@pytest.mark.parametrize("implementation", ["reference", "xla"])
def test_beyond_the_last_level_is_nan_under_jit(implementation):
    """Seven levels hold positions up to 63; what comes before stays as it is."""
    x, params = normal(3, 2, 10, D), parameters("log_linear-plain")
    cache = empty_cache("log_linear-plain", 2)
    cache["position"] = jnp.array([60, 54], jnp.int32)
    y, after = advance("log_linear-plain", params, cache, x, implementation=implementation)
    assert np.all(np.isfinite(y[0, :4])) and np.all(np.isnan(y[0, 4:]))
    assert np.all(np.isnan(after["levels"][0])) and list(after["position"]) == [70, 64]
    assert np.all(np.isfinite(y[1])) and np.all(np.isfinite(after["levels"][1]))
