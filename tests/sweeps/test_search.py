"""A search over points whose losses are a formula: what is drawn, remembered, survived and continued."""

import math
import sys
from collections.abc import Sequence
from pathlib import Path
from unittest.mock import patch

import pytest
from optuna.distributions import CategoricalDistribution, FloatDistribution, IntDistribution
from optuna.trial import TrialState

from src.config.composition import requests
from src.config.composition.requests import Complete, ConfigPoint, asked
from src.config.composition.space import Choices, Interval, ranges
from src.errors import ConfigError
from src.sweeps import search as searches
from src.sweeps.ledger import Ledger
from src.sweeps.ledger import SweepPoint as Entered
from src.sweeps.search import Optuna, Search, distributions, remembered
from src.tasks.source import completed
from tests.sweeps.points import failed, finished, tree

SPACE = {"optim.lr": "tag(log,interval(1e-5,1e-1))", "seed": "0,1"}


def options(**changed: object) -> Optuna:
    given = {"name": None, "trials": 10, "batch": 4, "sampler": "tpe", "first_random": 4, "seed": 0}
    return Optuna.model_validate(given | changed)


def test_ranges_are_read_in_hydras_grammar() -> None:
    found = ranges(
        SPACE | {"model.n_layers": "int(interval(2,8))", "parallel": "ddp2,fsdp2", "task.steps": "range(1,4)"}
    )
    assert found["optim.lr"] == Interval(1e-5, 1e-1, log=True, whole=False)
    assert found["model.n_layers"] == Interval(2, 8, log=False, whole=True)
    assert (found["parallel"], found["task.steps"]) == (Choices(("ddp2", "fsdp2")), Choices(("1", "2", "3")))
    assert distributions(found) == {
        "optim.lr": FloatDistribution(1e-5, 1e-1, log=True),
        "seed": CategoricalDistribution(("0", "1")),
        "model.n_layers": IntDistribution(2, 8),
        "parallel": CategoricalDistribution(("ddp2", "fsdp2")),
        "task.steps": CategoricalDistribution(("1", "2", "3")),
    }
    assert Interval(1e-5, 1e-1, log=True, whole=False).text(0.000317249) == "0.0003172"
    assert float(Interval(0.12345678, 0.2, log=False, whole=False).text(0.12345679)) >= 0.12345678
    with pytest.raises(ConfigError) as caught:
        ranges({"a": "interval(3,1)", "b": "tag(log,interval(0,1))", "c": "7"})
    assert [line.partition(":")[0] for line in caught.value.problems] == [
        "a=interval(3,1)",
        "b=tag(log,interval(0,1))",
        "c=7",
    ]


def test_a_command_line_with_intervals_asks_for_a_search(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HYDRA_FULL_ERROR", "1")
    with patch.object(sys, "argv", ["launch.py"]):
        found = asked(["-m", "sweep=optuna", "optim.lr=tag(log,interval(1e-5,1e-1))", "seed=0,1", "task.steps=7"])
        assert (found.points, found.space) == ([], SPACE)
        drawn = requests.point(found.fixed, {"optim.lr": "0.002", "seed": "1"})
    assert (drawn.tree["optim"]["lr"], drawn.tree["seed"], drawn.tree["task"]["steps"]) == (0.002, 1, 7)
    assert drawn.overrides["optim.lr"] == "0.002"


class Study:
    """A search without runs: points end by the formula, a batch at a time."""

    def __init__(self, root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        self.root, self.batches, self.interrupt = root, list[int](), False
        self.ledger = Ledger.make(root / "sweeps" / "lr-1", ["-m"], SPACE)
        monkeypatch.setattr(searches, "point", self.point)
        monkeypatch.setattr(searches, "ready", lambda _, points: (points, 0))
        monkeypatch.setattr(searches, "hand_over", self.hand_over)

    def point(self, _: Sequence[str], texts: dict[str, str], complete: Complete) -> ConfigPoint:
        assert complete is completed
        return ConfigPoint(tree(self.root, seed=int(texts["seed"]), optim={"lr": float(texts["optim.lr"])}), texts)

    def hand_over(self, ledger: Ledger, points: Sequence[Entered], *, wait: bool) -> None:
        assert wait
        if points:
            self.batches.append(len(points))
        for count, point in enumerate(points):
            if self.interrupt and count == 1:
                raise KeyboardInterrupt
            ledger.submitted(point)
            rate = float(point.overrides["optim.lr"])
            if rate > 2e-2:
                failed(point, "DivergedError: loss nan")
            elif point.number == 3:
                failed(point, "ValueError: a bug")
            else:
                finished(point, loss=3.0 + (math.log10(rate) + 3) ** 2 + 0.1 * int(point.overrides["seed"]))

    def run(self, **changed: object) -> int:
        return Search(self.ledger, options(**changed), ranges(SPACE), ()).run()


def test_failed_and_diverged_points_are_told_and_survived(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    study = Study(tmp_path, monkeypatch)
    assert study.run(trials=16) == 0
    assert study.batches == [4, 4, 4, 4]
    now = [standing for _, standing in study.ledger.standings()]
    states = [standing.state for standing in now]
    assert len(states) == 16
    assert states[2] == "failed"
    assert set(states) <= {"finished", "failed", "diverged"}
    best = min(standing.loss for standing in now if standing.state == "finished" and standing.loss is not None)
    told = capsys.readouterr().err
    assert f"16 points: {states.count('finished')} finished" in told
    assert f"loss {best:.4f}: " in told
    trials = remembered(options(), ranges(SPACE), study.ledger.standings()).trials
    kinds = {"finished": TrialState.COMPLETE, "failed": TrialState.FAIL, "diverged": TrialState.PRUNED}
    assert [trial.state for trial in trials] == [kinds[state] for state in states]
    assert [trial.value for trial in trials] == [each.loss if each.state == "finished" else None for each in now]
    assert [trial.params["optim.lr"] for trial in trials] == [
        float(point.overrides["optim.lr"]) for point in study.ledger.points()
    ]


def test_an_interrupted_search_goes_on_as_if_it_had_not_been(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "straight").mkdir()
    straight = Study(tmp_path / "straight", monkeypatch)
    straight.run(trials=8)
    broken = Study(tmp_path / "broken", monkeypatch)
    broken.interrupt = True
    with pytest.raises(KeyboardInterrupt):
        broken.run(trials=8)
    broken.interrupt = False
    assert broken.run(trials=8) == 0
    assert broken.batches == [4, 3, 4], "the three that were left open come first"
    overrides = [[point.overrides for point in study.ledger.points()] for study in (straight, broken)]
    assert overrides[0] == overrides[1]
    assert broken.run(trials=12) == 0
    assert len(broken.ledger.points()) == 12


def test_a_search_that_only_fails_stops_early(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    study = Study(tmp_path, monkeypatch)
    monkeypatch.setattr(searches, "hand_over", lambda _, points, **__: [failed(each, "ValueError") for each in points])
    assert study.run(trials=100) == 1
    assert len(study.ledger.points()) == 4


def test_a_space_that_is_used_up_ends_the_search(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    study = Study(tmp_path, monkeypatch)
    space = ranges({"optim.lr": "0.001,0.002", "seed": "0,1"})
    assert Search(study.ledger, options(trials=50), space, ()).run() == 0
    drawn = {tuple(point.overrides.values()) for point in study.ledger.points()}
    assert len(study.ledger.points()) == len(drawn) == 4
