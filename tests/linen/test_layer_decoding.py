"""Decoding: every layer's cache, by any number of tokens a call."""

import functools

import chex
import jax
import jax.numpy as jnp
import numpy as np
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
    layer,
    normal,
    numpy_layer,
    parameters,
    rich_first,
    row_of,
    run,
    trees_close,
)


@each_rich
def test_init_makes_an_empty_cache(case):
    module = layer(case, decode=True, kernel_init=nn.initializers.constant(0.1))
    x = normal(0, 2, 3, D)
    cache = jax.jit(lambda key: module.init(key, x)["cache"])(jax.random.key(0))
    assert jax.tree.map(jnp.shape, cache) == entry(case).cache
    chex.assert_trees_all_equal(cache, jax.tree.map(jnp.zeros_like, cache))


@rich_first
def test_prefill_in_chunks_then_tokens_is_one_forward(case):
    x, params = normal(3, 2, 11, D), parameters(case)
    cache, outputs, start = empty_cache(case, 2), [], 0
    for length in (2, 2, 1, 2, 1, 1, 2):  # fewer than a convolution has taps
        y, cache = advance(case, params, cache, x[:, start : start + length])
        outputs.append(y)
        start += length
    assert start == x.shape[1]
    y = np.concatenate(outputs, axis=1)
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

    first = jax.device_put(empty_cache(case, 2))
    a, cache = generate(params, first, x[:, :6])
    assert all(leaf.is_deleted() for leaf in jax.tree.leaves(first))
    b, _ = generate(params, cache, x[:, 6:])
    y = np.concatenate([a, b], axis=1)
    for row in range(2):
        close(y[row], numpy_layer(case, x[row])[0])


@each_rich
def test_rolling_back(case):
    """Tokens run and dropped, then some of them committed: the others leave no trace, to the bit,
    not even a NaN. Of each row of a pool another number of tokens."""
    params, ran = parameters(case), 4
    pool = advance(case, params, empty_cache(case, 3), normal(3, 3, 5, D))[1]
    slots, kept = np.array([2, 0], np.int32), np.array([1, 3])
    mask = np.arange(ran)[None] < kept[:, None]
    x = normal(4, 2, ran, D)
    other = np.where(mask[..., None], x, np.nan).astype(x.dtype)
    module = layer(case, decode=True)

    @jax.jit
    def apply(x, mask):
        variables = {"params": params, "cache": pool}
        return module.apply(variables, x, mask=mask, slots=slots, mutable=["cache"])

    y, _ = run(apply, x, None)  # whose cache is dropped
    one, two = (run(apply, tokens, mask) for tokens in (x, other))
    chex.assert_trees_all_equal(one, two)
    for row, (slot, n) in enumerate(zip(slots, kept, strict=True)):
        former = jax.tree.map(lambda leaf, slot=slot: leaf[slot : slot + 1], pool)
        alone, cache = advance(case, params, former, x[row : row + 1, :n])
        close(y[row, :n], alone[0])
        trees_close(row_of(two[1]["cache"], slot), row_of(cache, 0))
    chex.assert_trees_all_equal(row_of(two[1]["cache"], 1), row_of(pool, 1))


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
                    return x + layer(case, decode=self.decode, name="mixer")(x), None

            axes = {"params": 0, "cache": 0}
            blocks = nn.scan(Block, variable_axes=axes, split_rngs={"params": True}, length=2)
            return blocks(self.decode)(x, None)[0]

    x, apply = normal(4, 2, 6, D), jax.jit(functools.partial(Stack(True).apply, mutable=["cache"]))
    cache = jax.jit(lambda key: Stack(True).init(key, x)["cache"])(jax.random.key(0))
    chex.assert_trees_all_equal(cache, jax.tree.map(jnp.zeros_like, cache))
    inner = [parameters(case), jax.tree.map(lambda a: 0.9 * a, parameters(case))]
    (stack,) = jax.eval_shape(Stack().init, jax.random.key(0), x)["params"]
    params = {stack: {"mixer": jax.tree.map(lambda *a: np.stack(a), *inner)}}
    a, mutated = apply(dict(params=params, cache=cache), x[:, :3])
    b, _ = apply(dict(params=params, **mutated), x[:, 3:])
    y = np.concatenate([a, b], axis=1)
    for row in range(2):
        want = np.asarray(x[row], np.float64)
        for params in inner:
            want = want + numpy_layer(case, want, params)[0]
        close(y[row], want)
