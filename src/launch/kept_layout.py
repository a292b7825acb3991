"""parallel.write=NAME: a layout becomes an option of conf/parallel, with its evidence in the lines above it."""

import json
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from src.config.groups import CONF
from src.config.presets import nearest_option
from src.config.tree import Tree, identity
from src.config.wording import bare
from src.errors import ConfigError, UserError
from src.runs.folder import place
from src.storage.atomic_write import atomic_write
from src.tasks.bench.config import BENCH_FILE, Bench

if TYPE_CHECKING:
    from src.distributed.parallel_dims import ParallelDims
    from src.distributed.recompute import Recompute
    from src.planning.plan import Plan
    from src.run import Run

    Point = tuple[Tree, Run, Plan, Mapping[str, str]]

PLACE, WRITE = "parallel.place", "parallel.write"
MEASURED = "# Measured by task=bench over parallel=auto"
LONGEST_NAME = 60


def check_name(name: str, *, measured: bool) -> None:
    """UserError for a name that is taken or no name of an option. `measured`: what a measurement wrote may be written
    again.
    """
    if not name.replace("_", "a").isalnum() or len(name) > LONGEST_NAME:
        raise UserError(f"{WRITE}={name}: up to {LONGEST_NAME} letters, digits and _ make the name of an option")
    path = _path(name)
    if path.exists() and not (measured and path.read_text(encoding="utf-8").startswith(MEASURED)):
        raise UserError(f"{WRITE}={name}: {path} exists; pass another name")


def beside(micro_batch: int | None, recompute: "Recompute", precision: str | None) -> str:
    """What was chosen with a layout and is in no file of conf/parallel, as it is typed. `precision`: an option, where
    it was open.
    """
    every = "" if recompute.every is None else f" recompute.every={recompute.every}"
    also = "" if precision is None else f" precision={precision}"
    return f"task.micro_batch={micro_batch} recompute={recompute.mode}{every}{also}"


def keep(name: str, degrees: "ParallelDims", evidence: Sequence[str], also: str) -> None:
    """Write conf/parallel/<name>.yaml. `evidence`: lines of its comment; the first is what `--help` says of it. `also`:
    what to type with it.
    """
    from src.config.presets import section_of

    plain = section_of("parallel", "single")
    values = {key: value for key, value in degrees.model_dump(mode="json").items() if plain.get(key) != value}
    lines = [
        *(f"# {line}".rstrip() for line in (*evidence, f"It was chosen with {also}")),
        "defaults: [single, _self_]",
        *(f"{key}: {bare(value)}" for key, value in values.items()),
    ]
    path = _path(name)
    atomic_write(path, "\n".join(lines) + "\n")
    print(f"{WRITE}: {path}; it was chosen with {also}, so pass parallel={name} {also}", file=sys.stderr)


def check_places(points: "Sequence[Point]") -> None:
    """ConfigError where layouts are swept by their place and no figure of them would be measured."""
    swept = len({overrides.get(PLACE) for *_, overrides in points}) > 1
    if swept and not all(isinstance(run.task, Bench) for _, run, _, _ in points):
        raise ConfigError("parallel=auto:N measures layouts, and this task does not; pass task=bench, or parallel=auto")


@dataclass(frozen=True)
class Figure:
    """One place of parallel=auto: tokens per second of a GPU, as planned and as measured."""

    place: int
    run: "Run"
    predicted: float | None
    measured: float | None  # None: it has not ended, or has failed
    precision: str | None  # option of conf/precision, where it was open

    @property
    def text(self) -> str:
        also = "" if self.precision is None else f" precision={self.precision}"
        return self.run.parallel.told(self.run.task.micro_batch, self.run.recompute) + also

    @property
    def line(self) -> str:
        """For a comment."""
        speeds = [f"{self.measured:,.0f} measured" if self.measured else "not measured"]
        speeds += [f"{self.predicted:,.0f} predicted"] if self.predicted else []
        return f"{self.place}. {self.text}: {', '.join(speeds)}"


def measured_places(points: "Sequence[Point]") -> None:
    """Say what the places of parallel=auto:N have measured, and keep the winner where parallel.write asks for it."""
    given = [point for point in points if PLACE in point[3]]
    if len(given) < 2:
        return
    figures = [_figure(*point) for point in given]
    best = max(figures, key=lambda each: each.measured or 0.0)
    print("parallel=auto, tokens/s of a GPU:", *(f"  {each.line}" for each in figures), sep="\n", file=sys.stderr)
    missing = [each for each in figures if each.measured is None]
    name = given[0][3].get(WRITE)
    if missing and (name is not None or best.measured is None):
        word = "layout is" if len(missing) == 1 else "layouts are"
        print(f"{len(missing)} {word} not measured; once they have ended, the same command says which is the fastest",
              file=sys.stderr)  # fmt: skip
    if best.measured is None:
        return
    print(f"the fastest is place {best.place}: {best.text}", file=sys.stderr)
    if name is not None:
        first = f"{MEASURED.removeprefix('# ')} on {best.run.parallel.world} x {_device(given[0])}, tokens/s of a GPU:"
        check_name(name, measured=True)
        also = beside(best.run.task.micro_batch, best.run.recompute, best.precision)
        keep(name, best.run.parallel, [first, *(f"  {each.line}" for each in figures), f"Place {best.place}."], also)


def _figure(tree: Tree, run: "Run", planned: "Plan", overrides: Mapping[str, str]) -> Figure:
    found = _bench(tree, run).get("tokens_per_second")
    precision = nearest_option("precision", tree["precision"])[0] if overrides.get("precision") == "auto" else None
    measured = None if found is None else float(found)
    return Figure(int(overrides[PLACE]), run, planned.predicted_rate, measured, precision)


def _bench(tree: Tree, run: "Run") -> dict[str, Any]:
    """What the run has measured; empty before that."""
    file = place(run.root, run.name, identity(tree), run.folder) / BENCH_FILE
    found: dict[str, Any] = json.loads(file.read_text(encoding="utf-8")) if file.is_file() else {}
    return found


def _device(point: "Point") -> str:
    return str(_bench(point[0], point[1]).get("device", "device"))


def _path(name: str) -> Path:
    return CONF / "parallel" / f"{name}.yaml"
