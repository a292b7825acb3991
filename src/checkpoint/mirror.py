"""The second copy of a run's checkpoints, at a URL: `checkpoint.mirror`.

A thread of rank 0 copies complete step folders there while training goes on. It never fails the run, and holds it up at
the end alone; what went wrong is tried again until it works, and told. `bring_back` is the way home.
"""

import shutil
import threading
import time
from collections import deque
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from src.checkpoint import folder as files
from src.checkpoint.config import Checkpoint
from src.checkpoint.folder import Marker
from src.checkpoint.remote import HOME, MIRROR, TOKENIZERS, RemoteCheckpoints, mirror_url, tokenizers_of
from src.errors import CheckpointError, RemoteError, UserError
from src.storage.remote import RemoteFolder, below

if TYPE_CHECKING:
    from src.checkpoint.host_group import HostGroup

FETCHED = "fetched"  # how the name of a step folder ends while it comes back
LONGEST_WAIT_SECONDS = 300.0  # between two tries


@dataclass(frozen=True)
class Copied:
    """One checkpoint that is whole there now."""

    step: int
    bytes: int
    seconds: float  # of the copy
    failures: int  # tries so far in this attempt that did not work


@dataclass(frozen=True)
class Failure:
    """One try that did not work."""

    step: int
    words: str
    failures: int  # with this one, in this attempt
    again_seconds: float  # until the next


class Mirror:
    """Copies what a run saves. `wake` after each save; the rest is a thread's, for which a crash does not wait."""

    def __init__(
        self,
        run: Path,
        options: Checkpoint,
        cache: Path | None = None,
        *,
        tries: int = 5,
        first_wait_seconds: float = 2.0,
    ) -> None:
        """`run`: its folder; `cache`: with its tokenizers. `first_wait_seconds`: after a failure; twice as long after
        each that follows at once.
        """
        assert options.mirror is not None
        self.run, self._options, self._cache, self._first_wait = run, options, cache, first_wait_seconds
        self.url = mirror_url(options.mirror, run)
        self._home = RemoteFolder(self.url, MIRROR)
        self._remote = RemoteCheckpoints(self._home.folder(HOME), tries=tries)
        self._done: dict[int, Marker] = {}
        self._beside: dict[str, tuple[int, int]] = {}  # files of the run folder that are there, as they were
        self._held: Path | None = None
        self._news: deque[Copied | Failure] = deque()
        self._failures = 0
        self._failing_since: float | None = None  # time.monotonic()
        self._changed = threading.Condition()
        self._due, self._idle, self._ended = False, True, False
        self._thread = threading.Thread(target=self._work, name="mirror", daemon=True)
        self._thread.start()

    def wake(self) -> None:
        """There is a new checkpoint."""
        with self._changed:
            self._due, self._idle = True, False
            self._changed.notify_all()

    def holds(self) -> list[Path]:
        """The local checkpoint that is being copied, which must stay."""
        held = self._held
        return [] if held is None else [held]

    def news(self) -> list[Copied | Failure]:
        """What has happened since the last call, oldest first."""
        found = []
        with suppress(IndexError):
            while True:
                found.append(self._news.popleft())
        return found

    def finish(self, seconds: float) -> bool:
        """Wait until every checkpoint is there, at most so long; whether it is so."""
        with self._changed:
            return self._changed.wait_for(lambda: self._idle, seconds)

    @property
    def failing_seconds(self) -> float:
        """How long nothing but failures has come; 0 while it works."""
        since = self._failing_since
        return 0.0 if since is None else time.monotonic() - since

    def close(self) -> None:
        """Begin nothing more."""
        with self._changed:
            self._ended = True
            self._changed.notify_all()

    def _work(self) -> None:
        failed = 0  # at a stretch
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._due or self._ended)
                if self._ended:
                    return
                self._due = False
            failed = failed + 1 if self._copy_all(failed) else 0
            with self._changed:
                if failed:
                    self._changed.wait_for(lambda: self._ended, self._wait_seconds(failed - 1))
                    self._due = True
                elif not self._due:
                    self._idle = True
                    self._changed.notify_all()

    def _copy_all(self, failed: int) -> bool:
        """Copy what is not there yet, the newest first; whether that failed. `failed`: tries before, at a stretch."""
        while (path := self._next()) is not None:
            began, self._held = time.perf_counter(), path
            try:
                marker = files.read_marker(path)
                self._send_beside()
                sent = self._remote.send(path)
                self._done[marker.step], self._failing_since = marker, None
                if sent:
                    self._news.append(Copied(marker.step, sent, time.perf_counter() - began, self._failures))
                options = self._options
                self._remote.prune(options.keep, options.keep_every, options.keep_best)
            except (FileNotFoundError, CheckpointError):
                if path.is_dir() and files.is_complete(path):
                    return self._failed(path, f"{path}: a file of it is missing", failed)
            except Exception as error:  # noqa: BLE001  (a second copy is no reason for the first one to end)
                words = "; ".join(error.problems) if isinstance(error, UserError) else repr(error)
                return self._failed(path, words, failed)
            finally:
                self._held = None
        return False

    def _failed(self, path: Path, words: str, failed: int) -> bool:
        self._failures += 1
        self._failing_since = self._failing_since or time.monotonic()
        self._news.append(Failure(files.step_of(path) or 0, words, self._failures, self._wait_seconds(failed)))
        return True

    def _wait_seconds(self, failed: int) -> float:
        return min(self._first_wait * 2.0 ** min(failed, 16), LONGEST_WAIT_SECONDS)

    def _next(self) -> Path | None:
        """The newest local checkpoint that is not there as it is here, and that no rule would remove there at once."""
        found = files.complete(self.run / HOME)
        kept = files.best(found, self._options.keep_best)
        surplus = files.expendable(found, self._options.keep, self._options.keep_every, protected=kept)
        for path in reversed(found):
            with suppress(CheckpointError, OSError):  # going, or no checkpoint
                if path not in surplus and self._done.get(files.step_of(path) or 0) != files.read_marker(path):
                    return path
        return None

    def _send_beside(self) -> None:
        """What of the run folder somebody needs who reads the checkpoints elsewhere."""
        for path in [self.run / "config.yaml", self.run / "plan.json", *sorted(self.run.glob("data*.json"))]:
            if path.is_file():
                stamp = (path.stat().st_size, path.stat().st_mtime_ns)
                if self._beside.get(path.name) != stamp:
                    self._home.send(path, path.name)
                    self._beside[path.name] = stamp
        for name in tokenizers_of(self.run):
            self._send_tokenizer(name)

    def _send_tokenizer(self, name: str) -> None:
        """One that was trained cannot be made again where the text is not."""
        if self._cache is None or name in self._beside:
            return
        root, place = RemoteFolder(self.url.rpartition("/")[0], MIRROR), "/".join((*TOKENIZERS, name))
        there = root.sizes(place)
        for path in sorted((self._cache / TOKENIZERS[-1] / name).iterdir()):
            if path.is_file() and there.get(path.name) != path.stat().st_size:
                root.send(path, f"{place}/{path.name}")
        self._beside[name] = (0, 0)  # its name says what is in it


def bring_back(run: Path, options: Checkpoint, team: "HostGroup", *, writer: str = "", tries: int = 5) -> str | None:
    """Collective. The newest whole checkpoint of the mirror in the run folder, if it has none as new; each rank fetches
    its share. A line that says what was done, or None where that is nothing.

    CheckpointError where the mirror cannot be read and nothing is here: to begin anew might undo weeks.
    """
    if options.mirror is None:
        return None
    url = mirror_url(options.mirror, run)
    remote = RemoteCheckpoints(RemoteFolder(below(url, HOME), MIRROR), tries=tries)
    marker, line = team.on_rank_zero(lambda: _newer(run / HOME, remote))
    if marker is None:
        return line
    path = files.step_folder(run / HOME, marker.step)
    place = path.with_name(f"{path.name}.{writer}{FETCHED}")
    team.on_rank_zero(lambda: _emptied(place))
    began = time.perf_counter()
    by_size = sorted(marker.files, key=lambda name: (-marker.files[name].bytes, name))
    team.on_all(lambda: remote.fetch(marker, by_size[team.rank :: team.world], place))
    team.on_rank_zero(lambda: _publish(place, path, marker))
    return f"{path.name} is back from {url}: {marker.bytes:,} bytes in {time.perf_counter() - began:.1f} s"


def _newer(checkpoints: Path, remote: RemoteCheckpoints) -> tuple[Marker | None, str | None]:
    """What is to be fetched, and else what is to be told."""
    found = files.complete(checkpoints)
    here = files.step_of(found[-1]) or 0 if found else 0
    try:
        marker = remote.newest(but=files.set_aside(checkpoints))
    except RemoteError as error:
        if not found:
            raise CheckpointError([*error.problems, "nothing is saved here, and the mirror may hold more"]) from None
        return None, f"warning: {'; '.join(error.problems)}: goes on with {found[-1].name}, which is here"
    return (marker, None) if marker is not None and marker.step > here else (None, None)


def _emptied(place: Path) -> None:
    place.parent.mkdir(parents=True, exist_ok=True)
    for left in place.parent.glob(f"step_*{place.suffix}"):  # by a start that was killed
        shutil.rmtree(left)
    place.mkdir()


def _publish(place: Path, path: Path, marker: Marker) -> None:
    files.write_marker(place, marker)
    files.publish(place, path)
