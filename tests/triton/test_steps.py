"""Steps in Triton's interpreter: the definition's values and gradients, in all dtypes and sizes."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from comparing import relative_error

import cases
import cases.kda
import jla

pytestmark = pytest.mark.interpreted

# A mechanism's step, its arguments' module, and sizes: some that no block divides, and groups.
STEPS = {"kda": (jla.kda_step, cases.kda)}
SIZES = {
    "kda": (
        dict(B=2, H=2, HV=4, K=16, V=16),
        dict(B=1, H=1, HV=1, K=63, V=81),
        dict(B=1, H=1, HV=2, K=256, V=40),
    ),
}
# Of outputs and of the state: one rounding of the output, and float32 arithmetic.
TOLERANCES = {"float32": (2e-6, 2e-6), "bfloat16": (3e-3, 2e-6), "float16": (4e-4, 2e-6)}


def token(name, sizes, dtype="float32", seed=0):
    """The arguments of one token, the state last."""
    normal = cases.numpy_normal(np.random.default_rng(seed))
    args = STEPS[name][1].arguments(dict(sizes) | dict(T=1), normal, jnp.dtype(dtype))
    state = args.pop("initial_state")
    return {n: x[:, 0] if "T" in STEPS[name][1].AXES[n].split() else x for n, x in args.items()} | {
        "state": state
    }


def cast(args):
    return jax.tree.map(lambda x: x.astype(np.float32), args)


def each():
    for name, sizes in SIZES.items():
        for i, one in enumerate(sizes):
            yield pytest.param(name, one, id=f"{name}-{i}")


@pytest.mark.parametrize("dtype", TOLERANCES)
@pytest.mark.parametrize("name, sizes", list(each()))
def test_it_is_the_definition(name, sizes, dtype):
    args, (step, _) = token(name, sizes, dtype), STEPS[name]
    o, state = step(**args, implementation="triton")
    want, want_state = step(**cast(args), implementation="reference")
    assert o.dtype == dtype
    assert relative_error(o, want) < TOLERANCES[dtype][0]
    assert relative_error(state, want_state) < TOLERANCES[dtype][1]


@pytest.mark.parametrize("name", STEPS)
def test_what_is_given_stays(name):
    """Updated in place, but not the caller's array."""
    args, (step, _) = token(name, SIZES[name][0]), STEPS[name]
    given = jnp.asarray(args["state"])
    step(**args | dict(state=given), implementation="triton")
    np.testing.assert_array_equal(given, args["state"])


@pytest.mark.parametrize("name", STEPS)
def test_vmap_jit_and_gradients(name):
    args = [token(name, SIZES[name][0], seed=seed) for seed in range(2)]
    args = jax.tree.map(lambda *x: np.stack(x), *args)

    def loss(args, implementation):
        o, state = jax.vmap(functools.partial(STEPS[name][0], implementation=implementation))(
            **args
        )
        return jnp.sum(jnp.sin(o)) + jnp.sum(jnp.cos(state))

    both = jax.jit(jax.value_and_grad(loss), static_argnums=1)
    got, want = both(args, "triton"), both(args, "reference")
    for x, y in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
        assert relative_error(x, y) < 5e-6


@pytest.mark.parametrize("name", STEPS)
def test_inside_shard_map(name):
    args, (step, _) = token(name, SIZES[name][0]), STEPS[name]
    run = functools.partial(step, implementation="triton")
    mesh, spec = jax.sharding.Mesh(jax.devices()[:2], ("data",)), jax.P("data")
    mapped = jax.shard_map(lambda args: run(**args), mesh=mesh, in_specs=spec, out_specs=spec)
    for x, y in zip(jax.jit(mapped)(args), run(**args), strict=True):
        assert relative_error(x, y) < 1e-6
