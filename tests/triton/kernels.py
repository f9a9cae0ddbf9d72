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


def _log_linear():
    """Both roles: at K = V = 128, and with segments and several blocks of each dimension."""
    parameters = dict(
        sums="*x *x *fp32 i32 i32 *x",
        outputs="*x *x *x *fp32 *x *i32 i32 i32 *x",
        gradients="*x *x *x *x *fp32 *x *i32 i32 i32 i32 *x *fp32",
    )
    # Without wgmma: several blocks of K, and float32's operands, each as two.
    spills = dict(gradients=300, sums_float32=32, outputs_float32=16, gradients_float32=600)
    for name, types in parameters.items():
        for dtype, config in (("bf16", name), ("fp32", f"{name}_float32")):
            for reverse, sizes in ((False, dict(K=128, V=128)), (True, dict(K=256, V=200))):
                constants = dict(REVERSE=reverse, H=1, HV=16, P=14, **sizes)
                if name != "sums":
                    constants["SKIP"] = reverse
                most = spills.get(config, 0) if reverse or dtype == "fp32" else 0
                yield Kernel(
                    f"log_linear_chunks.log_linear_{name}",
                    types,
                    constants,
                    dtypes=(dtype,),
                    config=f"log_linear_{config}",
                    spills=dict.fromkeys((80, 89, 100, 120), most),
                    smoke=89 if config == "outputs" and not reverse else None,
                )


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
    *_log_linear(),
    Kernel(
        "log_linear_step.log_linear_step",
        "*x *x *x *fp32 *fp32 *fp32 *i32 *x *fp32",
        dict(H=1, HV=16, L=14, K=128, V=128, BK=128),
        registers=168,
    ),
)
