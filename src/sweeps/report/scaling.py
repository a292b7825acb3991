"""Figures of a fit: isoFLOP curves, and losses beside those of the law. Traces of plotly, for page.js to draw."""

from collections.abc import Mapping, Sequence
from html import escape
from typing import Any

FIT_FILE = "fit.json"  # of a sweep's folder
COLOURS = ("#3366cc", "#e07b39", "#2a9d6f", "#8a63d2", "#cf3d3d", "#4c9fb8", "#b5873a", "#7a7f8c")


def figures_of(facts: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    """By title: `traces`, `layout` and `note`; none without a fit."""
    if not facts:
        return {}
    return {"IsoFLOP curves": _isoflop(facts), "Scaling law": _law(facts)}


def _dots(x: Sequence[float], y: Sequence[float], text: Sequence[str], name: str, **marker: Any) -> dict[str, Any]:
    return {
        "x": [*x], "y": [*y], "text": [*text], "name": name, "mode": "markers",
        "hovertemplate": "%{text}<extra></extra>", "marker": {"size": 9, **marker},
    }  # fmt: skip


def _line(x: Sequence[float], y: Sequence[float], name: str, **line: Any) -> dict[str, Any]:
    shown = {"x": [*x], "y": [*y], "name": name, "mode": "lines", "hoverinfo": "skip"}
    return shown | {"line": {"width": 1.8, **line}}


def _told(run: Mapping[str, Any]) -> str:
    return (
        f"run {run['number']}: {escape(run['label'])}<br>{run['parameters']:,.0f} parameters, "
        f"{run['tokens']:,.0f} tokens<br>loss {run['loss']:.4f}"
    )


def _isoflop(facts: Mapping[str, Any]) -> dict[str, Any]:
    traces: list[dict[str, Any]] = []
    runs = {run["number"]: run for run in [*facts["runs"], *facts["left_out"]]}
    best = []
    for place, curve in enumerate(facts["isoflop"]):
        colour, name = COLOURS[place % len(COLOURS)], f"{curve['flops']:.2g} FLOPs"
        mine = [runs[number] for number in curve["numbers"]]
        sizes, losses = [run["parameters"] for run in mine], [run["loss"] for run in mine]
        traces.append(_dots(sizes, losses, [_told(run) for run in mine], name, color=colour))
        across, up = zip(*curve["line"], strict=True)
        traces.append(_line(across, up, name, color=colour) | {"showlegend": False})
        if curve["best_size"] is not None:
            text = f"lowest at {name}: {curve['best_size']:,.0f} parameters"
            best.append((curve["best_size"], curve["best_loss"], text))
    if best:
        lowest = [[*column] for column in zip(*best, strict=True)]
        traces.append(_dots(lowest[0], lowest[1], lowest[2], "lowest", symbol="x", color="#7a7f8c"))
    if not traces:
        traces = [_dots([run["parameters"] for run in runs.values()], [run["loss"] for run in runs.values()],
                        [_told(run) for run in runs.values()], "runs", color=COLOURS[0])]  # fmt: skip
    note = "Final loss over size, a curve for each amount of compute."
    return _figure(traces, "parameters", f"final {facts['loss']}", note)


def _law(facts: Mapping[str, Any]) -> dict[str, Any]:
    law, runs = facts["law"], facts["runs"]
    tokens = sorted({run["tokens"] for run in [*runs, *facts["left_out"]]})
    low, high = tokens[0], tokens[-1]
    span = [low * (high / low) ** (at / 59) for at in range(60)] if high > low else tokens
    traces = []
    for place, size in enumerate(sorted({run["parameters"] for run in [*runs, *facts["left_out"]]})):
        colour = COLOURS[place % len(COLOURS)]
        mine = [run for run in runs if run["parameters"] == size]
        curve = [law["E"] + law["A"] / size ** law["alpha"] + law["B"] / each ** law["beta"] for each in span]
        name = f"{size:,.0f}"
        traces.append(_line(span, curve, name, color=colour, dash="dot") | {"showlegend": not mine})
        if mine:
            losses = [run["loss"] for run in mine]
            texts = [_told(run) for run in mine]
            traces.append(_dots([run["tokens"] for run in mine], losses, texts, name, color=colour))
    for run in facts["left_out"]:
        bars = {"type": "data", "symmetric": False, "array": [run["high"] - run["foretold"]]}
        bars |= {"arrayminus": [run["foretold"] - run["low"]]}
        text = f"{_told(run)}<br>foretold {run['foretold']:.4f}, 95 % {run['low']:.4f} to {run['high']:.4f}"
        at, number = [run["tokens"]], run["number"]
        foretold = _dots(at, [run["foretold"]], [text], f"foretold: run {number}", symbol="diamond-open")
        traces.append(foretold | {"error_y": bars})
        traces.append(_dots(at, [run["loss"]], [text], f"left out: run {number}", symbol="star"))
    note = (
        f"L = {law['E']:.3f} + {law['A']:.3g} / N^{law['alpha']:.2f} + {law['B']:.3g} / D^{law['beta']:.2f}: dotted, a "
        "line for each size; dots are runs, the star one that was left out, beside what the others foretell (95 %)."
    )
    return _figure(traces, "tokens", f"final {facts['loss']}", note)


def _figure(traces: list[dict[str, Any]], x: str, y: str, note: str) -> dict[str, Any]:
    layout = {
        "xaxis": {"title": {"text": x}, "type": "log", "exponentformat": "SI"},
        "yaxis": {"title": {"text": y}},
        "showlegend": True,
        "height": 400,
        "legend": {"orientation": "h", "x": 0, "y": 1.02, "yanchor": "bottom"},
    }
    return {"traces": traces, "layout": layout, "note": note}
