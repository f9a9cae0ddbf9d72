"""`init` makes parameters and caches, and computes next to nothing else."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from equations import equations, primitives
from flax import linen as nn
from layers import D, each_rich, layer

from jla.linen._arguments import uniform


@pytest.mark.parametrize("decode", [False, True])
@each_rich
def test_init_does_not_run_the_mechanism(case, decode):
    """Its program has no loop, and no more equations than projections and initial values take."""
    module = layer(case, implementation="xla", decode=decode)
    x = jnp.zeros((2, 50, D))
    init = primitives(jax.make_jaxpr(module.init)(jax.random.key(0), x).jaxpr)
    assert not {"scan", "while"} & set(init)
    assert sum(init.values()) < 500


@each_rich
def test_the_output_of_init_has_its_shape_and_dtype(case):
    """The output has no values there, but the shape and the dtype that `apply` gives it."""
    module, x = layer(case, dtype=jnp.bfloat16), jnp.zeros((2, 5, D))
    y, variables = jax.eval_shape(module.init_with_output, jax.random.key(0), x)
    want = jax.eval_shape(module.apply, variables, x)
    assert (y.shape, y.dtype) == (want.shape, want.dtype)


@each_rich
def test_initial_values_are_drawn_along_one_axis(case):
    """XLA takes two to three times as long to compile a draw of several axes."""
    module = layer(case, kernel_init=nn.initializers.zeros)
    init = jax.make_jaxpr(module.init)(jax.random.key(0), jnp.zeros((2, 5, D)))
    drawn = [e.outvars[0].aval for e in equations(init.jaxpr) if e.primitive.name == "random_bits"]
    assert drawn and all(x.ndim == 1 for x in drawn), drawn


@pytest.mark.parametrize("partitionable", [False, True])
def test_uniform_is_that_of_jax(partitionable):
    key, rest = jax.random.key(1), ((3, 2, 5), jnp.float32, -0.5, 2.0)
    with jax.threefry_partitionable(partitionable):
        want = jax.random.uniform(key, *rest)
        np.testing.assert_array_equal(uniform(key, *rest), want)
