"""Sharded without gathers (docs/contract.md): the axes that each kernel states for its operands.

Kernels run on no mesh of CPU devices, but their strings of axis letters do: in the place of each
kernel a plain function works row by row and head by head as they say, and any wrong cut changes its
values.
"""

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from harness import shapes, with_gradients
from jax.sharding import AxisType, NamedSharding, PartitionSpec
from mechanisms import MECHANISMS
from test_sharded_kernels import sizes_of

import jla.pallas
from jla._core import shardwise
from jla._dispatch import BACKENDS
from jla.pallas import log_linear
from jla.pallas.kda import gate
from jla.pallas.layers import gated_norm, rms_norm, short_convolution

f32, bf16 = jnp.float32, jnp.bfloat16
B = 4
LETTERS = ("H", "HV", "HQ")


def of_mechanism(mechanism, entry):
    """Everything there is, with one key head; a length that no other test has, for what JAX has
    traced before it does not call again."""
    sizes, dtype = sizes_of(mechanism, entry.sizes, 1, B=1, T=19), entry.dtypes[0]
    state, state_of_step = mechanism.state
    run = functools.partial(mechanism.run, implementation=entry.name)

    def trace(args):
        tokens = {name: args[name][:, 0] for name in mechanism.tokenwise()}
        shared = {name: args[name] for name in mechanism.shared()}
        given = {state_of_step: args[state], "implementation": entry.name}
        mechanism.step(**tokens, **shared, **given)
        differentiate(lambda args: run(**args), args)
        if not mechanism.always_returns_state:  # it has kernels of its own without one
            args = {name: x for name, x in args.items() if name != state}
            differentiate(lambda args: run(**args)[0], args)

    return trace, (shapes(mechanism, sizes, dtype),)


def differentiate(run, args):
    outputs = jax.eval_shape(run, args)
    cotangents = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), outputs)
    with_gradients(run, args, cotangents)


def of_layers():
    """The layers' own kernels, each with the arrays that it can have."""
    x, heads, features = shape(1, 19, 2, 64, dtype=bf16), shape(2, 64), shape(64)
    coefficients, borders, dg = shape(1, 3, 2, 64), shape(1, 64), shape(1, 64, 2, 64)
    norm, branch, gated = (
        functools.partial(run, epsilon=1e-5)
        for run in (rms_norm.rms_norm, rms_norm.rms_norm_branch, gated_norm.gated_norm)
    )
    convolve = functools.partial(short_convolution.short_convolution, normalize=True)

    def trace(x, heads, features, taps, coefficients, borders, dg):
        for run, *args in (
            (norm, x, features),
            (norm, x, heads, x, heads),
            (branch, x, heads, x),
            (gated, x, x, heads),
            (convolve, x, taps),
        ):
            differentiate(lambda args, run=run: (run(*args),), tuple(args))
        for given in (None, borders):
            gate.decay_operand(x, coefficients, given, bounded=True)
            gate.gradients(x, coefficients, given, dg, bounded=True)

    return trace, (x, heads, features, shape(4, 2, 64), coefficients, borders, dg)


def of_mamba2():
    """As its layer calls log-linear attention, with segments and enough tokens for a tree."""
    keys, values = shape(1, 600, 1, 64, dtype=bf16), shape(1, 600, 2, 64, dtype=bf16)
    per_head = shape(1, 600, 2)
    segment_ids = jnp.zeros((1, 600), jnp.int32)

    def trace(*args):
        differentiate(lambda args: (log_linear.log_linear_mamba2(*args, segment_ids),), args)

    return trace, (keys, keys, values, per_head, shape(1, 600, 2, 11), per_head, shape(2))


def shape(*sizes, dtype=f32):
    return jax.ShapeDtypeStruct(sizes, dtype)


WITH_KERNELS = {(m.name, x): m for m in MECHANISMS for x in BACKENDS if m.form(x)}
ENTRIES = {
    f"{name}-{backend}": functools.partial(of_mechanism, mechanism, mechanism.form(backend))
    for (name, backend), mechanism in WITH_KERNELS.items()
}
ENTRIES |= dict(mamba2=of_mamba2, layers=of_layers)
# The mesh's axes for rows and for heads, of the first operand and of the others.
ROWS_AND_HEADS = (("x", "y"), ("x", "y"))
HEADS = ((None, ("x", "y")), (None, ("x", "y")))
MIXED = (("y", None), ("x", "y"))


def groupings():
    """Key heads, value or query heads, and the placements; tests/test_shardwise.py has more."""
    for name in ENTRIES:
        marks = [pytest.mark.interpreted] * name.endswith("-triton")
        row = functools.partial(pytest.param, name, marks=marks)
        if name == "layers" or name.startswith("mesa"):
            yield row((4, 4), (MIXED,), id=f"{name}-4 of 4")
            continue
        every = (ROWS_AND_HEADS, HEADS, MIXED)
        yield row((1, 4), (ROWS_AND_HEADS, MIXED), id=f"{name}-1 of 4")
        # A key head for two devices, which have value heads of their own.
        yield row((2, 4), (HEADS,), id=f"{name}-2 of 4")
        for heads in ((1, 4), (2, 4), (4, 8)):
            label = f"{name}-{heads[0]} of {heads[1]}, every placement"
            yield row(heads, every, id=label, marks=[*marks, pytest.mark.slow])


@functools.cache
def calls(name):
    """The axis letters of all calls, (operands, results) each."""
    trace, args = ENTRIES[name]()
    found, call = {}, shardwise._Call

    def recorded(function, operands, results, sizes):
        found[operands, results] = None
        return call(function, operands, results, sizes)

    with pytest.MonkeyPatch.context() as patch, jla.pallas.interpret():
        patch.setattr(shardwise, "_Call", recorded)
        jax.eval_shape(trace, *args)
    # Of two that differ by the results at the end alone one will do.
    return [
        (operands, results)
        for operands, results in found
        if not any(x == operands and y[: len(results)] == results != y for x, y in found)
    ]


def heads_of(axes):
    return next((letter for letter in axes.split() if letter in LETTERS), None)


def stand_in(xp, arrays, operands, results):
    """Each row and head of a result is a weighted sum of that row and head of all operands; a key
    head's, of its group. All other axes have one place: nothing here splits them."""
    totals = {}
    for i, (x, axes) in enumerate(zip(arrays, operands, strict=True)):
        heads = heads_of(axes)
        x = math.sin(3 * i + 1) * x.reshape(x.shape[0], -1)
        totals[heads] = totals[heads] + x if heads in totals else x
    grouped = next((letter for letter in ("HV", "HQ") if letter in totals), "H")
    group = totals[grouped].shape[1] // totals["H"].shape[1]
    rows = totals.pop(None, 0.0)
    seen = {None: rows, grouped: rows + totals[grouped]}
    if grouped != "H":
        of_group = totals[grouped].reshape(len(totals["H"]), -1, group)
        of_group = sum(math.cos(i) * of_group[..., i] for i in range(group))
        seen["H"] = rows + totals["H"] + of_group
        seen[grouped] += xp.repeat(totals["H"], group, axis=1)

    def result(r, axes):
        x = (r + 1.0) * seen[heads_of(axes)]
        sizes = {"B": x.shape[0], heads_of(axes): x.shape[1]}
        return x.reshape([sizes.get(letter, 1) for letter in axes.split()])

    return tuple(result(r, axes) for r, axes in enumerate(results))


def place(mesh, axes, sizes, rows, heads):
    """Heads that are fewer than devices are on all of them."""
    names = [{"B": rows, heads_of(axes): heads}.get(letter) for letter in axes.split()]
    parts = [math.prod(mesh.shape[n] for n in name or ()) for name in names]
    sizes = [sizes.get(letter, 1) for letter in axes.split()]
    spec = [name if n % m == 0 else None for name, n, m in zip(names, sizes, parts, strict=True)]
    return NamedSharding(mesh, PartitionSpec(*spec))


@pytest.mark.parametrize("name, heads, placements", list(groupings()))
def test_kernels_are_cut_as_their_letters_say(name, heads, placements):
    mesh = jax.make_mesh((2, 2), ("x", "y"), (AxisType.Auto,) * 2, devices=jax.devices("cpu")[:4])
    sizes = dict(B=B, H=heads[0], HV=heads[1], HQ=heads[1])
    wrapped, placed, arguments, want = [], [], [], []
    for operands, results in calls(name):
        shapes = [[sizes.get(letter, 1) for letter in axes.split()] for axes in operands]
        random = np.random.default_rng(0)
        arrays = [random.standard_normal(shape, np.float32) for shape in shapes]

        def function(*arrays, operands=operands, results=results):
            return stand_in(jnp, arrays, operands, results)

        for first, others in placements:
            places = [first, *[others] * (len(operands) - 1)]
            wrapped.append(shardwise.shardwise(function, operands, results))
            placed.append(
                [place(mesh, x, sizes, *to) for x, to in zip(operands, places, strict=True)]
            )
            arguments.append(arrays)
            want.append(stand_in(np, arrays, operands, results))
    assert wrapped

    def together(arguments):
        return [run(*arrays) for run, arrays in zip(wrapped, arguments, strict=True)]

    got = jax.jit(together, in_shardings=(placed,))(arguments)
    close = functools.partial(np.testing.assert_allclose, rtol=1e-5, atol=1e-6)
    jax.tree.map(close, jax.device_get(got), want)
