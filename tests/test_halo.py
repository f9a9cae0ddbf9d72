"""The layers' operations on pieces of a sequence: vmap's axis in the place of a mesh's."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from comparing import normal

from jla import _fused

B, T, H, D = 2, 24, 2, 16
P = 4
IDS = np.array([[0] * 5 + [1] * 1 + [2] * 12 + [0] * 6, [3] * 24])


def pieces(x):
    return None if x is None else np.moveaxis(np.reshape(x, (B, P, -1, *x.shape[2:])), 1, 0)


def over_pieces(run, tokens, shared):
    """`run(*tokens, *shared, axis_name=)` piece by piece, joined."""
    run = functools.partial(run, axis_name="seq")
    axes = (*(None if x is None else 0 for x in tokens), *(None for _ in shared))
    y = jax.jit(jax.vmap(run, axes, axis_name="seq"))(*map(pieces, tokens), *shared)
    return np.moveaxis(y, 0, 1).reshape(B, T, *y.shape[3:])


@pytest.mark.parametrize("W", [2, 4])
@pytest.mark.parametrize("ids", [None, IDS], ids=["one", "packed"])
def test_short_convolution(W, ids):
    """Windows reach the left neighbour's tokens of the same segment and no others, NaN or not."""
    x, taps, bias = normal(0, B, T, H, D), normal(1, W, H, D), normal(2, H, D)

    def run(x, ids, taps, bias, **options):
        return _fused.short_convolution(x, taps, bias, None, ids, normalize=True, **options)

    numbers = None if ids is None else np.cumsum(np.diff(ids, axis=1, prepend=ids[:, :1]) != 0, 1)
    want = run(x, numbers, taps, bias)
    np.testing.assert_allclose(over_pieces(run, (x, ids), (taps, bias)), want, rtol=1e-5, atol=1e-6)
    if ids is not None:
        x[0, :6] = np.nan
        nan = over_pieces(run, (x, ids), (taps, bias))
        np.testing.assert_allclose(nan[0, 6:], want[0, 6:], rtol=1e-5, atol=1e-6)


def test_a_piece_shorter_than_the_window_raises():
    def run(x, taps, **options):
        return _fused.short_convolution(x, taps, **options)

    with pytest.raises(ValueError, match=r"'seq' must have at least 7 tokens.* got 6"):
        over_pieces(run, (normal(0, B, T, H, D),), (normal(1, 8, H, D),))


@pytest.mark.slow  # the layers' values show it, too
def test_kda_from_projection():
    q, k, v, f, beta = (normal(i, B, T, H, D) / 4 for i in range(5))
    tokens = q, k, v, f, jax.nn.sigmoid(beta[..., 0]), IDS

    def run(q, k, v, f, beta, ids, A_log, dt_bias, **options):
        arrays = q, k, v, f, A_log, dt_bias, beta
        return _fused.kda_from_projection(*arrays, segment_ids=ids, **options)[0]

    shared = normal(5, H), normal(6, H, D)
    got = over_pieces(run, tokens, shared)
    np.testing.assert_allclose(got, run(*tokens, *shared), rtol=1e-4, atol=1e-5)


@pytest.mark.slow  # the layers' values show it, too
def test_log_linear_mamba2():
    q, k, u = (normal(i, B, T, H, D) for i in range(3))
    logits, g, dt = normal(3, B, T, H, 6), -jnp.exp(normal(4, B, T, H)), jnp.exp(normal(5, B, T, H))
    tokens, shared = (q, k, u, g, logits, dt), (normal(6, H),)

    def run(*arrays, **options):
        return _fused.log_linear_mamba2(*arrays, **options)[0]

    got = over_pieces(run, tokens, shared)
    np.testing.assert_allclose(got, run(*tokens, *shared), rtol=1e-4, atol=1e-4)
