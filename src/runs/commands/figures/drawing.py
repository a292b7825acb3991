"""`plot`: curves of runs as a figure of a paper, by matplotlib without a display; no torch."""

import logging
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from src.config.wording import nearest, unknown
from src.errors import UserError
from src.metrics import paper_style
from src.runs.commands.figures.curves import AXES, Curve, curves, title
from src.runs.commands.figures.groups import grouped
from src.runs.commands.figures.output import write
from src.runs.commands.listing import print_json
from src.runs.commands.summary import Summary
from src.storage.streams import folded, to_stderr
from src.sweeps.report.looks import DASHES, DISTINCT

FORMATS = ("pdf", "png", "svg")
LOGS = ("none", "x", "y", "xy")
BAND = 0.2  # opacity of a band of one standard deviation to each side
# Before a style file, which may change all of it. 4.8 x 3 inches: a column and a half.
LOOK: dict[str, Any] = paper_style.LOOK | {
    "figure.figsize": (4.8, 3.0),
    "savefig.dpi": 300,
    "axes.prop_cycle": f"cycler(color={[*DISTINCT]})",
    "lines.linewidth": 1.4,
    "axes.axisbelow": True,
}
LINES = {"solid": "-", "dash": "--", "dot": ":", "dashdot": "-.", "longdash": (0, (8, 3))}


def plot(runs: Sequence[Summary], words: dict[str, str], *, as_json: bool) -> int:
    """Draw one figure. `words`: x, y, out, style, label, log, as typed. UserError."""
    x, y = words.get("x", "tokens"), words.get("y", "validation_loss")
    out = Path(words.get("out") or "figure.pdf").expanduser()
    form = out.suffix.removeprefix(".").lower()
    if form not in FORMATS:
        raise UserError(f"out={out}: {form or 'no ending'} is no format; end the name with .pdf, .png or .svg")
    log = words.get("log", "none")
    if log not in LOGS:
        raise UserError(f"log={log}: {unknown(log, LOGS, 'axis')}")
    style = _style(words["style"]) if "style" in words else None
    found, notes = curves(grouped(runs, [key for key in words.get("label", "").split(",") if key]), x, y)
    picture = drawn(found, x, y, form, log=log, style=style)
    write(out, picture)
    to_stderr(notes)
    if as_json:
        print_json({"figure": out, "x": x, "y": y, "curves": [vars(each) for each in found]})
        return 0
    print(folded(f"{out}: {', '.join(_told(each) for each in found)}", sys.stdout))
    return 0


def drawn(found: Sequence[Curve], x: str, y: str, form: str, *, log: str, style: str | Path | None) -> bytes:
    """The bytes of a picture, the same for the same curves."""
    import matplotlib
    from matplotlib import style as styles
    from matplotlib.figure import Figure
    from matplotlib.ticker import EngFormatter, ScalarFormatter

    with matplotlib.rc_context():
        with _refusing(style):
            styles.use([LOOK, *([] if style is None else [style])])
        figure = Figure(layout="constrained")
        axes = figure.add_subplot()
        colours = len(matplotlib.rcParams["axes.prop_cycle"])
        for number, curve in enumerate(found):
            _line(axes, curve, LINES[DASHES[number // colours % len(DASHES)]], number)
        if log in ("x", "xy"):
            axes.set_xscale("log")
        elif x in ("tokens", "flops"):
            axes.xaxis.set_major_formatter(EngFormatter(sep=""))
        if log in ("y", "xy"):
            axes.set_yscale("log")
            low, high = axes.get_ylim()
            if high < 10 * low:  # 3 and 4 within a decade, not 3 x 10^0
                axes.yaxis.set_major_formatter(ScalarFormatter())
                axes.yaxis.set_minor_formatter(ScalarFormatter())
        axes.set_xlabel(AXES[x][0])
        axes.set_ylabel(_words(title(y)))
        if len(found) > 1 or any(curve.deviation for curve in found):
            axes.legend()
        try:
            return paper_style.saved(figure, form)
        except RuntimeError as error:
            if not matplotlib.rcParams["text.usetex"]:
                raise
            raise UserError(f"style={style}: text.usetex: {str(error).partition(chr(10))[0]}") from error


def _line(axes: Any, curve: Curve, dashes: Any, number: int) -> None:
    """A curve with its band; marks where there are few points, as of validations."""
    label = curve.label if len(curve.runs) == 1 else f"{curve.label} ({len(curve.runs)} seeds)"
    (line,) = axes.plot(
        curve.x,
        curve.mean,
        linestyle=dashes,
        marker="o" if len(curve.x) <= 25 else None,
        markersize=3,
        label=_words(label),
    )
    line.set_gid(f"curve_{number + 1}")
    for place in curve.borders:
        axes.axvline(place, color=line.get_color(), linewidth=0.6, linestyle=":", zorder=0)
    if curve.deviation is not None:
        ends = zip(curve.mean, curve.deviation, strict=True)
        low, high = zip(*((mean - each, mean + each) for mean, each in ends), strict=True)
        axes.fill_between(curve.x, low, high, color=line.get_color(), alpha=BAND, linewidth=0).set_gid(
            f"band_{number + 1}"
        )


def _words(text: str) -> str:
    """Letters that mathematics or TeX would take for their own stay letters."""
    import matplotlib

    for letter in "%#&_$" if matplotlib.rcParams["text.usetex"] else "$":
        text = text.replace(letter, f"\\{letter}")
    return text


def _told(curve: Curve) -> str:
    end = f"{curve.mean[-1]:.4g}" + (f" +- {curve.deviation[-1]:.2g}" if curve.deviation else "")
    return f"{curve.label} ends at {end}" + (f" over {len(curve.runs)} seeds" if len(curve.runs) > 1 else "")


def _style(name: str) -> str | Path:
    """A file, or a style that comes with matplotlib. Never a module's: it would be imported."""
    from matplotlib import style as styles

    if (path := Path(name).expanduser()).is_file():
        return path
    if name in styles.library:
        return name
    near = nearest(name, styles.library)
    raise UserError(
        f"style={name}: no such file, nor a style of matplotlib" + (f"; did you mean {near}?" if near else "")
    )


@contextmanager
def _refusing(style: str | Path | None) -> Iterator[None]:
    """What matplotlib would only warn of, and draw without, is refused."""
    heard: list[str] = []

    class Ear(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            heard.append(record.getMessage().strip().partition("\n")[0])

    ear, logger = Ear(logging.WARNING), logging.getLogger("matplotlib")
    logger.addHandler(ear)
    before, logger.propagate = logger.propagate, False
    try:
        yield
    except (UnicodeDecodeError, ValueError) as error:
        if style is None:
            raise
        raise UserError(f"style={style}: {error}") from error
    finally:
        logger.removeHandler(ear)
        logger.propagate = before
    if heard and style is not None:
        raise UserError([f"style={style}: {each}" for each in heard])
