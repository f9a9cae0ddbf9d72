"""Every public function and layer stands by name in front of its error messages."""

import inspect

import jax
import jax.numpy as jnp
import pytest

import jla
from jla._core import checks

# All but the context, which takes no arguments.
FUNCTIONS = [n for n in jla.__all__ if inspect.isfunction(getattr(jla, n)) and n != "checking"]


@pytest.mark.parametrize("name", FUNCTIONS)
def test_functions(name):
    with pytest.raises(TypeError, match=rf"^jla\.{name}: .*missing .* required"):
        getattr(jla, name)()


def test_the_cache():
    with pytest.raises(ValueError, match=r"^jla\.PathCache\.empty: capacity must be at least 1"):
        jla.PathCache.empty(1, 0, 1, 16, 16)


LAYERS = [n for n in jla.linen.__all__ if inspect.isclass(getattr(jla.linen, n))]


@pytest.mark.parametrize("name", LAYERS)
def test_layers(name):
    layer = getattr(jla.linen, name)
    options = dict(num_heads=1) if "num_heads" in layer.__dataclass_fields__ else {}
    with pytest.raises(TypeError, match=rf"^jla\.linen\.{name}: .*missing 1 required"):
        layer(**options).apply({})


def test_a_layer_that_calls_a_function():
    layer = jla.linen.KimiDeltaAttention(num_heads=1, key_dim=16, implementation="fast")
    with pytest.raises(ValueError, match=r"^jla\.linen\.KimiDeltaAttention: .*implementation"):
        jax.eval_shape(layer.init, jax.random.key(0), jnp.zeros((1, 2, 16)))


def test_the_exceptions_of_others_are_left_alone():
    @checks.named
    def branches(x):
        return 1 if x > 0 else 2

    with pytest.raises(jax.errors.TracerBoolConversionError, match=r"^Attempted"):
        jax.eval_shape(branches, 1.0)


def test_known():
    assert checks.known(jnp.zeros(2)) and checks.known(3)
    jax.eval_shape(lambda x: pytest.fail("known") if checks.known(x) else x, 1.0)
