"""Calls Triton kernels from JAX. The only file that imports jax-triton; it hides its versions.

A kernel is a `@triton.jit` function without JAX in it. Its parameters are the inputs, the outputs,
and constants, in this order. On a GPU jax-triton (0.3.1 to 0.4.1, with JAX 0.11.2 to 0.12) compiles
it for the device's compute capability and launches it. In a process with TRITON_INTERPRET=1, which
is for tests, Triton's interpreter runs it on the CPU, and jax-triton is not needed.
"""

import contextlib
import functools
import importlib
import os
import threading
import types
import warnings

import jax
import numpy as np
import triton
from jax import lax
from jax._src.interpreters import partial_eval

from jla.triton import disk

# Triton reads the variable where it decorates a kernel: it holds for the whole process.
INTERPRETED = triton.knobs.runtime.interpret
# The compute capability whose blocks the interpreter takes: the class of most GPUs.
_INTERPRETED_AS = 89

_compiled_for = None  # what `compiling_for` says


def call(kernel, *inputs, grid, outputs, config, constants, in_place=None, capability=None):
    """Runs a kernel on a grid of programs.

    Args:
      kernel: a `@triton.jit` function. It takes a pointer for every input that is an array and the
        number for every one that is not, then a pointer for every output, then its constants.
      inputs: arrays, and Python numbers that the compiled program does not depend on (but for 1,
        and whether they are 1).
      grid: how many programs, a tuple of up to three integers; the second and third below 65536.
      outputs: the shape and dtype of each, a sequence of `jax.ShapeDtypeStruct`.
      config: the kernel's `Config`; its blocks are constants, unless `constants` has others.
      constants: the kernel's constexpr parameters by name.
      in_place: {input: output}, by their numbers, for states that are updated: both have one
        buffer, the input's if that is donated or a temporary, else a copy of it. They are the last
        outputs. The kernel reads and writes through the input's pointer, and ignores the output's,
        which may be None.
      capability: the compute capability to compile for, as 80 or 89; `target()` if None.

    Returns:
      The outputs, a list of arrays.
    """
    in_place = dict(in_place or {})
    fresh = len(outputs) - len(in_place)
    if sorted(in_place.values()) != list(range(fresh, len(outputs))):
        raise ValueError(f"in_place must name the last outputs of {len(outputs)}, got {in_place}")
    constants = {**config.blocks, **constants}
    grid = tuple(map(int, grid))
    outputs = [jax.ShapeDtypeStruct(x.shape, x.dtype) for x in outputs]
    if INTERPRETED:
        return _interpret(kernel, inputs, grid, outputs, constants, in_place)
    capability = capability or target()
    return _launch(kernel, inputs, grid, outputs, config, constants, in_place, capability)


def target():
    """The compute capability that kernels are compiled for, as Triton writes it: 89 for 8.9."""
    if _compiled_for is not None:
        return _compiled_for
    if INTERPRETED:
        return _INTERPRETED_AS
    device = jax.local_devices()[0]
    if device.platform != "gpu":
        raise NotImplementedError(
            "Triton kernels are compiled for the default device, and it is no GPU; to only compile "
            "them, name one: `with jla.triton.launch.compiling_for(80):`"
        )
    return int(device.compute_capability.replace(".", ""))


@contextlib.contextmanager
def compiling_for(capability):
    """Kernels that are traced inside are compiled for another compute capability, as 80 or 89.

    For tests and benchmarks, one thread. On a GPU their PTX is then assembled for that GPU: an H200
    so runs the instructions and blocks of an A100 (80) or an RTX 40 (89). Code for 100 and 120 runs
    on nothing else. JAX's compiled programs are dropped at both ends.
    """
    global _compiled_for
    before, library = _compiled_for, jax_triton().triton_lib.triton_kernel_call_lib
    jax.clear_caches()
    device = jax.local_devices()[0]
    if device.platform == "gpu":
        here = int(device.compute_capability.replace(".", ""))
        made = library.TritonKernel
        # The seventh argument is the number that the PTX is assembled for.
        assembled = types.SimpleNamespace(**vars(library))
        assembled.TritonKernel = lambda *x: made(*x[:6], here, *x[7:])
        jax_triton().triton_lib.triton_kernel_call_lib = assembled
    _compiled_for = capability
    try:
        yield
    finally:
        _compiled_for = before
        jax_triton().triton_lib.triton_kernel_call_lib = library
        jax.clear_caches()


# ------------------------------------------------------------------------------ on a GPU


@functools.cache
def jax_triton():
    """The module, imported, with what its versions lack."""
    driver = importlib.import_module("triton.backends.nvidia.driver")
    if not hasattr(driver, "TMA_TF32"):  # of triton 3.7; jax-triton 0.4 imports it
        driver.TMA_TF32 = 11
    # jax-triton 0.3 sets it to "" and 0.4 deletes it, for everyone in the process.
    cache = os.environ.get("TRITON_CACHE_DIR")
    try:
        module = importlib.import_module("jax_triton")
    finally:
        os.environ.pop("TRITON_CACHE_DIR", None)
        if cache is not None:
            os.environ["TRITON_CACHE_DIR"] = cache
    library = importlib.import_module("jax_triton.triton_lib")
    if _is_new(module):
        partial_eval.dce_rules[library.triton_kernel_call_p] = _drop_unused
    if "JAX_TRITON_DUMP_DIR" not in os.environ:  # dumps want every form of a kernel
        library.compile_ttir_to_ptx_inplace = disk.kept(
            library.compile_ttir_to_ptx_inplace, library.CompilationResult
        )
    return module


def _is_new(module):
    """Whether jax-triton is 0.4 or newer."""
    return tuple(int(x) for x in module.__version__.split(".")[:2]) >= (0, 4)


def _drop_unused(used, *rest):
    """Drops a call without a user. jax-triton 0.4.1's own rule keeps all, and JAX 0.12 gives it an
    argument more than it takes."""
    equation = rest[-1]
    if any(used) or equation.effects or equation.params["has_side_effect"]:
        return [True] * len(equation.invars), equation
    return [False] * len(equation.invars), None


def _launch(kernel, inputs, grid, outputs, config, constants, in_place, capability):
    module = jax_triton()
    arguments = dict(
        kernel=kernel,
        grid=grid,
        num_warps=config.warps,
        num_stages=config.stages,
        compute_capability=capability,
        **constants,
    )
    if _is_new(module):
        # It passes the buffer of an input that is updated once.
        names = [x.name for x in kernel.params if not x.is_constexpr]
        for _, i in in_place.items():
            arguments[names[len(inputs) + i]] = None
        arguments |= dict(out_type=outputs, backend_options={"enable_fp_fusion": True})
        aliases = in_place
    else:
        arguments |= dict(out_shape=outputs, enable_fp_fusion=True)
        # It counts arrays alone.
        arrays = np.cumsum([_is_array(x) for x in inputs]) - 1
        aliases = {int(arrays[i]): o for i, o in in_place.items()}
    if aliases:
        arguments["input_output_aliases"] = aliases
    with warnings.catch_warnings():
        # 0.4 would rather have references; 0.3 has none.
        warnings.filterwarnings("ignore", "input_output_aliases", DeprecationWarning)
        if not in_place:
            return list(module.triton_call(*inputs, **arguments))
        # Without barriers XLA makes one operation of a kernel and slices of stacked layers. It has
        # no aliases: the kernel would write to the old layers, and nothing to the new ones.
        states = {i: lax.optimization_barrier(inputs[i]) for i in in_place}
        inputs = [states.get(i, x) for i, x in enumerate(inputs)]
        return list(lax.optimization_barrier(module.triton_call(*inputs, **arguments)))


def _is_array(x):
    return hasattr(x, "shape") and hasattr(x, "dtype")


# ------------------------------------------------------------------------------ interpreted

_TRITON_NAMES = {
    "bfloat16": "bf16",
    "bool": "i1",
    **{f"float{n}": f"fp{n}" for n in (16, 32, 64)},
    **{f"{kind}{n}": f"{kind[0]}{n}" for kind in ("int", "uint") for n in (8, 16, 32, 64)},
}
_one_at_a_time = threading.Lock()  # the interpreter changes Triton's own modules while it runs


class _Buffer:
    """A NumPy array as what Triton's interpreter takes for a tensor, which is its own storage."""

    def __init__(self, array):
        self.array, self.dtype = array, _TRITON_NAMES[array.dtype.name]

    def data_ptr(self):
        return self.array.ctypes.data

    def _self(self, *_, **__):
        return self

    def _nothing(self, *_, **__):
        return None

    untyped_storage = cpu = new_empty = _self
    set_ = storage_offset = size = stride = copy_ = _nothing


def _interpret(kernel, inputs, grid, outputs, constants, in_place):
    """Calls the kernel through Triton's interpreter, on the host."""
    numbers = {i: x for i, x in enumerate(inputs) if not _is_array(x)}

    def host(*arrays):
        # Copies: what is updated must not be JAX's own memory, and all must be contiguous.
        given = [_Buffer(np.array(x, order="C")) for x in arrays]
        for i, x in numbers.items():
            given.insert(i, x)
        results = [_Buffer(np.empty(x.shape, x.dtype)) for x in outputs]
        for i, o in in_place.items():
            results[o] = given[i]
        with _one_at_a_time:
            kernel[grid](*given, *results, **constants)
        return [x.array for x in results]

    return list(jax.pure_callback(host, outputs, *filter(_is_array, inputs)))
