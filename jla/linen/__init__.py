"""The flax layers (flax.linen)."""

from jla.linen.kda import KimiDeltaAttention

__all__ = ["KimiDeltaAttention"]
