"""Fixtures that every room shares."""

import os
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("WANDB_MODE", "offline")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
# A process that imports frozen code must leave it as it is by itself, whatever this shell forbids.
os.environ.pop("PYTHONDONTWRITEBYTECODE", None)
os.environ.pop("PYTHONPYCACHEPREFIX", None)
# What a shell starts with `&` ignores Ctrl-C, and so would every command that a test starts and interrupts.
if signal.getsignal(signal.SIGINT) == signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)

import torch

from tests.ranks import RankPool
from tests.warm.server import serve

os.environ.update(serve())

if TYPE_CHECKING:
    from xdist.remote import Producer
    from xdist.scheduler import LoadScopeScheduling

# Which take longest, so begin first: the others fill the cores beside them.
LONGEST = (
    "slurm",
    "test_tutorials.py",
    "test_readme.py",
    "fault_tolerance",
    "end_to_end",
    "distributed",
    "planning",
    "tasks",
    "checkpoint",
)
TESTS = Path(__file__).parent
SLURM = "tests/slurm/"
SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1, signal.SIGUSR2)


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: "Producer") -> "LoadScopeScheduling":
    """Among processes of tests that run side by side, one takes a whole file, whose tests share fixtures; a machine has
    one SLURM, so one process takes all of that. xdist 3.8 loses the marks of --dist=loadgroup under pytest 9.2.
    """
    from xdist.scheduler import LoadScopeScheduling

    class ByFile(LoadScopeScheduling):
        def _split_scope(self, nodeid: str) -> str:
            file = nodeid.partition("::")[0]
            return SLURM if file.startswith(SLURM) else file

    return ByFile(config, log)


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Tests for CUDA devices are left out, not skipped, where there are none."""
    if config.getoption("dist", "no") != "no" or "PYTEST_XDIST_WORKER" in os.environ:
        rooms = {room: place for place, room in enumerate(LONGEST)}
        items.sort(key=lambda item: rooms.get(item.path.relative_to(TESTS).parts[0], len(rooms)))
    marked = [item for item in items if item.get_closest_marker("gpu") is not None]
    if not marked or torch.cuda.is_available():
        return
    items[:] = [item for item in items if item not in marked]
    config.hook.pytest_deselected(items=marked)


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    if not torch.cuda.is_available():
        terminalreporter.write_line("tests marked gpu were left out: torch sees no CUDA device here")


@pytest.fixture(autouse=True)
def no_handler_stays() -> Iterator[None]:
    """A handler that a test leaves would hear the signals of another test, in whatever process has run both."""
    before = {number: signal.getsignal(number) for number in SIGNALS}
    yield
    left = {number.name for number, handler in before.items() if signal.getsignal(number) != handler}
    for number in before:
        signal.signal(number, before[number] or signal.SIG_DFL)
    assert not left, f"still handled after the test: {sorted(left)}"


@pytest.fixture(scope="session")
def ranks() -> Iterator[RankPool]:
    """`ranks(world, function, *args)`: see tests/ranks.py."""
    pool = RankPool()
    yield pool
    pool.close()
