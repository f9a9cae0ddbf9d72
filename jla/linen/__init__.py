"""The flax layers (flax.linen)."""

from jla.linen._logical_axes import logical_axes
from jla.linen._normalize import RMSNorm
from jla.linen._pools import clear
from jla.linen.gsa import GatedSlotAttention
from jla.linen.kda import KimiDeltaAttention
from jla.linen.log_linear import LogLinearMamba2
from jla.linen.mesa_net import MesaNet
from jla.linen.path_attention import PaTHAttention

__all__ = [
    "GatedSlotAttention",
    "KimiDeltaAttention",
    "LogLinearMamba2",
    "MesaNet",
    "PaTHAttention",
    "RMSNorm",
    "clear",
    "logical_axes",
]
