"""Configs of Kimi Linear, in both of their forms, and the names in its files.

The form of the hub has `linear_attn_config`, whose lists of layers begin at 1; that of transformers
5 has `layer_types` and `mlp_layer_types`.
"""

from collections.abc import Mapping
from typing import Any

from flax import linen as nn

from jla import linen, models
from jla.hub import fields, tables
from jla.hub.fields import ANY, COUNT, COUNT_OR_ZERO, FLAG, POSITIVE, Fields
from jla.hub.mapping import MATRIX, SAME, Family, Row, under

FIELDS = Fields(
    # The values where a config has none are those of transformers.
    honoured={
        "vocab_size": (COUNT, 163840),
        "hidden_size": (COUNT, 2304),
        "num_hidden_layers": (COUNT, 27),
        "rms_norm_eps": (POSITIVE, 1e-5),
        "tie_word_embeddings": (FLAG, False),
        "linear_attn_config": (ANY, None),
        "layer_types": (ANY, None),
        "linear_num_heads": (COUNT, 32),
        "linear_head_dim": (COUNT, 128),
        "linear_conv_kernel_dim": (COUNT, 4),
        "num_attention_heads": (COUNT, 32),
        "num_key_value_heads": (COUNT.or_none(), None),
        "q_lora_rank": (COUNT.or_none(), None),
        "kv_lora_rank": (COUNT, 512),
        "qk_nope_head_dim": (COUNT, 128),
        "qk_rope_head_dim": (COUNT, 64),
        "qk_head_dim": (COUNT.or_none(), None),
        "v_head_dim": (COUNT, 128),
        "intermediate_size": (COUNT, 9216),
        "mlp_layer_types": (ANY, None),
        "first_k_dense_replace": (COUNT_OR_ZERO, 1),
        "moe_intermediate_size": (COUNT, 1024),
        "num_experts": (COUNT, 256),
        "num_experts_per_token": (COUNT, 8),
        "num_shared_experts": (COUNT_OR_ZERO, 1),
        "num_expert_group": (COUNT, 1),
        "topk_group": (COUNT, 1),
        "use_grouped_topk": (FLAG, True),
        "moe_renormalize": (FLAG, True),
        "routed_scaling_factor": (POSITIVE, 2.446),
    },
    fixed={
        "hidden_act": ("silu", "swish"),
        "mla_use_nope": (True,),
        "moe_router_activation_func": ("sigmoid",),
        "moe_layer_freq": (1,),
        "num_nextn_predict_layers": (0, None),
        "attention_bias": (False,),
        "attention_dropout": (0.0, None),
    },
    without_effect=(
        # MLA has no use for head_dim, and no positions that would turn.
        *("head_dim", "model_max_length", "output_router_logits", "pretraining_tp"),
        *("rope_scaling", "rope_theta", "rope_parameters"),
    ),
    other_names={
        "n_group": "num_expert_group",
        "n_shared_experts": "num_shared_experts",
        "norm_topk_prob": "moe_renormalize",
        "num_experts_per_tok": "num_experts_per_token",
        "num_local_experts": "num_experts",
    },
)
# What `linear_attn_config` has, and the names in the other form.
_LINEAR = {
    "num_heads": "linear_num_heads",
    "head_dim": "linear_head_dim",
    "short_conv_kernel_size": "linear_conv_kernel_dim",
}
_LAYERS = {"kda_layers": "linear_attention", "full_attn_layers": "full_attention"}


def language_model(config: Mapping[str, Any]) -> models.Config:
    """The config of the same model here.

    Raises:
      ValueError: with the name of every field that cannot be honoured.
    """
    c = fields.read(config, FIELDS, _check)
    linear = _linear(c)
    kda = linen.KimiDeltaAttention(
        num_heads=linear["num_heads"],
        key_dim=linear["head_dim"],
        conv_size=linear["short_conv_kernel_size"],
        norm_epsilon=c.rms_norm_eps,
        output_gate_bias=False,
    )
    attention = models.LatentAttention(
        num_heads=c.num_attention_heads,
        latent_dim=c.kv_lora_rank,
        query_latent_dim=c.q_lora_rank,
        nope_dim=c.qk_nope_head_dim,
        rope_dim=c.qk_rope_head_dim,
        value_dim=c.v_head_dim,
        norm_epsilon=1e-6,  # of the latents, whatever the config says
    )
    experts = models.Experts(
        num_experts=c.num_experts,
        experts_per_token=c.num_experts_per_token,
        hidden=c.moe_intermediate_size,
        shared_hidden=c.moe_intermediate_size * c.num_shared_experts,
        num_groups=c.num_expert_group,
        groups_per_token=c.topk_group,
        renormalize=c.moe_renormalize,
        routed_scale=c.routed_scaling_factor,
    )
    mixers = {"linear_attention": kda, "full_attention": attention}
    mlps = {"dense": models.SwiGLU(c.intermediate_size), "sparse": experts}
    return models.Config(
        vocabulary=c.vocab_size,
        width=c.hidden_size,
        layers=tuple(
            models.Layer(mixers[mixer], mlps[mlp])
            for mixer, mlp in zip(_layer_types(c), _mlp_types(c), strict=True)
        ),
        norm_epsilon=c.rms_norm_eps,
        tied=c.tie_word_embeddings,
    )


def _linear(c: Any) -> dict[str, int]:
    given = c.linear_attn_config or {}
    return {ours: given.get(ours, getattr(c, name)) for ours, name in _LINEAR.items()}


def _layer_types(c: Any) -> list[Any]:
    """What each layer mixes with; None where the config does not say."""
    if c.layer_types is not None:
        return c.layer_types
    types: list[Any] = [None] * c.num_hidden_layers
    for name, kind in _LAYERS.items():
        for layer in (c.linear_attn_config or {}).get(name, []):
            types[layer - 1] = kind
    return types


def _mlp_types(c: Any) -> list[Any]:
    if c.mlp_layer_types is not None:
        return c.mlp_layer_types
    dense = c.first_k_dense_replace
    return ["dense" if i < dense else "sparse" for i in range(c.num_hidden_layers)]


def _check(c: Any, wrong: list[str]) -> None:
    """Adds to `wrong` the fields that do not fit one another."""
    _check_linear(c, wrong)
    if wrong:
        return
    for name, types, known in (
        ("layer_types", _layer_types(c), tuple(_LAYERS.values())),
        ("mlp_layer_types", _mlp_types(c), ("dense", "sparse")),
    ):
        fits = isinstance(types, list) and len(types) == c.num_hidden_layers
        if not fits or not all(kind in known for kind in types):
            wrong.append(
                f"{name} is {types!r} and must have {known[0]!r} or {known[1]!r} for each of "
                f"{c.num_hidden_layers} layers"
            )
    equal = {
        "num_key_value_heads": ("num_attention_heads", c.num_attention_heads),
        "qk_head_dim": (
            "qk_nope_head_dim + qk_rope_head_dim",
            c.qk_nope_head_dim + c.qk_rope_head_dim,
        ),
    }
    for name, (of, value) in equal.items():
        if getattr(c, name) not in (None, value):
            wrong.append(f"{name} is {getattr(c, name)} and must be {of}, {value}")
    for name, most in (
        ("num_experts_per_token", "num_experts"),
        ("topk_group", "num_expert_group"),
    ):
        if getattr(c, name) > getattr(c, most):
            wrong.append(f"{name} is {getattr(c, name)}, more than {most}, {getattr(c, most)}")
    if c.num_experts % c.num_expert_group:
        wrong.append(f"num_expert_group is {c.num_expert_group} and does not divide num_experts")
    if not c.use_grouped_topk and c.num_expert_group > 1:
        wrong.append(f"use_grouped_topk is False, with num_expert_group = {c.num_expert_group}")


def _check_linear(c: Any, wrong: list[str]) -> None:
    """The same of the hub's form."""
    given = c.linear_attn_config
    if given is None:
        return
    if not isinstance(given, dict):
        wrong.append(f"linear_attn_config is {given!r} and must be a dict")
        return
    for name in sorted(set(given) - set(_LINEAR) - set(_LAYERS)):
        wrong.append(f"linear_attn_config.{name} is {given[name]!r}, an unknown field")
    for name in _LINEAR:
        if name in given and not COUNT.accepts(given[name]):
            wrong.append(f"linear_attn_config.{name} is {given[name]!r} and must be {COUNT.words}")
    lists = {name: given.get(name, []) for name in _LAYERS}
    among = range(1, c.num_hidden_layers + 1)
    if not all(isinstance(x, list) and set(x) <= set(among) for x in lists.values()):
        wrong.append(f"linear_attn_config has {lists} and must have lists of 1 to {among[-1]}")
    elif set(lists["kda_layers"]) & set(lists["full_attn_layers"]):
        wrong.append(f"linear_attn_config has a layer in both of {lists}")
    elif c.layer_types is not None:
        from_lists = _layer_types(_without(c, "layer_types"))
        if any(from_lists) and from_lists != c.layer_types:
            wrong.append(f"layer_types is {c.layer_types!r}, and linear_attn_config has {lists}")


def _without(c: Any, name: str) -> Any:
    return type(c)(**(vars(c) | {name: None}))


def family(config: Mapping[str, Any]) -> Family:
    """The names in the files of a model of this config."""
    # transformers' renaming, which reads all "block_sparse_moe" as "mlp", writes dense layers so.
    dense = ["mlp.", "block_sparse_moe."]
    if config.get("layer_types") is not None:
        dense.reverse()
    mlps = {models.SwiGLU: "|".join(dense), models.Experts: "block_sparse_moe."}

    def inside(template: nn.Module, mlp: nn.Module) -> tuple[Row, ...]:
        mlp_rows = tables.rows_of(mlp, "kimi_linear")
        return (
            Row("mixer_norm/scale", "input_layernorm.weight", SAME),
            *under("mixer/", "self_attn.", tables.rows_of(template, "kimi_linear")),
            Row("mlp_norm/scale", "post_attention_layernorm.weight", SAME),
            *under("mlp/", mlps[type(mlp)], mlp_rows),
        )

    outside = (
        Row("embed/embedding", "model.embed_tokens.weight", SAME),
        Row("final_norm/scale", "model.norm.weight", SAME),
        Row("head/kernel", "lm_head.weight", MATRIX),
    )
    return Family("Kimi Linear", outside, "model.layers.{}.", inside)
