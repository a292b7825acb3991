"""Goodput: the share of a run's wall time, over all attempts, that trained steps which were kept.

`goodput` computes it from a run folder; `Meter` keeps it up to date during the run, for metrics.jsonl.
"""

from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import astuple, dataclass, fields
from pathlib import Path
from typing import Any

from src.runs.records import AttemptSpan, asked, spans
from src.runs.records import submitted as handed_over
from src.storage.json_lines import METRICS_FILE, Lines


@dataclass(frozen=True)
class Goodput:
    """Wall seconds of a run by what they were spent on. They add up to the time since the run was submitted."""

    useful: float = 0.0  # optimizer steps that the run kept
    start: float = 0.0  # from the first attempt's start to its first step done
    restart: float = 0.0  # the same of a later attempt, and steps that it did again
    compile: float = 0.0
    checkpoint: float = 0.0  # the loop stood still for a save
    data: float = 0.0  # the loop waited for samples
    other: float = 0.0  # validation, logging, leaving
    queue: float = 0.0  # submitted, and not started, or not started again, yet
    idle: float = 0.0  # it had ended, and nobody had asked for it again

    @property
    def total(self) -> float:
        """Seconds of all parts."""
        return float(sum(astuple(self)))

    @property
    def share(self) -> float | None:
        """Useful seconds over all seconds; None before the first second."""
        return self.useful / self.total if self.total > 0 else None

    def __add__(self, other: "Goodput") -> "Goodput":
        return Goodput(*(mine + theirs for mine, theirs in zip(astuple(self), astuple(other), strict=True)))

    def to_dict(self) -> dict[str, float]:
        """Seconds by part."""
        return {each.name: getattr(self, each.name) for each in fields(self)}

    def metrics(self) -> dict[str, float]:
        """Seconds by part and the share, as metrics for the log."""
        values = {f"goodput/{part}_seconds": seconds for part, seconds in self.to_dict().items()}
        return values if self.share is None else values | {"goodput/share": self.share}


def goodput(folder: Path, submitted: float | None = None) -> Goodput:
    """Goodput of all attempts of a run folder. `submitted` (seconds since 1970) is used where the folder has no
    record of it.
    """
    return _sum(_lives(folder), spans(folder), asked(folder, submitted), handed_over(folder))


class Meter:
    """Goodput of a run during its newest attempt. The attempts before it are read once, at the first step."""

    def __init__(self, folder: Path, attempt: int, opened: float) -> None:
        """`opened`: seconds since 1970, when this attempt's log was."""
        self._folder, self._attempt = folder, attempt
        known = spans(folder)
        self._started = known[-1].started if known else opened
        self._span = known[-1] if known else AttemptSpan(opened, None)
        self._life = _Life(self._started, first=len(known) < 2)
        self._before: Goodput | None = None
        self._interruption: float | None = None

    def metrics(self, line: Mapping[str, Any]) -> dict[str, float]:
        """Goodput after this line of metrics.jsonl; empty for a line that ends no steps.

        The first after a restart also has the seconds between the last line of the attempt before and this attempt.
        """
        self._life.take(line)
        if "step_seconds" not in line:
            return {}
        stood: dict[str, float] = {}
        if self._before is None:
            self._before, last = self._past(int(line["step"]))
            stood = {} if last is None else {"goodput/interruption_seconds": line["time"] - last}
        return (self._before + self._life.account(line["time"])).metrics() | stood

    def last(self, now: float) -> dict[str, float]:
        """Goodput at the end of the attempt."""
        return {} if self._before is None else (self._before + self._life.account(now)).metrics()

    def _past(self, step: int) -> tuple[Goodput, float | None]:
        """The attempts before, of which steps from `step` on are done again; and when the newest said its last word."""
        lives = [life for life in _lives(self._folder) if life[0]["attempt"] < self._attempt]
        earlier = [span for span in spans(self._folder) if span.started < self._started]
        asks = handed_over(self._folder)
        whole = _sum(lives, earlier, asked(self._folder), asks, until=self._span, again=step)
        return whole, lives[-1][-1]["time"] if lives else None


def _lives(folder: Path) -> list[list[dict[str, Any]]]:
    """The lines of each attempt that opened a tracker, oldest first."""
    found: dict[int, list[dict[str, Any]]] = defaultdict(list)
    for line in Lines(folder / METRICS_FILE).read():
        found[int(line["attempt"])].append(line)
    return [found[number] for number in sorted(found)]


def _sum(
    lives: list[list[dict[str, Any]]],
    spans: list[AttemptSpan],
    since: float | None,
    asks: Sequence[float],
    *,
    until: AttemptSpan | None = None,
    again: float = float("inf"),
) -> Goodput:
    """All attempts, and the waiting from `since` to the first, between two, and up to the start of `until`.

    `asks`: when the run was handed to a scheduler.

    Steps that a later attempt took, and those from `again` on, were not kept.
    """
    whole, end = Goodput(), since
    first = True
    for span, lines in _paired(lives, spans):
        later = (_first_step(each) for each in lives if lines and each[0]["attempt"] > lines[-1]["attempt"])
        life = _Life(span.started, min([*later, again]), first=first)
        for line in lines:
            life.take(line)
        last = max([line["time"] for line in lines], default=span.started)
        ended = max(last, span.ended or last)
        whole += life.account(ended) + _waited(end, span, asks, first=first)
        end, first = ended, False
    return whole if until is None else whole + _waited(end, until, asks, first=first)


def _waited(since: float | None, span: AttemptSpan, asks: Sequence[float], *, first: bool) -> Goodput:
    """Before this attempt: for a person who asks for it again, then for the scheduler."""
    if since is None or span.started <= since:
        return Goodput()
    later = [ask for ask in asks if since < ask <= span.started]
    if first or not (later or not span.scheduled):
        return Goodput(queue=span.started - since)
    asked_again = max(later, default=span.started)
    return Goodput(queue=span.started - asked_again, idle=asked_again - since)


def _paired(
    lives: list[list[dict[str, Any]]], spans: Sequence[AttemptSpan]
) -> list[tuple[AttemptSpan, list[dict[str, Any]]]]:
    """Each attempt with its lines: a span may have none, and lines may have no span."""
    pairs: list[tuple[AttemptSpan, list[dict[str, Any]]]] = []
    left = list(lives)
    for index, span in enumerate(spans):
        following = spans[index + 1].started if index + 1 < len(spans) else float("inf")
        own = [life for life in left if life[0]["time"] < following]
        left = left[len(own) :]
        pairs.append((span, [line for life in own for line in life]))
    pairs += [(AttemptSpan(_process_start(life), None), life) for life in left]
    return pairs


def _process_start(life: list[dict[str, Any]]) -> float:
    told = [line["time"] - line["startup/total_seconds"] for line in life if "startup/total_seconds" in line]
    return float(min([life[0]["time"], *told]))


def _first_step(life: list[dict[str, Any]]) -> float:
    return min((line["step"] for line in life if "step_seconds" in line), default=float("inf"))


class _Life:
    """Accumulates one attempt line by line. Steps from `kept_until` on were repeated by a later attempt."""

    def __init__(self, started: float, kept_until: float = float("inf"), *, first: bool) -> None:
        self._started, self._kept_until, self._first = started, kept_until, first
        self._ready: float | None = None  # when the first step was done
        self._step: int | None = None  # the last that was told
        self._compile = self._useful = self._data = self._lost = self._saving = 0.0

    def take(self, line: Mapping[str, Any]) -> None:
        """Account for the next line of metrics.jsonl."""
        if "startup/total_seconds" in line and self._ready is None:
            self._ready, self._compile = line["time"], float(line.get("startup/compile_seconds", 0.0))
        self._saving += line.get("checkpoint/stall_seconds", 0.0)
        if "step_seconds" not in line:
            return
        if self._step is not None:  # the first step's own time is part of the start
            steps = line["step"] - self._step
            again = min(steps, max(0.0, line["step"] - self._kept_until + 1))
            self._useful += (steps - again) * (line["step_seconds"] - line["data_seconds"])
            self._data += (steps - again) * line["data_seconds"]
            self._lost += again * line["step_seconds"]
        self._step = line["step"]

    def account(self, ended: float) -> Goodput:
        if self._ready is None:
            return self._starting(ended - self._started)
        starting = max(0.0, self._ready - self._started - self._compile)
        known = self._useful + self._data + self._lost + self._saving
        other = max(0.0, ended - self._ready - known)
        took = Goodput(self._useful, 0.0, self._lost, self._compile, self._saving, self._data, other)
        return took + self._starting(starting)

    def _starting(self, seconds: float) -> Goodput:
        return Goodput(start=seconds) if self._first else Goodput(restart=seconds)


def duration(seconds: float) -> str:
    """3 h 12 min, 4 min 5 s, 12 s."""
    whole = round(seconds)
    if whole >= 3600:
        return f"{whole // 3600} h {whole % 3600 // 60} min"
    return f"{whole // 60} min {whole % 60} s" if whole >= 60 else f"{whole} s"
