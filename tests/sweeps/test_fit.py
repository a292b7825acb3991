"""Scaling laws: a known one is found again, intervals hold it, and a run that was left out is foretold."""

import json
import math
from pathlib import Path
from typing import Any
from unittest.mock import patch

import numpy as np
import pytest

from src.errors import DataError
from src.runs.records import PLAN_FILE
from src.sweeps import fit as command
from src.sweeps.report.scaling import figures_of
from src.sweeps.scaling_law import Observation, ScalingLaw, fit, growth, parabolas

CHINCHILLA = ScalingLaw(1.69, 406.4, 410.7, 0.34, 0.28)  # of Hoffmann et al. 2022, approach 3


def runs(law: ScalingLaw, noise: float = 0.0, seed: int = 0) -> list[Observation]:
    """Four isoFLOP curves of five sizes around the best."""
    chance, found = np.random.default_rng(seed), []
    for flops in (1e15, 1e16, 1e17, 1e18):
        best = math.sqrt(flops / 6 / 20)
        for factor in (0.25, 0.5, 1.0, 2.0, 4.0):
            size = best * factor
            tokens = flops / 6 / size
            loss = law.loss(size, tokens) * math.exp(noise * chance.standard_normal())
            found.append(Observation(len(found) + 1, f"scale={size:.0f}", size, tokens, flops, loss))
    return found


def test_the_law_that_made_the_losses_is_found() -> None:
    found = fit(runs(CHINCHILLA), resampled=40).law
    for name in ("floor", "alpha", "beta"):
        assert getattr(found, name) == pytest.approx(getattr(CHINCHILLA, name), rel=0.01)
    assert found.exponent == pytest.approx(0.28 / 0.62, rel=0.01)


@pytest.mark.slow
def test_intervals_hold_what_is_true_and_a_larger_run_is_foretold() -> None:
    """With the scatter of real runs, half a percent of the loss; the largest is ten times beyond all others."""
    held = 0
    for seed in range(3):
        found = fit(runs(CHINCHILLA, noise=0.005, seed=seed), resampled=40)
        size = math.sqrt(1e19 / 120)
        truth = CHINCHILLA.loss(size, 20 * size)
        loss, low, high = found.foretold(size, 20 * size)
        assert low < loss < high
        assert high - low < 0.2 * truth
        held += low <= truth <= high
    assert held >= 2  # 95 % of many


def test_an_outlier_moves_little() -> None:
    """A run that diverged: the Huber loss counts it as one that is far away, not by the square of how far."""
    spoilt = runs(CHINCHILLA)
    spoilt[7] = Observation(8, "", spoilt[7].parameters, spoilt[7].tokens, spoilt[7].flops, 2 * spoilt[7].loss)
    found = fit(spoilt, resampled=40).law
    size = math.sqrt(1e18 / 120)
    assert found.loss(size, 20 * size) == pytest.approx(CHINCHILLA.loss(size, 20 * size), rel=0.01)


def test_parabolas_find_the_best_size_of_each_amount_of_compute() -> None:
    found = parabolas(runs(CHINCHILLA))
    assert [round(math.log10(each.flops)) for each in found] == [15, 16, 17, 18]
    assert [len(each.numbers) for each in found] == [5, 5, 5, 5]
    for each in found:
        sizes = np.geomspace(each.smallest, each.largest, 2000)
        truth = min(sizes, key=lambda size: CHINCHILLA.loss(size, each.flops / 6 / size))
        assert each.best_size == pytest.approx(truth, rel=0.2)  # a parabola of five sizes is no curve
    assert growth(found) == pytest.approx(CHINCHILLA.exponent, abs=0.03)
    assert parabolas(runs(CHINCHILLA)[:2]) == []
    rising = [Observation(n, "", 10.0**n, 1.0, 1e9, float(n)) for n in (1, 2, 3)]
    assert parabolas(rising)[0].best_size is None


class Sweep:
    """As much of a ledger as the command asks."""

    def __init__(self, path: Path, found: list[Observation]) -> None:
        self.path = path
        self._rows: list[tuple[Any, Any]] = []
        for each in found:
            folder = path / f"run-{each.number}"
            folder.mkdir(parents=True)
            facts = {"active_parameters": round(each.parameters), "tokens": round(each.tokens)}
            facts["flops_per_token"] = round(each.flops / each.tokens)
            (folder / PLAN_FILE).write_text(json.dumps(facts))
            point = type("P", (), {"folder": folder, "number": each.number, "overrides": {"scale": str(each.number)}})()
            self._rows.append((point, type("S", (), {"state": "finished", "loss": each.loss})()))

    def standings(self) -> list[tuple[Any, Any]]:
        return self._rows

    def points(self) -> list[Any]:
        return [point for point, _ in self._rows]

    def swept(self) -> list[str]:
        return ["scale"]


def test_the_command_foretells_the_largest_run_and_its_page_has_both_figures(tmp_path: Path) -> None:
    larger = Observation(21, "", 4e8, 8e9, 2e19, CHINCHILLA.loss(4e8, 8e9))
    sweep: Any = Sweep(tmp_path, [*runs(CHINCHILLA, noise=0.003), larger])
    facts = command.fitted(sweep, None, 60)
    (left_out,) = facts["left_out"]
    assert left_out["number"] == 21
    assert left_out["inside"]
    told = "\n".join(command.lines(facts))
    assert "warning" not in told
    bound = facts | {"law": facts["law"] | {"alpha": 1.0}}
    assert "warning: alpha=1 is the bound of the search: these runs do not tell it" in "\n".join(command.lines(bound))
    assert "20 runs fitted" in told
    assert "left out: run 21 (scale=21)" in told
    assert told.count(" FLOPs, runs ") == 4
    assert command.write(sweep, facts).name == "fit.json"
    figures = figures_of(json.loads((tmp_path / "fit.json").read_text()))
    assert list(figures) == ["IsoFLOP curves", "Scaling law"]
    names = [trace["name"] for trace in figures["Scaling law"]["traces"]]
    assert "left out: run 21" in names
    assert "foretold: run 21" in names
    assert figures_of({}) == {}
    nobody = command.fitted(sweep, [], 40)
    assert nobody["left_out"] == []
    assert len(nobody["runs"]) == 21


def test_what_is_missing_is_said(tmp_path: Path) -> None:
    few: Any = Sweep(tmp_path / "few", runs(CHINCHILLA)[:5])
    with pytest.raises(DataError, match="5 finished runs to fit, and a law of five numbers takes 6 or more"):
        command.fitted(few, None, 40)
    with pytest.raises(DataError, match="no finished run 77 to leave out"):
        command.fitted(few, [77], 40)
    same = [Observation(n, "", 1e6, 1e6 * n, 1e12, 3.0) for n in range(1, 9)]
    one: Any = Sweep(tmp_path / "one", same)
    with pytest.raises(DataError, match="all runs have one size"):
        command.fitted(one, None, 40)
    (tmp_path / "few/run-1" / PLAN_FILE).write_text("{}")  # of a run that was never planned
    with patch.object(command, "FEWEST", 4):
        assert len(command.observations(few)) == 4
