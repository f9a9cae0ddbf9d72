"""GPU kernels in Pallas Mosaic GPU, for NVIDIA Hopper (sm_90)."""

from jla.pallas.mosaic import interpret

__all__ = ["interpret"]
