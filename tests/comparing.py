"""How the kernels' tests compare arrays."""

import contextlib

import jax
import numpy as np


def run_in(context, run, *args):
    """run(*args) in the context; where it is that of a GPU, twice, and bit for bit the same."""
    with context():
        got = run(*args)
        if context is contextlib.nullcontext:
            jax.tree.map(np.testing.assert_array_equal, got, run(*args))
    return got


def close(ours, theirs, tolerance):
    """Asserts that the relative Frobenius error is at most the tolerance."""
    ours, theirs = np.asarray(ours, np.float64), np.asarray(theirs, np.float64)
    assert ours.shape == theirs.shape
    assert np.linalg.norm(ours - theirs) <= tolerance * np.linalg.norm(theirs)


def relative_error(got, want):
    """The relative Frobenius error."""
    got, want = (np.asarray(x, np.float64) for x in (got, want))
    return np.linalg.norm(got - want) / np.linalg.norm(want)
