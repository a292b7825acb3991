"""What replica groups cost and save on the GPUs of this machine: overhead, seconds to heal, bytes on the wire.

python -m benchmarks.fault_tolerance --gpus 4                 Llama 3 1B: two groups of fsdp2, and one run of hsdp2x2
python -m benchmarks.fault_tolerance --gpus 4 --model llama3_8b
python -m benchmarks.fault_tolerance --gpus 2 --process-group gloo    one GPU each, sums over the host
python -m benchmarks.fault_tolerance --gpus 2 --cpu           the same on ranks without a GPU, to try it

Four runs, each a process of its own (`python launch.py ...`) on the embedded corpus: one run of all GPUs, two groups,
two groups of which one is killed by kill -9 in the middle, and DiLoCo. records/fault_tolerance_<gpus>_<model>.json and
.md keep what they measured. Exit code 1 if the losses of the first three are not those of one run, or an exchange of
DiLoCo failed.
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
from statistics import median
from typing import Any

HOME = Path(__file__).resolve().parents[1]
RECORDS = Path(__file__).parent / "records"
LAYOUTS = {2: ("ddp2", "single"), 4: ("hsdp2x2", "fsdp2"), 8: ("hsdp2x4", "fsdp4")}  # GPUs -> one run, a group
WARM_UP = 5  # steps that are not measured
KILL_AT = 15
LIMIT_SECONDS = 1500.0
LARGE = ("precision=bf16", "compile=blocks", "task.seq_len=8192", "task.global_batch=16", "task.micro_batch=1")
SMALL = ("model.n_layers=2", "task.seq_len=64", "task.global_batch=8", "task.micro_batch=1", "cluster.gpus=0")
BAND = 2e-2  # relative: bfloat16, and sums in another order


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.fault_tolerance")
    parser.add_argument("--gpus", type=int, choices=LAYOUTS, default=4)
    parser.add_argument("--model", default="llama3_1b")
    parser.add_argument("--steps", type=int, default=40)
    parser.add_argument("--process-group", choices=("nccl", "gloo"))
    parser.add_argument("--cpu", action="store_true")
    parser.add_argument("--out", type=Path, default=RECORDS, help="folder of the record and the table")
    given = parser.parse_args(arguments)
    model = "llama3_debug" if given.cpu else given.model
    record = given.out / f"fault_tolerance_{given.gpus}_{model}.json"
    whole, group = LAYOUTS[given.gpus]
    common = (f"model={model}", f"task.steps={given.steps}", *(SMALL if given.cpu else LARGE), *QUIET)
    sums = () if given.process_group is None else (f"fault_tolerance.process_group={given.process_group}",)
    # A peer that is dead between GPUs is noticed after sum_seconds.
    groups = ("fault_tolerance=torchft", "fault_tolerance.sum_seconds=30.0", f"parallel={group}", *sums)
    between = next(steps for steps in range(10, 0, -1) if given.steps % steps == 0)
    apart = ("fault_tolerance=diloco", f"fault_tolerance.sync_steps={between}", f"parallel={group}", *sums)
    runs = {
        "one run": (f"parallel={whole}",),
        "two groups": groups,
        "one killed": (*groups, f"task.steps={4 * given.steps}"),
        "diloco": apart,
    }
    found: dict[str, dict[str, Any]] = {}
    curves: dict[str, dict[int, float]] = {}
    wrong: list[str] = []
    for name, argv in runs.items():
        with tempfile.TemporaryDirectory() as root:
            found[name] = measure(Path(root, "run"), *common, *argv, kill=name == "one killed")
        curves[name] = found[name].pop("losses")
        if name != "diloco" and apart_by(curves["one run"], curves[name]) > BAND:
            wrong.append(name)
        if found[name].get("outer/failed_syncs"):
            wrong.append(name)
        write(record, found, wrong)  # what a later run does wrong costs none of it
    print(record.with_suffix(".md").read_text())
    return 1 if wrong else 0


QUIET = (
    *("recipe=debug", "task.log_every=1", "task.validate_every=0", "checkpoint=none", "schedule=constant"),
    *("schedule.warmup_steps=5", "seed=0"),
)


def measure(folder: Path, *argv: str, kill: bool = False) -> dict[str, Any]:
    """Tokens per second over all devices, and what else the metrics of this command line tell."""
    command = [sys.executable, str(HOME / "launch.py"), *argv, f"folder={folder}", "name=benchmark"]
    with (folder.parent / f"{folder.name}.log").open("w") as log:
        process = subprocess.Popen(command, cwd=HOME, stdout=log, stderr=log)
        if kill:
            wait_for(folder, process, lambda seen: len(both(seen)) >= KILL_AT)
            os.kill(rank_of(folder / "groups" / "1"), signal.SIGKILL)
            wait_for(folder, process, lambda seen: len(both(afterwards(seen))) >= 5)
            process.send_signal(signal.SIGTERM)
        code = process.wait(LIMIT_SECONDS)
    if code != 0:
        raise SystemExit(f"{' '.join(command)}\n{Path(log.name).read_text()[-6000:]}")
    seen = records(folder)
    steady = [line for line in seen if line["step"] > WARM_UP and line.get("groups/participants", 2) == 2]
    found: dict[str, Any] = {
        "command": " ".join(argv),
        "step_seconds": median(line["step_seconds"] for line in steady),
        "tokens_per_second_and_gpu": median(line["tokens_per_second"] for line in steady),
        "losses": {line["step"]: line["loss"] for line in seen},
    }
    counts = ("outer/sent_bytes", "outer/syncs", "outer/failed_syncs", "groups/lost_steps")
    found |= {name: seen[-1][name] for name in counts if name in seen[-1]}
    return found | (recovery(seen) if kill else {})


def records(folder: Path) -> list[dict[str, Any]]:
    file = folder / "metrics.jsonl"
    lines = file.read_text().split("\n")[:-1] if file.exists() else []
    return [line for line in map(json.loads, lines) if "loss" in line]


def both(seen: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return [line for line in seen if line.get("groups/participants") == 2]


def afterwards(seen: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The steps since the kill: of another quorum, in which the killed group may be back already."""
    if len(together := both(seen)) < KILL_AT:
        return []
    before = together[KILL_AT - 1]["groups/quorum"]
    return [line for line in seen[seen.index(together[KILL_AT - 1]) :] if line["groups/quorum"] != before]


def recovery(seen: list[dict[str, Any]]) -> dict[str, float]:
    """Seconds from the last step before the kill: to the next step, to the first of both; and of the healing itself."""
    since = afterwards(seen)
    last, first = seen[seen.index(since[0]) - 1], both(since)[0]
    return {
        "seconds_until_the_next_step": since[0]["time"] - last["time"],
        "seconds_until_both_are_back": first["time"] - last["time"],
        "steps_alone": float(since.index(first)),
        "heal_seconds": first["group_1/heal_seconds"],
    }


def wait_for(folder: Path, process: "subprocess.Popen[bytes]", true: Any) -> None:
    end = time.monotonic() + LIMIT_SECONDS
    while not true(records(folder)):
        if process.poll() is not None or time.monotonic() > end:
            process.terminate()
            raise SystemExit(f"{folder}: ended too early\n{(folder.parent / f'{folder.name}.log').read_text()[-6000:]}")
        time.sleep(0.2)


def rank_of(group: Path) -> int:
    """A process of this group's ranks."""
    for file in Path("/proc").glob("[0-9]*/cmdline"):
        words = file.read_bytes().decode(errors="replace").split("\0")
        if "src.cluster.rank" in words and str(group) in words:
            return int(file.parent.name)
    raise SystemExit(f"{group}: no rank lives")


def apart_by(one: dict[int, float], other: dict[int, float]) -> float:
    return max(abs(other[step] - loss) / loss for step, loss in one.items() if step in other)


def write(record: Path, found: dict[str, dict[str, Any]], wrong: list[str]) -> None:
    """`record`: .json; its table lies beside it."""
    record.parent.mkdir(exist_ok=True)
    record.write_text(json.dumps(found, indent=1) + "\n")
    base = found["one run"]["step_seconds"]
    lines = ["| | s per step | against one run | tokens/s per GPU | |", "|---|---|---|---|---|"]
    for cell, facts in found.items():
        rest = {key: value for key, value in facts.items() if key not in ("command", "step_seconds")}
        told = ", ".join(f"{key} {value:,.1f}" for key, value in rest.items() if key != "tokens_per_second_and_gpu")
        speed = f"{facts['step_seconds']:.3f} | {facts['step_seconds'] / base - 1:+.1%}"
        lines.append(f"| {cell} | {speed} | {facts['tokens_per_second_and_gpu']:,.0f} | {told} |")
    lines.append(f"\nWent wrong: {', '.join(wrong)}" if wrong else "\nLosses are those of one run; no exchange failed.")
    record.with_suffix(".md").write_text("\n".join(lines) + "\n")


if __name__ == "__main__":
    sys.exit(main())
