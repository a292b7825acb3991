"""The plots of a sweep: its points' curves, and their results against what was swept."""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from html import escape

from src.metrics.curve import at_tokens, smoothed
from src.metrics.goodput import duration
from src.metrics.history import History, Series
from src.sweeps.chart import Bar, Curve, Dot, bars, dots, lines, means, number
from src.sweeps.importance import importance
from src.sweeps.ledger import SweepPoint
from src.sweeps.status import RunStatus

FEW = 6  # whole numbers, such as seeds, stand side by side
LOGARITHMIC = 8.0  # times the smallest: values that far apart were meant so
MANY = 50  # points of a curve: more are smoothed
MOST = 400  # points of a curve that are drawn
CUT = 0.15  # of the tokens: the first fall of the loss would flatten all that follows
PARTS = {
    "useful": "#2a9d6f",
    "start": "#e39a9a",
    "restart": "#cf3d3d",
    "compile": "#8a63d2",
    "checkpoint": "#3366cc",
    "data": "#e07b39",
    "other": "#b9bfca",
    "queue": "#e6c34a",
    "idle": "#e9e4d0",
}
TITLES = 24  # of a legend; more are read by resting the pointer on a line


@dataclass(frozen=True)
class Shown:
    """A point with all that the page tells of it."""

    point: SweepPoint
    now: RunStatus
    history: History
    colour: str
    dash: str
    title: str

    @property
    def finished(self) -> bool:
        """With a loss that can be compared."""
        return self.now.state == "finished" and self.now.loss is not None and math.isfinite(self.now.loss)

    @property
    def validated(self) -> bool:
        """Whether `now.loss` is of held-out data."""
        return bool(self.history.series.get("validation_loss", Series()).values)


def loss_name(shown: Sequence[Shown]) -> str:
    """What the loss of these points is, as `RunStatus.loss` has it."""
    kinds = {each.validated for each in shown if each.now.loss is not None}
    return {(True,): "validation loss", (False, True): "validation loss, of some points training loss"}.get(
        tuple(sorted(kinds)), "training loss"
    )


def curves(shown: Sequence[Shown]) -> list[str]:
    """A section for each kind of curve that any point has, the loss of held-out data first."""
    return [
        _curves(shown, "validation_loss", "Validation loss", "each mark a validation", wide=True, fall=True),
        _curves(shown, "loss", "Training loss", "of the batch of each step", wide=True, fall=True),
        _curves(shown, "grad_norm", "Gradient norm", "before it is clipped", wide=False),
        _curves(shown, "lr", "Learning rate", "as the schedule has it", wide=False),
    ]


def _curves(shown: Sequence[Shown], metric: str, heading: str, what: str, *, wide: bool, fall: bool = False) -> str:
    """`fall`: the beginning is cut off where it is so high that nothing else could be told apart."""
    drawn = [(each, curve) for each in shown if (curve := _curve(each, metric)) is not None]
    heights = [
        (x >= CUT * curve.xs[-1], y)
        for each, curve in drawn
        for x, y in zip(curve.xs, curve.ys, strict=True)
        if math.isfinite(y) and each.now.state != "diverged"
    ]
    if not heights:
        return ""
    low, high, highest = min(y for _, y in heights), max(y for late, y in heights if late), max(y for _, y in heights)
    cut = fall and highest > high + 0.5 * (high - low)
    high = high if cut else highest
    room = (high - low) * 0.05 or abs(high) * 0.05 or 0.1
    notes = [what, *(["smoothed"] if metric == "loss" and any(_long(each, metric) for each, _ in drawn) else [])]
    notes += ["the first fall is cut off"] if cut else []
    found, hidden = _merged([curve for _, curve in drawn])
    notes += [f"{hidden} of {len(drawn)} curves lie exactly on another, whose title names them"] if hidden else []
    plot = lines(
        found, name=f"plot-{metric}", x="tokens", y=heading.lower(), y_range=(low - room, high + room), wide=wide
    )
    return section(f"{heading} against tokens", f"{'; '.join(notes).capitalize()}.", plot + _legend(shown), wide=wide)


def _long(each: Shown, metric: str) -> bool:
    return len(each.history.series[metric].values) >= MANY


def _curve(each: Shown, metric: str) -> Curve | None:
    series = each.history.series.get(metric, Series())
    if not any(map(math.isfinite, series.values)):
        return None
    xs, ys = at_tokens(series, each.history.series.get("tokens")), series.values
    if metric == "loss" and _long(each, metric):
        ys = smoothed(ys)
    step = -(-len(xs) // MOST)
    last = [] if (len(xs) - 1) % step == 0 else [len(xs) - 1]
    kept = [*range(0, len(xs), step), *last]
    marks = metric == "validation_loss"
    return Curve([xs[at] for at in kept], [ys[at] for at in kept], each.colour, each.dash, each.title, marks)


def _merged(found: Sequence[Curve]) -> tuple[list[Curve], int]:
    """Curves with the same points are one, with the titles of all; and how many that hides."""
    same: dict[tuple[tuple[float, ...], tuple[float, ...]], list[Curve]] = {}
    for each in found:
        same.setdefault((tuple(each.xs), tuple(each.ys)), []).append(each)
    merged = [
        replace(first, title="; ".join(each.title.partition("\n")[0] for each in (first, *others))) if others else first
        for first, *others in same.values()
    ]
    return merged, len(found) - len(merged)


def _legend(shown: Sequence[Shown]) -> str:
    entries: dict[str, tuple[str, str]] = {}
    for each in shown:
        first = each.title.partition("\n")[0]
        entries.setdefault(first, (each.colour, each.dash))
    if len(entries) > TITLES:
        return '<p class="note">Rest the pointer on a line to read what it is.</p>'
    items = "".join(key(name, colour, "dashed" if dash else "solid") for name, (colour, dash) in entries.items())
    return f'<div class="legend">{items}</div>'


def against(swept: str, shown: Sequence[Shown]) -> str:
    """Final loss against one swept key."""
    done = [each for each in shown if each.finished]
    if not done:
        return ""
    texts = [each.point.overrides.get(swept, "") for each in done]
    values, numbers = ordered(texts), numeric(texts)
    if numbers is None or (len(values) <= FEW and all(value.is_integer() for value in numbers)):
        numbers, names, log = [float(values.index(text)) for text in texts], values, False
    else:
        names, log = [], min(numbers) > 0 and max(numbers) / min(numbers) >= LOGARITHMIC
    found = [Dot(x, each.now.loss or 0.0, each.colour, each.title) for x, each in zip(numbers, done, strict=True)]
    what = loss_name(done)
    plot = dots(found, x=swept, y=f"final {what}", log=log, names=names, line=means(found))
    return section(f"Final {what} against {swept}", "Each dot a finished run; the line joins means.", plot)


def best_so_far(shown: Sequence[Shown]) -> str:
    """What each point brought, in their order, and the best until then: whether more points are worth it."""
    done = [each for each in shown if each.finished]
    if len(done) < 3:
        return ""
    found = [Dot(float(each.point.number), each.now.loss or 0.0, each.colour, each.title) for each in done]
    steps: list[tuple[float, float]] = []
    for each in found:
        before = steps[-1][1] if steps else each.y
        steps += [(each.x, before), (each.x, min(before, each.y))]
    what = loss_name(done)
    plot = dots(found, x="point", y=f"final {what}", log=False, names=(), line=steps)
    note = "Each dot a finished run, in the order of asking; the line is the best until then."
    return section(f"Best {what} so far", note, plot)


def influence(shown: Sequence[Shown], swept: Sequence[str]) -> str:
    """How much of the spread of the final loss goes with each swept key."""
    done = [each for each in shown if each.finished]
    points = [{name: each.point.overrides.get(name, "") for name in swept} for each in done]
    shares = importance(points, [each.now.loss or 0.0 for each in done]) if len(swept) > 1 else {}
    if not shares:
        return ""
    rows = [
        Bar(name, [(100 * share, "#3f78c8", f"{name}: {share:.2f}")], f"{100 * share:.0f}%")
        for name, share in sorted(shares.items(), key=lambda item: -item[1])
    ]
    note = "Share of the variance between runs with another value of one key (epsilon squared); the rest is noise and "
    note += "the interplay of keys."
    return section(f"What the final {loss_name(done)} depends on", note, bars(rows, x="% of the variance"))


def speeds(shown: Sequence[Shown], swept: Sequence[str]) -> str:
    """Throughput of each point."""
    rows = [
        Bar(_name(each, swept), [(rate, each.colour, each.title)], number(rate))
        for each in shown
        if (rate := each.now.tokens_per_second)
    ]
    if not rows:
        return ""
    return section("Throughput", "Mean after the first report.", bars(rows, x="tokens per second and device"))


def times(shown: Sequence[Shown], swept: Sequence[str]) -> str:
    """Where the wall time of each point went."""
    rows = []
    for each in shown:
        spent = each.now.goodput
        if spent.share is not None:
            parts = [(value, PARTS[part], f"{part}: {duration(value)}") for part, value in spent.to_dict().items()]
            rows.append(Bar(_name(each, swept), parts, f"{100 * spent.share:.0f}%"))
    if not rows:
        return ""
    legend = "".join(key(part, colour) for part, colour in PARTS.items())
    return section(
        "Where the time went",
        "Wall time since submission; the share at the end is what trained.",
        bars(rows, x="seconds") + f'<div class="legend">{legend}</div>',
    )


def ordered(texts: Sequence[str]) -> list[str]:
    """Each value once: numbers by size, words as they come."""
    values = list(dict.fromkeys(texts))
    numbers = numeric(values)
    return values if numbers is None else [text for _, text in sorted(zip(numbers, values, strict=True))]


def numeric(texts: Sequence[str]) -> list[float] | None:
    """The numbers that all of them are; None where one is a word."""
    try:
        return [float(text) for text in texts]
    except ValueError:
        return None


def key(name: str, colour: str, style: str = "solid") -> str:
    """An entry of a legend."""
    return f'<span><i style="border-color:{colour};border-top-style:{style}"></i>{escape(name)}</span>'


def section(title: str, note: str, body: str, *, wide: bool = False) -> str:
    """A card of the page."""
    kind = "wide" if wide else ""
    return f'<section class="{kind}"><h2>{escape(title)}</h2><p class="note">{escape(note)}</p>{body}</section>'


def _name(each: Shown, swept: Sequence[str]) -> str:
    """What fits beside a bar."""
    name = ", ".join(each.point.overrides.get(one, "") for one in swept) or each.point.folder.name
    return f"{each.point.number}: {name}"[:32]
