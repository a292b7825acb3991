"""Four GPUs of one machine, ours beside torchtitan 0.2.2: what one GPU cannot measure, the most important first.

    pip install torchtitan==0.2.2        # on torch 2.11; without it the peer's cells say so
    pip install -r requirements-cuda.txt # on Hopper: flash-attn-4
    python -m benchmarks.four_gpus --minutes 9           starts no cell that might last longer; again, and it goes on
    python -m benchmarks.four_gpus --only 16b,replicas   cells whose name contains one of these
    python -m benchmarks.four_gpus --cpu                 each command on tiny models: does the script work?

Each cell is a process of its own with a time limit; records/four_gpus.json keeps what it measured, and four_gpus.md is
written from that. Cells of one model start from the same weights and read the same random tokens: exit code 1 if their
losses part by more than the sums of their arithmetic allow, or if a cell failed.
"""

import argparse
import importlib.util
import json
import sys
import tempfile
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from benchmarks import layouts

LIMIT_SECONDS = {"ours": 240.0, "peer": 240.0, "script": 520.0}
SPARE_SECONDS = 20.0

Record = dict[str, dict[str, Any]]


@dataclass(frozen=True)
class Cell:
    """`words` of launch.py, of benchmarks.peer, or behind `python`; those behind {folder} get a folder of their own.

    `beside`: the peer's cell of the same work. `like`: the cell whose losses these are. `small`: instead or behind, on
    a CPU; None: it needs a GPU.
    """

    kind: Literal["ours", "peer", "script"]
    words: tuple[str, ...]
    beside: str = ""
    like: str = ""
    small: tuple[str, ...] | None = None


def ours(words: str, *, beside: str = "", like: str = "") -> Cell:
    small = ["task.seq_len=64", "task.steps=3", "task.warmup_steps=1", "compile=off", "cluster.gpus=0"]
    if "async_tensor" in words:
        return Cell("ours", ("task=bench", *words.split()), beside, like)
    small.append("model=deepseek_v3_debug" if "16b" in words else "model=llama3_debug")
    small += ["precision.float8.emulate=true"] if "fp8" in words else []
    return Cell("ours", ("task=bench", *words.split()), beside, like, tuple(small))


def peer(words: str) -> Cell:
    return Cell("peer", (*words.split(), "compile.enable=true"))


BATCH = "task.seq_len=8192 task.global_batch=8 task.steps=20 task.warmup_steps=5 optim.lr=1e-5"
EIGHT_B = f"model=llama3_8b compile=blocks {BATCH}"
SIXTEEN_B = "task.global_batch=16 task.steps=20 task.warmup_steps=5 optim.lr=1e-5"
SELECTIVE = "activation_checkpoint.mode=selective activation_checkpoint.selective_ac_option=op"
PEER_FP8 = (
    "model.converters=[quantize.linear.float8] quantize.linear.float8.enable_fsdp_float8_all_gather=true "
    "quantize.linear.float8.precompute_float8_dynamic_scale_for_fsdp=true quantize.linear.float8.filter_fqns=[output]"
)
MUON = f"{EIGHT_B} parallel=fsdp4 precision=bf16 task.micro_batch=2 task.global_batch=32 recompute=selective"


def dense() -> dict[str, Cell]:
    two = f"{EIGHT_B} parallel=fsdp4 task.micro_batch=2"
    of_two = f"llama3 8B training.seq_len=8192 training.local_batch_size=2 {SELECTIVE}"
    return {
        "8b bf16": ours(f"{two} precision=bf16 parallel.reshard=never", beside="8b bf16 peer"),
        "8b bf16 peer": peer(
            "llama3 8B training.seq_len=8192 training.local_batch_size=1 activation_checkpoint.mode=none"
        ),
        "8b fp8": ours(f"{two} precision=fp8_gather recompute=selective", beside="8b fp8 peer", like="8b bf16"),
        "8b fp8 peer": peer(f"{of_two} {PEER_FP8}"),
    }


def experts() -> dict[str, Cell]:
    found = {}
    for recipe in ("moe_16b", "moe_16b_lean"):
        for layout, ranks in (("fsdp4", "1"), ("fsdp4_ep4", "4")):
            found[f"{recipe} ep{ranks}"] = ours(
                f"experiment={recipe} parallel={layout} {SIXTEEN_B}", beside=f"16b ep{ranks} peer", like="moe_16b ep1"
            )
    for ranks in ("1", "4"):
        found[f"16b ep{ranks} peer"] = peer(
            f"deepseek_v3 16B training.seq_len=4096 training.local_batch_size=4 {SELECTIVE} "
            f"parallelism.expert_parallel_degree={ranks}"
        )
    base = f"experiment=moe_16b {SIXTEEN_B}"
    found["moe_16b ep4, forced balance"] = ours(f"{base} parallel=fsdp4_ep4 model.moe.force_load_balance=true")
    found["moe_16b ep1, float8 experts"] = ours(f"{base} precision=fp8_experts", like="moe_16b ep1")
    return found


def profiles(found: Mapping[str, Cell]) -> dict[str, Cell]:
    """Of the two rows that say most: communication that is not hidden, copies, idle."""
    return {
        f"{name}, profiled": Cell("ours", (*found[name].words, "task.profile=true"), small=found[name].small)
        for name in ("8b bf16", "moe_16b ep1")
    }


def every_layout() -> dict[str, Cell]:
    found = layouts.cells(4)
    first = next(iter(found))
    more = {
        "tp2_fsdp2 async": layouts.bf16("parallel=tp2_fsdp2", "parallel.async_tensor=true"),
        "fsdp4 recompute=auto": layouts.bf16("parallel=fsdp4", "recompute=auto", "task.micro_batch=2"),
    }
    return {
        name: ours(" ".join((*layouts.COMMON[1:], *words)), like="" if name == first else first)
        for name, words in (found | more).items()
    }


def scripts() -> dict[str, Cell]:
    replicas = ("-m", "benchmarks.fault_tolerance", "--gpus", "4")
    files = ("-m", "benchmarks.import_export", "--ranks", "4", "--folder", "{folder}")
    return {
        "replicas of 1b": Cell("script", replicas, small=("--cpu", "--steps", "20", "--out", "{folder}")),
        "replicas of 8b": Cell("script", (*replicas, "--model", "llama3_8b")),
        "import and export of 8b": Cell("script", files, small=("--model", "llama3_debug")),
        "hang of NCCL": Cell("script", ("-m", "pytest", "-q", "-m", "gpu", "tests/cluster/test_hang.py")),
    }


def cells() -> dict[str, Cell]:
    """By name, the most important first."""
    first = dense() | experts()
    update = {"8b AdamW": ours(MUON), "8b Muon": ours(f"{MUON} optim=muon")}
    return first | profiles(first) | every_layout() | scripts() | update


def likely_seconds(cell: Cell, known: Record, every: Mapping[str, Cell]) -> float:
    """At most so many for a cell: half as many again as any of its kind has taken, or its limit."""
    taken = [found["wall_seconds"] for name, found in known.items() if every[name].kind == cell.kind]
    return min(1.5 * max(taken, default=LIMIT_SECONDS[cell.kind]) + SPARE_SECONDS, LIMIT_SECONDS[cell.kind])


def measured(cell: Cell, seconds: float, *, cpu: bool) -> dict[str, Any]:
    """What a cell found, or why it found nothing."""
    more = (cell.small or ()) if cpu else ()
    if cell.kind == "ours":
        return layouts.bench((*cell.words, *more), seconds)
    if cell.kind == "peer" and importlib.util.find_spec("torchtitan") is None:
        return {"wall_seconds": 0.0, "failed": "torchtitan is not installed: pip install torchtitan==0.2.2"}
    with tempfile.TemporaryDirectory() as folder:
        words = [word.format(folder=folder) if word == "{folder}" else word for word in (*cell.words, *more)]
        if cell.kind == "peer":
            words = ["-m", "torch.distributed.run", "--nproc-per-node=4", "-m", "benchmarks.peer", *words]
        began, log = time.monotonic(), Path(folder, "log")
        problem = layouts.ended([sys.executable, *words], log, seconds)
        told: dict[str, Any] = {"wall_seconds": round(time.monotonic() - began, 1)}
        if problem is not None:
            return told | {"failed": problem}
        printed = log.read_text(errors="replace").splitlines()
    if cell.kind == "script":
        return told | {"printed": printed[-40:]}
    figures = json.loads(next(line for line in reversed(printed) if line.startswith("{")))
    return told | figures | {"tokens_per_second": figures["tokens_per_second_per_device"]}


def table(known: Record, every: Mapping[str, Cell]) -> str:
    """In Markdown: the cells with figures, then what scripts printed."""
    head = ["cell", "tokens/s/GPU", "of the peer's", "MFU full / causal", "peak GiB", "planned GiB", "losses apart by"]
    lines = [f"| {' | '.join(head)} |", "|---|---:|---:|---:|---:|---:|---:|"]
    lines += [f"| {' | '.join(row(name, every[name], known))} |" for name in every if _has_row(name, every, known)]
    for name in (each for each in every if "printed" in known.get(each, {})):
        lines += ["", f"{name}:", "", "```", *known[name]["printed"], "```"]
    return "\n".join(lines) + "\n"


def _has_row(name: str, every: Mapping[str, Cell], known: Record) -> bool:
    return name in known and (every[name].kind != "script" or "failed" in known[name])


def row(name: str, cell: Cell, known: Record) -> list[str]:
    found = known[name]
    if "failed" in found:
        return [name, f"failed: {found['failed'].splitlines()[-1]}", *[""] * 5]
    theirs = known.get(cell.beside, {}).get("tokens_per_second")
    shares = [found.get(f"mfu_{convention}_percent") for convention in ("full", "causal")]
    peak, planned, losses = found.get("peak_allocated_gib"), found.get("planned_peak_gib"), apart(name, cell, known)
    return [
        name,
        f"{found['tokens_per_second']:,.0f}",
        "-" if theirs is None else f"{found['tokens_per_second'] / theirs:.3f}",
        " / ".join("-" if share is None else f"{share:.1f}" for share in shares),
        "-" if peak is None else f"{peak:.1f}",
        "-" if planned is None else f"{planned:.1f}",
        "-" if losses is None else f"{losses:.1e}",
    ]


def apart(name: str, cell: Cell, known: Record) -> float | None:
    """Largest relative difference between a cell's losses and those of the cell that it is like; None: no such pair."""
    mine, others = known[name].get("losses"), known.get(cell.like, {}).get("losses")
    return layouts.difference(mine, others) if mine and others else None


def problems(known: Record, every: Mapping[str, Cell]) -> list[str]:
    """Cells that failed, and cells that did not train like theirs."""
    found = [f"{name}: {known[name]['failed']}" for name in every if "failed" in known.get(name, {})]
    for name in (each for each in every if each in known):
        parted, like = apart(name, every[name], known), every[name].like
        if parted is not None and parted > (most := layouts.tolerance(known[name])):
            found.append(f"{name}: a loss is {parted:.1e} from that of {like}, at most {most:g}")
    return found


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--only", default="", help="parts of names, with commas between")
    parser.add_argument("--again", action="store_true", help="measure also what is known")
    parser.add_argument("--minutes", type=float, default=float("inf"), help="time limit of all")
    parser.add_argument("--out", type=Path, default=layouts.RECORDS, help="folder of the record and the table")
    parser.add_argument("--cpu", action="store_true", help="tiny models on this machine's CPU")
    given = parser.parse_args()
    end, every = time.monotonic() + 60 * given.minutes, cells()
    given.out.mkdir(parents=True, exist_ok=True)
    record = given.out / f"four_gpus{'_cpu' if given.cpu else ''}.json"
    known: Record = json.loads(record.read_text()) if record.exists() else {}
    chosen = [name for name in every if any(part in name for part in given.only.split(","))]
    for name in chosen:
        cell, before = every[name], known.get(name, {})
        if (before and "failed" not in before and not given.again) or (given.cpu and cell.small is None):
            continue
        if time.monotonic() + likely_seconds(cell, known, every) > end:
            continue  # a shorter one may still fit
        known[name] = measured(cell, LIMIT_SECONDS[cell.kind], cpu=given.cpu)
        print(f"{known[name]['wall_seconds']:6.0f} s  {name}: {known[name].get('failed', 'done')}", flush=True)
        record.write_text(json.dumps({each: known[each] for each in every if each in known}, indent=1) + "\n")
    if missing := [name for name in chosen if name not in known and not (given.cpu and every[name].small is None)]:
        print(f"no time for {', '.join(missing)}; the same command goes on", file=sys.stderr)
    text = table(known, every)
    record.with_suffix(".md").write_text(text)
    print(text)
    print(*(wrong := problems(known, every)), sep="\n", file=sys.stderr)
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
