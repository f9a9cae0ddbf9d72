"""jla: linear attention for JAX, at the speed of the card."""

import importlib

from jla._core.checking import checking
from jla.gsa import GSAState, gsa, gsa_step
from jla.kda import kda, kda_gate, kda_step
from jla.log_linear import LogLinearState, log_linear_attention, log_linear_step
from jla.mesa_net import MesaState, mesa_net, mesa_step
from jla.path_attention import PathCache, path_attention, path_step

__all__ = [
    "GSAState",
    "LogLinearState",
    "MesaState",
    "PathCache",
    "checking",
    "gsa",
    "gsa_step",
    "kda",
    "kda_gate",
    "kda_step",
    "linen",
    "log_linear_attention",
    "log_linear_step",
    "mesa_net",
    "mesa_step",
    "pallas",
    "path_attention",
    "path_step",
]


def __getattr__(name):
    # Imported when first used: plain functions need neither flax nor Pallas.
    if name in ("linen", "pallas"):
        return importlib.import_module(f"jla.{name}")
    raise AttributeError(f"module 'jla' has no attribute {name!r}")
