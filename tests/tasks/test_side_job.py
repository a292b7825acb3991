"""Commands beside a run: started once for each checkpoint that is due, and heard of once."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from src.evaluation.chosen import problems
from src.evaluation.config import Evaluation
from src.launch.start import Shared, checked
from src.launch.start import start as launch
from src.tasks.evaluate.side_job import SideJobs, place, words
from tests.end_to_end.lives import TINY, live, opened, records, write_text
from tests.evaluation.test_task_file import options
from tests.ranks import RankPool

SECONDS = "evaluate/short_texts/seconds"


class Ended:
    """A command that has ended."""

    def __init__(self, code: int | None) -> None:
        self.code = code

    def poll(self) -> int | None:
        return self.code


class Commands:
    """Remembers what was started."""

    def __init__(self, code: int | None = None) -> None:
        self.code, self.started = code, list[list[str]]()

    def __call__(self, arguments: Sequence[str], _log: Path) -> Ended:
        self.started.append(list(arguments))
        return Ended(self.code)


def beside(**changes: Any) -> Evaluation:
    return options(**({"every": 4, "tasks": ["short_texts"], "cluster": "local", "samples": 3} | changes))


def checkpoint(folder: Path, *steps: int) -> None:
    for step in steps:
        path = folder / f"checkpoints/step_{step:08d}"
        path.mkdir(parents=True)
        (path / "COMPLETE.json").write_text("{}")


def scored(folder: Path, step: int, seconds: float) -> None:
    place(folder, step).mkdir(parents=True)
    told = {"tasks": {SECONDS: seconds, "evaluate/short_texts/bits_per_byte": 2.5}}
    (place(folder, step) / "evaluation.json").write_text(json.dumps(told))


def steps_of(commands: Commands) -> list[str]:
    return [word for words in commands.started for word in words if word.startswith("step=")]


def test_each_checkpoint_that_is_due_has_one_command(tmp_path: Path) -> None:
    commands = Commands()
    jobs = SideJobs(beside(), tmp_path, tmp_path, 10, commands)
    checkpoint(tmp_path, 3, 4)
    assert len(jobs.ask()) == 1
    checkpoint(tmp_path, 8, 10)  # the last one is due, too
    assert len(jobs.ask()) == 2
    assert jobs.ask() == []
    assert steps_of(commands) == ["step=4", "step=8", "step=10"]
    assert jobs.open_steps() == [4, 8, 10]
    assert all("ema=false" in each for each in commands.started)
    averages = beside(ema=True)
    assert problems(averages, averaged=True, saves_every=4) == []
    assert "ema=true" in words(averages, tmp_path, tmp_path, 4)


def test_a_later_life_asks_again_for_what_has_no_scores(tmp_path: Path) -> None:
    """The launcher refuses one that is queued, and one that has ended says so."""
    checkpoint(tmp_path, 4, 8)
    scored(tmp_path, 4, 1.25)
    commands = Commands()
    SideJobs(beside(), tmp_path, tmp_path, 12, commands).ask()
    assert steps_of(commands) == ["step=8"]


def test_scores_are_heard_of_once_whatever_comes_between(tmp_path: Path) -> None:
    checkpoint(tmp_path, 4)
    scored(tmp_path, 4, 1.25)
    first = SideJobs(beside(), tmp_path, tmp_path, 12, Commands())
    ((step, numbers, lines),) = first.collect()
    assert (step, numbers[SECONDS], lines) == (4, 1.25, ["short_texts: bits_per_byte 2.500"])
    assert list(first.collect()) == []
    killed_before_it_was_recorded = SideJobs(beside(), tmp_path, tmp_path, 12, Commands())
    assert [each[0] for each in killed_before_it_was_recorded.collect()] == [4]
    (tmp_path / "metrics.jsonl").write_text(json.dumps({"step": 4, "attempt": 1, "time": 1.0, **numbers}) + "\n")
    after = SideJobs(beside(), tmp_path, tmp_path, 12, Commands())
    assert list(after.collect()) == []


def test_a_command_that_fails_is_told_with_its_log(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pauses: list[float] = []
    monkeypatch.setattr("src.tasks.evaluate.side_job.time.sleep", pauses.append)
    checkpoint(tmp_path, 4)
    jobs = SideJobs(beside(), tmp_path, tmp_path, 12, Commands(code=2))
    jobs.ask()
    assert jobs.failures() == [f"warning: the evaluation of step 4 ended with code 2: {place(tmp_path, 4)}.log"]
    assert jobs.failures() == []
    jobs.wait(60.0)  # for nothing
    assert pauses == []


@pytest.mark.parametrize(
    ("keys", "words_of_it"),
    [
        (
            ("evaluate.every=5",),
            "evaluate.every=5 with evaluate.cluster=local reads checkpoints, and checkpoint.every=6",
        ),
        (("evaluate.cluster=slrum",), "did you mean slurm?"),
    ],
)
def test_what_could_not_be_read_is_refused(keys: tuple[str, ...], words_of_it: str, tmp_path: Path) -> None:
    from src.errors import UserError

    asked = ("evaluate.every=6", "evaluate.tasks=[short_texts]", "evaluate.cluster=local", *keys)
    with pytest.raises(UserError) as caught:
        opened(*TINY, *write_text(tmp_path), f"root={tmp_path / 'runs'}", *asked)
    assert words_of_it in str(caught.value)


def written(folder: Path, log: Path) -> bool | tuple[str, ...]:
    """A life that writes down the commands it would start."""

    def begin(_self: Any, arguments: Sequence[str], _log: Path) -> Ended:
        with log.open("a") as file:
            file.write(json.dumps(list(arguments)) + "\n")
        return Ended(1)

    defaults = SideJobs.__init__.__defaults__
    SideJobs.__init__.__defaults__ = (lambda arguments, place: begin(None, arguments, place),)
    try:
        return live(folder)
    finally:
        SideJobs.__init__.__defaults__ = defaults


def test_scores_of_commands_are_those_of_the_ranks_that_train(tmp_path: Path, ranks: RankPool) -> None:
    """The commands of a run, run after it has ended; the same command again enters their scores, once."""
    source, root = write_text(tmp_path), f"root={tmp_path / 'runs'}"
    keys = ("evaluate.every=6", "evaluate.tasks=[bits_per_byte,english_spelling]", "evaluate.samples=6")
    inside = opened(*TINY, *source, root, *keys, "name=inside")
    assert ranks(1, live, inside) == [True]
    aside = opened(*TINY, *source, root, *keys, "name=aside", "evaluate.cluster=local", "evaluate.wait_seconds=0")
    assert ranks(1, written, aside, tmp_path / "commands") == [True]
    commands = [json.loads(line) for line in (tmp_path / "commands").read_text().splitlines()]
    assert [argv[2] for argv in commands] == ["step=6", "step=12"]
    for argv in commands:
        folder = opened(*argv, "cluster.gpus=0")
        assert ranks(1, live, folder) == [True]
    for _ in range(2):
        again(*TINY, *source, root, *keys, "name=aside", "evaluate.cluster=local")
    assert numbers_of(aside) == pytest.approx(numbers_of(inside), rel=1e-5)


def again(*argv: str) -> None:
    """The launcher's part of the same command."""
    from src.config.composition.requests import asked
    from src.tasks.source import completed

    ((tree, run, planned),) = checked(asked(list(argv), completed).trees)
    assert launch(tree, run, planned, Shared())[1] == 0


def numbers_of(folder: Path) -> dict[tuple[int, str], float]:
    """All scores; AssertionError where one is there twice."""
    found: dict[tuple[int, str], float] = {}
    for line in records(folder):
        for name, value in line.items():
            if name.startswith("evaluate/") and not name.endswith("seconds"):
                assert (line["step"], name) not in found
                found[line["step"], name] = value
    return found
