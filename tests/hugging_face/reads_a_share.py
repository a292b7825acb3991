"""A rank in a process of its own: python -m tests.hugging_face.reads_a_share <folder> <rows> <columns> <ranks>.

Prints the bytes that it read, and by how much the most memory that it ever had grew while it read.
"""

import resource
import sys
from pathlib import Path

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Shard
from torch.testing._internal.distributed.fake_pg import FakeStore

from src.hugging_face.archive import Archive
from src.hugging_face.box import Box
from src.hugging_face.read import Reader
from src.models.stored import Stored

KIB = 2**10


def main(folder: Path, rows: int, columns: int, ranks: int) -> None:
    dist.init_process_group("fake", rank=3, world_size=ranks, store=FakeStore())
    mesh = init_device_mesh("cpu", (ranks,))
    reader = Reader(Archive.open(folder))
    Box.held(DTensor.from_local(torch.empty(1), mesh, [Shard(0)]))  # imports what it needs
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    local = torch.empty(rows // ranks, columns, dtype=torch.bfloat16)
    reader.fill({"x": DTensor.from_local(local, mesh, [Shard(0)])}, [Stored("x", (rows, columns), ("x",))])
    after = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    print(reader.bytes_read, (after - before) * KIB)


if __name__ == "__main__":
    main(Path(sys.argv[1]), *map(int, sys.argv[2:]))
