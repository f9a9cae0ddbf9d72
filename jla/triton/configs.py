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


def _smaller(blocks, **settings):
    """For all classes but the largest."""
    return dict.fromkeys(CLASSES[:-1], Config(blocks, **settings))


def _path(block, inner, *, warps=8, stages=1, **more):
    """Of PaTH's attention: a program has `block` tokens and reads `inner` at a time."""
    return Config({"BLOCK": block, "BI": inner, **more}, warps=warps, stages=stages)


# A kernel's name to its config by class.
CONFIGS: dict[str, dict[int, Config]] = {
    # Up to K = 128; beyond, half as many columns. A thread then has 64 elements of the state, and
    # 130 registers in all, so that several programs are on a multiprocessor.
    "kda_step": _everywhere({"BV": 64}, warps=4, stages=1),
    # KDA's products of a tile with a mask or a square keep, with four warps on 64 x 64, 32 float32
    # of each tile in a thread, with eight on 32 features by 64 tokens eight.
    "kda_scores": _everywhere({"BK": 64, "BV": 64}),
    "kda_operands": _everywhere({"BK": 64}),
    "kda_recurrence": {
        99: Config({"BV": 64}),
        163: Config({"BV": 64}),
        227: Config({"BV": 128}, warps=8),
    },
    "kda_gradient_recurrence": {
        99: Config({"BV": 64}),
        163: Config({"BV": 64}),
        227: Config({"BV": 128}, warps=8),
    },
    "kda_errors": {
        99: Config({"BK": 64, "BV": 32}),
        163: Config({"BK": 64, "BV": 32}),
        227: Config({"BK": 64, "BV": 64}),
    },
    "kda_score_gradients": _everywhere({"BV": 64}),
    "kda_query_gradients": _everywhere({"BK": 32, "BV": 64}),
    "kda_key_gradients": _everywhere({"BK": 32, "BV": 64}),
    # Few heads have more programs for each, and these take less time for a chunk.
    "kda_recurrence_few": _everywhere({"BV": 16}),
    "kda_gradient_recurrence_few": _everywhere({"BV": 16}),
    # Of keys wider than 128 a program holds fewer columns of the state.
    "kda_recurrence_wide": {
        99: Config({"BV": 32}, stages=1),
        163: Config({"BV": 32}),
        227: Config({"BV": 32}),
    },
    "kda_gradient_recurrence_wide": {
        99: Config({"BV": 32}, stages=1),
        163: Config({"BV": 32}),
        227: Config({"BV": 32}),
    },
    # float32: three products for each. The largest class has what took the least time on an H200,
    # though it spills; eight warps, which do not, took longer. Others have what spills least.
    "kda_scores_float32": _smaller({"BK": 16, "BV": 32})
    | {227: Config({"BK": 32, "BV": 32}, stages=1)},
    "kda_operands_float32": _smaller({"BK": 32}) | {227: Config({"BK": 64})},
    **{
        f"kda_{name}_float32": {
            99: Config({"BV": 32}, warps=8, stages=1),
            163: Config({"BV": 32}, warps=8),
            227: Config({"BV": 32}, warps=8),
        }
        for name in ("recurrence", "gradient_recurrence")
    },
    "kda_recurrence_float32_wide": _everywhere({"BV": 16}, warps=8, stages=1),
    "kda_gradient_recurrence_float32_wide": _everywhere({"BV": 16}, warps=8, stages=1),
    "kda_errors_float32": _smaller({"BK": 32, "BV": 32}) | {227: Config({"BK": 32, "BV": 64})},
    "kda_score_gradients_float32": _everywhere({"BV": 32}),
    "kda_query_gradients_float32": _smaller({"BK": 16, "BV": 64})
    | {227: Config({"BK": 32, "BV": 32})},
    "kda_key_gradients_float32": _smaller({"BK": 16, "BV": 64})
    | {227: Config({"BK": 32, "BV": 32})},
    "gsa_sums": _everywhere({"BM": 32}, warps=4, stages=1),
    "gsa_states": _everywhere({"BD": 64, "BM": 64}, warps=4, stages=2),
    "gsa_states_float32": _everywhere({"BD": 32, "BM": 64}, warps=4, stages=1),
    "gsa_read": _everywhere({"BD": 64, "BM": 64}, warps=4, stages=1),
    "gsa_read_float32": _everywhere({"BD": 32, "BM": 32}, warps=4, stages=1),
    "gsa_outputs": _everywhere({"BD": 64, "BM": 64}, warps=4, stages=1),
    "gsa_outputs_float32": _everywhere({"BD": 32, "BM": 32}, warps=4, stages=1),
    "gsa_gradients": _everywhere({"BD": 64, "BM": 64}, warps=4, stages=1),
    "gsa_gradients_float32": _everywhere({"BD": 32, "BM": 32}, warps=4, stages=1),
    "gsa_step": _everywhere({}, warps=4, stages=1),
    "mesa_states": _everywhere({"BC": 64}, warps=4, stages=2),
    "mesa_states_float32": _everywhere({"BC": 16}, warps=4, stages=2),
    # 72 KB of shared memory: one program on a multiprocessor of the smallest class, which so has
    # more warps; two or three on others.
    "mesa_solve": {
        99: Config({"ROWS": 32, "BI": 32}, warps=8, stages=2),
        163: Config({"ROWS": 32, "BI": 32}, warps=4, stages=2),
        227: Config({"ROWS": 32, "BI": 32}, warps=4, stages=2),
    },
    # At K = 256; twice as many rows at most at K = 128.
    "mesa_solve_wide": _everywhere({"ROWS": 16, "BI": 32}, warps=8, stages=2),
    "mesa_solve_wide_float32": _everywhere({"ROWS": 16, "BI": 16}, warps=8, stages=2),
    "mesa_read": _everywhere({"BC": 128, "BI": 64}, warps=4, stages=2),
    "mesa_read_float32": _everywhere({"BC": 32, "BI": 32}, warps=4, stages=2),
    "mesa_gradients": _everywhere({"BC": 128, "BI": 32}, warps=8, stages=2),
    "mesa_gradients_float32": _everywhere({"BC": 32, "BI": 16}, warps=8, stages=1),
    "mesa_step": _everywhere({"BI": 32, "BV": 64}, warps=8, stages=1),
    # Two or three programs of four warps on a multiprocessor are faster than one of eight. At
    # K = V = 128 the gradients have one block: tokens and states are then read once.
    "log_linear_gradients": _everywhere({"BK": 128, "BV": 128}, warps=4, stages=2),
    "log_linear_gradients_float32": _everywhere({"BK": 32, "BV": 32}, warps=8, stages=2),
    "log_linear_outputs": _everywhere({"BK": 128, "BV": 64}, warps=4, stages=3),
    "log_linear_outputs_float32": _everywhere({"BK": 32, "BV": 32}, warps=4, stages=2),
    "log_linear_step": _everywhere({"BV": 32}, warps=4, stages=1),
    "log_linear_sums": _everywhere({"BK": 64, "BV": 128}, warps=4, stages=2),
    "log_linear_sums_float32": _everywhere({"BK": 64, "BV": 32}, warps=4, stages=2),
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
