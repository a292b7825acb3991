"""recompute=auto: the least activation checkpointing that fits in memory, chosen by the launcher, read by the ranks."""

import json
from dataclasses import replace
from pathlib import Path

from src.distributed.recompute import Recompute
from src.planning.memory import Load, estimate
from src.run import Run
from src.runs.records import PLAN_FILE

NONE = Recompute(mode="none", every=None, budget=None)
SELECTIVE = Recompute(mode="selective", every=None, budget=None)
FULL = Recompute(mode="full", every=None, budget=None)

# From the cheapest: 0, 1/4, about 1/3 (Llama 3 8B: 36 % of the flops of its matrices), 1/2 and all of the blocks'
# forward is repeated.
LADDER = (
    NONE,
    Recompute(mode="every", every=4, budget=None),
    SELECTIVE,
    Recompute(mode="every", every=2, budget=None),
    FULL,
)


def cheapest(load: Load, limit_bytes: int | None) -> Recompute:
    """The first that fits, or the last; none where no limit is known, or where nothing may be computed again."""
    if limit_bytes is None or load.degrees.splits_backward:
        return NONE
    fits = (option for option in LADDER if estimate(load.changed(recompute=option)).peak <= limit_bytes)
    return next(fits, FULL)


def resolve_auto_recompute(run: Run, folder: Path) -> Run:
    """The run as its ranks must build it: what the config leaves to the plan is read from the folder's plan.json."""
    if run.recompute.mode != "auto":
        return run
    chosen = json.loads((folder / PLAN_FILE).read_text())["recompute"]
    return replace(run, recompute=Recompute(**chosen))
