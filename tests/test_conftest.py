"""How tests are dealt to processes that run side by side."""

import re
import subprocess
import sys
from collections import defaultdict
from pathlib import Path

import pytest

HOME = Path(__file__).parents[1]


@pytest.mark.slow
def test_one_process_takes_a_whole_file(tmp_path: Path) -> None:
    """Tests that share what a module or a session keeps are not spread over processes."""
    command = (sys.executable, "-m", "pytest", "--numprocesses=2", "--dist=loadfile", "-v", "-p", "no:cacheprovider")
    files = ("tests/config/test_tree.py", "tests/storage/test_json_lines.py")
    own = f"--basetemp={tmp_path}"  # else it deletes the folders of the suites before this one: minutes, on a disk
    done = subprocess.run([*command, own, *files], cwd=HOME, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout
    workers: dict[str, set[str]] = defaultdict(set)
    for worker, file in re.findall(r"^\[(gw\d+)\].* PASSED (\S+?)::", done.stdout, re.MULTILINE):
        workers[file].add(worker)
    assert sorted(workers) == sorted(files)
    assert {len(each) for each in workers.values()} == {1}
