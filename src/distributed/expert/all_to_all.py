"""Rows that go from every rank of a group to every other, as many as each pair likes, and their gradients back.

A transfer is launched at one place of the program and landed at another, and what stands between them runs meanwhile:
in the forward pass, and in the backward pass too, where the landing launches the gradient and the launch lands it.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor


@dataclass(frozen=True)
class AllToAllSplits:
    """Numbers of rows, by rank of the group."""

    group: str
    sends: tuple[int, ...]
    receives: tuple[int, ...]

    @classmethod
    def even(cls, group: str, ranks: int, rows: int) -> "AllToAllSplits":
        """As many of `rows` to each rank as to any other."""
        each = (rows // ranks,) * ranks
        return cls(group, each, each)

    def reversed(self) -> "AllToAllSplits":
        """Everything goes home."""
        return AllToAllSplits(self.group, self.receives, self.sends)

    def begin(self, rows: Tensor) -> Tensor:
        """rows (sum of sends, ...), the first rank's first -> (sum of receives, ...), not to be read before `end`."""
        dispatcher = torch.ops._c10d_functional.all_to_all_single
        begun: Tensor = dispatcher(rows.contiguous(), list(self.receives), list(self.sends), self.group)
        return begun

    @staticmethod
    def end(rows: Tensor) -> Tensor:
        """The same rows, which the device may read now; the host does not wait."""
        ended: Tensor = torch.ops._c10d_functional.wait_tensor(rows)
        return ended


class AsyncAllToAll:
    """One tensor under way; later its gradient, which goes home past autograd, since it has another shape by then."""

    def __init__(self, rows: Tensor, splits: AllToAllSplits) -> None:
        """Let rows go."""
        self.splits = splits
        self.gradient: Tensor | None = None
        apply: Callable[..., Tensor] = _Launch.apply
        self._rows: Tensor | None = apply(rows, self)

    def wait(self) -> Tensor:
        """The rows that have come, those of the first rank first."""
        apply: Callable[..., Tensor] = _Land.apply
        rows, self._rows = self._rows, None  # what the backward needs of a flight is not its freight
        return apply(rows, self)


def transposed(rows: Tensor, group: str) -> Tensor:
    """Row r goes to rank r of the group; row r of the result came from there."""
    ones = (1,) * len(rows)
    return AllToAllSplits.end(AllToAllSplits(group, ones, ones).begin(rows))


class SplitSizes:
    """How many rows this rank sends to each and gets from each: on their way from the device to the host."""

    def __init__(self, going: Tensor, coming: Tensor) -> None:
        """Both (ranks, experts of one rank)."""
        sums = torch.stack((going.sum(1), coming.sum(1)))
        self._host = sums.to("cpu", non_blocking=True)  # into pinned memory, behind what the device has to do already
        self._there = torch.cuda.Event() if sums.is_cuda else None
        if self._there is not None:
            self._there.record()

    def read(self) -> tuple[tuple[int, ...], tuple[int, ...]]:
        """Waits until they are there, and for nothing that was given to the device since."""
        if self._there is not None:
            self._there.synchronize()
        going, coming = self._host.tolist()
        return tuple(going), tuple(coming)


class _Launch(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, rows: Tensor, transfer: AsyncAllToAll) -> Tensor:
        ctx.transfer = transfer
        return transfer.splits.begin(rows)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        gradient, ctx.transfer.gradient = ctx.transfer.gradient, None
        return AllToAllSplits.end(gradient), None


class _Land(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, rows: Tensor, transfer: AsyncAllToAll) -> Tensor:
        ctx.transfer = transfer
        return AllToAllSplits.end(rows)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        ctx.transfer.gradient = ctx.transfer.splits.reversed().begin(grads[0])
        return grads[0], None  # stands for it on the edge between the two
