"""Triton's kernels on a GPU, as compiled for it, and as for an A100 (8.0) and an RTX 40 (8.9).

The contract's tests have them at full size as they are compiled for this GPU; here is what is left.
"""

import contextlib
import functools

import jax
import numpy as np
import pytest
from comparing import relative_error
from test_steps import SIZES, STEPS, TOLERANCES, cast, error, token

# Not of "triton" itself: this folder has the name.
pytest.importorskip("triton.compiler", reason="triton is not installed")
from jla.triton import launch

pytestmark = pytest.mark.gpu

FULL = {
    "kda": dict(B=8, H=8, HV=16, K=128, V=128),
    "gsa": dict(B=8, H=16, HQ=16, K=128, V=128, M=64),
    "log_linear": dict(B=8, H=16, HK=1, K=128, V=128),
    "mesa": dict(B=8, H=16, K=128, V=128),
    "path": dict(B=8, H=16, HQ=16, K=128, V=128, S=1024),
}


@pytest.fixture(params=[None, 80, 89], ids=["native", "as sm_80", "as sm_89"])
def target(request):
    with launch.compiling_for(request.param) if request.param else contextlib.nullcontext():
        yield


def steps():
    for name in STEPS:
        for i, sizes in enumerate((*SIZES[name], FULL[name])):
            yield pytest.param(name, sizes, id=f"{name}-{i}")


@pytest.mark.parametrize("dtype", TOLERANCES)
@pytest.mark.parametrize("name, sizes", list(steps()))
def test_a_step_is_the_definition(name, sizes, dtype, target):
    """And gives the same bits twice."""
    args, (step, _) = token(name, sizes, dtype), STEPS[name]
    run = jax.jit(functools.partial(step, implementation="triton"))
    o, state = run(**args)
    want, want_state = step(**cast(args), implementation="reference")
    assert relative_error(o, want) < TOLERANCES[dtype][0]
    assert error(state, want_state) < TOLERANCES[dtype][1]
    jax.tree.map(np.testing.assert_array_equal, run(**args), (o, state))


@pytest.mark.parametrize("name", STEPS)
def test_a_donated_state_is_updated_in_place(name, target):
    args, (step, _) = token(name, FULL[name]), STEPS[name]
    state = jax.tree.map(jax.numpy.array, args.pop("state"))
    places = [x.unsafe_buffer_pointer() for x in jax.tree.leaves(state)]
    want = step(**args, state=state, implementation="reference")

    @functools.partial(jax.jit, donate_argnums=0)
    def run(state, args):
        return step(**args, state=state, implementation="triton")

    compiled = run.lower(state, args).compile()
    whole = sum(x.nbytes for x in jax.tree.leaves(state))
    assert compiled.memory_analysis().temp_size_in_bytes < whole / 64  # no copy
    o, state = compiled(state, args)
    assert [x.unsafe_buffer_pointer() for x in jax.tree.leaves(state)] == places
    assert relative_error(o, want[0]) < TOLERANCES["float32"][0]
    assert error(state, want[1]) < TOLERANCES["float32"][1]
