"""Processes that are forked from one that has imported torch and src already: 0.1 s of a core each, not 4 to 10 s.

Python's fork server knows neither the environment nor the terminal of the test that asks it for a process, so `Place`
takes both along.
"""

import multiprocessing
import os
import sys
from dataclasses import dataclass, field
from multiprocessing.connection import Connection
from multiprocessing.context import ForkServerContext


def forkserver() -> ForkServerContext:
    """One for the whole test session; it starts with its first process."""
    os.environ.setdefault("RUST_LOG", "error")  # read once, when torchft is imported
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["tests.warm.preload"])
    return context


def _here(descriptor: int) -> Connection:
    """What can be sent to another process: a copy of an open file."""
    return Connection(os.dup(descriptor))


@dataclass(frozen=True)
class Place:
    """Where the process that makes it lives: environment, folder and output."""

    environment: dict[str, str] = field(default_factory=lambda: dict(os.environ))
    folder: str = field(default_factory=os.getcwd)
    out: Connection = field(default_factory=lambda: _here(1))
    err: Connection = field(default_factory=lambda: _here(2))

    def enter(self) -> None:
        """Live there, from now on."""
        os.environ.clear()
        os.environ.update(self.environment)
        os.chdir(self.folder)
        sys.stdout.flush()
        sys.stderr.flush()
        os.dup2(self.out.fileno(), 1)
        os.dup2(self.err.fileno(), 2)
