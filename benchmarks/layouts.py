"""One model in every layout on the GPUs of this machine: losses side by side, speed, memory beside the plan's.

python -m benchmarks.layouts                          every cell that is missing, then the table
python -m benchmarks.layouts --gpus 2                 the layouts of two GPUs
python -m benchmarks.layouts --only tp2_fsdp2,fp8     cells whose name contains one of these
python -m benchmarks.layouts --minutes 9              start no cell that might last longer; again, and it goes on

Each cell is a process of its own (`python launch.py task=bench ...`) with a time limit; what it measured is kept in
records/layouts_<gpus>.json beside this file, and layouts_<gpus>.md is written from that. All cells start from the same
name-seeded weights and read the same random tokens, so their losses must agree: exit code 1 if they do not.
"""

import argparse
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

HOME = Path(__file__).resolve().parents[1]
RECORDS = Path(__file__).parent / "records"
COMMON = (
    *("task=bench", "model=llama3_8b", "compile=blocks", "task.seq_len=8192", "task.micro_batch=1"),
    *("task.global_batch=8", "task.steps=20", "task.warmup_steps=3", "optim.lr=1e-5"),
)
SMALL = ("model=llama3_debug", "compile=off", "task.seq_len=64", "task.steps=3", "task.warmup_steps=1")  # for --cpu

Cell = tuple[str, ...]  # a command line


def bf16(*overrides: str) -> Cell:
    return ("precision=bf16", *overrides)


def cells(gpus: int) -> dict[str, Cell]:
    """By name; the first is what the others' losses are compared with."""
    whole = f"fsdp{gpus}"
    layouts = {
        4: ["tp2_fsdp2", "tp4", "cp2_fsdp2", "pp2_fsdp2", "hsdp2x2"],
        2: ["tp2", "cp2", "pp2"],
    }[gpus]
    found = {whole: bf16(f"parallel={whole}")}
    found |= {each: bf16(f"parallel={each}") for each in layouts}
    for layout in (each for each in layouts if each.startswith("pp")):
        chosen = (f"parallel={layout}", "parallel.pipeline_schedule=")
        found[f"{layout} Interleaved1F1B"] = bf16(chosen[0], f"{chosen[1]}Interleaved1F1B")
        # It takes a block's backward apart, which a compiled block does not let it.
        found[f"{layout} ZBVZeroBubble"] = bf16(chosen[0], f"{chosen[1]}ZBVZeroBubble", "compile=off")
    for mode in ("selective", "every2", "full", "budget"):
        found[f"{whole} recompute={mode}"] = bf16(f"parallel={whole}", f"recompute={mode}")
    for recipe in ("fp8", "fp8_gather", "fp8_rowwise", "fp8_rowwise_gw_hp"):
        found[f"{whole} {recipe}"] = (f"precision={recipe}", f"parallel={whole}")
    tensor = layouts[0]
    found[f"{tensor} fp8"] = ("precision=fp8", f"parallel={tensor}")
    two = (f"parallel={whole}", "task.micro_batch=2")
    found[f"{whole} 2 sequences"] = bf16(*two, "parallel.reshard=never")
    found[f"{whole} 2 sequences fp8_gather recompute=selective"] = ("precision=fp8_gather", *two, "recompute=selective")
    return found


def measured(overrides: Cell, *, seconds: float, cpu: bool) -> dict[str, Any]:
    """bench.json of one cell, or why there is none."""
    more = (*SMALL, "cluster.gpus=0") if cpu else ()
    if cpu and any("fp8" in each for each in overrides):
        more += ("precision.float8.emulate=true",)
    return {"overrides": list(overrides)} | bench((*COMMON, *overrides, *more), seconds)


def bench(words: Cell, seconds: float) -> dict[str, Any]:
    """bench.json of `launch.py <words>`, or under "failed" why there is none."""
    with tempfile.TemporaryDirectory(prefix="bench_") as root:
        scratch, began = Path(root), time.monotonic()
        command = [sys.executable, "launch.py", *words, f"root={scratch}", f"folder={scratch / 'run'}"]
        problem = ended(command, scratch / "log", seconds)
        told: dict[str, Any] = {"wall_seconds": round(time.monotonic() - began, 1)}
        result = scratch / "run" / "bench.json"
        if problem is None and result.exists():
            return told | json.loads(result.read_text())
        return told | {"failed": problem or "no bench.json"}


def ended(command: Sequence[str], log: Path, seconds: float) -> str | None:
    """Why a command did not end well within its time; what it prints goes into `log`."""
    with log.open("wb") as file:
        process = subprocess.Popen(command, cwd=HOME, stdout=file, stderr=file, start_new_session=True)
        try:
            code = process.wait(seconds)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)  # its ranks end with it
            process.wait()
            return f"not done after {seconds:g} s"
    return "\n".join(log.read_text(errors="replace").strip().splitlines()[-12:]) if code else None


def difference(mine: list[float], reference: list[float]) -> float:
    """The largest relative one of any step."""
    return max(abs(a - b) / abs(b) for a, b in zip(mine, reference, strict=True))


def tolerance(known: dict[str, Any]) -> float:
    """Of a step's loss: sums in another order in bf16, or products of numbers with 3 bits of mantissa."""
    return 1e-3 if known["arithmetic"] == "bfloat16" else 2e-2


def table(known: dict[str, dict[str, Any]], names: list[str]) -> str:
    """In Markdown."""
    head = ["cell", "tokens/s/GPU", "MFU full / causal", "peak GiB", "planned GiB", "loss, first", "last", "apart by"]
    lines = [f"| {' | '.join(head)} |", "|---|---:|---:|---:|---:|---:|---:|---:|"]
    reference = known.get(names[0], {}).get("losses")
    for name in names:
        if name in known:
            lines.append(f"| {' | '.join(row(name, known[name], reference))} |")
    return "\n".join(lines) + "\n"


def row(name: str, cell: dict[str, Any], reference: list[float] | None) -> list[str]:
    if "failed" in cell:
        return [name, f"failed: {cell['failed'].splitlines()[-1]}", *[""] * 6]
    peak, planned, losses = cell.get("peak_allocated_gib"), cell["planned_peak_gib"], cell["losses"]
    shares = [cell.get(f"mfu_{convention}_percent") for convention in ("full", "causal")]
    return [
        name,
        f"{cell['tokens_per_second']:,.0f}",
        " / ".join("-" if share is None else f"{share:.1f}" for share in shares),
        "-" if peak is None else f"{peak:.1f}",
        f"{planned:.1f}" + ("" if peak is None else f" ({100 * (planned / peak - 1):+.1f} %)"),
        f"{losses[0]:.5f}",
        f"{losses[-1]:.5f}",
        "-" if reference is None else f"{difference(losses, reference):.1e}",
    ]


def disagreements(known: dict[str, dict[str, Any]], names: list[str]) -> list[str]:
    """Cells that failed, and cells that did not train like the first."""
    reference = known.get(names[0], {}).get("losses")
    found = [f"{name}: {known[name]['failed']}" for name in names if "failed" in known.get(name, {})]
    for name in names:
        losses = known.get(name, {}).get("losses")
        if losses and reference and (apart := difference(losses, reference)) > tolerance(known[name]):
            found.append(f"{name}: a loss is {apart:.1e} from that of {names[0]}, at most {tolerance(known[name]):g}")
    return found


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--gpus", type=int, choices=(2, 4), default=4)
    parser.add_argument("--only", default="", help="parts of names, with commas between")
    parser.add_argument("--again", action="store_true", help="measure also what is known")
    parser.add_argument("--seconds", type=float, default=240.0, help="time limit of one cell")
    parser.add_argument("--minutes", type=float, default=float("inf"), help="time limit of all")
    parser.add_argument("--out", type=Path, default=RECORDS, help="folder of the record and the table")
    parser.add_argument("--cpu", action="store_true", help="a tiny model on this machine's CPU: does the script work?")
    given = parser.parse_args()
    end, every = time.monotonic() + 60 * given.minutes, cells(given.gpus)
    given.out.mkdir(parents=True, exist_ok=True)
    record = given.out / f"layouts_{given.gpus}{'_cpu' if given.cpu else ''}.json"
    known = json.loads(record.read_text()) if record.exists() else {}
    done = set() if given.again else {name for name, cell in known.items() if "failed" not in cell}
    chosen = [name for name in every if any(part in name for part in given.only.split(","))]
    for name in (each for each in chosen if each not in done):
        longest = max((cell["wall_seconds"] for cell in known.values()), default=given.seconds)
        if time.monotonic() + min(1.2 * longest + 20, given.seconds) > end:
            print("no time for the rest; the same command goes on", file=sys.stderr)
            break
        known[name] = measured(every[name], seconds=given.seconds, cpu=given.cpu)
        print(f"{known[name]['wall_seconds']:6.0f} s  {' | '.join(row(name, known[name], None))}", flush=True)
        record.write_text(json.dumps({each: known[each] for each in every if each in known}, indent=1) + "\n")
    text = table(known, list(every))
    record.with_suffix(".md").write_text(text)
    print(text)
    problems = disagreements(known, list(every))
    print(*problems, sep="\n", file=sys.stderr)
    return 1 if problems else 0


if __name__ == "__main__":
    sys.exit(main())
