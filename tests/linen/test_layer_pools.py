"""Layers on a pool of caches (docs/pools.md): `slots`, and `clear`."""

import functools
import pathlib
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from evaluator import evaluated
from layers import (
    D,
    each_rich,
    empty_cache,
    first_plain,
    layer,
    normal,
    parameters,
    run,
)

import jla

ROWS = 4
SLOTS = np.array([2, -1, 0], np.int32)
LIVE = np.array([0, 2])
REST = np.array([1, 3])
MASK = np.array([[1, 1, 1, 1, 0], [1, 1, 1, 1, 1], [0, 1, 1, 0, 0]], bool)


@functools.cache
def _call(case):
    module = layer(case, decode=True)

    def call(params, cache, x, mask, slots):
        variables = {"params": params, "cache": cache}
        y, updated = module.apply(variables, x, mask=mask, slots=slots, mutable=["cache"])
        return y, updated["cache"]

    return jax.jit(call)


def call(case, cache, x, mask=None, slots=None):
    return run(_call(case), parameters(case), cache, x, mask, slots)


def used(cache):
    """A cache of rows that other sequences have left: NaN, and positions of theirs."""
    return jax.tree.map(lambda x: np.full_like(x, np.nan if x.dtype.kind == "f" else 3), cache)


@each_rich
def test_rows_of_a_pool_are_rows(case):
    """To the bit: prompts with padding, then a token or padding. Other rows stay, and a row without
    a sequence gives zeros, whatever it holds."""
    pool = before = used(empty_cache(case, ROWS))
    pool = evaluated(jax.jit(jla.linen.clear))(pool, SLOTS)
    alone = empty_cache(case, len(SLOTS))
    for i, mask in enumerate((MASK, MASK[:, :1])):
        x = normal(i, 3, 1 if i else 5, D)
        wanted, alone = call(case, alone, x, mask)
        x = x.copy()
        x[1] = np.nan
        y, pool = call(case, pool, x, mask, SLOTS)
        np.testing.assert_array_equal(y[LIVE], wanted[LIVE])
        assert not np.any(y[1])
        jax.tree.map(
            lambda x, y: np.testing.assert_array_equal(x[SLOTS[LIVE]], y[LIVE]), pool, alone
        )
        jax.tree.map(lambda x, y: np.testing.assert_array_equal(x[REST], y[REST]), pool, before)


@first_plain
def test_slots_are_checked(case):
    module, x = layer(case, decode=True), normal(0, 3, 1, D)
    variables = {"params": parameters(case), "cache": empty_cache(case, ROWS)}

    def refuses(slots, exception, message, module=module):
        name = f"jla.linen.{type(module).__name__}: .*slots"
        with pytest.raises(exception, match=f"{name}.*{message}"):
            module.apply(variables, x, slots=slots, mutable=["cache"])

    def of(*slots):
        return np.array(slots, np.int32)

    refuses(of(1, 1, 0), ValueError, "must differ")
    refuses(of(1, 4, 0), ValueError, "must be -1 .* to 3")
    refuses(of(1, 0), ValueError, "B = 2")
    refuses(np.arange(3.0), TypeError, "must be int32")
    refuses(of(1, 0, 2), ValueError, "decode=True", layer(case))
    with pytest.raises(ValueError, match="slots must be None in init"):
        jax.eval_shape(functools.partial(module.init, slots=of(0, 1, 2)), jax.random.key(0), x)


@pytest.mark.slow  # compiles a layer; the tests above show what it does
def test_the_examples_of_the_page_run():
    page = pathlib.Path(__file__).parents[2] / "docs" / "pools.md"
    names = {}
    blocks = re.findall(r"^```python\n(.*?)^```", page.read_text(), re.M | re.S)
    exec("\n".join(blocks), names)
    assert names["y"].shape == (1, 12, 32)


def test_clear():
    cache = {"mixer": {"state": jnp.ones((3, 2)), "length": jnp.arange(3, dtype=jnp.int32) + 1}}
    got = jla.linen.clear(cache, np.array([[2, -1], [0, 2]], np.int32))["mixer"]
    np.testing.assert_array_equal(got["state"], [[0, 0], [1, 1], [0, 0]])
    np.testing.assert_array_equal(got["length"], [0, 2, 0])
    with pytest.raises(ValueError, match=r"jla\.linen\.clear: slots must be -1 .* to 2.* got 3"):
        jla.linen.clear(cache, np.array([3], np.int32))
    with pytest.raises(TypeError, match=r"jla\.linen\.clear: slots must be int32"):
        jla.linen.clear(cache, np.array([1]))
    with pytest.raises(ValueError, match="same number of rows"):
        jla.linen.clear(cache | {"more": jnp.ones(4)}, np.array([1], np.int32))
