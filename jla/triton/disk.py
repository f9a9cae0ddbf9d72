"""Keeps compiled kernels on disk, where Triton keeps those that it compiles itself.

jax-triton keeps them in memory alone, so that every process would compile all of its kernels, one
to several seconds each. JAX's compilation cache does not help: its key is the program with the
compiled kernels in it.
"""

import dataclasses
import functools
import hashlib
import json
import pathlib
import warnings

import triton
from triton.runtime.cache import get_cache_manager

_FILE = "jla.json"


def kept(compile_kernel, result):
    """`compile_kernel(module, backend, options, capability)`, which reads what it made before.

    The folder is Triton's: TRITON_CACHE_DIR, else ~/.triton/cache.

    Args:
      compile_kernel: jax-triton's, from Triton's first form of a kernel to PTX.
      result: the dataclass of what it returns.
    """

    @functools.wraps(compile_kernel)
    def read_or_compile(module, backend, options, capability):
        settings = sorted((name, str(value)) for name, value in options.__dict__.items())
        names = [x.name for x in dataclasses.fields(result)]
        what = (triton.__version__, capability, names, settings, str(module))
        key = hashlib.sha256(repr(what).encode()).hexdigest()
        try:
            folder = get_cache_manager(key)
            if path := folder.get_file(_FILE):
                return result(**json.loads(pathlib.Path(path).read_text()))
            made = compile_kernel(module, backend, options, capability)
            # Without the forms in between, which only jax-triton's dumps show.
            folder.put(json.dumps(dataclasses.asdict(made) | dict(ttgir="", llir="")), _FILE)
        except OSError as error:
            message = f"compiled Triton kernels cannot be kept: {error}. TRITON_CACHE_DIR names "
            warnings.warn(f"{message}a folder for them", stacklevel=2)
            made = compile_kernel(module, backend, options, capability)
        return made

    return read_or_compile
