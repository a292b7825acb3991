"""A train step of several replica groups: sums over them before the update, and their vote whether it happens."""

from collections.abc import Sequence
from typing import Any

from torch import Tensor

from src.data.batches import Batch
from src.fault_tolerance.replica_groups import ReplicaGroups
from src.train.step import Stepper, all_finite


class ReplicatedStepper(Stepper):
    def __init__(self, *arguments: Any, groups: ReplicaGroups) -> None:
        """`arguments`: of `Stepper`."""
        super().__init__(*arguments)
        self.groups = groups

    def __call__(self, batches: Sequence[Batch], stop: bool) -> dict[str, Tensor]:
        """Collective. As `Stepper`; nothing has changed where `groups.committed` is false afterwards."""
        tokens = self._valid_tokens(batches)
        self.groups.allreduce([tokens])
        loss = self._backward(batches, tokens)
        self.groups.allreduce([*self.gradients.local(), loss, *self._counters()])
        measured = self._measure(batches, loss, stop) | {"tokens": tokens}
        return self._update(measured) if self.groups.should_commit(all_finite(measured)) else self._discard(measured)

    def _discard(self, measured: dict[str, Tensor]) -> dict[str, Tensor]:
        """As if the step had not been."""
        self.optimizer.zero_grad()
        for counter in self._counters():
            counter.zero_()
        return measured | {"skipped": self.dead.new_ones(()), "dead": self.dead}
