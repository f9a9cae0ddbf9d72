"""The choice of implementation, the same for every function."""

import importlib
import importlib.util
from collections.abc import Callable
from types import ModuleType
from typing import Any

import jax

from jla._core import checking
from jla._core.checks import check_implementation
from jla._core.lengths import is_symbolic_dim
from jla._core.types import Array, Implementation, State

# The module, inside jla.reference, jla.xla and jla.pallas, that holds each function. The layers'
# convolution and norms, KDA with the making of its gates, and log-linear attention as
# Mamba-2 has it are in jla.pallas alone: their other form is the layer's own.
_MODULES = {
    "kda": "kda",
    "kda_gated": "kda",
    "kda_step": "kda",
    "gated_norm": "layers.gated_norm",
    "gsa": "gsa",
    "gsa_step": "gsa",
    "log_linear_attention": "log_linear",
    "log_linear_mamba2": "log_linear",
    "log_linear_step": "log_linear",
    "mesa_net": "mesa_net",
    "mesa_step": "mesa_net",
    "path_attention": "path_attention",
    "path_step": "path_attention",
    "rms_norm": "layers.rms_norm",
    "rms_norm_branch": "layers.rms_norm",
    "short_convolution": "layers.short_convolution",
}


def choose(
    name: str, implementation: Implementation | None, *arrays: Array | State | None
) -> Callable[..., Any]:
    """Returns the implementation of the function `name` that serves these arguments.

    Implementations are imported when first asked for, so that `import jla` stays light.

    Raises:
      ValueError: an unknown implementation.
      NotImplementedError: "pallas" was asked for and cannot serve these arguments here.
    """
    check_implementation(implementation)
    if implementation in (None, "pallas"):
        reason = _why_not_pallas(name, arrays, asked_for=implementation == "pallas")
        if reason is None:
            implementation = "pallas"
        elif implementation is None:
            implementation = "xla"
        else:
            raise NotImplementedError(
                f'implementation="pallas" cannot serve this call: {reason}. '
                'implementation="xla" can.'
            )
    return getattr(_module(implementation, name), name)


def kernel(
    name: str, implementation: Implementation | None, *arrays: Array | State | None
) -> Callable[..., Any] | None:
    """The Pallas form of `name` if `implementation` allows it and it can serve these arguments.

    None otherwise, also where "pallas" was asked for: for what a layer has a form of its own.
    """
    asked_for = implementation == "pallas"
    if implementation not in (None, "pallas"):
        return None
    # What is made inside the kernel could not be checked: the public function gets it instead.
    if name in ("kda_gated", "log_linear_mamba2") and checking.on():
        return None
    if _why_not_pallas(name, arrays, asked_for=asked_for) is not None:
        return None
    return getattr(_module("pallas", name), name)


def _why_not_pallas(
    name: str, arrays: tuple[Array | State | None, ...], *, asked_for: bool
) -> str | None:
    """Why the kernels of `name` cannot serve these arrays on this device, or None."""
    if not asked_for and jax.default_backend() != "gpu":
        return "there is no GPU"  # and no need to import Pallas
    from jla import pallas

    if importlib.util.find_spec(f"jla.pallas.{_MODULES[name]}") is None:
        return "there is no kernel for it yet"
    # The leaves: a cache is a tree of arrays.
    if any(is_symbolic_dim(size) for x in jax.tree.leaves(arrays) for size in x.shape):
        return "it has a symbolic shape (jax.export), and the kernels are made for known sizes"
    module = _module("pallas", name)
    if not hasattr(module, name):
        return "there is no kernel for it yet"
    return module.unsupported(name, *arrays) or pallas.unsupported_device()


def _module(package: str, name: str) -> ModuleType:
    return importlib.import_module(f"jla.{package}.{_MODULES[name]}")
