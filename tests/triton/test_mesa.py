"""MesaNet's Triton kernels in Triton's interpreter, beside what the contract's suite shows."""

import contextlib

import pytest
import test_mesa_ridge

pytestmark = pytest.mark.interpreted


@pytest.mark.parametrize("step", [False, True], ids=["run", "step"])
def test_a_ridge_that_is_not_positive(step):
    test_mesa_ridge.test_outputs_and_gradients_are_nan("triton", contextlib.nullcontext, step)
