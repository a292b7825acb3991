"""Which rank orthogonalises which matrix, and what that costs: arithmetic, without torch and without other ranks.

Every matrix that ranks share has one owner, which gets its shards, works on the whole and sends each rank its shard of
the result. A matrix that one rank holds whole stays there. Owners get about equal flops.
"""

import heapq
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from math import prod
from typing import TYPE_CHECKING, NamedTuple, Protocol

if TYPE_CHECKING:
    import torch
    from torch import Tensor

# Elements of whole matrices that one owner works on between two transfers: 64 MiB in bfloat16, which travel in about
# 0.2 ms over NVLink. Fewer would be many small messages; more are held for longer.
ROUND_ELEMENTS = 2**25
WIRE_BYTES = 2  # matrices travel in bfloat16, in which they are orthogonalised anyhow


class Box(NamedTuple):
    """A rank's shard: indices [start, start + size) of the whole in each dimension."""

    starts: tuple[int, ...]
    sizes: tuple[int, ...]

    @property
    def elements(self) -> int:
        return prod(self.sizes)


class MatrixWork(Protocol):
    """What an update does with each matrix. `place`: of its parameter among those that `Owners.run` was given."""

    def take(self, place: int, index: int | None) -> "tuple[Tensor, Tensor | None]":
        """This rank's shard of what is worked on, bfloat16, and a number of each of its rows, (..., 1) float32, or
        None. `index`: of one matrix of the stack that is here; None: all that is here. Once an update for each.
        """

    def make(self, place: int, whole: "Tensor", rows: "Tensor | None") -> "tuple[Tensor, Tensor | None]":
        """The same of a whole matrix, (rows, columns), after the work."""

    def give(self, place: int, index: int | None, made: "Tensor", rows: "Tensor | None") -> None:
        """The shard of the result: `take` of what `make` returned."""


class Owners(Protocol):
    """Brings shards together for a `MatrixWork`; src/distributed/matrix_owners.py has it for ranks."""

    def zeros_of_rows(self, parameter: "Tensor", dtype: "torch.dtype") -> "Tensor":
        """A zero for each row of a matrix or of a stack of them, sharded as the rows are: (..., rows, 1)."""

    def run(self, parameters: "Sequence[Tensor]", work: MatrixWork, *, with_rows: bool) -> None:
        """Collective. All of `work`, on each whole matrix once. `with_rows`: each row's number travels too."""


def work_alone(places: Sequence[int], work: MatrixWork) -> None:
    """All of `work` on parameters that this rank holds whole, or whole matrices of."""
    for place in places:
        piece, rows = work.take(place, None)
        stack = piece if piece.ndim == 3 else piece[None]
        numbers = rows if rows is None or rows.ndim == 3 else rows[None]
        for index in range(len(stack)):
            made, after = work.make(place, stack[index], None if numbers is None else numbers[index])
            stack[index].copy_(made)
            if numbers is not None and after is not None:
                numbers[index].copy_(after)
        if len(stack):
            work.give(place, None, piece, rows)


def flops(rows: int, columns: int, steps: int) -> int:
    """Of Newton-Schulz: x x^T, the square of that, and its product with x, `steps` times; m is the shorter side."""
    m, n = sorted((rows, columns))
    return steps * (4 * m * m * n + 2 * m * m * m)


@dataclass(frozen=True)
class Unit:
    """One matrix that is orthogonalised as a whole."""

    place: int  # of its parameter
    index: int  # of the matrix in its stack
    rows: int
    columns: int

    @property
    def elements(self) -> int:
        return self.rows * self.columns

    @property
    def work(self) -> int:
        return flops(self.rows, self.columns, 1)


class Ownership:
    """Owners of all matrices, and the rounds in which they travel. Equal on all ranks, which compute it from the same.

    `boxes`: by parameter, the shard of each rank. A parameter is a matrix or a stack of them, (count, rows, columns).
    """

    def __init__(self, shapes: Sequence[Sequence[int]], boxes: Sequence[Sequence[Box]], ranks: int) -> None:
        self.shapes, self.boxes, self.ranks = shapes, boxes, ranks
        units = [
            Unit(place, index, *shape[-2:])
            for place, shape in enumerate(shapes)
            for index in range(shape[0] if len(shape) == 3 else 1)
        ]
        self.held: dict[Unit, list[tuple[int, Box]]] = {unit: [] for unit in units}
        self._hold(units)
        apart = {unit.place for unit in units if len(self.held[unit]) > 1}
        self.stay = [place for place in range(len(shapes)) if place not in apart]
        self.owner: dict[Unit, int] = {}
        self.load = [0] * ranks
        self._deal(units, apart)
        self.rounds = self._rounds([unit for unit in units if unit.place in apart])

    def senders(self, unit: Unit) -> dict[int, Box]:
        """One rank for each shard: of the copies, those that are the owner's."""
        owner, copies = self.owner[unit], self._copies(unit)
        turn = next((held.index(owner) for held in copies.values() if owner in held), owner)
        return {held[turn % len(held)]: box for box, held in copies.items()}

    def _hold(self, units: Sequence[Unit]) -> None:
        by_place: dict[int, list[Unit]] = {}
        for unit in units:
            by_place.setdefault(unit.place, []).append(unit)
        for place, stack in by_place.items():
            for rank, (starts, sizes) in enumerate(self.boxes[place]):
                if prod(sizes):
                    here = slice(starts[0], starts[0] + sizes[0]) if len(sizes) == 3 else slice(None)
                    for unit in stack[here]:
                        self.held[unit].append((rank, Box(starts[-2:], sizes[-2:])))

    def _copies(self, unit: Unit) -> dict[Box, list[int]]:
        copies: dict[Box, list[int]] = {}
        for rank, box in self.held[unit]:
            copies.setdefault(box, []).append(rank)
        return copies

    def _deal(self, units: Sequence[Unit], apart: set[int]) -> None:
        """The largest first, each to the rank that has least so far; a rank that holds all of it is preferred."""
        largest_first = sorted(units, key=lambda unit: -unit.work)
        for unit in (unit for unit in largest_first if unit.place not in apart):
            self._own(unit, self.held[unit][0][0])
        free = []
        for unit in (unit for unit in largest_first if unit.place in apart):
            copies = self._copies(unit)
            if len(copies) > 1:
                free.append(unit)
            else:
                self._own(unit, min((rank for rank, _ in self.held[unit]), key=lambda rank: (self.load[rank], rank)))
        idlest = [(load, rank) for rank, load in enumerate(self.load)]
        heapq.heapify(idlest)
        for unit in free:
            _, rank = idlest[0]
            self._own(unit, rank)
            heapq.heapreplace(idlest, (self.load[rank], rank))

    def _own(self, unit: Unit, rank: int) -> None:
        self.owner[unit] = rank
        self.load[rank] += unit.work

    def _rounds(self, units: Sequence[Unit]) -> list[dict[int, list[Unit]]]:
        """By round, the matrices of each owner, largest first."""
        rounds: list[dict[int, list[Unit]]] = []
        mine: dict[int, tuple[int, int]] = {}  # of each owner its last round, and the elements in it
        for unit in sorted(units, key=lambda unit: -unit.work):
            owner = self.owner[unit]
            number, held = mine.get(owner, (0, 0))
            if held and held + unit.elements > ROUND_ELEMENTS:
                number, held = number + 1, 0
            mine[owner] = (number, held + unit.elements)
            while len(rounds) <= number:
                rounds.append({})
            rounds[number].setdefault(owner, []).append(unit)
        return rounds

    @cached_property
    def sent(self) -> list[int]:
        """Bytes that each rank sends to others in an update, both ways, without the numbers of rows."""
        elements = [0] * self.ranks
        for unit, owner in self.owner.items():
            if unit.place in self.stay:
                continue
            for rank, box in self.senders(unit).items():
                elements[rank] += box.elements if rank != owner else 0
            elements[owner] += sum(box.elements for rank, box in self.held[unit] if rank != owner)
        return [WIRE_BYTES * each for each in elements]


@dataclass(frozen=True)
class UpdateCost:
    """Of one rank in one update, on average over the ranks that share the matrices."""

    flops: float
    bytes: float  # sent; as many arrive


def update_cost(shapes: Sequence[Sequence[int]], steps: int, *, shards: int, copies: int = 1) -> UpdateCost:
    """Of matrices that `shards` * `copies` ranks hold between them, none of them whole: a closed form of `Ownership`.

    An owner gets (shards - 1) / shards of a matrix, and sends each other rank, copies too, its shard of the result.
    """
    ranks = shards * copies
    elements = sum(map(prod, shapes))
    work = sum((prod(shape[:-2]) * flops(shape[-2], shape[-1], steps)) for shape in shapes)
    travels = elements * ((shards - 1) + (ranks - 1)) / shards
    return UpdateCost(work / ranks, WIRE_BYTES * travels / ranks)


def working_bytes(shapes: Mapping[str, Sequence[int]], *, ranks: int, copies: int) -> int:
    """Bytes of an update on its fullest rank beside gradients and state: what travels, and Newton-Schulz itself."""
    if not shapes:
        return 0
    largest = max(shapes.values(), key=lambda shape: shape[-1] * shape[-2])
    m, n = sorted(largest[-2:])
    iteration = 3 * m * n + 2 * m * m  # x, its successor and the whole matrix; its Gram matrix and the polynomial of it
    if ranks == 1:
        return WIRE_BYTES * (iteration + max(map(prod, shapes.values())))
    whole = sum(map(prod, shapes.values()))
    piece = max(m * n, min(ROUND_ELEMENTS, whole // ranks))
    # Of the round ahead what goes and comes; of the one at work what came, and its results on their way; and those of
    # the round before. Results go to each copy.
    return WIRE_BYTES * (iteration + piece * (2 + 1 + 2 * (copies + 1)))
