"""Charts of docs/scale.md: lines over a logarithmic axis, in panels beside each other, the same bytes each time."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

COLOURS = ("#1f4e79", "#d9622b", "#4f8a3c", "#7a4f9a", "#b8860b", "#3f8f8f")
MARKERS = "os^Dvx"


@dataclass(frozen=True)
class Line:
    """One line of a panel."""

    label: str
    x: tuple[float, ...]
    y: tuple[float, ...]


@dataclass(frozen=True)
class Panel:
    """One chart; a line keeps its colour in all panels of a picture."""

    title: str
    lines: Sequence[Line]


def draw(path: Path, panels: Sequence[Panel], horizontal: str, vertical: str, title: str = "") -> None:
    """An SVG with a title above all panels and a legend below; they share a vertical axis that begins at 0."""
    import matplotlib
    from matplotlib.figure import Figure
    from matplotlib.ticker import FixedLocator, FuncFormatter, NullLocator

    names = list(dict.fromkeys(line.label for panel in panels for line in panel.lines))
    with matplotlib.rc_context({"svg.hashsalt": "scale", "svg.fonttype": "none", "font.size": 9}):
        figure = Figure(figsize=(2.9 * max(2, len(panels)), 3.6), layout="constrained")
        drawn = {}
        first = None
        top = 1.05 * max(y for panel in panels for line in panel.lines for y in line.y)
        for number, panel in enumerate(panels, start=1):
            axes = figure.add_subplot(1, len(panels), number, sharey=first)
            first = first or axes
            for line in panel.lines:
                style = names.index(line.label)
                (drawn[line.label],) = axes.plot(
                    line.x, line.y, color=COLOURS[style], marker=MARKERS[style], markersize=3.5, linewidth=1.4
                )
            ticks = sorted({x for line in panel.lines for x in line.x})
            axes.set_xscale("log", base=2)
            axes.xaxis.set_major_locator(FixedLocator(ticks[:: 1 if len(ticks) < 6 else 3]))
            axes.xaxis.set_minor_locator(NullLocator())
            axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,.0f}"))
            axes.set_ylim(0, top)
            axes.set_title(panel.title, loc="left", fontsize=9, fontweight="bold")
            axes.set_xlabel(horizontal)
            if number == 1:
                axes.set_ylabel(vertical)
            axes.grid(color="#e4e4e4", linewidth=0.6)
            axes.spines[["top", "right"]].set_visible(False)
        if title:
            figure.suptitle(title, fontsize=10, fontweight="bold")
        columns = min(len(names), 6 if max(map(len, names)) < 20 else 2)
        figure.legend([drawn[name] for name in names], names, loc="outside lower center", ncols=columns, frameon=False)
        figure.savefig(path, format="svg", metadata={"Date": None})
