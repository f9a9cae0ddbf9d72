"""Fast linear attention for JAX: pure functions, flax layers, GPU kernels."""

import importlib
from typing import TYPE_CHECKING

from jla._core.checking import checking
from jla.gsa import GSAState, gsa, gsa_step
from jla.kda import kda, kda_gate, kda_step
from jla.log_linear import (
    LazyLogLinearState,
    LogLinearState,
    log_linear_attention,
    log_linear_step,
)
from jla.mesa_net import MesaState, mesa_net, mesa_step
from jla.path_attention import LazyPathCache, PathCache, path_attention, path_step
from jla.sharded import sharded

__all__ = [
    "GSAState",
    "LazyLogLinearState",
    "LazyPathCache",
    "LogLinearState",
    "MesaState",
    "PathCache",
    "checking",
    "gsa",
    "gsa_step",
    "hub",
    "kda",
    "kda_gate",
    "kda_step",
    "linen",
    "log_linear_attention",
    "log_linear_step",
    "mesa_net",
    "mesa_step",
    "models",
    "pallas",
    "path_attention",
    "path_step",
    "sharded",
]

# What a checker sees: a `__getattr__` would let it take any name.
if TYPE_CHECKING:
    from jla import hub, linen, models, pallas

    __version__: str
else:

    def __getattr__(name):
        # Made when first used: plain functions need neither flax nor Pallas, nor a distribution.
        if name in ("hub", "linen", "models", "pallas"):
            return importlib.import_module(f"jla.{name}")
        if name == "__version__":
            from importlib import metadata

            return metadata.version("jla")
        raise AttributeError(f"module 'jla' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted([*__all__, "__version__"])
