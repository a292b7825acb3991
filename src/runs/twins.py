"""Runs in the root that are this one under another hash, or nearly this one."""

import glob
from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path

from src.config.tree import Tree, difference, identity, read
from src.errors import ConfigError
from src.runs.records import ATTEMPTS_FILE

LINES = 4  # differences that still make a near twin


def earlier(root: Path, name: str, wanted: str) -> Path | None:
    """The run of that name whose recorded config, read with today's names, has this identity; of several the newest.

    The hash in a folder's name is that of the version that made it.
    """
    same = [folder for folder, tree in _runs(root, f"{glob.escape(name)}-????????") if identity(tree) == wanted]
    return max(same, key=lambda folder: (folder / "config.yaml").stat().st_mtime_ns, default=None)


def near(root: Path, tree: Tree, may_change: Callable[[str], bool]) -> str | None:
    """One line about a run that began and differs from `tree` in little: `folder=` goes on with it, or why not."""
    told: list[tuple[int, str]] = []
    for folder, theirs in _runs(root, "*"):
        if not (folder / ATTEMPTS_FILE).exists():
            continue
        lines = difference(theirs, tree)
        refused = [line for line in lines if not may_change(line.partition(":")[0])]
        shown = "; ".join(lines)
        if lines and len(lines) <= LINES and not refused:
            told.append((len(lines), f"{folder} differs only in {shown}; folder={folder} goes on with it"))
        elif refused and len(lines) <= LINES and all(_absent(line) for line in refused):
            told.append((LINES + 1, f"{folder} was begun by another version and is another run: {shown}"))
    return min(told)[1] if told else None


def _absent(line: str) -> bool:
    return line.endswith(" -> absent") or ": absent -> " in line


def _runs(root: Path, pattern: str) -> Iterator[tuple[Path, Tree]]:
    for config in sorted(root.glob(f"{pattern}/config.yaml")):
        try:
            yield config.parent, _recorded(config, config.stat().st_mtime_ns)
        except (OSError, ConfigError):  # removed meanwhile, or no config that we know
            continue


@cache  # a sweep asks for each of its points
def _recorded(config: Path, _changed: int) -> Tree:
    return read(config)
