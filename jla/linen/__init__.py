"""The flax layers (flax.linen)."""

from jla.linen.gsa import GatedSlotAttention
from jla.linen.kda import KimiDeltaAttention

__all__ = ["GatedSlotAttention", "KimiDeltaAttention"]
