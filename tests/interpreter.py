"""A quicker interpreter: kernels are evaluated with NumPy, and neither lowered nor compiled.

JAX's own makes XLA programs of each kernel and of its threads' part, with hundreds of callbacks on
small arrays; to compile them, anew for all shapes, took most of the time of most tests of kernels.
Here the same callbacks are called one by one, with NumPy arrays (see evaluator.py): what they do,
and so all that the interpreter checks, is the same.
"""

import functools

import evaluator
import jax
import numpy as np
from jax._src import callback, core
from jax._src.pallas.mosaic.interpret import thread_map
from jax._src.pallas.mosaic_gpu.interpret import interpret_pallas_call, shared_memory


def mend():
    """Changes every kernel that is interpreted from now on."""
    whole = interpret_pallas_call.interpret_pallas_call
    interpret_pallas_call.interpret_pallas_call = _evaluated(whole)
    shared_memory._to_int = _of_numpy(shared_memory._to_int)
    thread_map._run_jaxpr = _run_jaxpr


def _evaluated(interpret):
    """The interpreter of one kernel, all of it in one callback."""

    @functools.wraps(interpret)
    def run(*args, **parameters):
        if core.get_axis_env().axis_sizes:  # inside shard_map it asks which device it is
            return interpret(*args, **parameters)
        interpreted = functools.partial(interpret, **parameters)
        closed, shapes = jax.make_jaxpr(interpreted, return_shape=True)(*args)

        def call(*args):
            return evaluator.evaluate(closed.jaxpr, closed.consts, args)

        return callback.io_callback(call, shapes, *args, ordered=True)

    return run


def _of_numpy(to_int):
    @functools.wraps(to_int)
    def number(x):
        return x.item() if isinstance(x, np.ndarray | np.generic) else to_int(x)

    return number


def _run_jaxpr(jaxpr, consts, *args):
    """A warpgroup's part, on a thread of its own."""
    evaluator.evaluate(jaxpr.jaxpr, consts, args)
