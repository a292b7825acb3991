"""The small presets at the sizes of their recipes: tokens per second, MFU, memory, and hours of a whole training.

    python -m benchmarks.presets [--only llama3_20m llama3_60m] [--record benchmarks/records/presets_h200.json]
    python -m benchmarks.presets --cpu           the two smallest as docs/recipes.md gives them to a CPU

Each row is one process of task=bench on random tokens, on one GPU: a preset once as its recipe says (`task.micro_batch`
is null, up to 32,768 tokens at once) and once with as many sequences at once as a GPU likes, captured as a CUDA graph.
The record is written after each row.
"""

import argparse
import json
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from src.config.groups import RECIPE
from src.config.presets import section_of

ROOT = Path(__file__).resolve().parent.parent
PER_PROCESS_SECONDS = 900
AT_ONCE = {"llama3_20m": 64, "llama3_60m": 64, "llama3_125m": 32, "llama3_350m": 32}  # sequences: 33 to 66 K tokens
STEPS = {"llama3_20m": 200, "llama3_60m": 100, "llama3_125m": 20, "llama3_350m": 10}  # some 10 to 20 s on an H200
ON_A_CPU = ("llama3_20m", "llama3_60m")


@dataclass(frozen=True)
class Row:
    """`words`: of launch.py beside `task=bench model=<preset>`."""

    preset: str
    how: str
    words: tuple[str, ...]

    @property
    def hours(self) -> float:
        """Times tokens per second: of the steps of the recipe."""
        task = section_of(RECIPE, self.preset)["task"]
        return float(task["steps"] * task["seq_len"] * task["global_batch"]) / 3600.0


def rows(presets: Sequence[str], *, cpu: bool) -> list[Row]:
    if cpu:
        sizes = section_of(RECIPE, "debug")["task"]
        words = (*_batch(sizes), "model.vocab_size=null", "cluster.gpus=0", "task.steps=4", "task.warmup_steps=1")
        return [Row(preset, "recipe=debug model.vocab_size=null", words) for preset in presets]
    found = []
    for preset in presets:
        sizes = section_of(RECIPE, preset)["task"]
        common = ("precision=bf16", "recompute=auto", "optim.lr=1e-5", *_batch(sizes), f"task.steps={STEPS[preset]}")
        found.append(Row(preset, "as its recipe says", (*common, "compile=blocks")))
        chosen = f"task.micro_batch={AT_ONCE[preset]}"
        found.append(Row(preset, f"{chosen} compile=graph", (*common, chosen, "compile=graph")))
    return found


def _batch(sizes: dict[str, Any]) -> tuple[str, ...]:
    return tuple(f"task.{key}={sizes[key]}" for key in ("seq_len", "global_batch"))


def measured(row: Row) -> dict[str, Any]:
    """bench.json of one process; RuntimeError with its last words where it fails."""
    with tempfile.TemporaryDirectory() as root:
        command = [sys.executable, "launch.py", "task=bench", f"model={row.preset}", *row.words, f"root={root}"]
        done = subprocess.run(
            command, cwd=ROOT, capture_output=True, text=True, timeout=PER_PROCESS_SECONDS, check=False
        )
        if done.returncode != 0:
            words = " ".join(command)
            raise RuntimeError(f"{words} ended with {done.returncode}:\n{(done.stdout + done.stderr)[-1500:]}")
        (file,) = Path(root).glob("*/bench.json")
        figures: dict[str, Any] = json.loads(file.read_text())
    return figures


def line(row: Row, figures: dict[str, Any]) -> str:
    """A row of the table, in Markdown."""
    speed = figures["tokens_per_second"]
    shares = [figures.get(f"mfu_{convention}_percent") for convention in ("full", "causal")]
    mfu = " / ".join("-" if share is None else f"{share:.1f}" for share in shares)
    peak = figures.get("peak_allocated_gib", figures.get("peak_rss_gib"))
    cells = [f"`{row.preset}`", row.how, f"{speed:,.0f}", mfu, "-" if peak is None else f"{peak:.1f}"]
    return f"| {' | '.join([*cells, f'{row.hours / speed:,.1f}'])} |"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", choices=AT_ONCE, help="some of the presets")
    parser.add_argument("--cpu", action="store_true", help=f"on this machine's CPU: {', '.join(ON_A_CPU)}")
    parser.add_argument("--record", type=Path, help="the JSON file of all figures")
    given = parser.parse_args()
    presets = given.only or (ON_A_CPU if given.cpu else tuple(AT_ONCE))
    print("| preset | how | tokens/s | MFU full / causal % | peak GiB | hours of its recipe |", flush=True)
    print("|---|---|---:|---:|---:|---:|", flush=True)
    records, broken = [], False
    for row in rows(presets, cpu=given.cpu):
        try:
            figures = measured(row)
        except (RuntimeError, subprocess.TimeoutExpired) as error:
            print(error, file=sys.stderr, flush=True)
            broken = True
            continue
        print(line(row, figures), flush=True)
        records.append({"preset": row.preset, "how": row.how, "words": row.words, "measured": figures})
        if given.record is not None:
            given.record.write_text(json.dumps(records, indent=1) + "\n")
    return 1 if broken else 0


if __name__ == "__main__":
    sys.exit(main())
