"""`launch.call` with numbers, a state, and a block of the config that the call changes."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from test_launch import needs_launcher

# Not of "triton" itself: this folder has the name.
pytest.importorskip("triton.compiler", reason="triton is not installed")
from sample import accumulated

from jla.triton import launch

f32 = jnp.float32


def arguments(dtype=jnp.bfloat16):
    random = np.random.default_rng(0)
    x = random.standard_normal(70, np.float32).astype(dtype)
    return x, random.standard_normal(70, np.float32)


def check(run):
    x, state = arguments()
    o, new = run(70, x, -1.5, state)
    assert o.dtype == x.dtype
    np.testing.assert_array_equal(o, state.astype(x.dtype))
    np.testing.assert_allclose(new, state - 1.5 * x.astype(np.float32), rtol=1e-6)
    # One is a number like others, and what lies behind is not touched.
    new = run(1, x, 1.0, state)[1]
    np.testing.assert_array_equal(new[:1], state[:1] + x[:1].astype(np.float32))
    np.testing.assert_array_equal(new[1:], state[1:])


@pytest.mark.interpreted
def test_interpreted():
    check(accumulated)
    check(jax.jit(accumulated, static_argnums=(0, 2)))


@pytest.mark.interpreted
def test_bfloat16_is_rounded_to_the_nearest():
    """Which the interpreter by itself does not do."""
    state = np.float32([1.0 + 2.0**-8 + 2.0**-20, -1.0 - 2.0**-9, np.inf, np.nan, 3e-39, 0.0])
    o, _ = accumulated(6, np.zeros(6, jnp.bfloat16), 0.0, state)
    np.testing.assert_array_equal(o.astype(f32), state.astype(jnp.bfloat16).astype(f32))


@pytest.mark.gpu
def test_on_a_gpu():
    check(accumulated)
    check(jax.jit(accumulated, static_argnums=(0, 2)))


@needs_launcher
def test_lowered():
    """The number of the operand that is updated does not count numbers; and one kernel serves all
    numbers."""
    x, state = arguments()
    with launch.compiling_for(80):
        for n in (70, 60, 1):
            run = jax.jit(accumulated, static_argnums=(0, 2))
            text = run.trace(n, x, 0.5, state).lower(lowering_platforms=("cuda",)).as_text()
            assert "output_tuple_indices = [1], operand_index = 1," in text
