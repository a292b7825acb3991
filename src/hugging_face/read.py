"""Slices of safetensors files into the shards that a rank holds: no byte is read that is not its own.

A weight's local shard is a box of the whole tensor. Boxes are read in pieces of a bounded size by a few threads, so the
host needs some hundred MB whatever the model.
"""

import os
from collections.abc import Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass, replace
from itertools import product
from math import prod
from pathlib import Path

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor

from src.errors import CheckpointError
from src.hugging_face.archive import Archive, quantisation
from src.hugging_face.check import FLOAT8, SCALE
from src.hugging_face.header import Entry
from src.models.stored import Stored, rotary_row

PIECE_BYTES = 16 * 2**20  # of a file, per thread
THREADS = 8


@dataclass(frozen=True)
class Box:
    """Part of a tensor: [start, start + size) in each dimension."""

    starts: tuple[int, ...]
    sizes: tuple[int, ...]

    @property
    def elements(self) -> int:
        return prod(self.sizes)

    def rows(self, first: int, count: int) -> "Box":
        """Those of its rows, counted within the box."""
        return Box((self.starts[0] + first, *self.starts[1:]), (count, *self.sizes[1:]))

    def inner(self) -> "Box":
        """Without dimension 0."""
        return Box(self.starts[1:], self.sizes[1:])

    @classmethod
    def held(cls, tensor: Tensor) -> "Box":
        """What this rank holds of a tensor."""
        if not isinstance(tensor, DTensor):
            return cls((0,) * tensor.dim(), tuple(tensor.shape))
        (chunk,) = tensor.__create_chunk_list__()
        return cls(tuple(chunk.offsets), tuple(chunk.sizes))


@dataclass(frozen=True)
class Piece:
    """One thread's next work: a box of what lies behind `key`, into `out`."""

    key: str
    box: Box  # native rows
    out: Tensor  # of the box's shape, in the model's memory
    heads: int | None


class Reader:
    """The tensors of an archive; `bytes_read` counts what came from its files."""

    def __init__(self, archive: Archive, *, piece_bytes: int = PIECE_BYTES, threads: int = THREADS) -> None:
        self.archive, self.block = archive, quantisation(archive.config)
        self.piece_bytes, self.threads = piece_bytes, threads
        self.bytes_read = 0
        self._files: dict[Path, int] = {}

    def fill(self, tensors: Mapping[str, Tensor], table: Iterable[Stored]) -> None:
        """In place, this rank's part of each tensor; `table` names them all. The archive was checked before."""
        places = {each.name: each for each in table}
        pieces = [piece for name, tensor in tensors.items() for piece in self._pieces(places[name], tensor)]
        with ExitStack() as stack:
            for path in {entry.file for entry in self.archive.entries.values()}:
                self._files[path] = os.open(path, os.O_RDONLY)
                stack.callback(os.close, self._files[path])
            with ThreadPoolExecutor(self.threads, thread_name_prefix="safetensors") as pool:
                self.bytes_read += sum(pool.map(self._work, pieces))

    def _pieces(self, stored: Stored, tensor: Tensor) -> Iterator[Piece]:
        box = Box.held(tensor)
        local = (tensor.to_local() if isinstance(tensor, DTensor) else tensor).detach()
        if box.elements == 0:
            return
        if stored.optional and not all(key in self.archive.entries for key in stored.keys):
            local.zero_()
        elif stored.stacked:
            for place in range(box.sizes[0]):
                yield from self._cut(Piece(stored.keys[box.starts[0] + place], box.inner(), local[place], None))
        else:
            yield from self._cut(Piece(stored.keys[0], box, local, stored.heads))

    def _cut(self, piece: Piece) -> Iterator[Piece]:
        """By rows, so that none needs more than `piece_bytes` of memory."""
        row_bytes = piece.box.elements // piece.box.sizes[0] * self.archive.entries[piece.key].item_bytes
        step = max(1, self.piece_bytes // max(row_bytes, 1))
        for first in range(0, piece.box.sizes[0], step):
            count = min(step, piece.box.sizes[0] - first)
            yield replace(piece, box=piece.box.rows(first, count), out=piece.out.narrow(0, first, count))

    def _work(self, piece: Piece) -> int:
        """Bytes that were read."""
        entry = self.archive.entries[piece.key]
        if piece.heads is None:
            values, count = self._read(piece.key, entry, piece.box)
        else:
            values, count = self._read_rotary(piece, entry, piece.heads)
        piece.out.copy_(values)
        return count

    def _read_rotary(self, piece: Piece, entry: Entry, heads: int) -> tuple[Tensor, int]:
        """Rows in our order: they lie in runs there, two to a head that is not whole here."""
        box = piece.box
        there = [rotary_row(box.starts[0] + row, entry.shape[0], heads) for row in range(box.sizes[0])]
        order = torch.tensor(there).argsort()
        runs = [Box((start, *box.starts[1:]), (size, *box.sizes[1:])) for start, size in _runs(sorted(there))]
        parts, counts = zip(*(self._read(piece.key, entry, run) for run in runs), strict=True)
        return torch.cat(parts)[order.argsort()], sum(counts)

    def _read(self, key: str, entry: Entry, box: Box) -> tuple[Tensor, int]:
        """A box as the file has it, and the bytes that were read; float8 times its scales, in float32."""
        values = self._bytes(entry, box)
        if entry.dtype != FLOAT8 or self.block is None:
            return values, values.nbytes
        scale = self.archive.entries[f"{key}{SCALE}"]
        rows, columns = (blocks(*each) for each in zip(box.starts, box.sizes, self.block, strict=True))
        scales = self._bytes(scale, Box((rows.first, columns.first), (rows.count, columns.count)))
        return values.float() * scales.float()[rows.of_each][:, columns.of_each], values.nbytes + scales.nbytes

    def _bytes(self, entry: Entry, box: Box) -> Tensor:
        """The box by as few reads as its rows allow: one, if they are whole."""
        values = torch.empty(box.sizes, dtype=getattr(torch, entry.dtype))
        into, done = memoryview(values.flatten().view(torch.uint8).numpy().data), 0
        for start, size in spans(entry, box):
            _read_into(self._files[entry.file], entry.file, into[done : done + size], start)
            done += size
        return values


@dataclass(frozen=True)
class Blocks:
    """The blocks that [start, start + size) of one dimension meets, and for each element which of them it is in."""

    first: int
    count: int
    of_each: Tensor


def blocks(start: int, size: int, step: int) -> Blocks:
    """By global index: a shard may begin anywhere in a block."""
    numbers = torch.arange(start, start + size) // step
    first = start // step
    return Blocks(first, (start + size - 1) // step + 1 - first, numbers - first)


def spans(entry: Entry, box: Box) -> Iterator[tuple[int, int]]:
    """(start, bytes) in the file of each stretch without a gap, in the order of the box's elements."""
    whole = len(box.sizes)
    while whole > 0 and box.sizes[whole - 1] == entry.shape[whole - 1]:
        whole -= 1  # dimensions from here on are whole
    cut = max(whole - 1, 0)  # the last that is not, if any
    strides = [prod(entry.shape[place + 1 :]) for place in range(len(entry.shape))]
    size = prod(box.sizes[cut:]) * entry.item_bytes
    for outer in product(
        *(range(start, start + count) for start, count in zip(box.starts[:cut], box.sizes[:cut], strict=True))
    ):
        place = sum(index * stride for index, stride in zip((*outer, *box.starts[cut:]), strides, strict=True))
        yield entry.start + place * entry.item_bytes, size


def _runs(rows: list[int]) -> Iterator[tuple[int, int]]:
    """(start, length) of each stretch of neighbours; `rows` ascend."""
    begin = 0
    for place in range(1, len(rows) + 1):
        if place == len(rows) or rows[place] != rows[place - 1] + 1:
            yield rows[begin], place - begin
            begin = place


def _read_into(descriptor: int, path: Path, into: memoryview, start: int) -> None:
    """All of it, or CheckpointError: the file shrank since its header was read."""
    done = 0
    while done < len(into):
        count = os.preadv(descriptor, [into[done:]], start + done)
        if count == 0:
            raise CheckpointError(f"{path}: ends at byte {start + done:,}, more expected; it changed while it was read")
        done += count
