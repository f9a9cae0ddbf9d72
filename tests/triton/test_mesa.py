"""MesaNet's Triton kernels in Triton's interpreter, beside what the contract's suite shows."""

import contextlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import test_mesa_ridge
from comparing import relative_error

import cases
import cases.mesa
import jla

pytestmark = pytest.mark.interpreted

# Of outputs and of states: one rounding of the output, what the iterations leave, and float32.
TOLERANCES = {"float32": (5e-6, 2e-6), "bfloat16": (3e-3, 2e-6), "float16": (5e-4, 2e-6)}


@pytest.mark.parametrize("dtype", TOLERANCES)
@pytest.mark.parametrize("K, V", [(16, 24), (63, 81), (200, 40)])
def test_the_step_is_the_definition(K, V, dtype):
    """Hkk in registers, and beyond K = 128 read again in each iteration."""
    sizes = dict(B=2, T=1, H=2, K=K, V=V)
    args = cases.mesa.arguments(sizes, cases.numpy_normal(np.random.default_rng(0)), dtype)
    state = args.pop("initial_state")
    args = {name: x if name == "lamb" else x[:, 0] for name, x in args.items()}
    got = jla.mesa_step(**args, state=state, cg_steps=60, implementation="triton")
    args = jax.tree.map(lambda x: x.astype(np.float32), args)
    want = jla.mesa_step(**args, state=state, implementation="reference")
    assert got[0].dtype == jnp.dtype(dtype)
    for i, (x, y) in enumerate(zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True)):
        assert relative_error(x, y) < TOLERANCES[dtype][i > 0]


@pytest.mark.parametrize("step", [False, True], ids=["run", "step"])
def test_a_ridge_that_is_not_positive(step):
    test_mesa_ridge.test_outputs_and_gradients_are_nan("triton", contextlib.nullcontext, step)
