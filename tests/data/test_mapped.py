"""Token shards by the thousand: few are open at a time, and their index opens without a look at any of them."""

import subprocess
import sys
from pathlib import Path

import numpy as np

from src.data.mapped.open_maps import OpenMaps
from tests.scale.fakes import descriptors
from tests.scale.token_folder import token_folder

READS = """
import resource, sys
from pathlib import Path
resource.setrlimit(resource.RLIMIT_NOFILE, (256, 256))
from src.data.shards import TokenShards
opened = TokenShards(Path(sys.argv[1]))
for start in (*range(0, 1200, 3), *range(1, 1200, 3)):
    assert opened.read("train", start, 2).tolist() == [7, 7][: 1200 - start]
print(sum(1 for _ in opened.segments("train")))
"""


def test_any_number_of_shards_under_ulimit_256(tmp_path: Path) -> None:
    token_folder(tmp_path, 400, 3)
    for number in range(400):
        (tmp_path / f"{number:05d}.train.bin").write_bytes(b"\7\0" * 3)
    run = subprocess.run([sys.executable, "-c", READS, str(tmp_path)], capture_output=True, text=True, check=False)
    assert (run.stdout, run.stderr) == ("400\n", "")


def test_the_maps_that_were_used_last_stay(tmp_path: Path) -> None:
    opened: list[str] = []

    def array(name: str) -> "np.memmap[tuple[int], np.dtype[np.uint16]]":
        opened.append(name)
        (tmp_path / name).write_bytes(b"\7\0" * 3)
        return np.memmap(tmp_path / name, "<u2", mode="r")

    maps, before = OpenMaps(2), descriptors()
    kept = maps.get("a", lambda: array("a"))
    for name in ("b", "a", "c", "a", "b"):
        maps.get(name, lambda name=name: array(name))  # type: ignore[misc]
    assert opened == ["a", "b", "c", "b"]
    assert descriptors() - before == 2, "of a, which is held, and b"
    maps.get("c", lambda: array("c"))
    assert kept.tolist() == [7, 7, 7], "what somebody reads stays mapped"
