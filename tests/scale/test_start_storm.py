"""What ranks really open of a disk that all machines share when a run starts, told by Python's own audit hook."""

import os
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest

from benchmarks.start_up import TINY

HOME = Path(__file__).parents[2]
# In each rank, before anything of this project is imported.
HOOK = """
import os, sys
if "src.cluster.rank" in sys.orig_argv:
    told = os.open(f"{os.environ['TOLD']}/{os.environ['RANK']}", os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    def hook(event, given):
        if event == "open" and isinstance(given[0], (str, bytes)):
            os.write(told, os.fsencode(given[0]) + b"\\n")
    sys.addaudithook(hook)
"""


@pytest.mark.slow
def test_ranks_open_few_files_of_the_shared_disk(tmp_path: Path) -> None:
    """Two ranks of one step. Rank 0 alone reads the frozen code; the other one has opened 10 files of the run, where it
    opened 285 modules more.
    """
    for name in ("site", "told", "shared", "machine"):
        (tmp_path / name).mkdir()
    (tmp_path / "site/sitecustomize.py").write_text(HOOK)
    where = {"TOLD": tmp_path / "told", "PYTHONPATH": tmp_path / "site", "TMPDIR": tmp_path / "machine", "WARM": ""}
    command = [sys.executable, "launch.py", *TINY, "parallel=ddp2", f"root={tmp_path / 'shared'}"]
    environment = os.environ | {key: str(value) for key, value in where.items()}
    done = subprocess.run(command, cwd=HOME, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    for rank in range(2):
        opened = [Path(line) for line in (tmp_path / f"told/{rank}").read_text().splitlines()]
        shared = [each for each in opened if each.is_relative_to(tmp_path / "shared")]
        imported = [each for each in opened if each.is_relative_to(tmp_path / "machine") and each.suffix == ".pyc"]
        assert len(imported) > 100, "what it imports is its machine's own"
        assert not [each for each in shared if each.suffix == ".pyc"]
        code = [each for each in shared if "code" in each.relative_to(tmp_path / "shared").parts]
        assert bool(code) == (rank == 0)
        if rank > 0:
            assert len(shared) <= 20, Counter(each.name for each in shared)
