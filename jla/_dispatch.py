"""The choice of implementation, the same for every function."""

import functools
import importlib
import importlib.util
from collections.abc import Callable, Mapping
from types import ModuleType
from typing import Any

import jax

from jla._core.checks import check_implementation
from jla._core.lengths import is_symbolic_dim
from jla._core.types import Array, Implementation, State

# The packages with kernels, in order of preference. Each has `missing_packages()` and
# `unsupported_device()`, and each of its modules `unsupported(name, *arrays)`: why it cannot be
# imported or cannot serve, or None. "xla" and "reference" serve every call.
BACKENDS = ("pallas", "triton")

# The module, inside the package of each implementation, that holds a function: the public ones, and
# those of `jla._fused`.
_MODULES = {
    "kda": "kda",
    "kda_from_projection": "kda",
    "kda_step": "kda",
    "kda_token": "kda",
    "gated_norm": "layers",
    "gsa": "gsa",
    "gsa_step": "gsa",
    "gsa_token": "gsa",
    "log_linear_attention": "log_linear",
    "log_linear_mamba2": "log_linear",
    "log_linear_step": "log_linear",
    "log_linear_token": "log_linear",
    "mesa_net": "mesa_net",
    "mesa_step": "mesa_net",
    "mesa_token": "mesa_net",
    "path_attention": "path_attention",
    "path_step": "path_attention",
    "path_token": "path_attention",
    "product_of_few": "layers",
    "products_of_few": "layers",
    "rms_norm": "layers",
    "rms_norm_branch": "layers",
    "short_convolution": "layers",
    "swiglu_of_few": "layers",
}
# Kernels of the layers have a file each.
_KERNELS = {
    "gated_norm": "layers.gated_norm",
    "product_of_few": "layers.products",
    "products_of_few": "layers.products",
    "rms_norm": "layers.rms_norm",
    "rms_norm_branch": "layers.rms_norm",
    "short_convolution": "layers.short_convolution",
    "swiglu_of_few": "layers.products",
}


def choose(
    name: str,
    implementation: Implementation | None,
    *arrays: Array | State | None,
    **options: Any,
) -> Callable[..., Any]:
    """Returns the implementation of the function `name` that serves these arguments.

    Implementations are imported when first asked for, so that `import jla` stays light.

    Args:
      name: of a function in `_MODULES`.
      implementation: "reference", "xla", one of `BACKENDS`, or None for the first of `BACKENDS`
        that serves, and else "xla".
      arrays: the function's arrays, caches and None, in its order.
      options: settings that a backend may not have.

    Raises:
      ValueError: an unknown implementation.
      NotImplementedError: a backend was named and cannot serve these arguments here. The message
        has every backend's reason.
    """
    check_implementation(implementation)
    if implementation not in (None, *BACKENDS):
        return getattr(_module(implementation, name), name)
    reasons: dict[str, str | None] = {}
    # The named one first, then all others: an error says which of them serve.
    named = () if implementation is None else (implementation,)
    for backend in dict.fromkeys((*named, *BACKENDS)):
        asked_for = backend == implementation
        reasons[backend] = _why_not(backend, name, arrays, options, asked_for=asked_for)
        if reasons[backend] is None and implementation in (None, backend):
            return getattr(_module(backend, name), name)
    if implementation is None:
        return getattr(_module("xla", name), name)
    raise NotImplementedError(_refusal(implementation, reasons))


def serves(name: str, implementation: Implementation | None, *arrays: Any, **options: Any) -> bool:
    """Whether `choose` would return kernels for these arguments, or for arrays of their shapes and
    dtypes (`jax.ShapeDtypeStruct`)."""
    return implementation in (None, *BACKENDS) and any(
        _why_not(backend, name, arrays, options, asked_for=backend == implementation) is None
        for backend in BACKENDS
        if implementation in (None, backend)
    )


def _refusal(implementation: str, reasons: Mapping[str, str | None]) -> str:
    """Why the named implementation does not serve, and which others do."""
    message = f'implementation="{implementation}" cannot serve this call: {reasons[implementation]}'
    serving = ["xla"]
    for backend, reason in reasons.items():
        if reason is None:
            serving.insert(-1, backend)
        elif backend != implementation:
            message += f'; nor can "{backend}": {reason}'
    return f"{message}. " + " or ".join(f'implementation="{x}"' for x in serving) + " can."


def has_gpu() -> bool:
    """Whether the default device is a GPU: without one, kernels serve only where they are named."""
    return jax.default_backend() == "gpu"


def _why_not(
    backend: str,
    name: str,
    arrays: tuple[Array | State | None, ...],
    options: Mapping[str, Any],
    *,
    asked_for: bool,
) -> str | None:
    """Why the kernels of a backend cannot serve these arguments on this device, or None."""
    if not asked_for and not has_gpu():
        return "there is no GPU"  # and no need to import the backend
    package = importlib.import_module(f"jla.{backend}")
    if not _exists(_path(backend, name)):
        return "it has no kernel for this function"
    if reason := package.missing_packages():
        return reason
    # The leaves: a cache is a tree of arrays.
    if any(is_symbolic_dim(size) for x in jax.tree.leaves(arrays) for size in x.shape):
        return "it has a symbolic shape (jax.export), and the kernels are made for known sizes"
    module = _module(backend, name)
    if not hasattr(module, name):
        return "it has no kernel for this function"
    return module.unsupported(name, *arrays, **options) or package.unsupported_device()


def _module(package: str, name: str) -> ModuleType:
    return importlib.import_module(_path(package, name))


@functools.cache
def _exists(path: str) -> bool:
    """Whether there is a module of this name; packages above it are imported."""
    parent = path.rpartition(".")[0]
    return (not parent or _exists(parent)) and importlib.util.find_spec(path) is not None


def _path(package: str, name: str) -> str:
    module = _KERNELS.get(name) if package in BACKENDS else None
    return f"jla.{package}.{module or _MODULES[name]}"
