"""Seconds that a save takes from training and until it is on the disk, with and without a mirror (checkpoint.mirror).

python -m benchmarks.mirror --folder /fast/disk --gib 4 --url s3://bucket/benchmark
python -m benchmarks.mirror --folder /tmp/small --gib 0.25                            the mirror is another folder there

One rank saves random numbers in turns, without a mirror ("local"), and with one that is at work ("mirrored"): each of
these saves begins while the copy of the one before is on its way. Prints one JSON object of medians and all values.
"""

import argparse
import json
import os
import shutil
import statistics
import time
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from src.checkpoint.mirror import Copied, Mirror
from src.checkpoint.remote import HOME
from src.checkpoint.store import Store
from tests.checkpoint.options import options

GIB = 2**30
STEP_SECONDS = 0.5  # of training between two saves, here of waiting


def state(gib: float) -> dict[str, Any]:
    rows = max(1, int(gib * GIB / 4 / 1024 / 8))
    return {"model": {f"block.{number}": torch.randn(rows, 1024) for number in range(8)}}


def saves(folder: Path, mirror: Mirror | None, tree: dict[str, Any], steps: range) -> list[dict[str, float]]:
    """What each of these asynchronous saves has cost."""
    store = Store(folder / HOME, options(every=1, keep=2), mirror=mirror)
    found = []
    for step in steps:
        store.save(step, tree, {})
        time.sleep(STEP_SECONDS)
        store.finish()
        assert store.last is not None
        found.append({"stall": store.last.stall_seconds, "write": store.last.write_seconds})
    return found


def measure(folder: Path, url: str, gib: float, rounds: int) -> dict[str, Any]:
    """In turns, so that what else the machine does meets both."""
    tree = state(gib)
    costs: dict[str, list[dict[str, float]]] = {"local": [], "mirrored": []}
    copies: list[Copied] = []
    for number in range(rounds):
        steps = range(3 * number + 1, 3 * number + 4)
        costs["local"] += saves(folder / "local", None, tree, steps)
        mirror = Mirror(folder / "mirrored", options(every=1, keep=2, mirror=url))
        costs["mirrored"] += saves(folder / "mirrored", mirror, tree, steps)
        assert mirror.finish(600.0), "the mirror has not got it all"
        copies += [each for each in mirror.news() if isinstance(each, Copied)]
        mirror.close()
    medians = {
        f"{kind}_{what}_seconds": round(statistics.median(each[what] for each in values), 4)
        for kind, values in costs.items()
        for what in ("stall", "write")
    }
    copy_seconds = round(statistics.median(each.seconds for each in copies), 3)
    return {
        "gib": gib,
        "saves": 3 * rounds,
        "copies": len(copies),
        **medians,
        "copy_seconds": copy_seconds,
        "all": costs,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, required=True)
    parser.add_argument("--url", help="of the mirror; default: a folder beside")
    parser.add_argument("--gib", type=float, default=1.0)
    parser.add_argument("--rounds", type=int, default=5)
    asked = parser.parse_args()
    work = asked.folder.absolute() / f"mirror_benchmark_{os.getpid()}"
    for each in ("local", "mirrored"):
        (work / each / HOME).mkdir(parents=True)
    dist.init_process_group("gloo", init_method=f"file://{work}/store", rank=0, world_size=1)
    try:
        print(json.dumps(measure(work, asked.url or f"file://{work}/there", asked.gib, asked.rounds)))
    finally:
        dist.destroy_process_group()
        shutil.rmtree(work)


if __name__ == "__main__":
    main()
