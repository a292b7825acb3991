"""The training loop: steps, logging, validation, checkpoints, until done or stopped by a signal.

First start, resume and requeue all enter here.
"""

import gc
import time
from collections.abc import Iterator
from contextlib import closing
from dataclasses import dataclass
from math import isfinite
from pathlib import Path
from typing import Any, Literal, Protocol

from torch import Tensor

from src.checkpoint.config import Checkpoint
from src.checkpoint.folder import complete, step_of
from src.checkpoint.store import Store
from src.data.batches import Batch, Batches
from src.distributed.collectives import any_rank
from src.distributed.compile import compile_seconds
from src.errors import DivergedError
from src.metrics.console import format_startup, format_validation
from src.metrics.expert_load import ExpertLoad
from src.metrics.memory import memory
from src.metrics.startup import Startup
from src.metrics.throughput import Throughput
from src.optim.base import Optimizer
from src.optim.schedule import Schedule, StagedSchedule
from src.optim.state import scale_learning_rates
from src.planning.plan import Plan
from src.train.audit import SampleAudit
from src.train.expert_load import expert_load
from src.train.exports import Exports
from src.train.report import Report, SaveReport
from src.train.resume import go_back
from src.train.setup import STEP_TIMEOUT_SECONDS, Training
from src.train.stability.layer_norms import LayerNorms
from src.train.stability.spikes import MOST_REWINDS
from src.train.stability.stragglers import StragglerWatch
from src.train.step.stepper import Readback, StepOutcome
from src.train.stop import Stop
from src.train.validate import Evaluator, validate


class Cadence(Protocol):
    """How often the loop does what; a task's own fields."""

    @property
    def log_every(self) -> int: ...
    @property
    def validate_every(self) -> int: ...
    @property
    def validate_samples(self) -> int: ...
    @property
    def gc_every(self) -> int: ...
    @property
    def nonfinite(self) -> Literal["raise", "skip_step"]: ...


@dataclass
class Loop:
    """Everything a run's steps need. The tensors live in `training`; all else is small."""

    training: Training
    plan: Plan
    cadence: Cadence
    optim: Optimizer
    schedule: Schedule | StagedSchedule
    batches: Batches
    checkpoint: Checkpoint
    store: Store
    exports: Exports | None
    evaluator: Evaluator | None
    norms: LayerNorms | None
    stragglers: StragglerWatch | None
    throughput: Throughput
    startup: Startup
    report: Report
    stop: Stop
    facts: dict[str, Any]  # of the run, for each checkpoint's marker, beside its tokens and losses
    grace_seconds: float  # between a stop signal and the end of ranks that still save

    def run(self) -> bool:
        """Collective. True when every step is done; false when a signal stopped the run, after saving."""
        state, steps = self.training.state, self.plan.steps
        self._readback, self._stopping, self._saved = Readback(), self._stopped(), state.step
        self._first: int | None = None  # step of this attempt, once it is done
        self._losses: dict[str, tuple[int, float]] = {}  # the newest of each kind, with its step
        self._saves = SaveReport(self.report, self.store, self.grace_seconds)
        self._validated, self._passed_over = 0, False
        self._back_to: Path | None = None  # a checkpoint, before a spike
        if state.spikes is not None:
            state.spikes.skip(self.store.shared(self.report.skipped_samples))
        if self.cadence.gc_every:
            # Each rank's own collections would make the others wait at odd times; all ranks collect at the same steps.
            gc.disable()
            gc.collect(1)
        mesh, self._share = self.training.mesh, range(self.plan.micro_batches)
        self._audit = SampleAudit(
            self.batches,
            rank=mesh.data_rank,
            ranks=mesh.data_ranks,
            micro_batch=self.plan.micro_batch,
            who=self._name(),
        )
        self.throughput.restart()
        if self._owes_validation():
            self._validate(state.step)
        self._evaluate(state.step)  # of an attempt before this one that was stopped in it
        for batches, waited in self._step_batches():
            if self._stopping:
                break
            self._prepare(batches)
            self._advance(self.training.stepper(batches, stop=self._asked()), waited)
        self._process_outcomes(self._readback.flush())
        self._audit.check()
        if self._back_to is None:  # else the weights are not to be kept; the next life skips the spike's samples
            self._save(last=True)
        self.store.finish()
        self._tell_save()
        if self.exports is not None:
            self.exports.finish()
        self._tell_export()
        if state.step == steps != self._validated:
            self._validate(steps)  # a stop had cut it short
        self._evaluate(state.step)
        return state.step == steps and not self._stopping

    def _prepare(self, batches: list[Batch]) -> None:
        """Before a step: set what it depends on."""
        state, steps = self.training.state, self.plan.steps
        if self.norms is not None:
            self.norms.wanted = self._recorded(state.step + 1)
        scale_learning_rates(state.optimizer, self.schedule.multiplier(state.step, steps))
        self.training.network.before_step(*self.schedule.place(state.step, steps))
        if state.spikes is not None:
            self.training.stepper.set_limits(state.spikes.limits(state.step + 1, self._samples(state.step + 1)))
        self._audit.feed(state.step + 1, state.position, batches, share=self._share, summed=self._summed())

    def _step_batches(self) -> Iterator[tuple[list[Batch], float]]:
        """The steps' batches and how long each was waited for, in seconds; after a rewind again from there."""
        state = self.training.state
        while state.step < self.plan.steps:
            with closing(self.batches.prefetch(state.position, self.plan.steps - state.step)) as steps_batches:
                expected = state.step
                while state.step == expected < self.plan.steps:
                    began, expected = time.perf_counter(), expected + 1
                    yield next(steps_batches), time.perf_counter() - began

    def _name(self) -> str:
        """Of this rank, for a person."""
        return f"data rank {self.training.mesh.data_rank}"

    def _summed(self) -> range:
        """The micro-batches that a step's totals are sums over."""
        return range(self.plan.micro_batches)

    def _advance(self, outcome: dict[str, Tensor], waited: float) -> None:
        """After a step: count it, and do what is due."""
        self._count(outcome, waited)
        due = self._due(self.training.state.step)
        if due and self._back_to is None:
            self._process_outcomes(self._readback.flush())
        if self._back_to is not None:
            self._rewind(self._back_to)
        elif due:
            self._audit.check()
            self._end_interval(self.training.state.step)

    def _count(self, outcome: dict[str, Tensor], waited: float) -> None:
        state = self.training.state
        state.step += 1
        state.position += self.plan.sequences_per_step
        if self.cadence.gc_every and state.step % self.cadence.gc_every == 0:
            gc.collect(1)
        outcomes = self._readback.push(state.step, outcome)
        self._first = self._first or state.step
        self.throughput.step(self.plan.tokens_per_step, waited)
        self._process_outcomes(outcomes)

    def _learning_rate(self, step: int) -> float:
        return self.optim.lr * self.schedule.multiplier(step, self.plan.steps)

    def _process_outcomes(self, outcomes: list[StepOutcome]) -> None:
        """Learn what steps did; every rank learns the same at the same step, so all take the same branch."""
        for outcome in outcomes:
            self._last = outcome
            self._losses["loss"] = (outcome.step, outcome.loss)
            self._audit.summed(outcome.step, outcome.checksum)
            self.training.state.tokens += outcome.tokens
            self._stopping = self._stopping or self._may_stop(outcome.stop)
            if outcome.skipped:
                self._not_finite(outcome)
            elif self._stands_out(outcome):
                return  # what came after it is computed again

    def _may_stop(self, asked: bool) -> bool:
        """Whether a stop that is asked for ends the loop now."""
        return asked

    def _not_finite(self, outcome: StepOutcome) -> None:
        samples = self._samples(outcome.step)
        what = f"step {outcome.step}: loss {outcome.loss}, gradient norm {outcome.grad_norm}"
        self.report.incident(outcome, "stop" if outcome.dead else "skip", samples)
        if outcome.dead:
            go_on = self.cadence.nonfinite == "raise"
            advice = "task.nonfinite=skip_step goes on past it" if go_on else "a lower optim.lr may help"
            raise DivergedError(
                f"{what}, over samples {samples.start} to {samples.stop - 1} (incidents.jsonl); the weights were not "
                f"touched{self._kept()}; {advice}"
            )
        self.report.say(f"{what}: not finite, the update is skipped (incidents.jsonl)")

    def _samples(self, step: int) -> range:
        """Of a step near this one, counted from here: an initial checkpoint may have had another global batch."""
        state = self.training.state
        first = state.position + (step - state.step - 1) * self.plan.sequences_per_step
        return range(first, first + self.plan.sequences_per_step)

    def _stands_out(self, outcome: StepOutcome) -> bool:
        """Collective. Act on a spike; whether the run goes back to the checkpoint before it."""
        samples, watch = self._samples(outcome.step), self.training.state.spikes
        if watch is None or (choice := watch.decide(outcome.step, outcome.loss, outcome.grad_norm, samples)) is None:
            return False
        what = f"step {outcome.step}: loss {outcome.loss:.4f}, gradient norm {outcome.grad_norm:.3g}, a spike"
        path = self.store.before(outcome.step) if choice == "rewind" else None
        back_to = None if path is None else step_of(path)
        if choice != "note":
            watch.skip([(samples.start, samples.stop)])
        self.report.incident(outcome, choice, samples, score=watch.score, back_to=back_to)
        if path is not None and not watch.may_rewind(path.name):
            raise DivergedError(f"{what}: {MOST_REWINDS} times back to {path.name} did not help; a lower optim.lr may")
        then = {
            "note": "noted",
            "skip_batch": "its update is skipped",
            "rewind": "there is no checkpoint before it",
        }
        done = then[choice] if back_to is None else f"back to step {back_to}, and past its samples"
        self.report.say(f"{what} of {watch.score:.1f} deviations: {done} (incidents.jsonl)")
        self._back_to = path
        return path is not None

    def _rewind(self, path: Path) -> None:
        """Collective. Take the steps since a checkpoint again; what they took of samples stands as it was checked."""
        self._audit.check()
        go_back(self.training.state, self.store, path)
        self._back_to, self._readback, self._saved = None, Readback(), self.training.state.step
        self.throughput.restart()

    def _kept(self) -> str:
        """For an error: the newest checkpoint, which may be older than the last one that was begun."""
        found = complete(self.store.folder)
        newest = f"the newest checkpoint is of step {step_of(found[-1])}" if found else "there is no checkpoint yet"
        return f" and {newest}"

    def _due(self, step: int) -> bool:
        """Whether anything waits for the device after this step. The first step does: its signal, its compile time."""
        validates = self.cadence.validate_every and step % self.cadence.validate_every == 0
        saves = self.checkpoint.due(step, last=False) or self.checkpoint.exports(step)
        return bool(self._recorded(step) or validates or saves)

    def _recorded(self, step: int) -> bool:
        """Whether its numbers are; of the first step of this attempt too, and beside scores."""
        among = step in (self._first or step, self.plan.steps) or step % self.cadence.log_every == 0
        return among or self._evaluates(step)

    def _end_interval(self, step: int) -> None:
        """Between two steps, with the device idle: tell, validate, save."""
        if step == self._first:
            self.training.ranks.set_timeout(STEP_TIMEOUT_SECONDS, self.training.mesh.groups())
            self.startup.done("first_step", compile=compile_seconds())
            self.report.measure(step, self.startup.metrics())
            self.report.say(format_startup(self.startup.seconds))
        last = step == self.plan.steps
        if self._recorded(step):
            self.report.record(step, self._values(step))
        if self.cadence.validate_every and (last or step % self.cadence.validate_every == 0):
            self._validate(step)
        self._evaluate(step)
        if self.checkpoint.due(step, last=False):
            self._save(last=False)
        if self.checkpoint.exports(step):
            self._export(step)
        self._tell_save()
        self._tell_export()
        self.throughput.restart()

    def _values(self, step: int) -> dict[str, float]:
        """Collective. What is recorded of a step."""
        pace, others = self.throughput.report(), self.stragglers
        return {
            **self._last.metrics,
            "lr": self._learning_rate(step - 1),
            "tokens": float(self.training.state.tokens),
            **pace,
            **({} if others is None else others.values(step, pace["step_seconds"], pace["data_seconds"])),
            **memory(self.training.ranks.device, self.training.stepper.captured_bytes),
            **self._shares(),
            **({} if (watch := self.training.state.spikes) is None else {"spike_score": watch.score}),
            **({} if self.norms is None else self.norms.values()),
            **({} if (load := self._load()) is None else load.values()),
        }

    def _load(self) -> ExpertLoad | None:
        """Collective. Where the last step's tokens went, in a model with experts."""
        return expert_load(self.training.network, self.plan.tokens_per_step)

    def _shares(self) -> dict[str, float]:
        """What each source of a mixture has given so far."""
        sources = self.batches.realised(self.training.state.position)
        if len(sources) == 1:
            return {}
        return {f"data/{name}/{key}": facts[key] for name, facts in sources.items() for key in ("tokens", "share")}

    def _owes_validation(self) -> bool:
        """Collective. Whether an attempt before this one saved after this step and was stopped in its validation."""
        step, every = self.training.state.step, self.cadence.validate_every
        if step == 0 or not every or (step % every and step != self.plan.steps):
            return False
        return any_rank(self.report.lacks("validation_loss", step), self.training.ranks.device)

    def _validate(self, step: int) -> None:
        if self._stopping or not self.cadence.validate_every:
            return
        loss = validate(self.training.network, self.batches, self.cadence.validate_samples, self._stopped)
        if loss is None:
            self._stopping = self._may_stop(asked=True)
            return
        told = {"validation_loss": loss}
        if (average := self.training.state.average) is not None:
            with average.in_place():
                smoothed = validate(self.training.network, self.batches, self.cadence.validate_samples, self._stopped)
            if smoothed is None:
                self._stopping = self._may_stop(asked=True)
                return
            told["validation_loss_ema"] = smoothed
        self._validated = step
        self._losses |= {name: (step, each) for name, each in told.items()}
        self.report.measure(step, {**told, "tokens": float(self.training.state.tokens)})
        self.report.say(format_validation(step, loss))
        if self._first is not None:  # before the first step no token was routed
            self.report.picture(step, self._load())

    def _evaluates(self, step: int) -> bool:
        return self.evaluator is not None and self.evaluator.due(step)

    def _evaluate(self, step: int) -> None:
        if self.evaluator is not None and not self._stopping and not self.evaluator(step, self._stopped):
            self._stopping = self._may_stop(asked=True)

    def _save(self, *, last: bool) -> None:
        state = self.training.state
        if not self.checkpoint.due(state.step, last=last) or state.step == self._saved:
            return
        if not last and self._hangs():
            self.report.say(f"warning: the save before this one is not on the disk yet; step {state.step} is not saved")
            return
        self._saved = state.step
        self._write(last=last)

    def _hangs(self) -> bool:
        """Collective. Whether training goes on without a save that is due, as the one before it hangs in some rank's
        disk. The second time in a row it waits.
        """
        hangs = not self._passed_over and any_rank(self.store.busy(), self.training.ranks.device)
        self._passed_over = hangs
        return hangs

    def _write(self, *, last: bool) -> None:
        state = self.training.state
        state.digest, state.mark = self.batches.digest(state.position), self.batches.mark
        tree = state.tree(self._learning_rate(max(state.step - 1, 0)))
        losses = {name: loss for name, (step, loss) in self._losses.items() if step == state.step and isfinite(loss)}
        self.store.save(state.step, tree, self.facts | {"tokens": state.tokens, **losses}, wait=last)

    def _tell_save(self) -> None:
        if self.evaluator is not None:
            self.evaluator.aside()
        self._saves.tell()

    def _export(self, step: int) -> None:
        if self.exports is None:
            return
        self.exports.finish()
        self._tell_export()
        facts = self.facts | {"loss": self._last.loss, "tokens": self.training.state.tokens}
        self.exports.start(step, self.training.network, facts)

    def _tell_export(self) -> None:
        if self.exports is not None:
            self.exports.tell(self.report)

    def _asked(self) -> bool:
        """Whether this rank wants to end: a signal came, or a save in the background failed and nothing is kept now."""
        return self.stop.seen is not None or self.store.failed

    def _stopped(self) -> bool:
        return any_rank(self._asked(), self.training.ranks.device)
