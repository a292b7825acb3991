"""How long a run takes from the command to its first step, on this machine's CPU: one process, and two ranks.

python -m benchmarks.start_up                          this work tree
python -m benchmarks.start_up --code ../before .       two work trees in turn, such as one of `git worktree add`

A tiny model, so that what is left is the start: launcher, frozen code, imports, process group, first step. Each start
is of a new run; the first of each work tree warms caches and is told apart. Wall time depends on what else the machine
does; CPU seconds, of launcher and ranks together, hardly do.
"""

import argparse
import json
import os
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import median

HOME = Path(__file__).parents[1]
LAYOUTS = {1: "single", 2: "ddp2"}
TINY = (
    *("task.steps=1", "task.seq_len=32", "task.global_batch=2", "task.validate_every=0", "schedule.warmup_steps=1"),
    *("model.n_layers=1", "model.dim=32", "model.n_heads=2", "model.n_kv_heads=2", "model.vocab_size=258"),
    *("data=synthetic", "checkpoint=none", "cluster.gpus=0", "cluster.threads=1"),
)


def started(code: Path, world: int) -> tuple[float, float]:
    """Wall and CPU seconds of one run of one step, with its end."""
    environment = {key: value for key, value in os.environ.items() if key != "PYTHONDONTWRITEBYTECODE"}
    with tempfile.TemporaryDirectory() as root:
        command = [sys.executable, "launch.py", *TINY, f"parallel={LAYOUTS[world]}", f"root={root}"]
        before, began = resource.getrusage(resource.RUSAGE_CHILDREN), time.perf_counter()
        done = subprocess.run(command, cwd=code, env=environment, capture_output=True, text=True, check=False)
        wall, after = time.perf_counter() - began, resource.getrusage(resource.RUSAGE_CHILDREN)
    if done.returncode:
        raise SystemExit(f"{code}: {' '.join(command)} ended with code {done.returncode}\n{done.stderr}")
    return wall, after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime


def measured(codes: Sequence[Path], repeat: int) -> dict[str, dict[str, list[float]]]:
    """By work tree and world: [first wall, first CPU, median wall, median CPU]. Work trees take turns."""
    taken: dict[tuple[Path, int], list[tuple[float, float]]] = {}
    for _ in range(repeat + 1):
        for code in codes:
            for world in LAYOUTS:
                taken.setdefault((code, world), []).append(found := started(code, world))
                print(f"{code}, {world}: {found[0]:.2f} s ({found[1]:.2f} of CPU)", file=sys.stderr)
    rows: dict[str, dict[str, list[float]]] = {}
    for (code, world), (first, *later) in taken.items():
        walls, cpus = zip(*later, strict=True)
        rows.setdefault(str(code), {})[str(world)] = [*first, median(walls), median(cpus)]
    return rows


def text(found: Mapping[str, Mapping[str, Sequence[float]]]) -> str:
    """For a person."""
    lines = ["code, ranks: first start (CPU), later ones (CPU), seconds"]
    lines += [
        f"{code}, {world}: {first:.2f} ({first_cpu:.2f}), {later:.2f} ({cpu:.2f})"
        for code, worlds in found.items()
        for world, (first, first_cpu, later, cpu) in worlds.items()
    ]
    return "\n".join(lines)


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.start_up", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--code", type=Path, nargs="+", default=[HOME], help="work trees to start (default: this one)")
    parser.add_argument("--repeat", type=int, default=3, help="starts after the first (default %(default)s)")
    parser.add_argument("--json", action="store_true", help="print JSON")
    given = parser.parse_args(arguments)
    if given.repeat < 1 or (absent := [str(each) for each in given.code if not (each / "launch.py").is_file()]):
        parser.error("--repeat is at least 1" if given.repeat < 1 else f"no launch.py in {', '.join(absent)}")
    found = measured([each.resolve() for each in given.code], given.repeat)
    print(json.dumps(found, indent=1) if given.json else text(found))
    return 0


if __name__ == "__main__":
    sys.exit(main())
