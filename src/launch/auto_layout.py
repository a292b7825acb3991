"""parallel=auto on the launcher: a run's config gets the layout, micro-batch and recomputation that were chosen."""

import sys
from collections.abc import Mapping
from typing import TYPE_CHECKING

from src.config.groups import CONF
from src.config.tree import Tree
from src.errors import UserError
from src.storage.atomic_write import atomic_write

if TYPE_CHECKING:
    from src.planning.auto_layout import Decision

AUTO = "src.planning.auto_layout.AutoLayout"
LAYOUT = "src.distributed.parallel_dims.ParallelDims"


def decided(tree: Tree, typed: Mapping[str, str]) -> Tree:
    """`tree`, with a layout in the place of parallel=auto; the best that were found are shown on stderr."""
    section = tree.get("parallel")
    if not isinstance(section, dict) or section.get("_target_") != AUTO:
        return tree
    from src.config.build import build
    from src.planning.auto_layout import decide
    from src.run import Run

    run = Run.from_sections(build(tree))
    made = decide(run, typed, run.cluster.devices())
    chosen = made.chosen.load
    layout = {"_target_": LAYOUT, **made.degrees.model_dump(mode="json")}
    recompute = {**tree["recompute"], **chosen.recompute.model_dump()}
    _show(made)
    if (name := section.get("write")) is not None:
        _write(str(name), made)
    changed = {"parallel": layout, "recompute": recompute}
    return tree | changed | {"task": tree["task"] | {"micro_batch": chosen.micro_batch}}


def _show(made: "Decision") -> None:
    from rich.console import Console
    from rich.table import Table

    title = f"parallel=auto: the fastest layouts of {made.gpus} x {made.gpu}, predicted; the first is taken"
    table = Table(title=title, title_justify="left")
    for name in ("layout", "s a step", "tokens/s/GPU", "GiB", "most of the rest"):
        table.add_column(name, justify="left" if name in ("layout", "most of the rest") else "right")
    for found in made.found:
        step = found.step
        share = step.parts[step.limit] / step.seconds
        table.add_row(
            found.text,
            f"{step.seconds:.3g}",
            f"{made.speed(found):,.0f}",
            f"{found.peak / 2**30:.1f}",
            f"{step.limit} {share:.0%}",
        )
    Console(stderr=True, markup=False, emoji=False).print(table)


def _write(name: str, made: "Decision") -> None:
    """An option of conf/parallel. UserError for a name that is taken or no name of an option."""
    path = CONF / "parallel" / f"{name}.yaml"
    if not name.replace("_", "a").isalnum():
        raise UserError(f"parallel.write={name}: letters, digits and _ make the name of an option")
    if path.exists():
        raise UserError(f"parallel.write={name}: {path} exists; pass another name")
    from src.config.presets import section_of

    plain = section_of("parallel", "single")
    values = {key: value for key, value in made.degrees.model_dump(mode="json").items() if plain.get(key) != value}
    chosen = made.chosen
    lines = [
        f"# Chosen by parallel=auto for {made.gpus} x {made.gpu}: {made.speed(chosen):,.0f} tokens/s/GPU predicted,",
        f"# with task.micro_batch={chosen.load.micro_batch} and recompute {chosen.load.recompute}.",
        "defaults: [single, _self_]",
        *(f"{key}: {value}" for key, value in values.items()),
    ]
    atomic_write(path, "\n".join(lines) + "\n")
    print(f"parallel.write: {path}", file=sys.stderr)
