"""The local shard of a DTensor as index ranges, and the byte ranges of its rows in a safetensors file (row-major)."""

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import product
from math import prod

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor

from src.hugging_face.header import PlacedTensor


@dataclass(frozen=True)
class TensorSlice:
    """A hyper-rectangle of a tensor: indices [start, start + size) in each dimension."""

    starts: tuple[int, ...]
    sizes: tuple[int, ...]

    @property
    def elements(self) -> int:
        return prod(self.sizes)

    def rows(self, first: int, count: int) -> "TensorSlice":
        """The slice of some of its rows, counted from its first."""
        return TensorSlice((self.starts[0] + first, *self.starts[1:]), (count, *self.sizes[1:]))

    def at(self, start: int, count: int) -> "TensorSlice":
        """The same but for its rows."""
        return TensorSlice((start, *self.starts[1:]), (count, *self.sizes[1:]))

    def inner(self) -> "TensorSlice":
        """Without dimension 0."""
        return TensorSlice(self.starts[1:], self.sizes[1:])

    @classmethod
    def held(cls, tensor: Tensor) -> "TensorSlice":
        """The local shard of `tensor`; all of it when it is no DTensor."""
        if not isinstance(tensor, DTensor):
            return cls((0,) * tensor.dim(), tuple(tensor.shape))
        (chunk,) = tensor.__create_chunk_list__()
        return cls(tuple(chunk.offsets), tuple(chunk.sizes))


@dataclass(frozen=True)
class Blocks:
    """The blocks that [start, start + size) of one dimension meets, and for each element which of them it is in."""

    first: int
    count: int
    of_each: Tensor


def blocks(start: int, size: int, step: int) -> Blocks:
    """Blocks of `step` elements that a shard touches. `start` is its global index, and may lie inside of a block."""
    numbers = torch.arange(start, start + size) // step
    first = start // step
    return Blocks(first, (start + size - 1) // step + 1 - first, numbers - first)


def byte_ranges(entry: PlacedTensor, box: TensorSlice) -> Iterator[tuple[int, int]]:
    """(start, bytes) in the file of each stretch without a gap, in the order of the box's elements."""
    whole = len(box.sizes)
    while whole > 0 and box.sizes[whole - 1] == entry.shape[whole - 1]:
        whole -= 1  # dimensions from here on are whole
    cut = max(whole - 1, 0)  # the last that is not, if any
    strides = [prod(entry.shape[place + 1 :]) for place in range(len(entry.shape))]
    size = prod(box.sizes[cut:]) * entry.item_bytes
    outside = (range(start, start + count) for start, count in zip(box.starts[:cut], box.sizes[:cut], strict=True))
    for outer in product(*outside):
        place = sum(index * stride for index, stride in zip((*outer, *box.starts[cut:]), strides, strict=True))
        yield entry.start + place * entry.item_bytes, size


def runs(rows: list[int]) -> Iterator[tuple[int, int]]:
    """(start, length) of each stretch of neighbours; `rows` ascend."""
    begin = 0
    for place in range(1, len(rows) + 1):
        if place == len(rows) or rows[place] != rows[place - 1] + 1:
            yield rows[begin], place - begin
            begin = place
