"""Under JAX's flags (docs/contract.md). Strict promotion of dtypes and ranks is always on here."""

import functools
import re

import chex
import jax
import jax.numpy as jnp
import pytest
from evaluator import assert_no_nan, evaluated
from harness import assert_close, definition, floats, inputs, on_floats, with_gradients
from mechanisms import SMALL, marked

import jla.pallas
from jla._dispatch import BACKENDS


def calls(mechanism, implementation):
    """What a mechanism offers, as functions of its arguments, their cotangents and segments."""
    options = dict(implementation=implementation.name)

    def run(args, segment_ids):
        return mechanism.run(**args, segment_ids=segment_ids, **options)

    def gradients(args, cotangents, segment_ids):
        """And values."""
        return with_gradients(lambda args: run(args, segment_ids), args, cotangents)

    def stateless(args, cotangents, segment_ids):
        """Without what may be left out."""
        few = {n: x for n, x in args.items() if n != mechanism.state[0]}
        some = [few, few | dict.fromkeys(mechanism.optional)]
        return [run(x, ids)[0] for x in some for ids in (None, segment_ids)]

    def step(args, cotangents, segment_ids):
        return mechanism.step(**token(mechanism, args), **options)

    return dict(gradients=gradients, stateless=stateless, step=step)


def token(mechanism, args):
    """The arguments of a step: the first token's."""
    tokens = {n: args[n][:, 0] for n in mechanism.tokenwise()}
    shared = {n: args[n] for n in mechanism.shared()}
    return tokens | shared | {mechanism.state[1]: args[mechanism.state[0]]}


# Pallas's, Triton's, and what stands for one in Triton's interpreter.
KERNEL_CALLS = ("mpmd_map", "triton_kernel_call", "pure_callback")


def kernels(jaxpr):
    """The kernels in a jaxpr, Pallas's and Triton's, as text without addresses."""
    found = []
    for equation in jaxpr.eqns:
        if equation.primitive.name in KERNEL_CALLS:
            found.append(re.sub(r"0x[0-9a-f]+", "", str(equation.params)))
            continue
        for x in jax.tree.leaves(list(equation.params.values())):
            inner = getattr(x, "jaxpr", x)
            found += kernels(inner) if hasattr(inner, "eqns") else []
    return found


@pytest.fixture
def as_on_a_gpu(monkeypatch):
    """Kernels are traced as for a GPU, whether there is one or not."""
    monkeypatch.setattr(jla.pallas, "unsupported_device", lambda: None)


@pytest.mark.parametrize("call", ["gradients", "stateless", "step"])
@pytest.mark.parametrize("mechanism, implementation, sizes", SMALL)
def test_x64_changes_no_dtype_and_no_kernel(mechanism, implementation, sizes, call, as_on_a_gpu):
    args, cotangents = inputs(mechanism, sizes, implementation.dtypes[0])
    function = calls(mechanism, implementation)[call]

    def traced():
        # Of the default integers, 64 bits with the flag.
        ids = jnp.zeros((sizes["B"], sizes["T"]), int)
        return jax.make_jaxpr(function, return_shape=True)(args, cotangents, ids)

    jaxpr, want = traced()
    with jax.enable_x64(True):
        jaxpr_64, got = traced()
    chex.assert_trees_all_equal_shapes_and_dtypes(got, want)
    assert kernels(jaxpr_64.jaxpr) == kernels(jaxpr.jaxpr)
    assert bool(kernels(jaxpr.jaxpr)) == (implementation.name in BACKENDS)


KERNELS = [row for row in SMALL if row.values[1].name == "pallas"]


@pytest.mark.slow  # The kernels are the same, see above, and lower without the flag elsewhere.
@pytest.mark.parametrize("call", ["step", "gradients"])
@pytest.mark.parametrize("mechanism, implementation, sizes", KERNELS)
def test_kernels_lower_under_x64(mechanism, implementation, sizes, call, as_on_a_gpu):
    args, cotangents = inputs(mechanism, sizes, implementation.dtypes[0])
    function = jax.jit(calls(mechanism, implementation)[call])
    with jax.enable_x64(True):
        lowered = function.trace(args, cotangents, None).lower(lowering_platforms=("cuda",))
    assert "@mosaic_gpu" in lowered.as_text()


@pytest.mark.parametrize(
    "mechanism, implementation, sizes",
    # The dtypes of all are compared above. These have the most integers.
    marked("test_values_under_x64", SMALL),
)
def test_values_under_x64(mechanism, implementation, sizes):
    dtype = implementation.dtypes[0]
    args, cotangents = inputs(mechanism, dict(sizes) | dict(T=20), dtype)
    want, _ = definition(mechanism, args, cotangents)
    with jax.enable_x64(True), implementation.context():
        run = jax.jit(functools.partial(mechanism.run, implementation=implementation.name))
        got = evaluated(run)(**args)
    assert_close(got, want, mechanism.tolerances[dtype][0])


@pytest.mark.parametrize(
    "whole", [False, pytest.param(True, marks=pytest.mark.slow)], ids=["calls", "gradients"]
)
@pytest.mark.parametrize(
    "mechanism, implementation, sizes",
    # The step is the definition's in most forms.
    marked("test_good_inputs_make_no_nan", SMALL),
)
def test_good_inputs_make_no_nan(mechanism, implementation, sizes, whole):
    """Not even where what follows would not fit, nor with the strongest gates."""
    args, cotangents = inputs(mechanism, dict(sizes) | dict(T=32), implementation.dtypes[0])
    options = dict(implementation=implementation.name)
    run, step = (functools.partial(f, **options) for f in (mechanism.run, mechanism.step))
    called = [lambda args: run(**args), lambda args: step(**token(mechanism, args))]
    if whole:
        called.append(lambda args: with_gradients(lambda args: run(**args), args, cotangents))
    stress = [edit for name, edit in mechanism.stress.items() if name not in implementation.beyond]
    for edit in (lambda args: args, *stress):
        edited = edit(args)
        for call in called:  # integers stay known, as they are to who calls it
            with implementation.context():
                assert_no_nan(on_floats(call, edited), floats(edited))
