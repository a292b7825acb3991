"""Slices of safetensors files into the shards that a rank holds: no byte is read that is not its own.

A weight's local shard is a box of the whole tensor. Boxes are read in pieces of a bounded size by a few threads, so the
host needs some hundred MB whatever the model.
"""

import os
import threading
from collections.abc import Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor

from src.errors import CheckpointError
from src.hugging_face.archive import Archive, quantisation
from src.hugging_face.check import FLOAT8, SCALE
from src.hugging_face.header import TensorEntry
from src.hugging_face.tensor_slice import TensorSlice, blocks, byte_ranges, runs
from src.models.stored import Stored, rotary_row

PIECE_BYTES = 8 * 2**20  # per thread, counted in float32
THREADS = 8


@dataclass(frozen=True)
class FileSlice:
    """A read for one thread: a slice of the tensor behind `key`, into `out`."""

    key: str
    box: TensorSlice  # native rows
    out: Tensor  # of the box's shape, in the model's memory
    heads: int | None


class Reader:
    """The tensors of an archive; `bytes_read` counts what came from its files."""

    def __init__(self, archive: Archive, *, piece_bytes: int = PIECE_BYTES, threads: int = THREADS) -> None:
        self.archive, self.block = archive, quantisation(archive.config)
        self.piece_bytes, self.threads = piece_bytes, threads
        self.bytes_read = 0
        self.scratch_bytes = 0  # of one thread
        self._files: dict[Path, int] = {}
        self._own = threading.local()

    def fill(self, tensors: Mapping[str, Tensor], table: Iterable[Stored]) -> None:
        """Read this rank's shard of each tensor, in place; `table` names them all. The archive was checked before."""
        places = {each.name: each for each in table}
        pieces = [piece for name, tensor in tensors.items() for piece in self._pieces(places[name], tensor)]
        sizes = (piece.box.elements * self.archive.entries[piece.key].item_bytes for piece in pieces)
        self.scratch_bytes = -(-max(sizes, default=0) // 8) * 8  # for a view of any dtype
        with ExitStack() as stack:
            for path in {entry.file for entry in self.archive.entries.values()}:
                self._files[path] = os.open(path, os.O_RDONLY)
                stack.callback(os.close, self._files[path])
            with ThreadPoolExecutor(self.threads, thread_name_prefix="safetensors") as pool:
                self.bytes_read += sum(pool.map(self._work, pieces))

    def _pieces(self, stored: Stored, tensor: Tensor) -> Iterator[FileSlice]:
        box = TensorSlice.held(tensor)
        local = (tensor.to_local() if isinstance(tensor, DTensor) else tensor).detach()
        if box.elements == 0:
            return
        if stored.optional and not all(key in self.archive.entries for key in stored.keys):
            local.zero_()
        elif stored.stacked:
            for place in range(box.sizes[0]):
                yield from self._cut(FileSlice(stored.keys[box.starts[0] + place], box.inner(), local[place], None))
        else:
            yield from self._cut(FileSlice(stored.keys[0], box, local, stored.heads))

    def _cut(self, piece: FileSlice) -> Iterator[FileSlice]:
        """By rows, so that none needs more than `piece_bytes` of memory."""
        row_bytes = piece.box.elements // piece.box.sizes[0] * max(4, self.archive.entries[piece.key].item_bytes)
        step = max(1, self.piece_bytes // max(row_bytes, 1))
        for first in range(0, piece.box.sizes[0], step):
            count = min(step, piece.box.sizes[0] - first)
            yield replace(piece, box=piece.box.rows(first, count), out=piece.out.narrow(0, first, count))

    def _work(self, piece: FileSlice) -> int:
        """Bytes that were read."""
        entry = self.archive.entries[piece.key]
        if piece.heads is None:
            values, count = self._read(piece.key, entry, piece.box, self._scratch())
        else:
            values, count = self._read_rotary(piece, entry, piece.heads)
        piece.out.copy_(values)
        return count

    def _read_rotary(self, piece: FileSlice, entry: TensorEntry, heads: int) -> tuple[Tensor, int]:
        """Rows in our order: they lie in runs there, two to a head that is not whole here."""
        box, scratch = piece.box, self._scratch()
        there = [rotary_row(box.starts[0] + row, entry.shape[0], heads) for row in range(box.sizes[0])]
        order, parts, count = torch.tensor(there).argsort(), [], 0
        for start, size in runs(sorted(there)):
            values, read = self._read(piece.key, entry, box.at(start, size), scratch)
            scratch = scratch[values.numel() * entry.item_bytes :]
            parts.append(values)
            count += read
        return torch.cat(parts)[order.argsort()], count

    def _read(self, key: str, entry: TensorEntry, box: TensorSlice, scratch: Tensor) -> tuple[Tensor, int]:
        """A box as the file has it, and the bytes that were read; float8 times its scales, in float32."""
        values = self._bytes(entry, box, scratch)
        if entry.dtype != FLOAT8 or self.block is None:
            return values, values.nbytes
        scale = self.archive.entries[f"{key}{SCALE}"]
        rows, columns = (blocks(*each) for each in zip(box.starts, box.sizes, self.block, strict=True))
        few = TensorSlice((rows.first, columns.first), (rows.count, columns.count))
        scales = self._bytes(scale, few, torch.empty(few.elements * scale.item_bytes, dtype=torch.uint8))
        return values.float() * scales.float()[rows.of_each][:, columns.of_each], values.nbytes + scales.nbytes

    def _scratch(self) -> Tensor:
        """This thread's memory: what is made anew for each piece, an allocator keeps for each thread."""
        if not hasattr(self._own, "scratch"):
            self._own.scratch = torch.empty(self.scratch_bytes, dtype=torch.uint8)
        scratch: Tensor = self._own.scratch
        return scratch

    def _bytes(self, entry: TensorEntry, box: TensorSlice, scratch: Tensor) -> Tensor:
        """The box by as few reads as its rows allow: one, if they are whole. The result lives in `scratch`."""
        raw = scratch[: box.elements * entry.item_bytes]
        into, done = memoryview(raw.numpy().data), 0
        for start, size in byte_ranges(entry, box):
            _read_into(self._files[entry.file], entry.file, into[done : done + size], start)
            done += size
        return raw.view(getattr(torch, entry.dtype)).view(box.sizes)


def _read_into(descriptor: int, path: Path, into: memoryview, start: int) -> None:
    """All of it, or CheckpointError: the file shrank since its header was read."""
    done = 0
    while done < len(into):
        count = os.preadv(descriptor, [into[done:]], start + done)
        if count == 0:
            raise CheckpointError(f"{path}: ends at byte {start + done:,}, more expected; it changed while it was read")
        done += count
