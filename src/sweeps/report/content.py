"""What a page is told of its runs, as plain values for its script: curves, the axes under them, and final results."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from itertools import pairwise
from pathlib import Path
from typing import Any

from src.metrics.history import History, Series, borders
from src.runs.folder import Attempt
from src.runs.records import PLAN_FILE
from src.storage.json_lines import facts_in
from src.sweeps.importance import importance
from src.sweeps.ledger import SweepPoint
from src.sweeps.report.looks import MOST, LegendEntry, Look, numeric, ordered
from src.sweeps.status import RunStatus

MOST_POINTS = 400  # of a curve; of a longer one each stretch is shown by its lowest and its highest point
MANY_RUNS = 60  # on one page have a quarter of that: 9 curves of 400 points of 100 runs would be 4 MB
LOGARITHMIC = 8.0  # times the smallest: values that far apart were meant so
DIGITS = 6  # of a value on the page


@dataclass(frozen=True)
class Chart:
    """Curves of one quantity. `metrics`: the first of these that a run has; `fall`: the page opens without the
    beginning where it is so high that all that follows would be flat; `noisy`: can be smoothed.
    """

    metrics: tuple[str, ...]
    title: str
    note: str
    wide: bool = False
    fall: bool = False
    noisy: bool = False
    marks: bool = False


CHARTS = (
    Chart(("validation_loss",), "Validation loss", "nats per token of held-out data; each mark a validation",
          wide=True, fall=True, marks=True),
    Chart(("loss",), "Training loss", "nats per token of the batch of each step", wide=True, fall=True, noisy=True),
    Chart(("grad_norm",), "Gradient norm", "before it is clipped", noisy=True),
    Chart(("lr",), "Learning rate", "as the schedule has it"),
    Chart(("tokens_per_second",), "Throughput", "tokens per second of one device", noisy=True),
    Chart(("mfu_full_percent",), "MFU", "% of the device's peak, attention counted in full", noisy=True),
    Chart(("peak_allocated_gib", "peak_rss_gib"), "Peak memory", "GiB of rank 0: of a GPU, or of the process"),
    Chart(("experts/load_max_over_mean",), "Expert load", "tokens of the busiest over the mean", noisy=True),
    Chart(("goodput/share",), "Goodput", "share of the wall time so far that trained steps which were kept"),
)  # fmt: skip


@dataclass(frozen=True)
class Shown:
    """A run with all that the page tells of it."""

    point: SweepPoint
    now: RunStatus
    history: History
    look: Look
    attempts: list[Attempt] = field(default_factory=list)

    @property
    def finished(self) -> bool:
        """With a loss that can be compared."""
        return self.now.state == "finished" and self.now.loss is not None and math.isfinite(self.now.loss)

    @property
    def validated(self) -> bool:
        """Whether `now.loss` is of held-out data."""
        return bool(self.history.series.get("validation_loss", Series()).values)

    def label(self, swept: Sequence[str]) -> str:
        """Its values of the swept keys, without the sections of the keys; else the name of its folder."""
        short = [f"{key.rpartition('.')[2]}={self.point.overrides.get(key, '')}" for key in swept]
        return " ".join(short) or self.point.folder.name


def loss_name(shown: Sequence[Shown]) -> str:
    """What the loss of these runs is, as `RunStatus.loss` has it."""
    kinds = {each.validated for each in shown if each.now.loss is not None}
    return {(True,): "validation loss", (False, True): "validation loss, of some runs training loss"}.get(
        tuple(sorted(kinds)), "training loss"
    )


def content(
    shown: Sequence[Shown], swept: Sequence[str], legend: Mapping[str, Sequence[LegendEntry]]
) -> dict[str, Any]:
    """Everything for page.js. Numbers that are not finite are None, as JSON has none."""
    done = [each for each in shown if each.finished]
    points = [{name: each.point.overrides.get(name, "") for name in swept} for each in done]
    shares = importance(points, [each.now.loss or 0.0 for each in done]) if len(swept) > 1 else {}
    same = {chart.title: _coinciding(shown, chart) for chart in CHARTS}
    most = MOST_POINTS if len(shown) <= MANY_RUNS else MOST_POINTS // 4
    return {
        "loss": loss_name(shown),
        "charts": [asdict(chart) for chart in CHARTS if any(_series(each, chart) for each in shown)],
        "keys": [_axis(key, shown) for key in swept],
        "legend": [_legend(key, entries) for key, entries in legend.items()],
        "importance": dict(sorted(shares.items(), key=lambda item: item[1])),
        "runs": [_run(each, swept, same, most) for each in shown],
    }


def _run(
    each: Shown, swept: Sequence[str], same: Mapping[str, Mapping[int, Sequence[int]]], most: int
) -> dict[str, Any]:
    number, now, spent = each.point.number, each.now, each.now.goodput
    curves: dict[str, dict[str, Any]] = {}
    for chart in CHARTS:
        if (series := _series(each, chart)) is not None:
            thin = thinned(series, most)
            curves[chart.title] = {"steps": thin.steps, "values": [_number(value) for value in thin.values]}
            curves[chart.title] |= {"same": [*same[chart.title].get(number, ())]}
    return {
        "number": number,
        "name": each.point.folder.name,
        "label": each.label(swept),
        "state": now.state,
        "colour": each.look.colour,
        "dash": each.look.dash,
        "values": {key: each.point.overrides.get(key, "") for key in swept},
        "loss": _number(now.loss) if each.finished else None,
        "rate": _number(now.tokens_per_second),
        "seconds": {} if spent.share is None else {part: _number(value) for part, value in spent.to_dict().items()},
        "clock": _clock(each),
        "curves": curves,
        "borders": [*borders(each.history).values()],
    }


def _clock(each: Shown) -> dict[str, dict[str, Any]]:
    """Steps, and what had passed at each: tokens, seconds since the first line, floating-point operations of the model
    (attention counted in full). An axis that the run does not know is left out.
    """
    times, tokens = each.history.times, each.history.series.get("tokens")
    found: dict[str, Any] = {}
    if times.steps:
        thin = thinned(times, MOST_POINTS // 4)
        found["seconds"] = {"steps": thin.steps, "values": [round(value - times.values[0], 1) for value in thin.values]}
    if tokens is not None:
        thin = thinned(tokens, MOST_POINTS // 4)
        found["tokens"] = {"steps": [0, *thin.steps], "values": [0.0, *(_number(value) for value in thin.values)]}
        if (flops := facts_in(each.point.folder / PLAN_FILE).get("flops_per_token")) and isinstance(flops, int):
            values = [None if value is None else _number(value * flops) for value in found["tokens"]["values"]]
            found["flops"] = {"steps": found["tokens"]["steps"], "values": values}
    return found


def _axis(key: str, shown: Sequence[Shown]) -> dict[str, Any]:
    """A swept key as an axis: numbers, on a logarithm where they lie far apart, or names in their order."""
    texts = ordered([each.point.overrides.get(key, "") for each in shown])
    numbers = numeric(texts)
    # Whole numbers of which there are few, such as seeds, stand side by side.
    if numbers is None or (len(texts) <= 6 and all(value.is_integer() for value in numbers)):
        return {"key": key, "names": texts, "log": False}
    log = min(numbers) > 0 and max(numbers) / min(numbers) >= LOGARITHMIC
    return {"key": key, "names": None, "log": log}


def _legend(key: str, entries: Sequence[LegendEntry]) -> dict[str, Any]:
    many = len(entries) > MOST
    return {"key": key, "many": many, "entries": [asdict(each) for each in entries]}


def _series(each: Shown, chart: Chart) -> Series | None:
    """None where the run has no finite value of it."""
    found = (each.history.series[name] for name in chart.metrics if name in each.history.series)
    return next((series for series in found if any(map(math.isfinite, series.values))), None)


def _coinciding(shown: Sequence[Shown], chart: Chart) -> dict[int, list[int]]:
    """Of each run whose curve has exactly the points of others: the numbers of all of them, in order."""
    groups: dict[tuple[tuple[int, ...], tuple[float, ...]], list[int]] = {}
    for each in shown:
        if (series := _series(each, chart)) is not None:
            groups.setdefault((tuple(series.steps), tuple(series.values)), []).append(each.point.number)
    return {number: group for group in groups.values() if len(group) > 1 for number in group}


def thinned(series: Series, most: int) -> Series:
    """At most about so many points: the first, the last, and the lowest and highest of each stretch between, so that
    no spike is lost.
    """
    count = len(series.steps)
    if count <= most:
        return series
    values = [value if math.isfinite(value) else -math.inf for value in series.values]
    edges = [round(place * (count - 1) / (most // 2 - 1)) for place in range(most // 2)]
    kept = {0, count - 1}
    for first, end in pairwise(edges):
        stretch = range(first, end)
        kept |= {min(stretch, key=values.__getitem__), max(stretch, key=values.__getitem__)}
    return Series([series.steps[at] for at in sorted(kept)], [series.values[at] for at in sorted(kept)])


def _number(value: float | None) -> float | None:
    """As much of it as a person reads off a page."""
    return None if value is None or not math.isfinite(value) else float(f"{value:.{DIGITS}g}")


def log_of(folder: Path) -> Path | None:
    """Rank 0's, of the newest attempt."""
    found = folder.glob("logs/attempt_*/rank_0.log")
    numbers = {path: path.parent.name.rpartition("_")[2] for path in found}
    known = [path for path in numbers if numbers[path].isdecimal()]
    return max(known, key=lambda path: int(numbers[path]), default=None)
