"""The table of log-linear attention's Triton kernels."""

from kernels import Kernel


def _log_linear():
    """Both roles: at K = V = 128, and with segments and several blocks of each dimension."""
    parameters = dict(
        sums="*x *x *fp32 i32 i32 *x",
        outputs="*x *x *x *fp32 *x *i32 i32 i32 *x",
        gradients="*x *x *x *x *fp32 *x *i32 i32 i32 i32 *x *fp32",
    )
    # Without wgmma: several blocks of K, and float32's operands, each as two. At K = V = 128 the
    # gradients' kernel has two programs on a multiprocessor, and a little too few registers.
    spills = dict(gradients=300, sums_float32=32, outputs_float32=40, gradients_float32=600)
    for name, types in parameters.items():
        for dtype, config in (("bf16", name), ("fp32", f"{name}_float32")):
            for reverse, sizes in ((False, dict(K=128, V=128)), (True, dict(K=256, V=200))):
                constants = dict(REVERSE=reverse, H=1, HV=16, P=14, **sizes)
                if name != "sums":
                    constants["SKIP"] = reverse
                most = spills.get(config, 0)
                if config == "gradients" and not reverse:
                    most = 48
                yield Kernel(
                    f"log_linear_chunks.log_linear_{name}",
                    types,
                    constants,
                    dtypes=(dtype,),
                    config=f"log_linear_{config}",
                    spills=dict.fromkeys((80, 89, 100, 120), most)
                    | {90: 8 if config == "gradients" else 0},
                    smoke=89 if config == "outputs" and not reverse else None,
                )


KERNELS = (
    *_log_linear(),
    *(
        Kernel(
            "log_linear_step.log_linear_step",
            "*x *x *x *fp32 *fp32 *fp32 *i32 *x *fp32",
            dict(H=1, HV=16, L=14, K=128, V=128, LAZY=lazy, BK=128),
            registers=168,
        )
        for lazy in (False, True)
    ),
    Kernel(
        "log_linear_step.log_linear_step_on_pool",
        "*x *x *x *fp32 *fp32 *fp32 *i32 *i32 i32 *x *fp32",
        dict(H=1, HV=16, L=14, K=128, V=128, LAZY=True, BK=128),
        config="log_linear_step",
        registers=168,
    ),
)
