"""Asynchronous export during training: shards are copied to host memory, a thread writes them as Hugging Face files."""

import json
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from src.checkpoint.background import BackgroundTask
from src.checkpoint.host_group import HostGroup
from src.distributed.model_stages import ModelStages
from src.errors import UserError
from src.hugging_face.companions import card
from src.hugging_face.origin import Origin
from src.hugging_face.save import FACTS, UNCOMPARED, Form, has_biases, publish, save
from src.hugging_face.write import Held, held
from src.models.base import ModelConfig
from src.train.report import Report

SHARD_BYTES = 5 * 10**9
# What one rank makes of a whole folder before it is put in its place: lines for people, or CheckpointError.
Check = Callable[[Path, ModelConfig], list[str]]


@dataclass(frozen=True)
class Exported:
    """What the last one cost."""

    step: int
    stall_seconds: float  # training waited: for the one before, and for the copy
    write_seconds: float  # until the folder was in its place
    lines: list[str]  # what its check found, for people


class Exports:
    """Every method is collective. What the disk refuses is told, and training goes on: checkpoints are elsewhere."""

    def __init__(
        self,
        folder: Path,
        model: ModelConfig,
        form: Form,
        beside: Mapping[str, bytes],
        origin: Origin | None,
        check: Check,
    ) -> None:
        """`folder`: exports of the run; `beside`: files of every step, such as config.json and the tokenizer's;
        `origin`: of the weights that it began from.
        """
        self.folder, self.model, self.form, self.beside, self.check = folder, model, form, beside, check
        self.origin = origin
        self.last: Exported | None = None
        self.failed: str | None = None  # why the last one is not there
        self._team = HostGroup()
        self._aside = BackgroundTask("export")

    def start(self, step: int, network: ModelStages, facts: Mapping[str, Any]) -> None:
        """When it returns, the weights may change. `facts`: of this step, for the card."""
        began = time.perf_counter()
        self.finish()
        told = {"optimizer steps": step, **facts}
        text = (json.dumps(told, indent=2) + "\n").encode()
        beside = {**self.beside, "README.md": card(str(facts["run"]), told, self.origin), FACTS: text}
        stages = {name: replace(part, local=_on_host(part)) for name, part in held(network.tensors()).items()}
        if torch.cuda.is_available():
            torch.cuda.current_stream().synchronize()
        stalled = time.perf_counter() - began

        def work() -> None:
            try:
                lines = self._write(step, stages, beside)
                self.last = Exported(step, stalled, time.perf_counter() - began, lines)
            except UserError as error:  # on all ranks alike
                self.failed = f"the export of step {step} failed: {'; '.join(error.problems)}"

        self._aside.start(work)

    def tell(self, report: Report) -> None:
        """What the last export cost and what its check found, once that is known."""
        if (failed := self.failed) is not None:
            self.failed = None
            report.say(f"warning: {failed}; training goes on")
        if (done := self.last) is not None:
            self.last = None
            costs = {"stall_seconds": done.stall_seconds, "write_seconds": done.write_seconds}
            report.measure(done.step, {f"export/{key}": value for key, value in costs.items()})
            report.say(f"exported step {done.step}: {'; '.join(done.lines)}")

    def finish(self) -> None:
        """Wait until nothing is in flight; raises what is no fault of the disk."""
        self._aside.finish()

    def _write(self, step: int, stages: Mapping[str, Held], beside: Mapping[str, bytes]) -> list[str]:
        target, host = self.folder / f"step_{step:08d}", torch.device("cpu")
        # Biases that balance experts are written too where transformers has no place for them: nothing is lost.
        biased = has_biases(self._team, self.model, {name: part.local for name, part in stages.items()})
        form = replace(self.form, biases=biased)
        draft = save(self._team, target, stages, self.model, form, beside, _never, host)
        lines = [UNCOMPARED] if biased else self._team.on_rank_zero(lambda: self.check(draft, self.model))
        self._team.on_rank_zero(lambda: publish(draft, target))
        return lines


def _on_host(part: Held) -> Tensor:
    """A copy that later updates in place cannot reach; pinned, for the full speed of a GPU's bus."""
    copy = torch.empty(part.local.shape, dtype=part.local.dtype, pin_memory=part.local.is_cuda)
    return copy.copy_(part.local, non_blocking=part.local.is_cuda)


def _never(_tensor: Tensor) -> Tensor:
    raise AssertionError("only float8 asks for a maximum over ranks")
