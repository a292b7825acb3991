"""A tensor of 4 GB, which takes no place on the disk, read by a rank that holds a sixteenth of it."""

import subprocess
import sys
from pathlib import Path

from src.hugging_face.header import make_header

ROWS, COLUMNS = 2**19, 2**12  # in bfloat16
SHARE = 16
HOME = Path(__file__).parents[2]


def test_the_host_needs_its_share_and_a_little(tmp_path: Path) -> None:
    """Peak memory of a process of its own, which has nothing but the shard and the pieces under way."""
    header, _ = make_header({"x": ("bfloat16", (ROWS, COLUMNS))}, {})
    with (tmp_path / "model.safetensors").open("wb") as file:
        file.write(header)
        file.truncate(len(header) + 2 * ROWS * COLUMNS)
    (tmp_path / "config.json").write_text("{}")
    command = [sys.executable, "-m", "tests.hugging_face.reads_a_share", str(tmp_path)]
    sizes = map(str, (ROWS, COLUMNS, SHARE))
    told = subprocess.run([*command, *sizes], cwd=HOME, capture_output=True, text=True, check=True)
    read, grown = map(int, told.stdout.split())
    share = 2 * ROWS * COLUMNS // SHARE
    assert read == share
    assert grown < share + 150 * 2**20
