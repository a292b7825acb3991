"""Every command that README.md shows runs, and every message it shows is what the program says."""

import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

HOME = Path(__file__).parents[1]
README = (HOME / "README.md").read_text(encoding="utf-8")
BLOCKS = re.findall(r"^```sh\n(.*?)^```", README, re.MULTILINE | re.DOTALL)
LINES = [line.partition(" #")[0].strip() for block in BLOCKS for line in block.replace("\\\n", " ").splitlines()]
DIALOGUES = re.findall(r"^\$ (python launch.py .*)\n((?:(?!\$ |```).+\n)+)", README, re.MULTILINE)
SMALL = ["++task.seq_len=64", "++task.global_batch=4"]
SHORT = [
    *SMALL,
    "++task.steps=2",
    "++task.validate_samples=8",
    "++schedule.warmup_steps=1",
    "++schedule.decay_ratio=null",
]


def launched(command: str, root: Path, *more: str) -> subprocess.CompletedProcess[str]:
    words = shlex.split(command)
    assert words[:2] == ["python", "launch.py"]
    environment = os.environ | {"RUNS": str(root), "WANDB_MODE": "offline", "OMP_NUM_THREADS": "1"}
    return subprocess.run(
        [sys.executable, "launch.py", *words[2:], *more], cwd=HOME, env=environment, capture_output=True, text=True
    )


def test_commands_are_found() -> None:
    assert len(LINES) >= 7
    assert len(DIALOGUES) >= 2


# What needs eight GPUs is planned by tests/test_commands.py, as every command is.
HERE = [line for line in LINES if line.startswith("python launch.py") and not line.endswith("8b parallel=tp2_fsdp4")]


LESS: dict[str, list[str]] = {"--help": [], "dry_run=": [], "task=verify": [], "task=bench": SMALL}  # the rest: SHORT


@pytest.mark.parametrize("command", HERE)
def test_launch_command(command: str, tmp_path_factory: pytest.TempPathFactory) -> None:
    root = tmp_path_factory.getbasetemp() / "readme"  # one root: the corpus is tokenised once
    more = next((words for task, words in LESS.items() if task in command), SHORT)
    ended = launched(command, root, *more)
    assert ended.returncode == 0, ended.stderr
    points = 2 if " -m " in command else 1
    if "--help" in command:
        assert "--help model=llama3_8b" in ended.stdout
    elif "cluster=slurm" in command:
        assert ended.stdout.count("#SBATCH --array=0-1%2") == 2, "an array for each layout"
    elif "dry_run=true" in command:
        assert re.search(r"parameters\s+│\s+405,", ended.stderr)
    elif "task=verify" in command:
        assert "passed: " in ended.stdout
    elif "task=bench" in command:
        assert "tokens_per_second" in ended.stdout
    else:
        assert ended.stdout.count("step 2/2") == points


@pytest.mark.parametrize("target", [line for line in LINES if line.startswith("make ")])
def test_make_target(target: str) -> None:
    """`make -n` says what would run; the demo's own command is run by tests/end_to_end."""
    ended = subprocess.run([*shlex.split(target), "--dry-run"], cwd=HOME, capture_output=True, text=True)
    assert ended.returncode == 0, ended.stderr
    assert {"make demo": "launch.py experiment=demo", "make test": "-m pytest"}[target] in ended.stdout


@pytest.mark.parametrize(("command", "message"), DIALOGUES)
def test_message(command: str, message: str, tmp_path: Path) -> None:
    ended = launched(command, tmp_path)
    assert ended.returncode == 2
    assert ended.stderr == message
    assert not list(tmp_path.iterdir())
