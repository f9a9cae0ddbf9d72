"""The tables through which a mechanism joins the contract's tests.

A mechanism is one `Mechanism` in `MECHANISMS`, and an implementation one `Implementation` in it; no
test names either. `GRID` and its kin are the parametrisations the tests use.
"""

import pytest
from table_gsa import GSA
from table_kda import KDA
from table_log_linear import LOG_LINEAR
from table_mesa import MESA
from table_path import PATH

MECHANISMS = (KDA, GSA, LOG_LINEAR, MESA, PATH)


def _grid(full=True):
    """Mechanism, implementation and sizes, for every small case and every full one (on the GPU)."""
    rows = []
    for mechanism in MECHANISMS:
        for implementation in mechanism.implementations:
            label = f"{mechanism.name}-{implementation.name}"
            rows.append(pytest.param(mechanism, implementation, implementation.sizes, id=label))
            if full and implementation.full:
                row = (mechanism, implementation.compiled(), implementation.full)
                rows.append(pytest.param(*row, id=f"{label}-full", marks=pytest.mark.gpu))
    return rows


# The definition agrees with itself: only its low precisions and golden vectors say anything.
GRID = _grid()
SMALL = _grid(full=False)


def is_slow(test, mechanism, implementation):
    """Whether the tables say that a test is slow for these."""
    slow = mechanism.slow, implementation.slow, implementation.backend.slow
    return any(test in tests for tests in slow)


def marked(test, rows):
    """The rows, those that are slow for the test marked so; not those that run on the GPU."""

    def marks(row):
        slow = not row.marks and is_slow(test, *row.values[:2])
        return [*row.marks, *[pytest.mark.slow] * slow]

    return [pytest.param(*row.values, id=row.id, marks=marks(row)) for row in rows]


def short(rows):
    """The rows, with few tokens where XLA takes as long as there are levels in a chunk.

    For what does not depend on the length; interpreted kernels and those on a GPU keep theirs.
    """

    def shortened(row):
        mechanism, implementation, sizes = row.values
        if implementation.compiled_on == "cpu" and not row.marks:
            sizes = dict(sizes) | dict(T=min(sizes["T"], 20))
        return pytest.param(mechanism, implementation, sizes, id=row.id, marks=row.marks)

    return [shortened(row) for row in rows]


COMPILED_ON_CPU = [row for row in SMALL if not row.values[1].interpreted]


def _compiled(row):
    mechanism, implementation, sizes = row.values
    if implementation.compiled_on == "cpu":
        return row
    return pytest.param(
        mechanism, implementation.compiled(), sizes, id=row.id, marks=pytest.mark.gpu
    )


def _is_definition(row):
    return row.values[1].name == "reference"


COMPILED = [_compiled(row) for row in SMALL]
DEFINITIONS = [row for row in SMALL if _is_definition(row)]
AGAINST_REFERENCE = [row for row in GRID if not _is_definition(row)]
SMALL_AGAINST_REFERENCE = [row for row in AGAINST_REFERENCE if not row.marks]
