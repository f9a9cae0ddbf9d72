"""Along a sequence, from docs/contract.md: causal to the bit, NaN stays where it is, split is
whole, decode is forward, packed is separate."""

import functools

import chex
import jax
import numpy as np
import pytest
from evaluator import evaluated
from harness import (
    assert_agrees,
    assert_close,
    assert_same_bits,
    case,
    cut,
    definition,
    evaluated_if_interpreted,
    forward,
    inputs,
    is_float,
    one_segment,
    value_and_vjp,
    with_gradients,
)
from mechanisms import (
    AGAINST_REFERENCE,
    COMPILED_ON_CPU,
    DEFINITIONS,
    GRID,
    SMALL,
    SMALL_AGAINST_REFERENCE,
    marked,
)
from table import put

WITH_GATES = [row for row in GRID if "g" in row.values[0].axes]


def earlier_outputs_stay(mechanism, implementation, sizes, names, few):
    args, _ = inputs(mechanism, sizes, implementation.dtypes[0])
    T, ids = sizes["T"], one_segment(implementation, sizes)
    before = forward(mechanism, implementation, args, ids)[0]
    # The borders of chunks of 16 to 64 tokens, and places inside them. The definition has none.
    places = implementation.choice((0, 1, 15, 16, 30, 31, 62, 63, 64, T - 2), few)
    for t in (0, 30, T - 2) if implementation.name == "reference" else places:
        changed = dict(args)
        for name in names:
            x = args[name]
            changed[name] = put(x, np.s_[:, t + 1 :], mechanism.later(name, x[:, t + 1 :]))
        after = forward(mechanism, implementation, changed, ids)[0]
        assert_same_bits(after[:, : t + 1], before[:, : t + 1])
        assert not np.array_equal(after[:, t + 1 :], before[:, t + 1 :])


@pytest.mark.parametrize("mechanism, implementation, sizes", marked("test_causal_to_the_bit", GRID))
def test_causal_to_the_bit(mechanism, implementation, sizes):
    earlier_outputs_stay(mechanism, implementation, sizes, mechanism.tokenwise(), (30, 63))


@pytest.mark.parametrize(
    "mechanism, implementation, sizes",
    # The definition has no chunks.
    marked("test_a_later_tokens_gate_moves_no_earlier_output", WITH_GATES),
)
def test_a_later_tokens_gate_moves_no_earlier_output(mechanism, implementation, sizes):
    """A chunk's reference point among its later gates would move the rounding of earlier rows.

    `test_causal_to_the_bit` would see it, too; this says that it is the gate.
    """
    gates = [name for name in mechanism.tokenwise() if name == "g"]
    earlier_outputs_stay(mechanism, implementation, sizes, gates, (63,))


@pytest.mark.parametrize(
    "mechanism, implementation, sizes", marked("test_split_is_whole", COMPILED_ON_CPU)
)
def test_split_is_whole(mechanism, implementation, sizes):
    """At other places than `test_a_split_and_its_gradients_are_the_whole`."""
    dtype = implementation.dtypes[0]
    args, _ = inputs(mechanism, sizes, dtype)
    whole = forward(mechanism, implementation, args, one_segment(implementation, sizes))
    for n in (1, 36, 64):
        o, state = forward(mechanism, implementation, cut(mechanism, args, 0, n))
        rest = cut(mechanism, args, n, None) | {mechanism.state[0]: state}
        o_rest, state = forward(mechanism, implementation, rest)
        got = np.concatenate([o, o_rest], axis=1), state
        assert_close(got, whole, mechanism.tolerances[dtype][0])


def of_twice_the_length(mechanism, sizes, dtype):
    """Arguments and cotangents, the state's as for the usual length."""
    args, cotangents = inputs(mechanism, dict(sizes) | dict(T=2 * sizes["T"]), dtype)
    usual = inputs(mechanism, sizes, dtype)
    name = mechanism.state[0]
    return args | {name: usual[0][name]}, (cotangents[0], usual[1][1])


@pytest.mark.parametrize(
    "mechanism, implementation, sizes",
    marked("test_a_split_and_its_gradients_are_the_whole", SMALL),
)
def test_a_split_and_its_gradients_are_the_whole(mechanism, implementation, sizes):
    """The first part's final state is the second's initial one, and so are their cotangents.

    Not at full size, where its programs took a fifth of the time of all tests on a GPU: there
    `test_values_and_gradients` has random initial states and random cotangents of final ones, and
    compares with the definition, of which this test shows that it can be split.
    """
    dtype, name, n = implementation.dtypes[0], mechanism.state[0], sizes["T"]
    # Two parts of the usual length, whose program is there; the definition is the whole.
    args, cotangents = of_twice_the_length(mechanism, sizes, dtype)
    ids = one_segment(implementation, sizes)
    whole = definition(mechanism, args, cotangents, np.concatenate([ids, ids], axis=1))
    o_cotangent, state_cotangent = cotangents
    first, second = cut(mechanism, args, 0, n), cut(mechanism, args, n, None)
    run = functools.partial(value_and_vjp, mechanism, implementation, segment_ids=ids)
    unknown = jax.tree.map(np.zeros_like, state_cotangent)
    # The gradients are not used; running them compiles no other program.
    state = run(first, (o_cotangent[:, :n], unknown))[0][1]
    (o_rest, final), later = run(second | {name: state}, (o_cotangent[:, n:], state_cotangent))
    (o, _), earlier = run(first, (o_cotangent[:, :n], later[name]))
    values = np.concatenate([o, o_rest], axis=1), final
    assert_close(values, whole[0], mechanism.tolerances[dtype][0])
    got = dict(earlier)
    for key in mechanism.tokenwise():
        got[key] = np.concatenate([earlier[key], later[key]], axis=1)
    for key in mechanism.shared():
        got[key] = earlier[key] + later[key]
    assert_close(got, whole[1], mechanism.tolerances[dtype][1])


@pytest.mark.parametrize("mechanism, implementation, sizes", marked("test_decode_is_forward", GRID))
def test_decode_is_forward(mechanism, implementation, sizes):
    dtype = implementation.dtypes[0]
    shared = case(mechanism, implementation, sizes, dtype)
    args, whole = shared.args, shared.got[0]
    # An interpreted step takes long; its state is compared in the tests of the step.
    T = implementation.choice(sizes["T"], 20)
    tokens = {name: np.moveaxis(args[name][:, :T], 1, 0) for name in mechanism.tokenwise()}
    constant = {name: args[name] for name in mechanism.shared()}
    step = functools.partial(mechanism.step, **constant, implementation=implementation.name)

    @jax.jit
    def decode(state, tokens):
        def token(state, inputs):
            o, state = step(**inputs, **{mechanism.state[1]: state})
            return state, o

        return jax.lax.scan(token, state, tokens)

    decode = evaluated_if_interpreted(implementation, decode)
    with implementation.context():
        state, o = jax.device_get(decode(args[mechanism.state[0]], tokens))
    got, want = (np.moveaxis(o, 0, 1), state), (whole[0][:, :T], whole[1])
    last = slice(None if T == sizes["T"] else 1)
    assert_close(got[last], want[last], mechanism.tolerances[dtype][0])


@pytest.mark.parametrize(
    "mechanism, implementation, sizes",
    # What kernels write in place is at stake; others have no aliases.
    marked("test_step_in_a_scan_over_layers", GRID),
)
def test_step_in_a_scan_over_layers(mechanism, implementation, sizes):
    """The states of two layers in one array, as a scanned model keeps its cache."""
    layers = [inputs(mechanism, sizes, implementation.dtypes[0], seed)[0] for seed in range(2)]
    names = (*mechanism.tokenwise(), mechanism.state[0])
    cut_out = {n: [a[n] if n == names[-1] else a[n][:, 0] for a in layers] for n in names}
    shared = {name: layers[0][name] for name in mechanism.shared()}

    def step(arguments):
        tokens = {n: x for n, x in arguments.items() if n != names[-1]}
        state = {mechanism.state[1]: arguments[names[-1]]}
        return mechanism.step(**tokens, **state, **shared, implementation=implementation.name)

    stacked = {n: jax.tree.map(lambda *x: np.stack(x), *xs) for n, xs in cut_out.items()}
    turned = jax.tree.map(lambda x: x[::-1], stacked)
    scan = jax.jit(lambda xs: jax.lax.scan(lambda _, x: (None, step(x)), None, xs)[1])
    scan = evaluated_if_interpreted(implementation, scan)
    with implementation.context():
        got, of_turned = jax.device_get((scan(stacked), scan(turned)))
    # A layer's step is the same as the first and as the second; and it is the run's first token.
    assert_close(got, jax.tree.map(lambda x: x[::-1], of_turned), 1e-5)
    # Both could be of a state that nobody wrote to.
    first = functools.partial(jax.tree.map, lambda x: x[0])
    alone = evaluated(jax.jit(step))
    with implementation.context():
        assert_close(first(got[1]), alone(first(stacked))[1], 1e-5)
    shared = case(mechanism, implementation, sizes)
    want = shared.got[0][0][:, 0]
    assert_close(got[0][0], want, mechanism.tolerances[implementation.dtypes[0]][0])


# Two rows that share few borders, with segments of one token at the ends and inside, alone and
# several together. Ids come again later, and only neighbours make a segment: [0, 0, 1, 1, 0] are
# three.
PACKS = (
    ((3, 1), (7, 33), (3, 1), (0, 33), (7, 27), (3, 1), (0, 1), (3, 1), (7, 1), (0, 1)),
    ((0, 33), (1, 67)),
)


def packs(sizes):
    ids = [np.repeat(*np.transpose(row)) for row in PACKS[: sizes["B"]]]
    return np.stack(ids).astype(np.int32)


# The lengths of two rows' segments. The last ones, which return a state, are as long as a run.
LENGTHS = np.array([[3, 33, 1, 62, 1, 100], [1, 36, 31, 31, 1, 100]])


@pytest.mark.parametrize("mechanism, implementation, sizes", DEFINITIONS)
def test_packed_is_separate(mechanism, implementation, sizes):
    """The definition of the packed rows is that of their segments one by one.

    A segment alone has other tokens after it, of no cotangent. They change nothing before them, see
    `test_causal_to_the_bit`, and all runs are of one length.
    """
    dtype, state, T = implementation.dtypes[0], mechanism.state[0], sizes["T"]
    args, (o_cotangent, state_cotangent) = of_twice_the_length(mechanism, sizes, dtype)
    numbers = np.arange(LENGTHS.shape[1]) % 2  # an id may come again
    ids = np.stack([np.repeat(numbers, row) for row in LENGTHS]).astype(np.int32)
    cotangents = o_cotangent, state_cotangent
    got = value_and_vjp(mechanism, implementation, args, cotangents, ids)

    nothing = jax.tree.map(np.zeros_like, (args[state], state_cotangent))
    o, gradients = np.zeros_like(o_cotangent), jax.tree.map(np.zeros_like, args)
    starts, stops = np.cumsum(LENGTHS, axis=1) - LENGTHS, np.cumsum(LENGTHS, axis=1)
    for i in range(LENGTHS.shape[1]):
        # [B, T]: where the runs' tokens are in the rows, and which are the segments'.
        places = starts[:, i, None] + np.arange(T)
        rows, there = np.arange(len(places))[:, None], places < stops[:, i, None]
        one = {n: x[rows, places] if n in mechanism.tokenwise() else x for n, x in args.items()}
        # The row's first segment has its initial state, its last one returns the final state.
        one[state] = args[state] if i == 0 else nothing[0]
        last = i == LENGTHS.shape[1] - 1
        cotangents = (
            o_cotangent[rows, places] * there[..., None, None],
            state_cotangent if last else nothing[1],
        )
        (o_one, final), of_one = definition(
            mechanism, one, cotangents, one_segment(implementation, sizes)
        )
        inside = np.nonzero(there)[0], places[there]
        o[inside] = o_one[there]
        for name in mechanism.tokenwise():
            gradients[name][inside] = of_one[name][there]
        for name in mechanism.shared():
            gradients[name] += of_one[name]
        if i == 0:
            gradients[state] = of_one[state]
    assert_agrees(mechanism, dtype, got, ((o, final), gradients))


@pytest.mark.parametrize("mechanism, implementation, sizes", SMALL_AGAINST_REFERENCE)
def test_packed_is_the_definition(mechanism, implementation, sizes):
    dtype = implementation.dtypes[0]
    args, cotangents = inputs(mechanism, sizes, dtype)
    got = value_and_vjp(mechanism, implementation, args, cotangents, packs(sizes))
    assert_agrees(mechanism, dtype, got, definition(mechanism, args, cotangents, packs(sizes)))


@pytest.mark.parametrize(
    "mechanism, implementation, sizes",
    marked("test_every_token_its_own_segment", AGAINST_REFERENCE),
)
def test_every_token_its_own_segment(mechanism, implementation, sizes):
    dtype = implementation.dtypes[0]
    args, cotangents = inputs(mechanism, sizes, dtype)
    ids = np.tile(np.arange(sizes["T"], dtype=np.int32), (sizes["B"], 1))
    got = value_and_vjp(mechanism, implementation, args, cotangents, ids)
    assert_agrees(mechanism, dtype, got, definition(mechanism, args, cotangents, ids))


@pytest.mark.parametrize("mechanism, implementation, sizes", SMALL)
def test_nothing_crosses_a_border(mechanism, implementation, sizes):
    """To the bit: what a segment holds moves neither the next one's outputs nor its state."""
    args, _ = inputs(mechanism, sizes, implementation.dtypes[0])
    for border in implementation.choice((36, 64), (36,)):
        ids = put(one_segment(implementation, sizes), np.s_[:, border:], 1)
        changed = {
            name: put(x, np.s_[:, :border], mechanism.later(name, x[:, :border]))
            if name in mechanism.tokenwise()
            else jax.tree.map(lambda s: 2 * s, x)
            for name, x in args.items()
            if name not in mechanism.shared()
        }
        changed = args | changed
        before = forward(mechanism, implementation, args, ids)
        after = forward(mechanism, implementation, changed, ids)
        assert_same_bits((after[0][:, border:], after[1]), (before[0][:, border:], before[1]))
        assert not np.array_equal(after[0][:, :border], before[0][:, :border])


@pytest.mark.parametrize(
    "mechanism, implementation, sizes", marked("test_nan_in_one_row_stays_there", GRID)
)
def test_nan_in_one_row_stays_there(mechanism, implementation, sizes):
    """To the bit: the other rows' outputs, states and gradients are as without it."""
    if implementation.interpreted:  # its cases have one row; a chunk's forward pass is enough
        sizes = dict(sizes) | dict(B=2, T=20)
        args, _ = inputs(mechanism, sizes, implementation.dtypes[0])
        want = forward(mechanism, implementation, args)
    else:
        shared = case(mechanism, implementation, sizes)
        args, want = shared.args, shared.got
    of_rows = [name for name in args if name not in mechanism.shared()]

    def with_nan(x):
        return put(x, 0, np.nan) if is_float(x) else x

    def others(got):
        if not implementation.interpreted:
            got = got[0], {name: got[1][name] for name in of_rows}
        return jax.tree.map(lambda x: x[1:], got)

    nan = args | {name: jax.tree.map(with_nan, args[name]) for name in of_rows}
    if implementation.interpreted:
        got = forward(mechanism, implementation, nan)
    else:
        got = value_and_vjp(mechanism, implementation, nan, shared.cotangents, shared.segment_ids)
    chex.assert_tree_all_finite(others(want))
    assert_same_bits(others(got), others(want))


WITH_UNUSED = [row for row in SMALL if row.values[0].unused]


@pytest.mark.parametrize(
    "mechanism, implementation, sizes",
    # Around the kernels of log-linear attention is the same as around "xla"'s core.
    marked("test_unused_places_of_a_state_may_hold_nan", WITH_UNUSED),
)
def test_unused_places_of_a_state_may_hold_nan(mechanism, implementation, sizes):
    """They change nothing, to the bit: no output, no used place, and no gradient of either."""
    args, cotangents = inputs(mechanism, sizes, implementation.dtypes[0])
    name, unused = mechanism.state[0], mechanism.unused

    def run(number):
        given = args | {name: unused(args[name], number)}
        # Kernels' gradients are those of the same masked arrays, and take the interpreter long.
        ids = one_segment(implementation, sizes)
        if implementation.choice(False, True):
            (o, state), gradients = forward(mechanism, implementation, given, ids), None
        else:
            run = value_and_vjp(mechanism, implementation, given, cotangents, ids)
            (o, state), gradients = run
        return o, unused(state, 0), gradients

    zeros = run(0)
    chex.assert_tree_all_finite(zeros)
    assert_same_bits(run(np.nan), zeros)


@pytest.mark.parametrize("mechanism, implementation, sizes", WITH_UNUSED)
def test_unused_places_of_a_steps_state_may_hold_nan(mechanism, implementation, sizes):
    args, cotangents = inputs(mechanism, sizes, implementation.dtypes[0])
    token = {name: args[name][:, 0] for name in mechanism.tokenwise()}
    token |= {name: args[name] for name in mechanism.shared()}
    name, unused = mechanism.state[1], mechanism.unused
    cotangents = cotangents[0][:, 0], cotangents[1]
    step = functools.partial(mechanism.step, implementation=implementation.name)

    compiled = jax.jit(lambda given: with_gradients(lambda a: step(**a), given, cotangents))

    def run(number):
        given = token | {name: unused(args[mechanism.state[0]], number)}
        (o, state), gradients = jax.device_get(compiled(given))
        return o, unused(state, 0), gradients

    with implementation.context():
        zeros, got = run(0.0), run(np.nan)
    chex.assert_tree_all_finite(zeros)
    assert_same_bits(got, zeros)
