"""`init` makes parameters and caches, and computes next to nothing else."""

import jax
import jax.numpy as jnp
import pytest
from equations import primitives
from layers import D, each_rich, layer


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
