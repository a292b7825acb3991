"""A rank in a process of its own: python -m tests.hugging_face.reads_a_share <folder> <rows> <columns> <ranks> <piece>.

Prints the bytes that it read in pieces of at most `piece` bytes, and by how much its memory grew at the most meanwhile.
"""

import sys
from pathlib import Path

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Shard
from torch.testing._internal.distributed.fake_pg import FakeStore

from src.hugging_face.archive import Archive
from src.hugging_face.read import Reader
from src.hugging_face.tensor_slice import TensorSlice
from src.models.stored import Stored

KIB = 2**10


def memory_bytes(field: str) -> int:
    """VmRSS: resident now; VmHWM: the most so far. Not getrusage, whose ru_maxrss is at least that of the parent."""
    lines = Path("/proc/self/status").read_text().splitlines()
    (line,) = (line for line in lines if line.startswith(f"{field}:"))
    return int(line.split()[1]) * KIB


def main(folder: Path, rows: int, columns: int, ranks: int, piece_bytes: int) -> None:
    dist.init_process_group("fake", rank=3, world_size=ranks, store=FakeStore())
    mesh = init_device_mesh("cpu", (ranks,))
    reader = Reader(Archive.open(folder), piece_bytes=piece_bytes)
    TensorSlice.held(DTensor.from_local(torch.empty(1), mesh, [Shard(0)]))  # imports what it needs
    before = memory_bytes("VmRSS")
    local = torch.empty(rows // ranks, columns, dtype=torch.bfloat16)
    reader.fill({"x": DTensor.from_local(local, mesh, [Shard(0)])}, [Stored("x", (rows, columns), ("x",))])
    print(reader.bytes_read, memory_bytes("VmHWM") - before)


if __name__ == "__main__":
    main(Path(sys.argv[1]), *map(int, sys.argv[2:]))
