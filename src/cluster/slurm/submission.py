"""A run before and after it is in SLURM's hands, and what takes it there."""

import shlex
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

from src.metrics.trackers.wandb_address import wandb_address
from src.runs.folder import RunFolder


@dataclass(frozen=True)
class Prepared:
    """A run that only waits for ranks: config, plan, code and data are in its folder."""

    folder: RunFolder
    plan: Mapping[str, Any]


@dataclass(frozen=True)
class Submitted:
    """A run in SLURM's hands; `job` is "123", or "123_4" of an array."""

    job: str
    folder: Path
    log: Path

    def text(self) -> str:
        """What a person wants to know once the terminal is free again."""
        lines = (f"log: {self.log}", f"wandb: {wandb_address(self.folder)}", self.tail, self.cancel)
        return "\n".join((f"job {self.job}: {self.folder}", *lines))

    @property
    def tail(self) -> str:
        return f"tail -F {shlex.quote(str(self.log))}"

    @property
    def cancel(self) -> str:
        return f"scancel {self.job}"


@runtime_checkable
class Submits(Protocol):
    """A cluster that takes many runs at once and does not wait for them."""

    def submit_all(self, points: Sequence[Prepared]) -> list[Submitted]: ...


class SubmitsGroups(Submits, Protocol):
    """What replica groups need beside it."""

    @property
    def pack(self) -> bool: ...
    @property
    def wait(self) -> bool: ...

    def send_small(self, place: Path, name: str, folder: RunFolder, job: Callable[[], None]) -> Any:
        """A job of one process without a GPU; submitit's handle."""
