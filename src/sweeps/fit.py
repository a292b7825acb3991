"""`python -m src.sweeps fit <folder>`: a scaling law through the finished runs of a sweep, and what it foretells."""

import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from src.errors import DataError
from src.metrics.history import Series, read
from src.runs.records import PLAN_FILE
from src.storage.atomic_write import atomic_write
from src.storage.json_lines import facts_in
from src.sweeps.ledger import Ledger
from src.sweeps.report.scaling import FIT_FILE
from src.sweeps.scaling_law import FEWEST, STEEPEST, FittedLaw, Observation, Parabola, fit, growth, parabolas

NUMBERS = {"floor": "E", "size": "A", "data": "B", "alpha": "alpha", "beta": "beta"}
CURVE_POINTS = 60


def observations(ledger: Ledger) -> list[Observation]:
    """Finished runs whose plan says what they spent, in the order of asking."""
    swept, found = ledger.swept(), []
    for point, now in ledger.standings():
        facts = facts_in(point.folder / PLAN_FILE)
        if now.state != "finished" or now.loss is None or not math.isfinite(now.loss) or not facts:
            continue
        sizes = [facts.get(key) for key in ("active_parameters", "tokens", "flops_per_token")]
        if not all(isinstance(each, int) and each > 0 for each in sizes):
            continue
        parameters, tokens, per_token = (float(each or 0) for each in sizes)
        label = " ".join(f"{key.rpartition('.')[2]}={point.overrides.get(key, '')}" for key in swept)
        found.append(Observation(point.number, label, parameters, tokens, tokens * per_token, now.loss))
    return found


def fitted(ledger: Ledger, left_out: Sequence[int] | None, resampled: int) -> dict[str, Any]:
    """The facts of fit.json. DataError where runs are missing. `left_out`: numbers; None: that of the most compute."""
    runs = observations(ledger)
    if strangers := set(left_out or ()) - {each.number for each in runs}:
        raise DataError(f"{ledger.path}: no finished run {', '.join(map(str, sorted(strangers)))} to leave out")
    if left_out is None:
        left_out = [max(runs, key=lambda run: run.flops).number] if len(runs) > FEWEST else []
    kept = [each for each in runs if each.number not in left_out]
    if len(kept) < FEWEST:
        raise DataError(
            f"{ledger.path}: {len(kept)} finished runs to fit, and a law of five numbers takes {FEWEST} or more; "
            "python -m src.sweeps status says how the others stand, extend adds values"
        )
    if len({each.parameters for each in kept}) < 2 or len({each.tokens for each in kept}) < 2:
        raise DataError(f"{ledger.path}: all runs have one size or one number of tokens: no law of both follows")
    law, curves = fit(kept, resampled), parabolas(kept)
    return {
        "loss": _kind(ledger),
        "law": {name: getattr(law.law, key) for key, name in NUMBERS.items()} | {"exponent": law.law.exponent},
        "intervals": {name: law.interval(key) for key, name in NUMBERS.items()}
        | {"exponent": law.interval("exponent")},
        "runs": [_run(each, law) for each in kept],
        "left_out": [_foretold(each, law) for each in runs if each.number in left_out],
        "isoflop": [_curve(each) for each in curves],
        "growth": growth(curves),
        "resampled": resampled,
    }


def _kind(ledger: Ledger) -> str:
    validated = {bool(read(point.folder).series.get("validation_loss", Series()).values) for point in ledger.points()}
    return "validation loss" if validated == {True} else "training loss of some runs"


def _run(each: Observation, law: FittedLaw) -> dict[str, Any]:
    return vars(each) | {"fitted": law.law.loss(each.parameters, each.tokens)}


def _foretold(each: Observation, law: FittedLaw) -> dict[str, Any]:
    loss, low, high = law.foretold(each.parameters, each.tokens)
    return vars(each) | {"foretold": loss, "low": low, "high": high, "inside": low <= each.loss <= high}


def _curve(curve: Parabola) -> dict[str, Any]:
    best = curve.best_size
    return {
        "flops": curve.flops,
        "numbers": list(curve.numbers),
        "best_size": best,
        "best_loss": None if best is None else curve.loss(best),
        "line": [[size, curve.loss(size)] for size in _between(curve.smallest, curve.largest)],
    }


def _between(low: float, high: float) -> list[float]:
    return [low * (high / low) ** (at / (CURVE_POINTS - 1)) for at in range(CURVE_POINTS)]


def write(ledger: Ledger, facts: dict[str, Any]) -> Path:
    """fit.json, which the page draws."""
    path = ledger.path / FIT_FILE
    atomic_write(path, json.dumps(facts, indent=2) + "\n")
    return path


def lines(facts: dict[str, Any]) -> list[str]:
    """For a terminal."""
    law, intervals = facts["law"], facts["intervals"]
    found = [f"{len(facts['runs'])} runs fitted by their {facts['loss']}, {len(facts['left_out'])} left out"]
    found.append(
        f"L(N, D) = {law['E']:.4f} + {law['A']:.4g} / N^{law['alpha']:.3f} + {law['B']:.4g} / D^{law['beta']:.3f}"
    )
    found += [f"  {name}: 95 % {low:.4g} to {high:.4g}" for name, (low, high) in intervals.items() if name in law]
    found.append(f"  the best size grows as FLOPs^{law['exponent']:.3f}")
    found += [
        f"warning: {name}={law[name]:.3g} is the bound of the search: these runs do not tell it; add sizes or tokens"
        for name in ("alpha", "beta")
        if law[name] >= STEEPEST
    ]
    for curve in facts["isoflop"]:
        where = "no lowest point between its sizes"
        if curve["best_size"] is not None:
            where = f"best at {curve['best_size']:,.0f} parameters, {curve['best_loss']:.4f}"
        found.append(f"{curve['flops']:.3g} FLOPs, runs {', '.join(map(str, curve['numbers']))}: {where}")
    if facts["growth"] is not None:
        found.append(f"  by these the best size grows as FLOPs^{facts['growth']:.3f}")
    for each in facts["left_out"]:
        verdict = "inside" if each["inside"] else "outside"
        found.append(
            f"left out: run {each['number']} ({each['label']}), {each['flops']:.3g} FLOPs: {each['loss']:.4f}; "
            f"foretold {each['foretold']:.4f}, 95 % {each['low']:.4f} to {each['high']:.4f}: {verdict}"
        )
    return found
