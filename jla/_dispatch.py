"""The choice of implementation, the same for every function."""

import importlib

from jla._checks import check_implementation

# The module, inside jla.reference, jla.xla and jla.pallas, that holds each function.
_MODULES = {"kda": "kda", "kda_step": "kda"}


def choose(name, implementation, *arrays):
    """Returns the implementation of the function `name` that serves these arguments.

    Implementations are imported when first asked for, so that `import jla` stays light.

    Raises:
      ValueError: an unknown implementation.
      NotImplementedError: "pallas" was asked for and cannot serve these arguments.
    """
    check_implementation(implementation)
    if implementation == "pallas":
        raise NotImplementedError(
            f'{name}: implementation="pallas" is not there yet; "xla" and "reference" are'
        )
    package = implementation or "xla"
    return getattr(importlib.import_module(f"jla.{package}.{_MODULES[name]}"), name)
