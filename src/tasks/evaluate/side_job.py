"""Evaluation beside training: for each checkpoint that is due a command of its own, whose scores come back to its step.

The command is `launch.py task=evaluate` with a run folder below the run's own, on whichever cluster. So it is queued,
requeued, refused twice and resumed as every run is, and training learns from its evaluation.json alone.
"""

import json
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

from src.checkpoint.folder import complete, step_of
from src.config.tree import read
from src.evaluation.config import Evaluation
from src.run import Run
from src.runs.folder import attempts
from src.runs.frozen_code import REPOSITORY
from src.storage.json_lines import METRICS_FILE, Lines, facts_in
from src.train.report import Report

SIDE_FOLDER = "evaluations"  # of a run folder
EVALUATION_FILE = "evaluation.json"
# What makes a process a rank, or a part of a replica group; a launcher is neither.
RANKS = (
    *("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"),
    *("GROUP_RANK", "TORCHELASTIC_RUN_ID", "TORCHELASTIC_ERROR_FILE", "REPLICA_GROUP_ID", "TORCHFT_LIGHTHOUSE"),
)
POLL_SECONDS = 1.0

Scored = tuple[int, dict[str, float], list[str]]  # step, numbers, lines for people


class Started(Protocol):
    """A command that runs."""

    def poll(self) -> int | None: ...


def words(options: Evaluation, folder: Path, root: Path, step: int) -> list[str]:
    """The command line of the evaluation of one checkpoint of a run."""
    quoted = ",".join(json.dumps(each) for each in options.tasks)
    asked = {
        "samples": options.samples,
        "fewshot": options.fewshot,
        "seeds": options.seeds,
    }
    return [
        "task=evaluate",
        f"run={json.dumps(str(folder))}",
        f"step={step}",
        f"ema={'true' if options.ema else 'false'}",
        f"root={json.dumps(str(root))}",
        f"folder={json.dumps(str(place(folder, step)))}",
        f"cluster={options.cluster}",
        f"evaluate.tasks=[{quoted}]",
        *(f"evaluate.{key}={'null' if value is None else value}" for key, value in asked.items()),
        f"samples={'null' if options.samples is None else options.samples}",
        *options.arguments,
    ]


def place(folder: Path, step: int) -> Path:
    """Run folder of the evaluation of a checkpoint."""
    return folder / SIDE_FOLDER / f"step_{step:08d}"


def start(arguments: Sequence[str], log: Path) -> Started:
    """The launcher of the run's frozen code, as a process of its own that outlives a rank."""
    run = log.parents[1]
    frozen = run / "code" / attempts(run)[-1].code / "launch.py"
    launcher = frozen if frozen.is_file() else REPOSITORY / "launch.py"  # where an outer launcher chose the code
    cleared = [f"--unset={name}" for name in RANKS]
    command = ["env", *cleared, sys.executable, str(launcher), *arguments]
    log.parent.mkdir(parents=True, exist_ok=True)
    shell = ["sh", "-c", 'log=$1; shift; exec "$@" >> "$log" 2>&1', "sh", str(log), *command]
    return subprocess.Popen(shell, stdin=subprocess.DEVNULL, start_new_session=True)


class SideJobs:
    """Of rank 0: starts commands, and finds the scores that nobody has recorded yet."""

    def __init__(
        self,
        options: Evaluation,
        folder: Path,
        root: Path,
        steps: int,
        begin: Callable[[Sequence[str], Path], Started] = start,
    ) -> None:
        self._options, self._folder, self._root, self._steps, self._begin = options, folder, root, steps, begin
        self._running: dict[int, Started] = {}
        self._asked: set[int] = set()  # steps whose command has been started in this life
        self._known: set[int] = set()  # steps whose scores are recorded
        self._failed: set[int] = set()  # steps whose command has ended badly, which was told

    def ask(self) -> list[str]:
        """Start the command of each checkpoint that is due and has no scores; what a person may want to know. One that
        is queued or has ended answers so, and starts nothing twice.
        """
        told = []
        for step in self._due():
            if step in self._asked or self.scores(step) is not None:
                continue
            self._asked.add(step)
            log = place(self._folder, step).with_suffix(".log")
            self._running[step] = self._begin(words(self._options, self._folder, self._root, step), log)
            told.append(f"evaluation of step {step}: started with cluster={self._options.cluster}, log {log}")
        return told

    def failures(self) -> list[str]:
        """Of commands that have ended badly since the last time."""
        told = []
        for step, started in list(self._running.items()):
            if (code := started.poll()) is not None:
                del self._running[step]
                log = place(self._folder, step).with_suffix(".log")
                if code:
                    self._failed.add(step)
                    told.append(f"warning: the evaluation of step {step} ended with code {code}: {log}")
        return told

    def collect(self) -> Iterator[Scored]:
        """Scores that metrics.jsonl has not; what the caller does not record comes again in the next life."""
        found = [step for step in self._there() if step not in self._known]
        if not found:
            return
        recorded = list(Lines(self._folder / METRICS_FILE).read())
        for step in found:
            scores = self.scores(step)
            if scores is None:
                continue
            self._known.add(step)
            if not any(line.get("step") == step and same(line, scores) for line in recorded):
                yield step, scores, _lines(scores)

    def wait(self, seconds: float) -> None:
        """Until every checkpoint that is due has its scores, or its command has ended badly, or for so long."""
        end = time.monotonic() + seconds
        while time.monotonic() < end and any(self.scores(step) is None and self._still(step) for step in self._due()):
            time.sleep(POLL_SECONDS)

    def _still(self, step: int) -> bool:
        """Whether scores may come: also of a command that an earlier life has started, or that is queued by now."""
        started = self._running.get(step)
        return step not in self._failed and (started is None or started.poll() in (None, 0))

    def open_steps(self) -> list[int]:
        """Checkpoints that are due and have no scores yet."""
        return [step for step in self._due() if self.scores(step) is None]

    def scores(self, step: int) -> dict[str, float] | None:
        """What evaluation.json has of the tasks, if it is there."""
        found = facts_in(place(self._folder, step) / EVALUATION_FILE).get("tasks")
        return found if isinstance(found, dict) else None

    def _due(self) -> list[int]:
        steps = (step_of(each) for each in complete(self._folder / "checkpoints"))
        return [step for step in steps if step is not None and self._options.due(step, self._steps)]

    def _there(self) -> list[int]:
        folders = sorted((self._folder / SIDE_FOLDER).glob(f"step_*/{EVALUATION_FILE}"))
        return [step for each in folders if (step := step_of(each.parent)) is not None]


def same(line: Mapping[str, Any], scores: Mapping[str, float]) -> bool:
    """Whether the line holds these very scores: their seconds are like no others."""
    return all(line.get(name) == value for name, value in scores.items() if name.endswith("/seconds"))


def _lines(scores: Mapping[str, float]) -> list[str]:
    plain = {name: value for name, value in scores.items() if not name.endswith(("/seconds", "_stderr", "_spread"))}
    return [
        f"{name.removeprefix('evaluate/').replace('/', ': ')} {value:.3f}"
        + (f" ± {scores[f'{name}_stderr']:.3f}" if f"{name}_stderr" in scores else "")
        for name, value in plain.items()
    ]


class SideEvaluator:
    """What the training loop asks, where commands beside it do the work: see `Evaluator` of src/train/validate.py."""

    def __init__(self, jobs: SideJobs | None, report: Report, wait_seconds: float) -> None:
        """`jobs`: of rank 0; None on all others."""
        self._jobs, self._report, self._wait_seconds = jobs, report, wait_seconds

    def due(self, _step: int) -> bool:
        """Never: nothing happens between two steps."""
        return False

    def __call__(self, _step: int, _stopped: Callable[[], bool]) -> bool:
        return True

    def aside(self) -> None:
        """Start what is due, record what has come."""
        if self._jobs is not None:
            for line in [*self._jobs.ask(), *self._jobs.failures()]:
                self._report.say(line)
            for step, scores, lines in self._jobs.collect():
                self._report.measure(step, scores)
                for line in lines:
                    self._report.say(f"step {step}  {line}")

    def conclude(self) -> None:
        """At the end of the run: wait for the last scores."""
        if self._jobs is None:
            return
        self._jobs.wait(self._wait_seconds)
        self.aside()
        if steps := self._jobs.open_steps():
            self._report.say(
                f"no scores yet of step {', '.join(map(str, steps))}: the same command enters them once they are there"
            )


def enter_late(run: Run, folder: Path) -> list[str]:
    """Record what has come since the run ended, in metrics.jsonl and every tracker; lines for people."""
    found = list(SideJobs(run.evaluate, folder, run.root, run.task.steps).collect())
    if not found:
        return []
    log = run.tracker.open(folder, read(folder / "config.yaml"))
    for step, scores, _ in found:
        log.record(step, scores)
    log.finish("done")
    return [f"step {step}  {line}" for step, _, lines in found for line in lines]
