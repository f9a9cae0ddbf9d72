"""Configs: what each field does, and what is refused by name. Layers of one's own models."""

import checkpoints
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import traverse_util

import jla.hub
from jla import linen, models
from jla.hub import fla, kimi_linear, tables

KIMI = {"model_type": "kimi_linear", "layer_types": ["linear_attention", "full_attention"]} | {
    "num_hidden_layers": 2
}


def refused(config, *words):
    with pytest.raises(ValueError, match=r"^jla\.hub\.model: config of a ") as error:
        jla.hub.model(config)
    for word in words:
        assert word in str(error.value)
    return str(error.value)


@pytest.mark.parametrize("kind", fla.FIELDS)
def test_defaults_are_those_of_fla(kind):
    """A config without fields is that of its class: sizes are those of its file there."""
    layer = jla.hub.model({"model_type": kind}).config.layers[0]
    assert layer.mlp.hidden == 5632  # 256 * ceil(2048 * 4 * 2 / 3 / 256)
    heads = dict(kda=16, gsa=4, mesa_net=16, path_attn=32, log_linear_mamba2=64)
    assert layer.mixer.num_heads == heads[kind]
    epsilon = 1e-5 if kind in ("gsa", "log_linear_mamba2") else 1e-6
    assert kind == "path_attn" or layer.mixer.norm_epsilon == epsilon


HONOURED = [
    ({"model_type": "kda", "num_v_heads": 32}, dict(num_heads=32, num_key_heads=16)),
    ({"model_type": "kda", "expand_v": 0.5}, dict(key_dim=128, value_dim=64)),
    ({"model_type": "kda", "use_short_conv": False}, dict(conv_size=None)),
    ({"model_type": "kda", "lower_bound": -5.0}, dict(gate_lower_bound=-5.0)),
    ({"model_type": "kda", "allow_neg_eigval": True}, dict(allow_negative_eigenvalues=True)),
    ({"model_type": "gsa"}, dict(key_dim=512, value_dim=512, num_slots=64, conv_size=None)),
    ({"model_type": "gsa", "exapnd_k": 0.5}, dict(key_dim=256, value_dim=512)),
    ({"model_type": "gsa", "num_kv_heads": 2}, dict(num_heads=4, num_key_heads=2)),
    ({"model_type": "gsa", "elementwise_affine": False}, dict(norm_scale=False)),
    ({"model_type": "gsa", "feature_map": "t2r"}, dict(feature_map="t2r")),
    ({"model_type": "mesa_net", "max_cg_step_decoding": 9}, dict(cg_steps=30, cg_steps_decode=9)),
    ({"model_type": "path_attn", "use_low_rank_w": False}, dict(w_rank=None, conv_size=3)),
    ({"model_type": "path_attn", "use_w_shortconv": False}, dict(w_rank=32, conv_size=None)),
    (
        {"model_type": "log_linear_mamba2", "n_groups": 2, "rmsnorm": False},
        dict(num_key_heads=2, norm_groups=2, use_norm=False, key_dim=128, value_dim=64),
    ),
    (
        {"model_type": "log_linear_mamba2", "D_has_hdim": True, "norm_before_gate": True},
        dict(skip_per_feature=True, norm_before_gate=True, conv_bias=True, use_bias=False),
    ),
]


@pytest.mark.parametrize("config, fields", HONOURED, ids=[str(x) for x in range(len(HONOURED))])
def test_honoured(config, fields):
    mixer = jla.hub.model(config).config.layers[0].mixer
    assert {name: getattr(mixer, name) for name in fields} == fields


def test_hybrids():
    """Softmax attention at the layers that a dict names, or one of several."""
    some = {"layers": [1], "num_heads": 16, "num_kv_heads": 4, "window_size": 512}
    other = {"layers": [3], "num_heads": 8, "qkv_bias": True, "rope_theta": 5e5}
    config = {"model_type": "kda", "num_hidden_layers": 4, "attn": [some, other]}
    mixers = [layer.mixer for layer in jla.hub.model(config).config.layers]
    kinds = linen.KimiDeltaAttention, models.Attention
    assert [type(x) for x in mixers] == [kinds[0], kinds[1], kinds[0], kinds[1]]
    assert mixers[1] == models.Attention(16, 4, key_dim=128, window=512)
    assert mixers[3] == models.Attention(8, 8, key_dim=256, use_bias=True, rope_theta=5e5)
    one = jla.hub.model(config | {"attn": some})
    assert one.config.layers[1].mixer == mixers[1] and type(one.config.layers[3].mixer) is kinds[0]
    wrong = {"layers": [1, 4], "num_heads": 3, "dropout": 0.1, "window_size": 0}
    said = refused(config | {"attn": wrong}, "attn.layers is [1, 4]", "attn.num_heads is 3")
    assert "attn.dropout is 0.1, an unknown field" in said and "attn.window_size is 0" in said
    refused(config | {"attn": [some, some]}, "attn.layers is [1] and has a layer twice")
    refused({"model_type": "path_attn", "attn": some}, "attn is {'layers': [1]", "unknown field")


def test_all_fields_that_cannot_be_honoured_are_in_one_error():
    wrong = {
        "attnres_block_size": 4,
        "hidden_act": "powlu",
        "num_heads": 0,
        "norm_eps": "small",
        "quantization_config": {"bits": 4},
        "tie_word_embeddings": None,
    }
    said = refused({"model_type": "kda"} | wrong, "cannot be honoured (6)")
    assert all(f"{name} is {value!r}" in said for name, value in wrong.items())


@pytest.mark.parametrize(
    "config, said",
    [
        ({"model_type": "gsa", "num_heads": 3}, "num_heads is 3 and does not divide hidden_size"),
        ({"model_type": "gsa", "expand_v": 2}, "expand_v is 2, of which only 1 is supported"),
        ({"model_type": "gsa", "expand_k": 1, "exapnd_k": 2}, "exapnd_k is 2, but expand_k is 1"),
        ({"model_type": "gsa", "num_kv_heads": 3}, "num_kv_heads is 3 and does not divide num_h"),
        ({"model_type": "kda", "num_v_heads": 24}, "num_heads is 16 and does not divide num_v_h"),
        ({"model_type": "kda", "expand_v": 0.3}, "expand_v is 0.3, with which head_dim"),
        ({"model_type": "log_linear_mamba2", "dt_limit": [0.0, 1.0]}, "dt_limit is [0.0, 1.0]"),
        ({"model_type": "log_linear_mamba2", "num_heads": 8}, "num_heads is 8 and must be 64"),
        ({"model_type": "log_linear_mamba2", "residual_in_fp32": True}, "residual_in_fp32 is True"),
        (KIMI | {"mla_use_nope": False}, "mla_use_nope is False, of which only True is supp"),
        (KIMI | {"moe_router_activation_func": "softmax"}, "moe_router_activation_func is 'softm"),
        (KIMI | {"moe_layer_freq": 2}, "moe_layer_freq is 2, of which only 1 is supported"),
        (KIMI | {"attention_bias": True}, "attention_bias is True"),
        (KIMI | {"num_nextn_predict_layers": 1}, "num_nextn_predict_layers is 1"),
        (KIMI | {"layer_types": ["full_attention"]}, "layer_types is ['full_attention'] and must"),
        (KIMI | {"num_key_value_heads": 4}, "num_key_value_heads is 4 and must be num_attention"),
        (KIMI | {"num_experts_per_token": 300}, "num_experts_per_token is 300, more than num_ex"),
        (KIMI | {"use_grouped_topk": False, "n_group": 2}, "use_grouped_topk is False, with num"),
        (
            KIMI | {"layer_types": None, "linear_attn_config": {"kda_layers": [1], "gate": 1}},
            "linear_attn_config.gate is 1, an unknown field",
        ),
        (
            KIMI | {"linear_attn_config": {"kda_layers": [1, 2], "full_attn_layers": []}},
            "layer_types is ['linear_attention', 'full_attention'], and linear_attn_config has",
        ),
    ],
    ids=lambda x: x.split()[0] if isinstance(x, str) else "",
)
def test_refused(config, said):
    refused(config, said)


def test_types_that_are_not_known():
    with pytest.raises(ValueError, match=r"^jla\.hub\.model: config must have a model_type .*None"):
        jla.hub.model({})
    with pytest.raises(ValueError, match=r"one of kda, gsa, .* kimi_linear; got 'llama'"):
        jla.hub.model({"model_type": "llama"})


@pytest.mark.parametrize("name", checkpoints.NAMES)
def test_every_field_of_the_originals_is_in_a_table(name):
    """Their configs have all fields of their classes; none is unknown, and none honoured twice."""
    config = checkpoints.config(name)
    jla.hub.model(config)
    kind = config["model_type"]
    table = kimi_linear.FIELDS if kind == "kimi_linear" else fla.FIELDS[kind]
    groups = set(table.honoured), set(table.fixed), set(table.without_effect)
    assert sum(map(len, groups)) == len(set().union(*groups))


LAYERS = [
    linen.KimiDeltaAttention(num_heads=4, num_key_heads=2, key_dim=16, value_dim=32),
    linen.GatedSlotAttention(num_heads=4, num_key_heads=2, conv_size=4, feature_map="t2r"),
    linen.MesaNet(num_heads=4, use_output_gate=True, conv_bias=True),
    linen.PaTHAttention(num_heads=4, num_key_heads=2, use_forget_gate=True, use_qk_norm=True),
    linen.PaTHAttention(num_heads=4, w_rank=None),
    linen.LogLinearMamba2(num_heads=4, num_key_heads=2, key_dim=16, conv_bias=True),
    models.Attention(num_heads=4, num_key_heads=2, use_bias=True),
    models.SwiGLU(hidden=48),
]
KIMI_LAYERS = [
    linen.KimiDeltaAttention(num_heads=4, output_gate_bias=False),
    models.LatentAttention(num_heads=4, latent_dim=16, nope_dim=16, rope_dim=8, value_dim=16),
    models.LatentAttention(
        num_heads=4, latent_dim=16, query_latent_dim=24, nope_dim=16, rope_dim=8, value_dim=16
    ),
    models.Experts(num_experts=4, experts_per_token=2, hidden=24, shared_hidden=32),
]
CASES = [(layer, "fla") for layer in LAYERS] + [(layer, "kimi_linear") for layer in KIMI_LAYERS]


def random_params(layer, D):
    """Parameters for inputs [B, T, D], NumPy arrays of random numbers."""
    inputs = jax.ShapeDtypeStruct((1, 1, D), jnp.float32)
    shapes = jax.eval_shape(layer.init, jax.random.key(0), inputs)["params"]
    random = np.random.default_rng(0)
    return jax.tree.map(lambda leaf: random.random(leaf.shape, np.float32), shapes)


@pytest.mark.parametrize("layer, names", CASES, ids=lambda x: getattr(x, "name", type(x).__name__))
def test_every_row_of_a_table_there_and_back(layer, names):
    """Every parameter has its tensor, with other numbers in each place; bit for bit both ways."""
    params = random_params(layer, 64)
    state = jla.hub.layer_state(params, "layer.", layer, names=names)
    assert sum(x.size for x in state.values()) == sum(x.size for x in jax.tree.leaves(params))
    assert all(x.flags.c_contiguous for x in state.values())
    again = jla.hub.layer_params(state | {"other": 1}, "layer.", layer, names=names)
    ours, theirs = (traverse_util.flatten_dict(x, sep="/") for x in (again, params))
    assert set(ours) == set(theirs)
    assert all(np.array_equal(ours[path], theirs[path]) for path in theirs)
    named = {row.name.format(i) for row in tables.rows_of(layer, names) for i in range(4)}
    assert {name.removeprefix("layer.") for name in state} <= named


def test_a_matrix_is_transposed_and_split_by_heads():
    """The form of each kind of tensor, written out."""
    layer = linen.MesaNet(num_heads=2, key_dim=16)
    params = random_params(layer, 24)
    state = jla.hub.layer_state(params, "", layer)
    for name, shape in dict(q_proj=(32, 24), o_proj=(24, 32), q_conv1d=(32, 1, 4)).items():
        assert state[f"{name}.weight"].shape == shape
    kernel, out = params["q_proj"]["kernel"], params["o_proj"]["kernel"]
    assert state["q_proj.weight"][17, 5] == kernel[5, 1, 1]
    assert state["o_proj.weight"][5, 17] == out[1, 1, 5]
    assert state["q_conv1d.weight"][17, 0, 3] == params["q_conv1d"]["kernel"][3, 1, 1]


def test_layers_states_are_checked():
    layer = models.SwiGLU(hidden=48)
    state = jla.hub.layer_state(
        {name: {"kernel": np.zeros(shape, np.float32)} for name, shape in SHAPES.items()}, "", layer
    )
    wrong = {"down_proj.weight": state["down_proj.weight"], "up_proj.weight": np.zeros(3), "x": 1}
    said = r"missing \(1\): gate_proj.weight. .*unexpected \(1\): x. .*up_proj.weight \[3\], where"
    with pytest.raises(ValueError, match=rf"^jla\.hub\.layer_params: .*{said}"):
        jla.hub.layer_params(wrong, "", layer)
    with pytest.raises(ValueError, match=r"state must have 'mlp.down_proj.weight'; it has no such"):
        jla.hub.layer_params(state, "mlp.", layer)
    with pytest.raises(ValueError, match=r"^jla\.hub\.layer_state: .*'down/kernel'; it has \[\]"):
        jla.hub.layer_state({}, "", layer)
    with pytest.raises(ValueError, match="fla has no names for a RMSNorm; it has them for Kimi"):
        jla.hub.layer_params(state, "", linen.RMSNorm())


SHAPES = dict(gate=(64, 48), up=(64, 48), down=(48, 64))
