"""Runs in the root that are this one under another hash, or nearly this one."""

import glob
from collections.abc import Callable, Iterator, Mapping
from functools import cache, cached_property
from pathlib import Path

from src.config.tree import Tree, identity, leaves, read, steers
from src.errors import ConfigError
from src.runs.records import ATTEMPTS_FILE
from src.storage.json_lines import Lines
from src.version import VERSION

LINES = 4  # differences that still make a near twin


class _Recorded:
    """A config in a root, and what is asked of it again and again: by each point of a sweep."""

    def __init__(self, tree: Tree) -> None:
        self.tree = tree

    @cached_property
    def identity(self) -> str:
        return identity(self.tree)

    @cached_property
    def leaves(self) -> dict[str, str]:
        """Of what decides numbers."""
        return _deciding(self.tree)


def earlier(root: Path, name: str, wanted: str) -> Path | None:
    """The run of that name whose recorded config, read with today's names, has this identity; of several the newest.

    The hash in a folder's name is that of the version that made it, so the folders of this one need not be read.
    """
    older = (path for path in _configs(root, f"{glob.escape(name)}-????????") if not _of_this_version(path.parent))
    same = [config.parent for config, recorded in _read(older) if recorded.identity == wanted]
    return max(same, key=lambda folder: (folder / "config.yaml").stat().st_mtime_ns, default=None)


def near(root: Path, tree: Tree, may_change: Callable[[str], bool]) -> str | None:
    """One line about a run that began and differs from `tree` in little: `folder=` goes on with it, or why not."""
    told: list[tuple[int, str]] = []
    ours = _deciding(tree)
    for config, recorded in _read(path for path in _configs(root, "*") if (path.parent / ATTEMPTS_FILE).exists()):
        lines = _few_differences(recorded.leaves, ours)
        if not lines:
            continue
        folder = config.parent
        refused = [line for line in lines if not may_change(line.partition(":")[0])]
        shown = "; ".join(lines)
        if not refused:
            told.append((len(lines), f"{folder} differs only in {shown}; folder={folder} goes on with it"))
        elif all(_absent(line) for line in refused):
            told.append((LINES + 1, f"{folder} was begun by another version and is another run: {shown}"))
    return min(told)[1] if told else None


def _deciding(tree: Tree) -> dict[str, str]:
    return {path: value for path, value in leaves(tree).items() if not steers(path)}


def _few_differences(theirs: Mapping[str, str], ours: Mapping[str, str]) -> list[str] | None:
    """As `difference` tells them; None beyond LINES, which tells most runs of a root apart by their first leaves."""
    lines: list[str] = []
    for path in dict.fromkeys((*theirs, *ours)):
        left, right = theirs.get(path, "absent"), ours.get(path, "absent")
        if left != right:
            if len(lines) == LINES:
                return None
            lines.append(f"{path}: {left} -> {right}")
    return lines


def _absent(line: str) -> bool:
    return line.endswith(" -> absent") or ": absent -> " in line


def _of_this_version(folder: Path) -> bool:
    """Whether this version began the run, and so named the folder."""
    first = next(Lines(folder / ATTEMPTS_FILE).read(), None)
    return first is not None and first.get("version") == VERSION


def _configs(root: Path, pattern: str) -> list[Path]:
    return sorted(root.glob(f"{pattern}/config.yaml"))


def _read(configs: Iterator[Path]) -> Iterator[tuple[Path, _Recorded]]:
    for config in configs:
        try:
            yield config, _recorded(config, config.stat().st_mtime_ns)
        except (OSError, ConfigError):  # removed meanwhile, or no config that we know
            continue


@cache
def _recorded(config: Path, _changed: int) -> _Recorded:
    return _Recorded(read(config))
