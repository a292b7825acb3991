"""Sweep folders whose every number is known, without a run: what ledger, report and search read."""

import json
import math
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from src.config.tree import Tree
from src.sweeps.ledger import Ledger, SweepPoint

START = 1_700_000_000.0
STEP_SECONDS = 0.5
HERE = {"_target_": "src.cluster.local.config.Local"}


def tree(root: Path, **science: Any) -> Tree:
    """A config of nothing but what a ledger looks at."""
    return {"name": "tiny", "root": str(root), "folder": None, "tracker": {"wandb": None}, "cluster": HERE, **science}


def moment(seconds: float) -> str:
    return datetime.fromtimestamp(seconds, UTC).isoformat(timespec="seconds")


def attempt(folder: Path, number: int, began: float, ended: str | None, at: float = 0.0, said: str = "") -> None:
    """A line of attempts.jsonl, and its end if it had one."""
    folder.mkdir(parents=True, exist_ok=True)
    started = {"number": number, "started": moment(began), "host": "n1", "world": 1, "code": "c", "sha": None}
    lines: list[dict[str, Any]] = [{**started, "job": None, "changed": []}]
    if ended is not None:
        lines.append({"number": number, "ended": ended, "detail": f"{moment(at)} {said}".strip()})
    with (folder / "attempts.jsonl").open("a") as file:
        file.writelines(json.dumps(line) + "\n" for line in lines)


def train(folder: Path, *, steps: int, loss: float, rate: float = 1e4, began: float = START, number: int = 1) -> float:
    """metrics.jsonl of one attempt that ends at a validation loss; returns when its last line was written."""
    folder.mkdir(parents=True, exist_ok=True)
    lines: list[dict[str, Any]] = [{"event": "start", "time": began + 6}]
    first = {"startup/total_seconds": 20.0, "startup/compile_seconds": 9.0, "step": 1}
    lines.append({"time": began + 20, **first})
    time = began + 20
    for step in range(10, steps + 1, 10):
        time += 10 * STEP_SECONDS
        noise = 0.04 * math.sin(step * 12.9898) * math.cos(step * 4.1)
        value = loss + 3.0 * math.exp(-step / (0.12 * steps)) + noise
        lines.append({"time": time, "step": step, "loss": value, "tokens": step * 8192.0, "tokens_per_second": rate,
                      "step_seconds": STEP_SECONDS, "data_seconds": 0.02})  # fmt: skip
    time += 8
    lines.append({"time": time - 4, "step": steps, "checkpoint/stall_seconds": 3.0})
    lines.append({"time": time, "step": steps, "validation_loss": loss})
    with (folder / "metrics.jsonl").open("a") as file:
        file.writelines(json.dumps({"attempt": number, **line}) + "\n" for line in lines)
    return time


def finished(point: SweepPoint, *, loss: float, steps: int = 200, rate: float = 1e4) -> None:
    """A run that went well, 12 s after it was asked for."""
    ended = train(point.folder, steps=steps, loss=loss, rate=rate, began=START + 12)
    attempt(point.folder, 1, START + 12, "finished", ended + 2)


def failed(point: SweepPoint, why: str) -> None:
    train(point.folder, steps=60, loss=6.0)
    attempt(point.folder, 1, START, "failed", START + 60, f"rank 0: {why}")


def grid(root: Path, rates: list[str], seeds: list[str]) -> Ledger:
    """A ledger of optim.lr x seed, nothing handed over yet."""
    argv = ["-m", "experiment=tiny", f"optim.lr={','.join(rates)}", f"seed={','.join(seeds)}"]
    ledger = Ledger.make(root / "sweeps" / "tiny-0a1b2c3d", argv, {})
    for rate in rates:
        for seed in seeds:
            overrides = {"experiment": "tiny", "optim.lr": rate, "seed": seed}
            ledger.add(tree(root, seed=int(seed), optim={"lr": float(rate)}), overrides)
    return ledger
