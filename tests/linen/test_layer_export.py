"""Layers as programs for any batch and any length, written by jax.export and read again."""

import functools

import jax
import jax.numpy as jnp
from jax import export
from layers import (
    D,
    close,
    each_rich,
    each_rich_of,
    empty_cache,
    forward,
    layer,
    normal,
    parameters,
)


@functools.cache
def exported(case):
    """A decoding call, from the cache, the inputs and the mask to the outputs and the cache."""
    module, cache = layer(case, decode=True, implementation="xla"), empty_cache(case, 2)
    params = parameters(case)  # made here: a trace would keep what is made inside
    batch, time = export.symbolic_shape("b, t")

    def advance(cache, x, mask):
        variables = {"params": params, "cache": cache}
        return module.apply(variables, x, mask=mask, mutable=["cache"])

    made = export.export(jax.jit(advance))(
        jax.tree.map(lambda x: jax.ShapeDtypeStruct((batch, *x.shape[1:]), x.dtype), cache),
        jax.ShapeDtypeStruct((batch, time, D), jnp.float32),
        jax.ShapeDtypeStruct((batch, time), bool),
    )
    return cache, export.deserialize(made.serialize()).call


@each_rich
def test_exports(case):
    exported(case)


# tests/contract compares the values of every mechanism.
@each_rich_of("test_a_prefill_and_another_are_one_forward_pass")
def test_a_prefill_and_another_are_one_forward_pass(case):
    cache, call = exported(case)
    x = normal(2, 2, 37, D)
    first, variables = call(cache, x[:, :30], jnp.ones((2, 30), bool))
    # Of the rest one row: another batch, and another length.
    row = jax.tree.map(lambda x: x[:1], variables["cache"])
    rest, _ = call(row, x[:1, 30:], jnp.ones((1, 7), bool))
    want = forward(case, parameters(case), x)
    close(first, want[:, :30])
    close(rest, want[:1, 30:])
