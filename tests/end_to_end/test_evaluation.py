"""Scores while a run trains: at their step, once, whatever stops it; and losses that do not notice."""

import json
import shutil
import signal
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from src.evaluation.recorded import unscored
from tests.end_to_end.lives import TINY, Shot, live, opened, records, series, write_text
from tests.ranks import RankPool

TASKS = ("evaluate.every=4", "evaluate.tasks=[bits_per_byte,english_spelling,copy_words]", "evaluate.samples=6")
ACCURACY = "evaluate/english_spelling/acc"


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, ...]:
    return write_text(tmp_path_factory.mktemp("text"))


def begun(root: Path, text: tuple[str, ...], *changes: str) -> Path:
    return opened(*TINY, *text, f"root={root}", *changes)


def scores(folder: Path) -> dict[int, dict[str, float]]:
    """By step, without what differs from run to run; AssertionError where a step has two."""
    found: dict[int, dict[str, float]] = {}
    for line in records(folder):
        numbers = {name: value for name, value in line.items() if name.startswith("evaluate/")}
        if numbers:
            assert line["step"] not in found
            found[line["step"]] = {name: value for name, value in numbers.items() if not name.endswith("seconds")}
    return found


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory, text: tuple[str, ...], ranks: RankPool) -> Path:
    folder = begun(tmp_path_factory.mktemp("undisturbed"), text, *TASKS)
    assert ranks(1, live, folder) == [True]
    return folder


def test_scores_are_at_their_steps_and_losses_are_untouched(
    undisturbed: Path, text: tuple[str, ...], ranks: RankPool, tmp_path: Path
) -> None:
    plain = begun(tmp_path, text)
    assert ranks(1, live, plain) == [True]
    assert series(plain) == series(undisturbed)
    assert plain.name == undisturbed.name  # scores decide no number: the same run
    found = scores(undisturbed)
    assert list(found) == [4, 8, 12]
    assert set(found[12]) == {
        *(f"evaluate/bits_per_byte/text{end}" for end in ("", "_stderr")),
        *(f"{ACCURACY}{end}" for end in ("", "_stderr")),
        *(f"evaluate/copy_words/exact_match{end}" for end in ("", "_stderr")),
    }


def test_bits_per_byte_are_those_of_the_task_evaluate(
    undisturbed: Path, ranks: RankPool, tmp_path: Path, text: tuple[str, ...]
) -> None:
    folder = opened("task=evaluate", f"run={undisturbed}", "samples=6", *text, f"root={tmp_path}", "cluster.gpus=0")
    assert ranks(1, live, folder) == [True]
    (one,) = json.loads((folder / "evaluation.json").read_text())["scores"].values()
    assert scores(undisturbed)[12]["evaluate/bits_per_byte/text"] == pytest.approx(one["bits_per_byte"], rel=1e-6)


@pytest.mark.parametrize("at", [2, 9])
def test_an_evaluation_that_a_stop_cut_off_is_made_good(
    at: int, undisturbed: Path, text: tuple[str, ...], ranks: RankPool, tmp_path: Path
) -> None:
    """In the first evaluation, and in the second: batches of one row."""
    folder = begun(tmp_path, text, *TASKS)
    assert ranks(1, live, folder, Shot("evaluation", signal.SIGTERM, at=at)) == [False]
    before = scores(folder)
    assert ranks(1, live, folder) == [True]
    assert scores(folder) == scores(undisturbed)
    assert series(folder) == series(undisturbed)
    assert len(before) < 3


def test_steps_that_are_taken_again_are_not_scored_again(
    undisturbed: Path, ranks: RankPool, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    """A kill after the scores of step 8, before a checkpoint: the next life comes by with the same bits."""
    folder = tmp_path / undisturbed.name
    shutil.copytree(undisturbed, folder)
    shutil.rmtree(folder / "checkpoints/step_00000012")
    assert ranks(1, live, folder) == [True]
    assert scores(folder) == scores(undisturbed)
    taken = Counter(line["step"] for line in records(folder) if "loss" in line)
    assert taken[8] == 2


def test_other_weights_of_the_same_step_are_scored_anew(tmp_path: Path) -> None:
    def write(*lines: dict[str, Any]) -> None:
        (tmp_path / "metrics.jsonl").write_text("".join(json.dumps({"step": 8} | line) + "\n" for line in lines))

    step = {"loss": 2.0, "grad_norm": 1.0, "lr": 1e-3}
    scored = {"evaluate/words/seconds": 1.0, "evaluate/words/acc": 0.5}
    assert unscored(tmp_path, ["words"], 8) == []  # nothing is known of the step
    write(step)
    assert unscored(tmp_path, ["words"], 8) == ["words"]
    write(step, scored)
    assert unscored(tmp_path, ["words", "more"], 8) == ["more"]
    write(step, scored, step)
    assert unscored(tmp_path, ["words"], 8) == []
    write(step, scored, step | {"loss": 2.1})
    assert unscored(tmp_path, ["words"], 8) == ["words"]
    write(step, scored, step | {"loss": 2.1}, scored)
    assert unscored(tmp_path, ["words"], 8) == []


@pytest.mark.slow
def test_the_average_is_scored_where_it_is_asked_for(
    undisturbed: Path, text: tuple[str, ...], ranks: RankPool, tmp_path: Path
) -> None:
    folder = begun(tmp_path, text, *TASKS, "task.ema_decay=0.9", "evaluate.ema=true", "task.validate_every=4")
    assert ranks(1, live, folder) == [True]
    assert series(folder) == series(undisturbed)
    bits = [each["evaluate/bits_per_byte/text"] for each in scores(folder).values()]
    plain = [each["evaluate/bits_per_byte/text"] for each in scores(undisturbed).values()]
    assert bits != plain
    averaged = series(folder, "validation_loss_ema")
    assert sorted(averaged) == [4, 8, 12]
    assert sorted(bits, reverse=True) == bits  # as the average falls
    argv = ("task=evaluate", f"run={folder}", "ema=true", "samples=6", *text, f"root={tmp_path}", "cluster.gpus=0")
    command = opened(*argv)
    assert ranks(1, live, command) == [True]
    (one,) = json.loads((command / "evaluation.json").read_text())["scores"].values()
    assert bits[-1] == pytest.approx(one["bits_per_byte"], rel=1e-6)
