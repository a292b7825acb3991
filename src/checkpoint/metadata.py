"""DCP's metadata of a step folder as torch's own objects, made of what `src.checkpoint.stored` reads without pickle's
freedom.
"""

from pathlib import Path
from typing import Any

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
from torch.distributed.checkpoint.planner import LoadPlan, LoadPlanner
from torch.futures import Future

from src.checkpoint.stored import FILE, StoredChunk, StoredTensor, read_stored
from src.storage.patience import Patience


class PatientReader(FileSystemReader):
    """DCP's reader of the step folder `path`, which waits for what passes."""

    def __init__(self, path: Path, patience: Patience) -> None:
        super().__init__(path)
        self._patience = patience

    def read_data(self, plan: LoadPlan, planner: LoadPlanner) -> Future[None]:
        return self._patience(lambda: super(PatientReader, self).read_data(plan, planner))


class RestrictedReader(PatientReader):
    """The same, with metadata that run nothing. CheckpointError where they would have."""

    def __init__(self, path: Path, patience: Patience) -> None:
        super().__init__(path, patience)
        self._file = path / FILE
        self._metadata: Metadata | None = None

    def read_metadata(self, *_args: Any, **_options: Any) -> Metadata:
        # Asked for twice; of a large model it takes seconds.
        self._metadata = self._metadata or self._patience(lambda: read(self._file))
        return self._metadata


def read(path: Path) -> Metadata:
    """The metadata, checked. CheckpointError where the file is cut off, or names or holds what no checkpoint of ours
    does.
    """
    stored = read_stored(path)
    return Metadata(
        state_dict_metadata={name: _tensor(each) for name, each in stored.tensors.items()},
        storage_data={_index(each): _StorageInfo(each.file, each.start, each.length) for each in stored.chunks},
        storage_meta=StorageMeta(),
        version=stored.version,
    )


def _tensor(stored: StoredTensor) -> TensorStorageMetadata:
    return TensorStorageMetadata(
        TensorProperties(dtype=getattr(torch, stored.dtype)),
        torch.Size(stored.shape),
        [ChunkStorageMetadata(torch.Size(offsets), torch.Size(sizes)) for offsets, sizes in stored.chunks],
    )


def _index(stored: StoredChunk) -> MetadataIndex:
    offset = None if stored.offset is None else torch.Size(stored.offset)
    return MetadataIndex(stored.name, offset, stored.index)
