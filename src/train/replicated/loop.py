"""The training loop of one replica group among others: `Loop`, with a quorum before each step and what follows from it.

A step that its groups do not commit is computed again; a group that was behind takes over the state of another; one
group writes metrics and checkpoints for all.
"""

import time
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
from torch import Tensor

from src.checkpoint.folder import step_of
from src.data.batches import Batch
from src.fault_tolerance.replica_groups import ReplicaGroups, StateCallbacks, Taken
from src.train.loop import Loop


@dataclass
class ReplicatedLoop(Loop):
    groups: ReplicaGroups

    def run(self) -> bool:
        self._led = False  # before this step
        callbacks = StateCallbacks(
            give=self._state,
            take=self._adopt,
            tell=self._tell,
            stopped=lambda: self.stop.seen is not None,
            checksum=lambda samples: self.batches.checksum(np.arange(samples.start, samples.stop)),
        )
        self.groups.register(callbacks)
        lost, failures = map(int, self.report.newest("groups/lost_steps", "groups/commit_failures"))
        self.groups.recall(lost, failures)
        return super().run()

    def _step_batches(self) -> Iterator[tuple[list[Batch], float]]:
        return self._quorum_batches()

    def _quorum_batches(self) -> Iterator[tuple[list[Batch], float]]:
        """This group's share of each step's batches; those of a step that was not committed come again."""
        state = self.training.state
        while state.step < self.plan.steps and not self._stopping:
            share = self.groups.start_quorum(state.step, self.plan.micro_batches)
            self.report.lead(self.groups.leads)
            self._stopping = self.groups.gave_up
            if share is not None:
                self._save_for_the_last_leader()
                self._share, began = share, time.perf_counter()
                yield self.batches.step(state.position, share), time.perf_counter() - began
            elif state.step == self.plan.steps and not self._stopping:  # healed at the others' end
                state.tokens += self.groups.conclude()

    def _save_for_the_last_leader(self) -> None:
        """Collective in the group. A leader that dies in a save leaves no checkpoint: who leads next saves what it
        holds.
        """
        before, self._led = self._led, self.groups.leads
        if before or not self.groups.leads or (every := self.checkpoint.interval) is None:
            return
        step, newest = self.training.state.step, self.store.newest()
        due = step // every * every
        if due > (0 if newest is None else step_of(newest) or 0):
            self._audit.check()
            self._saved = step
            self._write(last=False)

    def _name(self) -> str:
        return f"{super()._name()} of group {self.groups.group}"

    def _summed(self) -> range:
        return self.groups.summed(self.plan.micro_batches)

    def _advance(self, outcome: dict[str, Tensor], waited: float) -> None:
        if self.groups.committed:
            super()._advance(outcome, waited)

    def _count(self, outcome: dict[str, Tensor], waited: float) -> None:
        super()._count(outcome, waited)
        # A group that heals takes over what this one has counted; the vote has waited for the device already.
        self._process_outcomes(self._readback.flush())
        self._outer_step()

    def _outer_step(self) -> None:
        state = self.training.state
        if self._stopping and state.step < self.plan.steps:
            return  # the others may have left; what is due is the next life's
        samples = range(state.position - self.plan.sequences_per_step, state.position)
        # It may replace the state.
        others = self.groups.outer_step(state.step, self._last.tokens, Taken(samples, self._last.checksum))
        state.tokens += others
        if state.step == self.plan.steps:
            state.tokens += self.groups.conclude()
        self.report.lead(self.groups.leads)  # the one that led may be gone since: this step is recorded, too
        self._stopping = self._stopping or self.groups.gave_up

    def _asked(self) -> bool:
        return self.stop.seen is not None  # a save that fails is this group's own affair

    def _may_stop(self, asked: bool) -> bool:
        return self.groups.may_stop(asked)

    def _values(self, step: int) -> dict[str, float]:
        return {**super()._values(step), **self.groups.metrics()}

    def _write(self, *, last: bool) -> None:
        if self.groups.saves:
            super()._write(last=last)

    def _export(self, step: int) -> None:
        if self.groups.saves:
            super()._export(step)

    def _state(self) -> dict[str, Any]:
        """What a group that comes back must get; the tensors are the live ones."""
        stepper = self.training.stepper
        streak = {"in_a_row": stepper.in_a_row, "dead": stepper.dead}
        return {"state": self.training.state.tree(0.0), "streak": streak}

    def _adopt(self, tree: dict[str, Any]) -> None:
        self.report.forget()
        self.training.state.adopt(tree["state"])
        for act in self.training.stepper.after_update:  # weights are new
            act()

    def _tell(self, text: str) -> None:
        self.report.tell(f"step {self.training.state.step + 1}: {text}")
