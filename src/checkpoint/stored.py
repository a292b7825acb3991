"""The metadata of a step folder's tensors (DCP's `.metadata`), read without torch and without running what it names.

DCP keeps its metadata as a pickle, which may name any function of Python and have it called. What a checkpoint needs is
tensors' names, shapes, dtypes and places in files, so the unpickler here knows those classes alone and makes inert
records in their place; what is in the records must have the types that it should.
"""

import pickle
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

from src.errors import CheckpointError

FILE = ".metadata"
_DCP = "torch.distributed.checkpoint."
_RECORDS = frozenset(
    {
        *((f"{_DCP}metadata", name) for name in ("Metadata", "MetadataIndex", "StorageMeta", "TensorProperties")),
        *((f"{_DCP}metadata", name) for name in ("TensorStorageMetadata", "ChunkStorageMetadata")),
        (f"{_DCP}filesystem", "_StorageInfo"),
    }
)
# Called by the pickle with plain values; what replaces them makes plain values of them.
_PLAIN: Mapping[tuple[str, str], type] = {
    ("torch", "Size"): tuple,
    ("torch.serialization", "_get_layout"): str,
    (f"{_DCP}metadata", "_MEM_FORMAT_ENCODING"): int,
}
# Bytes of an element of torch's dtypes.
ELEMENT_BYTES: Mapping[str, int] = {
    **dict.fromkeys(("bool", "uint8", "int8"), 1),
    **dict.fromkeys(("float8_e4m3fn", "float8_e4m3fnuz", "float8_e5m2", "float8_e5m2fnuz", "float8_e8m0fnu"), 1),
    **dict.fromkeys(("uint16", "int16", "float16", "bfloat16"), 2),
    **dict.fromkeys(("uint32", "int32", "float32", "complex32"), 4),
    **dict.fromkeys(("uint64", "int64", "float64", "complex64"), 8),
    "complex128": 16,
}
Extent = tuple[int, ...]


@dataclass(frozen=True)
class StoredTensor:
    shape: Extent
    dtype: str  # such as "float32"
    chunks: tuple[tuple[Extent, Extent], ...]  # offsets and sizes


@dataclass(frozen=True)
class StoredChunk:
    """Where a chunk of a tensor, or a whole one, lies."""

    name: str  # of the tensor
    offset: Extent | None  # in it
    index: int | None
    file: str
    start: int  # bytes
    length: int


@dataclass(frozen=True)
class StoredState:
    tensors: dict[str, StoredTensor]
    chunks: tuple[StoredChunk, ...]
    version: Any


def read_stored(path: Path) -> StoredState:
    """The metadata, checked. CheckpointError where the file is cut off, or names or holds what no checkpoint of ours
    does.
    """
    try:
        with path.open("rb") as file:
            return _stored(_Unpickler(file).load())
    except _ForeignError as error:
        raise CheckpointError(
            f"{path}: {error}, which no checkpoint of this project does; nothing of it was run. If you know who wrote "
            "it, checkpoint.trusted=true has torch read it all"
        ) from None
    except OSError:
        raise
    except Exception as error:  # an unpickler that is fed garbage raises anything
        raise CheckpointError(f"{path}: corrupted ({type(error).__name__}: {error})") from error


def shapes(folder: Path) -> dict[str, tuple[Extent, str]]:
    """Shape and dtype, such as "float32", of every tensor in a step folder, by its name."""
    return {name: (each.shape, each.dtype) for name, each in read_stored(folder / FILE).tensors.items()}


class _ForeignError(Exception):
    """In words: what the metadata does."""


class _Record:
    """What stands for an object of a class that the pickle names; keeps the object's state and does nothing with it."""

    state: Any = None

    def __setstate__(self, state: Any) -> None:
        self.state = state


class _DtypeName(str):
    """What stands for a dtype."""


class _Unpickler(pickle.Unpickler):
    def __init__(self, file: BinaryIO) -> None:
        super().__init__(file)
        # Of this file alone: a pickle can write to the classes that it is given.
        self._kinds: dict[str, type[_Record]] = {name: type(name, (_Record,), {}) for _, name in _RECORDS}

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) in _RECORDS:
            return self._kinds[name]
        if (module, name) in _PLAIN:
            return _PLAIN[module, name]
        if module.partition(".")[0] == "pathlib" and name in ("PosixPath", "WindowsPath"):
            return lambda *_parts: None  # where it was written: nobody asks
        if module == "torch" and name in ELEMENT_BYTES:
            return _DtypeName(name)
        raise _ForeignError(f"names {module}.{name}")


def _stored(record: object) -> StoredState:
    told = _state(record, "Metadata")
    tensors = _is(told["state_dict_metadata"], dict)
    places = _is(told["storage_data"], dict)
    return StoredState(
        tensors={_is(name, str): _tensor(entry) for name, entry in tensors.items()},
        chunks=tuple(_chunk(index, info) for index, info in places.items()),
        version=told.get("version"),
    )


def _tensor(record: object) -> StoredTensor:
    told = _state(record, "TensorStorageMetadata")
    dtype, *_deprecated = _state(told["properties"], "TensorProperties", tuple)
    chunks = [_state(chunk, "ChunkStorageMetadata") for chunk in _is(told["chunks"], list)]
    extents = tuple((_extent(chunk["offsets"]), _extent(chunk["sizes"])) for chunk in chunks)
    return StoredTensor(_extent(told["size"]), str(_is(dtype, _DtypeName)), extents)


def _chunk(index: object, info: object) -> StoredChunk:
    told, place = _state(index, "MetadataIndex"), _state(info, "_StorageInfo")
    file = _is(place["relative_path"], str)
    if Path(file).name != file:
        raise _ForeignError(f"leads out of its folder, to {file}")
    if place.get("transform_descriptors"):
        raise _ForeignError(f"asks for transformations of {file}")
    offset, number = told.get("offset"), told.get("index")
    return StoredChunk(
        _is(told["fqn"], str),
        None if offset is None else _extent(offset),
        None if number is None else _is(number, int),
        file,
        _is(place["offset"], int),
        _is(place["length"], int),
    )


def _extent(value: object) -> Extent:
    return tuple(_is(each, int) for each in _is(value, tuple))


def _state(record: object, kind: str, of: type = dict) -> Any:
    if not isinstance(record, _Record) or type(record).__name__ != kind:
        raise _ForeignError(f"has a {type(record).__name__} where a {kind} belongs")
    return _is(record.state, of)


def _is(value: Any, kind: type) -> Any:
    if type(value) is not kind:
        raise _ForeignError(f"has a {type(value).__name__} where a {kind.__name__} belongs")
    return value
