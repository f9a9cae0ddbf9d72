"""What the wrappers call is compiled as far as types are checked.

Triton's interpreter is not so strict: there a kernel's pointers may change their type.
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from test_compile import source
from test_steps import STEPS

# Not of "triton" itself: this folder has the name.
pytest.importorskip("triton.compiler", reason="triton is not installed")
from triton._C.libtriton import ir
from triton.backends.compiler import GPUTarget
from triton.compiler import make_backend

import cases
import jla
import jla.triton
from jla.triton import launch

# A mechanism's function, the name of its state, and sizes.
RUNS = {
    "kda": (jla.kda, "initial_state", dict(H=1, HV=2, K=16, V=24)),
    "gsa": (jla.gsa, "initial_state", dict(H=1, HQ=2, K=16, V=16, M=20)),
    "log_linear": (jla.log_linear_attention, "initial_state", dict(H=2, HK=1, K=16, V=24)),
    "mesa": (jla.mesa_net, "initial_state", dict(H=1, K=16, V=24)),
    "path": (jla.path_attention, "cache", dict(H=1, HQ=2, K=16, V=24)),
}
TARGET = GPUTarget("cuda", 80, 32)
NAMES = {"bfloat16": "bf16", "float16": "fp16", "float32": "fp32", "int32": "i32"}


@pytest.fixture
def calls(monkeypatch):
    """The kernels that `launch.call` is called with, which then returns zeros."""
    found = {}

    def call(kernel, *inputs, grid, outputs, config, constants, in_place=None):
        arrays = [f"*{NAMES[x.dtype.name]}" if hasattr(x, "dtype") else "i32" for x in inputs]
        arrays += [f"*{NAMES[x.dtype.name]}" for x in outputs]
        constants = {**config.blocks, **constants}
        found[kernel.__name__, str(arrays), str(constants)] = kernel, arrays, constants, config
        return [jnp.zeros(x.shape, x.dtype) for x in outputs]

    monkeypatch.setattr(launch, "call", call)
    monkeypatch.setattr(launch, "target", lambda: 80)
    monkeypatch.setattr(jla.triton, "unsupported_device", lambda: None)
    yield found
    jax.clear_caches()  # of programs that have no kernels in them


@pytest.mark.parametrize(
    "optional", [False, pytest.param(True, marks=pytest.mark.slow)], ids=["least", "all"]
)
@pytest.mark.parametrize("name", RUNS)
def test_types(name, optional, calls):
    """Without what may be left out, a state and for PaTH the gates; and with all."""
    run, state, sizes = RUNS[name]
    normal = cases.numpy_normal(np.random.default_rng(0))
    args = STEPS[name][1].arguments(sizes | dict(B=1, T=200), normal, jnp.dtype(jnp.bfloat16))
    if not optional:
        del args[state]
    if not optional and name == "path":
        del args["g"]

    def both(args):
        o, pull = jax.vjp(lambda x: run(**x, implementation="triton")[0], args)
        return pull(o)

    jax.eval_shape(both, args)
    assert calls
    for kernel, types, constants, config in calls.values():
        backend = make_backend(TARGET)
        options = dict(num_warps=config.warps, num_stages=config.stages, enable_fp_fusion=True)
        options = backend.parse_options(options)
        context = ir.context()
        ir.load_dialects(context)
        backend.load_dialects(context)
        code = backend.get_codegen_implementation(options), backend.get_module_map()
        source(kernel, types, constants).make_ir(TARGET, options, *code, context)
