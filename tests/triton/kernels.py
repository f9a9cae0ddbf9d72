"""The table of Triton kernels: what test_compile.py compiles. A new kernel is a row here."""

import dataclasses
import importlib
from collections.abc import Mapping

from jla.triton import configs

# A GPU of each family of instructions.
CAPABILITIES = (80, 89, 90, 100, 120)


@dataclasses.dataclass(frozen=True)
class Kernel:
    """A kernel as it is compiled, and what it may take.

    path: its module in `jla.triton.kernels`, and its name; `config`: its name in
      `jla.triton.configs`.
    parameters: the Triton types of its inputs and outputs in order, "*fp32" a pointer and "i32" a
      number; "*x" stands for each of `dtypes` in turn.
    constants: its constants, besides the config's blocks.
    registers: the most a thread may use. A thread has 255; fewer let more programs run at once.
    spills: the most bytes a thread may keep in local memory. By capability, 0 where none is named:
      what spills is slow, and a table entry says that it was looked at.
    smoke: the capability that `make test` compiles it for, in the first dtype; None for none.
      `make test-all` compiles all. A row takes one to several seconds: name a few of a mechanism.
    """

    path: str
    parameters: str
    constants: Mapping[str, object]
    dtypes: tuple[str, ...] = ("bf16", "fp32")
    config: str = ""
    registers: int = 255
    spills: Mapping[int, int] = dataclasses.field(default_factory=dict)
    smoke: int | None = None

    @property
    def name(self):
        return self.config or self.path.rpartition(".")[2]

    @property
    def function(self):
        module, _, name = self.path.rpartition(".")
        return getattr(importlib.import_module(f"jla.triton.kernels.{module}"), name)

    def settings(self, capability):
        return configs.config(self.name, capability)


KERNELS = (
    Kernel(
        "kda_step.kda_step",
        "*x *x *x *fp32 *fp32 *fp32 *x *fp32",
        dict(scale=0.1, H=4, HV=8, K=128, V=128, BK=128),
        registers=168,
        smoke=89,
    ),
    Kernel(
        "kda_step.kda_step",
        "*x *x *x *fp32 *fp32 *fp32 *x *fp32",
        dict(scale=0.1, H=4, HV=8, K=200, V=40, BK=256, BV=32),
        registers=168,
    ),
)
