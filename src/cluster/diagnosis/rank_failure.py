"""Failure records: what each failing rank of a scheduler's job writes for the verdict."""

import json
import re
import time
import traceback
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Literal, Self

from src.cluster.backend import JobStart
from src.distributed.process.flight_recorder import TRACES
from src.errors import DiskFaultError, UserError
from src.storage import rank_files
from src.storage.atomic_write import atomic_write
from src.storage.patience import FAULTS, passing

ERROR = ".error.json"  # after rank_<r>

Kind = Literal["memory", "user", "code", "node", "peer", "disk"]

# A device that is broken, not a program: the words of CUDA's and the driver's errors.
_BROKEN_DEVICE = re.compile(
    r"uncorrectable|ECC error|hardware error|unspecified launch failure|device is lost|GPU has fallen off|"
    r"CUDA driver initialization failed|no CUDA-capable device|system not yet initialized|NVLink|Xid",
    re.IGNORECASE,
)
# Of a GPU, and of the CPU's allocator.
_NO_MEMORY = re.compile(r"out of memory|can't allocate memory|not enough memory|Cannot allocate memory", re.IGNORECASE)
# Somebody else died, or hangs: gloo's, NCCL's and the store's words.
_LOST_PEER = re.compile(
    r"connection (closed|reset|refused)|connectFullMesh|closed by peer|broken pipe|timed out|NCCL error|remote process|"
    r"failed to (recv|send)|socket|ProcessGroup|watchdog|DistBackendError|DistNetworkError|DistStoreError",
    re.IGNORECASE,
)


@dataclass(frozen=True)
class RankFailure:
    """A rank's last words."""

    rank: int
    node: str
    time_ns: int
    kind: Kind
    error: str  # one line
    traceback: str
    bad_node: str | None = None  # which node the rank itself accuses

    @classmethod
    def of(cls, error: BaseException, rank: int, node: str) -> Self:
        kind = classify(error)
        accused = getattr(error, "node", None) if kind == "node" else None
        if kind == "node" and type(error).__name__ != "PreflightError":
            accused = node
        stack = "".join(traceback.format_exception(error))
        line = f"{type(error).__name__}: {error}".partition("\n")[0]
        return cls(rank, node, time.time_ns(), kind, line, stack, accused)

    def write(self, place: Path) -> None:
        """Whole or not at all."""
        own = rank_files.folder_of(place, self.rank)
        own.mkdir(parents=True, exist_ok=True)
        atomic_write(own / f"rank_{self.rank}{ERROR}", json.dumps(asdict(self)))


def classify(error: BaseException) -> Kind:
    """By type first, then by the words of the libraries, which raise RuntimeError for most of it."""
    name, text = type(error).__name__, str(error)
    fault = passing(error)  # also where it was told as an error of the config, say, that could not be read
    if isinstance(fault, DiskFaultError) or (fault is not None and fault.errno in FAULTS):
        return "disk"
    if isinstance(error, UserError):
        return "user"
    if isinstance(error, MemoryError) or name == "OutOfMemoryError" or _NO_MEMORY.search(text):
        return "memory"
    if name == "PreflightError" or _BROKEN_DEVICE.search(text):
        return "node"
    if isinstance(error, ConnectionError) or name.startswith("Dist"):
        return "peer"
    return "peer" if isinstance(error, RuntimeError) and _LOST_PEER.search(text) else "code"


def gather_traces(error: BaseException, folder: Path) -> None:
    """After a collective that gloo gave up: have all ranks say which ones they entered. NCCL sees to that itself."""
    from src.distributed.process import flight_recorder
    from src.distributed.process.rank_context import LauncherEnv, device_type

    world = LauncherEnv.read().world
    if world > 1 and classify(error) == "peer" and device_type() == "cpu" and (folder / TRACES).exists():
        flight_recorder.ask(folder / TRACES, world)


def place(folder: Path, start: JobStart) -> Path:
    """Of this start of this job; every rank and the batch script know it without asking each other."""
    return folder / "logs" / f"job_{start.job}.{start.restarts}"


def read(where: Path) -> list[RankFailure]:
    """The earliest first."""
    found = [RankFailure(**json.loads(file.read_text())) for file in rank_files.found(where, ERROR).values()]
    return sorted(found, key=lambda failure: failure.time_ns)
