"""The layers' parameters and attributes: trees, dtypes, initial values, mistakes."""

import functools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn
from layers import (
    LAYERS,
    D,
    each_layer,
    each_plain,
    each_rich,
    empty_cache,
    entry,
    init_shapes,
    layer,
    normal,
    parameters,
)


@each_rich
def test_parameter_tree(case):
    params = init_shapes(case, 1)["params"]
    assert jax.tree.map(jnp.shape, params) == entry(case).parameters
    chex.assert_type(jax.tree.leaves(params), jnp.float32)


@each_layer
def test_defaults_come_from_the_input(name):
    module = LAYERS[name].module(num_heads=2)
    params = jax.eval_shape(module.init, jax.random.key(0), normal(0, 1, 4, 64))["params"]
    for projection, shape in LAYERS[name].defaults.items():
        chex.assert_shape(params[projection]["kernel"], shape)


@each_rich
def test_no_convolution_has_no_convolution(case):
    for conv_size in (None, 0):
        module = layer(case, conv_size=conv_size, conv_bias=False, decode=True)
        variables = jax.eval_shape(module.init, jax.random.key(0), normal(0, 1, 4, D))
        without = {n: x for n, x in entry(case).cache.items() if "conv" not in n}
        assert not [n for n in variables["params"] if "conv" in n]
        assert set(variables["cache"]) == set(without)


@each_rich
def test_kernel_init_reaches_every_projection(case):
    module = layer(case, kernel_init=nn.initializers.constant(0.25))
    params = jax.jit(module.init)(jax.random.key(0), normal(0, 1, 4, D))["params"]
    kernels = {name: p["kernel"] for name, p in params.items() if "_proj" in name}
    assert set(kernels) == {name for name in entry(case).parameters if "_proj" in name}
    for kernel in kernels.values():
        assert np.all(np.asarray(kernel) == 0.25)


@each_rich
def test_param_dtype_is_that_of_all_parameters_but_the_gates_own(case):
    module, x = layer(case, param_dtype=jnp.bfloat16), normal(0, 1, 4, D).astype(jnp.bfloat16)
    variables = jax.eval_shape(module.init, jax.random.key(0), x)
    params = dict(variables["params"])
    gates = [params.pop(name) for name in entry(case).float32_parameters]
    chex.assert_type(gates, jnp.float32)
    chex.assert_type(jax.tree.leaves(params), jnp.bfloat16)
    chex.assert_type(jax.eval_shape(module.apply, variables, x), jnp.bfloat16)


def test_initial_values_of_kda():
    # The projections' kernels are flax's own matter, and slow to compile.
    wide = dict(num_heads=64, key_dim=16, kernel_init=nn.initializers.zeros)
    module, x = layer("kda-plain", **wide), normal(0, 1, 4, D)
    params = jax.jit(module.init)(jax.random.key(0), x)["params"]
    rate, dt = np.exp(params["A_log"]), np.asarray(nn.softplus(params["dt_bias"]))
    assert rate.min() >= 1 and rate.max() <= 16 and 7 < rate.mean() < 10
    assert dt.min() >= 0.999e-3 and dt.max() <= 1.001e-1
    assert abs(np.log(dt).mean() - np.log(1e-2)) < 0.2
    kernel = np.asarray(params["q_conv1d"]["kernel"])
    assert np.abs(kernel).max() <= 0.5 and abs(kernel.std() - 0.5 / np.sqrt(3)) < 0.01
    assert np.all(np.asarray(params["o_norm"]["scale"]) == 1)
    assert not np.any(params["g_proj_up"]["bias"])
    bounded = layer("kda-plain", **wide, gate_lower_bound=-5.0)
    assert not np.any(
        jax.jit(lambda key: bounded.init(key, x)["params"]["A_log"])(jax.random.key(0))
    )


def test_initial_values_of_gsa():
    module = layer("gsa-rich", kernel_init=nn.initializers.zeros)
    params = jax.jit(module.init)(jax.random.key(0), normal(0, 1, 4, D))["params"]
    assert np.all(np.asarray(params["g_norm"]["scale"]) == 1)


def test_initial_values_of_log_linear():
    module = layer("log_linear-plain", num_heads=64, kernel_init=nn.initializers.zeros)
    params = jax.jit(module.init)(jax.random.key(0), normal(0, 1, 4, D))["params"]
    np.testing.assert_allclose(np.exp(params["A_log"]), np.arange(1, 65), rtol=1e-5)
    dt = np.asarray(nn.softplus(params["dt_bias"]))
    assert dt.min() >= 0.999e-3 and dt.max() <= 1.001e-1
    assert np.all(np.asarray(params["D"]) == 1) and np.all(np.asarray(params["L"]) == 1)
    assert np.all(np.asarray(params["o_norm"]["scale"]) == 1)
    for name in ("q_proj", "k_proj", "v_proj", "z_proj", "dt_proj", "level_proj", "o_proj"):
        assert not np.any(params[name]["bias"])


def test_initial_values_of_mesa():
    for bound, want in ((0.25, 1.0), (0.01, 1.0), (2.0, 4.0), (1e3, 2e3)):
        module = layer("mesa-rich", kernel_init=nn.initializers.zeros, lambda_lower_bound=bound)
        params = jax.jit(module.init)(jax.random.key(0), normal(0, 1, 4, D))["params"]
        np.testing.assert_allclose(nn.softplus(params["lambda_params"]) + bound, want, rtol=1e-5)
    assert np.all(np.asarray(params["o_norm"]["scale"]) == 1)
    assert not np.any(params["a_proj"]["bias"]) and not np.any(params["b_proj"]["bias"])


X = np.zeros((2, 5, D), np.float32)
# (attributes beside plain's, edits of the call's arguments, exception, pattern of its message)
MISTAKES = (
    ({}, dict(inputs=X[0]), ValueError, r"inputs must have axes \[B, T, D\], got shape \(5, 24\)"),
    ({}, dict(inputs=X.astype(np.int32)), TypeError, "inputs must be .*float32, got int32"),
    ({}, dict(mask=np.ones((2, 4), bool)), ValueError, "mask has T = 4"),
    ({}, dict(mask=np.ones((2, 5, 5), bool)), ValueError, r"mask must have axes \[B, T\]"),
    ({}, dict(mask=np.ones((2, 5), np.float32)), TypeError, "mask must be bool, got float32"),
    ({}, dict(segment_ids=np.ones((1, 5), np.int32)), ValueError, "segment_ids has B = 1"),
    ({}, dict(segment_ids=np.ones((2, 5))), TypeError, "segment_ids must be integers, got float"),
    (dict(num_heads=0), {}, ValueError, "num_heads must be at least 1, got 0"),
    (dict(num_heads=2.0), {}, TypeError, "num_heads must be an integer, got 2.0"),
    (dict(key_dim=8), {}, ValueError, "key_dim must be 16 to (256|512), got 8(?!,)"),
    (
        dict(key_dim=None, num_heads=3),
        {},
        ValueError,
        "key_dim must be 16 to (256|512), got 8, .*last axis // num_heads = 24 // 3; set key_dim",
    ),
    (dict(dtype=jnp.float64), {}, TypeError, "dtype must be .*float32, got float64"),
    (dict(param_dtype=jnp.int32), {}, TypeError, "param_dtype must be .*float32, got int32"),
    (dict(num_heads=True), {}, TypeError, "num_heads must be an integer, got True"),
    (
        dict(key_dim=None, num_heads=5),
        {},
        ValueError,
        "= 24 must be a multiple of num_heads = 5",
    ),
    (dict(value_dim=513), {}, ValueError, "value_dim must be 16 to (256|512), got 513"),
    (dict(conv_size=1), {}, ValueError, "conv_size must be at least 2, got 1; None or 0"),
    (dict(conv_size=-4), {}, ValueError, "conv_size must be at least 2, got -4"),
    (
        dict(conv_size=None, conv_bias=True),
        {},
        ValueError,
        "conv_bias is True, but with conv_size = None there are no convolutions",
    ),
    (dict(implementation="fast"), {}, ValueError, "implementation must be None or one of"),
    (dict(dtype="bf16"), {}, TypeError, "dtype must be .*float32, got 'bf16'"),
    (dict(param_dtype=None), {}, TypeError, "param_dtype must be .*float32, got None"),
    (dict(norm_epsilon=None), {}, TypeError, "norm_epsilon must be a Python number, got"),
    (dict(norm_epsilon=-1e-5), {}, ValueError, "norm_epsilon must be at least 0, got -1e-05"),
    (dict(kernel_init=None), {}, TypeError, "kernel_init must be an initializer, got None"),
    (dict(conv_bias="yes"), {}, TypeError, "conv_bias must be True or False, got 'yes'"),
)


def mistakes():
    for name, row in LAYERS.items():
        own = [(options, {}, *rest) for options, *rest in row.mistakes]
        for values in (*MISTAKES, *own):
            yield pytest.param(f"{name}-plain", *values)


@pytest.mark.parametrize("case, options, arguments, error, message", list(mistakes()))
def test_wrong_arguments_raise(case, options, arguments, error, message):
    module = layer(case, **options)
    with pytest.raises(error, match=message) as caught:
        jax.eval_shape(module.init, jax.random.key(0), **dict(inputs=X) | arguments)
    assert str(caught.value).startswith(f"jla.linen.{type(module).__name__}: ")


@each_plain
def test_decoding_without_a_fitting_cache_raises(case):
    params, module = parameters(case), layer(case, decode=True)
    apply = functools.partial(module.apply, mutable=["cache"])
    with pytest.raises(ValueError, match='decode=True needs the "cache" collection'):
        jax.eval_shape(apply, {"params": params}, X)
    variables = {"params": params, "cache": empty_cache(case, 3)}
    with pytest.raises(ValueError, match=r"must have shape \(2, .*got \(3, "):
        jax.eval_shape(apply, variables, X)


def other_dtype(x):
    return x.astype(jnp.bfloat16 if x.dtype == jnp.float32 else jnp.float32)


@each_rich
def test_a_cache_of_another_dtype_is_refused_by_name(case):
    """Each of its arrays; as one of a bfloat16 layer in a float32 layer, for example."""
    module = layer(case, decode=True)
    variables = {"params": parameters(case), "cache": empty_cache(case, 2)}

    def advance(cache, x):
        return module.apply(variables | {"cache": cache}, x, mutable=["cache"])

    leaves, tree = jax.tree.flatten_with_path(variables["cache"])
    assert len(leaves) == len(jax.tree.leaves(entry(case).cache, is_leaf=is_shape))
    for i, (path, _) in enumerate(leaves):
        cache = tree.unflatten([other_dtype(x) if i == j else x for j, (_, x) in enumerate(leaves)])
        name = "/".join(key.key for key in path)
        with pytest.raises(TypeError, match=f"cache's {name} must be .*, got "):
            jax.eval_shape(advance, cache, X[:, :1])


def is_shape(x):
    return isinstance(x, tuple)


@each_rich
def test_gate_parameters_of_another_dtype_are_refused_by_name(case):
    module, params = layer(case), parameters(case)
    for name in entry(case).float32_parameters:
        changed = params | {name: other_dtype(params[name])}
        with pytest.raises(TypeError, match=f"the parameter {name} must be float32.*got bfloat16"):
            jax.eval_shape(lambda p: module.apply({"params": p}, X), changed)
