"""Settings of the whole suite; they must be made before JAX starts a backend."""

import jax
import pytest

# Four for the sharding tests; with fewer than eight, interpreted kernels can starve one another.
jax.config.update("jax_num_cpu_devices", 8)
# Most of the suite's time is XLA's: on small shapes it compiles for longer than it runs.
jax.config.update("jax_disable_most_optimizations", True)


def pytest_collection_modifyitems(items):
    marked = [item for item in items if item.get_closest_marker("gpu")]
    if marked and not _has_gpu():
        for item in marked:
            item.add_marker(pytest.mark.skip(reason="needs an NVIDIA GPU, and JAX sees none here"))


def _has_gpu():
    return any(device.platform == "gpu" for device in jax.devices())


_tests_run = 0


def pytest_runtest_teardown():
    """Drops compiled programs now and then: with thousands in a process XLA's compiler crashes."""
    global _tests_run
    _tests_run += 1
    if _tests_run % 60 == 0:
        jax.clear_caches()


@pytest.fixture(autouse=True)
def strict_and_precise(request):
    """No dtype is promoted in silence; products are full float32, as the tolerances mean them."""
    promotion = "standard" if request.node.get_closest_marker("optax") else "strict"
    with jax.numpy_dtype_promotion(promotion), jax.default_matmul_precision("highest"):
        yield
