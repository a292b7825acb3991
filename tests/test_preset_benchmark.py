"""`python -m benchmarks.presets` asks for what the recipes say, and its table says how long they take."""

import pytest

from benchmarks.presets import AT_ONCE, ON_A_CPU, Row, line, rows
from src.config.build import build
from src.config.composition.requests import asked
from src.run import Run
from src.tasks.fitted import SIZES


def composed(row: Row) -> Run:
    (tree,) = asked(["task=bench", f"model={row.preset}", *row.words]).trees
    return Run.from_sections(build(tree))


def test_every_small_preset_is_there() -> None:
    assert set(AT_ONCE) == {name for name, _ in SIZES}
    assert [row.preset for row in rows(ON_A_CPU, cpu=True)] == list(ON_A_CPU)


def test_sizes_are_those_of_the_recipe() -> None:
    plain, captured = (composed(row) for row in rows(["llama3_125m"], cpu=False))
    for run in (plain, captured):
        assert (run.task.seq_len, run.task.global_batch) == (2048, 256)
        assert (run.precision.compute, run.compile.blocks, run.recompute.mode) == ("bfloat16", True, "auto")
    assert (plain.task.micro_batch, plain.compile.graph) == (None, False)
    assert (captured.task.micro_batch, captured.compile.graph) == (32, True)


def test_a_line_has_the_hours_of_the_recipe() -> None:
    """4,800 steps of 256 sequences of 2,048 tokens: 2.5 B tokens."""
    (row, _) = rows(["llama3_125m"], cpu=False)
    assert row.hours == pytest.approx(4_800 * 256 * 2048 / 3600)
    figures = {"tokens_per_second": 500_000.0, "mfu_full_percent": 50.0, "mfu_causal_percent": 45.0}
    told = line(row, figures | {"peak_allocated_gib": 12.34})
    assert told == "| `llama3_125m` | as its recipe says | 500,000 | 50.0 / 45.0 | 12.3 | 1.4 |"
    assert line(row, {"tokens_per_second": 1_000.0, "peak_rss_gib": 2.0}).endswith("| 1,000 | - / - | 2.0 | 699.1 |")
