"""A rank in a process of its own: python -m tests.hugging_face.reads_a_share <folder> <rows> <columns> <ranks> <piece>.

Prints the bytes that it read in pieces of at most `piece` bytes, and by how much its own memory grew at the most
meanwhile: pages of the mapped file are the system's, which takes them back when it needs them.
"""

import sys
from pathlib import Path
from threading import Event, Thread

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


def memory_bytes() -> int:
    """Resident, and of no file."""
    lines = Path("/proc/self/status").read_text().splitlines()
    (line,) = (line for line in lines if line.startswith("RssAnon:"))
    return int(line.split()[1]) * KIB


class Peak(Thread):
    """The most that `memory_bytes` says, looked at a thousand times a second."""

    def __init__(self) -> None:
        super().__init__(daemon=True)
        self.most = 0
        self.over = Event()

    def run(self) -> None:
        while not self.over.wait(0.001):
            self.most = max(self.most, memory_bytes())


def main(folder: Path, rows: int, columns: int, ranks: int, piece_bytes: int) -> None:
    dist.init_process_group("fake", rank=3, world_size=ranks, store=FakeStore())
    mesh = init_device_mesh("cpu", (ranks,))
    reader = Reader(Archive.open(folder), piece_bytes=piece_bytes)
    TensorSlice.held(DTensor.from_local(torch.empty(1), mesh, [Shard(0)]))  # imports what it needs
    before, peak = memory_bytes(), Peak()
    peak.start()
    local = torch.empty(rows // ranks, columns, dtype=torch.bfloat16)
    # In rotary order, which has to be put together beside the file.
    stored = Stored("x", (rows, columns), ("x",), heads=rows // 128)
    reader.fill({"x": DTensor.from_local(local, mesh, [Shard(0)])}, [stored])
    peak.over.set()
    print(reader.bytes_read, peak.most - before)


if __name__ == "__main__":
    main(Path(sys.argv[1]), *map(int, sys.argv[2:]))
