"""The lighthouse of a run on this machine: a child process, started again at the same port when it is gone."""

import os
import subprocess
import sys
from collections.abc import Sequence
from types import TracebackType
from typing import Self
from urllib.parse import urlsplit

from src.cluster.backend import Options
from src.cluster.local.signals import tell
from src.errors import PlanError
from src.runs.folder import RunFolder
from src.runs.frozen_code import NO_BYTECODE

ADDRESS_FILE = "lighthouse.url"  # of a run folder, where a scheduler decides on the node


def arguments(options: Options) -> tuple[str, ...]:
    """Of src/fault_tolerance/lighthouse.py."""
    given = {
        "--min-groups": options.min_groups,
        "--join-seconds": options.join_seconds,
        "--heartbeat-seconds": options.heartbeat_seconds,
    }
    return tuple(str(each) for pair in given.items() for each in pair)


def command(given: Sequence[str]) -> list[str]:
    """The lighthouse as a process of its own."""
    return [sys.executable, "-m", "src.fault_tolerance.lighthouse", *given]


class Lighthouse:
    """`address` is a URL; of one that somebody else keeps, nothing is started and nothing is watched."""

    def __init__(self, options: Options, folder: RunFolder) -> None:
        self._options, self._log = options, folder.path / "logs" / "lighthouse.log"
        self._source = folder.path / "code" / folder.code
        self._process: subprocess.Popen[str] | None = None
        self.address = options.lighthouse or ""

    def __enter__(self) -> Self:
        if self._options.lighthouse is None:
            self.address = self._start(0)
            if not self.address:
                why = (self._log.read_text().splitlines() or ["it said nothing"])[-1]
                raise PlanError(f"fault_tolerance.lighthouse=null: none can be started here ({why}): {self._log}")
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._process is not None:
            self._process.kill()
            self._process.wait()

    def watch(self) -> None:
        """Start it again if it is gone; groups wait meanwhile."""
        if self._process is not None and self._process.poll() is not None:
            tell("the lighthouse is gone: groups wait for it at their next step; it starts again")
            self._start(urlsplit(self.address).port or 0)

    def _start(self, port: int) -> str:
        """Its address; empty where it ended at once."""
        with self._log.open("a") as log:
            self._process = subprocess.Popen(
                command(("--port", str(port), *arguments(self._options))),
                cwd=self._source,
                env=os.environ | NO_BYTECODE,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=log,
                text=True,
                start_new_session=True,
            )
        assert self._process.stdout is not None
        return self._process.stdout.readline().strip()
