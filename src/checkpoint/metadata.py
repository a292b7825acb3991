"""DCP's metadata of a step folder as torch's own objects, made of what `src.checkpoint.stored` reads without pickle's
freedom.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.distributed.checkpoint.default_planner import DefaultLoadPlanner
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
from torch.distributed.checkpoint.planner_helpers import _create_chunk_list, create_read_items_for_chunk_list
from torch.futures import Future

from src.checkpoint.stored import FILE, StoredChunk, StoredTensor, read_stored
from src.checkpoint.writer import in_words
from src.storage.patience import Patience


class PatientReader(FileSystemReader):
    """DCP's reader of the step folder `path`, which waits for what passes."""

    def __init__(self, path: Path, patience: Patience) -> None:
        super().__init__(path)
        self._patience = patience
        self.known: Metadata | None = None  # what is to be known of the metadata, where another rank has read them

    def read_metadata(self, *args: Any, **options: Any) -> Metadata:
        # Asked for again by each part of a load; of a large model it takes seconds.
        self.known = self.known or self._patience(lambda: self._read_metadata(*args, **options))
        return self.known

    def _read_metadata(self, *args: Any, **options: Any) -> Metadata:
        return super().read_metadata(*args, **options)

    def read_data(self, plan: LoadPlan, planner: LoadPlanner) -> Future[None]:
        return self._patience(lambda: super(PatientReader, self).read_data(plan, planner))


class RestrictedReader(PatientReader):
    """The same, with metadata that run nothing. CheckpointError where they would have."""

    def __init__(self, path: Path, patience: Patience) -> None:
        super().__init__(path, patience)
        self._file = path / FILE

    def _read_metadata(self, *_args: Any, **_options: Any) -> Metadata:
        return read(self._file)


Wanted = dict[str, tuple[torch.Size, list[ChunkStorageMetadata]]]  # by name, shape and the parts that a rank has


def wants_of(tensors: Mapping[str, Tensor]) -> Wanted:
    """What this rank will ask of a checkpoint."""
    return {name: (tensor.shape, _create_chunk_list(tensor)) for name, tensor in tensors.items()}


def narrowed(saved: Metadata, wants: Sequence[Wanted]) -> list[Metadata]:
    """For each of some ranks what it has to know of a checkpoint: shape and dtype of every tensor, and the places of
    those stored parts alone that hold any of what it wants. Of 4,096 ranks that each wrote a part of every tensor that
    is a 4,096th of the whole, at best.
    """
    found = [Metadata({}, storage_data={}, storage_meta=saved.storage_meta, version=saved.version) for _ in wants]
    for name, entry in saved.state_dict_metadata.items():
        if not isinstance(entry, TensorStorageMetadata):
            for each in found:
                each.state_dict_metadata[name] = entry
                each.storage_data[MetadataIndex(name)] = saved.storage_data[MetadataIndex(name)]
            continue
        asked = [
            (place, part)
            for place, each in enumerate(wants)
            for shape, parts in ([each[name]] if name in each else [])
            for part in (parts if shape == entry.size else [])  # else it is refused, and nothing is read
        ]
        kept: list[dict[MetadataIndex, ChunkStorageMetadata]] = [{} for _ in wants]
        # One sweep for all of them: torch's own, which makes the plan of each as well.
        for item in create_read_items_for_chunk_list(name, entry, [part for _, part in asked]):
            assert item.dest_index.index is not None
            assert item.storage_index.index is not None
            kept[asked[item.dest_index.index][0]][item.storage_index] = entry.chunks[item.storage_index.index]
        for each, parts_of in zip(found, kept, strict=True):
            each.state_dict_metadata[name] = TensorStorageMetadata(entry.properties, entry.size, [*parts_of.values()])
            each.storage_data |= {at: saved.storage_data[at] for at in parts_of if at in saved.storage_data}
    return found


def read_tensors(path: Path, tensors: Mapping[str, Tensor], reader: FileSystemReader, rank: int) -> None:
    """The steps of torch's `load` that one rank takes: it sends all plans to rank 0, which returns them unread."""
    planner = DefaultLoadPlanner(flatten_state_dict=False, flatten_sharded_tensors=False)
    with in_words(f"{path}: cannot be read", rank):
        metadata = reader.read_metadata()
        planner.set_up_planner(dict(tensors), metadata, rank == 0)
        reader.set_up_storage_reader(metadata, rank == 0)
        plan = reader.prepare_local_plan(planner.create_local_plan())
        reader.read_data(planner.finish_plan(plan), planner).wait()


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
