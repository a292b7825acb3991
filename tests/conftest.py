"""Fixtures that every room shares."""

import os
import signal
from collections.abc import Iterator

import pytest

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("WANDB_MODE", "offline")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
# What a shell starts with `&` ignores Ctrl-C, and so would every command that a test starts and interrupts.
if signal.getsignal(signal.SIGINT) == signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)

import torch

from tests.ranks import RankPool


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Tests for CUDA devices are left out, not skipped, where there are none."""
    marked = [item for item in items if item.get_closest_marker("gpu") is not None]
    if not marked or torch.cuda.is_available():
        return
    items[:] = [item for item in items if item not in marked]
    config.hook.pytest_deselected(items=marked)


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    if not torch.cuda.is_available():
        terminalreporter.write_line("tests marked gpu were left out: torch sees no CUDA device here")


@pytest.fixture(scope="session")
def ranks() -> Iterator[RankPool]:
    """`ranks(world, function, *args)`: see tests/ranks.py."""
    pool = RankPool()
    yield pool
    pool.close()
