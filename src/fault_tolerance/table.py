"""The numbers that groups of a quorum exchange before a step, and the decisions that each derives from them."""

from collections import Counter
from collections.abc import Callable
from dataclasses import astuple, dataclass
from typing import Self

import torch
from torch import Tensor

HISTORY_BITS = 48  # rows travel as float64, which is exact to 2^53


@dataclass(frozen=True)
class Quorum:
    """The groups of one step. Equal on all ranks of all groups but for `rank`."""

    id: int
    rank: int
    size: int
    healed: bool  # this group was behind and has taken over another's state


@dataclass(frozen=True)
class Row:
    """State of one group. Numbers only: the table is an all-reduced sum, in which each group fills its own row."""

    group: int
    led: bool  # it spoke for all at the last step that counted
    leaving: bool  # it was told to stop
    history: int
    lost: int  # its steps that did not count
    failures: int  # its votes that said no, also before a step began
    heal_seconds: float  # of the last time that it was healed
    fresh: bool  # it has counted no step since it was started, and taken over no state
    awaits: bool  # it is fresh, and a group lives that is not in this quorum
    healed: bool = False  # in this quorum: of the steps before it knows what others have told


@dataclass(frozen=True)
class Table:
    """The rows of all groups, by rank in the quorum."""

    rows: tuple[Row, ...] = ()

    @classmethod
    def exchange(cls, own: Row, quorum: Quorum, allreduce: Callable[[list[Tensor]], None]) -> Self:
        """All-reduce the rows over groups. Collective; waits for groups that heal. After a failure the result is not
        to be used.
        """
        cells = torch.zeros(quorum.size, len(astuple(own)), dtype=torch.float64)
        cells[quorum.rank] = torch.tensor([float(value) for value in astuple(own)], dtype=torch.float64)
        if quorum.size > 1:
            allreduce([cells])
        return cls(tuple(_row(values) for values in cells.tolist()))

    @property
    def split(self) -> bool:
        """Whether histories differ: some groups took steps without each other, and met again."""
        return len({row.history for row in self.rows}) > 1

    def astray(self, own: Row) -> bool:
        """Whether this group must take over another's state: the history that most groups have wins, in a tie the
        first.
        """
        pasts = Counter(row.history for row in self.rows)
        return own.history != pasts.most_common(1)[0][0]

    @property
    def premature(self) -> bool:
        """Whether no group here has a state beyond the newest checkpoint, while one that lives elsewhere may have it:
        they would begin without it, and it would have to follow them back.
        """
        return all(row.fresh for row in self.rows) and any(row.awaits for row in self.rows)

    def leader(self) -> int:
        """Number of the group that writes metrics and checkpoints for all: the last leader while it is there, else
        the first group that took the steps itself, which it may have to record for a leader that died.
        """
        order = sorted(self.rows, key=lambda row: (not row.led, row.healed))
        return order[0].group

    def heir(self) -> int | None:
        """Number of the leader once the leaving groups have left; None: all leave."""
        staying = tuple(row for row in self.rows if not row.leaving)
        return Table(staying).leader() if staying else None

    @property
    def all_leave(self) -> bool:
        return all(row.leaving for row in self.rows)


@dataclass(frozen=True)
class Tally:
    """Steps lost and votes that said no, of all lives of all groups: their own counts begin anew with each life, and of
    a group that is away the table has no row. Equal in all groups of a quorum; who heals takes it over.
    """

    lives: tuple[tuple[int, int, int], ...] = ()  # group, and the counts of its newest life as they were last seen
    over: tuple[int, int] = (0, 0)  # the counts of lives that have ended

    def after(self, rows: tuple[Row, ...]) -> "Tally":
        """The tally once these rows have been seen."""
        lives, (lost, failures) = {group: (one, other) for group, one, other in self.lives}, self.over
        for row in rows:
            before = lives.get(row.group, (0, 0))
            if row.lost < before[0] or row.failures < before[1]:  # another life
                lost, failures = lost + before[0], failures + before[1]
            lives[row.group] = (row.lost, row.failures)
        return Tally(tuple((group, *counts) for group, counts in sorted(lives.items())), (lost, failures))

    @property
    def lost(self) -> int:
        return self.over[0] + sum(lost for _, lost, _ in self.lives)

    @property
    def failures(self) -> int:
        return self.over[1] + sum(failures for *_, failures in self.lives)


def _row(values: list[float]) -> Row:
    group, led, leaving, history, lost, failures, heal_seconds, *flags = values
    counts = int(history), int(lost), int(failures)
    return Row(int(group), led > 0, leaving > 0, *counts, heal_seconds, *(flag > 0 for flag in flags))


def share(rank: int, size: int, micro_batches: int) -> range:
    """The micro-batches of the group of this rank: contiguous, the first groups take one more where they do not
    divide evenly.
    """
    each, more = divmod(micro_batches, size)
    first = rank * each + min(rank, more)
    return range(first, first + each + (rank < more))
