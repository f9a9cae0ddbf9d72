"""Configs of flash-linear-attention's models (0.6), and the names in their files."""

from collections.abc import Callable, Mapping
from typing import Any

from flax import linen as nn

from jla import linen, models
from jla.hub import fields, tables
from jla.hub.fields import ANY, COUNT, FLAG, NEGATIVE, POSITIVE, Fields, one_of
from jla.hub.mapping import MATRIX, SAME, Family, Row, under

# What fla's models have in common, with the values that it takes where a config has none.
_ALL = {
    "vocab_size": (COUNT, 32000),
    "hidden_size": (COUNT, 2048),
    "tie_word_embeddings": (FLAG, False),
    "norm_eps": (POSITIVE, 1e-6),
}
_FOUR = _ALL | {
    "num_hidden_layers": (COUNT, 24),
    "hidden_ratio": (POSITIVE.or_none(), 4),
    "intermediate_size": (COUNT.or_none(), None),
}
_FIXED = {"attnres_block_size": (None,), "hidden_act": ("swish",)}
_WITHOUT_EFFECT = (
    *("attn_mode", "fuse_cross_entropy", "fuse_linear_cross_entropy", "fuse_norm", "fuse_swiglu"),
    "use_l2warp",
)

FIELDS: Mapping[str, Fields] = {
    "kda": Fields(
        honoured=_FOUR
        | {
            "num_heads": (COUNT, 16),
            "num_v_heads": (COUNT.or_none(), None),
            "head_dim": (COUNT, 128),
            "expand_v": (POSITIVE, 1.0),
            "use_short_conv": (FLAG, True),
            "conv_size": (COUNT, 4),
            "allow_neg_eigval": (FLAG, False),
            "lower_bound": (NEGATIVE.or_none(), None),
            "attn": (ANY, None),
        },
        fixed=_FIXED,
        without_effect=(*_WITHOUT_EFFECT, "safe_gate"),
    ),
    "gsa": Fields(
        honoured=_FOUR
        | {
            "num_heads": (COUNT, 4),
            "num_kv_heads": (COUNT.or_none(), None),
            "num_slots": (COUNT.or_none(), 64),
            "expand_k": (POSITIVE, 1),
            "use_short_conv": (FLAG, False),
            "conv_size": (COUNT, 4),
            "feature_map": (one_of("swish", "relu", "t2r"), "swish"),
            "gate_logit_normalizer": (POSITIVE, 8),
            "elementwise_affine": (FLAG.or_none(), True),
            "attn": (ANY, None),
        },
        # With another value, fla's own norm has not as many elements as its input.
        fixed=_FIXED | {"expand_v": (1,)},
        without_effect=(
            *_WITHOUT_EFFECT,
            *("clamp_max", "clamp_min", "use_norm", "use_output_gate"),
        ),
        other_names={"exapnd_k": "expand_k", "exapnd_v": "expand_v"},  # as fla spells them
    ),
    "mesa_net": Fields(
        honoured=_FOUR
        | {
            "num_heads": (COUNT, 16),
            "head_dim": (COUNT, 128),
            "conv_size": (COUNT, 4),
            "use_output_gate": (FLAG, False),
            "lambda_lower_bound": (POSITIVE, 0.25),
            "max_cg_step_training": (COUNT, 30),
            "max_cg_step_decoding": (COUNT, 30),
            "attn": (ANY, None),
        },
        fixed=_FIXED,
        without_effect=(*_WITHOUT_EFFECT, "use_short_conv"),
    ),
    "path_attn": Fields(
        honoured=_FOUR
        | {
            "num_heads": (COUNT, 32),
            "num_kv_heads": (COUNT.or_none(), None),
            "use_forget_gate": (FLAG, False),
            "use_w_shortconv": (FLAG, True),
            "use_low_rank_w": (FLAG, True),
        },
        fixed=_FIXED,
        without_effect=(*_WITHOUT_EFFECT, "elementwise_affine"),
    ),
    "log_linear_mamba2": Fields(
        honoured=_ALL
        | {
            "norm_eps": (POSITIVE, 1e-5),
            "num_hidden_layers": (COUNT, 48),
            "num_heads": (COUNT.or_none(), None),
            "head_dim": (COUNT, 64),
            "state_size": (COUNT, 128),
            "expand": (POSITIVE, 2),
            "n_groups": (COUNT, 1),
            "conv_kernel": (COUNT, 4),
            "use_bias": (FLAG, False),
            "use_conv_bias": (FLAG, True),
            "rmsnorm": (FLAG, True),
            "norm_before_gate": (FLAG, False),
            "D_has_hdim": (FLAG, False),
        },
        fixed={
            "attnres_block_size": (None,),
            "hidden_act": ("silu", "swish"),
            "residual_in_fp32": (False,),
            # transformers 5 writes infinity as a dict.
            "dt_limit": ([0.0, float("inf")], [0.0, {"__float__": "Infinity"}]),
        },
        without_effect=(
            *_WITHOUT_EFFECT,
            *("A_init_range", "chunk_size", "conv_init", "dt_init_floor", "dt_max", "dt_min"),
            "rescale_prenorm_residual",
        ),
    ),
}


def language_model(config: Mapping[str, Any]) -> models.Config:
    """The config of the same model here.

    Raises:
      ValueError: with the name of every field that cannot be honoured.
    """
    kind = config["model_type"]
    c = fields.read(config, FIELDS[kind], _check)
    mixer = _MIXERS[kind](c)
    mixers = _attention_layers(c)
    mlp = models.SwiGLU(_hidden(c))
    return models.Config(
        vocabulary=c.vocab_size,
        width=c.hidden_size,
        layers=tuple(models.Layer(mixers.get(i, mixer), mlp) for i in range(c.num_hidden_layers)),
        norm_epsilon=c.norm_eps,
        tied=c.tie_word_embeddings,
    )


def _kda(c: Any) -> nn.Module:
    return linen.KimiDeltaAttention(
        num_heads=c.num_v_heads or c.num_heads,
        num_key_heads=c.num_heads,
        key_dim=c.head_dim,
        value_dim=int(c.head_dim * c.expand_v),
        conv_size=c.conv_size if c.use_short_conv else None,
        norm_epsilon=c.norm_eps,
        allow_negative_eigenvalues=c.allow_neg_eigval,
        gate_lower_bound=c.lower_bound,  # counts without safe_gate, too
    )


def _gsa(c: Any) -> nn.Module:
    return linen.GatedSlotAttention(
        num_heads=c.num_heads,
        num_key_heads=c.num_kv_heads or c.num_heads,
        key_dim=round(c.hidden_size * c.expand_k) // c.num_heads,
        value_dim=c.hidden_size // c.num_heads,
        num_slots=c.num_slots,
        conv_size=c.conv_size if c.use_short_conv else None,
        norm_epsilon=1e-5,  # fla's layer does not pass its own to the norm
        feature_map=c.feature_map,
        gate_logit_normalizer=c.gate_logit_normalizer,
        norm_scale=bool(c.elementwise_affine),
    )


def _mesa(c: Any) -> nn.Module:
    return linen.MesaNet(
        num_heads=c.num_heads,
        key_dim=c.head_dim,
        conv_size=c.conv_size,
        norm_epsilon=c.norm_eps,
        use_output_gate=c.use_output_gate,
        lambda_lower_bound=c.lambda_lower_bound,
        cg_steps=c.max_cg_step_training,
        cg_steps_decode=c.max_cg_step_decoding,
    )


def _path(c: Any) -> nn.Module:
    return linen.PaTHAttention(
        num_heads=c.num_heads,
        num_key_heads=c.num_kv_heads or c.num_heads,
        key_dim=c.hidden_size // c.num_heads,
        conv_size=3 if c.use_w_shortconv else None,
        w_rank=32 if c.use_low_rank_w else None,
        use_forget_gate=c.use_forget_gate,
    )


def _log_linear(c: Any) -> nn.Module:
    return linen.LogLinearMamba2(
        num_heads=int(c.expand * c.hidden_size) // c.head_dim,
        num_key_heads=c.n_groups,
        key_dim=c.state_size,
        value_dim=c.head_dim,
        conv_size=c.conv_kernel,
        conv_bias=c.use_conv_bias,
        norm_epsilon=c.norm_eps,
        num_levels=15,
        use_bias=c.use_bias,
        skip_per_feature=c.D_has_hdim,
        norm_before_gate=c.norm_before_gate,
        use_norm=c.rmsnorm,
        norm_groups=c.n_groups,
    )


_MIXERS: Mapping[str, Callable[[Any], nn.Module]] = {
    "kda": _kda,
    "gsa": _gsa,
    "mesa_net": _mesa,
    "path_attn": _path,
    "log_linear_mamba2": _log_linear,
}


def _hidden(c: Any) -> int:
    """The width inside the MLP; without a field for it, a multiple of 256."""
    given = getattr(c, "intermediate_size", None)
    ratio = getattr(c, "hidden_ratio", None) or 4
    return given or -(-int(c.hidden_size * ratio * 2 / 3) // 256) * 256


_ATTENTION = {
    "layers": (ANY, None),
    "num_heads": (COUNT, None),
    "num_kv_heads": (COUNT.or_none(), None),
    "qkv_bias": (FLAG, False),
    "window_size": (COUNT.or_none(), None),
    "rope_theta": (POSITIVE, 10000.0),
}


def _attention(c: Any) -> list[dict[str, Any]]:
    """Hybrids: one dict, or several, each with the layers that have softmax attention."""
    attn = getattr(c, "attn", None)
    return [] if attn is None else attn if isinstance(attn, list) else [attn]


def _attention_layers(c: Any) -> dict[int, nn.Module]:
    defaults = {name: default for name, (_, default) in _ATTENTION.items()}
    mixers: dict[int, nn.Module] = {}
    for given in _attention(c):
        a = defaults | given
        mixer = models.Attention(
            num_heads=a["num_heads"],
            num_key_heads=a["num_kv_heads"] or a["num_heads"],
            key_dim=c.hidden_size // a["num_heads"],
            use_bias=a["qkv_bias"],
            window=a["window_size"],
            rope_theta=a["rope_theta"],
        )
        mixers |= dict.fromkeys(a["layers"], mixer)
    return mixers


def _check(c: Any, wrong: list[str]) -> None:
    """Adds to `wrong` the fields that do not fit one another."""
    D = c.hidden_size
    divisors = []  # a field, its value, what it must divide, and that value
    if hasattr(c, "state_size"):
        heads = c.expand * D / c.head_dim
        divisors.append(("head_dim", c.head_dim, "expand * hidden_size", c.expand * D))
        divisors.append(("n_groups", c.n_groups, "the number of heads", heads))
        if c.num_heads not in (None, heads):
            wrong.append(f"num_heads is {c.num_heads} and must be {heads:g} by the other fields")
    elif not hasattr(c, "head_dim"):
        divisors.append(("num_heads", c.num_heads, "hidden_size", D))
        expanded = D * getattr(c, "expand_k", 1)
        divisors.append(("num_heads", c.num_heads, "hidden_size * expand_k", expanded))
    if (few := getattr(c, "num_kv_heads", None)) is not None:
        divisors.append(("num_kv_heads", few, "num_heads", c.num_heads))
    if (many := getattr(c, "num_v_heads", None)) is not None:
        divisors.append(("num_heads", c.num_heads, "num_v_heads", many))
    if hasattr(c, "allow_neg_eigval") and c.head_dim * c.expand_v % 1:
        wrong.append(f"expand_v is {c.expand_v}, with which head_dim * expand_v is no integer")
    for field, value, of, whole in divisors:
        if whole % value:
            wrong.append(f"{field} is {value} and does not divide {of}, {whole:g}")
    _check_attention(c, wrong)


def _check_attention(c: Any, wrong: list[str]) -> None:
    taken: set[int] = set()
    for given in _attention(c):
        if not isinstance(given, dict):
            wrong.append(f"attn has {given!r} and must be a dict or a list of dicts")
            continue
        for name in sorted(set(given) - set(_ATTENTION)):
            wrong.append(f"attn.{name} is {given[name]!r}, an unknown field")
        for name, (kind, default) in _ATTENTION.items():
            if not kind.accepts(given.get(name, default)):
                wrong.append(f"attn.{name} is {given.get(name)!r} and must be {kind.words}")
        heads = given.get("num_heads")
        if COUNT.accepts(heads) and c.hidden_size % heads:
            wrong.append(f"attn.num_heads is {heads} and does not divide hidden_size")
        layers = given.get("layers")
        among = range(c.num_hidden_layers)
        if not isinstance(layers, list) or not all(type(i) is int and i in among for i in layers):
            wrong.append(
                f"attn.layers is {layers!r} and must be a list of layers, 0 to {among[-1]}"
            )
            continue
        if len({*layers, *taken}) != len(layers) + len(taken):
            wrong.append(f"attn.layers is {layers!r} and has a layer twice")
        taken |= set(layers)


def family(config: Mapping[str, Any]) -> Family:
    """The names in the files of a model of this config."""
    old = config["model_type"] == "log_linear_mamba2"
    model = "backbone." if old else "model."
    mixer, norm = ("mixer", "norm_f") if old else ("attn", "norm")
    # fla itself has renamed the former.
    embeddings = "backbone.embeddings.weight|backbone.embedding.weight"

    def inside(template: nn.Module, mlp: nn.Module) -> tuple[Row, ...]:
        return (
            Row("mixer_norm/scale", f"{mixer}_norm.weight", SAME),
            *under("mixer/", f"{mixer}.", tables.rows_of(template, "fla")),
            Row("mlp_norm/scale", "mlp_norm.weight", SAME),
            *under("mlp/", "mlp.", tables.rows_of(mlp, "fla")),
        )

    outside = (
        Row("embed/embedding", embeddings if old else "model.embeddings.weight", SAME),
        Row("final_norm/scale", f"{model}{norm}.weight", SAME),
        Row("head/kernel", "lm_head.weight", MATRIX),
    )
    return Family(f"fla's {config['model_type']}", outside, model + "layers.{}.", inside)
