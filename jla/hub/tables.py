"""The tables: each layer's parameters, their names in fla's files and in Kimi Linear's, once.

A table has all that a layer can have; a layer without a bias, say, has no use for that row. Names
are as they stand behind the layer's own, as "model.layers.0.attn.".
"""

from collections.abc import Mapping

from flax import linen as nn

from jla import linen, models
from jla.hub.mapping import FLAT, FROM_HEADS, MATRIX, SAME, TAPS, Form, Row, under


def _convolution(letter: str) -> tuple[Row, ...]:
    name = f"{letter}_conv1d"
    return Row(f"{name}/kernel", f"{name}.weight", TAPS), Row(f"{name}/bias", f"{name}.bias", FLAT)


# Of the delta rule's layer, whatever the file.
_DELTA = (
    Row("q_proj/kernel", "q_proj.weight", MATRIX),
    Row("k_proj/kernel", "k_proj.weight", MATRIX),
    Row("v_proj/kernel", "v_proj.weight", MATRIX),
    *(row for letter in "qkv" for row in _convolution(letter)),
    Row("b_proj/kernel", "b_proj.weight", MATRIX),
    Row("dt_bias", "dt_bias", FLAT),
    Row("o_norm/scale", "o_norm.weight", SAME),
    Row("o_proj/kernel", "o_proj.weight", FROM_HEADS),
)

KDA = (
    *_DELTA,
    Row("A_log", "A_log", SAME),
    Row("f_proj_down/kernel", "f_proj.0.weight", MATRIX),
    Row("f_proj_up/kernel", "f_proj.1.weight", MATRIX),
    Row("g_proj_down/kernel", "g_proj.0.weight", MATRIX),
    Row("g_proj_up/kernel", "g_proj.1.weight", MATRIX),
    Row("g_proj_up/bias", "g_proj.1.bias", FLAT),
)

GSA = (
    Row("q_proj/kernel", "q_proj.weight", MATRIX),
    Row("k_proj/kernel", "k_proj.weight", MATRIX),
    Row("v_proj/kernel", "v_proj.weight", MATRIX),
    Row("f_proj/kernel", "f_proj.weight", MATRIX),
    *(row for letter in "qkv" for row in _convolution(letter)),
    Row("feature_map/kernel", "feature_map.layer.weight", MATRIX),
    Row("g_norm/scale", "g_norm.weight", FLAT),
    Row("o_proj/kernel", "o_proj.weight", FROM_HEADS),
)

MESA = (
    Row("q_proj/kernel", "q_proj.weight", MATRIX),
    Row("k_proj/kernel", "k_proj.weight", MATRIX),
    Row("v_proj/kernel", "v_proj.weight", MATRIX),
    Row("a_proj/kernel", "a_proj.weight", MATRIX),
    Row("a_proj/bias", "a_proj.bias", SAME),
    Row("b_proj/kernel", "b_proj.weight", MATRIX),
    Row("b_proj/bias", "b_proj.bias", SAME),
    Row("lambda_params", "lambda_params", FLAT),
    *(row for letter in "qk" for row in _convolution(letter)),
    Row("g_proj/kernel", "g_proj.weight", MATRIX),
    Row("o_norm/scale", "o_norm.weight", SAME),
    Row("o_proj/kernel", "o_proj.weight", FROM_HEADS),
)

PATH = (
    Row("q_proj/kernel", "q_proj.weight", MATRIX),
    Row("k_proj/kernel", "k_proj.weight", MATRIX),
    Row("v_proj/kernel", "v_proj.weight", MATRIX),
    Row("w_proj_down/kernel", "w_proj.0.weight", MATRIX),
    Row("w_proj_up/kernel", "w_proj.1.weight", MATRIX),
    Row("w_proj/kernel", "w_proj.weight", MATRIX),
    *_convolution("w"),
    Row("b_proj/kernel", "bt_proj.weight", MATRIX),
    Row("b_proj/bias", "bt_proj.bias", SAME),
    Row("g_proj/kernel", "g_proj.weight", MATRIX),
    Row("g_proj/bias", "g_proj.bias", SAME),
    Row("q_norm/scale", "maybe_q_norm.weight", SAME),
    Row("k_norm/scale", "maybe_k_norm.weight", SAME),
    Row("o_proj/kernel", "o_proj.weight", FROM_HEADS),
)

# One projection and one convolution, whose outputs are those of several parameters, in this order.
LOG_LINEAR = (
    Row("z_proj/kernel", "in_proj.weight", MATRIX),
    Row("v_proj/kernel", "in_proj.weight", MATRIX),
    Row("k_proj/kernel", "in_proj.weight", MATRIX),
    Row("q_proj/kernel", "in_proj.weight", MATRIX),
    Row("dt_proj/kernel", "in_proj.weight", MATRIX),
    Row("level_proj/kernel", "in_proj.weight", MATRIX),
    Row("z_proj/bias", "in_proj.bias", FLAT),
    Row("v_proj/bias", "in_proj.bias", FLAT),
    Row("k_proj/bias", "in_proj.bias", FLAT),
    Row("q_proj/bias", "in_proj.bias", FLAT),
    Row("dt_proj/bias", "in_proj.bias", FLAT),
    Row("level_proj/bias", "in_proj.bias", FLAT),
    *(Row(f"{letter}_conv1d/kernel", "conv1d.weight", TAPS) for letter in "vkq"),
    *(Row(f"{letter}_conv1d/bias", "conv1d.bias", FLAT) for letter in "vkq"),
    Row("A_log", "A_log", SAME),
    Row("dt_bias", "dt_bias", SAME),
    Row("D", "D", FLAT),
    Row("L", "L", SAME),
    Row("o_norm/scale", "norm.weight", FLAT),
    Row("o_proj/kernel", "out_proj.weight", FROM_HEADS),
    Row("o_proj/bias", "out_proj.bias", SAME),
)

ATTENTION = (
    Row("query/kernel", "q_proj.weight", MATRIX),
    Row("query/bias", "q_proj.bias", FLAT),
    Row("key/kernel", "k_proj.weight", MATRIX),
    Row("key/bias", "k_proj.bias", FLAT),
    Row("value/kernel", "v_proj.weight", MATRIX),
    Row("value/bias", "v_proj.bias", FLAT),
    Row("out/kernel", "o_proj.weight", FROM_HEADS),
)

SWIGLU = (
    Row("gate/kernel", "gate_proj.weight", MATRIX),
    Row("up/kernel", "up_proj.weight", MATRIX),
    Row("down/kernel", "down_proj.weight", MATRIX),
)

KIMI_KDA = (
    *_DELTA,
    Row("A_log", "A_log", Form(0, lambda shape: (1, 1, *shape, 1))),
    Row("f_proj_down/kernel", "f_a_proj.weight", MATRIX),
    Row("f_proj_up/kernel", "f_b_proj.weight", MATRIX),
    Row("g_proj_down/kernel", "g_a_proj.weight", MATRIX),
    Row("g_proj_up/kernel", "g_b_proj.weight", MATRIX),
)

LATENT_ATTENTION = (
    Row("query/kernel", "q_proj.weight", MATRIX),
    Row("query_down/kernel", "q_a_proj.weight", MATRIX),
    Row("query_norm/scale", "q_a_layernorm.weight", SAME),
    Row("query_up/kernel", "q_b_proj.weight", MATRIX),
    Row("latent_down/kernel", "kv_a_proj_with_mqa.weight", MATRIX),
    Row("latent_norm/scale", "kv_a_layernorm.weight", SAME),
    Row("latent_up/kernel", "kv_b_proj.weight", MATRIX),
    Row("out/kernel", "o_proj.weight", FROM_HEADS),
)

EXPERTS = (
    Row("router/kernel", "gate.weight", MATRIX),
    Row("router/correction_bias", "gate.e_score_correction_bias", SAME),
    Row("gate", "experts.{}.w1.weight", MATRIX),
    Row("up", "experts.{}.w3.weight", MATRIX),
    Row("down", "experts.{}.w2.weight", MATRIX),
    *under("shared/", "shared_experts.", SWIGLU),
)

type Tables = Mapping[type[nn.Module], tuple[Row, ...]]

FLA: Tables = {
    linen.KimiDeltaAttention: KDA,
    linen.GatedSlotAttention: GSA,
    linen.LogLinearMamba2: LOG_LINEAR,
    linen.MesaNet: MESA,
    linen.PaTHAttention: PATH,
    models.Attention: ATTENTION,
    models.SwiGLU: SWIGLU,
}
KIMI_LINEAR: Tables = {
    linen.KimiDeltaAttention: KIMI_KDA,
    models.LatentAttention: LATENT_ATTENTION,
    models.Experts: EXPERTS,
    models.SwiGLU: SWIGLU,
}
BY_NAME: Mapping[str, Tables] = {"fla": FLA, "kimi_linear": KIMI_LINEAR}


def rows_of(module: nn.Module, family: str) -> tuple[Row, ...]:
    """The table of a layer, in "fla" or "kimi_linear"."""
    tables = BY_NAME[family]
    if type(module) not in tables:
        raise ValueError(
            f"{family} has no names for a {type(module).__name__}; it has them for "
            f"{', '.join(known.__name__ for known in tables)}"
        )
    return tables[type(module)]
