"""NumPy's evaluation of a program is XLA's. Kernels and definitions are both evaluated, so that a
wrong rule would not show where they are compared."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from evaluator import assert_no_nan, evaluated
from jax import lax


def test_functions_of_numbers():
    def run(x, n):
        near = 0.1 * x
        floats = jnp.log(jnp.abs(x)), jnp.log1p(near), jnp.expm1(x), jax.nn.sigmoid(x)
        floats += jnp.sin(x), jnp.cos(x), lax.erf_inv(jnp.tanh(x))
        floats += jnp.tanh(x), jnp.floor(x), jnp.ceil(x), lax.reduce_precision(x, 8, 7)
        counts = lax.population_count(n), lax.clz(n), lax.clz(n.astype(jnp.uint8))
        return *floats, jnp.square(x), jnp.isfinite(jnp.log(x)), *counts

    x = np.random.default_rng(0).standard_normal((3, 5), np.float32)
    _same(run, x, np.array([0, 1, -1, 255, 2**31 - 1], np.int32))


def test_moves():
    def run(x, start):
        padded = [
            lax.pad(x, jnp.float32(7), ((low, high, inner), (0, 2, 0)))
            for low, high, inner in (
                *((0, 0, 0), (2, 1, 0), (-1, -2, 0), (-1, 2, 0), (1, -1, 1), (-2, 3, 2)),
            )
        ]
        moved = [lax.dynamic_update_slice(x, x[:2, :3] + 1, (start + i, i)) for i in (-9, 1, 9)]
        apart = lax.split(x, (1, 3, 1), axis=1), jnp.unstack(x, axis=1)
        return padded, moved, lax.rev(x, (1,)), apart

    _same(run, np.arange(20, dtype=np.float32).reshape(4, 5), np.int32(1))


def test_reductions():
    def run(x):
        some = x > 0
        along = [lax.cummax(x, 1, reverse=r) for r in (False, True)]
        also = [lax.cummin(x, 0, reverse=r) for r in (False, True)]
        sums = [lax.cumsum(y, 1, reverse=r) for y in (x, some.astype(int)) for r in (False, True)]
        return along, also, sums, jnp.any(some, 0), jnp.all(some, 1), jnp.max(x, 1)

    _same(run, np.random.default_rng(1).standard_normal((4, 5), np.float32))


MODES = ["clip", "fill", "promise_in_bounds"]


@pytest.mark.parametrize("mode", MODES)
def test_places(mode):
    """Rows, elements, windows and places in a batch, some of them outside, some twice."""
    last = 2 if mode == "promise_in_bounds" else 7
    rows, columns = np.array([2, 0, 2, last]), np.array([[1], [0], [1], [last]])

    def run(x, n, rows, columns):
        pairs = [(x, (rows, columns)), (x, (columns, slice(2), rows)), (n, (slice(None), rows))]
        taken = [y.at[place].get(mode=mode) for y, place in pairs]
        added = [y.at[place].add(y[0, 0, 0] + 2, mode=mode) for y, place in pairs]
        put = n.at[rows].set(7, mode=mode), n.at[rows].get(mode=mode, fill_value=3)
        windows = jax.vmap(lambda y, i: lax.dynamic_slice(y, (i, 1), (2, 2)))(x, rows[:3])
        of_batch = jax.vmap(lambda y, i: y.at[i].add(y[:1], mode=mode))(x, columns[:3])
        narrow = x.astype(jnp.bfloat16).at[rows].add(x[:1].astype(jnp.bfloat16), mode=mode)
        return taken, added, put, windows, of_batch, narrow

    x = np.random.default_rng(2).standard_normal((3, 3, 3), np.float32)
    _same(run, x, (4 * x).astype(np.int32), rows, columns)


def test_sort_and_solve():
    def run(a, b, n):
        both = [lax.sort((n, b), dimension=i, num_keys=k) for i in (0, 1) for k in (1, 2)]
        solved = [
            lax.linalg.triangular_solve(a, y, left_side=left, lower=low, transpose_a=turn)
            for left, y in ((True, b), (False, b.mT))
            for low in (True, False)
            for turn in (True, False)
        ]
        wide = jnp.stack([a, a[::-1]])
        return both, solved, lax.linalg.lu(wide), jnp.linalg.solve(wide, jnp.stack([b, b]))

    random = np.random.default_rng(3)
    a, b = (random.standard_normal(shape, np.float32) for shape in ((4, 4), (4, 3)))
    _same(run, a + 2 * np.eye(4, dtype=np.float32), b, np.int32(2 * b))


def test_calls():
    """A solution for its own gradient, and a function with a batching rule of its own."""

    @jax.custom_batching.custom_vmap
    def twice(x):
        return 2 * x

    @twice.def_vmap
    def _(_, batched, x):
        return 2 * x, batched[0]

    def run(a, b):
        def solve(_, b):
            return jnp.linalg.inv(a) @ b

        x = lax.custom_linear_solve(lambda x: a @ x, b, solve, lambda _, b: solve(_, b))
        return x, twice(x)

    random = np.random.default_rng(2).standard_normal((3, 4), np.float32)
    _same(run, random[:, :3] + 4 * np.eye(3, dtype=np.float32), random[:, 3])


def test_random_numbers():
    def run(key):
        keys = jax.random.split(key, 3)
        many = jax.vmap(lambda key: jax.random.bits(key, (4, 5)))(keys)
        return many, jax.random.bits(key, (7,), "uint8"), jax.random.normal(keys[0], (3,))

    _same(run, jax.random.key(3))


def test_nan_is_looked_for_where_jax_does():
    def masked(x):
        return jnp.where(x == 0, 0.0, x / x)

    gated = jax.custom_vjp(masked)
    gated.defvjp(lambda x: (masked(x), None), lambda *_: None)
    assert_no_nan(jax.jit(masked), 0.0)
    for run in (masked, gated):
        with pytest.raises(AssertionError, match=r"NaN of .* div"):
            assert_no_nan(run, 0.0)
        with pytest.raises(FloatingPointError), jax.debug_nans(True):
            run(jnp.float32(0))
    with pytest.raises(AssertionError, match=r"NaN of .* div"):
        assert_no_nan(lambda x: masked(0.1 * x + 0.1 * x), jnp.float32(2e-38))
    with pytest.raises(AssertionError, match=r"NaN of .* log"):
        assert_no_nan(lambda x: x + jnp.log(-jnp.ones(1)), 0.0)


def _same(run, *args):
    jitted = jax.jit(run)
    got, want = evaluated(jitted)(*args), jitted(*args)
    for x, y in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
        assert x.dtype == y.dtype
        tolerance = 1e-2 if x.dtype == jnp.bfloat16 else 2e-5
        x, y = (np.asarray(z, np.float64) for z in (x, y))
        np.testing.assert_allclose(x, y, rtol=tolerance, atol=1e-6)
