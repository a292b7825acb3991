"""A tensor of 8 GB, which takes no place on the disk, read by a rank that holds a sixteenth of it."""

import subprocess
import sys
from pathlib import Path

import pytest

from src.hugging_face.header import make_header
from src.hugging_face.read import PIECE_BYTES, THREADS

ROWS, COLUMNS = 2**20, 2**12  # in bfloat16
SHARE = 16
SHARE_BYTES = 2 * ROWS * COLUMNS // SHARE
HOME = Path(__file__).parents[2]


def grown(folder: Path, piece_bytes: int) -> int:
    """Bytes of peak memory of a process of its own, which has nothing but the shard and the pieces under way."""
    header, _ = make_header({"x": ("bfloat16", (ROWS, COLUMNS))}, {})
    with (folder / "model.safetensors").open("wb") as file:
        file.write(header)
        file.truncate(len(header) + 2 * ROWS * COLUMNS)
    (folder / "config.json").write_text("{}")
    command = [sys.executable, "-m", "tests.hugging_face.reads_a_share", str(folder)]
    sizes = map(str, (ROWS, COLUMNS, SHARE, piece_bytes))
    told = subprocess.run([*command, *sizes], cwd=HOME, capture_output=True, text=True, check=True)
    read, more = map(int, told.stdout.split())
    assert read == SHARE_BYTES
    return more


@pytest.mark.slow
def test_the_host_needs_its_share_and_a_little(tmp_path: Path) -> None:
    """A piece in the file's order for each thread, one in ours, and as much that an allocator keeps of threads, twice;
    the measure shows pieces of the whole share.
    """
    assert SHARE_BYTES <= grown(tmp_path, PIECE_BYTES) < SHARE_BYTES + 6 * THREADS * PIECE_BYTES < 1.9 * SHARE_BYTES
    assert grown(tmp_path, 4 * SHARE_BYTES) > 1.9 * SHARE_BYTES
