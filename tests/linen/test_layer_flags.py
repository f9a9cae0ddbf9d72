"""The layers under JAX's flags; strict promotion is a fixture of the whole suite."""

import contextlib

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from evaluator import assert_no_nan, evaluated
from layers import CASES, LAYERS, PLAIN, D, entry, implementations, layer, normal, parameters

import jla.pallas


def traced(case, implementation, dtype):
    """The shapes and dtypes of all that a layer makes: init, gradients, a prefill, a token."""
    options = dict(implementation=implementation, dtype=dtype)
    if implementation == "pallas":  # sizes that the kernels serve
        options |= dict(key_dim=16) | entry(case).size_for_kernels
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
        for implementation in implementations(case, "reference", "xla", "pallas")
        # The mechanisms' dtypes are the contract's matter, and the definition is traced fastest.
        for slow in [
            case not in PLAIN
            or implementation == "xla"
            or (implementation == "pallas" and case != PLAIN[0])
        ]
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
        pytest.param(name, marks=[] if "position" in row.cache else pytest.mark.slow)
        for name, row in LAYERS.items()
    ],
)
def test_good_inputs_make_no_nan(name):
    case, x = f"{name}-plain", normal(3, 1, 64, D)  # as many tokens as seven levels serve
    assert_no_nan(layer(case).apply, {"params": parameters(case)}, x)


def test_padding_without_room_makes_no_nan():
    """PaTH's cache has room for the token, and none for the padding behind it."""
    x = normal(3, 1, 2, D)
    decoder = layer("path-plain", decode=True)
    shapes = jax.eval_shape(decoder.init, jax.random.key(0), x)["cache"]
    cache = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), shapes)
    cache |= dict(length=jnp.ones(1, jnp.int32))
    mask = jnp.array([[True, False]])

    def run(params, x):
        variables = dict(params=params, cache=cache)
        return decoder.apply(variables, x, mask=mask, mutable=["cache"])[0]

    params = parameters("path-plain")
    assert_no_nan(run, params, x)
    assert not np.any(evaluated(jax.jit(run))(params, x)[:, 1])
