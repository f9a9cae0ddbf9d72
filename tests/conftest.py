"""Settings of the whole suite; they must be made before JAX starts a backend."""

import atexit
import functools
import gc
import importlib.util
import itertools
import os
import pathlib
import re
import sys

import blas  # noqa: F401, first of all
import hardware
import interpreter
import jax
import layouts
import pytest
import triton_interpreter
from evaluator import evaluated
from jax._src.core import trace_state_clean

from jla import _dispatch
from jla._core.checks import IMPLEMENTATIONS
from jla._dispatch import BACKENDS

# Four for the sharding tests; with fewer than eight, interpreted kernels can starve one another.
jax.config.update("jax_num_cpu_devices", 8)
# Most of the suite's time is XLA's: on small shapes it compiles for longer than it runs. On a GPU
# it would also compile each product in many ways, to take the fastest at that moment.
jax.config.update("jax_disable_most_optimizations", True)
# No frames of Python in the programs: a seventh of the time that lowering takes.
jax.config.update("jax_traceback_in_locations_limit", 0)
# XLA's CPU compiler would cut a program into parts, for threads that wait for each other here.
FLAGS = "--xla_gpu_autotune_level=0 --xla_cpu_parallel_codegen_split_count=1"
os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} {FLAGS}"
# Kernels that only the interpreter runs right are wrong.
hardware.check_more()
interpreter.mend()
layouts.hasten()
# Traces are many small objects that live long, and Python would look through all of them for
# garbage after every 700 new ones: an eighth of the time of what is only traced. After 50,000 it
# would still be a fortieth.
gc.freeze()
gc.set_threshold(1_000_000, 10, 10)
if triton_interpreter.INTERPRETED:
    triton_interpreter.repair()
    triton_interpreter.hasten()


# Each has a file with its table.
LAYERS = [
    path.stem.removeprefix("layer_")
    for path in (pathlib.Path(__file__).parent / "linen").glob("layer_*.py")
]


def pytest_collection_modifyitems(config, items):
    chosen = {True: [], False: []}
    for item in items:
        chosen[_interpreted(item) == triton_interpreter.INTERPRETED].append(item)
    items[:] = chosen[True]
    config.hook.pytest_deselected(items=chosen[False])
    # Stable: inside a group the order stays. Long groups come first, for one that began last would
    # leave the other process idle.
    items.sort(key=lambda item: (_rank(item.nodeid, config), _group(item.nodeid, config)))
    marked = [item for item in items if item.get_closest_marker("gpu")]
    if marked and not _has_gpu():
        for item in marked:
            item.add_marker(pytest.mark.skip(reason="needs an NVIDIA GPU, and JAX sees none here"))
    elif reason := _without_triton():
        for item in filter(_is_triton, marked):
            item.add_marker(pytest.mark.skip(reason=reason))


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config, log):
    """Gives a whole group to one process. pytest-xdist's own groups are lost with pytest 9.2."""
    from xdist.scheduler import LoadScopeScheduling

    class ByGroup(LoadScopeScheduling):
        def _split_scope(self, nodeid):
            return _group(nodeid, config)

    return ByGroup(config, log)


def _group(nodeid, config):
    """What runs together, in one process: the tests that use the same compiled programs.

    Those of a mechanism, with its definition, and those of a layer.
    """
    contract = re.search(rf"contract/.*\[(\w+)-({'|'.join(IMPLEMENTATIONS)})\b", nodeid)
    if config.getoption("markexpr") == "gpu":
        return _group_on_gpus(nodeid, contract)
    if contract:
        return contract[1]
    layer = re.search(rf"linen/.*[\[-]({'|'.join(LAYERS)})\b", nodeid)
    if layer:
        return f"linen-{layer[1]}"
    if "test_compile" in nodeid:  # they share nothing
        return nodeid
    return nodeid.split("[" if "test_pallas" in nodeid else "::")[0]


def _group_on_gpus(nodeid, contract):
    """As `_group`, for fourteen processes: the longest group is the least that the run takes."""
    if contract:
        name, backend = contract.groups()
        test = nodeid.split("::")[1]
        if "-full" not in nodeid:  # they have the small cases
            part = "small"
        elif "test_every_token_its_own_segment" in test:  # the only one with segments
            part = "segments"
        elif backend in BACKENDS and re.search("test_(causal|a_later)", test):
            part = "forward"  # kernels have a program of their own for it
        else:
            part = "gradients"
        return f"{name}-{backend}-{part}"
    if "test_on_gpu.py" in nodeid:  # a target and a mechanism
        return "-".join(nodeid.split("[")[1].rstrip("]").split("-")[:2])
    return nodeid


def _interpreted(item):
    """Whether a test needs Triton's interpreter, and with it a process of its own."""
    parameters = item.callspec.params.values() if hasattr(item, "callspec") else ()
    rows = any(getattr(x, "own_process", False) for x in parameters)
    return rows or item.get_closest_marker("interpreted") is not None


def _without_triton():
    """Which of the packages is not there, or None. One that cannot be imported is no reason."""
    for package in ("triton", "jax_triton"):
        spec = importlib.util.find_spec(package)
        if spec is None or spec.origin is None:  # nothing, or the folder tests/triton
            return f"needs {package}, which is not installed: pip install 'jla[triton]'"
    return None


def _is_triton(item):
    """Whether a test runs Triton's kernels."""
    parameters = item.callspec.params.values() if hasattr(item, "callspec") else ()
    implementations = (getattr(x, "name", None) for x in parameters)
    return "triton" in implementations or item.path.parent.name == "triton"


def _rank(nodeid, config):
    if config.getoption("markexpr") == "gpu":
        # Theirs take XLA longest: PaTH's one process for minutes. The fuzzer runs for one.
        long = re.search(r"^(path|log_linear)-\w+-gradients$|test_fuzz", _group(nodeid, config))
        return 0 if long else 1 if re.search("-full|test_as_for", nodeid) else 2
    if "contract/" in nodeid and re.search("-(pallas|triton)", nodeid):
        return 0
    return 1 if "test_pallas" in nodeid or "contract/" in nodeid else 2


def _has_gpu():
    return any(device.platform == "gpu" for device in jax.devices())


def pytest_sessionfinish():
    """pytest now looks for garbage ten times over, each time through all that is there. After it
    what was frozen must be free to go, or Triton's bindings say that it leaks."""
    gc.freeze()
    atexit.register(gc.unfreeze)


# Each compiled program keeps dozens of memory mappings; Linux allows a process 65530, and then
# XLA's compiler crashes.
MAPPINGS = pathlib.Path("/proc/self/maps")


_tests = itertools.count()


def pytest_runtest_teardown():
    """Drops all compiled programs before they are too many. A test adds hundreds of mappings at
    most, and counting tens of thousands takes hundredths of a second: not after each."""
    if next(_tests) % 16 == 0 and MAPPINGS.exists():
        if MAPPINGS.read_bytes().count(b"\n") > 30000:
            jax.clear_caches()


@pytest.fixture(autouse=True)
def strict_and_precise(request):
    """No dtype and no rank is promoted in silence; products are full float32, as the tolerances
    mean them."""
    optax = request.node.get_closest_marker("optax")
    with (
        jax.numpy_dtype_promotion("standard" if optax else "strict"),
        jax.numpy_rank_promotion("allow" if optax else "raise"),
        jax.default_matmul_precision("highest"),
    ):
        yield


@pytest.fixture
def on_a_gpu(monkeypatch):
    """`implementation=None` takes kernels where they serve, as it does where there is a GPU."""
    monkeypatch.setattr(_dispatch, "has_gpu", lambda: True)


@pytest.fixture
def only_kernels_of(monkeypatch):
    """A function of names in `_dispatch`: no others have kernels from then on."""
    why_not = _dispatch._why_not

    def only(*names):
        def patched(backend, name, *rest, **options):
            return why_not(backend, name, *rest, **options) if name in names else "not under test"

        monkeypatch.setattr(_dispatch, "_why_not", patched)

    return only


@pytest.fixture(scope="session")
def begun_by_numpy():
    """What the examples have before the first step: XLA compiles it for as long as the step.

    It is put on a device, as is what a checkpoint had: the step is compiled once for both.
    """
    functions = dict(train_lm="initialise", recall="initialise")
    functions["benchmarks.side_by_side"] = "make_params"
    with pytest.MonkeyPatch.context() as patch:
        for module, name in functions.items():
            if module in sys.modules:
                function = getattr(sys.modules[module], name)
                patch.setattr(sys.modules[module], name, _by_numpy(function))
        yield


def _by_numpy(function):
    @functools.wraps(function)
    def run(*args):
        if not trace_state_clean():
            return function(*args)
        made = evaluated(jax.jit(lambda: function(*args)))()
        return jax.device_put(made, jax.devices()[0])

    return run
