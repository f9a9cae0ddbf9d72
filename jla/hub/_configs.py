"""A checkpoint's config, and the model that it describes."""

import json
import os
import pathlib
import types
from collections.abc import Mapping
from typing import Any

import jax.numpy as jnp
from jax.typing import DTypeLike

from jla import models
from jla._core import checks
from jla._core.types import Implementation
from jla.hub import fla, kimi_linear
from jla.hub.mapping import Family

FAMILIES = {**dict.fromkeys(fla.FIELDS, fla), "kimi_linear": kimi_linear}


@checks.named
def read_config(path: str | os.PathLike[str]) -> dict[str, Any]:
    """A checkpoint's config.json, whole: `save` writes back what `model` has no use for.

    Example:
      config = jla.hub.read_config("tests/hub/models/fla_kda")
      print(config["model_type"])  # kda

    Args:
      path: the checkpoint's folder.

    Raises:
      ValueError: the folder has no config.json, or it is no JSON object.
    """
    file = pathlib.Path(path) / "config.json"
    if not file.exists():
        raise ValueError(f"path must be a folder with a config.json, got {path}")
    try:
        config = json.loads(file.read_text())
    except json.JSONDecodeError as error:
        raise ValueError(f"{file} is no JSON: {error}") from error
    if not isinstance(config, dict):
        raise ValueError(f"{file} must have an object, got {type(config).__name__}")
    return config


@checks.named
def model(
    config: Mapping[str, Any],
    *,
    dtype: DTypeLike | None = None,
    param_dtype: DTypeLike | None = None,
    implementation: Implementation | None = None,
    decode: bool = False,
) -> models.LanguageModel:
    """The model that a config describes: tokens [B, T] to float32 logits [B, T, vocabulary].

    Example:
      config = jla.hub.read_config("tests/hub/models/fla_kda")
      model = jla.hub.model(config)
      print(type(model.config.layers[0].mixer).__name__)  # KimiDeltaAttention

    Args:
      config: from `read_config`, or a dict of the same fields, for a model that is to be trained.
        `model_type` is "kda", "gsa", "mesa_net", "path_attn" or "log_linear_mamba2" (of fla), or
        "kimi_linear".
      dtype: of the computation; that of the parameters if None.
      param_dtype: of the parameters, but for those that are always float32; that which the config
        gives as `dtype` or `torch_dtype` if None, float32 if it gives none.
      implementation: of the mixers, see `jla.linen`.
      decode: whether the model has a cache.

    Returns:
      A `jla.models.LanguageModel`. `clone` changes what a config has no field for, such as
      `stacked` and `remat`.

    Raises:
      ValueError: with the name of every field that cannot be honoured; or the model is of a type
        that is not known.
    """
    of_files = config.get("dtype") or config.get("torch_dtype") or "float32"
    kept = check_dtype("param_dtype", of_files if param_dtype is None else param_dtype)
    return models.LanguageModel(
        _family(config).language_model(config),
        dtype=kept if dtype is None else check_dtype("dtype", dtype),
        param_dtype=kept,
        implementation=implementation,
        decode=decode,
    )


def family(config: Mapping[str, Any]) -> Family:
    """Where the files of such a config have what."""
    return _family(config).family(config)


def _family(config: Mapping[str, Any]) -> types.ModuleType:
    kind = config.get("model_type")
    if kind not in FAMILIES:
        raise ValueError(
            f"config must have a model_type that is one of {', '.join(FAMILIES)}; got {kind!r}"
        )
    return FAMILIES[kind]


def check_dtype(name: str, dtype: DTypeLike) -> jnp.dtype:
    """A dtype that files can have."""
    found = jnp.dtype(dtype)
    if found not in map(jnp.dtype, checks.FLOAT_DTYPES):
        raise ValueError(f"{name} must be bfloat16, float16 or float32, got {found}")
    return found
