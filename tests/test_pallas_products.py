"""The products of one token, and their convolutions: values and races in the interpreter, lowering,
and full size on a GPU."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from comparing import normal, relative_error

import jla.pallas
from jla.pallas.layers import products
from jla.reference import layers as reference

f32, bf16, f16 = jnp.float32, jnp.bfloat16, jnp.float16


ROUNDED = [True, False, True, False, False, True]


def given(B, D, widths, dtype=bf16, W=4, xs=1):
    """Arguments of `products_of_few`, a matrix for each width; a negative one has a convolution."""
    x = [(i + 1) * normal(i, B, D).astype(dtype) for i in range(xs)]
    kernels, taps, pasts = [], [], []
    for i, width in enumerate(widths):
        N = abs(width)
        kernels.append((normal(10 + i, D, N) * D**-0.5).astype(dtype))
        taps.append(normal(20 + i, W, N) if width < 0 else None)
        pasts.append(normal(30 + i, B, W - 1, N).astype(dtype) if width < 0 else None)
    return [x[i % xs] for i in range(len(widths))], kernels, taps, pasts


def assert_alike(got, want):
    for x, y in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
        assert x.dtype == y.dtype and x.shape == y.shape
        # Products are rounded once; the formula of a SiLU rounds on the way.
        assert relative_error(x.astype(f32), y.astype(f32)) < 4e-3


@pytest.mark.parametrize("silu_twice", [False, True])
@pytest.mark.parametrize(
    "B, D, widths, dtype, xs",
    [
        (1, 256, (-64, 32, 8), bf16, 1),
        (3, 160, (8, -32), f16, 1),
        (2, 64, (3, -40), bf16, 1),
        (16, 128, (-32, -64, 32), bf16, 2),
    ],
)
def test_is_the_formula(B, D, widths, dtype, xs, silu_twice):
    arrays = given(B, D, widths, dtype, xs=xs)
    with jla.pallas.interpret():
        got = products.products_of_few(
            *arrays, silu_twice=silu_twice, rounded=ROUNDED[: len(widths)]
        )
    assert_alike(
        got,
        reference.products_of_few(*arrays, silu_twice=silu_twice, rounded=ROUNDED[: len(widths)]),
    )


def test_a_ring_that_is_used_again():
    arrays = given(2, 128 * 18, (32,))
    with jla.pallas.interpret():
        got = products.products_of_few(*arrays, silu_twice=False, rounded=ROUNDED[: len(arrays[0])])
    assert_alike(
        got, reference.products_of_few(*arrays, silu_twice=False, rounded=ROUNDED[: len(arrays[0])])
    )


def test_swiglu():
    (x, _), (gate, up), *_ = given(2, 128, (96, 96))
    with jla.pallas.interpret():
        got = products.swiglu_of_few(x, gate, up)
    assert_alike(got, reference.swiglu_of_few(*(a.astype(f32) for a in (x, gate, up))).astype(bf16))


@pytest.mark.parametrize("D", [640, 416])
def test_product(D):
    (x,), (kernel,), *_ = given(2, D, (64,))
    with jla.pallas.interpret():
        y = products.product_of_few(x, kernel)
    assert_alike(y, reference.product_of_few(x, kernel))


def test_derivatives_and_vmap_are_the_formula():
    (x,), (kernel,), (taps,), (past,) = given(2, 64, (-32,))
    arrays = jax.tree.map(jnp.asarray, (x, kernel, taps, past))

    def loss(run, x, kernel, taps, past):
        (y,), (new,) = run([x], [kernel], [taps], [past], silu_twice=False, rounded=[True])
        y = run([y], [kernel[:32]], [None], [None], silu_twice=False, rounded=[False])[0][0]
        return jnp.sum(jnp.sin(y.astype(f32))) + jnp.sum(jnp.cos(new.astype(f32)))

    def both(run):
        grads = jax.grad(functools.partial(loss, run), (0, 1, 2, 3))
        more = jax.tree.map(lambda a: jnp.stack([a, 2 * a]), arrays)
        return grads(*arrays), jax.vmap(functools.partial(loss, run))(*more)

    with jla.pallas.interpret():
        got = both(products.products_of_few)
    want = both(reference.products_of_few)
    for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
        assert relative_error(a.astype(f32), b.astype(f32)) < 2e-2


@pytest.mark.gpu
@pytest.mark.parametrize("B", [1, 8, 64])
def test_full_size(B):
    """Of a model of width 1024: twice the same bits, each nearer to float32 than a rounding."""
    widths = (-1024, -1024, -1024, 128, 128, 8)
    arrays = jax.tree.map(jnp.asarray, given(B, 1024, widths))
    (x, *_), (down,), *_ = jax.tree.map(jnp.asarray, given(B, 2720, (1024,)))
    (y, *_), (gate, up), *_ = jax.tree.map(jnp.asarray, given(B, 1024, (2720, 2720)))

    def run():
        of_tokens = products.products_of_few(
            *arrays, silu_twice=False, rounded=ROUNDED[: len(arrays[0])]
        )
        return of_tokens, products.product_of_few(x, down), products.swiglu_of_few(y, gate, up)

    got, again = run(), run()
    for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(again), strict=True):
        np.testing.assert_array_equal(a, b)
    with jax.default_matmul_precision("highest"):
        exact = jax.tree.map(lambda a: a.astype(f32), (arrays, x, down, y, gate, up))
        arrays, x, down, y, gate, up = exact
        want = reference.products_of_few(
            *arrays, silu_twice=False, rounded=ROUNDED[: len(arrays[0])]
        )
        want = want, reference.product_of_few(x, down), reference.swiglu_of_few(y, gate, up)
    for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
        assert relative_error(a.astype(f32), b) < 4e-3
