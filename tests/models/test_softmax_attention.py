"""Softmax attention: its formula, padding, segments, the cache, and what is refused."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from comparing import close
from evaluator import evaluated
from model_formulas import attention, normal, random_params

from jla.models import Attention
from jla.models import attention as module

D = 12
PLAIN = Attention(num_heads=2)
# Shared keys, biases, a window, a head dimension and a base of its own.
RICH = Attention(num_heads=4, num_key_heads=2, key_dim=8, use_bias=True, window=4, rope_theta=500.0)
STILL = Attention(num_heads=3, num_key_heads=1, key_dim=5, rope_theta=None)
CASES = pytest.mark.parametrize(
    "layer", [PLAIN, RICH, STILL], ids=["plain", "rich", "without_rotation"]
)

# Rows with their real tokens in front, behind and anywhere; the last has none.
MASK = np.array(
    [
        [1, 1, 1, 1, 1, 1, 1, 0, 0, 0, 0],
        [0, 0, 1, 1, 1, 1, 1, 1, 1, 1, 1],
        [0, 1, 1, 0, 1, 1, 1, 0, 1, 1, 0],
        [1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1],
        [0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0],
    ],
    bool,
)
B, T = MASK.shape
SEGMENTS = np.resize([7, 7, 7, 2, 2, 2, 2, 2, 7, 9, 9], (B, T))


@functools.cache
def _call(layer):
    def call(variables, x, mask, segment_ids):
        return layer.apply(variables, x, mask=mask, segment_ids=segment_ids, mutable=["cache"])

    return evaluated(jax.jit(call))


def forward(layer, params, x, mask=None, segment_ids=None):
    return _call(layer)({"params": params}, x, mask, segment_ids)[0]


def advance(layer, params, cache, x, mask=None, segment_ids=None):
    variables = {"params": params, "cache": cache}
    y, updated = _call(layer.clone(decode=True))(variables, x, mask, segment_ids)
    return y, updated["cache"]


def params_of(layer):
    return random_params(layer, jnp.zeros((1, 2, D)))


def empty_cache(layer, room):
    init = functools.partial(layer.clone(decode=True).init, jax.random.key(0))
    cache = jax.eval_shape(init, jnp.zeros((B, room, D)))["cache"]
    return jax.tree.map(lambda x: np.zeros(x.shape, x.dtype), cache)


def expected(layer, params, x, ids=None):
    """The formula's outputs of one row's real tokens, segment by segment."""
    if ids is None:
        return attention(layer, params, x)
    borders = np.flatnonzero(np.diff(ids)) + 1
    return np.concatenate([attention(layer, params, part) for part in np.split(x, borders)])


@CASES
def test_values_are_the_formulas(layer):
    x, params = normal(0, B, T, D), params_of(layer)
    y = forward(layer, params, x)
    for row in range(B):
        close(y[row], expected(layer, params, x[row]), 1e-5)


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16])
def test_16_bits_stay_16_bits(dtype):
    """Traced, with strict promotion of dtypes; all forms."""
    x = jnp.zeros((B, T, D), dtype)
    for layer in (PLAIN, RICH):
        layer = layer.clone(dtype=dtype, decode=True)
        variables = jax.eval_shape(layer.init, jax.random.key(0), x)
        params = {"params": variables["params"]}
        run = functools.partial(layer.apply, mutable=["cache"])
        assert jax.eval_shape(layer.clone(decode=False).apply, params, x).dtype == dtype
        for part in (x, x[:, :1]):
            y, updated = jax.eval_shape(run, variables, part)
            assert y.dtype == updated["cache"]["cached_key"].dtype == dtype


@pytest.mark.parametrize("packed", [False, True], ids=["one", "packed"])
def test_padding_and_segments_are_as_if_alone(packed):
    params, ids = params_of(RICH), SEGMENTS if packed else None
    # Not even NaN in padding reaches anything.
    x = np.where(MASK[..., None], normal(1, B, T, D), np.float32("nan"))
    y = np.asarray(forward(RICH, params, x, MASK, ids))
    assert not np.any(y[~MASK])
    for row, real in enumerate(MASK[:-1]):
        row_ids = SEGMENTS[row][real] if packed else None
        close(y[row][real], expected(RICH, params, x[row][real], row_ids), 1e-5)


def test_blocks_of_queries_are_the_whole(monkeypatch):
    """Values and gradients, with a last block that is not full."""
    q, keys, values = normal(2, 2, T, 4, 3), normal(3, 2, 2, 13, 3), normal(4, 2, 2, 13, 5)
    last = np.arange(T, dtype=np.int32)[None]
    first = np.maximum(0, last - np.array([[3], [6]], np.int32))

    @jax.jit
    def run(*arrays):
        def loss(*arrays):
            o = module.interval_attention(*arrays, first, last)
            return jnp.sum(o * normal(5, *o.shape)), o

        return jax.grad(loss, argnums=(0, 1, 2), has_aux=True)(*arrays)

    whole = run(q, keys, values)
    monkeypatch.setattr("jla.models.intervals.QUERIES_AT_ONCE", 4)
    run.clear_cache()
    jax.tree.map(functools.partial(close, tolerance=1e-6), run(q, keys, values), whole)


@pytest.mark.parametrize(
    "layer, packed", [(PLAIN, False), (RICH, True)], ids=["plain", "rich_packed"]
)
def test_decoding_is_the_forward(layer, packed):
    """A prefill in two calls, then token by token; rows have their own lengths and segments."""
    params, x = params_of(layer), normal(4, B, T, D)
    cache, outputs = empty_cache(layer, T), []
    # Not even NaN in places that are not used reaches anything.
    unused = {name: np.full_like(cache[name], np.nan) for name in ("cached_key", "cached_value")}
    cache |= unused
    for part in (slice(0, 5), slice(5, 9), slice(9, 10), slice(10, 11)):
        # Ids name segments within a call, and the first continues the cache's.
        ids = SEGMENTS[:, part] if packed else None
        y, cache = advance(layer, params, cache, x[:, part], MASK[:, part], ids)
        outputs.append(y)
    y = np.concatenate(outputs, axis=1)
    assert not np.any(y[~MASK])
    np.testing.assert_array_equal(cache["length"], MASK.sum(axis=1))
    for row, real in enumerate(MASK[:-1]):
        row_ids = None if not packed else continued_ids(SEGMENTS[row], real)
        close(y[row][real], expected(layer, params, x[row][real], row_ids), 1e-5)


def continued_ids(ids, real):
    """Segments' numbers of a row's real tokens, when calls start at tokens 5, 9 and 10: a call's
    first real token continues the segment before it, whatever its id."""
    calls = np.searchsorted([5, 9, 10], np.arange(len(ids)), side="right")[real]
    ids = ids[real]
    starts = (np.diff(ids) != 0) & (np.diff(calls) == 0)
    return np.concatenate([[0], np.cumsum(starts)])


def test_unmasked_decoding_needs_no_equal_lengths():
    params, x = params_of(PLAIN), normal(5, B, T, D)
    cache, _ = empty_cache(PLAIN, T), None
    _, cache = advance(PLAIN, params, cache, x[:, :5], MASK[:, :5])
    y, cache = advance(PLAIN, params, cache, x[:, 5:9])
    for row in range(B):
        whole = np.concatenate([x[row, :5][MASK[row, :5]], x[row, 5:9]])
        close(y[row], attention(PLAIN, params, whole)[-4:], 1e-5)


def test_one_row_alone_and_a_prompt_for_cudnn(monkeypatch):
    """The write of one row, and the calls that cuDNN's kernel would serve if it began them."""
    layer, attend = Attention(num_heads=3), jax.nn.dot_product_attention

    def by_xla(*arrays, implementation, **options):
        return attend(*arrays, implementation="xla", **options)

    monkeypatch.setattr(module, "cudnn_serves", lambda q: True)
    monkeypatch.setattr(jax.nn, "dot_product_attention", by_xla)
    params, x = params_of(layer), normal(6, 1, T, D)
    cache = jax.tree.map(lambda leaf: leaf[:1], empty_cache(layer, T - 1))
    outputs = []
    for part in (slice(0, 5), slice(5, 9), slice(9, 10), slice(10, 11)):
        y, cache = advance(layer, params, cache, x[:, part])
        outputs.append(y)
    y = np.concatenate(outputs, axis=1)
    close(y[0, :-1], attention(layer, params, x[0, :-1]), 1e-5)
    assert np.isnan(y[0, -1]).all()  # for which there was no room


def test_tokens_without_room():
    params, x, cache = params_of(PLAIN), normal(4, B, T, D), empty_cache(PLAIN, T)
    for part in (slice(0, 5), slice(0, 5), slice(5, 9)):
        y, cache = advance(PLAIN, params, cache, x[:, part], MASK[:, part])
    fits = np.asarray(cache["length"]) <= T
    assert fits.tolist() == [False, True, True, False, True]
    assert np.isfinite(y[fits]).all() and np.isnan(y[~fits][MASK[~fits, 5:9]]).all()
    words = "room for 11 tokens, but row 3 has 9 in it and gets 4 more; the length of init's"
    with pytest.raises(ValueError, match=words):
        module.check_room(np.array([5, 0, 0, 9]), np.array([1, 2, 3, 4]), T)


def test_cudnn_is_asked_for_where_it_serves(monkeypatch):
    asked = []

    def product(q, k, v, *, is_causal, implementation):
        asked.append(implementation)
        return q

    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    monkeypatch.setattr(jax.nn, "dot_product_attention", product)

    def trace(layer, dtype, room=None, **arguments):
        layer = layer.clone(dtype=dtype, decode=room is not None)
        x = jnp.zeros((B, T, 64), dtype)
        variables = jax.eval_shape(layer.init, jax.random.key(0), x)
        asked.clear()
        jax.eval_shape(functools.partial(layer.apply, mutable=["cache"]), variables, x, **arguments)
        return list(asked)

    some, bf16 = Attention(num_heads=2), jnp.bfloat16
    assert trace(some, bf16) == ["cudnn"]
    assert trace(some, bf16, mask=MASK) == ["cudnn"]
    assert trace(some, bf16, room=T) == ["cudnn"]  # into an empty cache
    assert trace(some, jnp.float32) == ["xla"]
    assert trace(some.clone(key_dim=20), bf16) == ["xla"]
    assert trace(some, bf16, segment_ids=SEGMENTS) == []
    assert trace(some.clone(window=3), bf16) == []


@pytest.mark.parametrize(
    "fields, arguments, words",
    [
        (dict(num_heads=5), {}, "ValueError last axis = 12 multiple num_heads = 5"),
        (dict(num_heads=0), {}, "ValueError num_heads at least 1, got 0"),
        (
            dict(num_heads=4, num_key_heads=3),
            {},
            "ValueError num_heads = 4 multiple num_key_heads = 3",
        ),
        (dict(num_heads=4), {}, "ValueError key_dim even got 3 rope_theta=None"),
        (dict(num_heads=2, window=0), {}, "ValueError window at least 1, got 0"),
        (dict(num_heads=2, window=1.5), {}, "TypeError window integer 1.5"),
        (dict(num_heads=2, rope_theta=-1.0), {}, "ValueError rope_theta positive -1.0"),
        (dict(num_heads=2), dict(mask=np.ones((B, T))), "TypeError mask bool float32"),
        (dict(num_heads=2), dict(mask=MASK[:, 1:]), "ValueError mask T = 10 T = 11"),
        (dict(num_heads=2), dict(segment_ids=MASK), "TypeError segment_ids integers bool"),
        (dict(num_heads=2, decode=True), {}, 'ValueError decode=True "cache" init'),
    ],
)
def test_wrong_arguments(fields, arguments, words):
    layer, x = Attention(**fields), jnp.zeros((B, T, D))
    kind, *words = words.split()
    with pytest.raises((TypeError, ValueError)) as raised:
        if fields.get("decode"):
            jax.eval_shape(layer.apply, {"params": params_of(PLAIN)}, x, **arguments)
        else:
            jax.eval_shape(functools.partial(layer.init, jax.random.key(0)), x, **arguments)
    message = str(raised.value)
    assert raised.type.__name__ == kind and message.startswith("jla.models.Attention: ")
    assert not [word for word in words if word not in message], message
