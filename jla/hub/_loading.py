"""Reading a checkpoint: each tensor goes from its file to the devices that hold a part of it.

A file's matrices are transposed against ours. Transposing on the host is slow (0.1 GB/s), so the
bytes are sent as they lie, and the device arranges them. Small parameters are arranged on the host,
which saves a compilation for each shape.
"""

import collections
import contextlib
import functools
import math
import os
from collections.abc import Callable, Iterator, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Sharding

from jla import models
from jla._core import checks
from jla._core.types import NumpyArray
from jla.hub import mapping
from jla.hub._configs import family, read_config
from jla.hub.files import DTYPES, Folder, Part
from jla.hub.mapping import Parameter, Piece

type Tree = Any  # of parameters, in dicts
type Bounds = tuple[tuple[int, int], ...]  # of a shard, for each axis

SMALL_BYTES = 2**20  # shards up to this size are arranged on the host
IN_FLIGHT = 2  # how many pieces may be on their way to a device


@checks.named
def load(
    path: str | os.PathLike[str],
    model: models.LanguageModel,
    *,
    sharding: Callable[[str, tuple[int, ...]], Sharding] | Sharding | Tree | None = None,
) -> Tree:
    """A checkpoint's parameters, as the model has them.

    One tensor after the other goes to the devices; the host holds few at a time, never the model.
    Matrices are cast to the model's `param_dtype`; what is always float32 becomes float32.

    Example:
      folder = "tests/hub/models/fla_kda"
      model = jla.hub.model(jla.hub.read_config(folder))
      params = jla.hub.load(folder, model)
      embedding = params["embed"]["embedding"]  # [128, 64]

    Args:
      path: a folder with config.json and model.safetensors, or an index and several files.
      model: from `jla.hub.model`, or one with the same parameters; it may be `stacked`.
      sharding: where parameters are to lie: a tree of shardings as the parameters' tree, a function
        of a path such as "block_0/mixer/q_proj/kernel" and a shape, or one sharding for all; the
        default device if None.

    Raises:
      ValueError: with all names of tensors that are missing, unexpected, of another shape than the
        model's, or of a dtype that is not read.
      ModuleNotFoundError: the package safetensors is not installed.
    """
    config = read_config(path)
    parameters = mapping.of_model(model, family(config))
    shardings = _shardings(parameters, sharding)
    with Folder(path) as folder:
        names = _check(folder, parameters)
        # As they lie on the disk.
        starts = {name: (str(x.file), x.start) for name, x in folder.tensors.items()}
        parameters.sort(key=lambda parameter: starts[names[parameter.pieces[0].names[0]]])
        arrays = _read(folder, parameters, names, shardings)
        return mapping.nested(dict(arrays))


def _check(folder: Folder, parameters: list[Parameter]) -> dict[str, str]:
    """Checks the folder's tensors; returns the names that it has, by pieces' first names."""
    tensors = folder.tensors
    pieces = {piece.names[0]: piece for p in parameters for piece in p.pieces}
    names = {
        first: next((name for name in piece.names if name in tensors), first)
        for first, piece in pieces.items()
    }
    unexpected = set(tensors) - set(names.values())
    head = "lm_head.weight"
    if head in unexpected and _is_embedding(folder, head, parameters, names):
        unexpected.remove(head)
    wrong = dict(missing=sorted(set(names.values()) - set(tensors)), unexpected=sorted(unexpected))
    wrong["of another shape"] = [
        f"{name} {list(tensors[name].shape)}, where the model has {list(pieces[first].whole)}"
        for first, name in names.items()
        if name in tensors and tensors[name].shape != pieces[first].whole
    ]
    wrong[f"of a dtype other than {', '.join(DTYPES)}"] = [
        f"{name} {tensors[name].dtype}"
        for name in names.values()
        if name in tensors and tensors[name].dtype not in DTYPES
    ]
    refuse(f"{folder.path} does not fit the model", wrong)
    return names


def refuse(what: str, wrong: Mapping[str, list[str]]) -> None:
    """Raises ValueError if anything is wrong, with all of it."""
    found = [f"{kind} ({len(names)}): {'; '.join(names)}" for kind, names in wrong.items() if names]
    if found:
        raise ValueError(f"{what}. Tensors {'. Tensors '.join(found)}")


def _is_embedding(
    folder: Folder, head: str, parameters: list[Parameter], names: Mapping[str, str]
) -> bool:
    """Whether the head of a file, which the config ties to the embedding, is the same there."""
    embedding = names[parameters[0].pieces[0].names[0]]
    if embedding not in folder.tensors:
        return False
    a, b = folder.tensors[head], folder.tensors[embedding]
    if a[2:] != b[2:] or a.dtype not in DTYPES or len(a.shape) != 2:
        return False
    rows, columns = a.shape
    step = max(1, 2**24 // columns)
    for row in range(0, rows, step):
        where = row * columns, min(step, rows - row) * columns
        ours, theirs = (folder.read(Part(name, *where)) for name in (embedding, head))
        if ours.tobytes() != theirs.tobytes():
            return False
    return True


def _shardings(parameters: list[Parameter], sharding: Any) -> dict[str, Sharding | None]:
    """The sharding of each parameter, by path."""
    result: dict[str, Any]
    if sharding is None or isinstance(sharding, Sharding):
        result = {p.path: sharding for p in parameters}
    elif callable(sharding):
        result = {p.path: sharding(p.path, p.shape) for p in parameters}
    else:
        result = mapping.flat(sharding)
    paths = {p.path for p in parameters}
    wrong = [f"{path} is missing" for path in sorted(paths - set(result))]
    wrong += [f"{path} is no parameter" for path in sorted(set(result) - paths)]
    for p in parameters:
        given = result.get(p.path)
        if (given is None and sharding is None) or p.path not in result:
            continue
        if not isinstance(given, Sharding):
            wrong.append(f"{p.path} has {given!r}, which is no jax.sharding.Sharding")
            continue
        try:
            given.shard_shape(p.shape)
        except ValueError as error:
            wrong.append(f"{p.path} {list(p.shape)} has {given}: {error}")
    if wrong:
        raise ValueError(f"sharding does not fit the parameters: {'; '.join(wrong)}")
    return result


class _Shard:
    """A part of a parameter that some devices hold, while its pieces arrive."""

    def __init__(self, parameter: Parameter, bounds: Bounds, devices: list) -> None:
        self.bounds, self.devices, self.dtype = bounds, devices, parameter.dtype
        self.shape = tuple(end - start for start, end in bounds)
        self.is_small = math.prod(self.shape) * self.dtype.itemsize <= SMALL_BYTES
        self.host: NumpyArray | None = None
        self.arrays: dict[Any, jax.Array] = {}

    def within(self, piece: Piece) -> tuple[slice, ...] | None:
        """What the shard has of a piece, in the order of axes in the file; None for nothing."""
        fixed = self.bounds[: len(piece.at)]
        if not all(start <= i < end for i, (start, end) in zip(piece.at, fixed, strict=True)):
            return None
        free = self.bounds[len(piece.at) :]
        order = (free[piece.axes.index(axis)] for axis in range(len(free)))
        return tuple(slice(start, end) for start, end in order)

    def add(self, piece: Piece, block: NumpyArray) -> list[jax.Array]:
        """Takes the piece's elements, as they lie in the file; returns what is on its way."""
        at = tuple(i - start for i, (start, _) in zip(piece.at, self.bounds, strict=False))
        if self.is_small:
            if self.host is None:
                self.host = np.empty(self.shape, self.dtype)
            self.host[at] = block.transpose(piece.axes)
            return []
        block = np.ascontiguousarray(block)
        sent = [jax.device_put(block, device) for device in self.devices]
        for device, there in zip(self.devices, sent, strict=True):
            array = _arranged(there, piece.axes, self.dtype)
            if at:
                before = self.arrays.get(device)
                if before is None:
                    before = jnp.zeros(self.shape, self.dtype, device=device)
                array = _filled(before, array, np.array(at, np.int32))
            self.arrays[device] = array
        return sent

    def finished(self) -> list[jax.Array]:
        """The shard, on each of its devices."""
        if self.host is not None:
            return [jax.device_put(self.host, device) for device in self.devices]
        return [self.arrays[device] for device in self.devices]


@functools.partial(jax.jit, static_argnames=("axes", "dtype"))
def _arranged(block: jax.Array, axes: tuple[int, ...], dtype: np.dtype) -> jax.Array:
    return block.transpose(axes).astype(dtype)


@functools.partial(jax.jit, donate_argnums=0)
def _filled(array: jax.Array, part: jax.Array, at: jax.Array) -> jax.Array:
    """The array with the part at the indices `at` of its first axes."""
    start = [*at, *(jnp.int32(0) for _ in range(part.ndim))]
    part = part.reshape((1,) * len(at) + part.shape)
    return jax.lax.dynamic_update_slice(array, part, start)


def _shards(parameter: Parameter, sharding: Sharding | None) -> list[_Shard]:
    """The parts that this host's devices hold; devices with the same one share it."""
    if sharding is None:
        return [_Shard(parameter, tuple((0, size) for size in parameter.shape), [None])]
    devices: dict[Bounds, list] = {}
    for device, index in sharding.addressable_devices_indices_map(parameter.shape).items():
        sizes = zip(index or (), parameter.shape, strict=True)
        bounds = tuple(axis.indices(size)[:2] for axis, size in sizes)
        devices.setdefault(bounds, []).append(device)
    return [_Shard(parameter, bounds, where) for bounds, where in devices.items()]


class _Step(NamedTuple):
    """A piece, and which rows of it (of its first axis in the file) this host needs."""

    piece: Piece
    start: int
    stop: int


def _steps(parameter: Parameter, shards: list[_Shard]) -> Iterator[_Step]:
    for piece in parameter.pieces:
        needed = [index[0] for shard in shards if (index := shard.within(piece)) is not None]
        if needed:
            yield _Step(piece, min(x.start for x in needed), max(x.stop for x in needed))


def _read(
    folder: Folder,
    parameters: list[Parameter],
    names: Mapping[str, str],
    shardings: Mapping[str, Sharding | None],
) -> Iterator[tuple[str, jax.Array]]:
    """The parameters by path, in this order."""
    plan = []
    for parameter in parameters:
        shards = _shards(parameter, shardings[parameter.path])
        plan.append((parameter, shards, list(_steps(parameter, shards))))

    def part(step: _Step) -> Part:
        row = step.piece.count // step.piece.lies[0]
        name = names[step.piece.names[0]]
        return Part(name, step.piece.first + step.start * row, (step.stop - step.start) * row)

    parts = (part(step) for _, _, steps in plan for step in steps)
    on_the_way: collections.deque[list[jax.Array]] = collections.deque()
    # Closed before the files are, whatever happens.
    with contextlib.closing(folder.read_all(parts)) as blocks:
        for parameter, shards, steps in plan:
            for piece, start, stop in steps:
                block = next(blocks).reshape(stop - start, *piece.lies[1:])
                for shard in shards:
                    if (index := shard.within(piece)) is not None:
                        rows = slice(index[0].start - start, index[0].stop - start)
                        on_the_way.append(shard.add(piece, block[(rows, *index[1:])]))
                del block
                while len(on_the_way) > IN_FLIGHT:
                    jax.block_until_ready(on_the_way.popleft())
            arrays = [array for shard in shards for array in shard.finished()]
            given = shardings[parameter.path]
            if given is None:
                yield parameter.path, arrays[0]
            else:
                make = jax.make_array_from_single_device_arrays
                yield parameter.path, make(parameter.shape, given, arrays)
            shards.clear()
