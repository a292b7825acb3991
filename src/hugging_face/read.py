"""Slices of safetensors files into the shards that a rank holds: no byte is read that is not its own.

A weight's local shard is a box of the whole tensor, which the safetensors package maps into memory and cuts out. Boxes
are copied in pieces of a bounded size by a few threads, so the host needs some hundred MB whatever the model.
"""

from collections.abc import Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor

from src.hugging_face.archive import Archive, quantisation
from src.hugging_face.check import SCALE
from src.hugging_face.header import opened
from src.hugging_face.tensor_slice import TensorSlice, blocks, runs
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
    """The tensors of an archive; `bytes_read` counts what of its files was asked for."""

    def __init__(self, archive: Archive, *, piece_bytes: int = PIECE_BYTES, threads: int = THREADS) -> None:
        self.archive, self.block = archive, quantisation(archive.config)
        self.piece_bytes, self.threads = piece_bytes, threads
        self.bytes_read = 0
        self._files: dict[Path, Any] = {}

    def fill(self, tensors: Mapping[str, Tensor], table: Iterable[Stored]) -> None:
        """Read this rank's shard of each tensor, in place; `table` names them all. The archive was checked before."""
        places = {each.name: each for each in table}
        pieces = [piece for name, tensor in tensors.items() for piece in self._pieces(places[name], tensor)]
        with ExitStack() as stack:
            for path in {entry.file for entry in self.archive.entries.values()}:
                self._files[path] = stack.enter_context(opened(path, "pt"))
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
        """By rows, so that none needs more than `piece_bytes` of memory beside the mapped file."""
        row_bytes = piece.box.elements // piece.box.sizes[0] * max(4, self.archive.entries[piece.key].item_bytes)
        step = max(1, self.piece_bytes // max(row_bytes, 1))
        for first in range(0, piece.box.sizes[0], step):
            count = min(step, piece.box.sizes[0] - first)
            yield replace(piece, box=piece.box.rows(first, count), out=piece.out.narrow(0, first, count))

    def _work(self, piece: FileSlice) -> int:
        """Bytes that were read."""
        if piece.heads is None:
            values, count = self._read(piece.key, piece.box)
        else:
            values, count = self._read_rotary(piece, piece.heads)
        piece.out.copy_(values)
        return count

    def _read_rotary(self, piece: FileSlice, heads: int) -> tuple[Tensor, int]:
        """Rows in our order: they lie in runs there, two to a head that is not whole here."""
        box, rows = piece.box, self.archive.entries[piece.key].shape[0]
        there = [rotary_row(box.starts[0] + row, rows, heads) for row in range(box.sizes[0])]
        order, parts = torch.tensor(there).argsort(), []
        for start, size in runs(sorted(there)):
            parts.append(self._read(piece.key, box.at(start, size)))
        return torch.cat([values for values, _ in parts])[order.argsort()], sum(count for _, count in parts)

    def _read(self, key: str, box: TensorSlice) -> tuple[Tensor, int]:
        """A box as the file has it, and the bytes that were read; float8 times its scales, in float32."""
        values = self._mapped(key, box)
        if values.dtype != torch.float8_e4m3fn or self.block is None:
            return values, values.nbytes
        rows, columns = (blocks(*each) for each in zip(box.starts, box.sizes, self.block, strict=True))
        few = TensorSlice((rows.first, columns.first), (rows.count, columns.count))
        scales = self._mapped(f"{key}{SCALE}", few)
        return values.float() * scales.float()[rows.of_each][:, columns.of_each], values.nbytes + scales.nbytes

    def _mapped(self, key: str, box: TensorSlice) -> Tensor:
        """A view of the file: its bytes are read when they are copied."""
        ranges = (slice(start, start + size) for start, size in zip(box.starts, box.sizes, strict=True))
        values: Tensor = self._files[self.archive.entries[key].file].get_slice(key)[tuple(ranges)]
        return values
