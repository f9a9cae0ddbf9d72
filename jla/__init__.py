"""jla: linear attention for JAX, at the speed of the card."""

from jla.kda import kda, kda_gate, kda_step

__all__ = ["kda", "kda_gate", "kda_step"]
