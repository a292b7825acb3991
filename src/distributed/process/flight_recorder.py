"""Flight recorder for gloo: the last collectives of each CPU rank, dumped when one hangs.

NCCL's watchdog writes such dumps by itself (rank_context.py). gloo only raises an error in the ranks that waited; here
these ask for the dumps of all, and a thread writes them, so that also a rank that is stuck elsewhere says where it is.
"""

import os
import pickle
import sys
import threading
import time
import traceback
from pathlib import Path
from typing import Any

from src.storage.atomic_write import atomic_write
from src.storage.rank_files import folder_of

TRACES = "traces"  # of a run folder: where the dumps are
WANTED = "wanted"  # touched when the dumps of all ranks are
POLL_SECONDS = 0.5
PATIENCE_SECONDS = 5.0  # for ranks that are dead, or stuck where no thread can run


def dump_of(traces: Path, rank: int) -> Path:
    """The file of this rank's dump. NCCL takes all but the number at its end as an environment variable."""
    return folder_of(traces, rank) / f"rank_{rank}"


def watch(traces: Path, rank: int) -> None:
    """Write this rank's dump whenever somebody asks, from a thread that ends with the process."""
    dump_of(traces, rank).unlink(missing_ok=True)  # of an earlier attempt
    arguments = (traces, rank, _asked(traces), threading.get_ident())
    threading.Thread(target=_watch, args=arguments, name="recorder", daemon=True).start()


def ask(traces: Path, world: int, patience_seconds: float = PATIENCE_SECONDS) -> None:
    """Have all ranks write their dumps; returns when they have, or after `patience_seconds`."""
    (traces / WANTED).touch()
    end = time.monotonic() + patience_seconds
    while not all(dump_of(traces, rank).exists() for rank in range(world)) and time.monotonic() < end:
        time.sleep(POLL_SECONDS / 5)


def _watch(traces: Path, rank: int, before: int | None, main: int) -> None:
    while _asked(traces) == before:
        time.sleep(POLL_SECONDS)
    dump_of(traces, rank).parent.mkdir(exist_ok=True)
    atomic_write(dump_of(traces, rank), pickle.dumps(_dump(main)))


def _dump(main: int) -> dict[str, Any]:
    """The recorder's entries; the members of each group, which it does not know of gloo; what the main thread does."""
    from torch._C import _distributed_c10d as c10d
    from torch.distributed.distributed_c10d import _world

    found: dict[str, Any] = pickle.loads(c10d._dump_fr_trace())  # type: ignore[attr-defined]
    groups = {name: list(_world.pg_group_ranks[group]) for group, name in _world.pg_names.items()}
    frame = sys._current_frames().get(main)
    stack = [f"{each.filename}:{each.lineno} in {each.name}" for each in traceback.extract_stack(frame)]
    return {
        "entries": found["entries"],
        "pg_config": {name: {"ranks": str(ranks)} for name, ranks in groups.items()},
        "stack": stack if frame is not None else [],
    }


def _asked(traces: Path) -> int | None:
    """When somebody last did, in nanoseconds."""
    try:
        return os.stat(traces / WANTED).st_mtime_ns
    except OSError:
        return None
