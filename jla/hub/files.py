"""Files of the safetensors format: a folder's tensors, read piece by piece, and written one by one.

The package safetensors opens a file: it checks the header, and tells names, dtypes, shapes and the
order in which the tensors lie, without a gap. The bytes are read here, for the package reads the
whole tensor for each slice of it, at a third of the speed, and holds Python's lock meanwhile; or it
maps the file into memory, where what was read stays until the file is closed.
"""

import collections
import concurrent.futures
import json
import math
import os
import pathlib
from collections.abc import Callable, Generator, Iterable
from typing import Any, NamedTuple

import ml_dtypes
import numpy as np

from jla._core.types import NumpyArray

DTYPES = {
    "BF16": np.dtype(ml_dtypes.bfloat16),
    "F16": np.dtype(np.float16),
    "F32": np.dtype(np.float32),
}
SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"
# The most that is read ahead, and by how many threads: one alone does not keep a disk busy.
AHEAD_BYTES = 2**28
READERS = 4


class Tensor(NamedTuple):
    """Where a tensor lies.

    Attributes:
      file: its path.
      start: of the file's bytes, its first.
      dtype: as the format names it.
      shape: of the whole tensor.
    """

    file: pathlib.Path
    start: int
    dtype: str
    shape: tuple[int, ...]


class Part(NamedTuple):
    """A part of a tensor: `count` elements of it from `first` on, in the order of the file."""

    name: str
    first: int
    count: int


class Folder:
    """A checkpoint's tensors by name, in one file or in several with an index. A context."""

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self.path = pathlib.Path(path)
        self.tensors: dict[str, Tensor] = {}
        self._descriptors: dict[pathlib.Path, int] = {}
        for file, names in _files(self.path).items():
            found = _tensors(file)
            if names is not None and names != set(found):
                raise ValueError(
                    f"{self.path / INDEX} does not fit {file.name}: only the index names "
                    f"{_list(names - set(found))}, only the file has {_list(set(found) - names)}"
                )
            self.tensors |= found

    def __enter__(self) -> "Folder":
        return self

    def __exit__(self, *_: object) -> None:
        for descriptor in self._descriptors.values():
            os.close(descriptor)
        self._descriptors.clear()

    def read(self, part: Part) -> NumpyArray:
        """The part's elements, in an array [count] of the tensor's dtype."""
        return _read(*self._place(part))

    def read_all(self, parts: Iterable[Part]) -> Generator[NumpyArray]:
        """The parts' elements, one part after the other; the next ones are being read meanwhile."""
        places = [self._place(part) for part in parts]
        ahead: collections.deque[concurrent.futures.Future[NumpyArray]] = collections.deque()
        following, bytes_ahead = 0, 0
        pool = concurrent.futures.ThreadPoolExecutor(READERS)
        try:
            for i in range(len(places)):
                while following < len(places) and (
                    following == i or bytes_ahead + places[following].size <= AHEAD_BYTES
                ):
                    ahead.append(pool.submit(_read, *places[following]))
                    bytes_ahead += places[following].size
                    following += 1
                yield ahead.popleft().result()
                bytes_ahead -= places[i].size
        finally:
            pool.shutdown(cancel_futures=True)

    def _place(self, part: Part) -> "_Place":
        tensor = self.tensors[part.name]
        if tensor.file not in self._descriptors:
            self._descriptors[tensor.file] = os.open(tensor.file, os.O_RDONLY)
        dtype = DTYPES[tensor.dtype]
        start, size = (x * dtype.itemsize for x in (part.first, part.count))
        return _Place(
            tensor.file, self._descriptors[tensor.file], tensor.start + start, size, dtype
        )


class _Place(NamedTuple):
    """`size` bytes of an open file, and their dtype."""

    file: pathlib.Path
    descriptor: int
    start: int
    size: int
    dtype: np.dtype[Any]


def _read(
    file: pathlib.Path, descriptor: int, start: int, size: int, dtype: np.dtype[Any]
) -> NumpyArray:
    read = np.empty(size, np.uint8)
    done = 0
    while done < size:
        # Linux reads 2 GiB at most in one call.
        got = os.preadv(descriptor, [read[done:]], start + done)
        if not got:
            raise ValueError(f"{file} ends before byte {start + size}: it has been changed")
        done += got
    return read.view(dtype)


def _files(folder: pathlib.Path) -> dict[pathlib.Path, set[str] | None]:
    """The folder's files, and which tensors the index says are in each; None without an index."""
    if not folder.is_dir():
        raise ValueError(f"path must be a folder with a checkpoint, got {folder}: no such folder")
    single, index = folder / SINGLE, folder / INDEX
    if single.exists() == index.exists():
        here = sorted(path.name for path in folder.iterdir())
        raise ValueError(
            f"path must be a folder with {SINGLE} or {INDEX}, got {folder}, which has "
            f"{'both' if single.exists() else 'neither'} among {_list(here)}; checkpoints of other "
            "formats must first be saved as safetensors, for example by transformers"
        )
    if single.exists():
        return {single: None}
    names: dict[pathlib.Path, set[str]] = {}
    for name, file in json.loads(index.read_text())["weight_map"].items():
        names.setdefault(folder / file, set()).add(name)
    missing = sorted(file.name for file in names if not file.exists())
    if missing:
        raise ValueError(f"{index} names files that are not there: {_list(missing)}")
    return dict(names)


def _tensors(file: pathlib.Path) -> dict[str, Tensor]:
    try:
        from safetensors import SafetensorError, safe_open
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(
            "jla.hub reads files with the package safetensors, which is not installed; "
            "install it with: pip install 'jla[hub]'",
            name=error.name,
        ) from error
    try:
        with safe_open(file, framework="numpy", backend="pread") as opened:
            slices = {name: opened.get_slice(name) for name in opened.offset_keys()}
            found = [(name, x.get_dtype(), tuple(x.get_shape())) for name, x in slices.items()]
    except SafetensorError as error:
        raise ValueError(f"{file} is no whole safetensors file: {error}") from error
    with open(file, "rb") as opened:
        start = 8 + int.from_bytes(opened.read(8), "little")
    tensors = {}
    for name, dtype, shape in found:
        tensors[name] = Tensor(file, start, dtype, shape)
        start += _size(dtype, shape)
    return tensors


def _size(dtype: str, shape: tuple[int, ...]) -> int:
    """Bytes. A dtype's name has its bits, as in F8_E4M3, whether or not it can be read here."""
    bits = "8" if dtype == "BOOL" else "".join(x for x in dtype.split("_")[0] if x.isdigit())
    return math.prod(shape) * int(bits) // 8


class Written(NamedTuple):
    """A tensor to write.

    Attributes:
      dtype, shape: of the whole tensor.
      make: returns its parts, arrays of this dtype whose elements follow one another.
    """

    dtype: np.dtype[Any]
    shape: tuple[int, ...]
    make: Callable[[], Iterable[NumpyArray]]


def write(folder: pathlib.Path, tensors: dict[str, Written], max_shard_bytes: float) -> None:
    """Writes one file, or several of at most `max_shard_bytes` (or of one tensor) and an index.

    There is one tensor on the host at a time.
    """
    shards: list[dict[str, Written]] = [{}]
    room = max_shard_bytes
    for name, tensor in tensors.items():
        size = math.prod(tensor.shape) * tensor.dtype.itemsize
        if size > room and shards[-1]:
            shards.append({})
            room = max_shard_bytes
        shards[-1][name] = tensor
        room -= size
    names = [f"model-{i + 1:05}-of-{len(shards):05}.safetensors" for i in range(len(shards))]
    names = [SINGLE] if len(shards) == 1 else names
    total = sum(_write_file(folder / n, shard) for n, shard in zip(names, shards, strict=True))
    if len(shards) > 1:
        where = {name: file for file, shard in zip(names, shards, strict=True) for name in shard}
        index = {"metadata": {"total_size": total}, "weight_map": where}
        (folder / INDEX).write_text(json.dumps(index, indent=2) + "\n")


def _write_file(path: pathlib.Path, tensors: dict[str, Written]) -> int:
    """Writes a file; returns the bytes of its tensors."""
    codes = {dtype: code for code, dtype in DTYPES.items()}
    # Readers of torch's look for the format.
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    end = 0
    for name, tensor in tensors.items():
        start, end = end, end + math.prod(tensor.shape) * tensor.dtype.itemsize
        shape = list(tensor.shape)
        header[name] = dict(dtype=codes[tensor.dtype], shape=shape, data_offsets=[start, end])
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)  # so that the tensors are aligned
    with open(path, "wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for name, tensor in tensors.items():
            before = file.tell()
            for part in tensor.make():
                # A transposed array's bytes lie in another order than its elements.
                part = np.ascontiguousarray(part)
                assert part.dtype == tensor.dtype, name
                file.write(part.reshape(-1).view(np.uint8))
            assert (
                file.tell() - before
                == header[name]["data_offsets"][1] - (header[name]["data_offsets"][0])
            ), name
    return end


def _list(names: Iterable[str]) -> str:
    return ", ".join(sorted(names)) or "nothing"
