"""A sweep as one page of HTML: every plot, number and style is inside, so that it can be mailed and kept."""

import math
import shlex
import time
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape
from pathlib import Path

from src.metrics.curve import at_tokens, smoothed
from src.metrics.goodput import Goodput, duration
from src.metrics.history import History, Series, read
from src.storage.atomic_write import atomic_write
from src.sweeps.chart import Bar, Curve, Dot, bars, dots, lines, number
from src.sweeps.ledger import Ledger, SweepPoint
from src.sweeps.status import RunStatus

REPORT_FILE = "report.html"
STYLE = Path(__file__).with_suffix(".css")
# From cold to warm with rising values, legible on white and on black; and colours that the colour-blind tell apart.
RAMP = ("#6b4fc3", "#3f78c8", "#1f97a6", "#22a884", "#5cb85c", "#b5b827")
DISTINCT = ("#3366cc", "#e07b39", "#2a9d6f", "#c94f7c", "#8a63d2", "#b8930a", "#3fa7d6", "#7f7f7f")
DASHES = ("", "7 4", "2 4", "10 4 2 4")
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
FEW = 6  # whole numbers, such as seeds, stand side by side
LOGARITHMIC = 8.0  # times the smallest: values that far apart were meant so
MANY = 50  # points of a curve: more are smoothed
CUT = 0.15  # of the tokens: the first fall of the loss would flatten all that follows


@dataclass(frozen=True)
class Shown:
    """A point with all that the page tells of it."""

    point: SweepPoint
    now: RunStatus
    history: History
    colour: str
    dash: str
    title: str


def write(ledger: Ledger, rows: Sequence[tuple[SweepPoint, RunStatus]]) -> Path:
    """report.html of the sweep folder."""
    command = shlex.join(["python", "launch.py", *ledger.argv])
    return write_page(ledger.path / REPORT_FILE, ledger.path.name, command, rows, ledger.swept())


def write_page(
    path: Path, name: str, command: str, rows: Sequence[tuple[SweepPoint, RunStatus]], swept: Sequence[str]
) -> Path:
    """The page of these runs, at `path`. `command`: shown below its name; `swept`: keys in which the runs differ."""
    colours = [_by_value(swept[:1], rows, DISTINCT), _by_value(swept[1:2], rows, DASHES)]
    shown = [
        Shown(point, now, read(point.folder), colour, dash, _title(point, now, swept))
        for (point, now), colour, dash in zip(rows, *colours, strict=True)
    ]
    atomic_write(path, _page(escape(name), escape(command), shown, swept))
    return path


def _by_value(keys: Sequence[str], rows: Sequence[tuple[SweepPoint, RunStatus]], looks: Sequence[str]) -> list[str]:
    """A look for each row: by the value of the key, or the first look where there is no key."""
    if not keys:
        return [looks[0]] * len(rows)
    texts = [point.overrides.get(keys[0], "") for point, _ in rows]
    values = ordered(texts)
    if looks is DISTINCT and _numeric(values) is not None:
        return [_ramp(values.index(text) / max(1, len(values) - 1)) for text in texts]
    return [looks[values.index(text) % len(looks)] for text in texts]


def _ramp(share: float) -> str:
    """A colour between the two nearest anchors."""
    place = share * (len(RAMP) - 1)
    first = min(int(place), len(RAMP) - 2)
    low, high = ([int(RAMP[each][at : at + 2], 16) for at in (1, 3, 5)] for each in (first, first + 1))
    mixed = (round(a + (b - a) * (place - first)) for a, b in zip(low, high, strict=True))
    return "#" + "".join(f"{each:02x}" for each in mixed)


def ordered(texts: Sequence[str]) -> list[str]:
    """Each value once: numbers by size, words as they come."""
    values = list(dict.fromkeys(texts))
    numbers = _numeric(values)
    return values if numbers is None else [text for _, text in sorted(zip(numbers, values, strict=True))]


def _numeric(texts: Sequence[str]) -> list[float] | None:
    try:
        return [float(text) for text in texts]
    except ValueError:
        return None


def _title(point: SweepPoint, now: RunStatus, swept: Sequence[str]) -> str:
    values = " ".join(f"{key}={point.overrides.get(key, '')}" for key in swept)
    return f"{values}\n{now.state}" + ("" if now.loss is None else f", loss {now.loss:.4f}")


def _page(name: str, command: str, shown: Sequence[Shown], swept: Sequence[str]) -> str:
    plots = [_losses(shown), *(_against(key, shown) for key in swept), _speeds(shown, swept), _times(shown, swept)]
    return (
        f'<!doctype html><html lang="en"><head><meta charset="utf-8"><title>{name}</title>'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<style>{STYLE.read_text(encoding='utf-8')}</style></head><body><main>"
        f'<h1>{name}</h1><p class="note">{time.strftime("%Y-%m-%d %H:%M")}</p><code>{command}</code>'
        f'{_facts(shown, swept)}<div class="plots">{"".join(filter(None, plots))}</div>{_table(shown, swept)}'
        "</main></body></html>\n"
    )


def _facts(shown: Sequence[Shown], swept: Sequence[str]) -> str:
    states = [each.now.state for each in shown]
    found = [(f"{states.count('finished')} of {len(shown)}", "points finished")]
    if best := _best(shown):
        values = ", ".join(f"{key.rpartition('.')[2]} {best.point.overrides.get(key, '')}" for key in swept)
        found.insert(0, (f"{best.now.loss:.4f}", f"best loss, point {best.point.number}: {values}"))
    rates = sorted(each.now.tokens_per_second for each in shown if each.now.tokens_per_second)
    if rates:
        found.append((f"{rates[len(rates) // 2]:,.0f}", "tokens/s per device, median"))
    total = sum((each.now.goodput for each in shown), Goodput())
    if total.share is not None:
        found.append((f"{100 * total.share:.0f}%", f"of {duration(total.total)} trained: goodput"))
    if broken := len(shown) - states.count("finished") - states.count("running") - states.count("queued"):
        found.append((str(broken), "points need a look: see the table"))
    cards = "".join(f'<div class="fact"><b>{escape(big)}</b><span>{escape(small)}</span></div>' for big, small in found)
    return f'<div class="facts">{cards}</div>'


def _best(shown: Sequence[Shown]) -> Shown | None:
    done = [each for each in shown if each.now.state == "finished" and _finite(each.now.loss)]
    return min(done, key=lambda each: each.now.loss or 0.0, default=None)


def _finite(value: float | None) -> bool:
    return value is not None and math.isfinite(value)


def _losses(shown: Sequence[Shown]) -> str:
    curves, heights, long = [], [], False
    for each in shown:
        series, tokens = each.history.series, each.history.series.get("tokens")
        loss = series.get("loss", Series())
        if not loss.values:
            continue
        long = long or len(loss.values) >= MANY
        xs, ys = at_tokens(loss, tokens), smoothed(loss.values) if len(loss.values) >= MANY else loss.values
        curves.append(Curve(xs, ys, each.colour, each.dash, each.title))
        finite = [(x, y) for x, y in zip(xs, ys, strict=True) if math.isfinite(y)]
        if finite and each.now.state != "diverged":
            heights += [y for x, y in finite if x >= CUT * xs[-1]]
    if not heights:
        return ""
    room = (max(heights) - min(heights)) * 0.05 or 0.1
    drawn = lines(curves, x="tokens", y="training loss", y_range=(min(heights) - room, max(heights) + room))
    note = f"{'Smoothed; the' if long else 'The'} first fall is cut off."
    return _section("Loss against tokens", note, drawn + _legend(shown), "wide")


def _legend(shown: Sequence[Shown]) -> str:
    entries: dict[str, tuple[str, str]] = {}
    for each in shown:
        first = each.title.partition("\n")[0]
        entries.setdefault(first, (each.colour, each.dash))
    if len(entries) > 24:
        return '<p class="note">Rest the pointer on a line to read what it is.</p>'
    items = "".join(_key(name, colour, "dashed" if dash else "solid") for name, (colour, dash) in entries.items())
    return f'<div class="legend">{items}</div>'


def _key(name: str, colour: str, style: str = "solid") -> str:
    return f'<span><i style="border-color:{colour};border-top-style:{style}"></i>{escape(name)}</span>'


def _against(key: str, shown: Sequence[Shown]) -> str:
    done = [each for each in shown if each.now.state == "finished" and _finite(each.now.loss)]
    if not done:
        return ""
    texts = [each.point.overrides.get(key, "") for each in done]
    values, numbers = ordered(texts), _numeric(texts)
    if numbers is None or (len(values) <= FEW and all(value.is_integer() for value in numbers)):
        numbers, names, log = [float(values.index(text)) for text in texts], values, False
    else:
        names, log = [], min(numbers) > 0 and max(numbers) / min(numbers) >= LOGARITHMIC
    found = [Dot(x, each.now.loss or 0.0, each.colour, each.title) for x, each in zip(numbers, done, strict=True)]
    plot = dots(found, x=key, y="final loss", log=log, names=names)
    return _section(f"Final loss against {key}", "Each dot a finished run; the line joins means.", plot)


def _speeds(shown: Sequence[Shown], swept: Sequence[str]) -> str:
    rows = [
        Bar(_name(each, swept), [(rate, each.colour, each.title)], number(rate))
        for each in shown
        if (rate := each.now.tokens_per_second)
    ]
    if not rows:
        return ""
    return _section("Throughput", "Mean after the first report.", bars(rows, x="tokens per second and device"))


def _times(shown: Sequence[Shown], swept: Sequence[str]) -> str:
    rows = []
    for each in shown:
        times = each.now.goodput
        if times.share is not None:
            parts = [(value, PARTS[part], f"{part}: {duration(value)}") for part, value in times.to_dict().items()]
            rows.append(Bar(_name(each, swept), parts, f"{100 * times.share:.0f}%"))
    if not rows:
        return ""
    legend = "".join(_key(part, colour) for part, colour in PARTS.items())
    return _section(
        "Where the time went",
        "Wall time since submission; the share at the end is what trained.",
        bars(rows, x="seconds") + f'<div class="legend">{legend}</div>',
    )


def _name(each: Shown, swept: Sequence[str]) -> str:
    """What fits beside a bar."""
    name = ", ".join(each.point.overrides.get(key, "") for key in swept) or each.point.folder.name
    return f"{each.point.number}: {name}"[:32]


def _table(shown: Sequence[Shown], swept: Sequence[str]) -> str:
    heads = ["#", "state", *swept, "loss", "tok/s/device", "useful", "attempts", "step", "run", ""]
    best = _best(shown)
    ranked = sorted(shown, key=_rank)
    body = "".join(f"<tr{_row_class(each is best)}>{''.join(_cells(each, swept))}</tr>" for each in ranked)
    head = "".join(f"<th>{escape(each)}</th>" for each in heads)
    note = "Best first. table.csv beside this page has every number."
    return _section("Points", note, f'<div class="scroll"><table><tr>{head}</tr>{body}</table></div>')


def _rank(each: Shown) -> float:
    """By loss; without one last."""
    return each.now.loss if each.now.loss is not None and math.isfinite(each.now.loss) else math.inf


def _row_class(best: bool) -> str:
    return ' class="best"' if best else ""


def _cells(each: Shown, swept: Sequence[str]) -> list[str]:
    now = each.now
    share = "" if now.goodput.share is None else f"{100 * now.goodput.share:.0f}%"
    loss = "" if now.loss is None else f"{now.loss:.4f}"
    rate = "" if now.tokens_per_second is None else f"{now.tokens_per_second:,.0f}"
    values = [each.point.overrides.get(key, "") for key in swept]
    texts = [*values, loss, rate, share, str(now.attempts), str(now.step or ""), each.point.folder.name]
    return [
        f"<td>{each.point.number}</td>",
        f'<td><span class="state {now.state}">{now.state}</span></td>',
        *(f"<td>{escape(text)}</td>" for text in texts),
        f'<td class="wide">{escape(now.detail)}</td>',
    ]


def _section(title: str, note: str, body: str, kind: str = "") -> str:
    return f'<section class="{kind}"><h2>{escape(title)}</h2><p class="note">{escape(note)}</p>{body}</section>'
