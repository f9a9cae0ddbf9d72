"""MesaNet alone: its golden vectors, and its two numbers of iterations."""

import functools
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from evaluator import evaluated
from layers import D, close, empty_cache, layer, normal, numpy_layer, parameters

import jla
from jla.linen import MesaNet

GOLDEN = pathlib.Path(__file__).parent.parent / "golden" / "layers" / "layer_mesa.npz"


def ported(arrays, heads):
    """The parameters of fla's layer, as docs/layers.md says to port them."""
    params = {}
    for name, array in arrays.items():
        module, _, kind = name.removeprefix("param_").partition(".")
        if module == "lambda_params":
            params[module] = array.reshape(heads, -1)
            continue
        if kind == "bias":
            params.setdefault(module, {})["bias"] = array
            continue
        if "conv1d" in module:
            array = array[:, 0].T
            array = array.reshape(len(array), heads, -1)
        elif module == "o_proj":
            array = array.T.reshape(heads, -1, len(array))
        elif module in ("q_proj", "k_proj", "v_proj"):
            array = array.T.reshape(array.shape[1], heads, -1)
        elif module != "o_norm":
            array = array.T
        params.setdefault(module, {})["scale" if module == "o_norm" else "kernel"] = array
    return jax.tree.map(jnp.asarray, params)


# tests/linen/test_layer_padding.py has both by the layer's definition.
@pytest.mark.parametrize(
    "implementation", [pytest.param("reference", marks=pytest.mark.slow), "xla"]
)
def test_golden_vectors(implementation):
    """Outputs and the inputs' gradients that fla's layer gave with the same weights.

    Its iterations add 1e-5 to what they divide by, and so end 1.8e-3 from the exact solution: in
    float64 such iterations come three times nearer to these vectors than the exact solution does.
    """
    arrays = np.load(GOLDEN)
    params = ported({n: arrays[n] for n in arrays if n.startswith("param_")}, heads=2)
    module = MesaNet(num_heads=2, precision="highest", implementation=implementation)

    @evaluated
    @jax.jit
    def both(params, x, cotangent):
        y, pull = jax.vjp(lambda x: module.apply({"params": params}, x), x)
        return y, pull(cotangent)[0]

    y, dx = both(params, jnp.asarray(arrays["in_x"]), jnp.asarray(arrays["ct_y"]))
    close(y, arrays["out_y"], 3e-3)
    close(dx, arrays["grad_x"], 5e-3)


def arguments():
    x = normal(3, 2, 9, D)
    return dict(params=parameters("mesa-plain"), cache=empty_cache("mesa-plain", 2)), x


def run(variables, x, **settings):
    """Outputs of all tokens but the last, and of the last by itself."""
    module = layer("mesa-plain", decode=True, implementation="xla", **settings)
    y, cache = module.apply(variables, x[:, :-1], mutable=["cache"])
    y_next, _ = module.apply(variables | cache, x[:, -1:], mutable=["cache"])
    return y, y_next


@pytest.mark.parametrize("settings", [dict(cg_steps_decode=1), dict(cg_steps=1, cg_steps_decode=9)])
def test_one_token_has_its_own_number_of_iterations(settings):
    """One iteration is far from the solution; it is taken where it was asked for, nowhere else."""
    variables, x = arguments()
    got = evaluated(jax.jit(functools.partial(run, **settings)))(variables, x)
    want = jnp.stack([numpy_layer("mesa-plain", row)[0] for row in x])
    for y, exact, steps in zip(
        got,
        (want[:, :-1], want[:, -1:]),
        (settings.get("cg_steps"), settings["cg_steps_decode"]),
        strict=True,
    ):
        assert (np.linalg.norm(y - exact) > 1e-2) == (steps == 1)


@pytest.mark.parametrize(
    "settings, want",
    [(dict(), (30, 30)), (dict(cg_steps=1), (1, 1)), (dict(cg_steps=2, cg_steps_decode=5), (2, 5))],
    ids=str,
)
def test_numbers_of_iterations(settings, want, monkeypatch):
    asked, args = [], arguments()
    for name in ("mesa_net", "mesa_step"):
        function = getattr(jla, name)

        def recorded(*args, cg_steps, function=function, **options):
            asked.append(cg_steps)
            return function(*args, cg_steps=cg_steps, **options)

        monkeypatch.setattr(f"jla.linen.mesa_net.{name}", functools.wraps(function)(recorded))
    jax.eval_shape(functools.partial(run, **settings), *args)
    assert tuple(asked) == want
