"""Pools, from docs/contract.md: a step on rows of a pool is the step of these rows, and nothing
else of the pool changes."""

import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from evaluator import evaluated
from harness import assert_close, floats, inputs, is_float, with_floats
from jax.sharding import AxisType, NamedSharding, PartitionSpec
from mechanisms import GRID, MECHANISMS, SMALL

import jla
import jla.pallas

# The slots of each row of the call, and the rows of the pool.
MORE_ROWS = (2, -1, 0), 4
FEWER_ROWS = (-1, 1, -1), 2
POOLS = {"more rows": MORE_ROWS, "fewer rows": FEWER_ROWS}


def arguments(mechanism, implementation, sizes, slots, rows, seed=0):
    """One token for each slot, its other arguments, and a pool of so many rows."""
    most = max(len(slots), rows)
    whole = dict(sizes) | dict(B=most)
    args, _ = inputs(mechanism, whole, implementation.dtypes[0], seed)
    token = {n: args[n][: len(slots), 0] for n in mechanism.tokenwise()}
    pool = jax.tree.map(lambda x: x[:rows], args[mechanism.state[0]])
    return token, {n: args[n] for n in mechanism.shared()}, pool


def stepping(mechanism, implementation, shared):
    """`step(token, state, slots=None)`."""

    def step(token, state, slots=None):
        options = {} if slots is None else dict(slots=slots)
        options |= {mechanism.state[1]: state, "implementation": implementation.name}
        return mechanism.step(**token, **shared, **options)

    return step


def with_nan(tree, rows):
    """NaN in these rows of all floats."""

    def put(x):
        named = np.isin(np.arange(len(x)), rows).reshape(-1, *[1] * (x.ndim - 1))
        return np.where(named, np.nan, x).astype(x.dtype) if is_float(x) else x

    return jax.tree.map(put, tree)


def same(x, y):
    """To the bit; NumPy knows no NaN of 16 bits."""
    assert x.dtype == y.dtype
    np.testing.assert_array_equal(np.asarray(x, np.float32), np.asarray(y, np.float32))


def alike_on_a_gpu(implementation):
    """`same`; but XLA rounds otherwise in each program that it makes of "xla" for a GPU."""
    return same if implementation.name != "xla" else lambda x, y: assert_close(x, y, 2e-6)


@pytest.mark.parametrize("slots, rows", POOLS.values(), ids=POOLS)
@pytest.mark.parametrize("mechanism, implementation, sizes", [row for row in GRID if not row.marks])
def test_a_step_on_a_pool_is_the_step_of_its_rows(mechanism, implementation, sizes, slots, rows):
    """To the bit; no NaN of a row without a sequence, or of a row of the pool that no slot names,
    goes anywhere."""
    slots = np.array(slots, np.int32)
    token, shared, pool = arguments(mechanism, implementation, sizes, slots, rows)
    live = slots >= 0
    unused = np.setdiff1d(np.arange(rows), slots)
    step = stepping(mechanism, implementation, shared)
    run = evaluated(jax.jit(step))
    given = with_nan(pool, unused)
    with implementation.context():
        wanted = run(token, jax.tree.map(lambda x: x[slots], pool))
        o, new = run(with_nan(token, np.flatnonzero(~live)), given, slots)
    same(o[live], wanted[0][live])
    assert not np.any(np.asarray(o)[~live])
    jax.tree.map(lambda x, y: same(x[slots[live]], y[live]), new, wanted[1])
    jax.tree.map(lambda x, y: same(x[unused], y[unused]), new, given)


KERNELS = [row for row in SMALL if row.values[1].interpreted]


@pytest.mark.parametrize("mechanism, implementation, sizes", KERNELS)
def test_pools_under_vmap(mechanism, implementation, sizes):
    """Each of two pools has slots of its own; kernels fold both in one."""
    slots = np.array([[1, -1], [0, 2]], np.int32)
    parts = [arguments(mechanism, implementation, sizes, x, 3, seed=i) for i, x in enumerate(slots)]
    tokens, pools = (
        jax.tree.map(lambda *x: np.stack(x), *(part[i] for part in parts)) for i in (0, 2)
    )
    step = stepping(mechanism, implementation, parts[0][1])
    with implementation.context():
        got = evaluated(jax.jit(jax.vmap(step)))(tokens, pools, slots)
        for n, (token, _, pool) in enumerate(parts):
            wanted = evaluated(jax.jit(step))(token, pool, slots[n])
            jax.tree.map(lambda x, y, n=n: same(x[n], y), got, wanted)


@pytest.mark.parametrize("mechanism, implementation, sizes", SMALL)
def test_types_of_pools(mechanism, implementation, sizes):
    """The pool's, whatever the flags are; and a derivative, the definition's."""
    slots = np.array(MORE_ROWS[0], np.int32)
    token, shared, pool = arguments(mechanism, implementation, sizes, slots, MORE_ROWS[1])
    step = stepping(mechanism, implementation, shared)

    def with_tangent(floats_of):
        return jax.jvp(lambda x: floats(step(*with_floats((token, pool), x), slots)), *floats_of)

    with implementation.context():
        o, new = jax.eval_shape(step, token, pool, slots)
        with jax.enable_x64(True):
            wide = jax.eval_shape(step, token, pool, slots)
        jax.eval_shape(with_tangent, ((floats((token, pool)),),) * 2)
    assert wide == (o, new)
    assert (o.shape[0], o.dtype) == (len(slots), token["v"].dtype)
    assert all(x.shape == y.shape and x.dtype == y.dtype for x, y in leaves_of(new, pool))


def leaves_of(*trees):
    return zip(*map(jax.tree.leaves, trees), strict=True)


PLAIN = [row for row in SMALL if not row.values[1].interpreted]


@pytest.mark.parametrize("mechanism, implementation, sizes", PLAIN[1::2])
def test_a_donated_pool_stays_where_it_is(mechanism, implementation, sizes):
    """XLA makes no copy of it. Kernels show this on a GPU, and below."""
    slots = np.array(MORE_ROWS[0], np.int32)
    token, shared, pool = arguments(mechanism, implementation, sizes, slots, 64)
    run = jax.jit(stepping(mechanism, implementation, shared), donate_argnums=1)
    text = run.lower(token, pool, slots).compile().as_text()
    for x in jax.tree.leaves(pool):
        shape = ",".join(map(str, x.shape))
        assert not re.search(rf"\[{shape}\]\S* copy\(", text) or x.ndim < 3
    aliased = re.search(r"input_output_alias=\{(.*?) \}", text).group(1)
    assert aliased.count("may-alias") == len(jax.tree.leaves(pool))


@pytest.mark.parametrize("mechanism", MECHANISMS, ids=lambda m: m.name)
def test_kernels_take_a_pool_in_place(mechanism, monkeypatch):
    """In the program for a GPU the arrays that the kernel writes are its operands."""
    monkeypatch.setattr(jla.pallas, "unsupported_device", lambda: None)
    implementation = mechanism.form("pallas")
    slots = np.array(MORE_ROWS[0], np.int32)
    args = arguments(mechanism, implementation, implementation.sizes, slots, MORE_ROWS[1])
    run = jax.jit(stepping(mechanism, implementation.compiled(), args[1]), donate_argnums=1)
    lowered = run.trace(args[0], args[2], slots).lower(lowering_platforms=("cuda",))
    text = lowered.as_text()
    assert text.count("tf.aliasing_output") == len(jax.tree.leaves(args[2]))
    (call,) = [line for line in text.splitlines() if "@mosaic_gpu" in line]
    large = [x for x in jax.tree.leaves(args[2]) if x.ndim > 3]
    # PaTH's values are written by XLA.
    assert call.count("operand_index") == len(large) - (mechanism.name == "path")


@pytest.mark.parametrize("mechanism", MECHANISMS, ids=lambda m: m.name)
def test_slots_are_checked(mechanism):
    implementation = mechanism.form("reference")
    slots, rows = MORE_ROWS
    args = arguments(mechanism, implementation, implementation.sizes, slots, rows)
    step = stepping(mechanism, implementation, args[1])
    name = f"jla.{mechanism.step.__name__}: slots "

    def refuses(slots, exception, message):
        with pytest.raises(exception, match=f"^{name}{message}"):
            step(args[0], args[2], slots)

    def of(*slots):
        return np.array(slots, np.int32)

    refuses(of(1, 2, 1), ValueError, r"must differ .* got 1 in rows 0, 2")
    refuses(of(-1, rows, 0), ValueError, rf"must be -1 .* to {rows - 1}, .* got {rows} in row 1")
    refuses(of(-2, 0, 1), ValueError, "must be -1 .* got -2 in row 0")
    refuses(of(0, 1), ValueError, "has B = 2 .* but q has B = 3")
    refuses(of([0], [1], [2]), ValueError, r"must have axes \[B\]")
    refuses([0, 1, 2], TypeError, r"must be an array \[B\]")
    refuses(np.array([0, 1, 2]), TypeError, "must be int32, got int64")
    # Inside of jit nobody knows them; what is outside is nobody's.
    step = jax.jit(step)
    run = evaluated(step)
    o, new = run(args[0], args[2], of(1, rows, -7))
    wanted = run(args[0], args[2], of(1, -1, -1))
    jax.tree.map(same, (o, new), wanted)


def test_rows_of_a_pool_may_be_split_in_plain_jax():
    """XLA's partitioner finds them; kernels refuse it (tests/test_shardwise.py)."""
    mechanism = MECHANISMS[0]
    implementation = mechanism.form("xla")
    slots = np.array([3, -1, 0], np.int32)
    token, shared, pool = arguments(mechanism, implementation, implementation.sizes, slots, 4)
    step = jax.jit(stepping(mechanism, implementation, shared))
    mesh = jax.make_mesh((2,), ("rows",), (AxisType.Auto,), devices=jax.devices("cpu")[:2])
    split = NamedSharding(mesh, PartitionSpec("rows"))
    got = step(token, jax.device_put(pool, split), slots)
    assert got[1].sharding.is_equivalent_to(split, 4)
    assert_close(jax.device_get(got), evaluated(step)(token, pool, slots), 1e-6)


def test_gradients_of_pools():
    """Those of the rows by themselves; a NaN in a row without a sequence reaches nothing that rows
    share."""
    mechanism = next(m for m in MECHANISMS if m.shared())
    implementation = mechanism.form("xla")
    slots, live = np.array([2, -1, 0], np.int32), np.array([0, 2])
    token, shared, pool = arguments(mechanism, implementation, implementation.sizes, slots, 4)

    def loss(shared, token, state, slots=None):
        outputs = stepping(mechanism, implementation, shared)(token, state, slots)
        return sum(jnp.sum(jnp.sin(x)) for x in jax.tree.leaves(outputs))

    gradients = evaluated(jax.jit(jax.grad(loss, (0, 1))))
    got = gradients(shared, with_nan(token, [1]), pool, slots)
    of_rows = [
        jax.tree.map(lambda x, n=n: x[n], y) for n, y in ((live, token), (slots[live], pool))
    ]
    wanted = gradients(shared, *of_rows)
    assert_close(got[0], wanted[0], 1e-5)
    assert_close(jax.tree.map(lambda x: x[live], got[1]), wanted[1], 1e-5)
    assert not any(np.any(x[1]) for x in jax.tree.leaves(got[1]))


def test_checking_looks_at_the_rows_in_use():
    """Not at rows of the pool that no slot names, nor at arguments of rows without a sequence."""
    mechanism = MECHANISMS[0]
    implementation = mechanism.form("reference")
    slots = np.array([2, -1, 0], np.int32)
    token, shared, pool = arguments(mechanism, implementation, implementation.sizes, slots, 4)
    step = jax.jit(stepping(mechanism, implementation, shared))
    with jla.checking():
        step(with_nan(token, [1]), with_nan(pool, [1, 3]), slots)
    with pytest.raises(ValueError, match="state must be finite"), jla.checking():
        step(token, with_nan(pool, [2]), slots)


FULL = [row for row in GRID if row.marks]


def enlarged(tree, rows):
    """A pool of so many rows, no two alike, from a few."""

    def repeat(x):
        x = jnp.resize(x, (rows, *x.shape[1:]))
        factor = 1.0 + jnp.arange(rows, dtype=jnp.float32) / rows
        scaled = x * factor.reshape(-1, *[1] * (x.ndim - 1)).astype(x.dtype)
        return scaled if is_float(x) else x

    return jax.tree.map(jax.jit(repeat), tree)


@jax.jit
def alike(x, y, rows):
    """Whether these rows are the same to the bit, or both are NaN."""
    pairs = jax.tree.map(lambda x, y: (x[rows] == y[rows]) | ((x != x) & (y != y))[rows], x, y)
    return jnp.all(jnp.stack([jnp.all(x) for x in jax.tree.leaves(pairs)]))


@pytest.mark.parametrize("mechanism, implementation, sizes", FULL)
def test_128_rows_of_a_pool_of_1024(mechanism, implementation, sizes):
    """In place: the new pool is in the buffers of the one that was donated."""
    B, R = 128, 1024
    few = dict(sizes) | dict(B=8, T=1)
    token, shared, pool = arguments(mechanism, implementation, few, range(8), 8)
    token = {n: np.resize(x, (B, *x.shape[1:])) for n, x in token.items()}
    pool = enlarged(pool, R)
    random = np.random.default_rng(0)
    slots = random.permutation(R)[:B].astype(np.int32)
    idle = random.permutation(B)[:5]
    used = np.where(np.isin(np.arange(B), idle), -1, slots).astype(np.int32)
    unused = np.setdiff1d(np.arange(R), used).astype(np.int32)
    pool = jax.tree.map(
        lambda x: x.at[unused[:9]].set(jnp.nan) if is_float(x) else x, pool
    )  # and others stay numbers
    step = stepping(mechanism, implementation, shared)
    rows = jax.tree.map(lambda x: x[jnp.asarray(np.maximum(used, 0))], pool)
    o_wanted, state_wanted = jax.jit(step)(token, rows)
    before = jax.tree.map(jnp.copy, pool)
    places = [x.unsafe_buffer_pointer() for x in jax.tree.leaves(pool)]
    run = jax.jit(step, donate_argnums=1)
    o, new = run(with_nan(token, idle), pool, used)
    assert [x.unsafe_buffer_pointer() for x in jax.tree.leaves(new)] == places
    live = np.flatnonzero(used >= 0)
    equal = alike_on_a_gpu(implementation)
    equal(o[live], o_wanted[live])
    assert not np.any(np.asarray(o, np.float32)[idle])
    rows = jax.tree.map(lambda x: x[used[live]], new)
    jax.tree.map(lambda x, y: equal(x, y[live]), rows, state_wanted)
    assert alike(new, before, unused)


@pytest.mark.parametrize("mechanism, implementation, sizes", FULL)
def test_pools_of_layers_in_a_scan(mechanism, implementation, sizes):
    """Pools cut from a stacked array, as a scanned model keeps its caches: XLA's dynamic-slice
    fusion forgets that the pool and the new one are one buffer."""
    slots = np.array([5, -1, 0, 2], np.int32)
    few = dict(sizes) | dict(T=1)
    token, shared, pool = arguments(mechanism, implementation, few, slots, 6)
    step = stepping(mechanism, implementation, shared)
    two, rest = jax.tree.map(lambda x: np.stack([x, x[::-1]]), pool), np.array([1, 3, 4])

    @functools.partial(jax.jit, donate_argnums=0)
    def scan(pools):
        return jax.lax.scan(lambda _, pool: (None, step(token, pool, slots)), None, pools)[1]

    o, new = scan(jax.tree.map(jnp.asarray, two))
    equal = alike_on_a_gpu(implementation)
    for layer in range(2):
        one = jax.tree.map(lambda x, i=layer: x[i], two)
        wanted = jax.jit(step)(token, one, slots)
        equal(o[layer], wanted[0])
        jax.tree.map(lambda x, y, i=layer: equal(x[i], y), new, wanted[1])
        jax.tree.map(lambda x, y, i=layer: same(x[i][rest], y[rest]), new, one)
