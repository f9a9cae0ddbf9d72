"""`jla.checking`: wrong values are reported by function and argument, and only where it is on."""

import functools
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from harness import cut, inputs, is_float
from jax.sharding import AxisType, PartitionSpec
from mechanisms import MECHANISMS

import jla
from jla import _fused

# The argument of which a mechanism wants rows of length 1, and the largest beta it takes.
UNIT = {"kda": "k", "path": "w"}
MOST_BETA = {"kda": 2, "path": 2}
each_mechanism = pytest.mark.parametrize("mechanism", MECHANISMS, ids=lambda m: m.name)
each_form = pytest.mark.parametrize("form", ["run", "step"])
KDA = MECHANISMS[0]


@pytest.fixture
def nothing_runs(monkeypatch):
    """What is checked comes before the mechanism, which takes long to compile: it returns q."""
    for mechanism in MECHANISMS:
        module = sys.modules[mechanism.run.__module__]
        monkeypatch.setattr(module, "choose", lambda *_: lambda q, *_, **__: (q, None))


def arguments(mechanism, form):
    """Good arguments, as NumPy arrays: two tokens of a run, or one of a step."""
    args, _ = inputs(mechanism, mechanism.implementations[0].sizes)
    args = jax.tree.map(np.array, args)
    if form == "run":
        return cut(mechanism, args, 0, 2)
    args[mechanism.state[1]] = args.pop(mechanism.state[0])
    return {n: x[:, 0] if n in mechanism.tokenwise() else x for n, x in args.items()}


def runner(mechanism, form):
    return functools.partial(getattr(mechanism, form), implementation="reference")


def public_name(mechanism, form):
    return f"jla.{getattr(mechanism, form).__name__}"


def spoil(mechanism, args, form):
    """Every value wrong that can be, and what is to be reported of each, without the numbers."""
    state = mechanism.state[form == "step"]
    last, first = (-1, -1), (0, 0)
    bad, wanted = dict(args), []
    for name, x in args.items():
        if name == state:
            continue
        bad[name] = x.copy()
        bad[name][last] = np.nan
        wanted.append(f"{name} must be finite, got nan")
    if "g" in args:
        bad["g"][first] = 0.25
        wanted.append("g must be at most 0 (natural-log decays), got 0.25")
    if "beta" in args:
        most = MOST_BETA.get(mechanism.name)
        bad["beta"][first], bad["beta"][0, 1] = -0.5, 7.0
        wanted.append(
            "beta must be at least 0, got -0.5"
            if most is None
            else f"beta must be 0 to {most}, got -0.5 to 7"
        )
    if mechanism.name in UNIT:
        name = UNIT[mechanism.name]
        bad[name][0] *= 3
        wanted.append(f"{name} must have rows of length 1 (or 0): normalise them, got 3")
    fields = dict(args[state]._asdict() if isinstance(args[state], tuple) else {"": args[state]})
    for field, x in fields.items():
        if is_float(x):
            fields[field] = x.copy()
            fields[field][0] = np.inf  # the first row's cache has tokens in it
            wanted.append(f"{state}{'.' * bool(field)}{field} must be finite, got inf")
    bad[state] = type(args[state])(**fields) if isinstance(args[state], tuple) else fields[""]
    return bad, wanted


@each_form
@each_mechanism
def test_reports_by_name_under_jit(mechanism, form, nothing_runs):
    args = arguments(mechanism, form)
    bad, wanted = spoil(mechanism, args, form)
    if mechanism.name == "mesa":
        bad["lamb"][0, 0] = -1.0
        wanted.append("lamb must be above 0, got -1")
    run, name = jax.jit(lambda args: runner(mechanism, form)(**args)), public_name(mechanism, form)
    with pytest.raises(ValueError, match=r"^jla.checking found wrong values:") as caught:
        with jla.checking():
            run(bad)
    lines = str(caught.value).splitlines()[1:]
    lines = [line.strip().partition(" (count")[0] for line in lines]
    assert sorted(lines) == sorted(f"{name}: {text}" for text in wanted)
    with jla.checking():  # the same program
        run(args)


@each_form
@each_mechanism
def test_costs_nothing_where_it_is_off(mechanism, form):
    """The traced program is what it is without, before and after."""
    args, run = arguments(mechanism, form), runner(mechanism, form)

    def program():
        # Another function each time, as jit's cache must not need to tell them apart.
        return str(jax.make_jaxpr(lambda args: run(**args))(args))

    before = program()
    with jla.checking():
        inside = program()
    assert program() == before
    assert "callback" not in before and inside.count("debug_callback[") == 1


def step(args):
    """One token of KDA: the quickest to compile."""
    return jla.kda_step(**args, implementation="reference")[0]


def test_a_jitted_function_is_told_apart(nothing_runs):
    args, traced = arguments(KDA, "step"), []

    @jax.jit
    def run(args):
        traced.append(jla._core.checking.on())
        return step(args)

    run(args)
    with jla.checking():
        run(args)
        run(args)
    run(args)
    assert traced == [False, True]


TRANSFORMS = dict(
    nothing=lambda f: f,
    jit=jax.jit,
    grad=lambda f: jax.jit(jax.grad(lambda args: jnp.sum(f(args)))),
    remat=lambda f: jax.jit(jax.grad(lambda args: jnp.sum(jax.checkpoint(f)(args)))),
    linearize=lambda f: jax.jit(lambda args: jax.linearize(f, args)[0]),
    vmap=lambda f: jax.jit(lambda args: jax.vmap(f)(jax.tree.map(lambda x: x[None], args))),
    scan=lambda f: jax.jit(lambda args: jax.lax.scan(lambda c, _: (c, f(args)), 0, length=2)),
    cond=lambda f: jax.jit(
        lambda args: jax.lax.cond(args["beta"][0, 0] < 9, lambda: f(args), lambda: args["q"])
    ),
    shard_map=lambda f: jax.jit(
        jax.shard_map(
            f,
            mesh=jax.make_mesh((2,), ("B",), (AxisType.Auto,), devices=jax.devices()[:2]),
            in_specs=PartitionSpec("B"),
            out_specs=PartitionSpec("B"),
        )
    ),
)


@pytest.mark.parametrize("transform", TRANSFORMS)
def test_under_transformations(transform, nothing_runs):
    args = arguments(KDA, "step")
    args["g"][-1, -1, -1] = 0.5
    with pytest.raises(ValueError, match=r"jla.kda_step: g must be at most 0 .* got 0.5 \("):
        with jla.checking():
            TRANSFORMS[transform](step)(args)


@pytest.mark.parametrize("kind", [AxisType.Auto, AxisType.Explicit])
def test_sharded_over_heads(kind, nothing_runs):
    args = arguments(KDA, "step")
    args["g"][-1, -1, -1] = 0.5
    mesh = jax.make_mesh((2,), ("H",), (kind,), devices=jax.devices()[:2])
    place = jax.NamedSharding(mesh, PartitionSpec(None, "H"))
    with jax.set_mesh(mesh), pytest.raises(ValueError, match=r"g must be .* got 0.5 \("):
        args = jax.device_put(args, place)
        with jla.checking():
            jax.jit(step)(args)


def test_kernels():
    """The checks stand before them; a kernel that makes the gates itself gives way."""
    args = arguments(KDA, "step")
    args = {n: x.astype(jnp.bfloat16) if n in "qkv" else x for n, x in args.items()}
    args["v"] = jnp.pad(args["v"], ((0, 0), (0, 0), (0, 8)))
    args["state"] = jnp.pad(args["state"], ((0, 0), (0, 0), (0, 0), (0, 8)))
    q, beta = jnp.zeros((1, 2, 1, 64), jnp.bfloat16), jnp.zeros((1, 2, 1))
    gated = functools.partial(_fused.kda_from_projection, implementation="pallas")
    layer = q, q, q, q, jnp.zeros(1), jnp.zeros((1, 64)), beta
    with jla.pallas.interpret():
        assert "debug_callback[" not in str(jax.make_jaxpr(gated)(*layer))
        with jla.checking():
            assert str(jax.make_jaxpr(gated)(*layer)).count("debug_callback[") == 1
            program = jax.make_jaxpr(lambda args: jla.kda_step(**args, implementation="pallas"))
            assert str(program(args)).count("debug_callback[") == 1


def test_unused_places_are_not_looked_at(nothing_runs):
    path, log_linear = (
        next(m for m in MECHANISMS if m.name == name) for name in ("path", "log_linear")
    )
    args = arguments(path, "step")
    cache = args["cache"]
    unused = np.arange(cache.key.shape[1]) >= cache.length[:, None]
    filled = [
        np.where(unused.reshape(*unused.shape, *[1] * (x.ndim - 2)), np.nan, x) for x in cache[:3]
    ]
    with jla.checking():
        run = jax.jit(runner(path, "step"))
        run(**args | dict(cache=jla.PathCache(*filled, cache.length)))
    args = arguments(log_linear, "step")
    state = args["state"]
    levels = np.where(state.levels == 0, np.nan, state.levels)
    with jla.checking():
        run = jax.jit(runner(log_linear, "step"))
        run(**args | dict(state=state._replace(levels=levels)))


def test_rows_that_do_nothing_need_no_length(nothing_runs):
    """Zeros, as the l2 norm of nothing is, and what beta = 0 does not write."""
    args = arguments(KDA, "step")
    args["k"][0] = 0.0
    args["k"][1] *= 5.0
    args["beta"][1] = 0.0
    with jla.checking():
        jax.jit(step)(args)


def test_another_exception_keeps_the_report(nothing_runs):
    args = arguments(KDA, "step")
    args["g"][-1, -1, -1] = 0.5
    with pytest.raises(KeyError) as caught:
        with jla.checking():
            step(args)
            raise KeyError("other")
    assert "g must be at most 0" in caught.value.__notes__[0]
    with jla.checking():  # what was reported is forgotten
        pass
