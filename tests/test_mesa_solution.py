"""MesaNet's conjugate gradients: half-precision inputs, and rows that do not know of each other."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from comparing import normal, uniform
from evaluator import evaluated
from jax.sharding import AxisType, PartitionSpec

import jla

T, K = 200, 32


def inputs(seed, *, spread, ridge):
    """One row and head without decay, whose keys lie near one direction."""

    def unit(x):
        return x / np.linalg.norm(x, axis=-1, keepdims=True)

    q, k, v = (normal((seed, i), 1, T, 1, K) for i in range(3))
    return dict(
        q=unit(q),
        k=unit(unit(k[:, :1]) + spread * unit(k)),
        v=v,
        g=np.zeros((1, T, 1), np.float32),
        beta=np.ones((1, T, 1), np.float32),
        lamb=ridge * (0.5 + uniform((seed, 3), 1, K)),
    )


def near(got, want, tolerance):
    got, want = np.float64(got), np.float64(want)
    assert np.linalg.norm(got - want) <= tolerance * np.linalg.norm(want)


def with_gradients(args, implementation):
    def loss(args):
        o, _ = jla.mesa_net(**args, implementation=implementation)
        return jnp.sum(jnp.sin(o.astype(jnp.float32))), o

    return jax.grad(loss, has_aux=True)(args)


@pytest.mark.parametrize(
    "dtype",
    # In either the matrix would not be positive definite; to XLA both are the same.
    [pytest.param("float16", marks=pytest.mark.slow), "bfloat16"],
)
def test_half_inputs_converge_where_a_half_state_could_not(dtype):
    args = inputs(0, spread=0.1, ridge=0.03)
    half = {n: x.astype(dtype) if n in "qkv" else x for n, x in args.items()}

    run = jax.jit(functools.partial(with_gradients, implementation="xla"))
    gradients, o = evaluated(run)(half)
    exact = {n: x.astype(jnp.float32) for n, x in half.items()}
    definition = jax.jit(functools.partial(with_gradients, implementation="reference"))
    wanted, want = evaluated(definition)(exact)
    near(o, want, 1e-2)
    for name, gradient in gradients.items():
        near(gradient, wanted[name], 2e-2)
    # The trap is there: kept in the inputs' dtype, the matrix is not positive definite.
    kk = np.zeros((K, K), dtype)
    for k in np.float32(half["k"][0, :, 0]):
        kk = (np.float32(kk) + np.outer(k, k)).astype(dtype)
    assert np.linalg.eigvalsh(np.float64(kk) + np.diag(np.float64(args["lamb"][0]))).min() < 0


def test_no_row_depends_on_how_long_another_takes():
    """To the bit, in the outputs and in the gradients."""
    easy, hard = inputs(1, spread=1.0, ridge=1.0), inputs(2, spread=1.0, ridge=1.0)
    hard["beta"] = 200 * hard["beta"]

    @jax.jit
    def both(args):
        o, pull = jax.vjp(
            lambda q: jla.mesa_net(**args | dict(q=q), implementation="xla")[0], args["q"]
        )
        return o, pull(jnp.cos(o))[0]

    def batch(second):
        pairs = {n: np.concatenate([easy[n], second[n]]) for n in easy if n != "lamb"}
        return both(pairs | dict(lamb=easy["lamb"]))

    for got, want in zip(batch(hard), batch(easy), strict=True):
        np.testing.assert_array_equal(got[0], want[0])


def test_the_loop_ends_by_itself():
    args = inputs(3, spread=1.0, ridge=1.0)

    def run(steps):
        call = jax.jit(functools.partial(jla.mesa_net, cg_steps=steps, implementation="xla"))
        return evaluated(call)(**args)[0]

    few, enough, more = map(run, (3, 30, 1000))
    np.testing.assert_array_equal(enough, more)
    assert not np.array_equal(few, enough)


def test_rows_on_two_devices():
    """Inside a shard_map over rows, which share `lamb`: its gradient is the sum over devices."""
    one, two = (inputs(seed, spread=1.0, ridge=1.0) for seed in (0, 1))
    args = jax.tree.map(lambda x, y: np.concatenate([x, y])[:, :20], one, two)
    args["lamb"] = one["lamb"]

    def both(args):
        o, vjp = jax.vjp(lambda args: jla.mesa_net(**args, implementation="xla")[0], args)
        return o, vjp(jnp.ones_like(o))[0]

    mesh = jax.make_mesh((2,), ("rows",), (AxisType.Auto,), devices=jax.devices()[:2])
    specs = dict.fromkeys(args, PartitionSpec("rows")) | dict(lamb=PartitionSpec())
    options = dict(mesh=mesh, in_specs=(specs,), out_specs=(PartitionSpec("rows"), specs))
    got = jax.jit(jax.shard_map(both, **options))(args)
    jax.tree.map(lambda x, y: near(x, y, 1e-5), got, evaluated(jax.jit(both))(args))
