"""Steps in Triton's interpreter: the definition's values and gradients, in all dtypes and sizes."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from comparing import relative_error
from evaluator import evaluated

import cases
import cases.gsa
import cases.kda
import cases.log_linear
import cases.mesa
import cases.path
import jla

pytestmark = pytest.mark.interpreted


def path_step(*, state, **args):
    return jla.path_step(cache=state, **args)


# A mechanism's step, its arguments' module, and sizes: some that no block divides, and groups.
STEPS = {
    "kda": (jla.kda_step, cases.kda),
    "gsa": (jla.gsa_step, cases.gsa),
    "log_linear": (jla.log_linear_step, cases.log_linear),
    # The definition solves exactly, so as many steps as it may take.
    "mesa": (functools.partial(jla.mesa_step, cg_steps=60), cases.mesa),
    "path": (path_step, cases.path),
}
SIZES = {
    "kda": (
        dict(B=2, H=2, HV=4, K=16, V=16),
        dict(B=1, H=1, HV=1, K=63, V=81),
        dict(B=1, H=1, HV=2, K=256, V=40),
    ),
    "gsa": (
        dict(B=2, H=2, HQ=4, K=16, V=16, M=16),
        dict(B=1, H=1, HQ=3, K=63, V=200, M=81),
        dict(B=1, H=1, HQ=1, K=250, V=16, M=256),
    ),
    "log_linear": (
        dict(B=4, H=2, HK=1, K=16, V=16),
        dict(B=1, H=1, HK=1, K=63, V=81),
        dict(B=1, H=2, HK=2, K=256, V=40),
    ),
    # Hkk in registers, and beyond K = 128 read again in each iteration.
    "mesa": (
        dict(B=2, H=2, K=16, V=24),
        dict(B=1, H=1, K=63, V=81),
        dict(B=1, H=1, K=200, V=40),
    ),
    # Two pieces of the cache; more than eight queries of a key.
    "path": (
        dict(B=2, H=2, HQ=4, K=16, V=16, S=300),
        dict(B=1, H=1, HQ=9, K=63, V=81, S=20),
        dict(B=1, H=1, HQ=3, K=250, V=40, S=40),
    ),
}
# Of outputs and of the state: one rounding of the output, and float32 arithmetic.
TOLERANCES = {"float32": (2e-6, 2e-6), "bfloat16": (3e-3, 2e-6), "float16": (4e-4, 2e-6)}


def token(name, sizes, dtype="float32", seed=0):
    """The arguments of one token, the state last."""
    normal = cases.numpy_normal(np.random.default_rng(seed))
    args = STEPS[name][1].arguments(dict(sizes) | dict(T=1), normal, jnp.dtype(dtype))
    state = args.pop("cache" if name == "path" else "initial_state")
    if name == "path":
        state = cache(sizes, normal, jnp.dtype(dtype))
    return {n: x[:, 0] if "T" in STEPS[name][1].AXES[n].split() else x for n, x in args.items()} | {
        "state": state
    }


def cache(sizes, normal, dtype):
    """PaTH's, of rows that fill it with this token, have none before, or half as many."""
    length = np.resize([sizes["S"] - 1, 0, sizes["S"] // 2], sizes["B"])
    return cases.path.cache(sizes, normal, dtype, length, lambda *shape: -np.abs(normal(*shape)))


def error(got, want):
    """The largest relative error of a state's arrays."""
    return max(map(relative_error, jax.tree.leaves(got), jax.tree.leaves(want)))


def cast(args):
    """In float32, but for positions."""
    return jax.tree.map(lambda x: x if x.dtype == np.int32 else x.astype(np.float32), args)


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
    assert error(state, want_state) < TOLERANCES[dtype][1]


@pytest.mark.parametrize("name", STEPS)
def test_what_is_given_stays(name):
    """Updated in place, but not the caller's array."""
    args, (step, _) = token(name, SIZES[name][0]), STEPS[name]
    given = jax.tree.map(jnp.asarray, args["state"])
    step(**args | dict(state=given), implementation="triton")
    jax.tree.map(np.testing.assert_array_equal, given, args["state"])


@pytest.mark.parametrize("name", STEPS)
def test_vmap_jit_and_gradients(name):
    args = [token(name, SIZES[name][0], seed=seed) for seed in range(2)]
    args = jax.tree.map(lambda *x: np.stack(x), *args)

    def loss(args, implementation):
        o, state = jax.vmap(functools.partial(STEPS[name][0], implementation=implementation))(
            **args
        )
        return jnp.sum(jnp.sin(o)) + sum(jnp.sum(jnp.cos(x)) for x in jax.tree.leaves(state))

    got, want = (
        evaluated(
            jax.jit(jax.value_and_grad(functools.partial(loss, implementation=x), allow_int=True))
        )(args)
        for x in ("triton", "reference")
    )
    for x, y in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
        assert x.dtype == jax.dtypes.float0 or relative_error(x, y) < 5e-6


@pytest.mark.parametrize("name", STEPS)
def test_inside_shard_map(name):
    args, (step, _) = token(name, SIZES[name][0]), STEPS[name]
    run = functools.partial(step, implementation="triton")
    mesh, spec = jax.sharding.Mesh(jax.devices()[:2], ("data",)), jax.P("data")
    specs = {n: jax.P() if n == "lamb" else spec for n in args}  # which has no batch axis
    mapped = jax.shard_map(lambda args: run(**args), mesh=mesh, in_specs=(specs,), out_specs=spec)
    assert error(jax.jit(mapped)(args), run(**args)) < 1e-6


@pytest.mark.parametrize("key_dtype", ["float32", "bfloat16"])
def test_path_from_a_lazy_cache(key_dtype):
    """A row whose keys move on with this token, an empty one, and one of both kinds of keys."""
    args = token("path", dict(B=3, H=1, HQ=2, K=16, V=16, S=192), "bfloat16")
    state = args["state"]._replace(length=np.array([127, 0, 96], np.int32))
    lazy = jax.tree.map(jnp.asarray, state).lazy(key_dtype)
    lazy = lazy._replace(change=lazy.change.at[2].set(0.1))
    o, after = path_step(**args | dict(state=lazy), implementation="triton")
    want, want_after = path_step(**args | dict(state=lazy.settled()), implementation="reference")
    assert relative_error(o, want) < 5e-3
    rounding = 2e-6 if key_dtype == "float32" else 4e-3
    assert after.key.dtype == key_dtype and error(after.settled(), want_after) < rounding
