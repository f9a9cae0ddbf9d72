"""Time over devices, from docs/contract.md: each device has a piece of every sequence."""

import dataclasses
import functools
import importlib
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from harness import (
    assert_agrees,
    assert_close,
    assert_same_bits,
    definition,
    floats,
    inputs,
    is_float,
    on_floats,
    with_gradients,
)
from jax.sharding import AxisType, NamedSharding, PartitionSpec
from mechanisms import MECHANISMS
from table import put
from test_transforms import specs

import jla
from jla._dispatch import BACKENDS

P = PartitionSpec
BY_NAME = {m.name: m for m in MECHANISMS}
# PaTH exchanges heads where the devices divide them; here they do not, and keys move.
RING = dataclasses.replace(BY_NAME["path"])
LABELS = [(m.name, m) for m in MECHANISMS] + [("path_ring", RING)]
# "xla" shows that the pieces fit together. The others run the same exchange around other runs, and
# each takes many seconds: the definition's program is large, the kernels are interpreted. Where
# PaTH exchanges heads, each device then runs whole sequences, as other tests do.
ROWS = [
    pytest.param(
        m,
        m.form(name),
        id=f"{label}-{name}",
        marks=[pytest.mark.slow] * (name != "xla" or label == "path"),
    )
    for label, m in LABELS
    for name in ("xla", "reference")
]
KERNELS = [
    pytest.param(m, i, id=f"{label}-{i.name}", marks=pytest.mark.slow)
    for label, m in LABELS
    for i in m.implementations
    if i.interpreted
]
ON_GPUS = [
    pytest.param(m, i.compiled(), id=f"{label}-{i.name}", marks=pytest.mark.gpu)
    for label, m in LABELS
    for i in m.implementations
    if i.name in BACKENDS
]
CUT = [x for x in KERNELS if x.id in ("gsa-triton", "mesa-triton")]
# What one of these functions shows, all do; but each has places where it could go wrong alone.
XLA = [pytest.param(m, m.form("xla"), id=f"{label}-xla") for label, m in LABELS]
SLOW_XLA = [pytest.param(*row.values, id=row.id, marks=pytest.mark.slow) for row in XLA]


def devices_for(mechanism, sizes, most=4):
    """As many as take part; where PaTH exchanges heads, it has few."""
    return min(most, sizes["H"]) if mechanism is BY_NAME["path"] else most


def borders(B, T, size):
    """Segment ids of B rows. In the first, a border inside a piece, one between two pieces, a
    segment over three, and ids that come again; in the second, a segment that continues the state
    past whole pieces, two borders in one piece, and equal ids on both sides of an edge."""
    L, time = T // size, np.arange(T)
    first = np.searchsorted([L // 2, L, T - L // 2], time, side="right")
    second = np.searchsorted([T // 2 + 3, T // 2 + 5, T - L + 2], time, side="right")
    return np.stack([first % 2, second])[np.arange(B) % 2].astype(np.int32)


def given(mechanism, sizes, dtype="float32", *, state=True, seed=0):
    """Arguments and cotangents; without the state if there is to be none, or the mechanism takes
    none over devices."""
    args, (output, of_state) = inputs(mechanism, sizes, dtype, seed)
    if not mechanism.always_returns_state:
        of_state = None
    if of_state is None or not state:
        del args[mechanism.state[0]]
    return args, (output, of_state)


def placements(mechanism, args, cotangents, letters):
    """PartitionSpecs of the arguments and of the results; `letters` maps T, B, ... to mesh axes."""
    axes, outputs = (specs(x, letters) for x in (mechanism.axes, mechanism.outputs))
    outputs = outputs if cotangents[1] is not None else (outputs[0], None)
    return {name: axes[name] for name in args}, outputs


_programs = {}


def program(mechanism, implementation, size, args, cotangents, ids, **options):
    """The compiled values and gradients of a run in shard_map over `size` devices."""
    key = (mechanism.name, implementation.name, size, ids is None, *options.items())
    key += tuple((x.shape, str(x.dtype)) for x in jax.tree.leaves((args, cotangents)))
    if key not in _programs:
        mesh = jax.make_mesh((size,), ("seq",), (AxisType.Auto,), devices=jax.devices()[:size])
        in_specs, out_specs = placements(mechanism, args, cotangents, {"T": "seq"})
        of_ids = None if ids is None else P(None, "seq")
        run = functools.partial(mechanism.run, implementation=implementation.name, **options)
        sharded = jax.shard_map(
            lambda args, ids: run(**args, segment_ids=ids, axis_name="seq"),
            mesh=mesh,
            in_specs=(in_specs, of_ids),
            out_specs=out_specs,
        )

        def both(args, cotangents, ids):
            return with_gradients(lambda args: sharded(args, ids), args, cotangents)

        places = jax.tree.map(lambda spec: NamedSharding(mesh, spec), (in_specs, out_specs, of_ids))
        _programs[key] = jax.jit(both, in_shardings=places).lower(args, cotangents, ids).compile()
    return _programs[key]


def over_time(*case, **options):
    """Values and gradients over devices; the arguments of `program`."""
    return jax.device_get(program(*case, **options)(*case[3:]))


def assert_is_unsharded(mechanism, dtype, got, args, cotangents, ids):
    values, gradients = definition(mechanism, args, cotangents, ids)
    assert_agrees(mechanism, dtype, got, (values, gradients))


def packed_case(mechanism, implementation):
    """What the tests of one compiled program share."""
    sizes = implementation.sizes
    size = devices_for(mechanism, sizes)
    args, cotangents = given(mechanism, sizes)
    return size, args, cotangents, borders(sizes["B"], sizes["T"], size)


@pytest.mark.parametrize("mechanism, implementation", ROWS)
def test_packed_is_the_unsharded(mechanism, implementation):
    """Values, the last state and all gradients, with segments over any edge and a state."""
    size, *case = packed_case(mechanism, implementation)
    got = over_time(mechanism, implementation, size, *case)
    assert_is_unsharded(mechanism, "float32", got, *case)


@pytest.mark.parametrize("mechanism, implementation", ON_GPUS)
def test_two_gpus_are_the_unsharded(mechanism, implementation):
    """Values and gradients at full size, with segments over the edge and a state, and the same bits
    twice."""
    if jax.device_count() < 2:
        pytest.skip("needs 2 GPUs")
    sizes, dtype = dict(implementation.full), implementation.dtypes[0]
    if mechanism is RING:
        sizes |= dict(H=1)
    args, cotangents = given(mechanism, sizes, dtype)
    case = args, cotangents, borders(sizes["B"], sizes["T"], 2)
    got, again = (over_time(mechanism, implementation, 2, *case) for _ in range(2))
    assert_same_bits(got, again)
    assert_is_unsharded(mechanism, dtype, got, *case)


@pytest.mark.parametrize("mechanism, implementation", ROWS)
def test_later_devices_move_no_earlier_output(mechanism, implementation):
    """Not by a bit, and not even if all of their tokens are NaN. PaTH's devices have whole rows, in
    which NaN may reach the tokens of its chunk."""
    size, args, cotangents, ids = packed_case(mechanism, implementation)
    (o, _), _ = over_time(mechanism, implementation, size, args, cotangents, ids)
    start = ids.shape[1] - ids.shape[1] // size
    by_heads = mechanism is BY_NAME["path"]
    changed = {
        n: put(x, np.s_[:, start:], (mechanism.later(n, x) if by_heads else x + np.nan)[:, start:])
        for n, x in args.items()
        if n in mechanism.tokenwise()
    }
    (got, _), _ = over_time(mechanism, implementation, size, args | changed, cotangents, ids)
    assert_same_bits(got[:, :start], o[:, :start])
    assert np.all(got[:, start:] != o[:, start:])


@pytest.mark.parametrize("mechanism, implementation", ROWS)
def test_strong_gates_at_the_edges(mechanism, implementation):
    size, args, cotangents, ids = packed_case(mechanism, implementation)
    L = ids.shape[1] // size
    g = put(put(args["g"], np.s_[:, L - 1], -30.0), np.s_[:, L, ..., ::2], -1e4)
    args |= dict(g=put(g, np.s_[:, -L], -1e4))
    got = over_time(mechanism, implementation, size, args, cotangents, ids)
    assert_is_unsharded(mechanism, "float32", got, args, cotangents, ids)


COLLECTIVES = "all-gather|all-to-all|collective-permute|all-reduce|reduce-scatter"


# Elements that a device says of its piece, for each row: docs/scale.md's bytes by 4.
SUMMARIES = {
    "kda": lambda HV, K, V, **_: HV * K * (K + V),
    "gsa": lambda H, K, V, M, **_: H * M * (1 + K + V),
    "log_linear": lambda H, K, V, L, **_: H * (1 + L * K * V),
    "mesa": lambda H, K, V, **_: H * (1 + K * K + K * V),
}


@pytest.mark.parametrize("mechanism, implementation", [x for x in ROWS if "xla" in x.id])
def test_devices_exchange_states_and_no_tokens(mechanism, implementation):
    """One all-gather forward and its mirror backward; three integers a row; sums of what all
    devices have: the last state, and gradients of what they share."""
    size, args, cotangents, ids = packed_case(mechanism, implementation)
    text = program(mechanism, implementation, size, args, cotangents, ids).as_text()
    found = re.findall(rf"= (.*?) ({COLLECTIVES})[\w-]*\(", text)
    kinds = sorted(kind for _, kind in found)
    B, T = ids.shape
    if mechanism is BY_NAME["path"]:
        tokens = sum(x.ndim > 2 for x in args.values())
        assert kinds == ["all-gather"] + (2 * (tokens + 1)) * ["all-to-all"]
        assert [x.split("{")[0] for x, kind in found if kind == "all-gather"] == [f"s32[{B},{T}]"]
        return
    if mechanism is RING:
        assert_keys_move(kinds, found, args, size)
        return
    positions = mechanism is BY_NAME["log_linear"]  # a sum of its own, of integers
    assert kinds == ["all-gather"] * 2 + ["all-reduce"] * (1 + positions) + ["reduce-scatter"]
    sizes = {
        n for x, _ in found for shape in re.findall(r"\[([\d,]*)\]", x) for n in shape.split(",")
    }
    assert not sizes & {str(T), str(T // size)}
    # The all-gather of states, and its mirror; the sums and the ids are smaller than a state.
    L = args["level_scales"].shape[-1] if positions else None
    one = B * SUMMARIES[mechanism.name](**dict(implementation.sizes) | dict(L=L))
    elements = [(kind, sum(map(count, re.findall(r"\[([\d,]*)\]", x)))) for x, kind in found]
    assert {x for x in elements if x[0] == "reduce-scatter"} == {("reduce-scatter", one)}
    assert max(n for kind, n in elements if kind == "all-gather") == size * one
    assert min(n for kind, n in elements if kind == "all-gather") == 3 * size * B


def count(shape):
    return int(np.prod([int(n) for n in shape.split(",") if n]))


def assert_keys_move(kinds, found, args, size):
    """To each right neighbour, device by device: keys and values, and their gates. Backward the
    same once more, and their gradients in the other direction; nothing else has tokens."""
    B, T, H, K = args["k"].shape
    L, V, HQ = T // size, args["v"].shape[-1], args["q"].shape[2]
    assert kinds == ["all-gather"] + 6 * ["collective-permute"]  # each in a loop over devices
    (ids,) = (x.split("{")[0] for x, kind in found if kind == "all-gather")
    assert ids == f"s32[{size},3,{B}]"
    moved = [x.split("{")[0] for x, kind in found if kind == "collective-permute"]
    shapes = f"f32[{B},{L},{H},{K + V}]", f"f32[{B},{L},{HQ}]"
    assert [moved.count(x) for x in shapes] == [3, 3]


@pytest.mark.parametrize("mechanism, implementation", SLOW_XLA)
@pytest.mark.parametrize("size", [3, 4])
def test_one_sequence_without_a_state(mechanism, implementation, size):
    """A number of devices that is no power of two, too."""
    sizes = dict(implementation.sizes) | dict(T=96 if size == 3 else 100)
    if mechanism is BY_NAME["path"]:
        sizes |= dict(H=size, HQ=2 * size)
    if mechanism is RING:
        size, sizes["H"] = (2, 1) if size == 4 else (size, sizes["H"])
    args, cotangents = given(mechanism, sizes, state=False)
    got = over_time(mechanism, implementation, size, args, cotangents, None)
    empty = jax.tree.map(np.zeros_like, inputs(mechanism, sizes)[0][mechanism.state[0]])
    whole = args if cotangents[1] is None else args | {mechanism.state[0]: empty}
    values, gradients = definition(mechanism, whole, cotangents)
    gradients = {name: gradients[name] for name in args}
    assert_agrees(mechanism, "float32", got, (values, gradients))


@pytest.mark.slow  # the aligned form's own program, as many seconds as the general one's
def test_log_linear_with_pieces_that_are_nodes_of_the_tree():
    """The end of all levels, too: 64 tokens fill 7 of them."""
    mechanism = BY_NAME["log_linear"]
    sizes = dict(mechanism.form("xla").sizes) | dict(T=64)
    args, cotangents = given(mechanism, sizes, state=False)
    for size, L in ((4, 7), (4, 9), (2, 7)):
        cut = args | dict(level_scales=args["level_scales"][..., :L])
        of_state = cotangents[1]._replace(levels=cotangents[1].levels[:, :, :L])
        case = cut, (cotangents[0], of_state)
        got = over_time(mechanism, mechanism.form("xla"), size, *case, None)
        start = jax.tree.map(np.zeros_like, of_state)
        values, gradients = definition(mechanism, cut | dict(initial_state=start), case[1])
        del gradients["initial_state"]
        assert_agrees(mechanism, "float32", got, (values, gradients))


@pytest.mark.parametrize("packed", [True, False])
@pytest.mark.slow  # GSA's program once more, behind one more exchange
def test_abc(packed):
    """Its normaliser goes from device to device as well."""
    mechanism = BY_NAME["gsa"]
    sizes = mechanism.form("xla").sizes
    args, cotangents = given(mechanism, sizes, state=False)
    del args["g"]
    args["s"] = 3 * np.log(args["s"])
    ids = borders(sizes["B"], sizes["T"], 4) if packed else None
    got = over_time(mechanism, mechanism.form("xla"), 4, args, cotangents, ids)
    want = definition(mechanism, args, cotangents, ids)
    assert_agrees(mechanism, "float32", got, want)


@pytest.mark.parametrize("mechanism, implementation", SLOW_XLA)
def test_16_bits(mechanism, implementation):
    size, *_, ids = packed_case(mechanism, implementation)
    case = *given(mechanism, implementation.sizes, "bfloat16"), ids
    got = over_time(mechanism, implementation, size, *case)
    assert_is_unsharded(mechanism, "bfloat16", got, *case)


@pytest.mark.parametrize("mechanism, implementation", KERNELS)
def test_kernels_over_a_mapped_axis(mechanism, implementation):
    """Interpreted kernels do not run on several devices, but exchanges work over vmap's axes too:
    the pieces are rows to the kernels."""
    sizes = dict(implementation.sizes)
    if mechanism is BY_NAME["path"]:
        sizes |= dict(H=2, HQ=2)
    size = devices_for(mechanism, sizes)
    assert_mapped_is_unsharded(mechanism, implementation, implementation.dtypes[0], sizes, size)


@pytest.mark.parametrize("mechanism, implementation", CUT)
def test_devices_cut_their_pieces(mechanism, implementation, monkeypatch):
    """As they do with few heads and more tokens than an interpreter takes."""
    monkeypatch.setattr(importlib.import_module("jla.triton.pieces"), "SHORTEST", 1)
    sizes = dict(implementation.sizes) | dict(B=2, T=260)
    assert_mapped_is_unsharded(mechanism, implementation, "bfloat16", sizes, 2)


def assert_mapped_is_unsharded(mechanism, implementation, dtype, sizes, size):
    args, cotangents = given(mechanism, sizes, dtype)
    ids = borders(sizes["B"], sizes["T"], size)
    tokenwise = mechanism.tokenwise()

    def cut(x):
        return np.moveaxis(x.reshape(x.shape[0], size, -1, *x.shape[2:]), 1, 0)

    def joined(x):
        return np.moveaxis(x, 0, 1).reshape(x.shape[1], -1, *x.shape[3:])

    pieces = {n: cut(x) if n in tokenwise else x for n, x in args.items()}
    # The state is the same everywhere; its cotangent is given to one piece.
    of_state = jax.tree.map(lambda x: np.stack([x] + [0 * x] * (size - 1)), cotangents[1])
    run = functools.partial(mechanism.run, implementation=implementation.name, axis_name="seq")

    def both(args, cotangents, ids):
        return with_gradients(lambda a: run(**a, segment_ids=ids), args, cotangents)

    axes = {n: 0 if n in tokenwise else None for n in args}
    mapped = jax.jit(jax.vmap(both, in_axes=(axes, 0, 0), axis_name="seq"))
    with implementation.context():
        out = jax.device_get(mapped(pieces, (cut(cotangents[0]), of_state), cut(ids)))
    (o, state), gradients = out
    state = jax.tree.map(lambda x: x[0], state)
    gradients = {
        n: joined(x) if n in tokenwise else jax.tree.map(lambda y: y.sum(0), x)
        for n, x in gradients.items()
    }
    got = (joined(o), state), gradients
    assert_is_unsharded(mechanism, dtype, got, args, cotangents, ids)


def on_mesh(mechanism, kind, letters, dtype="float32", shape=(2, 2, 2), **edits):
    """A mesh, and a case whose arrays can be placed on it as the letters say."""
    names = ("data", "seq", "model")
    mesh = jax.make_mesh(shape, names, (kind,) * 3, devices=jax.devices()[: np.prod(shape)])
    sizes = dict(mechanism.form("xla").sizes) | dict(B=2, T=20) | edits
    args, cotangents = given(mechanism, sizes, dtype)
    heads = {h: letters.get("H") for h in ("H", "HQ", "HV", "HK") if sizes.get(h, 1) > 1}
    places = placements(mechanism, args, cotangents, letters | heads)
    return mesh, args, cotangents, places


SHARDED = [
    pytest.param(dict(B="data", T="seq", H="model"), id="BTH"),
    pytest.param(dict(T="seq"), id="T", marks=pytest.mark.slow),
    pytest.param(dict(B="data", H="model"), id="BH", marks=pytest.mark.slow),
]


# Of the kernels, those whose gradients are made by a rule.
TRACED = XLA + [
    pytest.param(BY_NAME[name], BY_NAME[name].form(form), id=f"{name}-{form}")
    for name in ("kda", "gsa", "mesa")
    for form in ("pallas", "triton")
]


@pytest.mark.parametrize("kind", [AxisType.Auto, AxisType.Explicit], ids=lambda kind: kind.name)
@pytest.mark.parametrize("letters", SHARDED)
@pytest.mark.parametrize("mechanism, implementation", TRACED)
def test_sharded_traces(mechanism, implementation, letters, kind):
    """Whole arrays on a mesh of either kind: all types fit, those of the gradients too."""
    dtype = implementation.dtypes[0]
    mesh, args, cotangents, places = on_mesh(mechanism, kind, letters, dtype, H=4, HQ=4)
    run = jla.sharded(mechanism.run, **letters)
    ids = np.zeros(args["q"].shape[:2], np.int32)

    def both(args, cotangents):
        run_ = functools.partial(run, segment_ids=ids, implementation=implementation.name)
        return with_gradients(lambda args: run_(**args), args, cotangents)

    with implementation.context(), jax.set_mesh(mesh):
        shardings = jax.tree.map(lambda spec: NamedSharding(mesh, spec), places)
        shapes = jax.tree.map(
            lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s),
            (args, cotangents),
            shardings,
        )
        (outputs, gradients) = jax.eval_shape(both, *shapes)
    assert jax.tree.map(jnp.shape, outputs) == jax.tree.map(jnp.shape, cotangents)
    assert jax.tree.map(jnp.shape, gradients) == jax.tree.map(jnp.shape, args)


@pytest.mark.parametrize("kind", [AxisType.Auto, AxisType.Explicit], ids=lambda kind: kind.name)
@pytest.mark.parametrize("letters", SHARDED)
@pytest.mark.parametrize("mechanism, implementation", SLOW_XLA)
def test_sharded_is_the_unsharded(mechanism, implementation, letters, kind):
    mesh, args, cotangents, places = on_mesh(mechanism, kind, letters, H=4, HQ=4)
    run = jla.sharded(mechanism.run, **letters)
    ids = borders(2, 20, 2)

    @jax.jit
    def both(args, cotangents):
        run_ = functools.partial(run, segment_ids=ids, implementation=implementation.name)
        return with_gradients(lambda args: run_(**args), args, cotangents)

    shardings = jax.tree.map(lambda spec: NamedSharding(mesh, spec), places)
    with jax.set_mesh(mesh):
        got = jax.device_get(both(*jax.device_put((args, cotangents), shardings)))
    assert_is_unsharded(mechanism, "float32", got, args, cotangents, ids)


@pytest.mark.parametrize("mechanism, implementation", XLA)
def test_forward_mode_traces(mechanism, implementation):
    """As without `axis_name`; `jax.linearize`, for reverse mode would not need the rule."""
    mesh, args, cotangents, places = on_mesh(
        mechanism, AxisType.Auto, {"T": "seq"}, shape=(1, 2, 1), H=2, HQ=2
    )
    of_floats = on_floats(inside(mechanism, mesh, places, axis_name="seq"), args)

    def tangents(x):
        return jax.linearize(of_floats, x)[1](x)

    found = jax.eval_shape(tangents, floats(args))
    assert jax.tree.map(jnp.shape, found) == jax.tree.map(jnp.shape, floats(cotangents))


@pytest.mark.slow  # forward and reverse mode both compile
@pytest.mark.parametrize("mechanism, implementation", XLA)
def test_forward_mode_is_the_unsharded(mechanism, implementation):
    mesh, args, _, places = on_mesh(
        mechanism, AxisType.Auto, {"T": "seq"}, shape=(1, 2, 1), H=2, HQ=2
    )
    tangents = jax.tree.map(lambda x: np.cos(5 * x) if is_float(x) else x, args)
    sharded = inside(mechanism, mesh, places, axis_name="seq")

    def jvp(run):
        of_floats = on_floats(run, args)
        return jax.jit(lambda x, t: jax.jvp(of_floats, (x,), (t,)))(floats(args), floats(tangents))

    whole = functools.partial(mechanism.run, implementation="reference")
    assert_close(jvp(sharded), jvp(lambda args: whole(**args)), mechanism.tolerances["float32"][1])


def inside(mechanism, mesh, places, **options):
    """A run inside a shard_map over all of a mesh."""
    return jax.shard_map(
        lambda args: mechanism.run(**args, implementation="xla", **options),
        mesh=mesh,
        in_specs=(places[0],),
        out_specs=places[1],
    )


@pytest.mark.parametrize("mechanism, implementation", XLA)
def test_wrong_axes_raise(mechanism, implementation):
    """Each by name, before anything runs."""
    name = f"jla.{mechanism.run.__name__}"
    mesh, args, _, places = on_mesh(mechanism, AxisType.Auto, {"T": "seq"}, H=3, HQ=3, HV=3)

    def refused(error, match, call, *given, **options):
        with pytest.raises(error, match=match):
            call(*given, **options)

    axis = rf"{name}: axis_name must be a manual axis .*none.* got 'seq'.*shard_map over 'seq'"
    refused(ValueError, axis, mechanism.run, **args, axis_name="seq")
    refused(TypeError, rf"{name}: axis_name .*string.*int", mechanism.run, **args, axis_name=1)
    other = inside(mechanism, mesh, places, axis_name="time")
    refused(ValueError, "manual here: 'data', 'seq', 'model'.*got 'time'", other, args)
    run = jla.sharded(mechanism.run, T="seq")
    refused(ValueError, "jla.sharded: no mesh is set.*jax.set_mesh", run, **args)
    odd = {n: x[:, :15] if n in mechanism.tokenwise() else x for n, x in args.items()}
    with jax.set_mesh(mesh):
        of_T = "T = 15 must be a multiple of the 2 devices of 'seq'; pad to 16"
        refused(ValueError, of_T, run, **odd)
        heads = jla.sharded(mechanism.run, H="model")
        refused(ValueError, "= 3 must be a multiple of the 2 devices of 'model'", heads, **args)
        missing = jla.sharded(mechanism.run, B="rows")
        refused(
            ValueError, "B must be an axis of the mesh, one of 'data'.* got 'rows'", missing, **args
        )
        refused(TypeError, "axis_name must not be given", run, **args, axis_name="seq")
    refused(TypeError, "function must be one of jla.kda, .* got", jla.sharded, mechanism.step)


@pytest.mark.parametrize("mechanism, implementation", XLA)
def test_split_time_raises_where_types_carry_shardings(mechanism, implementation):
    """It would be gathered; under automatic axes nothing tells."""
    mesh, args, _, places = on_mesh(mechanism, AxisType.Explicit, {"T": "seq"})
    with jax.set_mesh(mesh):
        shardings = jax.tree.map(lambda spec: NamedSharding(mesh, spec), places[0])
        placed = jax.device_put(args, shardings)
        message = r"q has T split over .* 'seq'.* jla.sharded\(\.\.\., T='seq'\)"
        with pytest.raises(ValueError, match=message):
            mechanism.run(**placed, implementation=implementation.name)
