"""How a sequence is cut into pieces, and their states joined."""

import numpy as np
import pytest

pieces = pytest.importorskip("jla.triton.pieces", reason="triton is not installed")


@pytest.mark.parametrize(
    "programs, chunks, number", [(64, 2048, 4), (16, 2048, 16), (512, 2048, 1), (8, 63, 1)]
)
def test_number(programs, chunks, number):
    assert pieces.number(programs, chunks) == number


@pytest.mark.parametrize("number, chunks", [(1, 5), (4, 13), (3, 7)])
def test_spans_cover_all_chunks(number, chunks):
    first, length = np.moveaxis(np.asarray(pieces.spans(2, number, chunks)), -1, 0)
    assert (first[:, 0] == 0).all() and (length > 0).all()
    assert (first[:, 1:] == first[:, :-1] + length[:, :-1]).all()
    assert (first[:, -1] + length[:, -1] == chunks).all()
    numbers = np.arange(2 * 3 * chunks).reshape(2, 3, chunks)
    want = [numbers[:, :, a : a + n].sum(2) for a, n in zip(first[0], length[0], strict=True)]
    np.testing.assert_array_equal(pieces.sums(numbers, number), np.stack(want, axis=2))


@pytest.mark.parametrize("reverse", [False, True])
def test_joined(reverse):
    factors, terms = np.random.default_rng(0).normal(size=(2, 1, 2, 4, 3)).astype(np.float32)
    state = np.ones((1, 2, 3), np.float32)
    starts, last = pieces.joined(factors, terms, state, reverse=reverse)
    for p in (range(4), range(3, -1, -1))[reverse]:
        np.testing.assert_allclose(starts[:, :, p], state, rtol=1e-5)
        state = factors[:, :, p] * state + terms[:, :, p]
    np.testing.assert_allclose(last, state, rtol=1e-5)
