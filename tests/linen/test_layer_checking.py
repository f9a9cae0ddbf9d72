"""Layers inside `jla.checking`: what is checked is what they give the mechanism."""

import functools

import jax
import jax.numpy as jnp
import pytest
from layers import D, each_plain, layer

import jla


@pytest.mark.parametrize("tokens", [1, 3])
@each_plain
def test_layers_are_checked(case, tokens):
    """Where they call a public function as where they call what is behind it."""
    module = layer(case, decode=True)
    x = jnp.zeros((1, tokens, D))
    variables = jax.eval_shape(module.init, jax.random.key(0), x)
    with jla.checking():
        apply = functools.partial(module.apply, mutable=["cache"])
        program = str(jax.make_jaxpr(apply)(variables, x))
    assert program.count("debug_callback[") == 1
