"""Checkpoints as files: names, the marker that makes a folder count, and what may be removed. No torch here.

A run's checkpoints lie in `<run>/checkpoints/step_00000010/`. Such a folder counts once COMPLETE.json is in it.
"""

import json
import re
import shutil
import zlib
from collections.abc import Callable, Iterable
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from src.errors import CheckpointError
from src.storage.atomic_write import atomic_write, sync_folder

MARKER = "COMPLETE.json"
VALUES = "values.json"  # of a step folder: all of the state that is no tensor
ASIDE = ".replaced"  # an older complete checkpoint of the same step, kept until the new one is complete
SET_ASIDE = ".set_aside"  # a step folder's ending: no reader takes it for a checkpoint, and a rename brings it back
STEP_FOLDER = re.compile(r"step_(\d{8,})")
BLOCK_BYTES = 16 * 2**20


@dataclass(frozen=True)
class CheckpointFile:
    bytes: int
    crc32: str  # 8 hex digits


@dataclass(frozen=True)
class Marker:
    """The content of COMPLETE.json."""

    step: int
    torch: str  # version that wrote it
    facts: dict[str, Any]
    files: dict[str, CheckpointFile]

    @property
    def bytes(self) -> int:
        return sum(file.bytes for file in self.files.values())


def step_folder(checkpoints: Path, step: int) -> Path:
    return checkpoints / f"step_{step:08d}"


def step_of(path: Path) -> int | None:
    match = STEP_FOLDER.fullmatch(path.name)
    return int(match[1]) if match else None


def is_complete(path: Path) -> bool:
    return (path / MARKER).is_file()


def complete(checkpoints: Path) -> list[Path]:
    """The complete checkpoints in `checkpoints`, oldest first; empty when there is no such folder."""
    if not checkpoints.is_dir():
        return []
    found = [path for path in checkpoints.iterdir() if step_of(path) is not None and is_complete(path)]
    return sorted(found, key=lambda path: step_of(path) or 0)


def set_aside(checkpoints: Path) -> set[int]:
    """Steps whose checkpoints somebody wants the run to do without."""
    folders = (path.with_suffix("") for path in checkpoints.glob(f"step_*{SET_ASIDE}"))
    return {step for step in map(step_of, folders) if step is not None}


def read_initial(path: Path) -> Path:
    """A step folder as it is, or the newest complete one of a run folder or of its folder of checkpoints."""
    if step_of(path) is not None and is_complete(path):
        return path
    found = complete(path / "checkpoints") or complete(path)
    if found:
        return found[-1]
    if not path.exists():
        raise CheckpointError(f"checkpoint.initial={path}: does not exist")
    if step_of(path) is not None:
        others = complete(path.parent)
        way_out = f"the newest complete one beside it is {others[-1]}" if others else "no complete one lies beside it"
        raise CheckpointError(f"checkpoint.initial={path}: has no {MARKER}, its save did not finish; {way_out}")
    raise CheckpointError(
        f"checkpoint.initial={path}: neither a folder step_XXXXXXXX nor a run folder with a complete checkpoint"
    )


def draft(path: Path, writer: str) -> Path:
    """Where a step is written: in place, or, by one of several writers, beside it under a name of its own."""
    return path.with_name(f"{path.name}.{writer}") if writer else path


def publish(written: Path, path: Path) -> None:
    """Give a complete draft its step's name, unless another writer has saved that step: then that one stands."""
    if not is_complete(path):
        shutil.rmtree(path, ignore_errors=True)  # half-written by the only writer that a former life had
    try:
        written.rename(path)
    except OSError:
        if not is_complete(path):
            raise
        shutil.rmtree(written)
    sync_folder(path.parent)


def clean(checkpoints: Path, writer: str = "") -> None:
    """Make the folder, take back what a broken replacement set aside, remove half-written checkpoints. With `writer`,
    only its own drafts: others may be writing theirs.
    """
    checkpoints.mkdir(parents=True, exist_ok=True)
    if writer:
        for path in checkpoints.glob(f"step_*.{writer}"):
            shutil.rmtree(path)
        return
    for aside in checkpoints.glob(f"step_*{ASIDE}"):
        path = aside.with_suffix("")
        if is_complete(path) or not is_complete(aside):
            shutil.rmtree(aside)
            continue
        if path.exists():
            shutil.rmtree(path)
        aside.rename(path)
    for path in checkpoints.iterdir():
        if step_of(path) is not None and path.is_dir() and not is_complete(path):
            shutil.rmtree(path)


def expendable(
    found: list[Path], keep: int | None, keep_every: int | None, *, protected: Iterable[Path] = ()
) -> list[Path]:
    """The checkpoints of `found` (all complete ones, oldest first) that no rule keeps."""
    if keep is None:
        return []
    for_ever = set(protected)
    for_ever.update(path for path in found if keep_every is not None and (step_of(path) or 0) % keep_every == 0)
    return [path for path in found[:-keep] if path not in for_ever]


def best(found: list[Path], count: int | None, *, read: Callable[[Path], Marker] | None = None) -> list[Path]:
    """Those of `found` whose markers have the lowest validation loss, at most `count`; the earlier one of two alike.
    `read`: of their markers, where they are not here.
    """
    if count is None:
        return []
    losses: list[tuple[float, Path]] = []
    for path in found:
        with suppress(CheckpointError):  # one that cannot be read is no reason to keep it or to stop
            loss = (read or read_marker)(path).facts.get("validation_loss")
            losses += [(float(loss), path)] if isinstance(loss, int | float) else []
    return [path for _, path in sorted(losses)[:count]]


def remove(path: Path) -> None:
    """Remove a complete checkpoint; the marker goes first, so that a half-removed one does not count.

    What a network file system holds back for a while (.nfs files) goes with the next `clean`.
    """
    (path / MARKER).unlink(missing_ok=True)
    shutil.rmtree(path, ignore_errors=True)


def measure(path: Path) -> CheckpointFile:
    """Size and checksum of a file as it can be read back now."""
    size, checksum = 0, 0
    block = memoryview(bytearray(BLOCK_BYTES))
    with path.open("rb", buffering=0) as file:
        while count := file.readinto(block):
            size += count
            checksum = zlib.crc32(block[:count], checksum)
    return CheckpointFile(bytes=size, crc32=f"{checksum:08x}")


def of_text(text: str) -> CheckpointFile:
    """Of a file that holds `text`."""
    content = text.encode("utf-8", "surrogateescape")
    return CheckpointFile(len(content), f"{zlib.crc32(content):08x}")


def write_durably(path: Path, text: str) -> None:
    """The file has all of `text`, on the disk, or it is not there; so is the step folder that it lies in."""
    atomic_write(path, text, durable=True)
    sync_folder(path.parent.parent)


def write_marker(path: Path, marker: Marker) -> None:
    """Write COMPLETE.json, durably. From then on the folder `path` counts as a checkpoint."""
    write_durably(path / MARKER, json.dumps(asdict(marker), indent=1) + "\n")


def read_marker(path: Path) -> Marker:
    """The content of COMPLETE.json. CheckpointError when the folder `path` is no complete checkpoint."""
    if not is_complete(path):
        raise CheckpointError(f"{path}: no complete checkpoint ({MARKER} is missing)")
    try:
        return marker_of((path / MARKER).read_bytes())
    except ValueError as error:
        raise CheckpointError(f"{path / MARKER}: corrupted ({error})") from error


def marker_of(text: bytes) -> Marker:
    """The marker that this content of a COMPLETE.json describes. ValueError where it is no whole one."""
    try:
        content = json.loads(text)
        files = {name: CheckpointFile(**file) for name, file in content.pop("files").items()}
        return Marker(files=files, **content)
    except (TypeError, KeyError, AttributeError) as error:
        raise ValueError(str(error)) from error


def fault(path: Path, expected: CheckpointFile, verify: str) -> str | None:
    """How a file differs from its marker, or None. `verify`: "size" compares sizes, "full" checksums too."""
    if not path.is_file():
        return f"{path}: missing"
    size = path.stat().st_size
    if size != expected.bytes:
        return f"{path}: truncated or overwritten, {size:,} bytes where {expected.bytes:,} were written"
    if verify == "full" and (found := measure(path).crc32) != expected.crc32:
        return f"{path}: corrupted, crc32 {found} where {expected.crc32} was written"
    return None
