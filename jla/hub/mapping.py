"""From names in files to parameters: how a table's rows become pieces, which are read both ways.

A row states one parameter's path, its name in files, and the form of the two. A piece is one
parameter, or a part of one, and where its elements lie in the files. A parameter may have several:
one for each stacked block, and for each expert. Several may lie in one tensor of a file, as
log-linear Mamba-2's projections do: rows of one name share its first axis, in their order.
"""

import dataclasses
import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn
from flax import traverse_util

from jla._core.types import NumpyArray
from jla.hub.files import Part
from jla.models import LanguageModel, Layer

type Shape = tuple[int, ...]
type _Placed = tuple[str, tuple[str, ...], Form, Shape]  # path, names, form and `at`
type Shapes = dict[str, jax.ShapeDtypeStruct]  # by path, as "block_0/mixer/q_proj/kernel"


class Form(NamedTuple):
    """How a tensor of a file has a parameter's elements.

    Attributes:
      inputs: how many axes in front of ours are the last ones there: those of a matrix's inputs.
      shape: of the file's tensor, from the parameter's.
    """

    inputs: int
    shape: Callable[[Shape], Shape]

    def axes(self, rank: int) -> tuple[int, ...]:
        """For each axis of ours, which it is in the file, where no axes are joined."""
        return tuple((i - self.inputs) % rank for i in range(rank))


SAME = Form(0, lambda shape: shape)
FLAT = Form(0, lambda shape: (math.prod(shape),))
# torch's Linear [out, in]: from one axis to one or several, and from heads and features to one.
MATRIX = Form(1, lambda shape: (math.prod(shape[1:]), shape[0]))
FROM_HEADS = Form(2, lambda shape: (math.prod(shape[2:]), shape[0] * shape[1]))
TAPS = Form(1, lambda shape: (math.prod(shape[1:]), 1, shape[0]))  # torch's Conv1d [C, 1, W]


class Row(NamedTuple):
    """A line of a table.

    Attributes:
      path: the parameter's, inside its module.
      name: the tensor's. With "{}" there is one for each index of the parameter's first axis. After
        a "|" stands another name that files may have in place of the first.
      form: how the one has the other's elements.
    """

    path: str
    name: str
    form: Form


def under(path: str, name: str, rows: Iterable[Row]) -> tuple[Row, ...]:
    """Rows of a module that lies below a path, and in files below a name, or "one|or another"."""
    return tuple(
        Row(path + row.path, "|".join(n + row.name for n in name.split("|")), row.form)
        for row in rows
    )


class Piece(NamedTuple):
    """A parameter, or a part of it, and where its elements are in the files.

    `to_ours(elements)` is the parameter at the indices `at`, and `to_file` is the inverse.

    Attributes:
      names: of the file's tensor; a file has one of them, and the first is written.
      whole: that tensor's shape.
      first: of its elements, the first that is ours.
      lies: the shape of our elements as they lie in the file, the axes of ours in another order.
      axes: for each axis of ours, which it is there.
      at: the indices of the parameter's first axes: the block, the expert.
    """

    names: tuple[str, ...]
    whole: Shape
    first: int
    lies: Shape
    axes: tuple[int, ...]
    at: Shape

    @property
    def count(self) -> int:
        return math.prod(self.lies)

    def part(self, name: str) -> Part:
        return Part(name, self.first, self.count)

    def to_ours(self, elements: NumpyArray) -> NumpyArray:
        return elements.reshape(self.lies).transpose(self.axes)

    def to_file[A: (np.ndarray, jax.Array)](self, ours: A) -> A:
        return ours.transpose([self.axes.index(i) for i in range(ours.ndim)]).reshape(-1)


class Parameter(NamedTuple):
    """A parameter and its pieces.

    Attributes:
      path: as "block_0/mixer/q_proj/kernel".
      shape, dtype: the parameter's.
    """

    path: str
    shape: Shape
    dtype: jnp.dtype
    pieces: tuple[Piece, ...]


class Family(NamedTuple):
    """Where checkpoints of a family have the parameters of a model.

    Attributes:
      name: for messages.
      outside: rows of what is in no block.
      block: in front of a block's names, with "{}" for its number.
      inside: returns the rows of a block with this mixer and MLP.
    """

    name: str
    outside: tuple[Row, ...]
    block: str
    inside: Callable[[nn.Module, nn.Module], tuple[Row, ...]]


def shapes(module: nn.Module, *arguments: jax.ShapeDtypeStruct) -> Shapes:
    """The shapes and dtypes of a module's parameters, by path."""
    # Only traced: an implementation that this machine has not is none of a parameter's business.
    plain = {"decode": False, "implementation": "xla"}
    module = module.clone(**{k: v for k, v in plain.items() if hasattr(module, k)})
    key = jax.eval_shape(jax.random.key, 0)
    return flat(jax.eval_shape(module.init, key, *arguments)["params"])


def flat(tree: Any) -> dict[str, Any]:
    """A tree of dicts as one dict, by path."""
    return traverse_util.flatten_dict(tree, sep="/")


def nested(leaves: dict[str, Any]) -> dict[str, Any]:
    """The inverse of `flat`."""
    return traverse_util.unflatten_dict(leaves, sep="/")


def of_model(model: LanguageModel, family: Family) -> list[Parameter]:
    """The parameters of a model, in the order of a file of this family."""
    layers = model.config.layers
    outside, inside = _shapes_of_model(model)
    rows = list(_placed(family.outside, "", ""))
    all_shapes = dict(outside)
    for i, layer in enumerate(layers):
        path, at = ("blocks/", (i,)) if model.stacked else (f"block_{i}/", ())
        more = (len(layers),) if model.stacked else ()
        for name, x in inside[layer].items():
            all_shapes[path + name] = jax.ShapeDtypeStruct((*more, *x.shape), x.dtype)
        names = family.inside(layer.mixer, layer.mlp)
        rows += _placed(names, path, family.block.format(i), at)
    return parameters(rows, all_shapes, family.name)


def _shapes_of_model(model: LanguageModel) -> tuple[Shapes, dict[Layer, Shapes]]:
    """The shapes outside of blocks, and those of each block; equal blocks are traced once."""
    layers = tuple(dict.fromkeys(model.config.layers))
    config = dataclasses.replace(model.config, layers=layers)
    tokens = jax.ShapeDtypeStruct((1, 1), jnp.int32)
    found = shapes(model.clone(config=config, stacked=False, unroll=False), tokens)
    inside = {
        layer: {
            path.removeprefix(f"block_{i}/"): x
            for path, x in found.items()
            if path.startswith(f"block_{i}/")
        }
        for i, layer in enumerate(layers)
    }
    return {path: x for path, x in found.items() if not path.startswith("block_")}, inside


def of_layer(
    layer: nn.Module, D: int, rows: Iterable[Row], prefix: str, name: str
) -> list[Parameter]:
    """The parameters of one layer for inputs [B, T, D]; its names begin with the prefix."""
    inputs = jax.ShapeDtypeStruct((1, 1, D), jnp.float32)
    return parameters(_placed(rows, "", prefix), shapes(layer, inputs), name)


def parameters(rows: Iterable[_Placed], all_shapes: Shapes, family: str) -> list[Parameter]:
    """Parameters by these rows, in their order.

    Args:
      rows: from `_placed`. One whose path is no parameter's is not used: tables have all that a
        layer can have.
      all_shapes: the parameters'; each must be in a row.
      family: for messages.
    """
    found: dict[str, list[Piece]] = {}
    ends: dict[str, int] = {}  # of tensors that have several pieces, how far they are taken
    for path, names, form, at in rows:
        if path not in all_shapes:
            continue
        shape = all_shapes[path].shape[len(at) :]
        each = range(shape[0]) if "{}" in names[0] else [None]
        for i in each:
            ours, index = (shape, at) if i is None else (shape[1:], (*at, i))
            here = tuple(name.format(i) for name in names)
            axes = form.axes(len(ours))
            lies = tuple(ours[axes.index(axis)] for axis in range(len(ours)))
            first = ends.get(here[0], 0)
            ends[here[0]] = first + math.prod(ours)
            piece = Piece(here, form.shape(ours), first, lies, axes, index)
            found.setdefault(path, []).append(piece)
    without = sorted(set(all_shapes) - set(found))
    if without:
        raise ValueError(f"{family} has no names for these parameters: {', '.join(without)}")
    result = []
    for path, pieces in found.items():
        whole = tuple(p._replace(whole=_joined(p, ends[p.names[0]])) for p in pieces)
        result.append(Parameter(path, all_shapes[path].shape, all_shapes[path].dtype, whole))
    return result


def _placed(rows: Iterable[Row], path: str, prefix: str, at: Shape = ()) -> Iterator[_Placed]:
    """The rows of a module that lies below a path and a prefix: path, names, form and `at`."""
    for row in rows:
        names = tuple(prefix + name for name in row.name.split("|"))
        yield path + row.path, names, row.form, at


def _joined(piece: Piece, count: int) -> Shape:
    """The shape of a tensor that has `count` elements in the pieces that share its first axis."""
    of_row = math.prod(piece.whole[1:])
    return (count // of_row, *piece.whole[1:]) if piece.whole else piece.whole


def whole_shapes(found: Sequence[Parameter]) -> dict[str, Shape]:
    """The shapes of a file's tensors, by their first names."""
    return {p.names[0]: p.whole for parameter in found for p in parameter.pieces}
