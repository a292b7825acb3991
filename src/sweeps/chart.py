"""Charts as SVG text: sharp at any size, readable by a browser alone, in the page's own fonts and colours."""

import math
from collections.abc import Callable, Sequence
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
    """`title` is shown when a pointer rests on it."""

    xs: Sequence[float]
    ys: Sequence[float]
    colour: str
    dash: str
    title: str


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


def lines(curves: Sequence[Curve], *, x: str, y: str, y_range: tuple[float, float]) -> str:
    """Curves over a linear axis from 0, as wide as the page; what leaves `y_range` is cut off."""
    right = 2 * WIDTH - RIGHT
    across = Axis(0.0, max((each.xs[-1] for each in curves), default=1.0), LEFT, right)
    upward = Axis(*y_range, HEIGHT - BOTTOM, TOP)
    drawn = [_curve(each, across, upward) for each in curves]
    clip = f'<clipPath id="plot"><rect x="{LEFT}" y="{TOP}" width="{right - LEFT}" '
    clip += f'height="{HEIGHT - TOP - BOTTOM}"/></clipPath>'
    body = f'{clip}<g clip-path="url(#plot)">{"".join(drawn)}</g>'
    return _framed(_grid(across, upward, number, x, y) + body, 2 * WIDTH, HEIGHT)


def _curve(curve: Curve, across: Axis, upward: Axis) -> str:
    points = " ".join(
        f"{across.at(x):.1f},{upward.at(y):.1f}" for x, y in zip(curve.xs, curve.ys, strict=True) if math.isfinite(y)
    )
    dash = f' stroke-dasharray="{curve.dash}"' if curve.dash else ""
    # A wide invisible line under the thin one is what the pointer finds.
    return (
        f'<g class="curve"><title>{escape(curve.title)}</title><polyline class="reach" points="{points}"/>'
        f'<polyline points="{points}" stroke="{curve.colour}"{dash}/></g>'
    )


def dots(found: Sequence[Dot], *, x: str, y: str, log: bool, names: Sequence[str]) -> str:
    """One dot per run, the means of equal `x` joined; `names`, if any, are the categories of the axis."""
    xs, ys = [each.x for each in found], [each.y for each in found]
    room = (max(ys) - min(ys)) * 0.1 or abs(ys[0]) * 0.05 or 1.0
    upward = Axis(min(ys) - room, max(ys) + room, HEIGHT - BOTTOM, TOP)
    across = Axis(*_widened(xs, log, len(names)), LEFT, WIDTH - RIGHT, log)
    means = [(at, [each.y for each in found if each.x == at]) for at in sorted(set(xs))]
    path = " ".join(f"{across.at(at):.1f},{upward.at(sum(each) / len(each)):.1f}" for at, each in means)
    marks = "".join(
        f'<circle cx="{across.at(each.x):.1f}" cy="{upward.at(each.y):.1f}" r="6" fill="{each.colour}">'
        f"<title>{escape(each.title)}</title></circle>"
        for each in found
    )
    grid = _grid(across, upward, number, x, y, names)
    return _framed(f'{grid}<polyline class="mean" points="{path}"/>{marks}', WIDTH, HEIGHT)


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
    body = [_across(across, height - BOTTOM, number, x, ())]
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
    body = [_across(across, HEIGHT - BOTTOM, label, x, names)]
    for value in upward.ticks():
        at = upward.at(value)
        body.append(f'<line x1="{across.first}" x2="{across.last}" y1="{at:.1f}" y2="{at:.1f}"/>')
        body.append(f'<text class="left" x="{LEFT - 7}" y="{at + 4:.1f}">{label(value)}</text>')
    middle = (TOP + HEIGHT - BOTTOM) / 2
    body.append(f'<text class="axis" transform="translate(13 {middle}) rotate(-90)">{escape(y)}</text>')
    return "".join(body)


def _across(across: Axis, bottom: float, label: Callable[[float], str], x: str, names: Sequence[str]) -> str:
    ticks = [(float(place), name) for place, name in enumerate(names)]
    count = round((across.last - across.first) / TICK_PIXELS)
    ticks = ticks or [(value, label(value)) for value in across.ticks(count)]
    body = []
    for value, text in ticks:
        at = across.at(value)
        body.append(f'<line x1="{at:.1f}" x2="{at:.1f}" y1="{TOP}" y2="{bottom}"/>')
        body.append(f'<text class="tick" x="{at:.1f}" y="{bottom + 17}">{escape(text)}</text>')
    middle = (across.first + across.last) / 2
    body.append(f'<text class="axis" x="{middle}" y="{bottom + 37}">{escape(x)}</text>')
    return "".join(body)


def _framed(body: str, width: int, height: int) -> str:
    return f'<svg viewBox="0 0 {width} {height}" role="img" xmlns="http://www.w3.org/2000/svg">{body}</svg>'
