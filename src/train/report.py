"""Console and log output of rank 0; silent on all other ranks."""

from collections import deque
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path

from src.checkpoint.config import hardly_fits
from src.checkpoint.store import Store
from src.evaluation.recorded import unscored
from src.metrics.console import Console
from src.metrics.expert_load import ExpertLoad
from src.metrics.incidents import skipped_samples, write_incident, write_trouble
from src.metrics.trackers.config import Log, Status
from src.storage.json_lines import METRICS_FILE, Lines
from src.train.step.stepper import StepOutcome

MOST_UNRECORDED = 1000  # lines, beyond any interval between two meetings of groups


class Report:
    """The log and the console of a run; `Report(None, None, ...)` on ranks that only compute."""

    def __init__(
        self, log: Log | None, console: Console | None, folder: Path, open_log: Callable[[], Log] | None = None
    ) -> None:
        """`open_log`: of a rank that may come to speak for other groups too."""
        self._log, self._console, self._folder, self._open_log = log, console, folder, open_log
        self._quiet = False
        self._asides: list[Callable[[], None]] = []
        self._marks: Mapping[str, float] = {}
        self._skips_after = 0
        # Of steps that another group was to record: it may have died before it did.
        self._unrecorded: deque[tuple[int, Mapping[str, float]]] = deque(maxlen=MOST_UNRECORDED)

    def lead(self, wanted: bool) -> None:
        """Speak for the run and keep its log from now on, or leave it to another group."""
        self._quiet = not wanted
        if self._open_log is None or wanted == (self._log is not None):
            return
        if self._log is not None:
            self._log.finish("stopped")
        self._log = self._open_log() if wanted else None
        self._make_good()

    def hear(self, aside: Callable[[], None]) -> None:
        """Call this before each line of numbers: what goes on beside the steps tells of itself there."""
        self._asides.append(aside)

    def enter_stage(self, number: int, samples_since: int) -> None:
        """From now on numbers are of this stage, whose samples are numbered as in all steps after `samples_since`."""
        self._marks, self._skips_after = {"stage": float(number)}, samples_since

    def forget(self) -> None:
        """The steps so far were not this run's: another group's state has taken their place."""
        self._unrecorded.clear()

    def record(self, step: int, values: Mapping[str, float]) -> None:
        """Numbers of a step, to every tracker and to the line that a person watches."""
        for aside in self._asides:
            aside()
        self.measure(step, {**values, **self._marks})
        if self._log is not None and self._console is not None:
            self._console.record(step, values)

    def measure(self, step: int, values: Mapping[str, float]) -> None:
        """Numbers for the trackers alone."""
        if self._log is not None:
            self._log.record(step, values)
        elif self._open_log is not None:
            self._unrecorded.append((step, values))

    def _make_good(self) -> None:
        """Record what this group knows of steps of which the log has not these numbers."""
        if self._log is None or not self._unrecorded:
            return
        first = min(step for step, _ in self._unrecorded)
        lines = (line for line in Lines(self._folder / METRICS_FILE).read() if line.get("step", -1) >= first)
        known = {(line["step"], name) for line in lines for name in line}
        for step, values in self._unrecorded:
            if not any((step, name) in known for name in values):
                self._log.record(step, values)
        self._unrecorded.clear()

    def newest(self, *names: str) -> list[float]:
        """The last that the run's log has of each number, of whichever attempt; 0 where it has none."""
        found = dict.fromkeys(names, 0.0)
        for line in Lines(self._folder / METRICS_FILE).read():
            found |= {name: line[name] for name in names if name in line}
        return [*found.values()]

    def lacks(self, name: str, step: int) -> bool:
        """Whether the run's metrics tell of earlier steps, but not of this number after this one; false on ranks that
        only compute.
        """
        if self._console is None:
            return False
        steps = {record.get("step") for record in Lines(self._folder / METRICS_FILE).read() if name in record}
        begun = any("loss" in record for record in Lines(self._folder / METRICS_FILE).read())
        return begun and step not in steps

    def lacks_scores(self, tasks: Sequence[str], step: int) -> bool:
        """Whether the run's metrics tell of this step, but not how its weights do in these tasks; false on ranks that
        only compute.
        """
        return self._console is not None and bool(unscored(self._folder, tasks, step))

    def picture(self, step: int, load: ExpertLoad | None) -> None:
        """A heat map of experts, where the model has any."""
        if self._log is None or load is None:
            return
        try:
            self._log.image(step, "experts/load", load.draw(self._folder, step))
        except OSError as error:
            self.say(f"warning: the picture of step {step} cannot be drawn: {error}")

    def say(self, text: str) -> None:
        """A line for a person, about the run."""
        if not self._quiet:
            self.tell(text)

    def tell(self, text: str) -> None:
        """A line for a person, about this group."""
        if self._console is not None:
            self._console.say(text)

    def incident(self, outcome: StepOutcome, decision: str, samples: Iterable[int], **more: float | None) -> None:
        """One line of incidents.jsonl: a step that was not finite, or stood out."""
        if self._log is not None:
            write_incident(
                self._folder,
                step=outcome.step,
                decision=decision,
                loss=outcome.loss,
                grad_norm=outcome.grad_norm,
                samples=samples,
                **more,
            )

    def trouble(self, step: int, decision: str, words: str) -> None:
        """One line of incidents.jsonl that is about no step's numbers."""
        if self._log is not None:
            write_trouble(self._folder, step=step, decision=decision, words=words)

    def skipped_samples(self) -> list[tuple[int, int]]:
        """As incidents.jsonl has them, which knows of steps that no checkpoint does; for rank 0."""
        return skipped_samples(self._folder, after=self._skips_after)

    def close(self, status: Status) -> None:
        if self._console is not None:
            self._console.close()
        if self._log is not None:
            self._log.finish(status)


class SaveReport:
    """Says what each save has cost, once it is on the disk, or that a fault of the disk has ended it."""

    def __init__(self, report: Report, store: Store, grace_seconds: float) -> None:
        """`grace_seconds`: between a stop signal and the end of ranks that still save."""
        self._report, self._store, self._grace_seconds = report, store, grace_seconds
        self._told, self._told_of = store.last, store.lost
        self._failures, self._warned = 0, False

    def tell(self) -> None:
        """What is new, at the step that it holds."""
        self._tell_loss()
        saved = self._store.last
        if saved is None or saved is self._told:
            return
        self._told = saved
        costs = {"stall_seconds": saved.stall_seconds, "write_seconds": saved.write_seconds, "bytes": saved.bytes}
        if saved.faults or self._failures:
            costs |= {"failures": self._failures, "faults": saved.faults, "waited_seconds": saved.waited_seconds}
        self._report.measure(saved.step, {f"checkpoint/{key}": float(value) for key, value in costs.items()})
        if not self._warned and (slow := hardly_fits(saved.write_seconds, self._grace_seconds)) is not None:
            self._warned = True
            self._report.say(f"warning: {slow}")

    def _tell_loss(self) -> None:
        lost, before = self._store.lost, self._told_of
        self._told_of = lost
        if lost is not None and lost is not before:
            self._failures += 1
            self._report.say(f"warning: a save failed: {lost}; training goes on, and the next save is the last try")
