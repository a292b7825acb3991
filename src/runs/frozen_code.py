"""The code of a run, frozen beside it, and what git says of it."""

import os
import shutil
import subprocess
import sys
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Self

from src.errors import FolderError, some
from src.runs.bytecode import compiled, last_archive
from src.runs.node_copy import ARCHIVE, CACHE, DamagedCodeError, digest, on_node, packed, write_files

REPOSITORY = Path(__file__).resolve().parents[2]
PARTS = ("src", "conf", "launch.py", "requirements.txt", "pyproject.toml")
LIST = "FILES"  # of a snapshot: the names that it was frozen with
# What Python runs when it finds it below PYTHONPATH, by its name (sitecustomize.py) or in place of another module.
RUNNABLE = frozenset({".py", ".pyc", ".pyo", ".pyd", ".so", ".pth", ".zip", ".egg"})
# For processes that import a snapshot: bytecode beside it would be run unread, and nobody could tell whose it is. What
# the freeze has compiled is in the archive, and in the copies that machines make of it.
NO_BYTECODE = {"PYTHONDONTWRITEBYTECODE": "1"}


def importing(snapshot: Path, path: str | None) -> dict[str, str]:
    """Environment of a process on this machine that imports a snapshot before what `path`, the PYTHONPATH so far,
    leads to. FolderError where the snapshot's archive is damaged.
    """
    return {"PYTHONPATH": os.pathsep.join([str(_copied(snapshot)), *filter(None, [path])]), **NO_BYTECODE}


def _copied(snapshot: Path) -> Path:
    """This machine's copy of it; itself, with a warning, where the machine has no place for one."""
    try:
        return on_node(snapshot)
    except DamagedCodeError as error:
        raise FolderError(f"{snapshot / ARCHIVE}: {error}; start the run again") from error
    except OSError as error:
        print(f"warning: {error}: ranks import {snapshot} instead", file=sys.stderr)
        return snapshot


@dataclass(frozen=True)
class Git:
    """`sha` and `branch` are None where there is no git, no repository or no commit; `note` says which."""

    sha: str | None
    branch: str | None
    dirty: bool | None
    diff: str
    note: str

    @classmethod
    def read(cls, root: Path) -> "Git":
        """The state of the work tree whose top is `root`; a repository further up does not count as this code's."""
        top = _git(root, "rev-parse", "--show-toplevel")
        if top is None or Path(top.strip()).resolve() != root.resolve():
            note = "git is not installed" if shutil.which("git") is None else "not a git work tree"
            return cls(None, None, None, "", note)
        sha = _git(root, "rev-parse", "HEAD")
        status = _git(root, "status", "--porcelain") or ""
        branch = (_git(root, "rev-parse", "--abbrev-ref", "HEAD") or "").strip() or None
        if sha is None:
            return cls(None, None, dirty=True, diff="", note="no commit yet")
        diff = _git(root, "diff", "HEAD", "--binary") or ""
        return cls(sha.strip(), branch, bool(status.strip()), diff, "untracked files are in the code snapshot")

    def facts(self) -> dict[str, Any]:
        """What git.json holds: everything but the diff."""
        return {key: value for key, value in asdict(self).items() if key != "diff"}


@dataclass(frozen=True)
class Code:
    """The code of a work tree, read once for all runs that a command opens."""

    contents: Mapping[str, bytes]  # by name, in order
    git: Git

    @classmethod
    def read(cls, root: Path = REPOSITORY) -> Self:
        """As it is now."""
        return cls({name: (root / name).read_bytes() for name in _files(root)}, Git.read(root))

    @cached_property
    def digest(self) -> str:
        """8 hex digits over names and contents."""
        return digest(self.contents)

    @cached_property
    def archive(self) -> bytes:
        """All of it and its bytecode as one file, which machines make their copies of."""
        return last_archive(self.digest, lambda: packed({**self.contents, **compiled(self.contents)}))

    def freeze(self, into: Path) -> str:
        """Copy it to `into/<digest>` unless it is there; returns the digest.

        The caller holds the run's lock. FolderError where somebody has added code to the copy that is there.
        """
        for stale in into.glob("*.partial-*"):  # of launchers that were killed
            shutil.rmtree(stale, ignore_errors=True)
        target = into / self.digest
        refuse_added(target, self.contents, cache=False)
        if _is_exactly(target, {**self.contents, ARCHIVE: self.archive}):
            return self.digest
        partial = into / f"{self.digest}.partial-{os.getpid()}"
        shutil.rmtree(partial, ignore_errors=True)
        write_files(partial, {**self.contents, ARCHIVE: self.archive})
        (partial / LIST).write_text("".join(f"{name}\n" for name in self.contents))
        # Half removed or edited by hand: the same hash must mean the same code.
        shutil.rmtree(target, ignore_errors=True)
        partial.rename(target)
        return self.digest


def verify(snapshot: Path) -> None:
    """FolderError when the frozen code is not what its name says, or when there is more of it."""
    try:
        files = (snapshot / LIST).read_text().splitlines()
        refuse_added(snapshot, files)
        found = fingerprint(snapshot, files)
    except OSError as error:
        raise FolderError(
            f"{snapshot}: the code snapshot of this run is damaged ({error}); start the run again"
        ) from error
    if found != snapshot.name:
        raise FolderError(f"{snapshot}: the frozen code was edited (hash {found}); edit your work tree and start again")


def refuse_added(snapshot: Path, files: Iterable[str], *, cache: bool = True) -> None:
    """FolderError that names what Python would run of a snapshot beside `files`, and links; `cache`: bytecode too."""
    if not os.path.lexists(snapshot):
        return
    known = {snapshot / name for name in files}
    found = [
        each for each in snapshot.rglob("*") if each.is_symlink() or (each.suffix in RUNNABLE and each not in known)
    ]
    if not cache:
        found = [each for each in found if each.is_symlink() or CACHE not in each.parts]
    added = [f"{each.relative_to(snapshot)}{' (a link)' if each.is_symlink() else ''}" for each in found]
    if snapshot.is_symlink():
        added.append(f"{snapshot.name} (a link)")
    if added:
        raise FolderError(
            f"{snapshot}: holds {some(added)}, which is no part of the code that was frozen here and would be run with "
            f"it; find out whose it is, then remove {snapshot} and start again"
        )


def _is_exactly(snapshot: Path, contents: Mapping[str, bytes]) -> bool:
    """Byte by byte, since 8 digits of a hash can be met on purpose; and no bytecode, which would be run unread."""
    if not snapshot.is_dir() or any(snapshot.rglob(CACHE)):
        return False
    return all((snapshot / n).is_file() and (snapshot / n).read_bytes() == each for n, each in contents.items())


def fingerprint(root: Path, files: list[str]) -> str:
    """8 hex digits of the named files below `root`; a missing one changes them."""
    present = {name: (root / name).read_bytes() for name in files if (root / name).is_file()}
    return digest(present)


def _files(root: Path) -> list[str]:
    """The code's files: tracked and untracked but not ignored ones; all but caches where git does not know them."""
    parts = [part for part in PARTS if (root / part).exists()]
    listed = _git(root, "ls-files", "-z", "--cached", "--others", "--exclude-standard", "--", *parts) if parts else None
    if listed:
        names = {name for name in listed.split("\0") if name}
    else:
        below = [path for part in parts for path in [root / part, *(root / part).rglob("*")]]
        names = {str(path.relative_to(root)) for path in below}
    return sorted(n for n in names if (root / n).is_file() and CACHE not in Path(n).parts)


def _git(root: Path, *arguments: str) -> str | None:
    """What git prints, or None where it fails or is absent."""
    try:
        done = subprocess.run(
            ["git", "-C", str(root), *arguments], capture_output=True, text=True, errors="surrogateescape", timeout=60
        )
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout if done.returncode == 0 else None
