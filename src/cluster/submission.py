"""A run before and after it is in a scheduler's hands."""

import shlex
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from src.errors import UserError
from src.metrics.trackers.wandb_address import wandb_address
from src.runs.folder import RunFolder


@dataclass(frozen=True)
class Prepared:
    """A run that only waits for ranks: config, plan, code and data are in its folder."""

    folder: RunFolder
    plan: Mapping[str, Any]


@dataclass(frozen=True)
class Submitted:
    """A run in a scheduler's hands; `job` is its id, such as "123", or "123_4" of an array."""

    job: str
    folder: Path
    log: Path
    cancel: str  # what a person types to end it

    def text(self) -> str:
        """What a person wants to know once the terminal is free again."""
        lines = (f"log: {self.log}", f"wandb: {wandb_address(self.folder)}", self.tail, self.cancel)
        return "\n".join((f"job {self.job}: {self.folder}", *lines))

    @property
    def tail(self) -> str:
        return f"tail -F {shlex.quote(str(self.log))}"


def all_submitted(found: "Sequence[Submitted | UserError]") -> list[Submitted]:
    """Of one run, whose jobs are all or nothing: raises the first error."""
    for each in found:
        if isinstance(each, UserError):
            raise each
    return [each for each in found if isinstance(each, Submitted)]
