"""`python -m benchmarks.four_gpus`: every command of ours can start on four GPUs, and its table says what it found."""

from typing import Any

import pytest

from benchmarks.four_gpus import Cell, cells, likely_seconds, problems, table
from src.config.build import build
from src.config.composition.requests import asked
from src.planning.plan import plan
from src.run import Run

EVERY = cells()
OURS = [name for name, cell in EVERY.items() if cell.kind == "ours"]


@pytest.mark.parametrize("name", OURS)
def test_a_command_of_ours_is_a_plan_for_four_gpus(name: str) -> None:
    (tree,) = asked([*EVERY[name].words, "cluster.gpus=4"]).trees
    run = Run.from_sections(build(tree))
    assert plan(run, None, None, []).world == 4


def test_cells_stand_beside_and_after_cells_that_are_there() -> None:
    assert {cell.beside for cell in EVERY.values()} - {""} <= {name for name in EVERY if EVERY[name].kind == "peer"}
    assert {cell.like for cell in EVERY.values()} - {""} <= set(OURS)
    assert [name for name in OURS if EVERY[name].small is None] == ["tp2_fsdp2 async"]
    assert OURS[0] == "8b bf16"  # the most important first


def test_the_table_says_ratios_and_how_far_losses_are_apart() -> None:
    every = {
        "a": Cell("ours", (), beside="theirs"),
        "theirs": Cell("peer", ()),
        "b": Cell("ours", (), like="a"),
        "c": Cell("script", ()),
    }
    found: dict[str, Any] = {"tokens_per_second": 1200.0, "arithmetic": "bfloat16", "planned_peak_gib": 20.0}
    known: dict[str, Any] = {
        "a": found | {"losses": [4.0, 2.0], "peak_allocated_gib": 19.5, "wall_seconds": 40.0},
        "theirs": {"tokens_per_second": 1000.0, "wall_seconds": 100.0},
        "b": found | {"losses": [4.0, 2.02], "wall_seconds": 60.0},
        "c": {"printed": ["a line"], "wall_seconds": 5.0},
    }
    told = table(known, every)
    assert "| a | 1,200 | 1.200 | - / - | 19.5 | 20.0 | - |" in told
    assert "| b | 1,200 | - | - / - | - | 20.0 | 1.0e-02 |" in told
    assert told.endswith("\nc:\n\n```\na line\n```\n")
    assert problems(known, every) == ["b: a loss is 1.0e-02 from that of a, at most 0.001"]
    assert likely_seconds(every["b"], known, every) == 1.5 * 60 + 20
    assert likely_seconds(every["theirs"], {}, every) == 240
    broken = known | {"b": {"failed": "a\nlast line", "wall_seconds": 1.0}}
    assert "| b | failed: last line |" in table(broken, every)
    assert problems(broken, every) == ["b: a\nlast line"]
