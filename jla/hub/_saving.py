"""Writing a checkpoint: as the originals read it, one tensor after the other."""

import functools
import json
import math
import os
import pathlib
import shutil
from collections.abc import Iterator, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import DTypeLike

from jla import models
from jla._core import checks
from jla._core.types import NumpyArray
from jla.hub import _configs, files, mapping
from jla.hub._loading import SMALL_BYTES, Tree
from jla.hub.files import Written
from jla.hub.mapping import Parameter, Piece

# Beside config and tensors: what a checkpoint has for generating and for its tokenizer.
COPIED = ("*.json", "*.jinja", "*.model", "*.py", "*.txt")


@checks.named
def save(
    path: str | os.PathLike[str],
    model: models.LanguageModel,
    params: Tree,
    config: Mapping[str, Any],
    *,
    dtype: DTypeLike | None = None,
    max_shard_bytes: float = 5e9,
    source: str | os.PathLike[str] | None = None,
) -> None:
    """Writes a checkpoint as fla and transformers write it and read it.

    Example:
      import tempfile
      folder = "tests/hub/models/fla_kda"
      model = jla.hub.model(config := jla.hub.read_config(folder))
      params = jla.hub.load(folder, model)
      with tempfile.TemporaryDirectory() as new:
        jla.hub.save(new, model, params, config, dtype=jnp.bfloat16, source=folder)

    Args:
      path: a folder, which is made if it does not exist. It must not have a checkpoint yet.
      model: whose parameters they are.
      params: the parameters, of JAX or NumPy; all of them on devices of this host.
      config: from `read_config`; it is written whole, but for the dtype that it gives of the files,
        which follows them.
      dtype: of the files: bfloat16, float16 or float32; each parameter's own if None. What is
        always float32 in the model is so in the files.
      max_shard_bytes: the most that one file has, unless a tensor alone has more.
      source: a checkpoint's folder whose generation_config.json and tokenizer's files are copied.

    Raises:
      ValueError: the parameters are not the model's, the config describes other tensors, or the
        folder has a checkpoint; with all names.
    """
    folder = pathlib.Path(path)
    there = sorted(x.name for x in folder.glob("*.safetensors*"))
    if there:
        raise ValueError(f"path must be a folder without a checkpoint, got {path}: it has {there}")
    if dtype is not None:
        dtype = _configs.check_dtype("dtype", dtype)
        model = model.clone(param_dtype=dtype)
    if not max_shard_bytes > 0:
        raise ValueError(f"max_shard_bytes must be positive, got {max_shard_bytes}")
    family = _configs.family(config)
    parameters = mapping.of_model(model, family)
    arrays = mapping.flat(params)
    check_arrays(parameters, arrays, "the model")
    _check_config(parameters, config)
    if dtype is None:
        parameters = [p._replace(dtype=jnp.dtype(arrays[p.path].dtype)) for p in parameters]
    tensors = written(parameters, arrays)
    folder.mkdir(parents=True, exist_ok=True)
    files.write(folder, tensors, max_shard_bytes)
    if source is not None:
        _copy_files(pathlib.Path(source), folder)
    text = json.dumps(_with_dtype(config, tensors), indent=2, ensure_ascii=False)
    (folder / "config.json").write_text(text + "\n")


def check_arrays(parameters: list[Parameter], arrays: Mapping[str, Any], of: str) -> None:
    """Raises ValueError unless the arrays, by path, are these parameters."""
    expected = {p.path: p.shape for p in parameters}
    wrong = [f"{path} is missing" for path in sorted(set(expected) - set(arrays))]
    wrong += [f"{path} is not in {of}" for path in sorted(set(arrays) - set(expected))]
    for path in sorted(set(arrays) & set(expected)):
        array = arrays[path]
        if tuple(array.shape) != expected[path]:
            wrong.append(f"{path} is {list(array.shape)}, in {of} {list(expected[path])}")
        elif np.dtype(array.dtype) not in files.DTYPES.values():
            wrong.append(f"{path} is {array.dtype}; bfloat16, float16 and float32 are written")
        elif not getattr(array, "is_fully_addressable", True):
            wrong.append(
                f"{path} is in part on other hosts; gather it first, for example with "
                "jax.experimental.multihost_utils.process_allgather"
            )
    if wrong:
        raise ValueError(f"params do not fit {of}: {'; '.join(wrong)}")


def _check_config(parameters: list[Parameter], config: Mapping[str, Any]) -> None:
    """Raises ValueError unless the config's model has the same tensors."""
    ours = mapping.whole_shapes(parameters)
    of_config = mapping.of_model(_configs.model(config), _configs.family(config))
    theirs = mapping.whole_shapes(of_config)
    differ = [
        f"{name} is {list(ours.get(name, ['missing']))} in the model and "
        f"{list(theirs.get(name, ['missing']))} by the config"
        for name in sorted(set(ours) | set(theirs))
        if ours.get(name) != theirs.get(name)
    ]
    if differ:
        raise ValueError(f"config does not describe the model: {'; '.join(differ)}")


def written(parameters: list[Parameter], arrays: Mapping[str, Any]) -> dict[str, Written]:
    """The files' tensors, by name, in the order of the parameters."""
    pieces: dict[str, list[tuple[Parameter, Piece]]] = {}
    for parameter in parameters:
        for piece in parameter.pieces:
            pieces.setdefault(piece.names[0], []).append((parameter, piece))

    def make(name: str, dtype: np.dtype) -> Iterator[NumpyArray]:
        for parameter, piece in sorted(pieces[name], key=lambda x: x[1].first):
            yield _elements(arrays[parameter.path], piece, dtype)

    result = {}
    for name, found in pieces.items():
        # A tensor of several parameters has the widest of their dtypes.
        dtype = functools.reduce(jnp.promote_types, (parameter.dtype for parameter, _ in found))
        parts = functools.partial(make, name, np.dtype(dtype))
        result[name] = Written(np.dtype(dtype), found[0][1].whole, parts)
    return result


def _elements(array: Any, piece: Piece, dtype: np.dtype) -> NumpyArray:
    """The piece of a parameter as it lies in a file."""
    if isinstance(array, np.ndarray) or array.size * array.dtype.itemsize <= SMALL_BYTES:
        return piece.to_file(np.asarray(array)[piece.at]).astype(dtype)
    # On the device, where transposing is fast, and by an index that is no part of the program.
    return np.asarray(_taken(array, np.array(piece.at, np.int32), piece._replace(at=()), dtype))


@functools.partial(jax.jit, static_argnames=("piece", "dtype"))
def _taken(array: jax.Array, at: jax.Array, piece: Piece, dtype: np.dtype) -> jax.Array:
    for i in at:
        array = jax.lax.dynamic_index_in_dim(array, i, keepdims=False)
    return piece.to_file(array).astype(dtype)


def _with_dtype(config: Mapping[str, Any], tensors: Mapping[str, Written]) -> dict[str, Any]:
    """The config, with the dtype of most elements if it gives one."""
    sizes: dict[str, int] = {}
    for tensor in tensors.values():
        name = tensor.dtype.name
        sizes[name] = sizes.get(name, 0) + math.prod(tensor.shape)
    dtype = max(sizes, key=lambda name: sizes[name])
    return {k: dtype if k in ("dtype", "torch_dtype") else x for k, x in config.items()}


def _copy_files(source: pathlib.Path, folder: pathlib.Path) -> None:
    if not source.is_dir():
        raise ValueError(f"source must be a checkpoint's folder, got {source}: no such folder")
    for file in sorted({file for pattern in COPIED for file in source.glob(pattern)}):
        if file.name not in ("config.json", files.INDEX):
            shutil.copyfile(file, folder / file.name)
