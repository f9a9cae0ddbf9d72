"""The table of GSA's Triton kernels."""

from kernels import CAPABILITIES, Kernel

# GSA's sizes: those of the benchmarks; and such as no tile divides, with groups of queries.
_GSA_SIZES = {
    "": dict(HQ=16, H=16, D=128, M=64),
    "_masked": dict(HQ=16, H=8, D=200, M=100),
}
# The most of all GPUs, with triton 3.6.0 and 3.9.0, by kernel, dtype and sizes. `gsa_gradients` has
# up to four float32 tiles of 32 registers a thread, beside what makes the next one.
_GSA_SPILLS = {
    "gsa_gradients": 408,
    "gsa_gradients_masked": 920,
    "gsa_gradients_float32": 1872,
    "gsa_gradients_float32_masked": 1872,
    "gsa_outputs_masked": 48,
    "gsa_outputs_float32": 32,
    "gsa_outputs_float32_masked": 72,
    "gsa_read": 32,
    "gsa_read_masked": 272,
    "gsa_read_float32": 24,
    "gsa_read_float32_masked": 88,
    "gsa_states_float32_masked": 56,
}


def _of_gsa(path, parameters, smoke=None, **constants):
    """A kernel of GSA's, for 16-bit inputs and for float32: "*x" is their dtype, and as inputs or
    between kernels that of operands."""
    for dtype, suffix in (("bf16", ""), ("fp32", "_float32")):
        for label, sizes in _GSA_SIZES.items():
            config = path.partition(".")[2] + suffix
            yield Kernel(
                path,
                parameters,
                sizes | constants | dict(FLOAT32=dtype == "fp32"),
                dtypes=(dtype,),
                config=config,
                spills=dict.fromkeys(CAPABILITIES, _GSA_SPILLS.get(config + label, 0)),
                smoke=smoke if not (suffix or label) else None,
            )


KERNELS = (
    Kernel(
        "gsa_step.gsa_step",
        "*x *x *x *x *fp32 *fp32 *fp32 *x *fp32 *fp32",
        dict(scale=0.1, HQ=16, H=16, K=128, V=128, M=64, BM=64, BG=1, BK=128, BV=128),
    ),
    Kernel(
        "gsa_step.gsa_step",
        "*x *x *x *x *fp32 *fp32 *fp32 *x *fp32 *fp32",
        dict(scale=0.1, HQ=12, H=4, K=200, V=40, M=81, BM=128, BG=4, BK=64, BV=64),
    ),
    Kernel(
        "gsa_step.gsa_step_on_pool",
        "*x *x *x *x *fp32 *fp32 *fp32 *i32 i32 *x *fp32 *fp32",
        dict(scale=0.1, HQ=16, H=16, K=128, V=128, M=64, BM=64, BG=1, BK=128, BV=128),
        config="gsa_step",
    ),
    Kernel(
        "gsa_forward.gsa_sums", "*fp32 i32 *i32 *fp32", dict(H=16, M=64), dtypes=("fp32",), smoke=89
    ),
    Kernel("gsa_forward.gsa_sums", "*fp32 i32 *i32 *fp32", dict(H=8, M=100), dtypes=("fp32",)),
    *(
        row
        for spans, constants in (
            ("*fp32", dict(P=0, START=True, KEEP=True, REVERSE=True)),
            ("*fp32", dict(P=0, START=False, KEEP=True, REVERSE=False)),
            ("*i32", dict(P=4, START=False, KEEP=False, REVERSE=True)),  # first passes
            ("*i32", dict(P=4, START=False, KEEP=False, REVERSE=False)),
        )
        for row in _of_gsa(
            "gsa_forward.gsa_states",
            f"*x *x *x *x *i32 *fp32 *fp32 *fp32 {spans} i32 *x *x *fp32 *fp32",
            **dict(KEYS=1, VALUES=1),
            **constants,
        )
    ),
    *_of_gsa(
        "gsa_forward.gsa_read",
        "*x *x *x *i32 *x *x i32 *x",
        **dict(scale=0.1, FINISH=True, GRADIENT=False),
        smoke=89,
    ),
    *_of_gsa(
        "gsa_forward.gsa_read",
        "*x *x *x *i32 *x *x i32 *x",
        **dict(scale=0.1, FINISH=True, GRADIENT=True),
    ),
    *_of_gsa(
        "gsa_forward.gsa_read",
        "*x *x *x *i32 *x *x i32 *fp32",
        **dict(scale=0.1, FINISH=False, GRADIENT=False),
    ),
    *_of_gsa("gsa_forward.gsa_outputs", "*x *x *x *i32 *x i32 *x"),
    *_of_gsa(
        "gsa_backward.gsa_gradients",
        "*x *x *x *x *i32 *x *x *fp32 *fp32 i32 *x *x *fp32 *fp32",
        **dict(ROWS=True, ADD=True),
    ),
)
