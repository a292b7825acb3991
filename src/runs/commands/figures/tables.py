"""`table`: the final numbers of runs, a row for each config, for the screen or as LaTeX."""

import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from src.errors import FolderError, UserError, some
from src.metrics.history import read
from src.runs.commands.figures.groups import Group, grouped, short_key
from src.runs.commands.figures.output import write
from src.runs.commands.listing import print_json, short
from src.runs.commands.summary import Summary
from src.storage.streams import to_stderr
from src.sweeps.commands import folding, terminal

# Of these a table without y= shows what any run has. `parameters` is the plan's, others are metrics.
USUAL = ("parameters", "tokens", "loss", "validation_loss")
COUNTS = ("parameters", "tokens")
DIGITS = 5  # that count: losses of runs worth comparing differ in the third
SPECIAL = {"\\": r"\textbackslash{}", "~": r"\textasciitilde{}", "^": r"\textasciicircum{}"}
SPECIAL |= {letter: f"\\{letter}" for letter in "&%$#_{}"}


@dataclass(frozen=True)
class Cell:
    """A final number over the seeds of a config; `deviation`: sample standard deviation, none of one run."""

    mean: float
    deviation: float | None

    def texts(self, name: str) -> tuple[str, ...]:
        """The mean, and the deviation with as many digits behind the point."""
        if name in COUNTS:
            return (short(self.mean),)
        if not math.isfinite(self.mean):
            return ("diverged",)
        if self.mean and abs(self.mean) < 1e-3:
            return (f"{self.mean:.2e}",)
        places = DIGITS - 1 - (math.floor(math.log10(abs(self.mean))) if self.mean else 0)
        numbers = [self.mean] if self.deviation is None else [self.mean, self.deviation]
        return tuple(f"{each:.{min(DIGITS, max(0, places))}f}" for each in numbers)


@dataclass(frozen=True)
class ConfigRow:
    """One config."""

    group: Group
    cells: Mapping[str, Cell]

    def to_dict(self) -> dict[str, Any]:
        """Plain values, for machines."""
        numbers = {name: vars(cell) for name, cell in self.cells.items()}
        return {"label": self.group.label, "runs": [run.name for run in self.group.runs],
                "config": dict(self.group.values), "numbers": numbers}  # fmt: skip


def table(runs: Sequence[Summary], words: dict[str, str], command: str, *, latex: bool, as_json: bool) -> int:
    """Show the table, print it as LaTeX, or write that to a file. `words`: y, out, label, as typed. UserError."""
    out = Path(words["out"]).expanduser() if "out" in words else None
    if out is not None and out.suffix != ".tex":
        raise UserError(f"out={out}: a table is LaTeX; end the name with .tex, or take --json for other programs")
    asked = [name for name in words.get("y", "").split(",") if name]
    groups = grouped(runs, [key for key in words.get("label", "").split(",") if key])
    made, names = rows(groups, asked)
    open_ends = [f"{run.name}: {run.state} at step {run.step or 0} of {run.steps or '?'}, so its numbers are not final"
                 for run in runs if run.state != "finished"]  # fmt: skip
    text = written(made, names, command, open_ends)
    if out is not None:
        write(out, text)
    to_stderr(open_ends)
    if as_json:
        print_json({"rows": [row.to_dict() for row in made], "table": out})
    elif latex:
        print(text, end="")
    else:
        _show(made, names)
        if out is not None:
            print(out)
    return 0


def rows(groups: Sequence[Group], asked: Sequence[str]) -> tuple[list[ConfigRow], list[str]]:
    """A row for each group, and the names of its numbers. FolderError for a name that no run has."""
    finals = {run: _finals(run) for group in groups for run in group.runs}
    there = {name for known in finals.values() for name in known}
    if absent := [name for name in asked if name not in there]:
        raise FolderError([f"y={name}: no run has it; there are {some(there, most=20)}" for name in absent])
    names = list(asked) or [name for name in USUAL if name in there]
    made = []
    for group in groups:
        cells = {}
        for name in names:
            values = [finals[run][name] for run in group.runs if name in finals[run]]
            if values:
                finite = all(map(math.isfinite, values))
                deviation = statistics.stdev(values) if finite and len(values) > 1 else None
                cells[name] = Cell(statistics.fmean(values) if finite else math.nan, deviation)
        made.append(ConfigRow(group, cells))
    return made, names


def _finals(run: Summary) -> dict[str, float]:
    last = {name: series.values[-1] for name, series in read(run.folder).series.items()}
    return last | ({} if run.parameters is None else {"parameters": float(run.parameters)})


def written(made: Sequence[ConfigRow], names: Sequence[str], command: str, open_ends: Sequence[str]) -> str:
    """LaTeX, with booktabs; comments say what made it and what is not final."""
    header, body = _cells(made, names, pm=r" \pm ", mathematics=True)
    keys = len(header) - len(names) - (header[len(header) - len(names) - 1] == "seeds")
    lines = [f"% {command}", r"% needs \usepackage{booktabs}", *(f"% {each}" for each in open_ends)]
    lines += [rf"\begin{{tabular}}{{{'l' * keys}{'r' * (len(header) - keys)}}}", r"\toprule"]
    lines += [" & ".join(map(escaped, header)) + r" \\", r"\midrule"]
    lines += [" & ".join(each) + r" \\" for each in body]
    return "\n".join([*lines, r"\bottomrule", r"\end{tabular}"]) + "\n"


def _show(made: Sequence[ConfigRow], names: Sequence[str]) -> None:
    header, body = _cells(made, names, pm=" +- ", mathematics=False)
    shown = folding(*header)
    for each in body:
        shown.add_row(*each)
    terminal().print(shown)


def _cells(
    made: Sequence[ConfigRow], names: Sequence[str], *, pm: str, mathematics: bool
) -> tuple[list[str], list[list[str]]]:
    """Titles and rows: what tells the configs apart, how many seeds where any has several, and the numbers."""
    keys = list(made[0].group.values)
    several = any(len(row.group.runs) > 1 for row in made)
    titles = [short_key(key, keys) for key in keys] or ["run"]
    header = [*titles, *(["seeds"] if several else []), *(name.replace("_", " ") for name in names)]
    body = []
    for row in made:
        told = list(row.group.values.values()) or [row.group.label]
        cells = [escaped(each) if mathematics else each for each in told]
        cells += [str(len(row.group.runs))] if several else []
        for name in names:
            text = pm.join(row.cells[name].texts(name)) if name in row.cells else "-"
            cells.append(f"${text}$" if mathematics and pm in text else text)
        body.append(cells)
    return header, body


def escaped(text: str) -> str:
    """As TeX prints it."""
    return "".join(SPECIAL.get(letter, letter) for letter in text)
