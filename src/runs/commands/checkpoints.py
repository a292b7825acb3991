"""`checkpoint`: what lies in step folders: steps, tokens, losses, tensors, bytes, and whether all of it is there."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any

from rich.table import Table

from src.checkpoint.fetched import opened
from src.checkpoint.folder import (
    MARKER,
    VALUES,
    Marker,
    complete,
    fault,
    is_complete,
    read_marker,
    step_folder,
    step_of,
)
from src.checkpoint.stored import ELEMENT_BYTES, shapes
from src.errors import CheckpointError, FolderError
from src.metrics.history import Series, read
from src.runs.commands.listing import print_json, short, size_text
from src.storage.json_lines import facts_in
from src.sweeps.commands import folding, terminal

UNFINISHED = f"no {MARKER}: it is being written, or its save did not finish"


@dataclass(frozen=True)
class StepFacts:
    """One checkpoint. None: nobody noted it."""

    path: Path
    step: int
    bytes: int
    tokens: int | None
    loss: float | None  # of its last step
    validation_loss: float | None  # after it
    layout: Mapping[str, int]  # of the ranks that wrote it
    torch: str

    def to_dict(self) -> dict[str, Any]:
        """Plain values, for machines."""
        return vars(self) | {"path": str(self.path), "layout": dict(self.layout)}


def facts_of(folder: Path) -> list[StepFacts]:
    """Of every complete checkpoint of a run folder, oldest first."""
    found = complete(folder / "checkpoints")
    series = read(folder).series if found else {}
    return [_facts(path, series) for path in found]


def step_facts(path: Path) -> StepFacts:
    """Of one step folder. CheckpointError where it is not complete."""
    return _facts(path, read(path.parents[1]).series)


def _facts(path: Path, series: Mapping[str, Series]) -> StepFacts:
    marker = read_marker(path)
    told, values = marker.facts, facts_in(path / VALUES)

    def at(name: str) -> Any:
        known = series.get(name, Series())
        return told.get(name, dict(zip(known.steps, known.values, strict=True)).get(marker.step))

    return StepFacts(
        path=path,
        step=marker.step,
        bytes=marker.bytes,
        tokens=told.get("tokens", values.get("tokens")),
        loss=at("loss"),
        validation_loss=at("validation_loss"),
        layout=told.get("layout", {}),
        torch=marker.torch,
    )


def show_checkpoint(given: Path, *, full: bool, as_json: bool) -> int:
    """A run folder's checkpoints, or all of one step folder; exit code 1 where files are missing or not whole.

    `full`: reads every byte and compares checksums, instead of sizes.
    """
    steps, broken = _steps(given)
    faults = {path: _faults(path, full=full) for path in steps} | {path: [UNFINISHED] for path in broken}
    known = [step_facts(path) for path in steps]
    tensors = shapes(steps[0]) if len(steps) == 1 and step_of(given) is not None and not faults[steps[0]] else {}
    if as_json:
        print_json({
            "checkpoints": [each.to_dict() | {"whole": not faults[each.path]} for each in known],
            "faults": {str(path): found for path, found in faults.items() if found},
            "tensors": {name: {"shape": list(shape), "dtype": dtype} for name, (shape, dtype) in tensors.items()},
        })  # fmt: skip
    else:
        terminal().print(table(known, faults))
        if tensors:
            terminal().print(_tensors(tensors))
        for path, found in faults.items():
            print(*(f"{path.name}: {each}" for each in found), sep="\n", end="\n" if found else "")
    return 1 if any(faults.values()) else 0


def show_elsewhere(url: str, *, full: bool, as_json: bool) -> int:
    """The same of checkpoints at a URL, where a marker says all that is told. RemoteError."""
    remote, steps = opened(url, "checkpoint")
    faults = {Path(step_folder(Path(), step).name): remote.faults(step, full=full) for step in steps}
    markers = [marker for step in steps if (marker := remote.marker(step)) is not None]
    known = [_marked(Path(step_folder(Path(), each.step).name), each) for each in markers]
    if as_json:
        print_json({
            "checkpoints": [each.to_dict() | {"whole": not faults[each.path]} for each in known],
            "faults": {str(path): found for path, found in faults.items() if found},
        })  # fmt: skip
    else:
        terminal().print(table(known, faults))
        for found in faults.values():
            print(*found, sep="\n", end="\n" if found else "")
    return 1 if any(faults.values()) else 0


def _marked(path: Path, marker: Marker) -> StepFacts:
    told = marker.facts
    losses = (told.get("loss"), told.get("validation_loss"))
    return StepFacts(path, marker.step, marker.bytes, told.get("tokens"), *losses, told.get("layout", {}), marker.torch)


def table(known: Sequence[StepFacts], faults: Mapping[Path, Sequence[str]]) -> Table:
    """One row a checkpoint."""
    found = folding("step", "tokens", "loss", "validation", "size", "whole", "folder")
    for each in known:
        tokens = "" if each.tokens is None else short(each.tokens)
        losses = ("" if value is None else f"{value:.4f}" for value in (each.loss, each.validation_loss))
        whole = "no" if faults.get(each.path) else "yes"
        found.add_row(f"{each.step:,}", tokens, *losses, size_text(each.bytes), whole, each.path.name)
    return found


def _tensors(tensors: Mapping[str, tuple[tuple[int, ...], str]]) -> Table:
    found = folding("tensor", "shape", "dtype", "size")
    sizes = {name: prod(shape) * ELEMENT_BYTES[dtype] for name, (shape, dtype) in tensors.items()}
    for name, (shape, dtype) in sorted(tensors.items()):
        found.add_row(name, " x ".join(map(str, shape)) or "one", dtype, size_text(sizes[name]))
    count = short(sum(prod(shape) for name, (shape, _) in tensors.items() if name.startswith("model.")))
    found.add_row(f"{len(tensors)} tensors, {count} elements in the model", "", "", size_text(sum(sizes.values())))
    return found


def _steps(given: Path) -> tuple[list[Path], list[Path]]:
    """Complete step folders and others. FolderError where there is no checkpoint at all."""
    if step_of(given) is not None and given.is_dir():
        return ([given], []) if is_complete(given) else ([], [given])
    place = given / "checkpoints" if (given / "checkpoints").is_dir() else given
    there = sorted(path for path in place.glob("step_*") if step_of(path) is not None) if place.is_dir() else []
    if not there:
        raise FolderError(f"{given}: no checkpoint; name a folder step_XXXXXXXX, or a run folder that holds some")
    return [path for path in there if is_complete(path)], [path for path in there if not is_complete(path)]


def _faults(path: Path, *, full: bool) -> list[str]:
    try:
        files = read_marker(path).files
    except CheckpointError as error:
        return list(error.problems)
    found = (fault(path / name, each, "full" if full else "size") for name, each in files.items())
    return [each for each in found if each is not None]
