"""Every command that README.md shows runs, and every message it shows is what the program says.

The slow test types all of them in order; each also runs by itself, shortened, which takes seconds.
"""

import json
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from docs.pictures import console
from tests.test_tutorials import copied, executed, typed

HOME = Path(__file__).parents[1]
README = (HOME / "README.md").read_text(encoding="utf-8")
BLOCKS = re.findall(r"^```sh\n(.*?)^```", README, re.MULTILINE | re.DOTALL)
LINES = [line.partition(" #")[0].strip() for block in BLOCKS for line in block.replace("\\\n", " ").splitlines()]
DIALOGUES = re.findall(r"^\$ (python launch.py .*)\n((?:(?!\$ |```).+\n)+)", README, re.MULTILINE)
RECORD = "benchmarks/records/one_gpu.json"
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


# The quickstart's are about one folder, one after the other.
HERE = [line for line in LINES if line.startswith("python launch.py") and "runs/first" not in line]


LESS: dict[str, list[str]] = {"dry_run=": [], "task=verify": [], "task=bench": SMALL}  # the rest: SHORT


@pytest.mark.parametrize("command", HERE)
def test_launch_command(command: str, tmp_path_factory: pytest.TempPathFactory) -> None:
    root = tmp_path_factory.getbasetemp() / "readme"  # one root: the corpus is tokenised once
    more = next((words for task, words in LESS.items() if task in command), SHORT)
    ended = launched(command, root, *more)
    assert ended.returncode == 0, ended.stderr
    points = 2 if " -m " in command else 1
    if "cluster=slurm" in command:
        assert ended.stdout.count("#SBATCH --array=0-1%2") == 2, "an array for each layout"
    elif "dry_run=true" in command:
        assert re.search(rf"parameters\s+│\s+{'405' if '405b' in command else '8'},", ended.stderr)
    elif "task=verify" in command:
        assert "passed: " in ended.stdout
    elif "task=bench" in command:
        assert "tokens_per_second" in ended.stdout
    else:
        assert ended.stdout.count("step 2/2") == points


SMALLER = {"dim": 64, "n_layers": 2, "n_heads": 4, "n_kv_heads": 4}


@pytest.mark.slow
def test_all_of_it_as_typed_in_order(tmp_path: Path) -> None:
    """In a copy of the repository, as a newcomer has it after `make .venv/installed`, but for smaller debug models: as
    they are this takes 420 CPU seconds.
    """
    home = copied(tmp_path / "ropewalk")
    for file in (home / f"conf/model/{name}.yaml" for name in ("llama3_debug", "llama3_20m")):
        text = file.read_text(encoding="utf-8")
        for key, number in SMALLER.items():
            text, found = re.subn(rf"^{key}: \d+", f"{key}: {number}", text, flags=re.MULTILINE)
            assert found == 1
        file.write_text(text, encoding="utf-8")
    told = ""
    for block in BLOCKS:
        for command in typed(block):
            code, said = executed(command, home)
            assert code == 0, f"{command}\n{said}"
            told += said
    assert "resumes " in told
    assert (home / "runs/lr.pdf").read_bytes().startswith(b"%PDF-")
    assert (home / "runs/first/exports/step_00000035/model.safetensors").is_file()


@pytest.mark.parametrize(("target", "command"), [("demo", "launch.py experiment=demo"), ("test", "-m pytest")])
def test_make_target(target: str, command: str) -> None:
    """`make -n` says what would run; the demo's own command is run by tests/end_to_end."""
    assert f"`make {target}`" in README
    ended = subprocess.run(["make", target, "--dry-run"], cwd=HOME, capture_output=True, text=True)
    assert ended.returncode == 0, ended.stderr
    assert command in ended.stdout


HEADLINE = (
    ("8b_bf16", "Llama 3 8B, 16 layers, bf16"),
    ("8b_fp8", "the same, float8"),
    ("small_32", "124M Llama, bf16"),
)


def test_the_headline_is_the_records() -> None:
    """Pairs of one machine each, the same work on both sides."""
    records = {each["row"]: each["measured"] for each in json.loads((HOME / RECORD).read_text(encoding="utf-8"))}
    for row, work in HEADLINE:
        ours = records[row]["ours"]["tokens_per_second"]
        peers = records[row]["peer"]["tokens_per_second_per_device"]
        assert f"| {work} | **{ours:,.0f}** | {peers:,.0f} |" in README


def test_pictures_are_there_and_fetch_nothing() -> None:
    named = re.findall(r"!\[[^\]]*\]\(([^)]+)\)", README)
    assert named == [f"docs/pictures/{name}" for name in ("loss.png", "console.svg", "report.png", "architecture.svg")]
    assert [name for name in named if not (HOME / name).is_file()] == []
    picture = (HOME / "docs/pictures/console.svg").read_text(encoding="utf-8")
    assert "starts&#160;runs/own_text-" in picture
    assert "url(http" not in picture
    assert console("a\n", Path("/nowhere")) == console("a\n", Path("/nowhere"))


@pytest.mark.parametrize(("command", "message"), DIALOGUES)
def test_message(command: str, message: str, tmp_path: Path) -> None:
    ended = launched(command, tmp_path)
    assert ended.returncode == 2
    assert ended.stderr == message
    assert not list(tmp_path.iterdir())
