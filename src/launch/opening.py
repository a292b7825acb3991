"""What a person reads when a run begins: the model, where and how it computes, how long, and how to follow it."""

import textwrap
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from src.planning.machines import has_gpu

if TYPE_CHECKING:
    from src.data.corpus import Corpus
    from src.planning.plan import Plan
    from src.run import Run

WIDTH = 100  # columns


def opening_lines(run: "Run", plan: "Plan", corpus: "Corpus", folder: Path, command: str) -> list[str]:
    """A line for each thing, at most WIDTH wide but for paths."""
    shape = " ".join(f"{key}={getattr(run.model, key)}" for key in ("n_layers", "dim", "vocab_size"))
    active = f", {plan.active_parameters:,} of them for one token" if plan.active_parameters != plan.parameters else ""
    device = "GPU" if has_gpu(run, run.cluster.devices()) else "CPU"
    axes = " ".join(f"{axis} {degree}" for axis, degree in plan.axes.items()) or "one rank"
    precision = run.precision.compute if run.precision.float8 is None else "float8"
    compiled = "compiled" if run.compile.blocks else "eager"
    rows = [
        ("model", f"{plan.parameters:,} parameters{active} ({shape})"),
        (
            "ranks",
            f"{plan.groups * plan.world} x {device}: {axes}; {precision}, {compiled}, recompute {plan.recompute}",
        ),
        ("step", f"{plan.tokens_per_step:,} tokens: {plan.sequences_per_step:,} sequences of {run.task.seq_len:,}"),
        ("run", f"{plan.steps:,} steps, {plan.tokens:,} tokens{'' if plan.training_stages else _passes(plan)}"),
        *_stages(run, plan),
        ("data", f"{_sources(run)}; {corpus.preparation.documents:,} documents, {corpus.preparation.tokens:,} tokens"),
        ("tokenizer", f"{type(run.tokenizer).__name__.lower()}, {corpus.vocab_size:,} ids"),
        ("watch", f"python -m src.runs watch {folder}"),
        ("stop", f"Ctrl-C saves; to go on: {command}"),
    ]
    return [line for name, text in rows for line in _wrapped(name, text)]


def _stages(run: "Run", plan: "Plan") -> list[tuple[str, str]]:
    found, begun = [], 0
    for number, (stage, each) in enumerate(zip(run.stages, plan.training_stages, strict=True), 1):
        size = f"{each.sequences_per_step:,} sequences of {stage.task.seq_len:,}"
        told = f"steps {begun + 1:,} to {each.steps:,} of {_sources(stage)}: {size}, {each.tokens:,} tokens"
        found.append((f"stage {number}", told + _passes(each)))
        begun = each.steps
    return found


def _passes(plan: "Plan") -> str:
    return "" if plan.epochs is None else f": {plan.epochs:.2f} passes over the text"


def _sources(run: "Run") -> str:
    return ", ".join(run.data.parts())


def _wrapped(name: str, text: str) -> Sequence[str]:
    """One line of its own, or several where words of it do not fit; what is typed stays whole."""
    head = f"  {name:9}  "
    if name in ("watch", "stop"):
        return [f"{head}{text}"]
    return textwrap.wrap(text, WIDTH, initial_indent=head, subsequent_indent=" " * len(head), break_on_hyphens=False)
