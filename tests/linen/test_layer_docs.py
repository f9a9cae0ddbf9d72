"""The layers' docstrings are complete. tests/test_docstrings.py runs their examples."""

import inspect

import pytest

import jla.linen
from jla.linen.mixer import Mixer

LAYERS = [x for x in vars(jla.linen).values() if isinstance(x, type) and issubclass(x, Mixer)]


@pytest.mark.parametrize("layer", LAYERS, ids=lambda x: x.__name__)
def test_every_attribute_is_described(layer):
    """Those of all layers by the base, or by the layer where it means something else by them."""
    described = inspect.getdoc(layer) + inspect.getdoc(Mixer)
    own = set(layer.__dataclass_fields__) - {"parent", "name"}
    assert [name for name in own if f"\n  {name}: " not in described] == []
