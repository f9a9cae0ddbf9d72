"""The table of KDA's Triton kernels."""

from kernels import Kernel

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
