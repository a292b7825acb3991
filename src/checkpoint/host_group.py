"""Small agreements between all ranks, on a group of their own that a background thread may use while training runs."""

import traceback
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Generic, TypeVar

import torch.distributed as dist

from src.errors import CheckpointError, DiskFaultError, DiskFullError, UserError
from src.storage.space import disk_full

T = TypeVar("T")


@dataclass(frozen=True)
class _Outcome(Generic[T]):
    value: T | None
    problems: tuple[str, ...] = ()  # the user's or the disk's
    kind: type[UserError] = CheckpointError  # of the problems
    crash: str = ""  # ours


class HostGroup:
    """Every method is collective. One thread at a time: gloo matches calls by their order."""

    def __init__(self) -> None:
        # CUDA's NCCL group would stall training and cannot carry objects from the host.
        self.group = dist.new_group(backend="gloo")
        self.rank = dist.get_rank()
        self.world = dist.get_world_size()

    def on_all(self, action: Callable[[], T]) -> list[T]:
        """Run `action` on every rank; returns the results of all, by rank. If it fails on any rank, all ranks raise
        that error.
        """
        outcomes: list[_Outcome[T] | None] = [None] * self.world
        dist.all_gather_object(outcomes, _try(action, self.rank), group=self.group)
        return self._agree([outcome for outcome in outcomes if outcome is not None])

    def on_rank_zero(self, action: Callable[[], T]) -> T:
        """Run `action` on rank 0 alone; returns its result on every rank. If it fails, all ranks raise its error."""
        outcomes: list[_Outcome[T] | None] = [_try(action, 0) if self.rank == 0 else None]
        dist.broadcast_object_list(outcomes, src=0, group=self.group)
        return self._agree([outcome for outcome in outcomes if outcome is not None])[0]

    def _agree(self, outcomes: list[_Outcome[T]]) -> list[T]:
        crashes = [outcome.crash for outcome in outcomes if outcome.crash]
        if crashes:
            raise RuntimeError(crashes[0])
        problems = dict.fromkeys(problem for outcome in outcomes for problem in outcome.problems)
        if problems:
            kinds = {outcome.kind for outcome in outcomes if outcome.problems}
            raise next((kind for kind in (DiskFullError, CheckpointError) if kind in kinds), DiskFaultError)(problems)
        return [outcome.value for outcome in outcomes]  # type: ignore[misc]  # no problem, so the action's own value


def _try(action: Callable[[], T], rank: int) -> _Outcome[T]:
    try:
        return _Outcome(action())
    except UserError as error:
        kinds = (kind for kind in (DiskFullError, DiskFaultError) if isinstance(error, kind))
        return _Outcome(None, error.problems, next(kinds, CheckpointError))
    except OSError as error:
        if (full := disk_full(error, Path.cwd())) is not None:
            return _Outcome(None, full.problems, DiskFullError)
        return _Outcome(None, (f"{error.filename or 'checkpoint'}: {error.strerror or error} (rank {rank})",))
    except Exception:  # noqa: BLE001  (all ranks must hear of it, or they wait for this one)
        return _Outcome(None, crash=f"rank {rank}:\n{traceback.format_exc()}")
