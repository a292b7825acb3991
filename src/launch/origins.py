"""What a person is told of where the values of a run come from: a dry run's table, and a line about its recipe."""

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from rich.table import Table

from src.config.composition.origins import DEFAULT, ValueOrigin, ValueOrigins
from src.config.groups import RECIPE
from src.config.tree import leaves_of
from src.config.wording import bare
from src.data.config import Stdlib
from src.planning.machines import has_gpu

if TYPE_CHECKING:
    from src.planning.plan import Plan
    from src.run import Run

LARGE = 50_000_000  # parameters; smaller models are trials
SHORT_SEQUENCE = 1024  # tokens; what was trained with less is rare
SHOWN = 60  # letters of a value
RECIPES_OPTIMIZER = "AdamW"  # of all recipes of conf/


def render(tree: Mapping[str, Any], origins: ValueOrigins) -> Table:
    """What is no default, by key; for a terminal."""
    table = Table(title="values that are no defaults", title_justify="left")
    for heading in ("key", "value", "from"):
        table.add_column(heading, overflow="fold")
    for key, value, origin in origins.listed(tree):
        table.add_row(key, shown(value), str(origin))
    return table


def by_key(tree: Mapping[str, Any], origins: ValueOrigins) -> dict[str, str]:
    """Dotted key -> origin of what is no default; for machines."""
    return {key: str(origin) for key in leaves_of(tree) if (origin := origins.of(key)) != DEFAULT}


def recipe_lines(tree: Mapping[str, Any], origins: ValueOrigins, run: "Run") -> list[str]:
    """What the model's published recipe decides of this run, and what that means where there is no GPU."""
    listed = [(key, value, origin) for key, value, origin in origins.listed(tree) if _of_recipe(origin)]
    if not listed:
        return []
    name = listed[0][2].source
    chosen = " ".join(f"{key}={shown(value)}" for key, value, _ in listed)
    lines = [f"{name}: {chosen} (conf/{name.replace(' ', '/')}.yaml says where from; {RECIPE}=debug leaves it out)"]
    optimizer = type(run.optim).__name__
    if optimizer != RECIPES_OPTIMIZER and _of_recipe(origins.of("optim.lr")):
        lines.append(
            f"warning: optim.lr={run.optim.lr:g} is that of {name}, for {RECIPES_OPTIMIZER}; pass one for {optimizer}"
        )
    if not has_gpu(run, run.cluster.devices()):
        lines.append(
            f"warning: {name} is for GPUs, and there is none here: bfloat16 and compiled blocks run on the CPU, "
            "slowly, and recompute=auto keeps all activations, since no memory limit is known; a trial on a CPU is "
            f"{RECIPE}=debug"
        )
    return lines


def unwanted_lines(origins: ValueOrigins, run: "Run", plan: "Plan") -> list[str]:
    """Warnings of what nobody wants, where it is a default that nobody chose: slow on a GPU, or a wasted context."""
    if not run.task.needs_corpus or plan.parameters < LARGE:
        return []
    found = []
    if isinstance(run.data, Stdlib) and origins.of("data._target_") == DEFAULT:
        found.append(
            "data=stdlib, some 12 MB of Python's own source, is for trials: pass data=c4, data=text data.files=my/ or "
            "another of --help data"
        )
    if has_gpu(run, run.cluster.devices()):
        if run.precision.compute == "float32" and origins.of("precision.compute") == DEFAULT:
            found.append("precision=fp32 on a GPU: several times slower than bf16; pass one of the two")
        if not run.compile.blocks and origins.of("compile.blocks") == DEFAULT:
            found.append("compile=off on a GPU: nothing is fused; pass compile=blocks, or off")
    if run.task.seq_len < SHORT_SEQUENCE <= run.model.max_seq_len and origins.of("task.seq_len") == DEFAULT:
        found.append(
            f"task.seq_len={run.task.seq_len} under model.max_seq_len={run.model.max_seq_len}: it learns no longer "
            "context than it is shown; pass task.seq_len=..."
        )
    return [f"warning: {line}" for line in found]


def shown(value: object) -> str:
    """A value as one would type it, cut where it is long."""
    text = bare(value)
    return text if len(text) <= SHOWN else f"{text[:SHOWN]}..."


def _of_recipe(origin: ValueOrigin) -> bool:
    return origin.source.startswith(f"{RECIPE} ")
