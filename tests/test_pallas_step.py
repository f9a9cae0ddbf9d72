"""The step of KDA as a kernel: values and races in the interpreter, lowering, derivatives."""

import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from comparing import normal, relative_error

import jla
import jla.pallas
from jla.pallas.kda import kda_step
from jla.reference import kda as reference

f32, bf16, f16 = jnp.float32, jnp.bfloat16, jnp.float16


def arguments(B=2, H=2, HV=2, K=32, V=64, dtype=f32):
    q, k = (normal(i, B, H, K) * K**-0.5 for i in range(2))
    v = normal(2, B, HV, V)
    g = -jax.nn.softplus(normal(3, B, HV, K))
    beta = jax.nn.sigmoid(normal(4, B, HV))
    state = normal(5, B, HV, K, V)
    q, k, v, beta = (x.astype(dtype) for x in (q, k, v, beta))
    return q, k, v, g, beta, state


def pallas(*args):
    with jla.pallas.interpret():
        return jla.kda_step(*args, implementation="pallas")


@pytest.mark.parametrize(
    "sizes",
    [
        dict(dtype=f32),
        dict(dtype=bf16),
        dict(dtype=f16),
        dict(H=2, HV=4, V=128),  # two value heads a key head, two tiles a state
        dict(B=1, H=1, HV=1, K=16, V=16),
        dict(B=1, H=1, HV=1, K=48, V=80),
        dict(B=1, H=1, HV=1, K=256, V=64),
    ],
    ids=str,
)
def test_is_the_reference(sizes):
    args = arguments(**sizes)
    o, state = pallas(*args)
    want_o, want_state = jla.kda_step(*args, implementation="reference")
    assert o.dtype == args[2].dtype and state.dtype == f32
    # In 16 bits both round the same float32 sum, up to its last bits.
    assert relative_error(o, want_o) < (2e-6 if o.dtype == f32 else 1e-3)
    assert relative_error(state, want_state) < 2e-6


def test_strong_decays_and_float32_beta():
    q, k, v, _, beta, state = arguments(dtype=bf16)
    g = jnp.full(state.shape[:3], -30.0).at[0].set(-1e4).at[1, 0].set(0.0)
    args = (q, k, v, g, 2 * beta.astype(f32), state)
    for got, want in zip(pallas(*args), reference.kda_step(*args, scale=32**-0.5), strict=True):
        assert relative_error(got.astype(f32), want.astype(f32)) < 1e-3


def test_leaves_a_state_that_is_not_donated():
    args = arguments()
    before = np.array(args[-1])
    _, state = pallas(*args)
    np.testing.assert_array_equal(args[-1], before)
    assert np.any(np.asarray(state) != before)


@pytest.mark.parametrize(
    "B, H, HV, K, V", [(128, 16, 16, 128, 128), (2, 1, 2, 48, 80), (1, 2, 2, 256, 256)]
)
@pytest.mark.parametrize("dtype", [f32, bf16, f16])
def test_lowers_for_cuda_in_place(B, H, HV, K, V, dtype):
    shapes = jax.eval_shape(functools.partial(arguments, B, H, HV, K, V, dtype))
    step = jax.jit(functools.partial(kda_step, scale=1.0), donate_argnames="state")
    text = step.trace(*shapes).lower(lowering_platforms=("cuda",)).as_text()
    # The program's sixth argument is its second result ...
    assert re.search(r"%arg5: tensor<[^>]*> \{[^}]*tf.aliasing_output = 1", text)
    # ... and in the program the only kernel's sixth operand is its second result.
    calls = [line for line in text.splitlines() if "@mosaic_gpu" in line]
    (call,) = calls
    alias = re.search(r"output_tuple_indices = \[(\d)\], operand_index = (\d)", call)
    assert alias.groups() == ("1", "5")


@pytest.mark.parametrize("K, V", [(24, 32), (32, 40)])
def test_refuses_other_sizes(K, V):
    args = arguments(K=K, V=V)
    with pytest.raises(
        NotImplementedError, match=rf"K={K} and V={V}.*multiples of 16.*\"xla\" can"
    ):
        pallas(*args)


def test_derivatives_are_the_reference():
    args = arguments(B=1, H=1, K=16, V=16)
    tangents = jax.tree.map(jnp.cos, args)

    def loss(step, *args):
        o, state = step(*args, scale=0.5)
        return jnp.sum(jnp.sin(o)) + jnp.sum(jnp.cos(state))

    every = tuple(range(6))
    want = jax.grad(functools.partial(loss, reference.kda_step), every)(*args)
    _, want_tangents = jax.jvp(functools.partial(reference.kda_step, scale=0.5), args, tangents)
    with jla.pallas.interpret():
        got = jax.jit(jax.grad(functools.partial(loss, kda_step), every))(*args)
        _, got_tangents = jax.jvp(functools.partial(kda_step, scale=0.5), args, tangents)
    for x, y in zip((*got, *got_tangents), (*want, *want_tangents), strict=True):
        assert relative_error(x, y) < 5e-6


def test_vmap():
    args = [x[:, None] for x in arguments(B=3, H=1, HV=1, K=16, V=32)]
    want = jax.vmap(functools.partial(reference.kda_step, scale=1.0))(*args)
    with jla.pallas.interpret():
        got = jax.jit(jax.vmap(functools.partial(kda_step, scale=1.0)))(*args)
    for x, y in zip(got, want, strict=True):
        assert x.shape == y.shape and relative_error(x, y) < 2e-6


def test_chained_steps():
    q, k, v, g, beta, state = arguments(B=1, H=1, HV=1, K=16, V=32)

    def run(step):
        def token(state, factor):
            o, state = step(factor * q, k, v, g, beta, state, scale=1.0)
            return state, o

        return jax.lax.scan(token, state, jnp.array([1.0, 2.0, 3.0]))

    want = run(reference.kda_step)
    with jla.pallas.interpret():
        got = run(kda_step)
    for x, y in zip(got, want, strict=True):
        assert relative_error(x, y) < 2e-6


def test_inside_shard_map():
    """Over two devices; values there have types that Pallas's refs refuse."""
    args = arguments(B=2, H=1, HV=1, K=16, V=16)
    mesh = jax.sharding.Mesh(jax.devices()[:2], ("data",))
    spec = jax.P("data")
    step = functools.partial(kda_step, scale=1.0)
    sharded = jax.jit(jax.shard_map(step, mesh=mesh, in_specs=spec, out_specs=spec))
    assert sharded.trace(*args).lower(lowering_platforms=("cuda",)).as_text().count("@mosaic_gpu")
    # With two devices at work the interpreter at times takes a thread's own read and write for a
    # race: it keeps one clock for both.
    with jla.pallas.interpret(detect_races=False):
        got = sharded(*args)
        gradient = jax.jit(jax.grad(lambda state: sharded(*args[:5], state)[1].sum()))(args[5])
    for x, y in zip(got, reference.kda_step(*args, scale=1.0), strict=True):
        assert relative_error(x, y) < 2e-6
    want = jax.grad(lambda state: reference.kda_step(*args[:5], state, scale=1.0)[1].sum())(args[5])
    assert relative_error(gradient, want) < 5e-6
