"""Triton's kernels as they are compiled for other GPUs, at full size on this one."""

import pytest
from harness import assert_agrees, assert_same_bits, definition, inputs, value_and_vjp
from mechanisms import GRID

pytestmark = pytest.mark.gpu


def rows():
    for row in GRID:
        if row.id.endswith("triton-full"):
            for capability in (80, 89):  # an A100, an RTX 40
                name = f"as sm_{capability}-{row.values[0].name}"
                yield pytest.param(*row.values, capability, id=name)


@pytest.mark.parametrize("mechanism, implementation, sizes, capability", list(rows()))
def test_as_for_another_gpu(mechanism, implementation, sizes, capability):
    """Values and gradients, and the same bits twice."""
    launch = pytest.importorskip("jla.triton.launch", reason="triton is not installed")
    dtype = "bfloat16"
    args, cotangents = inputs(mechanism, sizes, dtype)
    with launch.compiling_for(capability):  # which drops all programs before and after
        got = value_and_vjp(mechanism, implementation, args, cotangents)
        again = value_and_vjp(mechanism, implementation, args, cotangents)
    assert_same_bits(got, again)
    assert_agrees(mechanism, dtype, got, definition(mechanism, args, cotangents))
