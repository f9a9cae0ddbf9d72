"""Generating: decoding is the forward, padded prompts, ends, stacked parameters, mistakes."""

import functools
import importlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from model_formulas import random_params

import jla
from jla.linen import _projections
from jla.models import (
    Attention,
    Config,
    LanguageModel,
    Layer,
    SwiGLU,
    empty_cache,
    generate,
    stack,
    unstack,
)

module = importlib.import_module("jla.models.generate")  # the name is the function's, too
V, N = 30, 5
ATTENTION = Attention(num_heads=2, num_key_heads=1, window=4)
PLAIN = LanguageModel(Config(V, 12, (Layer(ATTENTION, SwiGLU(20)),)))
HYBRID = LanguageModel(
    Config(
        V,
        12,
        (
            Layer(jla.linen.KimiDeltaAttention(num_heads=1, key_dim=16), SwiGLU(8)),
            Layer(ATTENTION, SwiGLU(20)),
        ),
        tied=False,
    ),
    implementation="reference",
)
PROMPT = np.array([3, 14, 15, 9, 2], np.int32)


def params_of(model):
    return random_params(model, PROMPT[None])


def test_greedy_tokens_are_the_forwards_and_padding_changes_nothing():
    params = params_of(HYBRID)
    mask = np.array([[0, 0, 1, 1, 1, 1, 1], [1, 1, 1, 1, 1, 0, 0], [1, 0, 1, 1, 0, 1, 1]], bool)
    prompts = np.zeros(mask.shape, np.int32)
    prompts[mask] = np.tile(PROMPT, len(mask))
    new = np.asarray(generate(HYBRID, params, prompts, mask=mask, max_new_tokens=N))
    assert new.shape == (3, N) and new.dtype == np.int32
    np.testing.assert_array_equal(new, new[:1].repeat(3, axis=0))
    whole = np.concatenate([PROMPT, new[0]])[None]
    logits = jax.jit(HYBRID.apply)({"params": params}, whole)[0]
    np.testing.assert_array_equal(np.argmax(logits, axis=-1)[len(PROMPT) - 1 : -1], new[0])


def test_sampling_from_a_stacked_model():
    """The tokens differ from row to row and key to key; with any token for an end, the first is
    repeated."""
    model, params = PLAIN.clone(stacked=True), stack(params_of(PLAIN))
    prompts = np.tile(PROMPT, (16, 1))
    options = dict(max_new_tokens=2, temperature=3.0, eos=range(V))
    one, other = (
        np.asarray(generate(model, params, prompts, key=jax.random.key(i), **options))
        for i in (1, 2)
    )
    assert len(np.unique(one[:, 0])) > 4 and np.any(one != other)
    assert 0 <= one.min() and one.max() < V
    np.testing.assert_array_equal(one[:, 0], one[:, 1])


def test_the_temperature_and_the_keys_of_sampling(monkeypatch):
    """Tokens are drawn with p ** (1 / temperature), each by a key of its own."""

    def feed(decoder, params, tokens, cache):
        return jnp.tile(logits[None], (tokens.shape[0], 1)), cache

    monkeypatch.setattr(module, "feed", feed)
    logits = jnp.full(256, -1e9).at[jnp.array([3, 7])].set(jnp.log(jnp.array([0.8, 0.2])))
    start = jnp.tile(logits[None], (50, 1))
    for temperature, share in ((1.0, 0.8), (0.5, 0.64 / 0.68), (0.0, 1.0)):
        tokens, drawn_from, _ = module.draw(
            None, None, start, (), jax.random.key(0), temperature, 40
        )
        assert tokens.shape == (50, 40) and drawn_from.shape == (50, 40, 256)
        assert set(np.unique(tokens)) <= {3, 7}
        assert float((tokens == 3).mean()) == pytest.approx(share, abs=0.03)
        if temperature:
            assert (tokens[:, 1:] != tokens[:, :-1]).any(axis=1).mean() > 0.5


def test_behind_an_end_a_row_has_only_that(monkeypatch):
    """The likeliest token is always the next number."""

    def feed(decoder, params, tokens, cache):
        return jax.nn.one_hot(tokens[:, 0] + 1, V), cache

    monkeypatch.setattr(module, "feed", feed)
    start = jax.nn.one_hot(jnp.array([5, 8, 7, 1]), V)
    tokens, *_ = module.draw(None, None, start, (), None, 1.0, 4, eos=(7, 9))
    assert tokens.tolist() == [[5, 6, 7, 7], [8, 9, 9, 9], [7, 7, 7, 7], [1, 2, 3, 4]]


def test_a_caches_shapes():
    cache = jax.eval_shape(lambda: empty_cache(HYBRID, 3, length=9))
    assert cache["block_1"]["mixer"]["cached_key"].shape == (3, 1, 9, 6)
    assert cache["block_0"]["mixer"]["recurrent_state"].shape == (3, 1, 16, 16)


def test_stacking_undoes_unstacking():
    params = params_of(PLAIN)
    there = stack(params)
    assert set(there) == {"embed", "blocks", "final_norm"}
    back = unstack(there)
    jax.tree.map(np.testing.assert_array_equal, back, params)
    assert jax.tree.structure(back) == jax.tree.structure(dict(params))


@pytest.mark.parametrize(
    "run, words",
    [
        (lambda: stack({"embed": 1}), "stack: block_0 ['embed']"),
        (lambda: stack({"block_0": {}, "block_2": {}}), "stack: gap 'block_2'"),
        (
            lambda: stack({"block_0": {"w": np.zeros(3)}, "block_1": {"w": np.zeros(4)}}),
            "stack: block_1['w'] (4,) block_0['w'] (3,)",
        ),
        (
            lambda: stack({"block_0": {"w": np.zeros(3)}, "block_1": {"v": np.zeros(3)}}),
            "stack: block_1['w'] None",
        ),
        (lambda: unstack({"block_0": {}}), "unstack: \"blocks\" ['block_0']"),
        (
            lambda: unstack({"blocks": {"v": np.zeros((2, 3)), "w": np.zeros((4, 3))}}),
            "unstack: first axis [2, 4]",
        ),
    ],
)
def test_wrong_parameters(run, words):
    assert_raises(run, "ValueError", words)


@pytest.mark.parametrize(
    "changes, words",
    [
        (dict(tokens=PROMPT), "ValueError tokens [B, T] (5,)"),
        (dict(tokens=PROMPT[None] / 2), "TypeError tokens integers"),
        (dict(max_new_tokens=0), "ValueError max_new_tokens at least 1, got 0"),
        (dict(temperature=-1.0), "ValueError temperature at least 0, got -1.0"),
        (dict(temperature=1.0), "ValueError key jax.random.key temperature=1.0 None"),
        (dict(eos=V), "ValueError eos 0 to 29, got 30"),
        (dict(eos=[1, 2.5]), "TypeError eos integer [1, 2.5]"),
        (dict(top_k=0), "ValueError top_k at least 1, got 0"),
        (dict(top_k=2.0), "TypeError top_k integer float"),
        (dict(top_p=0.0), "ValueError top_p above 0 at most 1, got 0.0; None"),
        (dict(mask=np.ones((1, 4), bool)), "ValueError mask T = 4 T = 5"),
        (dict(mask=np.ones((1, 5))), "TypeError mask bool float"),
        (dict(mask=np.zeros((1, 5), bool)), "ValueError mask real token row 0"),
    ],
)
def test_wrong_arguments(changes, words):
    kind, *words = words.split()
    options = dict(tokens=PROMPT[None], max_new_tokens=2) | changes
    params = jax.tree.map(jnp.zeros_like, params_of(PLAIN))
    assert_raises(
        lambda: generate(PLAIN, params, options.pop("tokens"), **options),
        kind,
        " ".join(["jla.models.generate:", *words]),
    )


def assert_raises(run, kind, words):
    with pytest.raises((TypeError, ValueError)) as raised:
        run()
    message = str(raised.value)
    assert raised.type.__name__ == kind and message.startswith("jla.models."), message
    assert not [word for word in words.split() if word not in message], message


def test_a_gpus_products_of_one_token_have_rows(monkeypatch):
    """Traced: the same shapes, and no product of a single row but in 32 bits; the values equal."""
    x, kernel = jnp.ones((1, 1, 2, 3), jnp.bfloat16), jnp.ones((2, 3, 4, 5), jnp.bfloat16)
    dimensions = ((2, 3), (0, 1)), ((), ())
    run = functools.partial(_projections.product, dimensions=dimensions)
    plain = run(x, kernel)
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    np.testing.assert_array_equal(run(x, kernel), plain)
    rows = [
        jax.make_jaxpr(run)(x.astype(dtype), kernel.astype(dtype)).eqns[-2:]
        for dtype in ("bfloat16", "float32")
    ]
    sizes = [[e.outvars[0].aval.shape[0] for e in eqns] for eqns in rows]
    assert sizes == [[_projections.ROWS, 1], [1]]
