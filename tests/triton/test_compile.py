"""Every kernel compiles for every kind of GPU, and fits.

That it compiles says little: Triton also compiles what needs more shared memory than there is (the
launch fails), more tensor memory (the kernel is one trap) or more registers (it is slow).
"""

import importlib
import pathlib
import re
import subprocess

import pytest
from kernels import CAPABILITIES

from jla.triton import configs

# Not of "triton" itself: this folder has the name.
pytest.importorskip("triton.compiler", reason="triton is not installed")
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

# A kernel joins by a row in its mechanism's table, a mechanism by a file.
TABLES = sorted(path.stem for path in pathlib.Path(__file__).parent.glob("kernels_*.py"))
KERNELS = [row for table in TABLES for row in importlib.import_module(table).KERNELS]

CUOBJDUMP = pathlib.Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"


def source(function, types, constants):
    """A kernel with parameters of these types, and its constants by name."""
    names = [x.name for x in function.params]
    assert set(names[len(types) :]) == set(constants)
    signature = dict(zip(names, types, strict=False)) | dict.fromkeys(constants, "constexpr")
    # JAX's arrays begin at multiples of 16 bytes.
    aligned = {(i,): [["tt.divisibility", 16]] for i, x in enumerate(types) if x[0] == "*"}
    constants = {(names.index(n),): x for n, x in constants.items()}
    return ASTSource(function, signature, constants, aligned)


def compiled(kernel, dtype, capability):
    """A kernel of the table, compiled as `jla.triton.launch` has it compiled."""
    settings = kernel.settings(capability)
    types = kernel.parameters.replace("*x", f"*{dtype}").split()
    made = source(kernel.function, types, {**settings.blocks, **kernel.constants})
    options = dict(num_warps=settings.warps, num_stages=settings.stages, enable_fp_fusion=True)
    return triton.compile(made, target=GPUTarget("cuda", capability, 32), options=options)


def usage(cubin, folder):
    """The registers and the bytes of local memory of a thread."""
    path = folder / "kernel.cubin"
    path.write_bytes(cubin)
    command = [str(CUOBJDUMP), "-res-usage", str(path)]
    text = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    found = {name: int(n) for name, n in re.findall(r"\b(REG|STACK|LOCAL):(\d+)", text)}
    return found["REG"], found["STACK"] + found["LOCAL"]


def loops(code):
    """How many loops have an end that is no constant (others may be unrolled).

    Triton 3.6 has removed one: what a loop carries, and nothing but an inner loop's end reads, it
    takes for unused, and for what it was at first.
    """
    constants = set(re.findall(r"(%[\w.]+) = arith\.constant", code))
    return sum(x not in constants for x in re.findall(r"scf\.for .* to (%[\w.]+)", code))


def rows():
    for i, kernel in enumerate(KERNELS):
        for dtype in kernel.dtypes:
            for capability in CAPABILITIES:
                first = dtype == kernel.dtypes[0] and capability == kernel.smoke
                marks = [] if first else [pytest.mark.slow]
                label = f"{kernel.name}-{i}-{dtype}-sm_{capability}"
                yield pytest.param(kernel, dtype, capability, id=label, marks=marks)


@pytest.mark.parametrize("kernel, dtype, capability", list(rows()))
def test_it_fits(kernel, dtype, capability, tmp_path):
    made = compiled(kernel, dtype, capability)
    registers, spills = usage(made.asm["cubin"], tmp_path)
    shared = made.metadata.shared
    print(f"registers {registers}, spilled {spills} bytes, shared memory {shared} bytes")
    assert shared <= 1024 * configs.memory_class(capability)
    assert made.metadata.tmem_size <= 512  # columns; jax-triton refuses more
    assert registers <= kernel.registers
    assert spills <= kernel.spills.get(capability, 0)
    assert loops(made.asm["ttgir"]) == loops(made.asm["ttir"])


def test_every_kernel_is_in_the_table():
    """And has a config for every class."""
    assert {kernel.name for kernel in KERNELS} == set(configs.CONFIGS)
    assert all(set(by_class) == set(configs.CLASSES) for by_class in configs.CONFIGS.values())


def test_docstrings_say_what_a_kernel_takes():
    """Its floor or time, registers and shared memory. A pool's step refers to the other one."""
    for path in {kernel.path for kernel in KERNELS if not kernel.path.endswith("_on_pool")}:
        module, _, name = path.rpartition(".")
        module = importlib.import_module(f"jla.triton.kernels.{module}")
        says = " ".join(getattr(module, name).fn.__doc__.split())
        for item in (r"[Ff]loor| ms\b", r"registers", r"\bKB\b"):
            assert re.search(item, says), f"{path}: its docstring has no {item}"
