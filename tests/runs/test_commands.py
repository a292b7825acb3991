"""`python -m src.runs`: what each command finds, says, changes and leaves alone, over folders of known content."""

import builtins
import json
import os
import shlex
import shutil
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from src.checkpoint.folder import SET_ASIDE, complete
from src.config.tree import difference, read
from src.errors import FolderError
from src.runs.commands import watch
from src.runs.commands.compare import Ranked, show_ranking
from src.runs.commands.main import main
from src.runs.commands.summary import layout, summaries
from src.runs.folder import attempts
from src.runs.lock import Lock
from src.sweeps.commands import folding
from tests.runs.made import checkpoint, composed, made

UPGRADE = Path(__file__).parents[1] / "upgrade" / "f009f55"


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """Four runs: one finished, one failed, one stopped with two checkpoints, one that never began."""
    root = tmp_path / "runs"
    made(root, "big-1", "model=llama3_8b", "optim.lr=3e-4", loss=2.5)
    made(root, "big-2", "model=llama3_8b", "optim.lr=0.002", loss=2.6, ended="failed", said="rank 0: ValueError: bad")
    checkpoint(made(root, "small-3", "seed=7", ended="stopped"), 50, validation_loss=4.0)
    checkpoint(root / "small-3", 60)
    made(root, "new-4", "parallel=tp2_fsdp2", "schedule=cosine", ended="")
    return root


def answer(capsys: pytest.CaptureFixture[str], *argv: object, code: int = 0) -> Any:
    """What a command says to a machine."""
    assert main([*map(str, argv), "--json"]) == code
    return json.loads(capsys.readouterr().out)


def said(capsys: pytest.CaptureFixture[str], *argv: object, code: int = 0) -> str:
    assert main([*map(str, argv)]) == code
    told = capsys.readouterr()
    return told.out + told.err


@pytest.mark.parametrize(
    ("conditions", "names"),
    [
        ([], {"big-1", "big-2", "small-3", "new-4"}),
        (["state=failed,stopped"], {"big-2", "small-3"}),
        (["state!=finished", "attempts>0"], {"big-2", "small-3"}),
        (["model=llama3_8b", "optim.lr<1e-3"], {"big-1"}),
        (["model=llama3_debug"], {"small-3", "new-4"}),
        (["seed=7"], {"small-3"}),
        (["parallel.tensor>=2"], {"new-4"}),
        (["schedule=cosine"], {"new-4"}),
        (["name=big*", "age>2d"], {"big-1", "big-2"}),
        (["loss<2.6", "layout=tp2_fsdp4"], {"big-1"}),
        (["big"], {"big-1", "big-2"}),
        (["optim.none=1"], set()),
    ],
)
def test_list_finds_what_fulfils_the_conditions(
    root: Path, conditions: list[str], names: set[str], capsys: pytest.CaptureFixture[str]
) -> None:
    found = answer(capsys, "list", "--root", root, *conditions, code=0 if names else 1)
    assert {each["name"] for each in found} == names


@pytest.mark.parametrize(
    ("argv", "words"),
    [
        (["list", "stat=failed"], "stat: no such key of a run; did you mean state?"),
        (["list", "optim.lr<fast"], "'fast' is no number, nor a time such as 2d"),
        (["show", "smal-3"], "no run of ROOT; did you mean small-3?"),
        (["list", "s3://lab/runs"], "is a URL, of which only `python -m src.runs checkpoint s3://lab/runs` tells"),
        (["show", "big"], "big: 2 runs; name one of them: big-1, big-2"),
        (["show", "src"], "src: no run is in this folder; give a run's folder, or its name below ROOT"),
        (["list", "--root", "nowhere"], "nowhere: cannot be listed (No such file or directory)"),
        (["fork", "small-3@7"], "has no complete checkpoint of that step; it has 50, 60"),
        (["fork", "small-3@last"], "'last' behind @ is no step; write small-3@1000"),
        (["fork", "small-3", "fast"], "fast: write key=value"),
        (["extend", "small-3", "steps=100"], "steps=100: the run has 100 steps and goes on after step 60; pass more"),
        (["extend", "small-3", "optim.lr=1"], "any other key makes another run"),
        (["extend", "small-3", "steps=many"], "task.steps: 'many' is not a whole number"),
        (
            ["extend", "small-3", "steps=200", "schedule.total_steps=150"],
            "the learning rate is 0 from there to step",
        ),
        (["extend", "small-3", "steps=200", "schedule=wds"], "schedule=wds: no such option; there are: constant"),
        (["checkpoint", "big-1"], "no checkpoint; name a folder step_XXXXXXXX, or a run folder that holds some"),
        (["compare", "big-1"], "compare: 1 run; name two or more"),
    ],
)
def test_a_mistake_is_told_in_one_line_with_code_2(
    root: Path, argv: list[str], words: str, capsys: pytest.CaptureFixture[str]
) -> None:
    before = sorted(root.rglob("*"))
    where = [] if "--root" in argv else ["--root", root]
    assert words.replace("ROOT", str(root)) in said(capsys, *argv, *where, code=2)
    assert sorted(root.rglob("*")) == before


def test_a_thousand_folders_cost_a_few_small_reads_each(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    first = made(tmp_path, "run-000")
    for number in range(1, 1000):
        (tmp_path / f"run-{number:03d}").mkdir()
        for each in first.iterdir():
            os.link(each, tmp_path / f"run-{number:03d}" / each.name)
    opened = Counter[str]()
    really = builtins.open

    def counted(path: Any, *rest: Any, **options: Any) -> Any:
        opened[Path(os.fspath(path)).name] += 1
        return really(path, *rest, **options)

    monkeypatch.setattr(builtins, "open", counted)
    monkeypatch.setattr("io.open", counted)
    assert len(answer(capsys, "list", "--root", tmp_path)) == 1000
    assert opened == dict.fromkeys(("attempts.jsonl", "metrics.jsonl", "plan.json"), 1000)
    opened.clear()
    assert len(answer(capsys, "list", "--root", tmp_path, "optim.lr<1")) == 1000
    assert sum(opened.values()) == 4000  # and config.yaml, of which one section is parsed


def test_show_tells_what_a_run_is_what_happened_and_what_to_type(
    root: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    found = answer(capsys, "show", "big-2", "--root", root)
    assert found["config"].items() >= {"model": "llama3_8b", "optim.lr": "0.002"}.items()
    assert (found["state"], found["step"], found["steps"], found["layout"]) == ("failed", 60, 200, "tp2_fsdp4")
    assert found["attempts"][0]["detail"].endswith("rank 0: ValueError: bad")
    assert found["commands"]["go on"] == f"python launch.py folder={root / 'big-2'}"
    text = said(capsys, "show", "small-3", "--root", root)
    assert "seed=7" in text
    assert "492k" in text  # tokens of the checkpoint after step 60
    assert f"fork: python -m src.runs fork {root / 'small-3'}" in text


def test_a_folder_that_an_older_version_wrote_is_read(capsys: pytest.CaptureFixture[str]) -> None:
    folder = UPGRADE / "llama3-74a7757c"
    assert answer(capsys, "show", folder)["checkpoints"][0]["step"] == 31
    found = answer(capsys, "checkpoint", folder / "checkpoints" / "step_00000031", "--full")
    assert found["tensors"]["model.norm.weight"]["dtype"] == "float32"
    assert found["checkpoints"][0]["whole"]


def test_a_run_that_lives_is_told_with_what_stops_it(root: Path, capsys: pytest.CaptureFixture[str]) -> None:
    lock = root / "small-3" / "lock"
    lock.write_text(json.dumps({"pid": 7, "host": "elsewhere", "job": None, "since": "2026-01-01T00:00:00+00:00"}))
    found = answer(capsys, "show", "small-3", "--root", root)
    assert (found["state"], found["where"]) == ("running", "elsewhere")
    assert found["commands"]["stop"] == "ssh elsewhere kill -TERM 7"
    assert "go on" not in found["commands"]
    with pytest.raises(FolderError, match="the run is live"):
        Lock(lock).take()
    assert "the run is live" in said(capsys, "extend", "small-3", "steps=300", "--yes", "--root", root, code=2)
    assert "it is running" in said(capsys, "clean", "small-3", "--yes", "--root", root)
    assert (root / "small-3").is_dir()


@pytest.mark.parametrize("width", [80, 100, 160])
def test_a_ranking_of_many_keys_is_read_on_any_terminal(width: int, tmp_path: Path) -> None:
    """Keys in a paragraph where columns of their own would have no letter left."""
    (run,) = summaries([made(tmp_path, "small-1")])
    found = [Ranked(run, 2.5, 2.25, 100)] * 2
    screen = Console(width=width)
    for count in (1, 14):
        with screen.capture() as drawn:
            show_ranking(screen, found, "loss", {f"section.key_{number}": ["128", "256"] for number in range(count)})
        words = drawn.get().split()
        assert {"small-1", "2.25", "128" if count == 1 else "section.key_13=128"} <= {*words}
        assert "…" not in drawn.get()
        assert max(map(len, drawn.get().splitlines())) <= width


def test_a_table_on_a_narrow_terminal_is_not_cut() -> None:
    table, screen = folding("run", "why"), Console(width=40)
    table.add_row("x" * 30, "y" * 50)
    with screen.capture() as drawn:
        screen.print(table)
    assert (drawn.get().count("x"), drawn.get().count("y")) == (30, 51)


def test_best_and_compare_rank_and_tell_apart(root: Path, capsys: pytest.CaptureFixture[str]) -> None:
    found = answer(capsys, "best", "--root", root)
    assert [each["name"] for each in found] == ["big-1", "big-2", "small-3"]
    assert found[0]["config"]["optim.lr"] == "0.0003"
    assert "task.log_every" not in found[0]["config"], "what is the same in all"
    assert "no run has it; there are checkpoint/stall_seconds" in said(
        capsys, "best", "metric=x", "--root", root, code=1
    )
    found = answer(capsys, "compare", "big", "--root", root)
    assert found["config"] == {"optim.lr": ["0.0003", "0.002"]}
    assert [each["validation loss"] for each in found["runs"].values()] == [2.5, 2.6]
    page = Path(found["page"]).read_text()
    assert page.count('data-kind="curves"') >= 2
    assert "0.0003" in page


def test_a_checkpoint_that_is_not_whole_is_told_with_code_1(root: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = root / "small-3" / "checkpoints"
    assert [each["tokens"] for each in answer(capsys, "checkpoint", root / "small-3")["checkpoints"]] == [
        409600,
        491520,
    ]
    (folder / "step_00000060" / "values.json").write_text("{}")
    (folder / "step_00000070").mkdir()
    found = answer(capsys, "checkpoint", root / "small-3", code=1)
    assert [each["whole"] for each in found["checkpoints"]] == [True, False]
    assert "truncated or overwritten" in next(iter(found["faults"].values()))[0]
    assert "no COMPLETE.json" in said(capsys, "checkpoint", folder / "step_00000070", code=1)


def test_extend_says_what_the_schedule_does_and_changes_nothing_without_yes(
    root: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    argv = ("schedule=wsd", "task.steps=200", "schedule.decay_ratio=0.2", "schedule.min_factor=0.1")
    folder = made(root, "wsd-5", *argv)
    for step in (150, 200):
        checkpoint(folder, step)
    before = (folder / "config.yaml").read_bytes()
    text = said(capsys, "extend", "wsd-5", "steps=400", "--root", root)
    assert "task.steps: 200 -> 400" in text
    assert "the rate had decayed and rises again" in text
    assert f"from before the decay: extend {folder}@150" in text
    assert "without a rise: schedule.total_steps=200" in text
    assert (folder / "config.yaml").read_bytes() == before
    text = said(capsys, "extend", "wsd-5@150", "steps=400", "--yes", "--root", root)
    assert "rises again" not in text
    assert f"to go on: python launch.py folder={folder}" in text
    assert difference(composed(*argv), read(folder / "config.yaml")) == ["task.steps: 200 -> 400"]
    assert [path.name for path in complete(folder / "checkpoints")] == ["step_00000150"]
    assert (folder / "checkpoints" / f"step_00000200{SET_ASIDE}").is_dir()
    (run,) = summaries([folder])
    assert run.state == "stopped"
    assert attempts(folder)[0].detail.endswith("finished 200 steps; extended to 400")
    assert attempts(folder)[0].detail.startswith("2023-11-14T")  # when it ended, not when it was extended


def test_fork_prints_a_command_that_asks_for_the_same_and_what_was_typed(
    root: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    argv = ("model=llama3_1b", "data=mixture", "data.weights.code=0.5", "task.sample_prompt=it's, a [test]", "seed=3")
    folder = made(root, "odd-6", *argv, "tracker=tensorboard", "cluster.grace_seconds=7")
    checkpoint(folder, 40)
    text = said(capsys, "fork", "odd-6@40", "optim.lr=1e-5", "--root", root)
    program, file, *forked = shlex.split(text)
    assert (program, file) == ("python", "launch.py")
    tree = composed(*forked)
    changed = [line.partition(":")[0] for line in difference(composed(*argv), tree, steering=True)]
    assert changed == ["optim.lr", "checkpoint.initial"]
    assert tree["optim"]["lr"] == 1e-5
    assert tree["checkpoint"]["initial"] == str(folder / "checkpoints" / "step_00000040")
    assert tree["cluster"]["grace_seconds"] == 7
    assert tree["tracker"]["tensorboard"] is not None


def test_clean_removes_what_nobody_needs_and_only_with_yes(root: Path, capsys: pytest.CaptureFixture[str]) -> None:
    half = root / "small-3" / "checkpoints" / "step_00000070"
    half.mkdir()
    (half / "a").write_bytes(b"x" * 2048)
    assert "1 would go and free 2 KiB; --yes does it" in said(capsys, "clean", "--root", root)
    assert half.is_dir()
    assert "1 removed" in said(capsys, "clean", "--root", root, "--yes")
    assert not half.exists()
    made(root, "child-5", f"checkpoint.initial={root / 'small-3'}", ended="")
    text = said(capsys, "clean", "state=stopped,failed", "--yes", "--root", root)
    assert "child-5 starts from it and has saved nothing yet" in text
    assert {each.name for each in root.iterdir()} == {"big-1", "small-3", "new-4", "child-5"}
    checkpoint(root / "child-5", 10)  # from now on it has its own
    said(capsys, "clean", "state=stopped,failed", "--yes", "--root", root)
    assert {each.name for each in root.iterdir()} == {"big-1", "new-4", "child-5"}


def test_clean_keeps_tokens_that_a_run_reads(root: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for name in ("used", "unused", "fresh"):
        (root / "cache" / "tokens" / name).mkdir(parents=True)
        if name != "fresh":
            os.utime(root / "cache" / "tokens" / name, (1e9, 1e9))
    (root / "big-1" / "data.json").write_text(json.dumps({"parts": [["a", 1.0, "used"]]}))
    found = answer(capsys, "clean", "--caches", "--yes", "--root", root)
    assert [Path(each).name for each in found["removed"]] == ["unused"]
    assert {each.name for each in (root / "cache" / "tokens").iterdir()} == {"used", "fresh"}
    shutil.rmtree(root / "big-1")
    os.utime(root / "cache" / "tokens" / "used", (1e9, 1e9))
    assert len(answer(capsys, "clean", "--caches", "--root", root)["items"]) == 2


def test_watch_says_each_change_once_and_ends_with_the_run(root: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert watch.bars([3.0, 2.0, 1.0, float("nan")]) == "█▅▁"
    assert said(capsys, "watch", "big-1", "--root", root).startswith("big-1  finished  step 200/200  loss 2.")
    assert "rank 0: ValueError: bad" in said(capsys, "watch", "big-2", "--root", root, code=1)


@pytest.mark.parametrize(
    ("plan", "name"),
    [
        ({}, ""),
        ({"axes": {}}, "single"),
        ({"axes": {"replicate": 2, "shard": 4}}, "hsdp2x4"),
        ({"axes": {"pipeline": 2, "context": 2, "tensor": 2}, "groups": 2}, "2 x pp2_cp2_tp2"),
        ({"axes": {"shard": 4}, "expert_axes": {"expert": 2, "expert_shard": 2}}, "fsdp4_ep2"),
    ],
)
def test_a_layout_has_the_words_of_conf(plan: dict[str, Any], name: str) -> None:
    assert layout(plan) == name
