"""`import jla` is quick and starts nothing; its names."""

import pathlib
import subprocess
import sys
import tomllib

import jla

PROGRAM = """
import time
import jax
start = time.perf_counter()
import jla
seconds = time.perf_counter() - start
from jax._src import xla_bridge
assert not xla_bridge.backends_are_initialized(), "importing jla started a backend"
assert seconds < 2, f"importing jla took {seconds:.1f} s beyond jax"
assert {"linen", "pallas"} < set(dir(jla)), "sub-packages are not listed before they are imported"
import sys
heavy = {"flax", "jax.experimental.pallas", "jla.linen", "jla.pallas", "jla.triton", "triton"}
heavy &= set(sys.modules)
assert not heavy, f"importing jla imported {heavy}"
"""


def test_import_is_quick_and_starts_no_backend():
    done = subprocess.run([sys.executable, "-c", PROGRAM], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_names():
    assert set(dir(jla)) == {*jla.__all__, "__version__"}
    assert all(hasattr(jla, name) for name in dir(jla))
    assert not any(name.startswith("_") for name in jla.__all__)


def test_version():
    project = pathlib.Path(__file__).parent.parent / "pyproject.toml"
    assert jla.__version__ == tomllib.loads(project.read_text())["project"]["version"]
