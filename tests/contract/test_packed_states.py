"""States of packed segments (docs/contract.md): segment n starts from the row's state n, leaves its
own there, and touches no other."""

import functools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from evaluator import evaluated
from harness import (
    assert_agrees,
    assert_close,
    definition,
    inputs,
    is_float,
    value_and_vjp,
    with_gradients,
)
from mechanisms import AGAINST_REFERENCE, DEFINITIONS, MECHANISMS, SMALL

import jla
from jla import _fused

N = 6


def with_states(rows, slow=lambda mechanism, implementation: False):
    """The rows of mechanisms with a state of a fixed size, some of them marked slow."""
    rows = [row for row in rows if row.values[0].name != "path"]
    marks = [[pytest.mark.slow] * slow(*row.values[:2]) for row in rows]
    return [
        pytest.param(*row.values, id=row.id, marks=[*row.marks, *mark])
        for row, mark in zip(rows, marks, strict=True)
    ]


def interpreted(mechanism, implementation):
    return implementation.interpreted


def around_a_core(mechanism, implementation):
    """What is around log-linear attention's kernels is around the core of "xla", too."""
    return implementation.interpreted and mechanism.name == "log_linear"


# Runs of ids. For chunks of 32 and of 64: a border on a chunk's end and inside one, several
# segments in one chunk, one over several chunks, padding between and behind; the ids are in no
# order, and of each row's some are absent.
ROWS = (
    ((2, 33), (0, 31), (5, 1), (-1, 10), (4, 2), (1, 23)),
    ((0, 32), (-1, 4), (3, 64)),
)


def ids_of(rows, T=None):
    """The ids of these rows, the last run of each up to T."""
    ids = np.stack([np.repeat(*np.transpose(row)) for row in rows]).astype(np.int32)
    return ids if T is None else np.pad(ids, ((0, 0), (0, T - ids.shape[1])), mode="edge")


def packed(mechanism, sizes, dtype="float32"):
    """Arguments with an axis of segments in the state, their cotangents, and which are absent."""
    B = sizes["B"]
    args, (o, state) = inputs(mechanism, dict(sizes) | dict(B=B * N), dtype)

    def by_segment(x):
        return x.reshape(B, N, *x.shape[1:])

    name = mechanism.state[0]
    args |= {n: args[n][:B] for n in mechanism.tokenwise()}
    args[name] = jax.tree.map(by_segment, args[name])
    return args, (o[:B], jax.tree.map(by_segment, state))


def at_absent(ids, tree, value):
    """The states with that value in segments that are absent; in their integers, what they have."""
    absent = ~np.any(ids[:, :, None] == np.arange(N), axis=1)

    def one(x):
        there = absent.reshape(*absent.shape, *[1] * (x.ndim - 2))
        return np.where(there, value, x).astype(x.dtype) if is_float(x) else x

    return jax.tree.map(one, tree)


@pytest.mark.parametrize("mechanism, implementation, sizes", with_states(DEFINITIONS))
def test_each_segment_is_a_row_of_its_own(mechanism, implementation, sizes):
    rows = ((2, 3), (0, 1), (-1, 2), (4, 6), (1, 1)), ((1, 9), (-1, 1), (5, 3))
    args, cotangents = packed(mechanism, dict(sizes) | dict(T=13))
    name, ids = mechanism.state[0], ids_of(rows)
    (o, states), gradients = definition(mechanism, args, cotangents, ids)
    shared = {n: np.zeros_like(args[n]) for n in mechanism.shared()}
    want = jax.tree.map(np.copy, args[name])
    want_gradient = jax.tree.map(np.copy, cotangents[1])
    assert not np.any(o[ids < 0])
    for n in mechanism.tokenwise():
        assert not np.any(gradients[n][ids < 0])
    for b, row in enumerate(rows):
        for n, length in row:
            if n < 0:
                continue
            here = np.s_[b : b + 1, np.flatnonzero(ids[b] == n)]
            assert len(here[1]) == length
            one = {x: args[x][here] for x in mechanism.tokenwise()}
            one |= {x: args[x] for x in mechanism.shared()}
            one[name] = jax.tree.map(lambda x, b=b, n=n: x[b, n][None], args[name])
            of_state = jax.tree.map(lambda x, b=b, n=n: x[b, n][None], cotangents[1])
            (o_one, state), of_one = definition(mechanism, one, (cotangents[0][here], of_state))
            assert_close(o[here], o_one, 1e-5)
            for x in mechanism.tokenwise():
                assert_close(gradients[x][here], of_one[x], 1e-5)
            for x in mechanism.shared():
                shared[x] += of_one[x]
            for all_of, new in ((want, state), (want_gradient, of_one[name])):
                for whole, x in zip(jax.tree.leaves(all_of), jax.tree.leaves(new), strict=True):
                    whole[b, n] = x[0]
    assert_close(states, want, 1e-5)
    assert_close(gradients[name], want_gradient, 1e-5)
    for n in shared:
        assert_close(gradients[n], shared[n], 1e-4)


@pytest.mark.parametrize(
    "mechanism, implementation, sizes", with_states(AGAINST_REFERENCE, around_a_core)
)
def test_packed_states_are_the_definition(mechanism, implementation, sizes):
    """And the state of a segment that is absent comes back as it was, though it is NaN."""
    dtype, name = implementation.dtypes[0], mechanism.state[0]
    args, cotangents = packed(mechanism, sizes, dtype)
    ids = ids_of(ROWS[: sizes["B"]], sizes["T"])
    nan = args | {name: at_absent(ids, args[name], np.nan)}
    (o, states), gradients = value_and_vjp(
        mechanism, implementation, nan, cotangents, ids, compiled=False
    )
    chex.assert_trees_all_equal_shapes_and_dtypes(((o, states), gradients), (cotangents, args))
    given = at_absent(ids, args[name], np.nan)
    for ours, theirs in zip(jax.tree.leaves(states), jax.tree.leaves(given), strict=True):
        if is_float(theirs):
            np.testing.assert_array_equal(np.isnan(ours), np.isnan(theirs))
    zeros = args | {name: at_absent(ids, args[name], 0.0)}
    want = definition(mechanism, zeros, cotangents, ids)
    got = (o, at_absent(ids, states, 0.0)), gradients
    assert_agrees(mechanism, dtype, got, want)


@pytest.mark.parametrize("mechanism, implementation, sizes", with_states(SMALL, interpreted))
def test_one_segment_is_the_row(mechanism, implementation, sizes):
    sizes = dict(sizes) | dict(T=20)
    args, _ = inputs(mechanism, sizes, implementation.dtypes[0])
    ids, name = np.zeros((sizes["B"], sizes["T"]), np.int32), mechanism.state[0]
    run = evaluated(jax.jit(functools.partial(mechanism.run, implementation=implementation.name)))
    of_one = args | {name: jax.tree.map(lambda x: x[:, None], args[name])}
    with implementation.context():
        o, states = run(**of_one, segment_ids=ids)
        want = run(**args)
    states = jax.tree.map(lambda x: x[:, 0], states)
    assert_close((o, states), want, mechanism.tolerances[implementation.dtypes[0]][0])


@pytest.mark.parametrize("mechanism, implementation, sizes", with_states(SMALL))
def test_packed_states_keep_dtypes_under_x64(mechanism, implementation, sizes):
    """Results have those of their cotangents, and gradients those of their arguments, as without
    the flag in `test_packed_states_are_the_definition`."""
    args, cotangents = packed(mechanism, dict(sizes) | dict(T=20), implementation.dtypes[0])
    run = functools.partial(mechanism.run, implementation=implementation.name)

    def both(args, cotangents, ids):
        return with_gradients(lambda args: run(**args, segment_ids=ids), args, cotangents)

    with jax.enable_x64(True), implementation.context():
        ids = jnp.zeros((sizes["B"], 20), int)
        got = jax.eval_shape(both, args, cotangents, ids)
    chex.assert_trees_all_equal_shapes_and_dtypes(got, (cotangents, args))


@pytest.mark.slow  # half a minute each; a GPU runs them
@pytest.mark.parametrize(
    "mechanism, implementation, sizes",
    with_states([row for row in SMALL if row.values[1].name == "pallas"]),
)
def test_packed_states_lower_for_cuda(mechanism, implementation, sizes, monkeypatch):
    monkeypatch.setattr(jla.pallas, "unsupported_device", lambda: None)
    args, cotangents = packed(mechanism, sizes, implementation.dtypes[0])
    run = functools.partial(mechanism.run, implementation=implementation.name)

    @jax.jit
    def both(args, cotangents, ids):
        return with_gradients(lambda args: run(**args, segment_ids=ids), args, cotangents)

    ids = ids_of(ROWS[: sizes["B"]])
    lowered = both.trace(args, cotangents, ids).lower(lowering_platforms=("cuda",))
    assert "@mosaic_gpu" in lowered.as_text()


MISTAKES = (
    ("too large", lambda ids: np.where(ids == 2, N, ids), {}, ValueError, ("-1 to 6", "0 to 5")),
    ("below -1", lambda ids: ids - 1, {}, ValueError, ("segment_ids must be 0 to 5", "-2")),
    ("twice", lambda ids: np.where(ids == 4, 2, ids), {}, ValueError, ("id 2 in several places",)),
    ("no ids", lambda ids: None, {}, ValueError, ("initial_state", "without segment_ids")),
    (
        "over devices",
        lambda ids: ids,
        dict(axis_name="seq"),
        NotImplementedError,
        ("initial_state", "axis of segments", "axis_name"),
    ),
)


@pytest.mark.parametrize("label, edit, options, exception, fragments", MISTAKES)
@pytest.mark.parametrize("mechanism", MECHANISMS[:4], ids=lambda m: m.name)
def test_refuses(mechanism, label, edit, options, exception, fragments):
    args, _ = packed(mechanism, mechanism.implementations[0].sizes)
    with pytest.raises(exception) as caught:
        mechanism.run(**args, segment_ids=edit(ids_of(ROWS)), **options)
    for fragment in (f"jla.{mechanism.run.__name__}: ", *fragments):
        assert fragment in str(caught.value)


def test_a_cache_has_no_segments():
    path = MECHANISMS[4]
    args, _ = inputs(path, path.implementations[0].sizes)
    cache = jax.tree.map(lambda x: x[:, None], args.pop(path.state[0]))
    with pytest.raises(NotImplementedError, match="a row and a cache of its own"):
        path.run(**args, cache=cache, segment_ids=ids_of(ROWS))


@pytest.mark.parametrize("W", [2, 4])
def test_short_convolution_of_segments(W):
    """Each segment from its own past: as if it were a row."""
    random, ids = np.random.default_rng(0), ids_of(ROWS)
    x, past = random.normal(size=(2, 100, 3, 8)), random.normal(size=(2, N, W - 1, 3, 8))
    taps, bias = random.normal(size=(W, 3, 8)), random.normal(size=(3, 8))
    x, past, taps, bias = (a.astype(np.float32) for a in (x, past, taps, bias))
    past = at_absent(ids, past, np.nan)
    options = dict(normalize=True, implementation="xla")
    run = functools.partial(_fused.short_convolution_of_segments, **options)
    y, last = evaluated(jax.jit(run))(x, taps, bias, past, ids)
    alone = evaluated(jax.jit(functools.partial(_fused.short_convolution, **options)))
    assert not np.any(y[ids < 0])
    want = past.copy()
    for b, row in enumerate(ROWS):
        for n, _ in row:
            if n >= 0:
                mine = x[b : b + 1, ids[b] == n]
                of_row = past[b : b + 1, n]
                one = alone(mine, taps, bias, of_row)
                np.testing.assert_allclose(y[b][ids[b] == n], one[0], atol=1e-6)
                want[b, n] = np.concatenate([of_row, mine], axis=1)[0, -(W - 1) :]
    np.testing.assert_array_equal(last, want)


def test_a_lazy_state_with_segments():
    log_linear = MECHANISMS[2]
    args, _ = packed(log_linear, log_linear.implementations[0].sizes)
    state, ids = args.pop("initial_state"), ids_of(ROWS)
    lazy = jla.LazyLogLinearState(*state, np.zeros(state.levels.shape[:4], np.float32))
    run = functools.partial(jla.log_linear_attention, **args, implementation="xla")
    run = evaluated(jax.jit(functools.partial(run, segment_ids=ids)))
    assert_close(run(initial_state=lazy), run(initial_state=state), 1e-6)


@pytest.mark.parametrize("mechanism", MECHANISMS[:4], ids=lambda m: m.name)
def test_checking_traces(mechanism):
    """The values of such states are looked at, too."""
    args, _ = packed(mechanism, dict(mechanism.implementations[0].sizes) | dict(T=20))
    ids = np.zeros((2, 20), np.int32)
    run = functools.partial(mechanism.run, segment_ids=ids, implementation="xla")
    with jla.checking():
        jax.eval_shape(run, **args)
