"""The examples in the layers' docstrings run; traced, with inputs x [B, T, D] and a key."""

import inspect
import textwrap

import jax
import jax.numpy as jnp
import pytest

import jla.linen
from jla.linen.mixer import Mixer

LAYERS = [x for x in vars(jla.linen).values() if isinstance(x, type) and issubclass(x, Mixer)]


@pytest.mark.parametrize("layer", [*LAYERS, Mixer], ids=lambda x: x.__name__)
def test_examples(layer):
    lines = inspect.getdoc(layer).splitlines()
    start = next(i for i, line in enumerate(lines) if line.startswith("    layer = "))
    code = textwrap.dedent("\n".join(lines[start : lines.index("", start)]))

    def run(key, x):
        names = dict(jla=jla, key=key, x=x)
        exec(code, names)
        return names["y"]

    x = jax.ShapeDtypeStruct((2, 5, 256), jnp.float32)
    y = jax.eval_shape(run, jax.random.key(0), x)
    assert (y.shape, y.dtype) == (x.shape, x.dtype)


@pytest.mark.parametrize("layer", LAYERS, ids=lambda x: x.__name__)
def test_every_attribute_is_described(layer):
    """Those of all layers by the base, or by the layer where it means something else by them."""
    described = inspect.getdoc(layer) + inspect.getdoc(Mixer)
    own = set(layer.__dataclass_fields__) - {"parent", "name"}
    assert [name for name in own if f"\n  {name}: " not in described] == []
