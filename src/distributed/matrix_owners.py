"""Brings the shards of each matrix together on the one rank that owns it, and its results back, by all-to-alls.

Layouts cut a matrix along either axis, a stack of them (experts) along any, and may keep copies. All ranks of a stage
hold its matrices between them; `Ownership` says who owns which. While an owner works on one round of matrices the next
one travels to it, and the one before travels back.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.tensor import DTensor, Replicate

from src.optim.elementwise import local
from src.optim.owners import Box, MatrixWork, Ownership, Unit, work_alone

WIRE = torch.bfloat16
Piece = tuple[Tensor, Tensor | None]  # a shard and the numbers of its rows, as `MatrixWork` has them


class MatrixOwners:
    """`Owners` (src/optim/owners.py) of the matrices of a stage."""

    def __init__(self, group: dist.ProcessGroup, device: torch.device) -> None:
        """`group`: all ranks that hold the stage between them; `device`: where they send from."""
        self._group, self._device = group, device
        self.ownership: Ownership | None = None  # from the first update on
        self._rounds: list[_Round] = []

    def zeros_of_rows(self, parameter: Tensor, dtype: torch.dtype) -> Tensor:
        shape = (*parameter.shape[:-1], 1)
        if not isinstance(parameter, DTensor):
            return torch.zeros(shape, dtype=dtype, device=parameter.device)
        held = parameter.to_local()
        last = parameter.ndim - 1  # ranks that cut columns all have the row's number
        return DTensor.from_local(
            torch.zeros((*held.shape[:-1], 1), dtype=dtype, device=held.device),
            parameter.device_mesh,
            [Replicate() if getattr(each, "dim", None) == last else each for each in parameter.placements],
            run_check=False,
            shape=torch.Size(shape),
            stride=torch.empty(shape, device="meta").stride(),
        )

    def run(self, parameters: Sequence[Tensor], work: MatrixWork, *, with_rows: bool) -> None:
        if self.ownership is None:  # the same parameters in every update
            self.ownership = _ownership(parameters, self._group)
            self._rounds = [
                _Round(self.ownership, units, with_rows, self._group, self._device) for units in self.ownership.rounds
            ]
        if self._rounds:
            self._rounds[0].send(work)
        work_alone([place for place in self.ownership.stay if local(parameters[place]).numel()], work)
        for number, each in enumerate(self._rounds):
            if number + 1 < len(self._rounds):
                self._rounds[number + 1].send(work)
            each.work(work)
            if number:
                self._rounds[number - 1].finish(work)
        if self._rounds:
            self._rounds[-1].finish(work)


class _Round:
    """Some matrices of each owner: `send`, `work`, `finish`, each once an update, on all ranks in the same order."""

    def __init__(
        self,
        ownership: Ownership,
        units: dict[int, list[Unit]],
        with_rows: bool,
        group: dist.ProcessGroup,
        device: torch.device,
    ) -> None:
        rank, ranks = dist.get_rank(group), dist.get_world_size(group)
        self._ownership, self._rank, self._device, self._with_rows = ownership, rank, device, with_rows
        self._mine = units.get(rank, [])
        there = [(owner, unit, ownership.senders(unit)) for owner in sorted(units) for unit in units[owner]]
        back = [(owner, unit, dict(ownership.held[unit])) for owner in sorted(units) for unit in units[owner]]
        self._sent: dict[Unit, list[_Part]] = {
            unit: [_Part(unit, sender, box, with_rows) for sender, box in senders.items()]
            for owner, unit, senders in there
            if owner == rank
        }
        outward, inward = _Leg(ranks, group, device), _Leg(ranks, group, device)
        for leg, moves in ((outward, there), (inward, back)):
            for owner, unit, holders in moves:
                for holder, box in holders.items():
                    if rank not in (owner, holder):
                        continue
                    part = _Part(unit, holder, box, with_rows)
                    source, target = (holder, owner) if leg is outward else (owner, holder)
                    leg.add(part, source if target == rank else None, target if source == rank else None)
        # Shards of which the owner gets another copy: their momenta move all the same.
        self._kept = [
            _Part(unit, rank, holders[rank], with_rows)
            for (_, unit, senders), (_, _, holders) in zip(there, back, strict=True)
            if rank in holders and rank not in senders
        ]
        self._outward, self._inward = outward, inward
        self._under_way: _Transfer | None = None

    def send(self, work: MatrixWork) -> None:
        """Start to bring shards to their owners."""
        for part in self._kept:
            work.take(part.unit.place, self._index(part))
        self._under_way = self._outward.start(lambda part: work.take(part.unit.place, self._index(part)))

    def work(self, work: MatrixWork) -> None:
        """Work on the matrices that are this rank's, and start to send results."""
        assert self._under_way is not None, "sent before"
        arrived = dict(self._under_way.wait())
        made: dict[Unit, Piece] = {}
        for unit in self._mine:
            whole = torch.empty(unit.rows, unit.columns, dtype=WIRE, device=self._device)
            numbers = torch.empty(unit.rows, 1, device=self._device) if self._with_rows else None
            for part in self._sent[unit]:
                (top, left), (rows, columns) = part.box
                piece, some = arrived.pop(part)
                whole[top : top + rows, left : left + columns] = piece
                if numbers is not None and some is not None:
                    numbers[top : top + rows] = some
            made[unit] = work.make(unit.place, whole, numbers)
        self._under_way = self._inward.start(lambda part: _cut(*made[part.unit], part.box))

    def finish(self, work: MatrixWork) -> None:
        """Hand out the results of the shards that are here."""
        assert self._under_way is not None, "worked on before"
        for part, (piece, numbers) in self._under_way.wait():
            work.give(part.unit.place, self._index(part), piece, numbers)
        self._under_way = None

    def _index(self, part: "_Part") -> int:
        """Of the matrix in the stack that is here."""
        first = self._ownership.boxes[part.unit.place][self._rank].starts
        return part.unit.index - first[0] if len(first) == 3 else 0


@dataclass(frozen=True)
class _Part:
    """The shard of a matrix that the rank `holder` has."""

    unit: Unit
    holder: int
    box: Box
    with_rows: bool  # a float32 for each row travels behind it, as two bfloat16

    @property
    def length(self) -> int:
        """Elements on the wire."""
        return self.box.elements + (2 * self.box.sizes[0] if self.with_rows else 0)


class _Leg:
    """One all-to-all of parts: which go from here to each rank, and which come from each."""

    def __init__(self, ranks: int, group: dist.ProcessGroup, device: torch.device) -> None:
        self._group, self._device = group, device
        self._going: list[list[_Part]] = [[] for _ in range(ranks)]
        self._coming: list[list[_Part]] = [[] for _ in range(ranks)]

    def add(self, part: _Part, source: int | None, target: int | None) -> None:
        """A part that comes from `source`, goes to `target`, or both where it stays."""
        if source is not None:
            self._coming[source].append(part)
        if target is not None:
            self._going[target].append(part)

    def start(self, piece_of: Callable[[_Part], Piece]) -> "_Transfer":
        """Collective; `piece_of` is asked for what goes, one part after the other."""
        going, coming = ([sum(part.length for part in parts) for parts in leg] for leg in (self._going, self._coming))
        packed = torch.empty(sum(going), dtype=WIRE, device=self._device)
        at = 0
        for part in (part for parts in self._going for part in parts):
            piece, numbers = piece_of(part)
            end = at + part.box.elements
            packed[at:end].view(part.box.sizes).copy_(piece)
            if numbers is not None:
                packed[end : at + part.length].copy_(numbers.contiguous().view(WIRE).flatten())
            at += part.length
        received = torch.empty(sum(coming), dtype=WIRE, device=self._device)
        # as bytes, which every backend sends
        work = dist.all_to_all_single(
            received.view(torch.uint8),
            packed.view(torch.uint8),
            [WIRE.itemsize * count for count in coming],
            [WIRE.itemsize * count for count in going],
            group=self._group,
            async_op=True,
        )
        return _Transfer(work, packed, received, [part for parts in self._coming for part in parts])


@dataclass
class _Transfer:
    """Parts on their way to this rank."""

    request: dist.Work
    packed: Tensor  # kept until it has left
    received: Tensor
    parts: list[_Part]

    def wait(self) -> Iterator[tuple[_Part, Piece]]:
        """Each part, in memory of the transfer; a device waits for it, the host of a GPU does not."""
        self.request.wait()
        at = 0
        for part in self.parts:
            end = at + part.box.elements
            # A copy: numbers of four bytes may lie between those of two.
            numbers = self.received[end : at + part.length].clone().view(torch.float32) if part.with_rows else None
            piece = self.received[at:end].view(part.box.sizes)
            yield part, (piece, None if numbers is None else numbers.view(-1, 1))
            at += part.length


def _cut(made: Tensor, numbers: Tensor | None, box: Box) -> Piece:
    (top, left), (rows, columns) = box
    piece = made[top : top + rows, left : left + columns]
    return piece, None if numbers is None else numbers[top : top + rows]


def _ownership(parameters: Sequence[Tensor], group: dist.ProcessGroup) -> Ownership:
    """Collective, once: each rank says which shards it has, so that no layout needs arithmetic of its own here."""
    ranks = dist.get_world_size(group)
    boxes: list[list[Box]] = [[] for _ in range(ranks)]
    dist.all_gather_object(boxes, [box_of(parameter) for parameter in parameters], group=group)
    by_parameter = [[of_rank[place] for of_rank in boxes] for place in range(len(parameters))]
    return Ownership([tuple(each.shape) for each in parameters], by_parameter, ranks)


def box_of(tensor: Tensor) -> Box:
    """Where the shard of this rank lies in the whole tensor."""
    if not isinstance(tensor, DTensor):
        return Box((0,) * tensor.ndim, tuple(tensor.shape))
    (chunk,) = tensor.__create_chunk_list__()
    return Box(tuple(chunk.offsets), tuple(chunk.sizes))
