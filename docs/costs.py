"""What a layout, a precision or a recompute mode costs: tables of docs/layouts.md and docs/precision_and_recompute.md,
made of benchmarks/records. `python -m docs.reference --write` puts them between the marks of those pages.

Rows of a table ran on machines of one kind; the first row is what the others are compared with.
"""

import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

HOME = Path(__file__).parent
RECORDS = HOME.parent / "benchmarks" / "records"
TABLE = re.compile(r"(<!-- table (\w+): python -m docs\.reference --write -->\n).*?(<!-- end -->\n)", re.DOTALL)


class Cell(NamedTuple):
    """One record: what was chosen in it, and its file without `.json`; `one_gpu/<row>`: ours of that row."""

    choice: str
    record: str


EIGHT, SIXTEEN = "llama3_8b_", "deepseek_v3_16b_9layers_2xh200_"
TABLES: Mapping[str, Sequence[Cell]] = {
    # 4 sequences of 8192 tokens a step, one at a time, no recompute
    "layouts_8b_4": (
        Cell("`fsdp4`", f"{EIGHT}4xh200_fsdp4"),
        Cell("`hsdp2x2`", f"{EIGHT}4xh200_hsdp2x2"),
        Cell("`tp2_fsdp2`", f"{EIGHT}4xh200_tp2_fsdp2"),
        Cell("`cp2_fsdp2`", f"{EIGHT}4xh200_cp2_fsdp2"),
        Cell("`pp2_fsdp2`, Interleaved1F1B, 2 micro-batches", f"{EIGHT}4xh200_pp2_fsdp2i"),
        Cell("`tp4`", f"{EIGHT}4xh200_tp4"),
        Cell("`pp2_fsdp2`, 1F1B, 2 micro-batches", f"{EIGHT}4xh200_pp2_fsdp2"),
    ),
    "layouts_8b_2": (
        Cell("`fsdp2`, `parallel.sync_each_micro_batch=true`", f"{EIGHT}2xh200_fsdp2"),
        Cell("`tp2`", f"{EIGHT}2xh200_tp2"),
        Cell("`pp2`, Interleaved1F1B, 4 micro-batches", f"{EIGHT}2xh200_pp2i"),
        Cell("`pp2`, 1F1B, 4 micro-batches", f"{EIGHT}2xh200_pp2"),
        Cell("`cp2`", f"{EIGHT}2xh200_cp2"),
    ),
    "layouts_16b": (
        Cell("`fsdp2`", f"{SIXTEEN}fsdp2_beside_gathered"),
        Cell("`fsdp2`, `parallel.reshard=never`", f"{SIXTEEN}fsdp2_gathered"),
        Cell("`fsdp2_ep2`", f"{SIXTEEN}fsdp2_ep2_graphs"),
    ),
    "gathered_8b": (
        Cell("`fsdp4`, 1 sequence at a time", f"{EIGHT}fsdp4_bf16_mb1"),
        Cell("`fsdp4`, 2 sequences, `parallel.reshard=never`", f"{EIGHT}fsdp4_bf16_mb2"),
    ),
    "precision_8b_1": (
        Cell("`precision=bf16`, `compile=graph`", "one_gpu/8b_bf16"),
        Cell("`precision=fp8`, `compile=blocks`", "one_gpu/8b_fp8"),
    ),
    "precision_8b_2": (
        Cell("`precision=bf16`", f"{EIGHT}2xh200_sel"),
        Cell("`precision=fp8_gather`", f"{EIGHT}2xh200_fsdp2_fp8_gather_mb2_selective"),
    ),
    "precision_16b": (
        Cell("`precision=bf16`", f"{SIXTEEN}fsdp2_second"),
        Cell("`precision=bf16_reduce16 optim=adamw_bf16 parallel.reshard=never`", f"{SIXTEEN}fsdp2_lean"),
    ),
    "experts_16b": (
        Cell("`precision=bf16`", f"{SIXTEEN}fsdp2"),
        Cell("`precision=fp8_experts`", f"{SIXTEEN}fsdp2_fp8_experts"),
    ),
    "recompute_8b": (
        Cell("`recompute=none`, 1 sequence at a time", f"{EIGHT}2xh200_fsdp2"),
        Cell("`recompute=selective`, 2 sequences at a time", f"{EIGHT}2xh200_sel"),
    ),
}


def record(name: str) -> dict[str, Any]:
    """What task=bench wrote."""
    file, _, row = name.partition("/")
    found = json.loads((RECORDS / f"{file}.json").read_text(encoding="utf-8"))
    ours: dict[str, Any] = next(each["measured"]["ours"] for each in found if each["row"] == row) if row else found
    return ours


def table(cells: Sequence[Cell]) -> str:
    """Tokens per second of a GPU, the time of a token and the peak of GPU memory, beside the first row's."""
    lines = [
        "| choice | tokens/s/GPU | time of a token | peak GiB of a GPU | beside the first |",
        "|---|---:|---:|---:|---:|",
    ]
    first = record(cells[0].record)
    for cell in cells:
        mine = record(cell.record)
        time = first["tokens_per_second"] / mine["tokens_per_second"] - 1.0
        memory = mine["peak_allocated_gib"] - first["peak_allocated_gib"]
        beside = ("-", "-") if cell is cells[0] else (f"{time:+.1%}".replace("%", " %"), f"{memory:+.1f} GiB")
        numbers = (f"{mine['tokens_per_second']:,.0f}", beside[0], f"{mine['peak_allocated_gib']:.1f}", beside[1])
        lines.append(f"| {cell.choice} | {' | '.join(numbers)} |")
    return "\n".join(lines) + "\n"


def filled(page: str) -> str:
    """A page of this folder with its tables as the records have them now."""
    text = (HOME / page).read_text(encoding="utf-8")
    return TABLE.sub(lambda found: f"{found[1]}{table(TABLES[found[2]])}{found[3]}", text)
