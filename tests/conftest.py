"""Fixtures that every room shares."""

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from xdist.scheduler import LoadScopeScheduling

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("WANDB_MODE", "offline")
os.environ.setdefault("HF_HUB_OFFLINE", "1")

import torch

from tests.ranks import Ranks


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Those on SLURM first: they mostly wait, so other processes have the cores meanwhile.

    Tests for CUDA devices are left out, not skipped, where there are none.
    """
    items.sort(key=lambda item: item.path.parent.name != "slurm")
    marked = [item for item in items if item.get_closest_marker("gpu") is not None]
    if not marked or torch.cuda.is_available():
        return
    items[:] = [item for item in items if item not in marked]
    config.hook.pytest_deselected(items=marked)


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    if not torch.cuda.is_available():
        terminalreporter.write_line("tests marked gpu were left out: torch sees no CUDA device here")


class ByFile(LoadScopeScheduling):
    """The tests of a file share a process of pytest-xdist, and so do all of tests/slurm, which have one cluster."""

    def _split_scope(self, nodeid: str) -> str:
        file = nodeid.partition("::")[0]
        return "slurm" if Path(file).parent.name == "slurm" else file


def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> ByFile:
    return ByFile(config, log)


@pytest.fixture(scope="session")
def ranks() -> Iterator[Ranks]:
    """`ranks(world, function, *args)`: see tests/ranks.py."""
    pool = Ranks()
    yield pool
    pool.close()
