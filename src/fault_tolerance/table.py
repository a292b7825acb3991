"""What the groups of a quorum tell each other before a step, and what all of them conclude from it alike."""

from collections import Counter
from collections.abc import Callable
from dataclasses import astuple, dataclass
from typing import Self

import torch
from torch import Tensor

HISTORY_BITS = 48  # rows travel as float64, which is exact to 2^53


@dataclass(frozen=True)
class Quorum:
    """The groups of one step; equal on all ranks of all of them but for `rank`."""

    id: int
    rank: int
    size: int
    healed: bool  # this group was behind and has taken over another's state


@dataclass(frozen=True)
class Row:
    """One group. Numbers only: a table is a sum over groups, each of which fills its own row."""

    group: int
    led: bool  # it spoke for all at the last step that counted
    leaving: bool  # it was told to stop
    history: int
    lost: int  # its steps that did not count
    failures: int  # its votes that said no, also before a step began
    heal_seconds: float  # of the last time that it was healed


@dataclass(frozen=True)
class Table:
    """By rank in the quorum."""

    rows: tuple[Row, ...] = ()

    @classmethod
    def exchange(cls, own: Row, quorum: Quorum, allreduce: Callable[[list[Tensor]], None]) -> Self:
        """Collective over groups; it waits for those that are being healed. After a failure nobody reads it."""
        cells = torch.zeros(quorum.size, len(astuple(own)), dtype=torch.float64)
        cells[quorum.rank] = torch.tensor([float(value) for value in astuple(own)], dtype=torch.float64)
        if quorum.size > 1:
            allreduce([cells])
        return cls(tuple(_row(values) for values in cells.tolist()))

    @property
    def split(self) -> bool:
        """Whether groups have different pasts: two of them went on without each other, and met again."""
        return len({row.history for row in self.rows}) > 1

    def astray(self, own: Row) -> bool:
        """Whether this group must take over another's state. The past of most groups stands, else of the first."""
        pasts = Counter(row.history for row in self.rows)
        return own.history != pasts.most_common(1)[0][0]

    def leader(self) -> int:
        """The group that speaks for all: the one that did so far, if it is there."""
        return next((row.group for row in self.rows if row.led), self.rows[0].group)

    def heir(self) -> int | None:
        """The group that speaks once those that leave have left; None: there is none."""
        staying = tuple(row for row in self.rows if not row.leaving)
        return Table(staying).leader() if staying else None

    @property
    def all_leave(self) -> bool:
        return all(row.leaving for row in self.rows)


def _row(values: list[float]) -> Row:
    group, led, leaving, history, lost, failures, heal_seconds = values
    return Row(int(group), led > 0, leaving > 0, int(history), int(lost), int(failures), heal_seconds)


def share(rank: int, size: int, micro_batches: int) -> range:
    """Neighbouring micro-batches for each of `size` groups; the first ones take one more where they do not divide."""
    each, more = divmod(micro_batches, size)
    first = rank * each + min(rank, more)
    return range(first, first + each + (rank < more))
