"""A run's folder: made once, found again, refused to another run.

config.yaml plan.json git.json git.diff version   of the newest attempt
code/<hash8>/             the code that attempts ran, one folder per content
logs/attempt_<n>/         config.yaml of that attempt, rank_<r>.log
checkpoints/  attempts.jsonl  lock
"""

import json
import re
import socket
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path
from types import TracebackType
from typing import Any, Literal, Self

from src.config import tree as trees
from src.errors import ConfigError, FolderError
from src.runs.frozen_code import REPOSITORY, Code, Git
from src.runs.lock import Lock
from src.runs.records import ATTEMPTS_FILE, PLAN_FILE, starts
from src.runs.scheduler import NoScheduler, Scheduler
from src.runs.twins import earlier
from src.storage.atomic_write import TEMPORARY, atomic_write
from src.storage.json_lines import Lines
from src.storage.space import room
from src.version import VERSION

Ended = Literal["finished", "stopped", "failed", "killed"]

# What may differ between two attempts of one run although it decides numbers, in their last bits or who computes them.
# Another value of one of these is another run, unless folder= names this one. Keys of trees.STEERING are no part of a
# run's identity, and those of trees.SITE are no difference at all.
OPERATIONAL: Mapping[str, str] = {
    "name": "a label: the folder is already chosen",
    "parallel": "checkpoints are mesh-free and the samples of a step do not depend on the layout",
    "compile": "the same mathematics, other kernels",
    "recompute": "the same mathematics, activations computed twice",
    "checkpoint": "when and how state is kept, not what it is",
    "task.micro_batch": "the loss is normalised over the global batch",
    "task.deterministic": "the same mathematics, other kernels",
    "fault_tolerance.groups": "the samples of a step do not depend on how many groups share them",
    "fault_tolerance.min_groups": "who is waited for, not what is computed",
    "fault_tolerance.process_group": "the same sums, over another network",
}


HALF_WRITTEN = (TEMPORARY, ".partial")  # .partial: of older versions


@dataclass(frozen=True)
class Attempt:
    """One start of the run, as attempts.jsonl has it."""

    number: int
    started: str
    host: str
    world: int
    code: str  # hash8 of the snapshot
    sha: str | None  # git
    job: str | None  # the scheduler's id
    changed: tuple[str, ...] = ()  # operational and steering differences to the attempt before
    version: str | None = None  # of this project; None: 0.1
    ended: Ended | None = None  # None: lives, or vanished without a word (kill -9, power)
    detail: str = ""


class RunFolder:
    """An open run folder: this process holds its lock until `close`."""

    def __init__(
        self, path: Path, lock: Lock, code: str, git: Git, changed: tuple[str, ...], scheduler: Scheduler
    ) -> None:
        self.path = path
        self.code = code
        self.git = git
        self.changed = changed
        self._lock = lock
        self._scheduler = scheduler

    @classmethod
    def open(
        cls,
        tree: trees.Tree,
        plan: Mapping[str, Any],
        *,
        root: Path,
        name: str,
        identity: str,
        folder: Path | None = None,
        repository: Path = REPOSITORY,
        code: Code | None = None,
        scheduler: Scheduler | None = None,
        ask: Callable[[Path], None] = lambda _: None,
    ) -> Self:
        """Create, resume or refuse `folder`, or else `<root>/<name>-<identity>`.

        `ask` may raise: it is called before anything is written. What is refused leaves the folder as it was, or none.
        `code`: of the repository, where it has been read already.

        FolderError when it is live in another process, holds another run, or cannot be written.
        """
        path = place(root, name, identity, folder)
        with room(path):  # a disk without room is called that, not one that cannot be written
            new = _make(path)
            scheduler = scheduler or NoScheduler()
            lock = Lock(path / "lock", scheduler)
            try:
                lock.take()
            except OSError as error:
                where = lock.path if lock.path.exists() else path
                raise FolderError(f"{where}: cannot be written ({error.strerror}); pass another root=...") from error
            try:
                try:
                    changed = _compare(path, tree)
                    ask(path)
                except BaseException:
                    _unmake(path, new)
                    raise
                for part in ("logs", "checkpoints", "code"):
                    (path / part).mkdir(exist_ok=True)
                code = code or Code.read(repository)
                code.freeze(path / "code")
                atomic_write(path / "git.json", json.dumps(code.git.facts(), indent=2) + "\n")
                atomic_write(path / "git.diff", code.git.diff)
                atomic_write(path / "version", f"{VERSION}\n")
                atomic_write(path / PLAN_FILE, json.dumps(plan, indent=2) + "\n")
                trees.write(path / "config.yaml", tree)  # last: its presence says that all is there
            except OSError as error:
                lock.release()
                raise FolderError(f"{error.filename or path}: cannot be written ({error.strerror})") from error
            except BaseException:
                lock.release()
                raise
        return cls(path, lock, code.digest, code.git, changed, scheduler)

    @classmethod
    def rejoin(cls, path: Path, code: str, scheduler: Scheduler | None = None) -> Self:
        """A folder that `open` has made ready, now held by the process that runs it; FolderError while another does."""
        scheduler = scheduler or NoScheduler()
        lock = Lock(path / "lock", scheduler)
        lock.take()
        git = json.loads((path / "git.json").read_text())
        return cls(path, lock, code, Git(**git, diff=""), (), scheduler)

    def group(self, number: int) -> Path:
        """Make and return the folder of replica group `number`: lock, logs and attempts are its own, all else is the
        run's.
        """
        path = group_folder(self.path, number)
        path.mkdir(parents=True, exist_ok=True)
        for shared in ("config.yaml", PLAN_FILE, "git.json", "code", "checkpoints"):
            if not (path / shared).is_symlink():
                (path / shared).symlink_to(Path("..", "..", shared))
        return path

    def begin(self, world: int) -> Attempt:
        """Record the start of an attempt and make the folder of its logs."""
        earlier = attempts(self.path)
        attempt = Attempt(
            number=earlier[-1].number + 1 if earlier else 1,
            started=datetime.now(UTC).isoformat(timespec="seconds"),
            host=socket.gethostname(),
            world=world,
            code=self.code,
            sha=self.git.sha,
            job=self._scheduler.current_job(),
            changed=self.changed,
            version=VERSION,
        )
        logs = log_folder(self.path, attempt.number)
        logs.mkdir(parents=True, exist_ok=True)
        atomic_write(logs / "config.yaml", (self.path / "config.yaml").read_bytes())
        record = {key: value for key, value in asdict(attempt).items() if key not in ("ended", "detail")}
        Lines(self.path / ATTEMPTS_FILE).append(record)
        return attempt

    @property
    def finished(self) -> bool:
        """Whether an attempt ran to the end of the task."""
        return any(attempt.ended == "finished" for attempt in attempts(self.path))

    @property
    def resumed(self) -> bool:
        """Whether an earlier attempt exists."""
        return bool(attempts(self.path))

    @property
    def version_before(self) -> str:
        """Version of the project that the newest attempt so far ran."""
        return attempts(self.path)[-1].version or "0.1"

    def close(self) -> None:
        """Release the lock, so that another process can open the folder. A second call does nothing."""
        self._lock.release()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def place(root: Path, name: str, identity: str, folder: Path | None = None) -> Path:
    """`folder`, or the run of that name and identity in `root`, which an older version may have given another hash.

    Absolute, since ranks and later jobs may start elsewhere.
    """
    if folder is not None:
        return folder.expanduser().absolute()
    path = (root / f"{name}-{identity}").expanduser().absolute()
    return path if (path / "config.yaml").exists() else earlier(path.parent, name, identity) or path


def group_folder(path: Path, number: int) -> Path:
    """The folder of replica group `number` of the run in `path`."""
    return path / "groups" / str(number)


def log_folder(path: Path, attempt: int) -> Path:
    """The folder with the logs of one attempt."""
    return path / "logs" / f"attempt_{attempt}"


def attempts(path: Path) -> list[Attempt]:
    """Every start of the run, oldest first; a line cut off by a crash is passed over."""
    found: list[Attempt] = []
    for record in starts(path):
        with suppress(TypeError, KeyError):  # a line that no version of this project wrote
            found.append(Attempt(**record | {"changed": tuple(record["changed"])}))
    return found


def end(path: Path, ended: Ended, detail: str = "", *, overrule: bool = False) -> None:
    """Record the outcome of the newest attempt. The first record stands, unless `overrule`: from a launcher that saw
    all ranks end.
    """
    newest = attempts(path)[-1]
    if newest.ended is None or overrule:
        when = datetime.now(UTC).isoformat(timespec="seconds")
        record = {"number": newest.number, "ended": ended, "detail": f"{when} {detail}".strip()}
        Lines(path / ATTEMPTS_FILE).append(record)


def reopen(path: Path, why: str) -> None:
    """The run is no longer finished: every attempt that ran to the end of the task has merely stopped, when it did."""
    for folder in [path, *sorted(path.glob("groups/*"))]:
        for attempt in attempts(folder):
            if attempt.ended == "finished":
                when = attempt.detail.partition(" ")[0]
                record = {"number": attempt.number, "ended": "stopped", "detail": f"{when} {why}".strip()}
                Lines(folder / ATTEMPTS_FILE).append(record)


def _make(path: Path) -> list[Path]:
    """The folders that were not there before, innermost first."""
    new = [each for each in (path, *path.parents) if not each.exists()]
    try:
        path.mkdir(parents=True, exist_ok=True)
    except (FileExistsError, NotADirectoryError) as error:
        blocked = next(p for p in (path, *path.parents) if p.exists())
        raise FolderError(f"{blocked}: a file is where a folder belongs; move it, or pass another root=...") from error
    except OSError as error:
        raise FolderError(f"{path}: cannot be made ({error.strerror}); pass a root=... that you may write") from error
    return new


def _unmake(path: Path, new: list[Path]) -> None:
    """Leave nothing of a run that was refused before it began; the lock is ours, and the folder holds nothing else."""
    if path in new:
        (path / "lock").unlink(missing_ok=True)
        with suppress(OSError):
            for each in new:
                each.rmdir()


def _compare(path: Path, tree: trees.Tree) -> tuple[str, ...]:
    """The operational differences to the config that is there; FolderError for any other."""
    config = path / "config.yaml"
    if not config.exists():
        ours = {"lock", "logs", "checkpoints", "code", "git.json", "git.diff", "version", PLAN_FILE}
        strange = sorted(p.name for p in path.iterdir() if p.name not in ours and not p.name.endswith(HALF_WRITTEN))
        if strange:
            raise FolderError(
                f"{path}: no run folder, but not empty either ({', '.join(strange[:5])}); choose another folder"
            )
        return ()
    before = _whole(path, config)
    changed = trees.difference(before, tree, steering=True)
    if refused := [line for line in changed if not may_change(line.partition(":")[0])]:
        advice = (
            f"leave folder= out, or name another folder; python -m src.runs extend {path} steps=... adds steps, "
            f"from={path} begins a new run with its weights; of a run only these may change: "
        )
        heading = (
            f"{path}: holds another run; {advice}{', '.join(sorted({*OPERATIONAL, *trees.STEERING, *trees.SITE}))}"
        )
        raise FolderError([heading, *refused])
    return tuple(changed)


def _whole(path: Path, config: Path) -> trees.Tree:
    """The recorded config. FolderError where it cannot be read or is the mere beginning of what it was: every attempt
    keeps a copy.
    """
    kept = sorted(path.glob("logs/attempt_*/config.yaml"), key=lambda copy: int(copy.parent.name.rpartition("_")[2]))
    cause: ConfigError | None = None
    fault = "unreadable"
    try:
        tree = trees.read(config)
    except ConfigError as error:
        cause = error
    else:
        content, copy = config.read_bytes(), kept[-1].read_bytes() if kept else b""
        if content == copy or not copy.startswith(content):
            return tree
        fault = "cut short"
    way_out = f"`cp {kept[-1]} {config}` and run the same command again" if kept else "restore or move it"
    raise FolderError(f"{config}: {fault}, so this run cannot be told from another; {way_out}") from cause


def may_change(key: str) -> bool:
    """Whether a run stays the same run with another value of this dotted key."""
    key = re.sub(r"^task\.stages\.\d+\.", "", key)  # what a stage changes is judged as it is elsewhere
    return trees.steers(key) or any(key == each or key.startswith(f"{each}.") for each in OPERATIONAL)
