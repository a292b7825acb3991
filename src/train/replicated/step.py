"""A train step of several replica groups: sums over them before the update, and their vote whether it happens."""

from collections.abc import Sequence
from typing import Any

from torch import Tensor

from src.data.batches import Batch
from src.fault_tolerance.replica_groups import ReplicaGroups
from src.train.step.stepper import Stepper, all_finite, named


class ReplicatedStepper(Stepper):
    def __init__(self, *arguments: Any, groups: ReplicaGroups) -> None:
        """`arguments`: of `Stepper`."""
        super().__init__(*arguments)
        self.groups = groups

    def __call__(self, batches: Sequence[Batch], stop: bool) -> dict[str, Tensor]:
        """Collective. As `Stepper`; nothing has changed where `groups.committed` is false afterwards."""
        totals = self._totals(self._mine(batches))
        self.groups.allreduce([totals])
        loss = self._backward(batches, totals[0])
        self.groups.allreduce([*self.gradients.local(), loss, *self._counters()])
        measured = self._measure(batches, loss, totals[0], self._vote(stop)) | named(totals)
        return self._update(measured) if self.groups.should_commit(all_finite(measured)) else self._discard(measured)

    def _discard(self, measured: dict[str, Tensor]) -> dict[str, Tensor]:
        """As if the step had not been."""
        self.optimizer.zero_grad()
        for counter in self._counters():
            counter.zero_()
        return measured | {"skipped": self.dead.new_ones(()), "dead": self.dead}
