"""Which run folders a command is about: paths, names below the root, roots and sweeps."""

import os
from collections.abc import Sequence
from pathlib import Path

from src.config.wording import nearest
from src.errors import FolderError, some
from src.storage.remote import is_url
from src.sweeps.ledger import SWEEP, Ledger

CONFIG = "config.yaml"


def default_root() -> Path:
    """Where conf/config.yaml puts runs."""
    return Path(os.environ.get("RUNS") or "runs")


def folders(given: Sequence[str], root: Path) -> list[Path]:
    """The run folders that are meant, each once: of a sweep its points, of any other folder the runs in it; of nothing
    those of `root`. FolderError for what is none of these.
    """
    found = [run for each in given for run in _meant(each, root)] if given else runs_in(root)
    return list(dict.fromkeys(found))


def folder(given: str, root: Path) -> Path:
    """The one run folder that is meant; the beginning of a name will do where one run alone has it. FolderError."""
    found = _meant(given, root)
    if not found:
        raise FolderError(f"{given}: no run is in this folder; give a run's folder, or its name below {root}")
    if len(found) != 1 or is_root(Path(given)):
        raise FolderError(f"{given}: {len(found)} runs; name one of them: {some(each.name for each in found)}")
    return found[0]


def is_root(path: Path) -> bool:
    """Whether it is a folder of runs, or of a sweep, and no run itself."""
    return path.is_dir() and not (path / CONFIG).is_file()


def runs_in(root: Path) -> list[Path]:
    """Every run folder directly below `root`, by name."""
    try:
        with os.scandir(root) as entries:
            names = sorted(each.name for each in entries if each.is_dir())
    except OSError as error:
        raise FolderError(f"{root}: cannot be listed ({error.strerror}); pass --root, or set RUNS") from error
    return [root / name for name in names if (root / name / CONFIG).is_file()]


def _meant(given: str, root: Path) -> list[Path]:
    if is_url(given):
        raise FolderError(f"{given}: is a URL, of which only `python -m src.runs checkpoint {given}` tells")
    path = Path(given).expanduser()
    for place in (path, root / given):
        if (place / CONFIG).is_file():
            return [place]
        if (place / SWEEP).is_file():
            return [point.folder for point in Ledger.open(place).points() if (point.folder / CONFIG).is_file()]
        if place.is_dir():
            return runs_in(place)
    there = {each.name: each for each in (runs_in(root) if root.is_dir() else [])}
    if begun := [each for name, each in there.items() if name.startswith(given)]:
        return begun
    near = nearest(given, there)
    raise FolderError(f"{given}: no run of {root}" + (f"; did you mean {near}?" if near else ""))
