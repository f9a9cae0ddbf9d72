"""Every layer's packed prefill: the segments of a row go on from rows of a pool."""

import functools

import chex
import jax
import numpy as np
import pytest
from layers import (
    D,
    each_rich,
    empty_cache,
    layer,
    normal,
    numpy_layer,
    parameters,
    row_of,
    run,
    trees_close,
)
from layers import close as layers_close

import jla
from jla.models import Attention

ROWS, T = 9, 12  # of the pool; tokens of a row
# Two calls: each row's segments as (sequence, tokens), in the order of their ids; None is padding.
# The slots that no segment of the row uses are -1 or a sequence's that is not there.
CALLS = (
    (((7, 5), (None, 1), (2, 6)), ((4, 1), (0, 1), (5, 10))),
    (((2, 2), (6, 3), (7, 7)), ((None, 4), (0, 5), (None, 3))),
)
SLOTS = (
    np.array([[7, 8, 2], [4, 0, 5]], np.int32),
    np.array([[2, 6, 7], [-1, 0, 3]], np.int32),
)


@functools.cache
def _packed(case):
    module = layer(case, decode=True)

    def apply(params, cache, x, mask, segment_ids, slots):
        options = dict(mask=mask, segment_ids=segment_ids, slots=slots, mutable=["cache"])
        y, variables = module.apply({"params": params, "cache": cache}, x, **options)
        return y, variables["cache"]

    return jax.jit(apply)


@each_rich
def test_packed_segments_go_on_from_their_slots(case):
    if case.startswith("path"):
        pytest.skip("its cache has a capacity for each row: see the refusal below")
    params, empty = parameters(case), empty_cache(case, ROWS)
    nan = jax.tree.map(lambda x: np.where(x.dtype.kind == "f", np.nan, x).astype(x.dtype), empty)
    unused = np.array([1, 3, 8])
    cache = jax.tree.map(lambda x, y: np.copy(x), empty, nan)
    for x, y in zip(jax.tree.leaves(cache), jax.tree.leaves(nan), strict=True):
        x[unused] = y[unused]
    before, tokens, outputs = cache, {}, {}
    for seed, (rows, slots) in enumerate(zip(CALLS, SLOTS, strict=True)):
        x = normal(seed, 2, T, D)
        lengths = [[n for _, n in row] for row in rows]
        ids = np.stack([np.repeat(np.arange(3), row) for row in lengths]).astype(np.int32)
        there = np.array([[s is not None for s, _ in row] for row in rows])
        mask = np.take_along_axis(there, ids, axis=1)
        x = np.where(mask[..., None], x, np.float32("nan"))
        # Padding as a mask, as the id -1 or as a slot -1: in the second call as the last two.
        given = ids if seed == 0 else np.where(mask, ids, -1).astype(np.int32)
        y, cache = run(
            _packed(case), params, cache, x, mask if seed == 0 else mask | True, given, slots
        )
        assert not np.any(y[~mask])
        for b, row in enumerate(rows):
            for n, (sequence, _) in enumerate(row):
                if sequence is not None:
                    here = ids[b] == n
                    tokens.setdefault(sequence, []).append(x[b][here])
                    outputs.setdefault(sequence, []).append(y[b][here])
    for sequence, parts in tokens.items():
        want, state = numpy_layer(case, np.concatenate(parts))
        layers_close(np.concatenate(outputs[sequence]), want)
        trees_close(row_of(cache, sequence), state)
    chex.assert_trees_all_equal(*(jax.tree.map(lambda x: x[unused], c) for c in (cache, before)))


@pytest.mark.parametrize("name", ["path", "softmax"])
def test_caches_of_tokens_take_rows(name):
    module = layer("path-plain", decode=True) if name == "path" else Attention(2, decode=True)
    x, ids = np.zeros((2, T, D), np.float32), np.zeros((2, T), np.int32)
    variables = jax.eval_shape(module.init, jax.random.key(0), x)
    with pytest.raises(NotImplementedError, match="a row of its own"):
        jax.eval_shape(
            lambda v: module.apply(v, x, segment_ids=ids, slots=SLOTS[0], mutable=["cache"]),
            variables,
        )


@pytest.mark.parametrize(
    "ids, message",
    [
        (None, "segment_ids must be given with slots of shape"),
        (np.full((2, T), 3, np.int32), "must be 0 to 2, for the N = 3 segments of slots"),
        (np.tile(np.arange(T) % 2, (2, 1)), "id 0 in several places of row 0"),
    ],
)
def test_wrong_ids_raise(ids, message):
    module = layer("kda-plain", decode=True)
    variables = jax.eval_shape(module.init, jax.random.key(0), np.zeros((ROWS, 1, D), np.float32))
    x = np.zeros((2, T, D), np.float32)
    with pytest.raises(ValueError, match=message):
        jax.eval_shape(
            lambda v: module.apply(v, x, segment_ids=ids, slots=SLOTS[0], mutable=["cache"]),
            variables,
        )


def test_a_models_last_logits_of_segments():
    """Each prompt's last token's, and the states, as if it were alone."""
    mixer = jla.linen.KimiDeltaAttention(1, conv_size=2)
    config = jla.models.Config(30, 16, (jla.models.Layer(mixer, jla.models.SwiGLU(8)),))
    model = jla.models.LanguageModel(config, decode=True, implementation="reference")
    tokens = np.random.default_rng(0).integers(0, 30, (1, 11), np.int32)
    variables = model.init(jax.random.key(0), np.zeros((4, 1), np.int32))
    ids = np.repeat([0, 2, 1], (4, 5, 2)).astype(np.int32)[None]
    slots = np.array([[3, 0, 1]], np.int32)

    @jax.jit
    def prefill(variables, tokens, ids, slots):
        options = dict(segment_ids=ids, slots=slots, last_only=True, mutable=["cache"])
        return model.apply(variables, tokens, **options)

    @jax.jit
    def alone(variables, tokens):
        return model.apply(variables, tokens, last_only=True, mutable=["cache"])

    got, cache = prefill(variables, tokens, ids, slots)
    assert got.shape == (1, 3, 30)
    for n in (0, 1, 2):
        one = jax.tree.map(lambda x: x[:1], variables["cache"])
        mine = tokens[:, ids[0] == n]
        want, after = alone(variables | {"cache": one}, mine)
        layers_close(got[:, n], want[:, 0], 1e-5)
        trees_close(
            jax.tree.map(lambda x, n=n: x[slots[0, n]], cache["cache"]),
            jax.tree.map(lambda x: x[0], after["cache"]),
            1e-5,
        )
