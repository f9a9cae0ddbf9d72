"""Whether a device can have Triton kernels, and what they are lowered to; nothing runs."""

import functools
import subprocess
import sys
import types

import jax
import jax.numpy as jnp
import pytest
from jax._src.interpreters import partial_eval

import jla
import jla.triton
from jla._core import shardwise

# Not of "triton" itself: this folder has the name.
pytest.importorskip("triton.compiler", reason="triton is not installed")
from jla.triton import configs, kda, launch

needs_launcher = pytest.mark.skipif(
    jax._src.lib.gpu_triton is None or not hasattr(jax._src.lib.gpu_triton, "TritonKernel"),
    reason="JAX's CUDA plugin, which has the launcher, is not installed; `make test` does that",
)

SDS, f32 = jax.ShapeDtypeStruct, jnp.float32
SHAPES = ((2, 2, 32), (2, 2, 32), (2, 4, 16), (2, 4, 32), (2, 4), (2, 4, 32, 16))
STEP = [SDS(shape, f32) for shape in SHAPES]
step = functools.partial(kda.kda_step, scale=1.0)


def device(platform="gpu", capability="8.0"):
    return types.SimpleNamespace(
        platform=platform, device_kind="a device", compute_capability=capability
    )


@pytest.mark.parametrize(
    "given, reason",
    [
        (device(), None),
        (device(capability="12.0"), None),
        (device(capability="7.5"), "8.0 or newer, and the default device, a device, has 7.5"),
        (device(capability="gfx942"), "NVIDIA GPU of compute capability 8.0 .* is not NVIDIA's"),
        (device("cpu"), "8.0 or newer, and the default device is a device"),
    ],
)
def test_which_devices_serve(given, reason, monkeypatch):
    monkeypatch.setattr(jax, "local_devices", lambda: [given])
    monkeypatch.setattr(jla.triton, "_reasons", {"triton": None, "jax_triton": None})
    said = jla.triton.unsupported_device()
    assert (said is None) == (reason is None)
    if reason:
        with pytest.raises(NotImplementedError, match=rf'"triton" cannot .*{reason}.*"xla" can'):
            jla.kda_step(*map(zeros, STEP), implementation="triton")


def zeros(x):
    return jnp.zeros(x.shape, x.dtype)


@pytest.mark.parametrize(
    "capability, dtype, taken",
    [
        ("9.0", jnp.bfloat16, "pallas"),
        ("9.0", f32, "triton"),
        ("8.0", jnp.bfloat16, "triton"),
        ("12.0", f32, "triton"),
        ("7.5", jnp.bfloat16, "xla"),
    ],
)
def test_what_a_gpu_gets(capability, dtype, taken, monkeypatch, on_a_gpu):
    """README's table, where no implementation is named."""
    monkeypatch.setattr(jax, "local_devices", lambda: [device(capability=capability)])
    monkeypatch.setattr(jla.triton, "_reasons", {"triton": None, "jax_triton": None})
    arrays = [SDS((1, 2, 1, 16), dtype)] * 3
    assert jla._dispatch.choose("kda", None, *arrays).__module__.startswith(f"jla.{taken}.")


@pytest.mark.parametrize("package", ["triton", "jax_triton"])
def test_without_a_package(package, monkeypatch, on_a_gpu):
    """By name it says how to get it; the default takes another implementation."""
    monkeypatch.setattr(jax, "local_devices", lambda: [device()])
    monkeypatch.setattr(jla.triton, "_reasons", {"triton": None} if package != "triton" else {})
    found = jla.triton.importlib.util.find_spec
    hidden = types.SimpleNamespace(find_spec=lambda x: None if x == package else found(x))
    monkeypatch.setattr(jla.triton, "importlib", types.SimpleNamespace(
        util=hidden, import_module=jla.triton.importlib.import_module))  # fmt: skip
    arrays = [zeros(x) for x in STEP]
    with pytest.raises(NotImplementedError, match=rf"{package} is not installed .*jla\[triton\]"):
        jla.kda_step(*arrays, implementation="triton")
    jla.kda_step(*arrays)


def test_a_mechanism_without_kernels():
    with pytest.raises(NotImplementedError, match=r'"triton" cannot .*no kernel for this function'):
        jla._dispatch.choose("rms_norm", "triton")


def test_heads_that_are_too_wide():
    q, s = jnp.zeros((1, 2, 1, 512)), jnp.zeros((1, 2, 1, 16))
    refused = r'K=512, V=512 and M=16, .* at most 256.*"xla" can'
    with pytest.raises(NotImplementedError, match=refused):
        jla.gsa(q, q, q, s, s, implementation="triton")


def test_importing_changes_no_variable():
    """jax-triton sets or deletes it, which a user of torch in the process would notice."""
    program = """
import os
from jla.triton import launch
os.environ["TRITON_CACHE_DIR"] = "here"
try:
    launch.jax_triton()
except ImportError:
    pass  # 0.3 cannot be imported without JAX's CUDA plugin
assert os.environ["TRITON_CACHE_DIR"] == "here"
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_states_are_the_last_outputs():
    with pytest.raises(ValueError, match="last outputs"):
        launch.call(
            None,
            grid=(1,),
            outputs=STEP[:2],
            config=configs.Config({}),
            constants={},
            in_place={0: 0},
        )


def test_compiling_for_no_gpu_says_how():
    with pytest.raises(NotImplementedError, match=r"compiling_for\(80\)"):
        jax.eval_shape(step, *STEP)


@needs_launcher
def test_a_step_lowers():
    """For each compute capability to other code."""
    texts = set()
    for capability in (80, 90):
        with launch.compiling_for(capability):
            traced = jax.jit(step, donate_argnums=5).trace(*STEP)
            text = traced.lower(lowering_platforms=("cuda",)).as_text()
            # As it is lowered shard by shard.
            shapes = tuple((x.shape, x.dtype) for x in STEP)
            shardwise._lowered(kda._step, (), (("scale", 1.0),), shapes, "gpu")
        assert text.count("custom_call @triton_kernel_call") == 1
        assert "output_tuple_indices = [1], operand_index = 5" in text
        texts.add(text)
    assert len(texts) == 2


@needs_launcher
def test_what_nothing_uses_is_dropped():
    with launch.compiling_for(80):
        jaxpr = jax.make_jaxpr(functools.partial(kda._step, scale=1.0))(*STEP).jaxpr
        assert "triton_kernel_call" in str(jaxpr)
        for used in ([True, False], [False, True]):
            assert "triton_kernel_call" in str(partial_eval.dce_jaxpr(jaxpr, used)[0])
        assert "triton_kernel_call" not in str(partial_eval.dce_jaxpr(jaxpr, [False] * 2)[0])
