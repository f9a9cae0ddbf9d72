"""GPU kernels in Triton, through jax-triton, for NVIDIA GPUs of compute capability 8.0 and newer.

docs/triton.md has their design. This file imports neither package: both are an extra, and
`import jla` does without them.
"""

import importlib
import importlib.util

import jax

OLDEST = 80  # the oldest compute capability that the kernels are made for, as Triton writes 8.0


def missing_packages():
    """Why the modules of `jla.triton` cannot be imported, or None."""
    return _why_not("triton", _launch)


def unsupported_device():
    """Why the kernels cannot run on the default device, or None."""
    if reason := missing_packages():
        return reason
    if _launch().INTERPRETED:
        return None
    device = jax.local_devices()[0]
    wanted = "the kernels need an NVIDIA GPU of compute capability 8.0 or newer"
    if device.platform != "gpu":
        return f"{wanted}, and the default device is {device.device_kind}"
    capability = str(getattr(device, "compute_capability", None))
    if not capability.replace(".", "").isdigit():  # AMD's are gfx942 and the like
        return f"{wanted}, and the default device, {device.device_kind}, is not NVIDIA's"
    if int(capability.replace(".", "")) < OLDEST:
        return f"{wanted}, and the default device, {device.device_kind}, has {capability}"
    return _why_not("jax_triton", lambda: _launch().jax_triton())


def _launch():
    return importlib.import_module("jla.triton.launch")


_reasons: dict[str, str | None] = {}


def _why_not(package, load):
    """Why a package, which `load` imports, cannot be used, or None."""
    if package not in _reasons:
        _reasons[package] = None
        wanted = "the kernels need triton and jax-triton"
        spec = importlib.util.find_spec(package)
        if spec is None or spec.origin is None:  # nothing, or a folder of this name
            install = "`pip install 'jla[triton]'` installs both"
            _reasons[package] = f"{wanted}, and {package} is not installed ({install})"
        else:
            try:
                load()
            except ImportError as error:
                _reasons[package] = f"{wanted}, and {package} cannot be imported: {error}"
    return _reasons[package]
