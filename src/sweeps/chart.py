"""Charts as SVG text: sharp at any size, readable by a browser alone, in the page's own fonts and colours."""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from html import escape

WIDTH, HEIGHT = 640, 340
LEFT, RIGHT, TOP, BOTTOM = 58, 14, 12, 46
BAR, GAP = 18, 8  # of a row of bars
TICK_PIXELS = 95
LABELS = 210  # width of the names beside bars
FEW_DECADES = 1.5  # below it a logarithmic axis has ticks between the powers of ten, too


@dataclass(frozen=True)
class Curve:
    """`title` is shown when a pointer rests on it; `marks`: each point is drawn, as of few measurements."""

    xs: Sequence[float]
    ys: Sequence[float]
    colour: str
    dash: str
    title: str
    marks: bool = False


@dataclass(frozen=True)
class Dot:
    """`x` is a place on the axis: of a category its number."""

    x: float
    y: float
    colour: str
    title: str


@dataclass(frozen=True)
class Axis:
    """Values to pixels."""

    low: float
    high: float
    first: float  # pixel of low
    last: float
    log: bool = False

    def at(self, value: float) -> float:
        """The pixel of a value."""
        low, high, here = (math.log(each) if self.log else each for each in (self.low, self.high, value))
        return self.first + (self.last - self.first) * ((here - low) / (high - low) if high > low else 0.5)

    def ticks(self, count: int = 6) -> list[float]:
        """Round values inside the axis."""
        return _powers(self.low, self.high) if self.log else _rounded(self.low, self.high, count)


def _rounded(low: float, high: float, count: int) -> list[float]:
    if high <= low:
        return [low]
    rough = (high - low) / count
    power = 10.0 ** math.floor(math.log10(rough))
    step = next(each * power for each in (1, 2, 2.5, 5, 10) if each * power >= rough)
    first = math.ceil(low / step - 1e-9)
    return [index * step for index in range(first, int(high / step + 1e-9) + 1)]


def _powers(low: float, high: float) -> list[float]:
    decades = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
    between = (1, 2, 5) if math.log10(high / low) < FEW_DECADES else (1,)
    found = [digit * 10.0**decade for decade in decades for digit in between]
    return [each for each in found if low * 0.999 <= each <= high * 1.001] or [low, high]


def number(value: float) -> str:
    """Short: 1.2M, 350k, 0.0003, 1e-05."""
    if value == 0:
        return "0"
    for bound, letter in ((1e12, "T"), (1e9, "B"), (1e6, "M"), (1e4, "k")):
        if abs(value) >= bound:
            unit = 1e3 if letter == "k" else bound
            return f"{value / unit:.4g}{letter}"
    return f"{value:.4g}"


def lines(
    curves: Sequence[Curve], *, name: str, x: str, y: str, y_range: tuple[float, float], wide: bool = True
) -> str:
    """Curves over a linear axis from 0; what leaves `y_range` is cut off. `name`: of its own on the page; `wide`: as
    the page, else half of it. The attributes `data-...` are what report.js reads.
    """
    width = 2 * WIDTH if wide else WIDTH
    right, bottom = width - RIGHT, HEIGHT - BOTTOM
    across = Axis(0.0, max((each.xs[-1] for each in curves), default=1.0), LEFT, right)
    upward = Axis(*y_range, bottom, TOP)
    drawn = [_curve(each, across, upward) for each in curves]
    frame = f'<rect x="{LEFT}" y="{TOP}" width="{right - LEFT}" height="{bottom - TOP}"/>'
    body = f'<clipPath id="{name}">{frame}</clipPath><g clip-path="url(#{name})">{"".join(drawn)}</g>'
    facts = {"x": x, "y": y, "frame": f"{LEFT} {right} {TOP} {bottom}"}
    facts["range"] = " ".join(map(_exact, (across.low, across.high, *y_range)))
    return _framed(_grid(across, upward, number, x, y) + body, width, HEIGHT, "lines", facts)


def _curve(curve: Curve, across: Axis, upward: Axis) -> str:
    pairs = [(x, y) for x, y in zip(curve.xs, curve.ys, strict=True) if math.isfinite(y)]
    places = [(across.at(x), upward.at(y)) for x, y in pairs]
    points = " ".join(f"{x:.1f},{y:.1f}" for x, y in places)
    dash = f' stroke-dasharray="{curve.dash}"' if curve.dash else ""
    marks = "".join(f'<circle cx="{x:.1f}" cy="{y:.1f}" r="3.4" fill="{curve.colour}"/>' for x, y in places)
    values = (" ".join(map(_exact, column)) for column in zip(*pairs, strict=True)) if pairs else ("", "")
    xs, ys = values
    # A wide invisible line under the thin one is what the pointer finds.
    return (
        f'<g class="curve" data-x="{xs}" data-y="{ys}"><title>{escape(curve.title)}</title>'
        f'<polyline class="reach" points="{points}"/><polyline points="{points}" stroke="{curve.colour}"{dash}/>'
        f"{marks if curve.marks else ''}</g>"
    )


def _exact(value: float) -> str:
    """As much of it as a person reads off a curve."""
    return f"{value:.6g}"


def dots(
    found: Sequence[Dot], *, x: str, y: str, log: bool, names: Sequence[str], line: Sequence[tuple[float, float]]
) -> str:
    """One dot per run and a thin line; `names`, if any, are the categories of the axis. Dots in one place are one,
    that has the titles of all.
    """
    xs, ys = [each.x for each in found], [each.y for each in found]
    room = (max(ys) - min(ys)) * 0.1 or abs(ys[0]) * 0.05 or 1.0
    upward = Axis(min(ys) - room, max(ys) + room, HEIGHT - BOTTOM, TOP)
    across = Axis(*_widened(xs, log, len(names)), LEFT, WIDTH - RIGHT, log)
    path = " ".join(f"{across.at(at):.1f},{upward.at(value):.1f}" for at, value in line)
    places: dict[tuple[float, float], list[Dot]] = {}
    for each in found:
        places.setdefault((each.x, each.y), []).append(each)
    marks = "".join(
        f'<circle cx="{across.at(at):.1f}" cy="{upward.at(value):.1f}" r="{6 + 2 * (len(same) > 1)}" '
        f'fill="{same[0].colour}"><title>{escape(chr(10).join(each.title for each in same))}</title></circle>'
        for (at, value), same in places.items()
    )
    grid = _grid(across, upward, number, x, y, names)
    return _framed(f'{grid}<polyline class="mean" points="{path}"/>{marks}', WIDTH, HEIGHT)


def means(found: Sequence[Dot]) -> list[tuple[float, float]]:
    """The mean of the dots of equal `x`, from left to right."""
    columns = {at: [each.y for each in found if each.x == at] for at in sorted({each.x for each in found})}
    return [(at, sum(each) / len(each)) for at, each in columns.items()]


def _widened(xs: Sequence[float], log: bool, categories: int) -> tuple[float, float]:
    if categories:
        return -0.5, categories - 0.5
    low, high = min(xs), max(xs)
    if log:
        return low / 1.25, high * 1.25
    room = (high - low) * 0.06 or abs(low) * 0.1 or 1.0
    return low - room, high + room


@dataclass(frozen=True)
class Bar:
    """Parts of one row: (value, colour, what a pointer reads)."""

    name: str
    parts: Sequence[tuple[float, str, str]]
    value: str  # written at the end


def bars(rows: Sequence[Bar], *, x: str) -> str:
    """Horizontal bars, the parts of a row side by side."""
    height = TOP + len(rows) * (BAR + GAP) + BOTTOM
    longest = max((sum(part[0] for part in row.parts) for row in rows), default=1.0) or 1.0
    across = Axis(0.0, longest, LABELS, WIDTH - 62)
    body = [_across(across, height - BOTTOM, number, ()), _label(across, height - BOTTOM, x)]
    for index, row in enumerate(rows):
        top, left = TOP + index * (BAR + GAP), 0.0
        body.append(
            f'<text class="name" x="{LABELS - 8}" y="{top + BAR - 5}">{escape(row.name)}<title>{escape(row.name)}'
            "</title></text>"
        )
        for value, colour, title in row.parts:
            width = across.at(value) - LABELS
            body.append(
                f'<rect x="{LABELS + left:.1f}" y="{top}" width="{width:.1f}" height="{BAR}" fill="{colour}">'
                f"<title>{escape(title)}</title></rect>"
            )
            left += width
        body.append(f'<text x="{LABELS + left + 6:.1f}" y="{top + BAR - 5}">{escape(row.value)}</text>')
    return _framed("".join(body), WIDTH, height)


def _grid(across: Axis, upward: Axis, label: Callable[[float], str], x: str, y: str, names: Sequence[str] = ()) -> str:
    body = [_across(across, HEIGHT - BOTTOM, label, names)]
    for value in upward.ticks():
        at = upward.at(value)
        body.append(f'<line x1="{across.first}" x2="{across.last}" y1="{at:.1f}" y2="{at:.1f}"/>')
        body.append(f'<text class="left" x="{LEFT - 7}" y="{at + 4:.1f}">{label(value)}</text>')
    middle = (TOP + HEIGHT - BOTTOM) / 2
    upright = f'<text class="axis" transform="translate(13 {middle}) rotate(-90)">{escape(y)}</text>'
    return f'<g class="grid">{"".join(body)}</g>{_label(across, HEIGHT - BOTTOM, x)}{upright}'


def _label(across: Axis, bottom: float, x: str) -> str:
    return f'<text class="axis" x="{(across.first + across.last) / 2}" y="{bottom + 37}">{escape(x)}</text>'


def _across(across: Axis, bottom: float, label: Callable[[float], str], names: Sequence[str]) -> str:
    ticks = [(float(place), name) for place, name in enumerate(names)]
    count = round((across.last - across.first) / TICK_PIXELS)
    ticks = ticks or [(value, label(value)) for value in across.ticks(count)]
    body = []
    for value, text in ticks:
        at = across.at(value)
        body.append(f'<line x1="{at:.1f}" x2="{at:.1f}" y1="{TOP}" y2="{bottom}"/>')
        body.append(f'<text class="tick" x="{at:.1f}" y="{bottom + 17}">{escape(text)}</text>')
    return "".join(body)


def _framed(body: str, width: int, height: int, kind: str = "", facts: Mapping[str, str] | None = None) -> str:
    named = f' class="{kind}"' if kind else ""
    named += "".join(f' data-{key}="{escape(text)}"' for key, text in (facts or {}).items())
    return f'<svg viewBox="0 0 {width} {height}" role="img" xmlns="http://www.w3.org/2000/svg"{named}>{body}</svg>'
