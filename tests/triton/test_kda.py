"""KDA's kernels in float32 where errors are multiplied by hundreds."""

import numpy as np
import pytest
from comparing import relative_error

import jla

# Not of "triton" itself: this folder has the name.
pytest.importorskip("triton.compiler", reason="triton is not installed")


@pytest.mark.interpreted
def test_equal_keys_in_float32():
    """Outputs are 4e-4 off where products of keys by keys are three of bfloat16, and the state 7e-5
    where the recurrence's are."""
    T, K, V = 64, 16, 16
    random = np.random.default_rng(0)

    def draw(*sizes):
        return random.standard_normal((1, T, 1, *sizes), np.float32)

    q, v, k = draw(K) / 4, draw(V), np.broadcast_to(draw(K)[:, :1], (1, T, 1, K))
    k = k / np.linalg.norm(k, axis=-1, keepdims=True)
    zeros, twos = np.zeros_like(k), np.full((1, T, 1), 2, np.float32)
    o, state = jla.kda(q, k, v, zeros, twos, implementation="triton")[:2]
    want, S = [], np.zeros((K, V))
    for q_t, k_t, v_t in zip(q[0, :, 0], k[0, :, 0], v[0, :, 0], strict=True):
        S = S + 2 * np.outer(k_t, v_t - k_t @ S)
        want.append(K**-0.5 * q_t @ S)
    assert relative_error(o[0, :, 0], np.stack(want)) < 1e-4
    assert relative_error(state[0, 0], S) < 2e-5


@pytest.mark.interpreted
def test_keys_between_the_numbers_of_tf32():
    """What TF32 cuts off of both keys counts: without it 2.3e-7 of each product is missing, always
    in one direction, and equal keys make 1e-4 of that in 500 tokens."""
    from jla.triton.kda import _prepare  # only these products, before anything multiplies them

    T, K = 64, 16
    k = np.full((1, T, 1, K), 0.25 + 2.0**-13 - 2.0**-20, np.float32)
    g, beta = np.zeros_like(k), np.zeros((1, T, 1), np.float32)
    key_scores = np.asarray(_prepare(k, k, k, g, beta, 1.0)[1], np.float64)[0, 0]
    want = np.tril(np.full((T, T), K * np.float64(k[0, 0, 0, 0]) ** 2), -1)
    assert relative_error(key_scores, want) < 2e-7
