"""Settings of the whole suite; they must be made before JAX starts a backend."""

import jax
import pytest

jax.config.update("jax_num_cpu_devices", 8)
jax.config.update("jax_numpy_dtype_promotion", "strict")


def pytest_collection_modifyitems(items):
    marked = [item for item in items if item.get_closest_marker("gpu")]
    if marked and not _has_gpu():
        for item in marked:
            item.add_marker(pytest.mark.skip(reason="needs an NVIDIA GPU, and JAX sees none here"))


def _has_gpu():
    return any(device.platform == "gpu" for device in jax.devices())


@pytest.fixture(autouse=True)
def highest_precision():
    """The contract's tolerances are for full float32 products."""
    with jax.default_matmul_precision("highest"):
        yield
