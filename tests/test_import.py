"""`import jla` is quick and starts nothing."""

import subprocess
import sys

PROGRAM = """
import time
import jax
start = time.perf_counter()
import jla
seconds = time.perf_counter() - start
from jax._src import xla_bridge
assert not xla_bridge.backends_are_initialized(), "importing jla started a backend"
assert seconds < 2, f"importing jla took {seconds:.1f} s beyond jax"
"""


def test_import_is_quick_and_starts_no_backend():
    done = subprocess.run([sys.executable, "-c", PROGRAM], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
