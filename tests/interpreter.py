"""A quicker interpreter, whose callbacks take NumPy arrays, and that knows of x64.

JAX puts each argument of an `io_callback` on a device first. An interpreted kernel makes thousands
of callbacks with a dozen small arguments each, and reads them as integers or copies them: without
this, putting them took half of such a kernel's time. What the callbacks do is the same.

It compiles each warpgroup's part on a thread of its own, and `jax.enable_x64` is known only to the
thread that enters it: a loop traced with the grid's int64 coordinates was compiled with int32.
"""

import functools
import threading

import jax
import numpy as np
from jax._src import callback
from jax._src.pallas.mosaic.interpret import thread_map
from jax._src.pallas.mosaic_gpu.interpret import shared_memory


def mend():
    """Changes every kernel that is interpreted from now on."""
    callback.io_callback_impl = _with_numpy(callback.io_callback_impl)
    shared_memory._to_int = _of_numpy(shared_memory._to_int)
    thread_map._run_jaxpr = _run_jaxpr


def _with_numpy(io_callback_impl):
    @functools.wraps(io_callback_impl)
    def run(*args, callback, **parameters):
        function = callback.callback_func
        while isinstance(function, functools.partial):
            function = function.func
        if not function.__module__.startswith("jax._src.pallas."):
            return io_callback_impl(*args, callback=callback, **parameters)
        return jax.tree.map(np.asarray, callback(*args))

    return run


def _of_numpy(to_int):
    @functools.wraps(to_int)
    def number(x):
        return x.item() if isinstance(x, np.ndarray | np.generic) else to_int(x)

    return number


def _run_jaxpr(jaxpr, consts, *args):
    """As the interpreter's, under the caller's x64; and warpgroups wait for one compilation."""
    wide = any(x.dtype.itemsize == 8 for x in (*consts, *args))
    with jax.enable_x64(wide):
        with _compiling:
            compiled = _run.trace(jaxpr, consts, *args).lower().compile()
        compiled(consts, *args)


_run = jax.jit(thread_map._run, static_argnums=0)
_compiling = threading.Lock()
