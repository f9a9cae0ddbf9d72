"""The table of PaTH's Triton kernels."""

from kernels import CAPABILITIES, Kernel

# Of PaTH's kernels, the most bytes that a thread spills on any GPU; the attention's backward pass
# has 128 float32 sums a thread, and three TF32 products three parts of every operand.
_PATH_SPILLS = {
    "path_key_gradients": 640,
    "path_query_gradients": 96,
    "path_leaf_transform_gradients": 256,
    "path_leaf_key_gradients": 704,
    "path_key_gradients_256": 64,
    "path_query_gradients_256": 64,
    "path_leaf_transform_gradients_256": 288,
    "path_leaf_key_gradients_256": 704,
    "path_leaf_query_gradients_256": 8,
    "path_leaf_key_gradients_float32": 3500,
    "path_leaf_key_gradients_256_float32": 3500,
}
_PATH_FLOAT32_SPILLS = 1024


def _path(sizes, suffix="", smoke=None):
    """PaTH's kernels for these heads and features, with gates; the tree between them is of float16
    for 16-bit inputs."""
    heads = {n: sizes[n] for n in ("HQ", "H", "K")}
    keys = {n: sizes[n] for n in ("H", "K")}
    both = dict(**sizes, GATES=True)
    for dtype, kept, precision in (("bf16", "fp16", "tf32"), ("fp32", "fp32", "tf32x3")):
        name = suffix + ("" if dtype == "bf16" else "_float32")
        leaf = dict(**heads, SCALE=0.1, PRECISION=precision)
        tree = "*y *y *x *x *fp32 *fp32 *fp32 *y"
        rows = {
            "path_leaves.path_inverses": ("*y *fp32 i32 *y", keys),
            "path_leaves.path_leaf_keys": ("*x *y *fp32 *y i32 i32 i32 *y *y *y *y", keys),
            "path_leaves.path_leaf_queries": (
                "*x *x *y *fp32 *y *y i32 i32 *y *y *fp32",
                dict(**heads, SCALE=0.1, GATES=True),
            ),
            "path_leaves.path_joined": ("*y i32 i32 i32 *y", dict(K=sizes["K"])),
            "path_leaves.path_chains": (
                "*y *y i32 i32 i32 i32 *y",
                dict(**keys, HEADS=sizes["HQ"], KEYS=False),
            ),
            "path_forward.path_forward": (
                "*y *y *x *y *fp32 *fp32 *fp32 i32 i32 i32 i32 *x *fp32",
                both,
            ),
            "path_backward.path_key_gradients": (
                f"{tree} *y *fp32 *fp32 *fp32 i32 i32 i32 i32 i32 *y *fp32 *x *fp32",
                both,
            ),
            "path_backward.path_query_gradients": (
                f"{tree} *fp32 *fp32 i32 i32 i32 i32 i32 *y *fp32 *fp32",
                both,
            ),
            "path_backward.path_transform_gradients": (
                "*y *y *fp32 *y *y *fp32 *y *fp32 i32 i32 i32 i32 i32 *fp32",
                dict(**heads, PARENTS=True, PRECISION=precision),
            ),
            "path_leaf_gradients.path_leaf_query_gradients": (
                "*x *x *y *x *x *y *fp32 *fp32 *fp32 *fp32 *y *y *y *fp32 i32 i32 "
                "*fp32 *fp32 *fp32 *x *fp32",
                dict(**leaf, V=sizes["V"], GATES=True),
            ),
            "path_leaf_gradients.path_leaf_transform_gradients": (
                "*x *y *fp32 *y *y *y *fp32 *fp32 *fp32 *y *fp32 *y *fp32 *fp32 i32 i32 i32 "
                "*fp32 *fp32 *fp32",
                dict(**leaf, TRANSFORMS=True),
            ),
            "path_leaf_gradients.path_leaf_key_gradients": (
                "*x *x *y *fp32 *y *fp32 *fp32 *fp32 *fp32 *y *fp32 *fp32 i32 i32 *x *fp32 *fp32",
                leaf,
            ),
        }
        for path, (parameters, constants) in rows.items():
            config = path.rpartition(".")[2] + name
            most = _PATH_SPILLS.get(config, 0 if dtype == "bf16" else _PATH_FLOAT32_SPILLS)
            yield Kernel(
                path,
                parameters.replace("*y", f"*{kept}"),
                constants,
                dtypes=(dtype,),
                config=config,
                spills=dict.fromkeys(CAPABILITIES, most),
                smoke=smoke if dtype == "bf16" and "forward" in path else None,
            )


KERNELS = (
    *_path(dict(H=2, HQ=4, K=128, V=128), smoke=89),
    *_path(dict(H=2, HQ=2, K=256, V=256), "_256"),
    Kernel(
        "path_step.path_step",
        "*x *x *fp32 *fp32 *fp32 *x *i32 *fp32 i32 *fp32 *fp32 *fp32 *fp32",
        dict(
            SCALE=0.1,
            HQ=4,
            H=2,
            K=128,
            V=128,
            GROUP=2,
            FIRST=0,
            PIECE=256,
            BG=2,
            BK=128,
            BV=128,
            BS=16,
            MOVED=False,
            GATES=True,
        ),
        smoke=89,
    ),
    Kernel(
        "path_step.path_step_on_pool",
        "*x *x *fp32 *fp32 *fp32 *x *i32 *fp32 i32 *i32 i32 *fp32 *fp32 *fp32 *fp32",
        dict(
            SCALE=0.1,
            HQ=4,
            H=2,
            K=128,
            V=128,
            GROUP=2,
            FIRST=0,
            PIECE=256,
            BG=2,
            BK=128,
            BV=128,
            BS=16,
            MOVED=False,
            GATES=True,
        ),
        config="path_step",
    ),
)
