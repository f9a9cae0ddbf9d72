"""Values and gradients, from docs/contract.md: equal to the definition, any length, any head
dimension, finite with any decay."""

import itertools
import pathlib

import chex
import jax
import numpy as np
import pytest
from harness import Case, assert_agrees, case, definition, inputs, one_segment, value_and_vjp
from mechanisms import AGAINST_REFERENCE, GRID, MECHANISMS, is_slow

GOLDEN = pathlib.Path(__file__).parent.parent / "golden"


def check(mechanism, implementation, sizes, dtype=None):
    agree(mechanism, case(mechanism, implementation, sizes, dtype))


def agree(mechanism, case):
    # Outputs have the cotangents' dtypes, gradients their arguments'.
    chex.assert_trees_all_equal_shapes_and_dtypes(case.got, (case.cotangents, case.args))
    dtype = case.args["q"].dtype.name
    assert_agrees(mechanism, dtype, case.got, case.want)


def dtype_cases():
    for row in GRID:
        mechanism, implementation, sizes = row.values
        for dtype in implementation.dtypes:
            if (implementation.name, dtype) != ("reference", "float32"):
                values = (mechanism, implementation, sizes, dtype)
                # Triton's kernels multiply other numbers in 16 bits; the others, fewer tokens show.
                short = dtype != implementation.dtypes[0] and implementation.name != "triton"
                if short and not row.marks:
                    values = (mechanism, implementation, dict(sizes) | dict(T=20), dtype)
                slow = [pytest.mark.slow] if dtype == "float16" and not row.marks else []
                yield pytest.param(*values, id=f"{row.id}-{dtype}", marks=[*row.marks, *slow])


@pytest.mark.parametrize("mechanism, implementation, sizes, dtype", list(dtype_cases()))
def test_values_and_gradients(mechanism, implementation, sizes, dtype):
    check(mechanism, implementation, sizes, dtype)


def edited_sizes(edits):
    for row in AGAINST_REFERENCE:
        if not row.marks:
            mechanism, implementation, sizes = row.values
            for i, edit in enumerate(edits(implementation)):
                label = "-".join(f"{letter}{size}" for letter, size in edit.items())
                values = (mechanism, implementation, dict(sizes) | dict(B=1) | edit)
                # To XLA all sizes are the same; of kernels the first shows that they are padded.
                others = i or is_slow("test_head_dimensions", mechanism, implementation)
                slow = [pytest.mark.slow] if others else []
                yield pytest.param(*values, id=f"{row.id}-{label}", marks=slow)


@pytest.mark.slow
@pytest.mark.parametrize(
    "mechanism, implementation, sizes", list(edited_sizes(lambda i: [dict(T=T) for T in i.lengths]))
)
def test_any_length(mechanism, implementation, sizes):
    check(mechanism, implementation, sizes)


@pytest.mark.parametrize(
    "mechanism, implementation, sizes", list(edited_sizes(lambda i: i.head_dims))
)
def test_head_dimensions(mechanism, implementation, sizes):
    """The kernels' in float16, which other small cases of theirs do not have."""
    dtype = "float16" if implementation.name == "pallas" else None
    check(mechanism, implementation, sizes, dtype)


def stress_cases():
    for row in AGAINST_REFERENCE:
        for stress in row.values[0].stress:
            if stress in row.values[1].beyond:
                continue
            # One of them says most of what half a minute each is worth.
            test = "test_extreme_gates_keep_values_and_gradients"
            others = is_slow(test, *row.values[:2]) and stress != "one gate of -1e4"
            slow = [pytest.mark.slow] if others and not row.marks else []
            marks = [*row.marks, *slow]
            mechanism, implementation, sizes = row.values
            if stress in mechanism.undamped:
                sizes = dict(sizes) | dict(T=min(sizes["T"], mechanism.undamped[stress]))
            values = mechanism, implementation, sizes, stress
            yield pytest.param(*values, id=f"{row.id}-{stress}", marks=marks)


@pytest.mark.parametrize("mechanism, implementation, sizes, stress", list(stress_cases()))
def test_extreme_gates_keep_values_and_gradients(mechanism, implementation, sizes, stress):
    """An `exp` of a positive difference, masked too late, would show here as a NaN gradient."""
    args, cotangents = inputs(mechanism, sizes, implementation.dtypes[0])
    args = mechanism.stress[stress](args)
    ids = one_segment(implementation, sizes)
    got = value_and_vjp(mechanism, implementation, args, cotangents, ids)
    agree(mechanism, Case(mechanism, args, cotangents, got, ids))


@pytest.mark.parametrize("mechanism, implementation, sizes", AGAINST_REFERENCE)
def test_gate_gradient_at_every_token(mechanism, implementation, sizes):
    """Token by token: a term lost at a chunk's border cannot hide in the norm of the rest."""
    dtype = implementation.dtypes[0]
    shared = case(mechanism, implementation, sizes, dtype)
    got, want = shared.got[1], shared.want[1]
    tolerance = 5 * mechanism.tolerances[dtype][1]
    for name in mechanism.tokenwise():
        # [T]: the norm of each token's gradient, over all else.
        axes = tuple(i for i in range(got[name].ndim) if i != 1)
        difference = got[name].astype(np.float32) - want[name]
        off = np.sqrt(np.sum(np.square(difference), axis=axes))
        size = np.sqrt(np.sum(np.square(want[name]), axis=axes))
        assert np.all(off <= tolerance * (size + 0.1 * size.mean())), (name, np.argmax(off / size))


# Those that have only other sizes than others of their mechanism, to the definition all the same.
LARGER = ("gsa_d128", "kda_d128", "log_linear_256", "path_d128")


def golden_cases():
    for mechanism in MECHANISMS:
        for implementation in mechanism.implementations:
            if "float32" in implementation.dtypes:
                for file in mechanism.golden:
                    label = f"{mechanism.name}-{implementation.name}-{file}"
                    # They hold the definition, and `test_values_and_gradients` the others to it.
                    others = implementation.name != "reference" or file in LARGER
                    marks = [pytest.mark.slow] if others else []
                    yield pytest.param(mechanism, implementation, file, id=label, marks=marks)


@pytest.mark.parametrize("mechanism, implementation, file", list(golden_cases()))
def test_golden_vectors(mechanism, implementation, file):
    """Inputs, outputs and gradients of sum(output * ct) that were computed elsewhere."""
    arrays = dict(np.load(GOLDEN / f"{file}.npz"))

    def tree(kind, axes, names):
        leaves = [arrays[f"{kind}_{name}"] for name in names]
        return jax.tree.unflatten(jax.tree.structure(axes), leaves)

    names = {name: (name,) for name in mechanism.axes} | {
        mechanism.state[0]: mechanism.golden_state
    }
    present = [n for n in names if all(f"in_{leaf}" in arrays for leaf in names[n])]
    args, gradients = (
        {n: tree(kind, mechanism.axes[n], names[n]) for n in present} for kind in ("in", "grad")
    )
    # Outputs that the file does not have get no cotangent, and are not compared.
    shapes = jax.eval_shape(lambda a: mechanism.run(**a, implementation="reference"), args)
    leaves, structure = jax.tree.flatten(shapes)
    named = list(zip(leaves, mechanism.golden_outputs, strict=True))
    cotangents = [arrays.get(f"ct_{name}", np.zeros(x.shape, x.dtype)) for x, name in named]
    # One of the definition's with segment ids, so that these hold both of its programs.
    ids = None
    if implementation.name == "reference" and file == mechanism.golden[0]:
        ids = np.zeros(args["q"].shape[:2], np.int32)
    cotangents = structure.unflatten(cotangents)
    if implementation.name == "reference":  # compiled, it is held to this by other tests
        values, got = definition(mechanism, args, cotangents, ids)
    else:
        values, got = value_and_vjp(mechanism, implementation, args, cotangents, ids)
    there = [f"out_{name}" in arrays for _, name in named]
    assert any(there)
    values = list(itertools.compress(jax.tree.leaves(values), there))
    want = [arrays[f"out_{name}"] for _, name in itertools.compress(named, there)]
    assert_agrees(mechanism, "float32", (values, got), (want, gradients))
