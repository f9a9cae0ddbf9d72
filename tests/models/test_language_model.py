"""The language model: its formula, parameters, stacked blocks, rematerialisation, mistakes."""

import dataclasses
import functools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from comparing import close
from flax import linen as nn
from model_formulas import language_model, normal, random_params

import jla
from jla.models import Attention, Config, LanguageModel, Layer, SwiGLU, kept, stack, unstack

V, D, B, T = 30, 12, 2, 6
TOKENS = np.random.default_rng(0).integers(0, V, (B, T), np.int32)
PLAIN = Layer(Attention(num_heads=2), SwiGLU(20))
EQUAL = Config(V, D, (PLAIN, PLAIN))
MIXED = Config(
    V,
    D,
    (PLAIN, Layer(Attention(num_heads=3, key_dim=4, window=2, use_bias=True), SwiGLU(8))),
    norm_epsilon=0.1,
    tied=False,
)


def shapes_of(model):
    params = jax.eval_shape(model.init, jax.random.key(0), TOKENS)["params"]
    leaves = jax.tree_util.tree_leaves_with_path(params)
    return {"/".join(key.key for key in path): leaf.shape for path, leaf in leaves}


@pytest.mark.parametrize("config", [EQUAL, MIXED], ids=["tied", "mixed"])
def test_logits_are_the_formulas(config):
    model = LanguageModel(config)
    params = random_params(model, TOKENS)
    logits = jax.jit(model.apply)({"params": params}, TOKENS)
    assert logits.shape == (B, T, V) and logits.dtype == jnp.float32
    for row in range(B):
        close(logits[row], language_model(config, params, TOKENS[row]), 1e-5)


def test_only_the_last_real_tokens_logits():
    model = LanguageModel(EQUAL)
    params = random_params(model, TOKENS)
    mask = np.array([[0, 1, 1, 1, 0, 0], [1, 1, 0, 1, 1, 1]], bool)
    whole = functools.partial(model.apply, {"params": params}, TOKENS)
    last = jax.jit(functools.partial(whole, last_only=True))(mask)
    assert last.shape == (B, 1, V)
    for row, real in enumerate(mask):
        close(last[row, 0], language_model(EQUAL, params, TOKENS[row][real])[-1], 1e-5)


def test_parameters_have_their_names_and_shapes():
    block = {
        "mixer_norm/scale": (D,),
        "mixer/query/kernel": (D, 2, 6),
        "mixer/key/kernel": (D, 2, 6),
        "mixer/value/kernel": (D, 2, 6),
        "mixer/out/kernel": (2, 6, D),
        "mlp_norm/scale": (D,),
        "mlp/gate/kernel": (D, 20),
        "mlp/up/kernel": (D, 20),
        "mlp/down/kernel": (20, D),
    }
    around = {"embed/embedding": (V, D), "final_norm/scale": (D,)}
    blocks = {f"block_{i}/{name}": shape for i in (0, 1) for name, shape in block.items()}
    assert shapes_of(LanguageModel(EQUAL)) == around | blocks
    head = {"head/kernel": (D, V)}
    assert shapes_of(LanguageModel(dataclasses.replace(EQUAL, tied=False))) == (
        around | blocks | head
    )
    stacked = {f"blocks/{name}": (2, *shape) for name, shape in block.items()}
    assert shapes_of(LanguageModel(EQUAL, stacked=True, remat=kept)) == around | stacked


class Mean(nn.Module):
    """A mixer of someone else's, which knows nothing of dtypes: the mean of all tokens so far."""

    @nn.compact
    def __call__(self, x, mask=None, segment_ids=None):
        count = jnp.arange(1, x.shape[1] + 1, dtype=x.dtype)
        return nn.Dense(x.shape[-1], name="kernel_of")(x).cumsum(axis=1) / count[None, :, None]


def test_stacked_is_unstacked():
    """Values and gradients, with all that only saves memory."""
    config = Config(V, D, (Layer(Mean(), SwiGLU(20)),) * 2)
    plain, stacked = LanguageModel(config), LanguageModel(config, stacked=True, remat=kept)
    params = random_params(plain, TOKENS)
    weights = normal(1, B, T, V)

    def gradient(model):
        def loss(params):
            return jnp.sum(model.apply({"params": params}, TOKENS) * weights)

        return jax.jit(jax.value_and_grad(loss))

    value, gradients = gradient(plain)(params)
    same_value, same = gradient(stacked)(stack(params))
    close(same_value, value, 1e-5)
    jax.tree.map(functools.partial(close, tolerance=1e-5), unstack(same), gradients)


@pytest.mark.parametrize("stacked", [False, True])
def test_backward_passes_have_cast_matrices(stacked):
    """With remat a block's matrices are cast outside of what is run again."""
    model = LanguageModel(EQUAL, dtype=jnp.bfloat16, stacked=stacked, remat=kept)
    params = random_params(model, TOKENS)
    jaxpr = jax.make_jaxpr(lambda params: model.apply({"params": params}, TOKENS))(params)
    (checkpoint, *_) = equations(jaxpr.jaxpr, "checkpoint")
    shapes = {(x.aval.shape, x.aval.dtype.name) for x in checkpoint.invars}
    assert ((D, 20), "bfloat16") in shapes and ((D, 20), "float32") not in shapes
    plain = jax.make_jaxpr(lambda params: model.clone(remat=None).apply({"params": params}, TOKENS))
    assert not list(equations(plain(params).jaxpr, "checkpoint"))


def equations(jaxpr, name):
    """All equations of a primitive, also inside of others."""
    for equation in jaxpr.eqns:
        if equation.primitive.name in (name, "remat2" if name == "checkpoint" else name):
            yield equation
        for inner in jax.tree.leaves(tuple(equation.params.values())):
            inner = getattr(inner, "jaxpr", inner)
            if hasattr(inner, "eqns"):
                yield from equations(inner, name)


@pytest.mark.parametrize("vocabulary, gathers", [(2048, 0), (2049, 1)])
def test_large_vocabularies_are_looked_up(vocabulary, gathers):
    model = LanguageModel(Config(vocabulary, 8, (Layer(Attention(1), SwiGLU(4)),)))
    params = jax.eval_shape(model.init, jax.random.key(0), TOKENS)
    jaxpr = jax.make_jaxpr(model.apply)(params, TOKENS)
    assert len(list(equations(jaxpr.jaxpr, "gather"))) == gathers


def test_masks_and_segments_reach_the_mixers():
    """A packed, padded row of a hybrid model is its segments alone."""
    kda = Layer(jla.linen.KimiDeltaAttention(num_heads=1, key_dim=16), SwiGLU(8))
    model = LanguageModel(Config(V, D, (kda, PLAIN)), implementation="reference")
    params = random_params(model, TOKENS)
    first, second = TOKENS[0], TOKENS[1][:3]
    zeros = functools.partial(np.zeros, dtype=np.int32)
    # Both in a row with padding between them, and each alone, padded on either side.
    rows = [
        (np.concatenate([first, zeros(2), second, zeros(1)]), "111111001110", "111111442222"),
        (np.concatenate([zeros(6), first]), "000000111111", "222222222222"),
        (np.concatenate([second, zeros(9)]), "111000000000", "555444444444"),
    ]
    tokens, mask, ids = zip(*rows, strict=True)
    mask, ids = (np.array([[int(x) for x in row] for row in rows]) for rows in (mask, ids))
    packed, one, other = jax.jit(model.apply)({"params": params}, np.stack(tokens), mask > 0, ids)
    close(packed[:6], one[6:], 1e-5)
    close(packed[8:11], other[:3], 1e-5)


def test_configs_can_be_compared_and_hashed():
    again = Config(V, D, (Layer(Attention(num_heads=2), SwiGLU(20)),) * 2)
    assert again == EQUAL and hash(again) == hash(EQUAL)
    assert LanguageModel(again) == LanguageModel(EQUAL) != LanguageModel(MIXED)
    assert hash(LanguageModel(again)) == hash(LanguageModel(EQUAL))


class Parent(nn.Module):
    @nn.compact
    def __call__(self):
        return Layer(Attention(num_heads=2), SwiGLU(4))


@pytest.mark.parametrize(
    "make, words",
    [
        (lambda: Config(0, D, (PLAIN,)), "ValueError Config: vocabulary at least 1, got 0"),
        (lambda: Config(V, 1.5, (PLAIN,)), "TypeError Config: width integer, got float"),
        (lambda: Config(V, D, [PLAIN]), "TypeError Config: layers tuple of Layer, got list"),
        (lambda: Config(V, D, ()), "ValueError Config: layers at least one Layer, empty"),
        (lambda: Config(V, D, (PLAIN, 3)), "TypeError Config: layers[1] Layer, got 3"),
        (lambda: Config(V, D, (PLAIN,), 0.0), "ValueError Config: norm_epsilon positive, 0.0"),
        (lambda: Config(V, D, (PLAIN,), tied=1), "TypeError Config: tied True or False, got 1"),
        (lambda: Layer(Attention, SwiGLU(4)), "TypeError Layer: mixer Module, got Attention"),
        (lambda: Layer(Attention(1), "mlp"), "TypeError Layer: mlp Module, got 'mlp'"),
        (
            lambda: Parent().apply({}),
            "ValueError Layer: mixer own, got a Attention inside of a Parent;",
        ),
    ],
)
def test_wrong_configs(make, words):
    assert_raises(make, words)


@pytest.mark.parametrize(
    "settings, arguments, words",
    [
        (dict(config=3), {}, "TypeError config jla.models.Config, got 3"),
        (dict(dtype="int8"), {}, "TypeError dtype float32, got int8"),
        (dict(implementation="cuda"), {}, "ValueError implementation 'xla' got 'cuda'"),
        ({}, dict(tokens=np.zeros((B, T))), "TypeError tokens integers, got float"),
        ({}, dict(tokens=TOKENS[0]), "ValueError tokens axes [B, T] shape (6,)"),
        ({}, dict(mask=np.ones((B, T - 1), bool)), "ValueError mask T = 5 tokens has T = 6"),
        (dict(stacked=True, decode=True), {}, "ValueError decode=True stacked=False unstack"),
        (
            dict(config=MIXED, stacked=True),
            {},
            "ValueError stacked=True config.layers[1].mixer Attention(num_heads=3, key_dim=4, "
            "use_bias=True, window=2) config.layers[0].mixer Attention(num_heads=2)",
        ),
        (
            dict(config=Config(V, D, (PLAIN, Layer(Attention(2), SwiGLU(4, dtype="bfloat16"))))),
            {},
            "ValueError config.layers[1].mlp dtype=bfloat16 float32; leave",
        ),
        (
            dict(config=Config(V, D, (Layer(Attention(2, decode=True), SwiGLU(4)),))),
            {},
            "ValueError config.layers[0].mixer decode=True False; leave",
        ),
        (
            dict(config=Config(V, D, (Layer(Attention(5), SwiGLU(4)),))),
            {},
            "ValueError jla.models.Attention: last axis = 12 num_heads = 5",
        ),
        (
            dict(config=Config(V, D, (Layer(Attention(2), SwiGLU(0)),))),
            {},
            "ValueError jla.models.SwiGLU: hidden at least 1, got 0",
        ),
    ],
)
def test_wrong_models(settings, arguments, words):
    model = LanguageModel(**dict(config=EQUAL) | settings)
    arguments = dict(tokens=TOKENS) | arguments
    kind, *words = words.split()
    run = functools.partial(jax.eval_shape, model.init, jax.random.key(0), **arguments)
    assert_raises(run, " ".join([kind, "jla.models.LanguageModel:", *words]))


def assert_raises(run, words):
    kind, *words = words.split()
    with pytest.raises((TypeError, ValueError)) as raised:
        run()
    message = str(raised.value)
    assert raised.type.__name__ == kind and message.startswith("jla.models."), message
    assert not [word for word in words if word not in message], message


def test_templates_may_say_what_the_model_says():
    layer = Layer(Attention(2, dtype=jnp.bfloat16), SwiGLU(4, param_dtype=jnp.bfloat16))
    model = LanguageModel(Config(V, D, (layer,)), dtype="bfloat16", param_dtype=jnp.bfloat16)
    assert shapes_of(model)["block_0/mlp/up/kernel"] == (D, 4)
    params = jax.eval_shape(model.init, jax.random.key(0), TOKENS)["params"]
    chex.assert_trees_all_equal_dtypes(params, jax.tree.map(lambda _: jnp.bfloat16(0), params))
