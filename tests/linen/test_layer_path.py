"""PaTHAttention alone: its golden vectors, and a cache of limited room."""

import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from evaluator import evaluated
from layers import (
    D,
    advance,
    advance_without_jit,
    close,
    layer,
    normal,
    numpy_layer,
    parameters,
)

from jla.linen import PaTHAttention

GOLDEN = pathlib.Path(__file__).parent.parent / "golden" / "layers" / "layer_path_fox.npz"


def ported(arrays, key_dim):
    """The parameters of fla's layer, as docs/layers.md says to port them."""
    names = {
        "w_proj.0": "w_proj_down",
        "w_proj.1": "w_proj_up",
        "bt_proj": "b_proj",
        "maybe_q_norm": "q_norm",
        "maybe_k_norm": "k_norm",
    }
    params = {}
    for name, array in arrays.items():
        module, _, kind = name.removeprefix("param_").rpartition(".")
        module = names.get(module, module)
        if module.endswith("_norm"):
            kind = "scale"
        elif kind == "weight":
            kind = "kernel"
            array = array[:, 0].T if module == "w_conv1d" else array.T
            if module == "o_proj":
                array = array.reshape(-1, key_dim, array.shape[1])
            elif module in ("q_proj", "k_proj", "v_proj", "w_proj_up", "w_conv1d"):
                array = array.reshape(len(array), -1, key_dim)
        params.setdefault(module, {})[kind] = jnp.asarray(array)
    return params


# tests/linen/test_layer_padding.py has both by the layer's definition.
@pytest.mark.parametrize(
    "implementation", [pytest.param("reference", marks=pytest.mark.slow), "xla"]
)
def test_golden_vectors(implementation):
    """Outputs and the inputs' gradients that fla's layer gave with the same weights."""
    arrays = np.load(GOLDEN)
    params = ported({n: arrays[n] for n in arrays if n.startswith("param_")}, key_dim=32)
    module = PaTHAttention(
        num_heads=4,
        num_key_heads=2,
        use_forget_gate=True,
        use_qk_norm=True,
        precision="highest",
        implementation=implementation,
    )

    @evaluated
    @jax.jit
    def both(params, x, cotangent):
        y, pull = jax.vjp(lambda x: module.apply({"params": params}, x), x)
        return y, pull(cotangent)[0]

    y, dx = both(params, jnp.asarray(arrays["in_x"]), jnp.asarray(arrays["ct_y"]))
    close(y, arrays["out_y"])
    close(dx, arrays["grad_x"])


def cache_for(tokens):
    shapes = jax.eval_shape(
        layer("path-plain", decode=True).init, jax.random.key(0), jnp.zeros((2, tokens, D))
    )
    return jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), shapes["cache"])


def test_padding_takes_no_room():
    """Neither outside of jit, where the lengths are known, nor inside."""
    x, params = normal(3, 2, 12, D), parameters("path-plain")
    real = np.array([[1, 1, 1, 0, 0, 1, 1, 1, 1, 0, 1, 0], [1] * 8 + [0] * 4], bool)
    for call in (advance, advance_without_jit):
        cache, outputs = cache_for(8), []
        for part in (slice(0, 4), slice(4, 8), slice(8, 12)):
            mask = jnp.asarray(real[:, part])
            y, cache = call("path-plain", params, cache, x[:, part], mask=mask)
            outputs.append(y)
        for row, y in enumerate(np.concatenate(outputs, axis=1)):
            close(y[real[row]], numpy_layer("path-plain", x[row][real[row]])[0])
        np.testing.assert_array_equal(cache["length"], [8, 8])


def test_too_small_a_cache_raises_or_shows():
    x, params = normal(3, 2, 9, D), parameters("path-plain")
    room = "room for 8 tokens, but row 0 has 0 in it and needs .*the length of init's input sets"
    with pytest.raises(ValueError, match=room):
        advance_without_jit("path-plain", params, cache_for(8), x)
    y, cache = advance("path-plain", params, cache_for(8), x)
    assert np.all(np.isnan(y[:, 8])) and np.all(np.isfinite(y[:, :8]))
    for row in range(2):
        kept = numpy_layer("path-plain", x[row, :8])[1]["value"]
        close(cache["value"][row], kept[:8])
    np.testing.assert_array_equal(cache["length"], [9, 9])
    y, cache = advance("path-plain", params, cache, x[:, :1])
    assert np.all(np.isnan(y)) and np.all(cache["length"] == 10)


def test_lazy_keys_are_the_others():
    """A prefill behind 60 tokens of zeros, steps to the 64th token and beyond it, one of them of
    padding, and a prefill."""
    x, params = normal(3, 2, 8, D), parameters("path-rich")
    parts = (2, 1, 1, 1, 1, 2)
    calls = []
    for lazy in (None, jnp.float32):
        module = layer("path-rich", decode=True, lazy_keys=lazy)
        shapes = jax.eval_shape(module.init, jax.random.key(0), jnp.zeros((2, 80, D)))
        cache = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), shapes["cache"])
        cache["length"] += 60

        @jax.jit
        def call(cache, x, mask, module=module):
            variables = {"params": params, "cache": cache}
            y, variables = module.apply(variables, x, mask=mask, mutable=["cache"])
            return y, variables["cache"]

        outputs, first = [], 0
        for i, n in enumerate(parts):
            mask = jnp.array([[True], [False]]) if i == 2 else None
            y, cache = evaluated(call)(cache, x[:, first : first + n], mask)
            outputs.append(y)
            first += n
        calls.append(np.concatenate(outputs, axis=1))
    assert cache["recent"].shape == (2, 64, 2, 16)
    close(calls[1], calls[0], 1e-5)
