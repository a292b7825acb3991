"""The code of a run, frozen beside it, and what git says of it."""

import hashlib
import os
import shutil
import subprocess
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from src.errors import FolderError

REPOSITORY = Path(__file__).resolve().parents[2]
PARTS = ("src", "conf", "launch.py", "requirements.txt", "pyproject.toml")


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


def freeze(root: Path, into: Path) -> str:
    """Copy the code below `root` to `into/<hash8>` unless it is there; the hash covers names and contents."""
    files = _files(root)
    contents = {name: (root / name).read_bytes() for name in files}
    digest = _digest(contents)
    target = into / digest
    if target.is_dir() and fingerprint(target, files) == digest:
        return digest
    partial = into / f"{digest}.partial-{os.getpid()}"
    shutil.rmtree(partial, ignore_errors=True)
    for name, content in contents.items():
        (partial / name).parent.mkdir(parents=True, exist_ok=True)
        (partial / name).write_bytes(content)
    (partial / "FILES").write_text("".join(f"{name}\n" for name in files))
    shutil.rmtree(target, ignore_errors=True)  # half removed or edited by hand: the same hash must mean the same code
    partial.rename(target)
    return digest


def verify(snapshot: Path) -> None:
    """FolderError when the frozen code is not what its name says."""
    try:
        files = (snapshot / "FILES").read_text().splitlines()
        digest = fingerprint(snapshot, files)
    except OSError as error:
        raise FolderError(
            f"{snapshot}: the code snapshot of this run is damaged ({error}); start the run again"
        ) from error
    if digest != snapshot.name:
        raise FolderError(
            f"{snapshot}: the frozen code was edited (hash {digest}); edit your work tree and start again"
        )


def fingerprint(root: Path, files: list[str]) -> str:
    """8 hex digits of the named files below `root`; a missing one changes them."""
    present = {name: (root / name).read_bytes() for name in files if (root / name).is_file()}
    return _digest(present)


def _digest(contents: dict[str, bytes]) -> str:
    whole = hashlib.sha256()
    for name in sorted(contents):
        whole.update(f"{name}\0{len(contents[name])}\0".encode())
        whole.update(contents[name])
    return whole.hexdigest()[:8]


def _files(root: Path) -> list[str]:
    """The code's files: tracked and untracked but not ignored ones; all but caches where git does not know them."""
    parts = [part for part in PARTS if (root / part).exists()]
    listed = _git(root, "ls-files", "-z", "--cached", "--others", "--exclude-standard", "--", *parts) if parts else None
    if listed:
        names = {name for name in listed.split("\0") if name}
    else:
        below = [path for part in parts for path in [root / part, *(root / part).rglob("*")]]
        names = {str(path.relative_to(root)) for path in below}
    return sorted(n for n in names if (root / n).is_file() and "__pycache__" not in Path(n).parts)


def _git(root: Path, *arguments: str) -> str | None:
    """What git prints, or None where it fails or is absent."""
    try:
        done = subprocess.run(
            ["git", "-C", str(root), *arguments], capture_output=True, text=True, errors="surrogateescape", timeout=60
        )
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout if done.returncode == 0 else None
