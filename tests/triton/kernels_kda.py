"""The table of KDA's Triton kernels."""

from kernels import CAPABILITIES, Kernel

from jla.triton import configs

_SIZES = dict(WHOLE=False, HV=8, K=128, V=128)
_WIDE = dict(WHOLE=True, HV=8, K=256, V=256)


def _of_kda(path, parameters, constants, *, states=False, like=None, **settings):
    """A kernel of KDA's for 16-bit inputs and for float32, of which g ("*g") depends.

    states: whether it holds states, and has other configs for keys wider than 128, and for few
      heads. settings: of 16-bit inputs.
    """
    name = path.partition(".")[2]
    for dtype, of_decays, suffix in (("bf16", "*fp16", ""), ("fp32", "*fp32", "_float32")):
        types = parameters.replace("*g", of_decays)
        for sizes, width in ((_SIZES, ""), (_WIDE, "_wide"), (_SIZES, "_few"))[
            : 3 if states else 1
        ]:
            if width == "_few" and suffix:
                continue
            seen = _SPILLS.get(name + suffix + width, 0)
            chosen = dict(spills=dict.fromkeys(CAPABILITIES, seen))
            if not (suffix or width):
                chosen |= settings
            config = (like or name) + suffix + width
            config = config if config in configs.CONFIGS else (like or name) + suffix
            named = {x: y for x, y in sizes.items() if x in constants} | {
                x: y for x, y in constants.items() if y is not None
            }
            yield Kernel(path, types, named, (dtype,), config=config, **chosen)


# The most bytes that were seen to spill, by config (or what would be its name), for any GPU, with
# triton 3.6.0 and 3.9.0. A thread of the widest state keeps 64 of its float32 there.
_SPILLS = {
    "kda_scores": 424,
    "kda_recurrence": 168,
    "kda_recurrence_wide": 168,
    "kda_gradient_recurrence": 16,
    "kda_gradient_recurrence_wide": 8,
    "kda_gradient_transitions": 80,
    "kda_gradient_transitions_wide": 24,
    "kda_query_gradients": 24,
    "kda_key_gradients": 336,
    "kda_scores_float32": 408,
    "kda_recurrence_float32": 32,
    "kda_recurrence_float32_wide": 272,
    "kda_gradient_recurrence_float32": 104,
    "kda_gradient_recurrence_float32_wide": 152,
    "kda_transitions_float32_wide": 32,
    "kda_gradient_transitions_float32": 120,
    "kda_gradient_transitions_float32_wide": 144,
    "kda_errors_float32": 264,
    "kda_score_gradients_float32": 184,
    "kda_query_gradients_float32": 408,
    "kda_key_gradients_float32": 1424,
}


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
    Kernel(
        "kda_step.kda_step_on_pool",
        "*x *x *x *fp32 *fp32 *fp32 *i32 i32 *x *fp32",
        dict(scale=0.1, H=4, HV=8, K=128, V=128, BK=128),
        config="kda_step",
        registers=168,
        smoke=89,
    ),
    *_of_kda(
        "kda_forward.kda_scores",
        "*x *x *x *g *fp32 *fp16 i32 *x *x *x *x",
        dict(WHOLE=None, H=4, HV=None, K=None, V=None, SCALE=0.1),
        smoke=80,
    ),
    *_of_kda(
        "kda_forward.kda_operands",
        "*x *x *g *x *fp16 i32 *x *x *x *fp32",
        dict(WHOLE=None, H=4, HV=None, K=None, SCALE=0.1),
    ),
    *_of_kda(
        "kda_forward.kda_recurrence",
        "*x *x *x *x *x *fp32 *fp32 *fp32 *fp32 i32 *x *fp32 *x",
        dict(WHOLE=None, HV=None, K=None, V=None, KEEP=True, P=0),
        states=True,
        smoke=89,
    ),
    *_of_kda(
        "kda_backward.kda_gradient_recurrence",
        "*x *x *x *x *x *fp32 *fp32 *fp32 *fp32 i32 *x *fp32",
        dict(WHOLE=None, HV=None, K=None, V=None, P=0),
        states=True,
    ),
    *_of_kda(
        "kda_forward.kda_transitions",
        "*x *x *x *fp32 *fp32 i32 *fp32 *fp32",
        dict(WHOLE=None, HV=None, K=None, V=None),
        states=True,
        like="kda_recurrence",
        smoke=90,
    ),
    *_of_kda(
        "kda_backward.kda_gradient_transitions",
        "*x *x *x *x *x *fp32 *fp32 *fp32 i32 *fp32 *fp32",
        dict(WHOLE=None, HV=None, K=None, V=None),
        states=True,
        like="kda_recurrence",
    ),
    *_of_kda(
        "kda_backward.kda_errors",
        "*x *x *x *x *x *x *x *x *x *fp32 i32 *x *x *fp32",
        dict(WHOLE=None, HV=None, K=None, V=None),
    ),
    *_of_kda(
        "kda_backward.kda_score_gradients",
        "*x *x *x i32 *x *x",
        dict(WHOLE=None, HV=None, V=None, SCALE=0.1),
    ),
    *_of_kda(
        "kda_backward.kda_query_gradients",
        "*x *x *g *x *x *x *fp16 *bf16 i32 *x *fp32",
        dict(WHOLE=None, H=4, HV=None, K=None, V=None, SCALE=0.1),
    ),
    *_of_kda(
        "kda_backward.kda_key_gradients",
        "*x *x *g *x *x *x *x *x *x *fp16 *bf16 *fp32 i32 *x *fp32",
        dict(WHOLE=None, H=4, HV=None, K=None, V=None),
        smoke=120,
    ),
)
