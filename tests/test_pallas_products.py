"""The products of one token, and their convolutions: values and races in the interpreter, lowering,
and full size on a GPU."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from comparing import normal, relative_error

import jla.pallas
from jla.pallas.layers import products
from jla.pallas.layers.products import Matrix
from jla.reference import layers as reference

f32, bf16, f16 = jnp.float32, jnp.bfloat16, jnp.float16


def matrices(B, D, widths, dtype=bf16, W=4):
    """One for each width; a negative one is of a matrix with a convolution."""
    x = normal(0, B, D).astype(dtype)
    made = []
    for i, width in enumerate(widths):
        N = abs(width)
        one = Matrix(x, (normal(2 * i + 1, D, N) * D**-0.5).astype(dtype))
        if width < 0:
            past = normal(2 * i + 2, B, W - 1, N).astype(dtype)
            one = one._replace(taps=normal(i + 99, W, N), past=past)
        made.append(one)
    return made


def formula(matrices, *, silu_twice=False):
    out, pasts = [], []
    for x, kernel, taps, past in matrices:
        y = jnp.dot(x.astype(f32), kernel.astype(f32), precision="highest").astype(x.dtype)
        if taps is not None:
            one = y[:, None, None], taps[:, None], None, past[:, :, None]
            options = dict(normalize=False, silu_twice=silu_twice)
            pasts.append(jnp.concatenate([past[:, 1:], y[:, None]], axis=1))
            y = reference.short_convolution(*one, **options)[:, 0, 0]
        out.append(y)
    return out, pasts


def assert_alike(got, want):
    for x, y in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
        assert x.dtype == y.dtype and x.shape == y.shape
        # Both round the same float32 sum, up to its last bits.
        assert relative_error(x.astype(f32), y.astype(f32)) < 1e-3


@pytest.mark.parametrize("silu_twice", [False, True])
@pytest.mark.parametrize(
    "B, D, widths, dtype",
    [
        (1, 256, (-64, 32, 8), bf16),
        (3, 160, (8, -32), f16),
        (16, 128, (-32, -64), bf16),
    ],
)
def test_is_the_formula(B, D, widths, dtype, silu_twice):
    given = matrices(B, D, widths, dtype)
    with jla.pallas.interpret():
        got = products.products(given, silu_twice=silu_twice)
    assert_alike(got, formula(given, silu_twice=silu_twice))


def test_a_ring_that_is_used_again():
    given = matrices(2, 128 * 18, (32,))
    with jla.pallas.interpret():
        got = products.products(given)
    assert_alike(got, formula(given))


def test_of_several_inputs():
    given = [*matrices(1, 128, (32, 32)), *(m._replace(x=2 * m.x) for m in matrices(1, 128, (64,)))]
    with jla.pallas.interpret():
        got = products.products(given)
    assert_alike(got, formula(given))


def test_swiglu():
    gate, up = matrices(2, 128, (96, 96))
    with jla.pallas.interpret():
        got = products.swiglu(gate.x, gate.kernel, up.kernel)
    (a, b), _ = formula([gate, up])
    want = jax.nn.silu(a.astype(f32)) * b.astype(f32)
    assert relative_error(got.astype(f32), want) < 1e-2


@pytest.mark.parametrize("D", [640, 416])
def test_partial_sums(D):
    (one,) = matrices(2, D, (64,))
    with jla.pallas.interpret():
        parts = products.partial_sums(one.x, one.kernel)
    assert parts.shape[0] > 1 and parts.dtype == f32
    want = np.asarray(one.x, np.float64) @ np.asarray(one.kernel, np.float64)
    assert relative_error(parts.sum(0), want) < 1e-6
