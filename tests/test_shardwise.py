"""What kernels are wrapped in, around a plain function: no kernel runs on several CPU devices."""

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from comparing import normal
from evaluator import evaluated
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from jla._core.shardwise import shardwise

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
    return normal(0, 4, 3, 2, 5), normal(1, 4, 3, 4, 5)


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


def of_values(q, v):
    """As KDA: no result has key heads."""
    return product(q, v)[0]


def of_values_backward(q, v, do):
    group = v.shape[2] // q.shape[2]
    return do * v, do * jnp.repeat(q, group, axis=2)


def of_queries(k, q):
    """As GSA: a state of each key head."""
    return product(k, q)[0], k.sum(1)


def of_queries_backward(k, q, do, dstate):
    dk = (do * q).reshape(*k.shape[:3], -1, k.shape[3]).sum(3)
    return dk + dstate[:, None], do * jnp.repeat(k, q.shape[2] // k.shape[2], axis=2)


@jax.custom_vjp
def sharded_of_values(q, v):
    return shardwise(lambda *x: (of_values(*x),), (KEYS, VALUES), (VALUES,))(q, v)[0]


def backward(inputs, do):
    q, v = inputs
    run = shardwise(of_values_backward, (KEYS, VALUES, VALUES), (VALUES, VALUES))
    dq, dv = run(q, v, do)
    return dq.reshape(*q.shape[:3], -1, q.shape[3]).sum(3), dv


sharded_of_values.defvjp(lambda *x: (sharded_of_values(*x), x), backward)
QUERIES, STATE = "B T HQ K", "B H K"


@jax.custom_vjp
def sharded_of_queries(k, q):
    return shardwise(of_queries, (KEYS, QUERIES), (QUERIES, STATE))(k, q)


def backward(inputs, cotangents):
    axes = KEYS, QUERIES, QUERIES, STATE
    return shardwise(of_queries_backward, axes, (KEYS, QUERIES))(*inputs, *cotangents)


sharded_of_queries.defvjp(lambda *x: (sharded_of_queries(*x), x), backward)
FUNCTIONS = {"HV": (sharded_of_values, of_values), "HQ": (sharded_of_queries, of_queries)}


def with_gradients(function):
    def run(keys, others):
        out, pull = jax.vjp(function, jnp.sin(keys), jnp.cos(others))
        return out, pull(jax.tree.map(lambda x: jnp.cos(3 * x), out))

    return run


@functools.cache
def plain_of(kind):
    return evaluated(jax.jit(with_gradients(FUNCTIONS[kind][1])))


P = PartitionSpec
# Of key heads, and of the others: alike; on one side; two axes on one; the same axis for rows and
# for heads; time and features.
PLACEMENTS = [
    (P("x"), P("x", None, "y")),
    (P("x", None, "y"), P("x", None, "y")),
    (P(), P(None, None, ("y", "x"))),
    (P(None, None, "y"), P()),
    (P("y"), P(None, None, "y")),
    (P(("x", "y")), P(None, None, "x")),
    (P(None, "x"), P(None, "y", "x")),
    (P(None, None, None, "x"), P("y", None, "x")),
]
# The number of key heads, and of the others for each.
GROUPINGS = [(1, 1), (1, 2), (1, 4), (2, 1), (2, 2), (3, 4), (4, 2)]


def cases():
    """Every grouping; in functions with results of key heads, too, those whose sums differ: one key
    head that devices share, and heads of which each device has several."""
    for kind in FUNCTIONS:
        for heads in GROUPINGS:
            slow = kind == "HQ" and heads not in ((1, 2), (3, 4), (4, 2))
            marks = [pytest.mark.slow] if slow else []
            yield pytest.param(kind, heads, (2, 2), id=f"{kind}-{heads}-(2, 2)", marks=marks)
        # Four devices for two key heads: Shardy splits an axis of the mesh in two.
        yield pytest.param(kind, (2, 2), (1, 4), id=f"{kind}-(2, 2)-(1, 4)")


@pytest.mark.parametrize("kind, heads, shape", list(cases()))
def test_values_for_every_placement(kind, heads, shape):
    sharded, plain = with_gradients(FUNCTIONS[kind][0]), plain_of(kind)
    devices = mesh().devices.reshape(shape)
    split = functools.partial(NamedSharding, jax.sharding.Mesh(devices, ("x", "y")))
    keys = normal(0, 4, 2, heads[0], 4)
    others = normal(1, 4, 2, heads[0] * heads[1], 4)

    sizes = dict(zip(("x", "y"), shape, strict=True))

    def fits(placement):
        """Whether JAX places both: all parts have to be equal."""
        dimensions = [
            (size, name if isinstance(name, tuple) else (name,))
            for x, spec in zip((keys, others), placement, strict=True)
            for size, name in zip(x.shape, spec, strict=False)
        ]
        return not any(size % math.prod(sizes.get(n, 1) for n in part) for size, part in dimensions)

    places = [tuple(map(split, placement)) for placement in PLACEMENTS if fits(placement)]
    run = jax.jit(lambda pairs: [sharded(*pair) for pair in pairs], in_shardings=(places,))
    want = plain(keys, others)
    for got in run([(keys, others)] * len(places)):
        jax.tree.map(functools.partial(np.testing.assert_allclose, rtol=1e-5, atol=1e-6), got, want)


@pytest.mark.parametrize("heads", [(1, 2), (2, 2), (2, 4)], ids=str)
def test_nothing_is_gathered(heads):
    """Neither where key heads are split nor where one is on all devices."""
    keys = jnp.ones((4, 2, heads[0], 4))
    others = jnp.ones((4, 2, heads[0] * heads[1], 4))
    axes = ["x", None, "y"]
    specs = P(*(axes if heads[0] > 1 else axes[:1])), P(*axes)
    placed = [
        jax.device_put(x, NamedSharding(mesh(), spec))
        for x, spec in zip((keys, others), specs, strict=True)
    ]
    text = jax.jit(with_gradients(sharded_of_values)).lower(*placed).compile().as_text()
    assert not any(word in text for word in ("all-gather", "all-to-all", "collective-permute"))


@pytest.mark.parametrize("kinds", ["Auto Auto", "Explicit Explicit", "Auto Explicit"])
@pytest.mark.parametrize("manual", ["", "x", "y", "x y"])
def test_values_inside_shard_map_and_by_type(manual, kinds):
    """Inside a shard_map over none, some or all axes of a mesh, the others of either kind."""
    sharded, plain = with_gradients(FUNCTIONS["HV"][0]), plain_of("HV")
    kinds = tuple(getattr(AxisType, kind) for kind in kinds.split())
    whole = jax.make_mesh((2, 2), ("x", "y"), kinds, devices=mesh().devices.ravel())
    spec = P("x", None, "y")
    keys = normal(0, 4, 2, 2, 4)
    others = normal(1, 4, 2, 4, 4)
    run = sharded
    if manual:
        inside = P(*(name if name in manual.split() else None for name in spec))
        specs = dict(in_specs=(inside, inside), out_specs=(inside, (inside, inside)))
        run = jax.shard_map(sharded, mesh=whole, axis_names=set(manual.split()), **specs)
    with jax.set_mesh(whole):
        got = jax.jit(run)(*jax.device_put((keys, others), NamedSharding(whole, spec)))
    compare = functools.partial(np.testing.assert_allclose, rtol=1e-5, atol=1e-6)
    jax.tree.map(compare, jax.device_get(got), plain(keys, others))


def test_the_axes_left_have_one_device(arrays):
    """As in examples/train_lm.py --mesh data=4, whose model axis is left to the partitioner."""
    devices = mesh().devices.ravel()
    whole = jax.make_mesh((4, 1), ("x", "y"), (AxisType.Auto,) * 2, devices=devices)
    rows = P("x")
    by_rows = jax.shard_map(
        run, mesh=whole, in_specs=(rows, rows), out_specs=rows, axis_names={"x"}
    )
    with jax.set_mesh(whole):
        got = jax.jit(by_rows)(*jax.device_put(arrays, NamedSharding(whole, rows)))
    np.testing.assert_allclose(got, want(*arrays), rtol=1e-6)


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


# A step on a pool: tokens, the pool, and for each token the row that it starts from.
TOKEN, POOL = "B H K", "R H K"


def on_pool(q, pool, slots):
    rows = jnp.where(slots < 0, len(pool), slots)
    new = pool.at[rows].add(q, mode="drop")
    return jnp.where((slots >= 0)[:, None, None], new[slots], 0), new


wrapped_on_pool = shardwise(on_pool, (TOKEN, POOL, "B"), (TOKEN, POOL))


@pytest.fixture
def on_a_pool():
    slots = np.array([3, -1, 0, 5], np.int32)
    return normal(0, 4, 2, 5), normal(1, 6, 2, 5), slots


def placed_on(kind, pool, token):
    whole = jax.make_mesh((2, 2), ("x", "y"), (kind,) * 2, devices=mesh().devices.ravel())
    return whole, [NamedSharding(whole, spec) for spec in (token, pool, P())]


@pytest.mark.parametrize("kind", [AxisType.Auto, AxisType.Explicit])
def test_heads_of_a_pool_are_split(on_a_pool, kind):
    """Its rows are whole, and so are the tokens, wherever they lie."""
    whole, shardings = placed_on(kind, P(None, "y"), P("x", "y"))
    with jax.set_mesh(whole):
        o, new = jax.jit(wrapped_on_pool)(*map(jax.device_put, on_a_pool, shardings))
    assert new.sharding.is_equivalent_to(shardings[1], 3)
    for x, y in zip((o, new), on_pool(*map(jnp.asarray, on_a_pool)), strict=True):
        np.testing.assert_array_equal(x, y)


@pytest.mark.parametrize("kind", [AxisType.Auto, AxisType.Explicit])
def test_split_rows_of_a_pool_are_refused(on_a_pool, kind):
    whole, shardings = placed_on(kind, P("x"), P())
    with jax.set_mesh(whole), pytest.raises(Exception, match="rows of the pool are split"):
        jax.jit(wrapped_on_pool)(*map(jax.device_put, on_a_pool, shardings))


def test_devices_have_pools_of_their_own(on_a_pool):
    """Inside shard_map, with slots that are numbered in each."""
    slots = np.array([2, -1, 0, 1], np.int32)
    args, spec = (*on_a_pool[:2], slots), P("x")
    run = jax.shard_map(wrapped_on_pool, mesh=mesh(), in_specs=spec, out_specs=spec)
    o, new = jax.jit(run)(*args)
    of_all = slots + np.array([0, 0, 3, 3]) * (slots >= 0)
    for x, y in zip((o, new), on_pool(*map(jnp.asarray, (*args[:2], of_all))), strict=True):
        np.testing.assert_array_equal(x, y)


def test_vmap_makes_one_pool_of_all(on_a_pool):
    q, pool, slots = on_a_pool
    args = np.stack([q, 2 * q]), np.stack([pool, -pool]), np.stack([slots, slots[::-1]])
    o, new = jax.jit(jax.vmap(wrapped_on_pool))(*args)
    for n in range(2):
        wanted = on_pool(*(jnp.asarray(x[n]) for x in args))
        for x, y in zip((o[n], new[n]), wanted, strict=True):
            np.testing.assert_array_equal(x, y)
