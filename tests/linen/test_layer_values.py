"""What every layer computes: its formulas, its gradients, its dtypes; that it learns.

tests/linen/test_layer_padding.py has the chunkwise implementation's values.
"""

import functools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
from layers import (
    D,
    close,
    each,
    each_case,
    each_rich,
    entry,
    first_plain,
    forward,
    layer,
    normal,
    numpy_layer,
    parameters,
    run,
)


@each_case
def test_formulas(case):
    x = normal(2, 2, 37, D)
    y = forward(case, parameters(case), x)
    for row in range(2):
        close(y[row], numpy_layer(case, x[row])[0])


@each_rich
def test_bfloat16(case):
    x, params = normal(2, 2, 37, D), parameters(case)
    exact = forward(case, params, x)
    module = layer(case, dtype=jnp.bfloat16, decode=True)
    variables = jax.eval_shape(module.init, jax.random.key(0), x)
    chex.assert_type(jax.tree.leaves(variables["params"]), jnp.float32)
    cache = dict(variables["cache"])
    convolutions = [cache.pop(name)["inputs"] for name in list(cache) if "conv1d" in name]
    assert convolutions
    chex.assert_type(convolutions, jnp.bfloat16)
    for name, dtype in entry(case).cache_dtypes.items():
        chex.assert_type(cache.pop(name), jnp.dtype(dtype))
    chex.assert_type(jax.tree.leaves(cache), jnp.float32)  # the state
    cache = jax.tree.map(lambda leaf: np.zeros(leaf.shape, leaf.dtype), variables["cache"])
    apply = jax.jit(functools.partial(module.apply, mutable=["cache"]))
    y, mutated = apply({"params": params, "cache": cache}, x)
    chex.assert_type(y, jnp.bfloat16)
    chex.assert_trees_all_equal_shapes_and_dtypes(mutated["cache"], variables["cache"])
    close(y, exact, 3e-2)


@each("differentiated")
def test_gradients_are_finite_and_reach_every_parameter(case):
    x, target = normal(2, 2, 21, D), normal(3, 2, 21, D)
    # A token of zeros has a query and a key of zeros without the convolution.
    x[:, 4] = 0.0

    def loss(params):
        return jnp.sum(forward(case, params, x) * target)

    gradients = run(jax.jit(jax.grad(loss)), parameters(case))
    chex.assert_tree_all_finite(gradients)
    for path, gradient in jax.tree.leaves_with_path(gradients):
        assert np.linalg.norm(gradient) > 1e-6, jax.tree_util.keystr(path)


@first_plain
def test_a_jitted_donated_training_step_learns(case):
    """The target is the token before: nothing but time mixing can produce it."""
    # GSA needs the convolution for it: its slots forget and learn too slowly by themselves.
    module = layer(case, conv_size=4)
    chex.clear_trace_counter()
    x = normal(2, 4, 32, D)
    target = np.pad(x[:, :-1], ((0, 0), (1, 0), (0, 0)))
    params = jax.jit(module.init)(jax.random.key(0), x)["params"]
    optimizer = optax.adam(1e-2)

    @functools.partial(jax.jit, donate_argnums=(0, 1))
    @chex.assert_max_traces(1)
    def step(params, optimizer_state):
        def loss(params):
            return jnp.mean((module.apply({"params": params}, x) - target) ** 2)

        value, gradients = jax.value_and_grad(loss)(params)
        with jax.numpy_dtype_promotion("standard"):  # adam counts in int32
            updates, optimizer_state = optimizer.update(gradients, optimizer_state, params)
        return optax.apply_updates(params, updates), optimizer_state, value

    state, losses = optimizer.init(params), []
    for _ in range(60):
        params, state, value = step(params, state)
        losses.append(float(value))
    assert losses[-1] < 0.5 * losses[0], losses[::10]
