"""Commands of pages that are about something of the reader's own, with that in its place: texts in my/, a run, a sweep.

Other commands of launch.py are those of test_commands.py; README.md and the tutorials are typed as wholes. What is left
is named here, and why.
"""

import json
import re
import shlex
import shutil
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import tokenizers

from src.runs.commands.main import main
from tests.runs.made import PLAN, made
from tests.test_commands import PAGES, PLACEHOLDER, planned
from tests.test_readme import launched

HOME = Path(__file__).parents[1]
PAGES_OF_ALL = [*PAGES, HOME / "CONTRIBUTING.md", HOME / "AGENTS.md"]
ELSEWHERE = re.compile(
    r"hf:|s3://|ALERT_URL|--help|interval\(|model=\.\.\.|\.\.\.$"  # weights, a store, an address; a part of a command
    r"|^(pip install|lm_eval|trackio|mlflow server|torchrun|export|\. \.venv|\.venv/bin/pre-commit)"  # other programs
    r"|src\.metrics\.trackers|src\.train\.coordinates|hellaswag"  # tests/metrics, tests/train; a task of the harness
    r"|^python -m (docs\.reference|src\.config\.comments) --write"  # of the tutorials
)
STEPS = {"@2000": "@1", "@4000": "@2", "@8000": "@3", "step=2000": "step=2", "[800,900,1000]": "[1,2,3]"}
RUNS = ("runs/<run folder>", "runs/stable-1a2b3c4d", "stable-1a2b3c4d", "runs/first", "runs/soup-1a2b3c4d")
SWEEP, NAMES = "runs/sweeps/lr-1a2b3c4d", ("llama3_8b-fsdp8-1a2b3c4d", "lr-1", "lr-2")


def shown() -> list[str]:
    """Every command of every page but the tutorials, as it stands there."""
    found = []
    for page in PAGES_OF_ALL:
        for block in re.findall(r"^```sh\n(.*?)^```", page.read_text(encoding="utf-8"), re.MULTILINE | re.DOTALL):
            lines = (re.split(r"(?:^|\s)#\s", line)[0].strip() for line in block.replace("\\\n", " ").splitlines())
            found += [line for line in lines if line]
    return list(dict.fromkeys(found))


COMMANDS = [each for each in shown() if not ELSEWHERE.search(each)]
OF_LAUNCH = [each for each in COMMANDS if each.startswith("python launch.py") and PLACEHOLDER.search(each)]
OF_RUNS = [each for each in COMMANDS if each.startswith("python -m src.runs") and "runs/first" not in each]
OF_BENCHMARKS = [each for each in COMMANDS if each.startswith("python -m benchmarks.")]
OF_MAKE = [each for each in COMMANDS if each.startswith("make ")]


@pytest.fixture(scope="module")
def mine(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder `my` of texts in every form, tokens and a tokenizer; and a run of three steps with their checkpoints."""
    home = tmp_path_factory.mktemp("reader")
    my = home / "my"
    my.mkdir()
    texts = [f"A text of number {number}, which is not long." for number in range(400)]
    (my / "a.txt").write_text("\n".join(texts))
    (my / "prompts.jsonl").write_text(json.dumps({"prompt": "A text", "text": "A"}) + "\n")
    (my / "rows.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    pq.write_table(pa.table({"text": texts}), my / "rows.parquet")
    shutil.copytree(my, home / "new")
    model = tokenizers.models.BPE({"<|endoftext|>": 0, "a": 1}, [])
    for name in ("gpt2", "llama3"):
        (my / name).mkdir()
        tokenizers.Tokenizer(model).save(str(my / name / "tokenizer.json"))
        (my / name / "tokenizer_config.json").write_text(json.dumps({"eos_token": "<|endoftext|>"}))
    np.array([1, 1, 0] * 9000, np.uint16).tofile(my / "tokens.bin")
    made(my / "runs", "prepare-1")
    words = "name=stable model.dim=64 model.n_layers=1 model.n_heads=4 model.n_kv_heads=4 model.max_seq_len=32768"
    sizes = "task.steps=3 task.seq_len=16 task.global_batch=4 task.validate_every=0 checkpoint.every=1 data=synthetic"
    ended = launched(f"python launch.py folder={home}/run {words} {sizes} checkpoint.keep=null", home / "runs")
    assert ended.returncode == 0, ended.stderr
    return home


@pytest.mark.parametrize("command", OF_LAUNCH)
def test_a_command_about_something_of_the_reader_is_right(command: str, mine: Path) -> None:
    for name in RUNS:
        command = command.replace(name, str(mine / "run"))
    for name, step in STEPS.items():
        command = command.replace(name, step)
    words = [re.sub(r"(?<![\w/])(my|new)/", rf"{mine}/\1/", word) for word in shlex.split(command)[2:]]
    device = [] if any("cluster=slurm" in word for word in words) else ["cluster.gpus=1024"]
    for run, plan in planned(*words, *device, "dry_run=true"):
        assert run.dry_run
        assert plan.world >= 1


def test_a_list_of_one_word_needs_no_brackets() -> None:
    words = ("evaluate.tasks=bits_per_byte", "evaluate.every=10", "tracker=wandb", "tracker.wandb.tags=mine")
    ((run, _),) = planned(*words, "alert.events=failed", "dry_run=true")
    assert (run.evaluate.tasks, run.alert.events) == (("bits_per_byte",), ("failed",))
    assert run.tracker.wandb is not None
    assert run.tracker.wandb.tags == ("mine",)


@pytest.fixture
def root(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("RUNS", raising=False)
    for number, name in enumerate(NAMES):
        for folder in (tmp_path / "runs", tmp_path / SWEEP):
            run = made(folder, name, f"optim.lr={number + 1}e-4", "name=lr")
            (run / "plan.json").write_text(json.dumps(PLAN | {"flops_per_token": 1_000_000}))
    page = (HOME / "docs/papers.md").read_text(encoding="utf-8")
    (tmp_path / "paper.mplstyle").write_text(re.findall(r"^```\n(figure.*?)^```", page, re.MULTILINE | re.DOTALL)[0])
    return tmp_path


@pytest.mark.parametrize("command", OF_RUNS)
def test_a_command_about_runs_is_right(command: str, root: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = shlex.split(command.partition(" >> ")[0])[3:]
    assert main(words) in (0, 1), capsys.readouterr().err
    out = next((word.removeprefix("out=") for word in words if word.startswith("out=")), None)
    assert out is None or (root / out).stat().st_size > 0


@pytest.mark.parametrize("command", OF_BENCHMARKS)
def test_a_benchmark_takes_these_words(command: str) -> None:
    words = shlex.split(command)
    module = HOME / f"{words[2].replace('.', '/')}.py"
    source = (module if module.is_file() else module.with_suffix("") / "__main__.py").read_text(encoding="utf-8")
    assert [word for word in words[3:] if word.startswith("--") and f'"{word}"' not in source] == []


@pytest.mark.parametrize("command", OF_MAKE)
def test_make_has_the_target(command: str) -> None:
    target = shlex.split(command)[1].replace(".venv/installed", "$(READY)")
    assert re.search(rf"^([a-z-]+ )?{re.escape(target)}[ :]", (HOME / "Makefile").read_text(), re.MULTILINE)


def test_no_command_is_left_out() -> None:
    """Each is of one of these kinds, of test_commands.py, or of another program, a store or weights."""
    kinds = {*OF_LAUNCH, *OF_RUNS, *OF_BENCHMARKS, *OF_MAKE}
    left = [each for each in COMMANDS if each not in kinds and "runs/first" not in each]  # README.md's, typed in order
    prefix = ("python launch.py", ".venv/bin/python launch.py")
    assert [each for each in left if not each.startswith(prefix) or PLACEHOLDER.search(each)] == []
    assert len(OF_LAUNCH) >= 15
    assert len(OF_RUNS) >= 10
    blocks = re.compile(r"^```(\w+)$", re.MULTILINE)
    languages = {word for page in PAGES_OF_ALL for word in blocks.findall(page.read_text(encoding="utf-8"))}
    assert languages <= {"sh", "yaml", "python"}, "a block of another kind would not be read"
