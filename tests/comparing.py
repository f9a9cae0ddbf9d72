"""How the kernels' tests compare arrays."""

import numpy as np


def close(ours, theirs, tolerance):
    """Asserts that the relative Frobenius error is at most the tolerance."""
    ours, theirs = np.asarray(ours, np.float64), np.asarray(theirs, np.float64)
    assert ours.shape == theirs.shape
    assert np.linalg.norm(ours - theirs) <= tolerance * np.linalg.norm(theirs)


def relative_error(got, want):
    """The relative Frobenius error."""
    got, want = (np.asarray(x, np.float64) for x in (got, want))
    return np.linalg.norm(got - want) / np.linalg.norm(want)
