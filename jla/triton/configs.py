"""How each kernel is cut and compiled, by how much shared memory a thread block can have.

Static: nothing is tuned at run time, so that the same inputs give the same bits on every machine of
a kind. tests/triton/test_compile.py compiles every entry and holds it to its class's memory.
"""

import dataclasses
from collections.abc import Mapping


@dataclasses.dataclass(frozen=True)
class Config:
    """Settings of one kernel.

    blocks: the sizes of its blocks, constants of the kernel by name.
    warps: of a program, 32 threads each.
    stages: how many loads of a loop are on their way at once.
    """

    blocks: Mapping[str, int] = dataclasses.field(hash=False)
    warps: int = 4
    stages: int = 2


# The classes, by the KB that a thread block can have: compute capability 8.6, 8.9 and 12.x; 8.0;
# 9.0 and 10.x. A GPU that is not known gets the smallest.
CLASSES = (99, 163, 227)
_CLASS_OF = {80: 163, 87: 163, 90: 227, 100: 227, 101: 227, 103: 227, 110: 227}


def memory_class(capability):
    """The class, one of `CLASSES`, of a compute capability as Triton writes it (89 for 8.9)."""
    return _CLASS_OF.get(capability, 99)


def config(kernel_name, capability):
    """The `Config` of a kernel on GPUs of this compute capability."""
    return CONFIGS[kernel_name][memory_class(capability)]


def _everywhere(blocks, **settings):
    """The same for all classes: a kernel that needs little shared memory."""
    return dict.fromkeys(CLASSES, Config(blocks, **settings))


def _path(block, inner, *, warps=8, stages=1, **more):
    """Of PaTH's attention: a program has `block` tokens and reads `inner` at a time."""
    return Config({"BLOCK": block, "BI": inner, **more}, warps=warps, stages=stages)


# A kernel's name to its config by class.
CONFIGS: dict[str, dict[int, Config]] = {
    # Up to K = 128; beyond, half as many columns. A thread then has 64 elements of the state, and
    # 130 registers in all, so that several programs are on a multiprocessor.
    "kda_step": _everywhere({"BV": 64}, warps=4, stages=1),
    **{
        f"path_{name}{kind}": _everywhere({"BK": 64}, warps=4, stages=stages)
        for name, stages in {
            "inverses": 1,
            "leaf_keys": 1,
            "leaf_queries": 1,
            "joined": 2,
            "transform_gradients": 2,
        }.items()
        for kind in ("", "_256")
    },
    # Three TF32 products take three times the registers for operands.
    **{
        f"path_{name}{kind}": _everywhere({"BK": 32}, warps=8, stages=1)
        for name in ("inverses", "leaf_keys", "leaf_queries", "joined", "transform_gradients")
        for kind in ("_float32", "_256_float32")
    },
    **{
        f"path_chains{kind}": _everywhere({"BK": 32}, warps=warps, stages=stages)
        for kind, warps, stages in (
            ("", 4, 2),
            ("_256", 4, 2),
            ("_float32", 8, 1),
            ("_256_float32", 8, 1),
        )
    },
    # One leaf's rows are those of one warpgroup; elsewhere eight warps would compute them twice.
    **{
        f"path_leaf_{name}_gradients{kind}": _everywhere({"BK": 32, **more}, warps=4, stages=1)
        | {227: Config({"BK": 64, **more}, warps=8, stages=1)}
        for name, more in {"query": {"BV": 32}, "transform": {}, "key": {}}.items()
        for kind in ("", "_256")
    },
    **{
        f"path_leaf_{name}_gradients{kind}": _everywhere({"BK": 32, **more}, warps=8, stages=1)
        for name, more in {"query": {"BV": 32}, "transform": {}, "key": {}}.items()
        for kind in ("_float32", "_256_float32")
    },
    # Two leaves at a time where registers and memory allow.
    "path_forward": dict.fromkeys(CLASSES, _path(128, 32, stages=3))
    | {227: _path(128, 64, stages=3)},
    "path_query_gradients": dict.fromkeys(CLASSES, _path(128, 32, stages=2, BH=32))
    | {227: _path(128, 64, stages=2, BH=32)},
    "path_key_gradients": dict.fromkeys(CLASSES, _path(128, 32, stages=2, BH=32))
    | {227: _path(128, 64, stages=2, BH=32)},
    "path_forward_float32": dict.fromkeys(CLASSES, _path(32, 32, warps=4)),
    "path_forward_256": dict.fromkeys(CLASSES, _path(64, 32)),
    "path_forward_256_float32": dict.fromkeys(CLASSES, _path(32, 16)),
    **{
        f"path_{name}_gradients{kind}": dict.fromkeys(CLASSES, _path(*blocks, warps=n, BH=16))
        for name in ("query", "key")
        for kind, blocks, n in (
            ("_float32", (32, 16), 4),
            ("_256", (32, 32), 8),
            ("_256_float32", (16, 16), 4),
        )
    },
    "path_step": _everywhere({}, warps=4, stages=1),
}
