"""What kernels are wrapped in, around a plain function: no kernel runs on several CPU devices."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from jla.pallas.shardwise import shardwise

SPEC = PartitionSpec("x", None, "y")
KEYS, VALUES = "B T H K", "B T HV K"


def product(q, v):
    return (v * jnp.repeat(q, v.shape[2] // q.shape[2], axis=2),)


wrapped = shardwise(product, (KEYS, VALUES), (VALUES,))


def run(q, v):
    return wrapped(jnp.sin(q), v)[0]


def want(q, v):
    return np.asarray(v) * np.repeat(np.sin(q), 2, axis=2)


@pytest.fixture
def arrays():
    q, v = jax.random.split(jax.random.key(0))
    return jax.random.normal(q, (4, 3, 2, 5)), jax.random.normal(v, (4, 3, 4, 5))


def mesh():
    return jax.make_mesh((2, 2), ("x", "y"), (AxisType.Auto,) * 2, devices=jax.devices("cpu")[:4])


def test_runs_shard_by_shard_under_jit(arrays):
    placed = jax.device_put(arrays, NamedSharding(mesh(), SPEC))
    compiled = jax.jit(run).lower(*placed).compile()
    text = compiled.as_text()
    assert not any(word in text for word in ("all-gather", "all-to-all", "collective-permute"))
    out = compiled(*placed)
    assert out.sharding.is_equivalent_to(placed[1].sharding, out.ndim)
    np.testing.assert_allclose(out, want(*arrays), rtol=1e-6)


def test_a_group_of_one_key_head(arrays):
    """Shardy refuses a factor of one in `(h group)`: rows alone are split."""
    arrays = arrays[0][:, :, :1], arrays[1][:, :, :2]
    placed = jax.device_put(arrays, NamedSharding(mesh(), PartitionSpec("x")))
    compiled = jax.jit(run).lower(*placed).compile()
    assert "all-gather" not in compiled.as_text()
    np.testing.assert_allclose(compiled(*placed), want(*arrays), rtol=1e-6)


def test_several_calls_are_lowered_once(arrays):
    """The layers of a model, each with a partial of its own."""
    traced = []

    def scaled(q, v, *, factor):
        traced.append(factor)
        return (factor * product(q, v)[0],)

    def layers(q, v):
        for factor in (2.0, 3.0, 2.0, 3.0, 2.0):
            run = functools.partial(scaled, factor=factor)
            (v,) = shardwise(run, (KEYS, VALUES), (VALUES,))(q, v)
        return v

    q, v = arrays
    placed = jax.device_put(arrays, NamedSharding(mesh(), SPEC))
    # Once to know the shapes of each call's results, and once for each factor.
    out = jax.jit(layers)(*placed)
    assert len(traced) == 5 + 2
    np.testing.assert_allclose(out, 72.0 * np.repeat(q, 2, axis=2) ** 5 * v, rtol=1e-5)


def test_runs_inside_shard_map(arrays):
    sharded = jax.shard_map(run, mesh=mesh(), in_specs=(SPEC, SPEC), out_specs=SPEC)
    np.testing.assert_allclose(jax.jit(sharded)(*arrays), want(*arrays), rtol=1e-6)


def test_folds_vmap_into_the_batch(arrays):
    q, v = arrays
    out = jax.jit(jax.vmap(run, in_axes=(None, 0)))(q, jnp.stack([v, 2 * v]))
    np.testing.assert_allclose(out, np.stack([want(q, v), want(q, 2 * v)]), rtol=1e-6)
