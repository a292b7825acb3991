"""The loss curve of a run folder as a picture."""

from io import BytesIO
from pathlib import Path
from typing import Any

from src.errors import FolderError
from src.metrics.history import History, Series, borders, read
from src.storage.atomic_write import atomic_write
from src.storage.json_lines import METRICS_FILE

CURVE_FILE = "loss.png"
TRAIN, TRAIN_POINTS, VALIDATION, BORDER = "#1f4e79", "#9dbcd9", "#d9622b", "#999999"


def plot(folder: Path) -> Path:
    """Draw training and validation loss against tokens, without a display. FolderError where there is none."""
    from matplotlib.figure import Figure

    history = read(folder)
    loss = history.series.get("loss")
    if loss is None:
        raise FolderError(f"{folder / METRICS_FILE} holds no loss yet; train for at least one logged step")
    validation = history.series.get("validation_loss", Series())
    tokens = history.series.get("tokens")
    figure = Figure(figsize=(9.0, 5.4), dpi=150, layout="constrained")
    axes = figure.add_subplot()
    _draw(axes, loss, validation, tokens)
    _mark_borders(axes, history, tokens)
    axes.set_title(folder.resolve().name, loc="left", fontsize=13, fontweight="bold")
    if history.attempts > 1:
        axes.set_title(f"{history.attempts} attempts", loc="right", fontsize=10, color="#666666")
    path = folder / CURVE_FILE
    picture = BytesIO()
    figure.savefig(picture, format="png")
    atomic_write(path, picture.getvalue())
    return path


def _draw(axes: Any, loss: Series, validation: Series, tokens: Series | None) -> None:
    from matplotlib.ticker import EngFormatter

    horizontal = at_tokens(loss, tokens)
    if len(loss.values) >= 50:
        axes.plot(horizontal, loss.values, color=TRAIN_POINTS, linewidth=0.8, alpha=0.8)
        means = smoothed(loss.values)
        axes.plot(horizontal, means, color=TRAIN, linewidth=1.8, label=_label("train, smoothed", means))
    else:
        axes.plot(horizontal, loss.values, color=TRAIN, linewidth=1.8, label=_label("train", loss.values))
    if validation.values:
        axes.plot(
            at_tokens(validation, tokens),
            validation.values,
            color=VALIDATION,
            linewidth=1.2,
            marker="o",
            markersize=4.5,
            label=_label("validation", validation.values),
        )
    axes.xaxis.set_major_formatter(EngFormatter(sep=""))
    axes.set_xlabel("tokens" if tokens else "step")
    axes.set_ylabel("loss (nats per token)")
    axes.grid(color="#e4e4e4", linewidth=0.8)
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False, fontsize=10.5)


def _mark_borders(axes: Any, history: History, tokens: Series | None) -> None:
    """A line where each stage but the first begins."""
    ends = borders(history)
    for number, place in zip(ends, at_tokens(Series([*ends.values()]), tokens), strict=True):
        axes.axvline(place, color=BORDER, linewidth=0.8, linestyle=(0, (4, 3)), zorder=0)
        where = {"xy": (place, 1.0), "xycoords": ("data", "axes fraction"), "va": "top"}
        axes.annotate(f" stage {number}", fontsize=8.5, color="#666666", **where)


def at_tokens(series: Series, tokens: Series | None) -> list[float]:
    """The tokens seen at each step of a series; without tokens the steps themselves."""
    if tokens is None:
        return [float(step) for step in series.steps]
    import numpy

    # Step 0 has seen no token; a validation may lie between two logged steps.
    return [float(seen) for seen in numpy.interp(series.steps, [0, *tokens.steps], [0, *tokens.values])]


def smoothed(values: list[float]) -> list[float]:
    """Gaussian mean around each point, a fiftieth of the run wide: no lag. What is not finite is passed over."""
    import numpy

    every = numpy.asarray(values, dtype=float)
    finite = numpy.isfinite(every)
    width = max(1.0, len(values) / 100)
    offsets = numpy.arange(-int(3 * width), int(3 * width) + 1)
    kernel = numpy.exp(-0.5 * (offsets / width) ** 2)
    total = numpy.convolve(numpy.where(finite, every, 0.0), kernel, mode="same")
    weight = numpy.convolve(finite.astype(float), kernel, mode="same")
    with numpy.errstate(invalid="ignore"):
        return [float(mean) for mean in total / weight]


def _label(name: str, values: list[float]) -> str:
    return f"{name}, last {values[-1]:.3f}"
