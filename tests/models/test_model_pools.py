"""Attention and whole models on a pool of caches (docs/pools.md)."""

import functools

import jax
import numpy as np
import pytest
from evaluator import evaluated
from model_formulas import normal, random_params

import jla
from jla.models import Attention, Config, LanguageModel, LatentAttention, Layer, SwiGLU, empty_cache

D, ROWS, ROOM = 12, 4, 9
SLOTS = np.array([2, -1, 0], np.int32)
LIVE, REST = np.array([0, 2]), np.array([1, 3])
MASK = np.array([[1, 1, 1, 1, 0], [1, 1, 1, 1, 1], [0, 1, 1, 0, 0]], bool)
LATENTS = dict(num_heads=2, latent_dim=8, nope_dim=6, rope_dim=4, value_dim=6, rope_theta=100.0)
LAYERS = {
    "plain": Attention(num_heads=2),
    "rich": Attention(num_heads=4, num_key_heads=2, key_dim=8, window=4),
    "latent": LatentAttention(**LATENTS),
}


def caller(module):
    def call(variables, x, mask, slots):
        y, updated = module.apply(variables, x, mask=mask, slots=slots, mutable=["cache"])
        return y, updated["cache"]

    return evaluated(jax.jit(call))


def zeros(tree):
    return jax.tree.map(lambda x: np.zeros(x.shape, x.dtype), tree)


def used(tree):
    return jax.tree.map(lambda x: np.full_like(x, np.nan if x.dtype.kind == "f" else 3), tree)


same = np.testing.assert_array_equal
close = functools.partial(np.testing.assert_allclose, rtol=1e-5, atol=1e-6)


def agree(pool, alone, before, same_rows=same):
    """The rows of the slots are these; the others are as they were."""
    jax.tree.map(lambda x, y: same_rows(x[SLOTS[LIVE]], y[LIVE]), pool, alone)
    jax.tree.map(lambda x, y: same(x[REST], y[REST]), pool, before)


@pytest.mark.parametrize("name", LAYERS)
def test_rows_of_a_pool_are_rows(name):
    """To the bit: prompts with padding, then a token or padding."""
    module = LAYERS[name].clone(decode=True)
    inputs = jax.ShapeDtypeStruct((ROWS, ROOM, D), np.float32)
    shapes = jax.eval_shape(module.init, jax.random.key(0), inputs)
    params, before = random_params(module, inputs), used(zeros(shapes["cache"]))
    call = caller(module)
    pool = evaluated(jax.jit(jla.linen.clear))(before, SLOTS)
    alone = jax.tree.map(lambda x: np.zeros((len(SLOTS), *x.shape[1:]), x.dtype), before)
    for i, mask in enumerate((MASK, MASK[:, :1])):
        x = normal(i, 3, 1 if i else 5, D)
        wanted, alone = call({"params": params, "cache": alone}, x, mask, None)
        x = np.where(np.arange(3)[:, None, None] == 1, np.nan, x).astype(np.float32)
        y, pool = call({"params": params, "cache": pool}, x, mask, SLOTS)
        same(y[LIVE], wanted[LIVE])
        assert not np.any(y[1])
        agree(pool, alone, before)


def test_a_model_passes_its_slots_on():
    mixers = jla.linen.KimiDeltaAttention(num_heads=2, key_dim=16), Attention(num_heads=2)
    layers = tuple(Layer(mixer, SwiGLU(16)) for mixer in mixers)
    model = LanguageModel(Config(20, width=D, layers=layers), decode=True)
    tokens = np.arange(15).reshape(3, 5)
    params = random_params(model, tokens)
    before = used(jax.device_get(empty_cache(model, ROWS, ROOM)))
    call = caller(model)
    pool = evaluated(jax.jit(jla.linen.clear))(before, SLOTS)
    alone = jax.device_get(empty_cache(model, len(SLOTS), ROOM))
    for part, mask in ((tokens, MASK), (tokens[:, :1], None)):
        wanted, alone = call({"params": params, "cache": alone}, part, mask, None)
        logits, pool = call({"params": params, "cache": pool}, part, mask, SLOTS)
        where = LIVE if mask is None else (np.array([0, 0, 2]), np.array([0, 3, 1]))
        close(logits[where], wanted[where])  # NumPy's products of other rows round otherwise
        agree(pool, alone, before, close)
    with pytest.raises(ValueError, match=r"jla\.models.LanguageModel: slots need decode=True"):
        model.clone(decode=False).apply({"params": params}, tokens, slots=SLOTS)
