"""The layers under JAX's flags; strict promotion is a fixture of the whole suite."""

import contextlib

import chex
import jax
import jax.numpy as jnp
import pytest
from layers import CASES, LAYERS, PLAIN, D, layer, normal, parameters

import jla.pallas


def traced(case, implementation, dtype):
    """The shapes and dtypes of all that a layer makes: init, gradients, a prefill, a token."""
    options = dict(implementation=implementation, dtype=dtype)
    module, decoder = layer(case, **options), layer(case, decode=True, **options)
    x = jnp.zeros((2, 5, D), dtype)
    mask, ids = jnp.ones((2, 5), bool), jnp.zeros((2, 5), int)  # int: of 64 bits with the flag

    def everything(x, mask, ids):
        variables = decoder.init(jax.random.key(0), x)

        def loss(params, x):
            return module.apply({"params": params}, x).astype(jnp.float32).sum()

        gradients = jax.grad(loss, (0, 1))(variables["params"], x)
        y, cache = decoder.apply(variables, x, mask=mask, segment_ids=ids, mutable=["cache"])
        more = decoder.apply({"params": variables["params"]} | cache, x[:, :1], mutable=["cache"])
        return variables, gradients, y, cache, more

    return jax.eval_shape(everything, x, mask, ids)


@pytest.mark.parametrize(
    "case, implementation",
    [
        pytest.param(case, implementation, marks=[pytest.mark.slow] if slow else [])
        for case in CASES
        for implementation in ("reference", "xla", "pallas")
        for slow in [implementation == "reference" or case not in PLAIN]
    ],
)
def test_x64_changes_no_dtype(case, implementation):
    kernels = implementation == "pallas"
    dtype = jnp.bfloat16 if kernels else jnp.float32
    with jla.pallas.interpret() if kernels else contextlib.nullcontext():
        want = traced(case, implementation, dtype)
        with jax.enable_x64(True):
            got = traced(case, implementation, dtype)
    chex.assert_trees_all_equal_shapes_and_dtypes(got, want)


@pytest.mark.parametrize(
    "name",
    [
        # The others have no longest sequence.
        pytest.param(name, marks=[] if {"position", "length"} & {*cache} else pytest.mark.slow)
        for name, cache in ((name, entry["cache"]) for name, entry in LAYERS.items())
    ],
)
def test_good_inputs_make_no_nan(name):
    """Not jitted: what leaves a function of its own is looked at. Of a chunk, only the tokens that
    are no padding have to fit."""
    case, x = f"{name}-plain", normal(3, 1, 64, D)  # as many tokens as seven levels serve
    params = {"params": parameters(case)}
    decoder = layer(case, decode=True)
    shapes = jax.eval_shape(decoder.init, jax.random.key(0), x[:, :4])
    cache = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), shapes["cache"])
    with jax.debug_nans(True):
        layer(case).apply(params, x)
        _, cache = decoder.apply(params | dict(cache=cache), x[:, :3], mutable=["cache"])
        for real in ([True, False], [False]):
            mask = jnp.array([real])
            _, cache = decoder.apply(
                params | cache, x[:, : len(real)], mask=mask, mutable=["cache"]
            )
