"""GPU kernels in Pallas Mosaic GPU, for NVIDIA Hopper (compute capability 9.0)."""

import jax

from jla._core.interpreter import interpreting
from jla.pallas.common.mosaic import interpret

__all__ = ["interpret"]


def missing_packages():
    """Why the modules of `jla.pallas` cannot be imported, or None: all they need comes with JAX."""
    return None


def unsupported_device():
    """Why the kernels cannot run on the default device, or None."""
    if interpreting():
        return None
    device = jax.local_devices()[0]
    if device.platform != "gpu":
        return (
            f"the kernels need an NVIDIA GPU of compute capability 9.0, and the default device is "
            f"{device.device_kind} (`with jla.pallas.interpret():` runs them here, slowly)"
        )
    if device.compute_capability != "9.0":
        return (
            "the kernels need compute capability 9.0, and the default device, "
            f"{device.device_kind}, has {device.compute_capability}"
        )
    return None
