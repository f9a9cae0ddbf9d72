"""Public docstrings are plain text, and their examples run as they stand."""

import inspect
import pathlib
import re
import textwrap

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from evaluator import evaluated
from flax import linen as nn

import jla.hub
import jla.linen
import jla.models
import jla.pallas
from jla.linen.mixer import Mixer

ROOT = pathlib.Path(__file__).parents[1]


def documented():
    for module in (jla, jla.hub, jla.linen, jla.models, jla.pallas):
        for name in module.__all__:
            if not inspect.ismodule(getattr(module, name)):
                yield pytest.param(getattr(module, name), id=f"{module.__name__}.{name}")


def example(x):
    """The code below "Example:", up to an empty line."""
    _, found, rest = inspect.getdoc(x).partition("\nExample:\n")
    assert found, "its docstring has no Example:"
    return textwrap.dedent(rest.partition("\n\n")[0])


def run(code):
    """Runs it; returns its arrays and trees of arrays, by name."""
    names = dict(jax=jax, jnp=jnp, jla=jla)
    exec(code, names)

    def is_array(tree):
        return all(isinstance(x, jax.Array) for x in jax.tree.leaves(tree))

    return {name: x for name, x in names.items() if name != "__builtins__" and is_array(x)}


@pytest.mark.parametrize("x", list(documented()))
def test_example(x, capsys):
    """Comments that give shapes, and those behind `print`, are true."""
    code = example(x)
    assert len(code.splitlines()) <= 6
    if isinstance(x, type) and issubclass(x, nn.Module):
        # Traced: their many small initial values would take as long to compile as all else here.
        arrays = jax.eval_shape(lambda: run(code))
    else:
        # NumPy evaluates what needs no values at once: XLA would compile each operation.
        at_once = re.search(r"print\(|set_mesh", code) or x.__module__.startswith("jla.hub")
        arrays = run(code) if at_once else evaluated(jax.jit(lambda: run(code)))()
        floats = [x for x in jax.tree.leaves(arrays) if jnp.issubdtype(x.dtype, jnp.floating)]
        assert all(np.all(np.isfinite(x)) for x in floats)
    for targets, comment in re.findall(r"^([\w, ]+) = .*  # (\[\d.*)$", code, re.M):
        shapes = re.findall(r"\[([\d, ]+)\]", comment)
        for name, shape in zip(targets.split(", "), shapes, strict=False):
            assert str(arrays[name].shape) == f"({shape})", name
    printed = capsys.readouterr().out
    for comment in re.findall(r"^ *print\(.*  # (.*)$", code, re.M):
        assert comment in printed


def test_the_base_of_the_layers_has_the_example_of_one():
    assert example(Mixer) == example(jla.linen.MesaNet)


def test_no_markup_that_a_terminal_does_not_show():
    for file in (ROOT / "jla").rglob("*.py"):
        assert re.findall(r":(?:math|func|class|meth):|\.\. \w+::|\\math", file.read_text()) == []
