"""`list`: the runs of a root or a sweep, one a line."""

import json
import sys
from collections.abc import Callable, Sequence
from typing import Any

from rich.text import Text

from src.metrics.goodput import duration
from src.runs.commands.summary import Summary
from src.sweeps.commands import COLOURS, terminal

# Column, and its text; empty columns are left out.
COLUMNS: Sequence[tuple[str, Callable[[Summary], str]]] = (
    ("run", lambda run: run.name),
    ("state", lambda run: run.state),
    ("step", lambda run: _of(run.step, run.steps)),
    ("loss", lambda run: _number(run.loss, "{:.4f}")),
    ("validation", lambda run: _number(run.validation_loss, "{:.4f}")),
    ("tok/s/device", lambda run: _number(run.tokens_per_second, "{:,.0f}")),
    ("goodput", lambda run: _number(run.goodput, "{:.0%}")),
    ("age", lambda run: "" if run.age is None else age(run.age)),
    ("layout", lambda run: run.layout),
    ("size", lambda run: "" if run.parameters is None else short(run.parameters)),
    ("where", lambda run: run.where),
    ("what is known", lambda run: run.detail.partition("\n")[0]),
)


def show_list(runs: Sequence[Summary], *, as_json: bool) -> int:
    """Exit code 1 where there is none: a script can ask whether any run has failed."""
    if as_json:
        print_json([run.to_dict() for run in runs])
        return 0 if runs else 1
    if not runs:
        print("no such run", file=sys.stderr)
        return 1
    terminal().print(table(runs), no_wrap=True, overflow="ellipsis")
    states = [run.state for run in runs]
    terminal().print(", ".join(f"{states.count(state)} {state}" for state in dict.fromkeys(states)), highlight=False)
    return 0


def table(runs: Sequence[Summary]) -> Text:
    """One line a run, without columns that none of them fills. Not a table of rich, which takes 2 s for 1,000 rows."""
    columns = [(name, [cell(run) for run in runs]) for name, cell in COLUMNS]
    kept = [(name, cells, max(map(len, (name, *cells)))) for name, cells in columns if any(cells)]
    found = Text("  ".join(name.ljust(width) for name, _, width in kept).rstrip(), style="bold", end="")
    lines = [found]
    for number, run in enumerate(runs):
        line = Text()
        for name, cells, width in kept:
            line.append(f"{cells[number]:<{width}}  ", COLOURS[run.state] if name == "state" else None)
        line.rstrip()
        lines.append(line)
    return Text("\n").join(lines)


def ordered(runs: Sequence[Summary], key: str | None) -> list[Summary]:
    """By a fact, small ones first, unknown ones last; by default what spoke last comes first."""
    if key is None:
        return sorted(runs, key=lambda run: -(run.active or 0.0))
    return sorted(runs, key=lambda run: (getattr(run, key) is None, getattr(run, key) or 0))


def print_json(value: Any) -> None:
    """For machines. A number that is not finite is null: JSON has no word for it."""
    print(json.dumps(_finite(value), indent=2, default=str))


def short(count: float) -> str:
    """8.0B, 124M, 65.5k."""
    for bound, letter in ((1e12, "T"), (1e9, "B"), (1e6, "M"), (1e3, "k")):
        if count >= bound:
            return f"{count / bound:.3g}{letter}"
    return f"{count:g}"


def size_text(count: int) -> str:
    """1.5 GiB, 12 KiB, 7 bytes."""
    for unit, bound in (("TiB", 2**40), ("GiB", 2**30), ("MiB", 2**20), ("KiB", 2**10)):
        if count >= bound:
            return f"{count / bound:.3g} {unit}"
    return f"{count} bytes"


def age(seconds: float) -> str:
    """With one unit from days on: 3 d, 2 h 5 min, 12 s."""
    return f"{seconds / 86400:.0f} d" if seconds >= 172_800 else duration(seconds)


def _of(step: int | None, steps: int | None) -> str:
    return f"{'' if step is None else step}{'' if steps is None else f'/{steps}'}"


def _number(value: float | None, form: str) -> str:
    return "" if value is None else form.format(value)


def _finite(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _finite(each) for key, each in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(each) for each in value]
    return None if isinstance(value, float) and (value != value or abs(value) == float("inf")) else value
