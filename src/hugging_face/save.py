"""A folder in Hugging Face layout, written by all ranks beside its place, and put there when it is whole."""

import json
import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol, TypeVar

import torch
from torch import Tensor

from src.errors import CheckpointError
from src.hugging_face.archive import INDEX
from src.hugging_face.write import Files, Held, Scales, block_scales, put_scales, write
from src.models.base import ModelConfig
from src.models.hugging_face import stored
from src.models.stored import Stored
from src.storage.remote import RemoteFolder

T = TypeVar("T")
FACTS = "export.json"  # also says that the folder was written here, and may be written anew


class SaveGroup(Protocol):
    """Agreements between all ranks: src.checkpoint.host_group.HostGroup."""

    def on_all(self, action: Callable[[], T]) -> T: ...
    def any(self, action: Callable[[], bool]) -> bool: ...
    def on_rank_zero(self, action: Callable[[], T]) -> T: ...


@dataclass(frozen=True)
class Form:
    """Options of a save: dtype, float8, size of files."""

    dtype: str  # torch's name
    fp8: bool  # linear weights in float8 with a scale for each block of 128 x 128
    biases: bool  # also those of routers whose form there has none
    shard_bytes: int  # largest file, unless one tensor is larger
    scales: str = "float32"  # dtype of float8's scales

    def table(self, config: ModelConfig) -> tuple[Stored, ...]:
        """Every tensor that is written of a model."""
        return tuple(each for each in stored(config) if self.biases or not each.optional)


UNCOMPARED = "not compared with transformers, which has no place for this router's biases"


def has_biases(team: SaveGroup, config: ModelConfig, tensors: Mapping[str, Tensor]) -> bool:
    """Collective. Whether any of those biases of routers for which transformers has no place is not zero.

    `tensors`: by name, this rank's part of each.
    """
    names = {each.name for each in stored(config) if each.optional}
    return team.any(lambda: any(bool(tensor.any()) for name, tensor in tensors.items() if name in names))


def refuse_foreign(folder: Path) -> None:
    """CheckpointError for a place that holds anything but an earlier export."""
    if folder.exists() and not (folder / FACTS).is_file():
        raise CheckpointError(f"{folder}: is there and was not written by an export; pass another to=...")


def refuse_foreign_url(url: str) -> None:
    """The same of a URL; RemoteError where it cannot be read."""
    names = RemoteFolder(url, "task.to").names()
    if names and FACTS not in names:
        raise CheckpointError(f"task.to={url}: is there and was not written by an export; pass another to=...")


def send(folder: Path, url: str) -> None:
    """Copy a finished export to a URL, what says that it is one last. RemoteError."""
    RemoteFolder(url, "task.to").send_all(folder, FACTS)


def save(
    team: SaveGroup,
    folder: Path,
    parts: Mapping[str, Held],
    config: ModelConfig,
    form: Form,
    beside: Mapping[str, bytes],
    largest: Callable[[Tensor], Tensor],
    device: torch.device,
) -> Path:
    """Collective. Returns where the whole folder is until `publish` puts it in its place.

    `beside`: the other files; `largest`: element-wise maximum over all ranks of a tensor on `device`.
    """
    table, draft = form.table(config), folder.with_name(f"{folder.name}.partial")
    files = Files.plan(draft, table, form.dtype, fp8=form.fp8, shard_bytes=form.shard_bytes, scales=form.scales)
    team.on_rank_zero(lambda: _begin(folder, draft, files))
    scales = block_scales(parts, table, largest, device, form.scales) if form.fp8 else None
    team.on_all(lambda: write(files, parts, table, scales))
    team.on_rank_zero(lambda: _end(draft, files, scales, beside))
    return draft


def publish(draft: Path, folder: Path) -> None:
    """Move the finished folder to its place, replacing an earlier export. Runs on one rank."""
    if folder.exists():
        shutil.rmtree(folder)
    draft.rename(folder)


def _begin(folder: Path, draft: Path, files: Files) -> None:
    refuse_foreign(folder)
    if draft.exists():
        shutil.rmtree(draft)
    draft.mkdir(parents=True)
    files.make()


def _end(draft: Path, files: Files, scales: Scales | None, beside: Mapping[str, bytes]) -> None:
    if scales is not None:
        put_scales(files, scales)
    if (index := files.index()) is not None:
        (draft / INDEX).write_text(json.dumps(index, indent=2) + "\n")
    for name, content in beside.items():
        (draft / name).write_bytes(content)
