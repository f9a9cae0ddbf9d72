"""Every layer's masks and segments: padding is as good as absent, packed is separate."""

import functools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from layers import (
    IDS,
    SEGMENTS,
    D,
    advance,
    close,
    each_plain,
    each_rich,
    empty_cache,
    forward,
    normal,
    numpy_layer,
    padding,
    parameters,
    row_of,
    trees_close,
)

LENGTHS = (0, 1, 2, 5, 9, 11)
# With convolutions, and without.
each_kind = pytest.mark.parametrize(
    "case",
    [
        "kda-rich",
        "kda-no_convolution",
        "gsa-rich",
        "gsa-plain",
        "log_linear-rich",
        "mesa-rich",
        "path-rich",
    ],
)


@pytest.mark.parametrize("pattern", ["left", "right", "scattered"])
@each_kind
def test_padding_is_as_good_as_absent(case, pattern):
    mask = padding(pattern, LENGTHS, 11)
    real = np.asarray(mask)
    x = jnp.where(mask[..., None], normal(5, len(LENGTHS), 11, D), jnp.nan)
    y, cache = advance(case, parameters(case), empty_cache(case, len(LENGTHS)), x, mask=mask)
    assert not np.any(np.asarray(y)[~real])
    for row in range(len(LENGTHS)):
        expected, expected_cache = numpy_layer(case, x[row][real[row]])
        close(y[row][real[row]], expected)
        trees_close(row_of(cache, row), expected_cache)


@each_plain
@pytest.mark.parametrize(
    "first, second",
    [
        ("left", "right"),
        pytest.param("left", "left", marks=pytest.mark.slow),
        pytest.param("right", "right", marks=pytest.mark.slow),
    ],
)
def test_padded_prefill_goes_on_from_each_rows_last_real_token(first, second, case):
    B, params = len(LENGTHS), parameters(case)
    x = normal(6, B, 22, D)
    masks = [padding(first, LENGTHS, 11), padding(second, (7, 0, 3, 1, 2, 6), 7)]
    mask = jnp.concatenate([*masks, jnp.ones((B, 4), bool)], axis=1)

    _, cache = advance(case, params, empty_cache(case, B), x[:, :11], mask=masks[0])
    _, cache = advance(case, params, cache, x[:, 11:18], mask=masks[1])
    outputs = []
    for t in range(18, 22):
        y, cache = advance(case, params, cache, x[:, t : t + 1])
        outputs.append(y)
    y = jnp.concatenate(outputs, axis=1)

    for row in range(B):
        expected, expected_cache = numpy_layer(case, x[row][np.asarray(mask[row])])
        close(y[row], expected[-4:])
        trees_close(row_of(cache, row), expected_cache)


@each_plain
def test_one_padded_token_leaves_its_row_as_it_was(case):
    params = parameters(case)
    _, cache = advance(case, params, empty_cache(case, 2), normal(7, 2, 5, D))
    mask = jnp.array([[True], [False]])
    y, after = advance(case, params, cache, normal(8, 2, 1, D), mask=mask)
    second = functools.partial(jax.tree.map, lambda a: a[1])
    chex.assert_trees_all_equal(second(after), second(cache))
    assert not np.any(np.asarray(y[1])) and np.any(np.asarray(y[0]))


@each_rich
def test_gradients_with_padding_are_those_without(case):
    mask = padding("scattered", (5, 5), 8)
    x = jnp.where(mask[..., None], normal(5, 2, 8, D), jnp.nan)
    target = normal(9, 2, 8, D)

    def loss(params, x, target, mask):
        return jnp.sum(forward(case, params, x, mask=mask) * target)

    gradients = jax.jit(jax.grad(loss, argnums=(0, 1)))
    total, dx = gradients(parameters(case), x, target, mask)
    x, target = (a[jnp.nonzero(mask)].reshape(2, 5, D) for a in (x, target))
    expected, expected_dx = gradients(parameters(case), x, target, None)
    trees_close(total, expected)
    close(dx[jnp.nonzero(mask)], expected_dx.reshape(10, D))
    assert not np.any(np.asarray(dx)[~np.asarray(mask)])


@each_kind
def test_packed_is_separate(case):
    x = normal(5, 2, 13, D)
    y, cache = advance(case, parameters(case), empty_cache(case, 2), x, segment_ids=IDS)
    close(forward(case, parameters(case), x, segment_ids=IDS), y)
    for row, lengths in enumerate(SEGMENTS):
        pieces = np.split(np.asarray(x[row]), np.cumsum(lengths)[:-1])
        results = [numpy_layer(case, piece) for piece in pieces]
        close(y[row], np.concatenate([o for o, _ in results]))
        trees_close(row_of(cache, row), results[-1][1])


@each_plain
@pytest.mark.parametrize("pattern", ["left", "right", "scattered"])
def test_packed_and_padded(pattern, case):
    """13 packed tokens among 18; the ids at padded tokens mean nothing."""
    x, params = normal(5, 2, 13, D), parameters(case)
    expected, whole = advance(case, params, empty_cache(case, 2), x, segment_ids=IDS)
    mask = padding(pattern, (13, 13), 18)
    wide = jnp.full((2, 18, D), jnp.nan).at[jnp.nonzero(mask)].set(x.reshape(26, D))
    ids = (100 + jnp.arange(36).reshape(2, 18)).at[jnp.nonzero(mask)].set(IDS.reshape(26))
    y, cache = advance(case, params, empty_cache(case, 2), wide, mask=mask, segment_ids=ids)
    close(y[jnp.nonzero(mask)], expected.reshape(26, D))
    trees_close(cache, whole)


@each_plain
def test_cache_belongs_to_the_first_segment(case):
    x, params = normal(5, 1, 12, D), parameters(case)
    _, cache = advance(case, params, empty_cache(case, 1), x[:, :5])
    ids = jnp.array([[3, 3, 9, 9, 9, 9, 9]])
    y, cache = advance(case, params, cache, x[:, 5:], segment_ids=ids)
    (first, _), (second, last) = (numpy_layer(case, piece) for piece in (x[0, :7], x[0, 7:]))
    close(y[0], np.concatenate([first[5:], second]))
    trees_close(row_of(cache, 0), last)
