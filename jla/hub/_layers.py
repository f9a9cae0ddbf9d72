"""One layer's parameters from and to the tensors of a file, for models of one's own."""

from collections.abc import Mapping, Sequence
from typing import Literal

import numpy as np
from flax import linen as nn

from jla._core import checks
from jla._core.types import Array, NumpyArray
from jla.hub import mapping, tables
from jla.hub._loading import Tree, refuse
from jla.hub._saving import check_arrays, written
from jla.hub.mapping import Row

Names = Literal["fla", "kimi_linear"]


@checks.named
def layer_params(
    state: Mapping[str, Array], prefix: str, layer: nn.Module, *, names: Names = "fla"
) -> Tree:
    """A layer's parameters from tensors by name.

    Example:
      layer = jla.linen.MesaNet(num_heads=4)
      params = layer.init(jax.random.key(0), jnp.ones((1, 8, 64)))["params"]
      state = jla.hub.layer_state(params, "model.layers.0.attn.", layer)
      params = jla.hub.layer_params(state, "model.layers.0.attn.", layer)

    Args:
      state: arrays by the names of a file; those that do not begin with the prefix are ignored.
      prefix: of the layer's names, such as "model.layers.0.attn.".
      layer: a mixer of `jla.linen`, or a mixer or MLP of `jla.models`.
      names: whose names they are.

    Returns:
      The tree of the layer's parameters, NumPy arrays of the layer's `param_dtype`; those that are
      always float32 are float32.

    Raises:
      ValueError: with all names that begin with the prefix and are unexpected, all that are
        missing, and all of another shape than the layer's.
    """
    rows = tables.rows_of(layer, names)
    found = {name: np.asarray(x) for name, x in state.items() if name.startswith(prefix)}
    last = prefix + _last(rows).name.format(0)
    if last not in found or not found[last].ndim:
        raise ValueError(f"state must have {last!r}; it has {sorted(found) or 'no such prefix'}")
    parameters = mapping.of_layer(layer, found[last].shape[0], rows, prefix, names)
    wanted = mapping.whole_shapes(parameters)
    wrong = dict(missing=sorted(set(wanted) - set(found)))
    wrong["unexpected"] = sorted(set(found) - set(wanted))
    wrong["of another shape"] = [
        f"{name} {list(found[name].shape)}, where the layer has {list(wanted[name])}"
        for name in sorted(set(wanted) & set(found))
        if found[name].shape != wanted[name]
    ]
    refuse("state does not fit the layer", wrong)
    params = {}
    for p in parameters:
        params[p.path] = np.empty(p.shape, p.dtype)
        for piece in p.pieces:
            elements = found[piece.names[0]].reshape(-1)[piece.first : piece.first + piece.count]
            params[p.path][piece.at] = piece.to_ours(elements)
    return mapping.nested(params)


@checks.named
def layer_state(
    params: Tree, prefix: str, layer: nn.Module, *, names: Names = "fla"
) -> dict[str, NumpyArray]:
    """A layer's parameters as tensors by name: the inverse of `layer_params`.

    Example:
      layer = jla.models.SwiGLU(hidden=128)
      params = layer.init(jax.random.key(0), jnp.ones((1, 8, 64)))["params"]
      state = jla.hub.layer_state(params, "model.layers.0.mlp.", layer)
      print(sorted(state)[0])  # model.layers.0.mlp.down_proj.weight

    Args:
      params: the tree of the layer's parameters.
      prefix, layer, names: as of `layer_params`.

    Returns:
      NumPy arrays by name, each contiguous, of their parameters' dtypes.

    Raises:
      ValueError: with all paths of parameters that the layer has not, or that are missing or of
        another shape than the layer's.
    """
    rows = tables.rows_of(layer, names)
    arrays = mapping.flat(params)
    last = _last(rows).path
    if last not in arrays:
        raise ValueError(f"params must have {last!r}; it has {sorted(arrays)}")
    parameters = mapping.of_layer(layer, arrays[last].shape[-1], rows, prefix, names)
    check_arrays(parameters, arrays, "the layer")
    parameters = [p._replace(dtype=np.dtype(arrays[p.path].dtype)) for p in parameters]
    return {
        name: np.concatenate([part.reshape(-1) for part in tensor.make()]).reshape(tensor.shape)
        for name, tensor in written(parameters, arrays).items()
    }


def _last(rows: Sequence[Row]) -> Row:
    """The row of the matrix whose outputs are the model's width."""
    paths = ("o_proj/kernel", "out/kernel", "down/kernel", "down")
    return next(row for row in rows if row.path in paths)
