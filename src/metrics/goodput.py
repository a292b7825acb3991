"""Where the time of a run went, over all its attempts: what trained, and what did not."""

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import astuple, dataclass, fields
from pathlib import Path
from typing import Any

from src.metrics.lines import Lines
from src.metrics.tracker import METRICS_FILE


@dataclass(frozen=True)
class Span:
    """One attempt as its launcher saw it, in seconds since 1970; `ended` is None where nobody noted it."""

    started: float
    ended: float | None


@dataclass(frozen=True)
class Goodput:
    """Seconds of wall time; together they are the time since the run was asked for."""

    useful: float = 0.0  # optimizer steps that the run kept
    restart: float = 0.0  # from an attempt's start to its first step done, and steps that a later attempt did again
    compile: float = 0.0
    checkpoint: float = 0.0  # the loop stood still for a save
    data: float = 0.0  # the loop waited for samples
    other: float = 0.0  # validation, logging, leaving
    queue: float = 0.0  # nobody worked: before the first attempt and between two

    @property
    def total(self) -> float:
        """All of it."""
        return float(sum(astuple(self)))

    @property
    def share(self) -> float | None:
        """Useful of all; None before the first second."""
        return self.useful / self.total if self.total > 0 else None

    def __add__(self, other: "Goodput") -> "Goodput":
        return Goodput(*(mine + theirs for mine, theirs in zip(astuple(self), astuple(other), strict=True)))

    def to_dict(self) -> dict[str, float]:
        """By part."""
        return {each.name: getattr(self, each.name) for each in fields(self)}


def goodput(folder: Path, spans: Sequence[Span] = (), submitted: float | None = None) -> Goodput:
    """From metrics.jsonl; `spans` tell of what happened before a tracker was open and after it was closed."""
    lives = _lives(folder)
    whole = Goodput()
    end = submitted
    for span, lines in _paired(lives, list(spans)):
        kept_until = min((_first_step(each) for each in lives if each and lines and _after(each, lines)), default=None)
        last = max([line["time"] for line in lines], default=span.started)
        ended = max(last, span.ended or last)
        waited = max(0.0, span.started - end) if end is not None else 0.0
        whole += _life(lines, span.started, ended, kept_until) + Goodput(queue=waited)
        end = ended
    return whole


def _lives(folder: Path) -> list[list[dict[str, Any]]]:
    """The lines of each attempt that opened a tracker, oldest first."""
    found: dict[int, list[dict[str, Any]]] = defaultdict(list)
    for line in Lines(folder / METRICS_FILE).read():
        found[int(line["attempt"])].append(line)
    return [found[number] for number in sorted(found)]


def _paired(lives: list[list[dict[str, Any]]], spans: list[Span]) -> list[tuple[Span, list[dict[str, Any]]]]:
    """Each attempt with its lines: a span may have none, and lines may have no span."""
    pairs: list[tuple[Span, list[dict[str, Any]]]] = []
    left = list(lives)
    for index, span in enumerate(spans):
        following = spans[index + 1].started if index + 1 < len(spans) else float("inf")
        own = [life for life in left if life[0]["time"] < following]
        left = left[len(own) :]
        pairs.append((span, [line for life in own for line in life]))
    pairs += [(Span(_process_start(life), None), life) for life in left]
    return pairs


def _process_start(life: list[dict[str, Any]]) -> float:
    told = [line["time"] - line["startup/total_seconds"] for line in life if "startup/total_seconds" in line]
    return float(min([life[0]["time"], *told]))


def _first_step(life: list[dict[str, Any]]) -> float:
    return min((line["step"] for line in life if "step_seconds" in line), default=float("inf"))


def _after(life: list[dict[str, Any]], lines: list[dict[str, Any]]) -> bool:
    return bool(life[0]["attempt"] > lines[-1]["attempt"])


def _life(lines: list[dict[str, Any]], started: float, ended: float, kept_until: float | None) -> Goodput:
    """One attempt; steps from `kept_until` on were done again by a later one."""
    told = next((line for line in lines if "startup/total_seconds" in line), None)
    if told is None:
        return Goodput(restart=ended - started)
    compiling = float(told.get("startup/compile_seconds", 0.0))
    useful = data = lost = 0.0
    before = _first_step(lines)  # its own time is part of the start
    for line in lines:
        if "step_seconds" not in line or line["step"] <= before:
            continue
        steps = line["step"] - before
        again = min(steps, max(0.0, line["step"] - kept_until + 1)) if kept_until is not None else 0.0
        useful += (steps - again) * (line["step_seconds"] - line["data_seconds"])
        data += (steps - again) * line["data_seconds"]
        lost += again * line["step_seconds"]
        before = line["step"]
    saving = float(sum(line.get("checkpoint/stall_seconds", 0.0) for line in lines))
    starting = max(0.0, told["time"] - started - compiling)
    other = max(0.0, ended - told["time"] - useful - data - lost - saving)
    return Goodput(useful, starting + lost, compiling, saving, data, other)


def duration(seconds: float) -> str:
    """3 h 12 min, 4 min 5 s, 12 s."""
    whole = round(seconds)
    if whole >= 3600:
        return f"{whole // 3600} h {whole % 3600 // 60} min"
    return f"{whole // 60} min {whole % 60} s" if whole >= 60 else f"{whole} s"
