"""The plan as the table of text that `launch.py` prints."""

from collections.abc import Sequence

from rich.console import Group
from rich.table import Table
from rich.text import Text

from src.planning.advice import PARTS, told
from src.planning.plan import Plan
from src.planning.time.devices import measured_products
from src.planning.time.prediction import Prediction
from src.planning.time.traffic import Collective

SOME = ("cache", "outer", "average")  # parts that most runs do not have


def render(plan: Plan) -> Group:
    """Two tables and the warnings; print it with a rich console, or `plan.to_json()` for machines."""
    warnings = [Text(f"warning: {line}", style="yellow") for line in plan.warnings]
    tables = [_table("plan", _facts(plan)), _table("memory of the fullest GPU, estimated", _memory(plan))]
    if plan.training_stages:
        tables.insert(1, _stages(plan.training_stages))
    if plan.time is not None:
        tables.append(_table(f"time on {plan.world} x {plan.time.gpu}, predicted", _time(plan.time, plan)))
        tables.append(_table("matrix products of blocks, on one rank, of a micro-batch", _products(plan.time)))
        if plan.time.terms.collectives:
            tables.append(_table("collectives of one rank, of a step", _collectives(plan.time)))
    return Group(*tables, *warnings)


def _stages(stages: Sequence[Plan]) -> Table:
    """A row for each stage."""
    table = Table(title="stages", title_justify="left")
    timed = [each.time for each in stages if each.time is not None]
    for heading in ("", "steps", "tokens", "of a step", "mesh", "recompute", "last lr", "memory"):
        table.add_column(heading, justify="right")
    if len(timed) == len(stages):
        table.add_column("a step", justify="right")
        table.add_column("hours", justify="right")
    begun = 0
    for number, plan in enumerate(stages, 1):
        length = plan.tokens_per_step // plan.sequences_per_step
        row = [
            str(number),
            f"{begun + 1:,} to {plan.steps:,}",
            f"{plan.tokens:,}",
            f"{plan.sequences_per_step:,} x {length:,}",
            " x ".join(f"{axis} {degree}" for axis, degree in plan.axes.items()) or "one rank",
            str(plan.recompute),
            f"{plan.last_lr:.3g}",
            told(plan.memory.peak),
        ]
        if len(timed) == len(stages):
            row += [
                _seconds(timed[number - 1].step.seconds),
                _interval(timed[number - 1].hours, timed[number - 1].within),
            ]
        table.add_row(*row)
        begun = plan.steps
    return table


def _table(title: str, rows: list[tuple[str, str]]) -> Table:
    table = Table(title=title, title_justify="left", show_header=False)
    table.add_column(style="bold")
    table.add_column(justify="right")
    for row in rows:
        table.add_row(*row)
    return table


def _facts(plan: Plan) -> list[tuple[str, str]]:
    mesh = " x ".join(f"{axis} {degree}" for axis, degree in plan.axes.items()) or "one rank"
    batch = f"{plan.micro_batches} x {plan.micro_batch} x {plan.data_ranks}"
    rows = [
        ("ranks", f"{plan.world} on {plan.nodes} node{'s' if plan.nodes > 1 else ''}"),
        *([("replica groups of these ranks", f"{plan.groups}")] if plan.groups > 1 else []),
        ("mesh", mesh),
        ("sequences per step" + " of the first stage" * bool(plan.training_stages), f"{plan.sequences_per_step:,}"),
        ("  = micro-batches x micro-batch x data ranks", batch),
        ("tokens per step", f"{plan.tokens_per_step:,}"),
        ("steps", f"{plan.steps:,}"),
        ("tokens in total", f"{plan.tokens:,}"),
        ("parameters", f"{plan.parameters:,}"),
        ("parameters per GPU", f"{plan.parameters_per_gpu:,}"),
        ("flops per token, full attention", f"{plan.flops_per_token:,}"),
        ("flops per token, causal attention", f"{plan.flops_per_token_causal:,}"),
        ("learning rate decays until step", f"{plan.schedule_end:,}"),
        ("last learning rate", f"{plan.last_lr:.3g}"),
        ("recompute", str(plan.recompute)),
    ]
    if plan.expert_axes:
        rows.insert(
            2, ("  of routed experts", " x ".join(f"{axis} {degree}" for axis, degree in plan.expert_axes.items()))
        )
    if plan.stages:
        rows.append(("parameters of the smallest, largest stage", f"{min(plan.stages):,}, {max(plan.stages):,}"))
    if plan.active_parameters != plan.parameters:
        rows.append(("active parameters", f"{plan.active_parameters:,}"))
    if plan.epochs is not None:
        rows.append(("epochs", f"{plan.epochs:.2f}"))
    return rows


def _memory(plan: Plan) -> list[tuple[str, str]]:
    memory = plan.memory
    sizes = {part: getattr(memory, part) for part in PARTS}
    rows = [(PARTS[part], told(size)) for part, size in sizes.items() if size or part not in SOME]
    rows += [
        ("live at the loss", told(memory.at_loss)),
        ("live in the backward", told(memory.at_backward)),
        ("live at the update", told(memory.at_update)),
        ("fragmentation", told(memory.fragmentation)),
        ("CUDA context, NCCL and workspaces", told(memory.runtime)),
        ("peak", told(memory.peak)),
    ]
    limit = "unknown" if plan.memory_limit is None else told(plan.memory_limit)
    return [*rows, ("memory of a GPU", limit)]


STEP_PARTS = {
    "products": "matrix products",
    "experts": "products of routed experts",
    "attention": "attention",
    "memory": "norms, activations, permutes",
    "gaps": "between kernels",
    "loss": "head and loss",
    "recompute": "computed again",
    "tensor": "collectives of tensor ranks",
    "context": "collectives of context ranks",
    "travel": "tokens to experts and back",
    "copies": "copies and sums around FSDP",
    "contention": "products slowed by collectives",
    "exposed": "gathers and reductions in the open",
    "bubble": "pipeline bubble",
    "update": "norm and update",
    "host": "waiting for Python",
    "stragglers": "waiting for the slowest rank",
}


def _time(time: Prediction, plan: Plan) -> list[tuple[str, str]]:
    step, which = time.step, " of the longest stage" * bool(plan.training_stages)
    parts = [(f"  {STEP_PARTS[name]}", _seconds(value)) for name, value in step.parts.items() if value > 5e-6]
    rows = [
        ("a step" + which, f"{_seconds(step.seconds)} (+-{time.within:.0%})"),
        *parts,
        ("collectives beside other work", _seconds(step.hidden)),
        (
            "tokens per second of a GPU, of all" + which.replace(" of", ";"),
            f"{time.tokens_per_second:,.0f}, {time.tokens_per_second * plan.world:,.0f}",
        ),
        ("MFU, attention counted in full", f"{time.mfu:.1%}"),
        ("hours", _interval(time.hours, time.within)),
        ("GPU-hours", _interval(time.gpu_hours, time.within)),
        ("kWh, of the GPUs' boards alone", _interval(time.kilowatt_hours, time.within)),
    ]
    if time.money is not None:
        rows.append(("price", _interval(time.money, time.within)))
    if (failures := time.failures) is not None:
        save = f"{_seconds(failures.save_seconds)}, {'measured' if failures.measured else 'planned'}"
        rows += [
            ("hours between failures of the run", f"{failures.hours_between:.3g}"),
            ("a save stops training for", save),
            ("from a failure to the next step", _seconds(failures.restart_seconds)),
            ("best checkpoint.every", f"{failures.checkpoint_every:,} steps"),
            ("goodput with that", f"{failures.goodput:.1%}"),
        ]
        if failures.own_goodput is not None:
            rows.append(("goodput with this checkpoint.every", f"{failures.own_goodput:.1%}"))
    if not time.measured:
        own = " beside its own matrix products" if time.gpu in measured_products() else ""
        rows.append(("evidence", f"datasheet of {time.gpu}, shares of an H200{own}"))
    return rows


def _products(time: Prediction) -> list[tuple[str, str]]:
    """How often, rows x inner by inner x columns; seconds of all of them with their gradients."""
    return [
        (
            f"{each.times:.3g} x {each.name.removesuffix('.weight')}: "
            f"{each.rows:,.0f} x {each.inner:,} x {each.columns:,}",
            f"{_seconds(each.seconds)}, {each.flops_per_second / 1e12:,.0f} TFLOP/s",
        )
        for each in time.terms.products
    ]


def _collectives(time: Prediction) -> list[tuple[str, str]]:
    """How often, what, of how many bytes; seconds of all of them, beside other work or not."""
    alike: dict[str, list[Collective]] = {}  # rows go to experts beside other work, and come back beside none
    for each in time.terms.collectives:
        where = f"{each.ranks} ranks on {each.nodes} node{'s' if each.nodes > 1 else ''}"
        alike.setdefault(f"{each.algorithm} of {each.what}, {told(int(each.size))}, {where}", []).append(each)
    return [
        (
            f"{sum(each.times for each in found):,.0f} x {text}",
            _seconds(sum(each.times * each.seconds for each in found)),
        )
        for text, found in alike.items()
    ]


def _seconds(value: float) -> str:
    return f"{value:.3g} s" if value >= 1.0 else f"{1e3 * value:.3g} ms"


def _interval(value: float, within: float) -> str:
    """Ends of the interval around a predicted value, of three digits."""
    return " to ".join(_rounded((1 + sign * within) * value) for sign in (-1, 1))


def _rounded(value: float) -> str:
    return f"{float(f'{value:.3g}'):,.0f}" if value >= 100 else f"{value:.3g}"
