"""Rank, world size, device and process group of this process, read from the environment here and nowhere else.

torch is imported inside the functions, so that a launcher may ask `joined()` without paying for it.
"""

import os
import warnings
from dataclasses import dataclass, replace
from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Literal, Self

from src.distributed.process.descriptors import FULL_MESH, make_room
from src.distributed.process.flight_recorder import dump_of, watch
from src.errors import PlanError
from src.storage.rank_files import RANKS

if TYPE_CHECKING:
    import socket

    import torch
    import torch.distributed as dist
    from torch.distributed.distributed_c10d import Store

DeviceType = Literal["cpu", "cuda"]

# 20000 collectives are some minutes of a large run and about 10 MB of host memory per rank.
_FLIGHT_RECORDER_ENTRIES = 20_000


def joined() -> bool:
    """Whether an outer launcher (torchrun, a batch system, our own) has already made this process a rank."""
    return "RANK" in os.environ


def device_type() -> DeviceType:
    """Device type of this machine's ranks, "cuda" or "cpu". A launcher hides the GPUs where the CPU is wanted."""
    import torch

    return "cuda" if torch.cuda.is_available() else "cpu"


@dataclass(frozen=True)
class LauncherEnv:
    """Rank, world size and their node-local counterparts, from the environment of the process."""

    rank: int
    world: int
    local_rank: int
    local_world: int

    @classmethod
    def read(cls) -> Self:
        """Reads RANK, WORLD_SIZE, LOCAL_RANK and LOCAL_WORLD_SIZE; a world of one when there is no launcher."""
        if not joined():
            return cls(rank=0, world=1, local_rank=0, local_world=1)
        problems: list[str] = []

        def number(key: str, otherwise: int | None = None) -> int:
            text = os.environ.get(key)
            if text is None and otherwise is not None:
                return otherwise
            if text is None or not text.isdecimal():
                problems.append(
                    f"{key}={text}: RANK is set, so {key} must be a whole number; start through launch.py or torchrun"
                )
                return 0
            return int(text)

        rank, world = number("RANK"), number("WORLD_SIZE")
        local_rank = number("LOCAL_RANK", 0 if world == 1 else None)
        facts = cls(rank=rank, world=world, local_rank=local_rank, local_world=number("LOCAL_WORLD_SIZE", world))
        if not problems and not 0 <= rank < world:
            problems.append(f"RANK={rank} is not below WORLD_SIZE={world}")
        if problems:
            raise PlanError(problems)
        return facts


@dataclass(frozen=True)
class Replica:
    """Which of the replica groups of src/fault_tolerance this process belongs to, and where they meet."""

    group: int
    lighthouse: str  # its URL, or a file that holds it: then it may move

    def address(self) -> str:
        """URL of the lighthouse as it is now."""
        return Path(self.lighthouse).read_text().strip() if self.lighthouse.startswith("/") else self.lighthouse

    @classmethod
    def read(cls) -> Self:
        """Reads REPLICA_GROUP_ID and TORCHFT_LIGHTHOUSE, which the launcher of replica groups sets."""
        group, lighthouse = os.environ.get("REPLICA_GROUP_ID"), os.environ.get("TORCHFT_LIGHTHOUSE")
        if group is None or not group.isdecimal() or not lighthouse:
            raise PlanError(
                f"REPLICA_GROUP_ID={group} and TORCHFT_LIGHTHOUSE={lighthouse}: replica groups need a number and the "
                "address of their lighthouse; start through launch.py, or pass fault_tolerance=none"
            )
        return cls(int(group), lighthouse)


@dataclass(frozen=True)
class RankContext:
    """Rank, world, device and default process group of this process."""

    rank: int
    world: int
    local_rank: int
    local_world: int
    device: "torch.device"
    owner: bool  # whether `join` made the process group, so that `leave` ends it; else who made it does

    @classmethod
    def join(
        cls,
        device_type: DeviceType,
        world: int,
        *,
        timeout_seconds: float,
        traces: Path | None = None,
    ) -> Self:
        """Collective. `world` is the plan's; another one is refused here, before the first collective could hang.

        The group that a preflight check has made is the run's as well: a second one of the same ranks would cost the
        start as much again. `traces`: folder for the flight recorder's dumps.
        """
        import torch.distributed as dist
        from torch.distributed.distributed_c10d import _get_default_store

        owner = not dist.is_initialized()
        facts = LauncherEnv.read()
        if not owner:
            facts = replace(facts, rank=dist.get_rank(), world=dist.get_world_size())
        _check(facts, device_type, world)
        if owner:
            device = join_all(facts, device_type, timeout_seconds, traces=traces)
        else:
            device = _own(facts, device_type)
            _set_timeout(timeout_seconds, [])
            _get_default_store().set_timeout(timedelta(seconds=timeout_seconds))
        if traces is not None and facts.world > 1:
            # Not earlier: by now rank 0 of an outer launcher has made the run folder.
            traces.mkdir(parents=True, exist_ok=True)
        return cls(facts.rank, facts.world, facts.local_rank, facts.local_world, device, owner)

    def set_timeout(self, seconds: float, groups: "list[dist.ProcessGroup]") -> None:
        """Set the timeout of collectives, after the first step: compiling and loading need a longer one. Collective."""
        import torch
        import torch.distributed as dist

        dist.barrier()  # no rank may still be in the slow part when the short timeout starts to count
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        _set_timeout(seconds, groups)

    def leave(self) -> None:
        """End the process group; a second call does nothing.

        Not for the way out of an error: it would make other ranks fail too, and the first error is the one to show.
        """
        if self.owner:
            leave_all()


def host_store(listener: "socket.socket") -> object:
    """A rendezvous store on the port that `listener` has been given, which it takes over; ranks join it as clients.

    A rank that comes before waits: so the launcher can start its ranks first, and import torch while they do.
    """
    import torch.distributed as dist

    host, port = listener.getsockname()
    return dist.TCPStore(  # type: ignore[attr-defined]
        host, port, is_master=True, wait_for_workers=False, master_listen_fd=listener.detach()
    )


def _check(facts: LauncherEnv, device_type: DeviceType, world: int) -> None:
    import torch

    if facts.world != world:
        started = f"WORLD_SIZE={facts.world}" if joined() else "no launcher (RANK is not set), so 1 rank"
        raise PlanError(
            f"{started}, but the plan has {world} ranks: start {world}, or choose a layout of {facts.world}"
        )
    if device_type == "cuda" and facts.local_rank >= torch.cuda.device_count():
        raise PlanError(
            f"LOCAL_RANK={facts.local_rank} has no GPU: {torch.cuda.device_count()} are visible to this process; "
            "start at most one rank per GPU"
        )


def _prepare_nccl(traces: Path | None, rank: int) -> None:
    """What NCCL's watchdog reads when the process group starts: die on errors, keep and dump the last collectives."""
    wanted = {
        "TORCH_NCCL_ASYNC_ERROR_HANDLING": "3",  # end the process, without the abort that can itself hang
        "TORCH_FR_BUFFER_SIZE": str(_FLIGHT_RECORDER_ENTRIES),
    }
    if traces is not None:
        dump = dump_of(traces, rank)
        if rank % RANKS == 0:
            dump.parent.mkdir(parents=True, exist_ok=True)
        wanted |= {
            "TORCH_NCCL_DUMP_ON_TIMEOUT": "1",
            "TORCH_FR_DUMP_TEMP_FILE": str(dump).removesuffix(str(rank)),  # NCCL appends it
        }
    for key, value in wanted.items():
        before = os.environ.get(key)
        if rank == 0 and before not in (None, value):
            warnings.warn(f"{key}={before} of the environment is replaced by {value}", stacklevel=3)
        os.environ[key] = value


def prepare_connections(rank: int, world: int) -> None:
    """Before the first rendezvous of a process: few connections, and room for them. PlanError without that room."""
    make_room(rank, world)
    if world > FULL_MESH:
        os.environ["TORCH_GLOO_LAZY_INIT"] = "1"


def join_all(
    facts: LauncherEnv,
    device_type: DeviceType,
    timeout_seconds: float,
    *,
    traces: Path | None = None,
    store: "Store | None" = None,
) -> "torch.device":
    """Collective: make the default group, with the recorder that tells what each rank did last when one hangs. Returns
    this rank's device. `store`: where the ranks meet already; else at MASTER_ADDR and MASTER_PORT.
    """
    import torch.distributed as dist

    device = _own(facts, device_type)
    if device_type == "cuda":
        _prepare_nccl(traces, facts.rank)
    elif traces is not None and facts.world > 1:
        os.environ["TORCH_FR_BUFFER_SIZE"] = str(_FLIGHT_RECORDER_ENTRIES)
        watch(traces, facts.rank)
    keys = ("MASTER_ADDR", "MASTER_PORT") if store is None and facts.world > 1 else ()
    if missing := [key for key in keys if not os.environ.get(key)]:
        raise PlanError([f"{key}: missing; {facts.world} ranks cannot find each other without it" for key in missing])
    if store is None:  # else whoever opened it has prepared
        prepare_connections(facts.rank, facts.world)
    # A world of one needs neither a network nor an address.
    met = dist.HashStore() if facts.world == 1 else store  # type: ignore[attr-defined]
    dist.init_process_group(
        # CPU tensors (flags, asynchronous checkpoints) must not wait behind the GPU's stream.
        "cuda:nccl,cpu:gloo" if device_type == "cuda" else "gloo",
        store=met,
        rank=facts.rank,
        world_size=facts.world,
        timeout=timedelta(seconds=timeout_seconds),
        device_id=device if device_type == "cuda" else None,
    )
    return device


def leave_all() -> None:
    """End the default group, where there is one. Not on the way out of an error: `RankContext.leave` says why."""
    import torch.distributed as dist

    if dist.is_initialized():
        dist.destroy_process_group()


def _own(facts: LauncherEnv, device_type: DeviceType) -> "torch.device":
    import torch

    if device_type == "cpu":
        return torch.device("cpu")
    device = torch.device("cuda", facts.local_rank)
    torch.cuda.set_device(device)
    return device


def _set_timeout(seconds: float, groups: "list[dist.ProcessGroup]") -> None:
    """Of the default group and of these."""
    import torch.distributed as dist
    from torch.distributed.distributed_c10d import _set_pg_timeout

    assert dist.group.WORLD is not None, "join() made the default group"
    for group in [dist.group.WORLD, *groups]:
        _set_pg_timeout(timedelta(seconds=seconds), group)
