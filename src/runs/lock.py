"""One live writer per run folder."""

import fcntl
import json
import os
import socket
from contextlib import suppress
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from src.errors import FolderError
from src.runs.scheduler import NoScheduler, Scheduler

_OWNED = frozenset({"pid", "host", "since"})  # keys of every record of an owner


class Lock:
    """Held by the launcher for as long as its ranks live; a dead owner's lock is taken over.

    On one machine the kernel decides (flock ends with its process, so nothing goes stale). Between machines that share
    a disk flock cannot be trusted, so an owner recorded on another host counts as alive until it released the lock,
    unless it is the same scheduler job, started again elsewhere, or a job that the scheduler says has ended.
    """

    def __init__(self, path: Path, scheduler: Scheduler | None = None) -> None:
        self.path = path
        self._scheduler = scheduler or NoScheduler()
        self._file: int | None = None

    def take(self) -> None:
        """FolderError, with the owner's pid and host, while another process holds it."""
        assert self._file is None, "taken twice"
        file = os.open(self.path, os.O_RDWR | os.O_CREAT, 0o644)
        try:
            free = _flock(file)
            owner = self.owner()
            if owner and (not free or not self._gone(owner)):
                raise FolderError(self._refusal(owner))
            if not free:
                raise FolderError(f"{self.path.parent}: another process is starting this run at this moment")
            job = self._scheduler.current_job()
            self._write(file, {"pid": os.getpid(), "host": socket.gethostname(), "job": job})
        except BaseException:
            os.close(file)
            raise
        self._file = file

    def release(self) -> None:
        """A second call does nothing. The file stays: removing it would let two processes lock two different files."""
        if self._file is not None:
            with suppress(OSError):  # of a full disk, which leaves the file empty: released, too
                self._write(self._file, None)
            os.close(self._file)
            self._file = None

    def held(self) -> bool:
        """Whether another process holds it, as `take` would find; takes nothing. A lock that this person may only read
        will do.
        """
        try:
            file = os.open(self.path, os.O_RDWR if os.access(self.path, os.W_OK) else os.O_RDONLY)
        except FileNotFoundError:
            return False
        try:
            owner = self.owner()
            return not _flock(file) or (owner is not None and not self._gone(owner))
        finally:
            os.close(file)

    def owner(self) -> dict[str, Any] | None:
        """Process, host, time and job of who holds it; None when released."""
        try:
            owner = json.loads(self.path.read_text() or "null")
        except FileNotFoundError:
            return None
        except ValueError:  # cut off in the middle of a write: its writer is dead, or flock says that it is not
            return None
        return owner if isinstance(owner, dict) and owner.keys() >= _OWNED else None  # or nobody of ours wrote it

    @staticmethod
    def _write(file: int, owner: dict[str, Any] | None) -> None:
        record = None if owner is None else owner | {"since": datetime.now(UTC).isoformat(timespec="seconds")}
        os.ftruncate(file, 0)
        os.pwrite(file, json.dumps(record).encode(), 0)

    def _refusal(self, owner: dict[str, Any]) -> str:
        if (job := owner.get("job")) is not None:
            advice = f"wait for it, or {self._scheduler.cancel_command(self.path.parent, job)}"
            return f"{self.path.parent}: job {job} runs it on {owner['host']} since {owner['since']}; {advice}"
        who = f"process {owner['pid']} on {owner['host']} since {owner['since']}"
        if owner["host"] == socket.gethostname():
            return (
                f"{self.path.parent}: the run is live ({who}); wait for it or stop it with: kill -TERM {owner['pid']}"
            )
        return (
            f"{self.path.parent}: the run is live ({who}); if that machine is gone, remove {self.path} and start again"
        )

    def _gone(self, owner: dict[str, Any]) -> bool:
        job = self._scheduler.current_job()
        if job is not None and owner.get("job") == job:
            return True
        if owner["host"] != socket.gethostname():
            return owner.get("job") is not None and not self._scheduler.is_live(owner["job"])
        if owner["pid"] == os.getpid():
            return True  # a number reused after a reboot or in a new container
        try:
            os.kill(owner["pid"], 0)
        except ProcessLookupError:
            return True
        except PermissionError:
            return False
        return False


def _flock(file: int) -> bool:
    """Whether no other process of this machine holds it; true where the file system knows no locks."""
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError:
        return True  # some network disks; the owner's pid still decides
    return True
