"""The shards that ranks hold into safetensors files: every byte's place is known before, so each rank writes its own.

No rank gathers anything, and no rank waits for another between the making of the empty files and their last byte.
"""

import os
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass, replace
from math import ceil, prod
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.distributed.tensor import DTensor

from src.hugging_face.archive import SINGLE
from src.hugging_face.check import E8M0, FLOAT8, SCALE
from src.hugging_face.header import DTYPES, NAMES, PlacedTensor, make_header
from src.hugging_face.read import PIECE_BYTES, THREADS
from src.hugging_face.tensor_slice import TensorSlice, blocks, byte_ranges, runs
from src.models.stored import Stored, rotary_row

BLOCK = 128  # rows and columns that share a scale
LARGEST = 448.0  # of float8_e4m3fn
# At most, of a header: beside its entries, and of one entry beside its key (two offsets of 13 digits, two sizes).
HEADER_BYTES, ENTRY_BYTES = 128, 128
Scales = Mapping[str, Tensor]  # by key: (blocks of rows, blocks of columns), what a float8 number is multiplied with


@dataclass(frozen=True)
class Held:
    """This rank's shard of a tensor, as it is written."""

    box: TensorSlice
    local: Tensor


def held(tensors: Mapping[str, Tensor]) -> dict[str, Held]:
    """Of a tensor that several ranks hold the first of them writes it; plain ones are small, and all write the same."""
    found = {}
    for name, tensor in tensors.items():
        if isinstance(tensor, DTensor):
            at = tensor.device_mesh.get_coordinate()
            if at is None or any(at[axis] for axis, place in enumerate(tensor.placements) if place.is_replicate()):
                continue
        local = tensor.to_local() if isinstance(tensor, DTensor) else tensor
        found[name] = Held(TensorSlice.held(tensor), local.detach())
    return found


@dataclass(frozen=True)
class Files:
    """Files of an export, and the file and byte range of every tensor."""

    folder: Path
    entries: Mapping[str, PlacedTensor]
    headers: Mapping[str, bytes]  # by name of file
    sizes: Mapping[str, int]  # bytes of each file

    @classmethod
    def plan(
        cls, folder: Path, table: Iterable[Stored], dtype: str, *, fp8: bool, shard_bytes: int, scales: str = "float32"
    ) -> "Files":
        """Tensors in the model's order, a new file where the next would make one larger than `shard_bytes`.

        `scales`: dtype of the scales of float8.
        """
        parts: list[dict[str, tuple[str, tuple[int, ...]]]] = [{}]
        room = shard_bytes - HEADER_BYTES
        for key, (kind, shape) in _tensors(table, dtype, scales if fp8 else None):
            size = prod(shape) * DTYPES[NAMES[kind]][1] + len(key) + ENTRY_BYTES
            if size > room and parts[-1]:
                parts.append({})
                room = shard_bytes - HEADER_BYTES
            parts[-1][key] = (kind, shape)
            room -= size
        entries, headers, sizes = {}, {}, {}
        for number, tensors in enumerate(parts, 1):
            name = SINGLE if len(parts) == 1 else f"model-{number:05d}-of-{len(parts):05d}.safetensors"
            headers[name], starts = make_header(tensors, {"format": "pt"})
            sizes[name] = len(headers[name])
            for (key, (kind, shape)), start in zip(tensors.items(), starts, strict=True):
                entries[key] = PlacedTensor(folder / name, kind, shape, start)
                sizes[name] += entries[key].bytes
        return cls(folder, entries, headers, sizes)

    @property
    def bytes(self) -> int:
        """Bytes of all tensors."""
        return sum(entry.bytes for entry in self.entries.values())

    def make(self) -> None:
        """Every file in its full size, with nothing but its header in it."""
        for name, header in self.headers.items():
            with (self.folder / name).open("wb") as file:
                file.write(header)
                file.truncate(self.sizes[name])

    def index(self) -> dict[str, Any] | None:
        """The content of the index; None for a single file, which has none."""
        if len(self.headers) == 1:
            return None
        return {
            "metadata": {"total_size": self.bytes},
            "weight_map": {key: entry.file.name for key, entry in sorted(self.entries.items())},
        }


def _tensors(
    table: Iterable[Stored], dtype: str, scales: str | None
) -> Iterator[tuple[str, tuple[str, tuple[int, ...]]]]:
    """Key, dtype and shape; linear weights in float8 where there are `scales`."""
    for stored in table:
        for key in (*stored.keys, *stored.copies):
            if scales is not None and stored.linear:
                yield key, (FLOAT8, stored.key_shape)
                yield f"{key}{SCALE}", (scales, grid_shape(stored.key_shape))
            else:
                yield key, ("float32" if stored.precise else dtype, stored.key_shape)


def grid_shape(shape: tuple[int, ...]) -> tuple[int, ...]:
    """Number of blocks along each dimension."""
    return tuple(ceil(size / BLOCK) for size in shape)


@dataclass(frozen=True)
class _Piece:
    """One thread's next work: rows of ours, which is a box of what belongs to `key`."""

    key: str
    box: TensorSlice  # native rows
    local: Tensor  # of the box's shape
    rows: int  # of the whole tensor behind the key
    heads: int | None

    def ordered(self) -> Iterator[tuple[TensorSlice, Tensor]]:
        """In the order that they have there: neighbours together."""
        if self.heads is None:
            yield self.box, self.local
            return
        first, count = self.box.starts[0], self.box.sizes[0]
        there = torch.tensor([rotary_row(first + row, self.rows, self.heads) for row in range(count)])
        values, done = self.local[there.argsort().to(self.local.device)], 0
        for start, size in runs(sorted(there.tolist())):
            yield self.box.at(start, size), values[done : done + size]
            done += size


def _whole(stored: Stored, part: Held) -> Iterator[_Piece]:
    """One piece for each key that the shard has a part in."""
    if part.box.elements == 0:
        return
    if not stored.stacked:
        for key in (*stored.keys, *stored.copies):
            yield _Piece(key, part.box, part.local, stored.shape[0], stored.heads)
        return
    for place in range(part.box.sizes[0]):
        key = stored.keys[part.box.starts[0] + place]
        yield _Piece(key, part.box.inner(), part.local[place], stored.key_shape[0], None)


def _cut(piece: _Piece) -> Iterator[_Piece]:
    """By rows, so that none needs more than some MB beside it."""
    row_bytes = piece.local[0].numel() * piece.local.element_size()
    step = max(1, PIECE_BYTES // max(row_bytes, 1))
    for first in range(0, piece.box.sizes[0], step):
        count = min(step, piece.box.sizes[0] - first)
        yield replace(piece, box=piece.box.rows(first, count), local=piece.local.narrow(0, first, count))


def write(files: Files, parts: Mapping[str, Held], table: Iterable[Stored], scales: Scales | None = None) -> int:
    """This rank's part of every tensor, on the disk when it returns; the number of bytes. `Files.make` came before."""
    pieces = [
        piece
        for stored in table
        if stored.name in parts
        for whole in _whole(stored, parts[stored.name])
        for piece in _cut(whole)
        if piece.key in files.entries
    ]
    with ExitStack() as stack:
        descriptors = {}
        for path in {files.entries[piece.key].file for piece in pieces}:
            descriptors[path] = os.open(path, os.O_WRONLY)
            stack.callback(os.close, descriptors[path])
        with ThreadPoolExecutor(THREADS, thread_name_prefix="safetensors") as pool:
            done = sum(pool.map(lambda piece: _write(files, descriptors, piece, scales), pieces))
            list(pool.map(os.fsync, descriptors.values()))
    return done


def _write(files: Files, descriptors: Mapping[Path, int], piece: _Piece, scales: Scales | None) -> int:
    entry, done = files.entries[piece.key], 0
    for box, values in piece.ordered():
        if entry.dtype == FLOAT8:
            assert scales is not None, "float8 needs its scales"
            values = values.float() / _factors(scales[piece.key].to(values.device), box)
            values = values.clamp(-LARGEST, LARGEST)
        done += put(descriptors[entry.file], entry, box, values)
    return done


def put(descriptor: int, entry: PlacedTensor, box: TensorSlice, values: Tensor) -> int:
    """A box into its place in the file; the number of bytes."""
    host = values.to(getattr(torch, entry.dtype)).contiguous().cpu()
    raw, done = memoryview(host.flatten().view(torch.uint8).numpy().data), 0
    for start, size in byte_ranges(entry, box):
        sent = 0
        while sent < size:
            sent += os.pwrite(descriptor, raw[done + sent : done + size], start + sent)
        done += size
    return done


def _factors(scale: Tensor, box: TensorSlice) -> Tensor:
    """What each element of the box is multiplied with."""
    rows, columns = (blocks(start, size, BLOCK) for start, size in zip(box.starts, box.sizes, strict=True))
    inner = scale[rows.first : rows.first + rows.count, columns.first : columns.first + columns.count]
    return inner[rows.of_each.to(scale.device)][:, columns.of_each.to(scale.device)]


def block_scales(
    parts: Mapping[str, Held],
    table: Iterable[Stored],
    largest: Callable[[Tensor], Tensor],
    device: torch.device,
    dtype: str = "float32",
) -> dict[str, Tensor]:
    """Collective. Of every linear weight, largest magnitude of each block / 448; on the host, the same on all ranks.

    `largest`: the element-wise maximum over all ranks, for a block may lie in the shards of several; `dtype`: that the
    scales are written in, float8_e8m0fnu rounds them up to powers of two.
    """
    found: dict[str, Tensor] = {}
    for stored in table:
        if not stored.linear:
            continue
        grid = torch.zeros(len(stored.keys), *grid_shape(stored.key_shape), device=device)
        if stored.name in parts:
            for whole in _whole(stored, parts[stored.name]):
                for piece in _cut(whole):
                    _raise(grid[stored.keys.index(piece.key)], piece)
        scale = largest(grid).cpu() / LARGEST
        scale[scale == 0] = 1.0  # a block of zeros
        scale = _power_of_two(scale) if dtype == E8M0 else scale
        found |= dict(zip(stored.keys, scale, strict=True))
    return found


def _power_of_two(scale: Tensor) -> Tensor:
    """The next one from above, so that no block's largest magnitude is clipped."""
    mantissa, exponent = scale.frexp()  # mantissas in [0.5, 1)
    whole = torch.where(mantissa == 0.5, exponent - 1, exponent).clamp(-126, 127)
    return torch.ldexp(torch.ones_like(scale), whole)


def _raise(grid: Tensor, piece: _Piece) -> None:
    """Take the magnitudes of a piece into account."""
    for box, values in piece.ordered():
        rows, columns = (blocks(start, size, BLOCK) for start, size in zip(box.starts, box.sizes, strict=True))
        # Zeros around it, so that it begins and ends where blocks do.
        tops = [start % BLOCK for start in box.starts]
        ends = [-(top + size) % BLOCK for top, size in zip(tops, box.sizes, strict=True)]
        padded = F.pad(values.abs().float(), (tops[1], ends[1], tops[0], ends[0]))
        largest = padded.view(rows.count, BLOCK, columns.count, BLOCK).amax((1, 3))
        part = grid[rows.first : rows.first + rows.count, columns.first : columns.first + columns.count]
        part.copy_(torch.maximum(part, largest))


def put_scales(files: Files, scales: Scales) -> None:
    """Write every scale to its place in the files. Runs on one rank."""
    for key, scale in scales.items():
        entry = files.entries[f"{key}{SCALE}"]
        descriptor = os.open(entry.file, os.O_WRONLY)
        try:
            put(descriptor, entry, TensorSlice((0, 0), tuple(scale.shape)), scale)
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
