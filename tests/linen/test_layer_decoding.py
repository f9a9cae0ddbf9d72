"""Decoding: every layer's cache, by any number of tokens a call."""

import functools

import chex
import jax
import jax.numpy as jnp
from flax import linen as nn
from layers import (
    D,
    advance,
    close,
    each_plain,
    each_rich,
    empty_cache,
    entry,
    first_plain,
    forward,
    layer,
    normal,
    numpy_layer,
    parameters,
    rich_first,
    row_of,
    trees_close,
)


@each_rich
def test_init_makes_an_empty_cache(case):
    module = layer(case, decode=True, kernel_init=nn.initializers.constant(0.1))
    cache = module.init(jax.random.key(0), normal(0, 2, 3, D))["cache"]
    assert jax.tree.map(jnp.shape, cache) == entry(case)["cache"]
    chex.assert_trees_all_equal(cache, jax.tree.map(jnp.zeros_like, cache))


@rich_first
def test_prefill_in_chunks_then_tokens_is_one_forward(case):
    x, params = normal(3, 2, 19, D), parameters(case)
    cache, outputs, start = empty_cache(case, 2), [], 0
    for length in (2, 9, 2, 1, 1, 1, 1, 1, 1):
        y, cache = advance(case, params, cache, x[:, start : start + length])
        outputs.append(y)
        start += length
    assert start == x.shape[1]
    y = jnp.concatenate(outputs, axis=1)
    for row in range(2):
        expected, expected_cache = numpy_layer(case, x[row])
        close(y[row], expected)
        trees_close(row_of(cache, row), expected_cache)


@each_plain
def test_compiled_decode_in_a_scan_updates_a_donated_cache(case):
    chex.clear_trace_counter()
    x, params = normal(3, 2, 12, D), parameters(case)

    @functools.partial(jax.jit, donate_argnums=1)
    @chex.assert_max_traces(1)
    def generate(params, cache, tokens):
        def token(cache, x):
            y, cache = advance(case, params, cache, x[:, None])
            return cache, y[:, 0]

        cache, y = jax.lax.scan(token, cache, jnp.moveaxis(tokens, 1, 0))
        return jnp.moveaxis(y, 0, 1), cache

    first = empty_cache(case, 2)
    a, cache = generate(params, first, x[:, :6])
    assert all(leaf.is_deleted() for leaf in jax.tree.leaves(first))
    b, _ = generate(params, cache, x[:, 6:])
    close(jnp.concatenate([a, b], axis=1), forward(case, params, x))


@first_plain
def test_stacked_layers_decode(case):
    """The cache follows flax's own scan over layers."""

    class Stack(nn.Module):
        decode: bool = False

        @nn.compact
        def __call__(self, x):
            class Block(nn.Module):
                decode: bool

                @nn.compact
                def __call__(self, x, _):
                    init = nn.initializers.normal(0.2)
                    mixer = layer(case, decode=self.decode, kernel_init=init, name="mixer")
                    return x + mixer(x), None

            axes = {"params": 0, "cache": 0}
            blocks = nn.scan(Block, variable_axes=axes, split_rngs={"params": True}, length=2)
            return blocks(self.decode)(x, None)[0]

    x = normal(4, 2, 6, D)
    variables = Stack(decode=True).init(jax.random.key(0), x)
    params, cache = variables["params"], variables["cache"]
    chex.assert_trees_all_equal(cache, jax.tree.map(jnp.zeros_like, cache))
    a, mutated = Stack(decode=True).apply(variables, x[:, :5], mutable=["cache"])
    b, _ = Stack(decode=True).apply({"params": params} | mutated, x[:, 5:], mutable=["cache"])
    close(jnp.concatenate([a, b], axis=1), Stack().apply({"params": params}, x))
