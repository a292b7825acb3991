"""Asynchronous all_to_all_v (all-to-all with uneven splits) for expert parallelism, differentiable.

`AsyncAllToAll(rows, splits)` launches the exchange, `wait` returns the rows that came. Code between the two overlaps
with it, in both passes: in the backward pass `wait` launches the exchange of gradients and the launch waits for it.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor


@dataclass(frozen=True)
class AllToAllSplits:
    """Split sizes of one all_to_all_v: rows sent to and received from each rank of the process group `group`."""

    group: str
    sends: tuple[int, ...]
    receives: tuple[int, ...]

    @classmethod
    def even(cls, group: str, ranks: int, rows: int) -> "AllToAllSplits":
        """Equal splits: rows // ranks to and from each rank."""
        each = (rows // ranks,) * ranks
        return cls(group, each, each)

    def reversed(self) -> "AllToAllSplits":
        """The splits of the way back, which gradients and expert outputs take."""
        return AllToAllSplits(self.group, self.receives, self.sends)

    def begin(self, rows: Tensor) -> Tensor:
        """Launch: rows (sum of sends, ...) ordered by rank -> (sum of receives, ...), not to be read before `end`."""
        dispatcher = torch.ops._c10d_functional.all_to_all_single
        begun: Tensor = dispatcher(rows.contiguous(), list(self.receives), list(self.sends), self.group)
        return begun

    @staticmethod
    def end(rows: Tensor) -> Tensor:
        """The same rows after the exchange: the device's stream waits for it, the host does not."""
        ended: Tensor = torch.ops._c10d_functional.wait_tensor(rows)
        return ended


class AsyncAllToAll:
    """One all_to_all_v in flight, and in the backward pass the one of its gradient.

    That gradient is kept here and not on the autograd edge between launch and wait, whose shape is the received rows'.
    """

    def __init__(self, rows: Tensor, splits: AllToAllSplits) -> None:
        """Launch the exchange of rows (sum of splits.sends, ...)."""
        self.splits = splits
        self.gradient: Tensor | None = None
        apply: Callable[..., Tensor] = _Launch.apply
        self._rows: Tensor | None = apply(rows, self)

    def wait(self) -> Tensor:
        """The received rows (sum of splits.receives, ...), ordered by rank. Call once."""
        apply: Callable[..., Tensor] = _Land.apply
        rows, self._rows = self._rows, None  # what the backward needs of a flight is not its freight
        return apply(rows, self)


def transposed(rows: Tensor, group: str) -> Tensor:
    """All-to-all of one row for each rank: row r goes to rank r of the group; row r of the result came from there."""
    ones = (1,) * len(rows)
    return AllToAllSplits.end(AllToAllSplits(group, ones, ones).begin(rows))


class SplitSizes:
    """Split sizes on their way from the device to the host, by a non-blocking copy into pinned memory."""

    def __init__(self, going: Tensor, coming: Tensor) -> None:
        """Rows sent and received, both (ranks, experts of one rank)."""
        sums = torch.stack((going.sum(1), coming.sum(1)))
        self._host = sums.to("cpu", non_blocking=True)  # into pinned memory, behind what the device has to do already
        self._there = torch.cuda.Event() if sums.is_cuda else None
        if self._there is not None:
            self._there.record()

    def read(self) -> tuple[tuple[int, ...], tuple[int, ...]]:
        """(sends, receives) by rank. The host waits for the copy, and for no kernel launched since."""
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
