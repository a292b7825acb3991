"""`clean`: what may go and how much it frees; with --yes it goes. What a run, a fork or a token cache needs stays.

Without a run or a condition: half-written checkpoints of runs that do not live. With --caches also tokens of the
root's cache that no run of the root reads. With runs or conditions: those runs, whole.
"""

import os
import shutil
import time
from collections.abc import Iterable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from rich.table import Table

from src.checkpoint.folder import ASIDE, complete, is_complete, step_of
from src.cluster.batch_system import batch_system
from src.config.tree import every_leaf
from src.errors import FolderError, UserError
from src.runs.commands.find import runs_in
from src.runs.commands.listing import print_json, size_text
from src.runs.commands.summary import Summary, summaries
from src.runs.lock import Lock
from src.storage.json_lines import facts_in
from src.sweeps.commands import folding, terminal

RECIPE = "data.json"
GOING = ".removing"  # of a hidden name: what was to go when a kill came
FRESH_SECONDS = 86_400.0  # tokens younger than this may be in the making


@dataclass(frozen=True)
class Item:
    """Something that may go, or why it stays."""

    path: Path
    why: str
    bytes: int
    run: Path | None = None  # whose it is: held while it goes
    keep: str = ""


def clean(runs: Sequence[Summary], root: Path, *, whole: bool, caches: bool, yes: bool, as_json: bool) -> int:
    """`whole`: the runs themselves go, not only what their saves have left behind."""
    everyone = {run.folder.resolve(): run for run in summaries(runs_in(root))} if root.is_dir() else {}
    everyone |= {run.folder.resolve(): run for run in runs}
    found = _whole_runs(runs, list(everyone.values())) if whole else [each for run in runs for each in _leftovers(run)]
    if caches:
        leaving = {each.path for each in found if whole and not each.keep}
        found += _caches(root, [run for run in everyone.values() if run.folder not in leaving])
    going = [each for each in found if not each.keep]
    removed = [each for each in going if yes and _remove(each)]
    if as_json:
        told = [{"path": each.path, "why": each.why, "bytes": each.bytes, "keep": each.keep or None} for each in found]
        print_json({"items": told, "removed": [each.path for each in removed]})
        return 0
    terminal().print(_table(found))
    total = size_text(sum(each.bytes for each in (removed if yes else going)))
    print(f"{len(removed)} removed, {total} freed" if yes else f"{len(going)} would go and free {total}; --yes does it")
    return 0


def _whole_runs(runs: Sequence[Summary], everyone: Sequence[Summary]) -> list[Item]:
    chosen = {run.folder.resolve() for run in runs}
    others = [run for run in everyone if run.folder.resolve() not in chosen and _starts_elsewhere(run)]
    needed = {path: run for run in others for path in _paths(run)}
    found = []
    for run in runs:
        inside = [by for path, by in needed.items() if path.is_relative_to(run.folder.resolve())]
        keep = f"it is {run.state}" if run.live else ""
        keep = keep or ("a link: remove it by hand" if run.folder.is_symlink() else "")
        keep = keep or (f"{inside[0].name} starts from it and has saved nothing yet" if inside else "")
        found.append(Item(run.folder, f"run, {run.state}", 0 if keep else size(run.folder), run.folder, keep))
    return found


def _starts_elsewhere(run: Summary) -> bool:
    """Whether it may still have to read what another run has saved."""
    return run.state != "finished" and not complete(run.folder / "checkpoints")


def _paths(run: Summary) -> list[Path]:
    """Absolute paths that its config names, and relative ones as seen from here."""
    try:
        values = [value for _, value in every_leaf(run.config)]
    except UserError:
        return []
    return [Path(each).expanduser().resolve() for each in values if isinstance(each, str) and "/" in each]


def _leftovers(run: Summary) -> list[Item]:
    """What saves that were killed have left, in a run that does not live."""
    place = run.folder / "checkpoints"
    if run.live or place.is_symlink() or not place.is_dir():
        return []
    found = [each for each in place.iterdir() if each.is_dir() and each.name.startswith("step_")]
    half = [each for each in found if step_of(each) is not None and not is_complete(each)]
    half += [each for each in found if each.name.endswith(ASIDE) and is_complete(each.with_suffix(""))]
    return [Item(each, "half-written checkpoint", size(each), run.folder) for each in sorted(half)]


def _caches(root: Path, runs: Iterable[Summary]) -> list[Item]:
    """Tokens that no run reads. Tokenizers stay: they are small, and a trained one cannot be made again."""
    read = {str(part[2]) for run in runs for part in facts_in(run.folder / RECIPE).get("parts", []) if len(part) > 2}
    place = root / "cache" / "tokens"
    there = sorted(each for each in place.iterdir() if each.is_dir()) if place.is_dir() else []
    found = []
    for each in there:
        fresh = time.time() - _newest(each) < FRESH_SECONDS
        keep = "written within the last day" if fresh and each.name not in read else ""
        if each.name not in read:
            found.append(Item(each, "tokens that no run of the root reads", 0 if keep else size(each), keep=keep))
    return found


def _newest(folder: Path) -> float:
    return max((each.stat().st_mtime for each in (folder, *folder.iterdir())), default=0.0)


def size(path: Path) -> int:
    """Bytes of all files below; links are not followed, and what vanishes meanwhile counts nothing."""
    total = 0
    for folder, _, files in os.walk(path):
        for name in files:
            with suppress(OSError):
                total += os.lstat(Path(folder) / name).st_size
    return total


def _remove(item: Item) -> bool:
    """A run is held while it gets a name that is no run's; from then on it is gone, whatever ends this process."""
    held = item.run is not None and (item.run / "lock").exists()
    lock = Lock(item.run / "lock", batch_system()) if held and item.run is not None else None
    try:
        if lock is not None:
            lock.take()
        gone = item.path.with_name(f".{item.path.name}{GOING}")
        item.path.rename(gone)
        shutil.rmtree(gone)
    except FolderError as error:
        print(f"{item.path}: stays: {error.problems[0]}")
        return False
    except OSError as error:
        print(f"{item.path}: stays: {error.strerror}")
        return False
    finally:
        if lock is not None:
            with suppress(OSError):
                lock.release()
    return True


def _table(found: Sequence[Item]) -> Table:
    table = folding("path", "what", "frees", "stays, because")
    for each in found:
        table.add_row(str(each.path), each.why, "" if each.keep else size_text(each.bytes), each.keep)
    return table
