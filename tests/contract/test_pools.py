"""Pools, from docs/contract.md: a step on rows of a pool is the step of these rows, and nothing
else of the pool changes."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from evaluator import evaluated
from harness import inputs, is_float
from mechanisms import GRID

# The slots of each row of the call, and the rows of the pool.
MORE_ROWS = (2, -1, 0), 4
FEWER_ROWS = (-1, 1, -1), 2
POOLS = {"more rows": MORE_ROWS, "fewer rows": FEWER_ROWS}


def arguments(mechanism, implementation, sizes, slots, rows):
    """One token for each slot, its other arguments, and a pool of so many rows."""
    most = max(len(slots), rows)
    whole = dict(sizes) | dict(B=most)
    args, _ = inputs(mechanism, whole, implementation.dtypes[0])
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
    same(o[live], o_wanted[live])
    assert not np.any(np.asarray(o, np.float32)[idle])
    rows = jax.tree.map(lambda x: x[used[live]], new)
    assert alike(rows, jax.tree.map(lambda x: x[live], state_wanted), np.arange(len(live)))
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
    for layer in range(2):
        one = jax.tree.map(lambda x, i=layer: x[i], two)
        wanted = jax.jit(step)(token, one, slots)
        same(o[layer], wanted[0])
        jax.tree.map(lambda x, y, i=layer: same(x[i], y), new, wanted[1])
        jax.tree.map(lambda x, y, i=layer: same(x[i][rest], y[rest]), new, one)
