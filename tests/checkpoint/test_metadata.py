"""DCP's metadata read without pickle's freedom: what it must say, and that nothing else that it says is done."""

import copyreg
import os
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.distributed.checkpoint.filesystem import _StorageInfo
from torch.distributed.checkpoint.metadata import (
    BytesStorageMetadata,
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    StorageMeta,
    TensorProperties,
    TensorStorageMetadata,
)

from src.checkpoint.metadata import read
from tests.checkpoint.options import problems
from tests.checkpoint.states import two_saves
from tests.ranks import RankPool


def metadata(**changes: Any) -> Metadata:
    size = torch.Size([4, 2])
    entry = TensorStorageMetadata(TensorProperties(torch.bfloat16), size, [ChunkStorageMetadata(torch.Size([0]), size)])
    places: dict[Any, Any] = {MetadataIndex("w", [0, 0], 0): _StorageInfo("__0_0.distcp", 0, 16)}
    return Metadata(**({"state_dict_metadata": {"w": entry}, "storage_data": places} | changes))


class Does:
    """Has `call` called with `given` by whoever unpickles it."""

    def __init__(self, call: Any, *given: Any) -> None:
        self.call, self.given = call, given

    def __reduce__(self) -> tuple[Any, ...]:
        return self.call, self.given


def test_says_what_torch_reads(ranks: RankPool, tmp_path: Path) -> None:
    ranks(2, two_saves, tmp_path)
    path = tmp_path / "step_00000010/.metadata"
    ours, theirs = read(path), pickle.loads(path.read_bytes())
    assert ours.state_dict_metadata == theirs.state_dict_metadata
    assert ours.storage_data == theirs.storage_data
    assert {index.index for index in ours.storage_data} == {index.index for index in theirs.storage_data}


@pytest.mark.parametrize("dtype", [torch.float32, torch.float8_e4m3fn, torch.int64, torch.bool, torch.complex64])
def test_every_dtype(dtype: torch.dtype, tmp_path: Path) -> None:
    entry = TensorStorageMetadata(TensorProperties(dtype), torch.Size([]), [])
    (tmp_path / ".metadata").write_bytes(pickle.dumps(metadata(state_dict_metadata={"w": entry}), protocol=2))
    assert read(tmp_path / ".metadata").state_dict_metadata["w"] == entry


@pytest.mark.parametrize("protocol", range(2, pickle.HIGHEST_PROTOCOL + 1))
@pytest.mark.parametrize("where", ["itself", "name", "entry", "place", "planner", "after"])
def test_nothing_that_it_names_is_run(where: str, protocol: int, tmp_path: Path) -> None:
    mark = tmp_path / "mark"
    bomb = Does(os.system, f"touch {mark}")
    good = metadata()
    told: Any = {
        "itself": bomb,
        "name": metadata(state_dict_metadata={bomb: None}),
        "entry": metadata(state_dict_metadata={"w": bomb}),
        "place": metadata(storage_data={MetadataIndex("w"): bomb}),
        "planner": metadata(planner_data=bomb),
        "after": metadata(storage_meta=StorageMeta(checkpoint_id=bomb)),  # type: ignore[arg-type]
    }[where]
    (tmp_path / ".metadata").write_bytes(pickle.dumps(told, protocol))
    (said,) = problems(read, tmp_path / ".metadata")
    assert "names posix.system, which no checkpoint of this project does; nothing of it was run" in said
    assert not mark.exists()
    assert pickle.dumps(good) == pickle.dumps(metadata())


@pytest.mark.parametrize(
    ("told", "words"),
    [
        (Does(eval, "1"), "names builtins.eval"),
        (Does(getattr, "text", "format"), "names builtins.getattr"),
        (Does(torch.hub.load, "a", "b"), "names torch.hub.load"),
        (Does(torch.load, "a"), "names torch.serialization.load"),
        (Does(type, "A", (), {}), "names builtins.type"),
        (Does(copyreg.pickle, Metadata, len), "names copyreg.pickle"),
        (
            metadata(state_dict_metadata={"w": BytesStorageMetadata()}),
            "names torch.distributed.checkpoint.metadata.B",
        ),
        (metadata(storage_data={MetadataIndex("w"): _StorageInfo("../../secret", 0, 1)}), "leads out of its folder"),
        (metadata(storage_data={MetadataIndex("w"): _StorageInfo("/secret", 0, 1)}), "leads out of its folder"),
        (metadata(storage_data={MetadataIndex("w"): _StorageInfo("a", 0, 1, ["zip"])}), "asks for transformations"),
        (metadata(storage_data={MetadataIndex("w"): _StorageInfo("a", "0", 1)}), "a str where a int belongs"),  # type: ignore[arg-type]
        ({"a": 1}, "has a dict where a Metadata belongs"),
        (None, "has a NoneType where a Metadata belongs"),
    ],
)
def test_what_no_checkpoint_of_ours_says(told: Any, words: str, tmp_path: Path) -> None:
    (tmp_path / ".metadata").write_bytes(pickle.dumps(told))
    (said,) = problems(read, tmp_path / ".metadata")
    assert words in said


def test_a_class_cannot_be_written_to(tmp_path: Path) -> None:
    """BUILD on a class sets its attributes: here those of what stands for the class in one reading."""
    build = b"ctorch.distributed.checkpoint.metadata\nMetadataIndex\n(N}S'__eq__'\nI1\nstb."
    (tmp_path / ".metadata").write_bytes(build)
    problems(read, tmp_path / ".metadata")
    assert MetadataIndex("w") == MetadataIndex("w")


def test_a_file_cut_off_anywhere_is_corrupted(tmp_path: Path) -> None:
    whole = pickle.dumps(metadata())
    for length in range(len(whole)):
        (tmp_path / ".metadata").write_bytes(whole[:length])
        (said,) = problems(read, tmp_path / ".metadata")
        assert said.startswith(f"{tmp_path / '.metadata'}: corrupted (")
