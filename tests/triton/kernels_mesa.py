"""The table of MesaNet's Triton kernels."""

import re

from kernels import Kernel


def _mesa(path, config, parameters, *, spills=None, float32_spills=None, smoke=None, **constants):
    """A kernel of MesaNet for 16-bit inputs, and for float32, where all arrays are float32."""
    constants = dict(C=64) | constants
    float32 = re.sub(r"\*(?!i32)\w+", "*fp32", parameters)
    return (
        Kernel(
            path,
            parameters,
            constants | dict(PRECISION="tf32"),
            dtypes=("bf16",),
            config=config,
            spills=spills or {},
            smoke=smoke,
        ),
        Kernel(
            path,
            float32,
            constants | dict(PRECISION="tf32x3"),
            dtypes=("fp32",),
            config=config + "_float32",
            spills=float32_spills or {},
        ),
    )


KERNELS = (
    *_mesa(
        "mesa_states.states_kernel",
        "mesa_states",
        "*fp16 *fp16 *x *fp32 *fp32 *fp32 *fp32 *fp32 *fp32 i32 i32 i32 *fp16 *fp32 *x *fp32 *fp32",
        spills={80: 120, 89: 112, 100: 64, 120: 192},
        float32_spills={80: 32, 89: 32, 90: 40, 120: 80},
        **dict(K=128, V=128, P=0, BK=128, KEEP=True, REVERSE=False),
    ),
    *_mesa(
        "mesa_states.states_kernel",
        "mesa_states",
        "*fp16 *fp16 *x *fp32 *fp32 *fp32 *fp32 *fp32 *fp32 i32 i32 i32 *x *fp32 *x *fp32 *fp32",
        spills={80: 120, 89: 112, 120: 120},
        float32_spills={80: 32, 89: 32, 90: 24, 120: 72},
        **dict(K=128, V=128, P=0, BK=128, KEEP=True, REVERSE=True),
    ),
    *_mesa(  # First passes; what spills is the most of triton 3.6.0 and 3.9.0.
        "mesa_states.states_kernel",
        "mesa_states",
        "*fp16 *fp16 *x *fp32 *fp32 *fp32 *fp32 *fp32 *i32 i32 i32 i32 *fp16 *fp32 *x *fp32 *fp32",
        spills={80: 32, 89: 32, 120: 32},
        float32_spills={90: 16, 120: 96},
        **dict(K=128, V=128, P=4, BK=128, KEEP=False, REVERSE=False),
    ),
    *_mesa(
        "mesa_states.states_kernel",
        "mesa_states",
        "*fp16 *fp16 *x *fp32 *fp32 *fp32 *fp32 *fp32 *i32 i32 i32 i32 *x *fp32 *x *fp32 *fp32",
        spills={80: 24, 89: 24, 100: 8, 120: 24},
        float32_spills={90: 16, 120: 96},
        **dict(K=128, V=128, P=4, BK=128, KEEP=False, REVERSE=True),
    ),
    _mesa(
        "mesa_solve.solve_kernel",
        "mesa_solve",
        "*x *fp32 *fp16 *fp32 *fp32 *fp16 *fp32 i32 i32 i32 i32 *fp16 *fp32 *fp16",
        smoke=89,
        **dict(K=128, BK=128, ROWS=32, WHOLE=True, SCALED=True, TOLERANCE=5e-4),
    )[0],
    *_mesa(
        "mesa_solve.solve_kernel",
        "mesa_solve_wide",
        "*x *fp32 *fp16 *fp32 *fp32 *fp16 *fp32 i32 i32 i32 i32 *fp16 *fp32 *fp16",
        **dict(K=256, BK=256, ROWS=16, WHOLE=False, SCALED=True, TOLERANCE=5e-4),
    ),
    _mesa(
        "mesa_solve.solve_kernel",
        "mesa_solve_wide",
        "*x *fp32 *fp16 *fp32 *fp32 *fp16 *fp32 i32 i32 i32 i32 *fp16 *fp32 *fp16",
        **dict(K=128, BK=128, ROWS=32, WHOLE=False, SCALED=True, TOLERANCE=1e-6),
    )[1],
    *_mesa(
        "mesa_read.read_kernel",
        "mesa_read",
        "*fp16 *fp32 *fp16 *x *fp32 *fp32 *x i32 i32 i32 *x",
        float32_spills={80: 80, 89: 72, 120: 120},
        **dict(D=128, E=128, TURNED=False),
    ),
    *_mesa(
        "mesa_read.read_kernel",
        "mesa_read",
        "*x *fp32 *x *fp16 *fp32 *fp32 *x i32 i32 i32 *fp32",
        float32_spills={80: 64, 89: 56, 120: 88},
        **dict(D=128, E=128, TURNED=True),
    ),
    *_mesa(
        "mesa_gradients.gradients_kernel",
        "mesa_gradients",
        "*fp16 *x *x *fp16 *fp32 *fp16 *fp32 *fp32 *fp32 *fp32 *fp16 *fp32 *x *x *x i32 i32 i32"
        " *x *x *fp32 *fp32 *fp32 *fp32 *fp32 *fp32 *fp32",
        spills={80: 32, 89: 40, 90: 96, 120: 152},
        float32_spills={80: 96, 89: 96, 120: 128},
        **dict(K=128, V=128),
    ),
    Kernel(
        "mesa_step.mesa_step",
        "*x *x *x *fp32 *fp32 *fp32 *fp32 *fp32 i32 *x *fp32 *fp32 *fp32",
        dict(K=128, V=128, BK=128, WHOLE=True, TOLERANCE=1e-4),
        registers=200,
        spills={80: 16},
        smoke=89,
    ),
    Kernel(
        "mesa_step.mesa_step",
        "*x *x *x *fp32 *fp32 *fp32 *fp32 *fp32 i32 *x *fp32 *fp32 *fp32",
        dict(K=256, V=128, BK=256, BV=32, WHOLE=False, TOLERANCE=1e-4),
        registers=128,
    ),
    Kernel(
        "mesa_step.mesa_step_on_pool",
        "*x *x *x *fp32 *fp32 *fp32 *fp32 *fp32 i32 *i32 i32 *x *fp32 *fp32 *fp32",
        dict(H=16, K=128, V=128, BK=128, WHOLE=True, TOLERANCE=1e-4),
        config="mesa_step",
        registers=200,
        spills={80: 16, 90: 8},
    ),
)
