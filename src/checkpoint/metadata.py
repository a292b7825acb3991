"""Read DCP's `.metadata` without running what it names.

DCP keeps its metadata as a pickle, which may name any function of Python and have it called. What a checkpoint needs is
tensors' names, shapes, dtypes and places in files, so the unpickler here knows those classes alone, makes inert records
in their place, and the real objects are built from the records once every value has the type that it must have.
"""

import pickle
from collections.abc import Mapping
from pathlib import Path
from typing import Any, BinaryIO

import torch
from torch.distributed.checkpoint.filesystem import FileSystemReader, _StorageInfo
from torch.distributed.checkpoint.metadata import (
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    StorageMeta,
    TensorProperties,
    TensorStorageMetadata,
)

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


class RestrictedReader(FileSystemReader):
    """DCP's reader of the step folder `path`, whose metadata runs nothing. CheckpointError where it would have."""

    def __init__(self, path: Path) -> None:
        super().__init__(path)
        self._file = path / FILE
        self._metadata: Metadata | None = None

    def read_metadata(self, *_args: Any, **_options: Any) -> Metadata:
        self._metadata = self._metadata or read(self._file)  # asked for twice; of a large model it takes seconds
        return self._metadata


def shapes(folder: Path) -> dict[str, tuple[tuple[int, ...], str]]:
    """Shape and dtype, such as "float32", of every tensor in a step folder, by its name."""
    return {
        name: (tuple(entry.size), str(entry.properties.dtype).removeprefix("torch."))
        for name, entry in read(folder / FILE).state_dict_metadata.items()
        if isinstance(entry, TensorStorageMetadata)
    }


def read(path: Path) -> Metadata:
    """The metadata, checked. CheckpointError where the file is cut off, or names or holds what no checkpoint of ours
    does.
    """
    try:
        with path.open("rb") as file:
            return _metadata(_Unpickler(file).load())
    except _ForeignError as error:
        raise CheckpointError(
            f"{path}: {error}, which no checkpoint of this project does; nothing of it was run. If you know who wrote "
            "it, checkpoint.trusted=true has torch read it all"
        ) from None
    except OSError:
        raise
    except Exception as error:  # an unpickler that is fed garbage raises anything
        raise CheckpointError(f"{path}: corrupted ({type(error).__name__}: {error})") from error


class _ForeignError(Exception):
    """In words: what the metadata does."""


class _Record:
    """What stands for an object of a class that the pickle names; keeps the object's state and does nothing with it."""

    state: Any = None

    def __setstate__(self, state: Any) -> None:
        self.state = state


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
        if module == "torch" and isinstance(found := vars(torch).get(name), torch.dtype):
            return found
        raise _ForeignError(f"names {module}.{name}")


def _metadata(record: object) -> Metadata:
    told = _state(record, "Metadata")
    tensors = _is(told["state_dict_metadata"], dict)
    places = _is(told["storage_data"], dict)
    return Metadata(
        state_dict_metadata={_is(name, str): _tensor(entry) for name, entry in tensors.items()},
        storage_data={_index(index): _place(info) for index, info in places.items()},
        storage_meta=StorageMeta(),
        version=told.get("version"),
    )


def _tensor(record: object) -> TensorStorageMetadata:
    told = _state(record, "TensorStorageMetadata")
    dtype, *_deprecated = _state(told["properties"], "TensorProperties", tuple)
    chunks = [_state(chunk, "ChunkStorageMetadata") for chunk in _is(told["chunks"], list)]
    return TensorStorageMetadata(
        TensorProperties(dtype=_is(dtype, torch.dtype)),
        _size(told["size"]),
        [ChunkStorageMetadata(_size(chunk["offsets"]), _size(chunk["sizes"])) for chunk in chunks],
    )


def _index(record: object) -> MetadataIndex:
    told = _state(record, "MetadataIndex")
    offset, index = told.get("offset"), told.get("index")
    return MetadataIndex(
        _is(told["fqn"], str), None if offset is None else _size(offset), None if index is None else _is(index, int)
    )


def _place(record: object) -> _StorageInfo:
    told = _state(record, "_StorageInfo")
    name = _is(told["relative_path"], str)
    if Path(name).name != name:
        raise _ForeignError(f"leads out of its folder, to {name}")
    if told.get("transform_descriptors"):
        raise _ForeignError(f"asks for transformations of {name}")
    return _StorageInfo(name, _is(told["offset"], int), _is(told["length"], int))


def _size(value: object) -> torch.Size:
    return torch.Size([_is(each, int) for each in _is(value, tuple)])


def _state(record: object, kind: str, of: type = dict) -> Any:
    if not isinstance(record, _Record) or type(record).__name__ != kind:
        raise _ForeignError(f"has a {type(record).__name__} where a {kind} belongs")
    return _is(record.state, of)


def _is(value: Any, kind: type) -> Any:
    if type(value) is not kind:
        raise _ForeignError(f"has a {type(value).__name__} where a {kind.__name__} belongs")
    return value
