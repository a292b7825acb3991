"""Mean over groups of a vector, computed in the background, as float32, bfloat16 or int8 on the wire.

Each group averages one part of the vector in float32 and sends the result to all, so every group reads the same bytes.
"""

from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from datetime import timedelta
from typing import Literal

import torch
from torch import Tensor
from torch._C._distributed_c10d import AllgatherOptions, AllToAllOptions
from torch.nn.functional import pad
from torchft.process_group import ProcessGroup

Exchange = Literal["float32", "bfloat16", "int8"]
BLOCK = 256  # values that share a scale
LARGEST = 127.0


@dataclass(frozen=True)
class Codec:
    """Encodes float32 (rows, n BLOCKs) as uint8 (rows, `bytes_of(n BLOCKs)`), and decodes it."""

    encode: Callable[[Tensor], Tensor]
    decode: Callable[[Tensor], Tensor]
    block_bytes: int

    def bytes_of(self, values: int) -> int:
        return values // BLOCK * self.block_bytes


def _quantise(values: Tensor) -> Tensor:
    blocks = values.view(len(values), -1, BLOCK)
    scales = blocks.abs().amax(dim=2, keepdim=True) / LARGEST  # of what is not finite, neither is the scale
    whole = (blocks / scales.where(scales != 0, 1.0)).round().nan_to_num(0.0).clamp(-LARGEST, LARGEST).to(torch.int8)
    return torch.cat((whole.flatten(1).view(torch.uint8), scales.flatten(1).view(torch.uint8)), dim=1)


def _dequantise(wire: Tensor) -> Tensor:
    blocks = wire.shape[1] // (BLOCK + 4)
    whole, scales = wire.split([blocks * BLOCK, blocks * 4], dim=1)
    numbers = whole.contiguous().view(torch.int8).view(len(wire), blocks, BLOCK).float()
    found: Tensor = numbers * scales.contiguous().view(torch.float32).unsqueeze(2)
    return found.flatten(1)


CODECS: dict[Exchange, Codec] = {
    "float32": Codec(lambda x: x.contiguous().view(torch.uint8), lambda x: x.view(torch.float32), 4 * BLOCK),
    "bfloat16": Codec(lambda x: x.bfloat16().view(torch.uint8), lambda x: x.view(torch.bfloat16).float(), 2 * BLOCK),
    "int8": Codec(_quantise, _dequantise, BLOCK + 4),
}


def chunk(values: int, groups: int) -> int:
    """Values that each group averages: whole blocks, so the last ones are padded."""
    return -(-values // (groups * BLOCK)) * BLOCK


def sent_bytes(values: int, groups: int, exchange: Exchange) -> int:
    """Bytes that one rank sends for one mean: a part to each other group, and its own averaged part to each."""
    return 2 * (groups - 1) * CODECS[exchange].bytes_of(chunk(values, groups))


class Means:
    """Computes one mean at a time in a thread. Nothing else may use the groups' process group meanwhile."""

    def __init__(self, exchange: Exchange, seconds: float, device: torch.device) -> None:
        """`device`: where the process group wants its tensors. `seconds`: until a peer is taken for gone."""
        self._codec, self._device = CODECS[exchange], device
        self._parts, self._wholes = AllToAllOptions(), AllgatherOptions()
        self._parts.timeout = self._wholes.timeout = timedelta(seconds=seconds)
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="outer")
        self._stream = torch.cuda.Stream(device) if device.type == "cuda" else None

    def start(self, vector: Tensor, contributors: int, group: ProcessGroup, groups: int) -> "Future[Tensor]":
        """Start the sum over `groups` divided by `contributors`; the result is on the vector's device."""
        if self._stream is not None:
            self._stream.wait_stream(torch.cuda.current_stream(self._device))
        return self._thread.submit(self._mean, vector, contributors, group, groups)

    def _mean(self, vector: Tensor, contributors: int, group: ProcessGroup, groups: int) -> Tensor:
        if groups == 1 or vector.numel() == 0:
            return vector / contributors
        with self._beside():
            rows = pad(vector, (0, groups * chunk(vector.numel(), groups) - vector.numel()))
            sent = self._codec.encode(rows.to(self._device).view(groups, -1))
            received = torch.empty_like(sent)
            # With sizes, a row each: without them torch calls ncclAlltoAll, and takes "in progress", which torchft's
            # communicators answer until a transfer is queued, for an error.
            each = [1] * groups
            _finish(group.alltoall_base(received, sent, each, each, self._parts))
            mine = self._codec.encode(self._codec.decode(received).sum(0, keepdim=True) / contributors)
            whole = [torch.empty_like(mine) for _ in range(groups)]
            _finish(group.allgather([whole], [mine], self._wholes))
            mean = self._codec.decode(torch.cat(whole)).flatten()[: vector.numel()].to(vector.device)
        if self._stream is not None:
            self._stream.synchronize()
        return mean

    def _beside(self) -> AbstractContextManager[object]:
        """A new thread is on GPU 0, whatever GPU its rank has."""
        if self._stream is None:
            return nullcontext()
        torch.cuda.set_device(self._device)
        return torch.cuda.stream(self._stream)

    def close(self) -> None:
        self._thread.shutdown(wait=False)


def _finish(work: torch.distributed.Work) -> None:
    if not work.wait():
        raise RuntimeError("an exchange between groups was given up")
