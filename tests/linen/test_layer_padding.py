"""Every layer's masks and segments: padding tokens are ignored, packed is separate."""

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
    each,
    each_rich,
    empty_cache,
    forward,
    normal,
    numpy_layer,
    padding,
    parameters,
    row_of,
    run,
    trees_close,
)

LENGTHS = (0, 1, 2, 5, 9, 11)


@pytest.mark.parametrize("pattern", ["left", "right", "scattered"])
@each("padded")
def test_padding_is_as_good_as_absent(case, pattern):
    real = mask = padding(pattern, LENGTHS, 11)
    x = np.where(mask[..., None], normal(5, len(LENGTHS), 11, D), np.float32("nan"))
    y, cache = advance(case, parameters(case), empty_cache(case, len(LENGTHS)), x, mask=mask)
    assert not np.any(y[~real])
    for row in range(len(LENGTHS)):
        expected, expected_cache = numpy_layer(case, x[row][real[row]])
        close(y[row][real[row]], expected)
        trees_close(row_of(cache, row), expected_cache)


@each_rich
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
    x = normal(6, B, 26, D)
    masks = [padding(first, LENGTHS, 11), padding(second, (7, 0, 3, 1, 2, 6), 11)]
    mask = np.concatenate([*masks, np.ones((B, 4), bool)], axis=1)

    cache, outputs = empty_cache(case, B), []
    for part in (slice(0, 11), slice(11, 22), *(slice(t, t + 1) for t in range(22, 26))):
        y, cache = advance(case, params, cache, x[:, part], mask=mask[:, part])
        outputs.append(y)

    for row in range(B):
        expected, expected_cache = numpy_layer(case, x[row][mask[row]])
        close(np.concatenate(outputs[2:], axis=1)[row], expected[-4:])
        trees_close(row_of(cache, row), expected_cache)


@each_rich
def test_one_padded_token_leaves_its_row_as_it_was(case):
    B, params = len(LENGTHS), parameters(case)
    mask = padding("right", LENGTHS, 11)
    _, cache = advance(case, params, empty_cache(case, B), normal(7, B, 11, D), mask=mask)
    real = np.array([True, False, False, True, True, False])
    y, after = advance(case, params, cache, normal(8, B, 1, D), mask=real[:, None])
    padded = functools.partial(jax.tree.map, lambda a: a[~real])
    chex.assert_trees_all_equal(padded(after), padded(cache))
    assert not np.any(y[~real]) and np.all(np.any(y[real], axis=(1, 2)))


@each_rich
def test_gradients_with_padding_are_those_without(case):
    """Along a random direction in each array, they are the differences of the definition."""
    real = mask = padding("scattered", (5, 5), 8)
    step, x = 1e-5, np.where(mask[..., None], normal(5, 2, 8, D), np.float32("nan"))
    target = normal(9, 2, 8, D)

    @functools.partial(jax.grad, argnums=(0, 1))
    def gradients(params, x):
        return jnp.sum(forward(case, params, x, mask=mask) * target)

    def exact(params, x):
        rows = (numpy_layer(case, x[row][real[row]], params)[0] for row in range(2))
        return sum(np.sum(y * target[row][real[row]]) for row, y in enumerate(rows))

    arrays = parameters(case), x
    found = run(jax.jit(gradients), *arrays)
    assert not np.any(found[1][~real])
    leaves, tree = jax.tree.flatten(jax.tree.map(lambda a: np.asarray(a, np.float64), arrays))
    for i, gradient in enumerate(jax.tree.leaves(found)):
        direction = np.random.default_rng(i).standard_normal(gradient.shape)
        ends = [
            exact(*tree.unflatten([*leaves[:i], leaves[i] + move * direction, *leaves[i + 1 :]]))
            for move in (step, -step)
        ]
        slope = np.nansum(gradient.astype(np.float64) * direction)
        error = abs(slope - (ends[0] - ends[1]) / (2 * step))
        assert error <= 1e-4 * np.linalg.norm(gradient), (i, error, np.linalg.norm(gradient))


def pieces(x):
    """Each row of x, in its segments."""
    for row, lengths in enumerate(SEGMENTS):
        yield row, np.split(x[row], np.cumsum(lengths)[:-1])


@each("padded")
def test_packed_is_separate(case):
    x = normal(5, 2, 13, D)
    y, cache = advance(case, parameters(case), empty_cache(case, 2), x, segment_ids=IDS)
    for row, parts in pieces(x):
        results = [numpy_layer(case, part) for part in parts]
        close(y[row], np.concatenate([o for o, _ in results]))
        trees_close(row_of(cache, row), results[-1][1])


@each_rich
def test_packed_is_separate_without_a_cache(case):
    x = normal(5, 2, 13, D)
    y, _ = advance(case, parameters(case), empty_cache(case, 2), x, segment_ids=IDS)
    close(forward(case, parameters(case), x, segment_ids=IDS), y)


@each_rich
@pytest.mark.parametrize("pattern", ["left", "right", "scattered"])
@pytest.mark.parametrize(
    "implementation",
    # What the layers make of both is the same for it; segments and padding alone it has above.
    [pytest.param("reference", marks=pytest.mark.slow), "xla"],
)
def test_packed_and_padded(implementation, pattern, case):
    """13 packed tokens among 18; the ids at padded tokens mean nothing."""
    x, params = normal(5, 2, 13, D), parameters(case)
    real = mask = padding(pattern, (13, 13), 18)
    wide, ids = np.full((2, 18, D), np.nan, np.float32), 100 + np.arange(36).reshape(2, 18)
    wide[real], ids[real] = np.reshape(x, (26, D)), np.reshape(IDS, 26)
    arguments = dict(mask=mask, segment_ids=ids.astype(np.int32))
    y, cache = advance(
        case, params, empty_cache(case, 2), wide, **arguments, implementation=implementation
    )
    for row, parts in pieces(x):
        results = [numpy_layer(case, part) for part in parts]
        close(y[row][real[row]], np.concatenate([o for o, _ in results]))
        trees_close(row_of(cache, row), results[-1][1])


@each_rich
def test_one_token_by_xla(case):
    """Its cache is that of the definition; a padded one leaves it to the bit."""
    x, params = normal(5, 2, 14, D), parameters(case)
    _, cache = advance(case, params, empty_cache(case, 2), x[:, :13], segment_ids=IDS)
    arguments = dict(mask=np.array([[True], [False]]), segment_ids=np.array([[4], [5]], np.int32))
    y, after = advance(case, params, cache, x[:, 13:], **arguments, implementation="xla")
    expected, expected_cache = numpy_layer(case, x[0, -1 - SEGMENTS[0][-1] :])
    close(y[0], expected[-1:])
    trees_close(row_of(after, 0), expected_cache)
    chex.assert_trees_all_equal(row_of(after, 1), row_of(cache, 1))
    assert not np.any(y[1])


@each_rich
def test_cache_belongs_to_the_first_segment(case):
    x, params = normal(5, 2, 26, D), parameters(case)
    ids = np.zeros((2, 13), np.int32)
    _, cache = advance(case, params, empty_cache(case, 2), x[:, :13], segment_ids=ids)
    borders = 2, 7
    ids = np.array([[3] * border + [9] * (13 - border) for border in borders], np.int32)
    y, cache = advance(case, params, cache, x[:, 13:], segment_ids=ids)
    for row, border in enumerate(borders):
        parts = x[row, : 13 + border], x[row, 13 + border :]
        (first, _), (second, last) = (numpy_layer(case, part) for part in parts)
        close(y[row], np.concatenate([first[13:], second]))
        trees_close(row_of(cache, row), last)
