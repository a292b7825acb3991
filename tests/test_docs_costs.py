"""docs/precision_and_recompute.md and docs/layouts.md: tables are the records', planned bytes the plan's."""

import json
import re
from pathlib import Path

import pytest

from docs.costs import RECORDS, TABLES, filled, record, table
from src.planning.memory import GIB, estimate
from src.planning.plan import load_of
from tests.train.runs import make_run

DOCS = Path(__file__).parents[1] / "docs"
PAGE = (DOCS / "precision_and_recompute.md").read_text(encoding="utf-8")
# | `llama3_8b`, ... | 64.7 | ... |, a column for each mode
PLANNED = re.findall(r"^\| `(\w+)`, `(\w+)`, (\d) sequences? of (\d+) tokens \| (.*) \|$", PAGE, re.MULTILINE)
MODES = ("none", "selective", "every2", "full")


def test_every_table_is_on_a_page_and_made_of_records() -> None:
    pages = {name: filled(name) for name in ("layouts.md", "precision_and_recompute.md")}
    for name, cells in TABLES.items():
        assert sum(f"<!-- table {name}: " in text and table(cells) in text for text in pages.values()) == 1
    for name, text in pages.items():
        assert text == (DOCS / name).read_text(encoding="utf-8"), "python -m docs.reference --write"


def test_a_row_says_what_its_record_has() -> None:
    """By hand: 9,737 and 7,672 tokens/s of fsdp4 and tp4 are 26.9 % more time of a token; 44.4 of 63.0 GiB."""
    assert "| `tp4` | 7,672 | +26.9 % | 44.4 | -18.6 GiB |\n" in table(TABLES["layouts_8b_4"])
    assert record("one_gpu/8b_fp8")["arithmetic"] == "float8 tensorwise"
    raw = json.loads((RECORDS / "llama3_8b_2xh200_sel.json").read_text())
    assert (raw["recompute"], record("llama3_8b_2xh200_sel")) == ("selective", raw)
    assert record("deepseek_v3_16b_4xh200_fsdp4")["tokens_per_second"] == pytest.approx(20_194, abs=1)


def test_float8_lags_by_less_than_a_step() -> None:
    fine, coarse = (record(f"one_gpu/8b_{name}")["losses"] for name in ("bf16", "fp8"))
    assert all(coarse[step] < fine[step - 1] for step in range(1, len(fine)))
    assert coarse[-1] > fine[-1]


@pytest.mark.parametrize("row", PLANNED, ids=lambda row: row[0])
def test_planned_bytes_are_the_plans(row: tuple[str, ...]) -> None:
    model, parallel, sequences, length, cells = row
    task = {"seq_len": int(length), "micro_batch": int(sequences), "global_batch": 4 * int(sequences)}
    sections = {"model": model, "parallel": parallel, "precision": "bf16", "compile": "blocks", "task": task}
    for mode, cell in zip(MODES, cells.split(" | "), strict=True):
        planned = estimate(load_of(make_run(recompute=mode, **sections))).peak / GIB
        assert float(cell) == pytest.approx(planned, rel=0.05), mode


def test_both_models_are_planned() -> None:
    assert [row[0] for row in PLANNED] == ["llama3_8b", "deepseek_v3_16b"]
