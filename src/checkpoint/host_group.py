"""Small agreements between all ranks, on a group of their own that a background thread may use while training runs.

No rank but the first is sent what others have: what each of 4,096 ranks says of its files would be 837 MB on each. A
number that all ranks enter into one sum says whether any of them failed; what they have to tell is joined on its way to
rank 0, along a tree in which a rank has at most log2(world) others to listen to.
"""

import pickle
import traceback
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Generic, Protocol, TypeVar

import torch
import torch.distributed as dist

from src.distributed.process.rank_context import LauncherEnv
from src.errors import CheckpointError, DiskFaultError, DiskFullError, UserError
from src.storage.space import disk_full

T = TypeVar("T")
Q = TypeVar("Q")

_NO, _YES, _FAILED = range(3)


@dataclass(frozen=True)
class _Outcome(Generic[T]):
    value: T | None
    problems: tuple[str, ...] = ()  # the user's or the disk's
    kind: type[UserError] = CheckpointError  # of the problems
    crash: str = ""  # ours

    @property
    def failed(self) -> bool:
        return bool(self.problems or self.crash)

    def get(self) -> T:
        if self.crash:
            raise RuntimeError(self.crash)
        if self.problems:
            raise self.kind(self.problems)
        return self.value  # type: ignore[return-value]  # no problem, so the action's own value


class Wire(Protocol):
    """How ranks speak to each other."""

    @property
    def rank(self) -> int: ...
    @property
    def world(self) -> int: ...
    @property
    def node(self) -> range:
        """The ranks of this rank's node."""

    def largest(self, number: int) -> int:
        """Collective: the largest of all ranks' numbers."""

    def from_rank_zero(self, content: Any) -> Any:
        """Collective: what rank 0 has, on every rank."""

    def send(self, content: bytes, to: int) -> None: ...
    def receive(self, source: int) -> bytes: ...


class GlooWire:
    def __init__(self) -> None:
        # CUDA's NCCL group would stall training and cannot carry objects from the host.
        self._group = dist.new_group(backend="gloo")
        self.rank = dist.get_rank()
        self.world = dist.get_world_size()
        self.node = self._node(LauncherEnv.read())

    def _node(self, facts: LauncherEnv) -> range:
        """Of ranks that are numbered node by node. Where any is not (SLURM's cyclic distribution, nodes of several
        sizes), each rank is a node by itself: a leader that others do not think theirs would be waited for in vain.
        """
        scattered = self.rank % max(facts.local_world, 1) != facts.local_rank
        if self.largest(int(scattered)):
            return range(self.rank, self.rank + 1)
        first = self.rank - facts.local_rank
        return range(first, min(first + facts.local_world, self.world))

    def largest(self, number: int) -> int:
        value = torch.tensor(number)
        dist.all_reduce(value, dist.ReduceOp.MAX, self._group)
        return int(value)

    def from_rank_zero(self, content: Any) -> Any:
        contents = [content]
        dist.broadcast_object_list(contents, src=0, group=self._group)
        return contents[0]

    def send(self, content: bytes, to: int) -> None:
        dist.send(torch.tensor(len(content)), to, self._group)
        dist.send(torch.frombuffer(bytearray(content), dtype=torch.uint8), to, self._group)

    def receive(self, source: int) -> bytes:
        length = torch.tensor(0)
        dist.recv(length, source, self._group)
        content = torch.empty(int(length), dtype=torch.uint8)
        dist.recv(content, source, self._group)
        return content.numpy().tobytes()


class HostGroup:
    """Every method is collective. One thread at a time: gloo matches calls by their order.

    Where the action fails on any rank, all ranks raise that error.
    """

    def __init__(self, wire: Wire | None = None) -> None:
        self._wire = GlooWire() if wire is None else wire
        self.rank = self._wire.rank
        self.world = self._wire.world

    def on_all(self, action: Callable[[], T]) -> T:
        """Run `action` on every rank; returns this rank's own result."""
        outcome = _try(action, self.rank)
        self._agree(outcome, _NO)
        return outcome.get()

    def any(self, action: Callable[[], bool]) -> bool:
        """Whether `action` says yes on any rank."""
        outcome = _try(action, self.rank)
        return self._agree(outcome, _YES if outcome.value else _NO) == _YES

    def joined(self, action: Callable[[], T], join: Callable[[T, T], T]) -> T | None:
        """Run `action` on every rank; returns the results of all, joined in the order of ranks, on rank 0 alone.
        `join`: associative.
        """
        outcome = _try(action, self.rank)
        self._agree(outcome, _NO)
        return self._reduce(outcome.get(), join)

    def spread(self, parts: list[T] | None) -> T:
        """Each rank's own of the `parts` that rank 0 has, by rank."""
        if self.rank > 0:
            parts = pickle.loads(self._wire.receive(_above(self.rank)))
        assert parts is not None, "rank 0 has them"
        for number in reversed(list(_below(self.rank, self.world))):
            first = number - self.rank
            self._wire.send(pickle.dumps(parts[first:]), number)
            parts = parts[:first]
        return parts[0]

    def of_node(self, ask: Callable[[], Q], answer: Callable[[list[Q]], list[T]]) -> T:
        """What the first rank of this node answers to what this one asks; it answers all ranks of the node at once, in
        their order.
        """
        asked, node = self.on_all(ask), self._wire.node
        if self.rank > node[0]:
            self._wire.send(pickle.dumps(asked), node[0])
            self._agree(_Outcome(None), _NO)
            return pickle.loads(self._wire.receive(node[0]))  # type: ignore[no-any-return]
        others = [pickle.loads(self._wire.receive(each)) for each in node[1:]]
        outcome = _try(lambda: answer([asked, *others]), self.rank)
        self._agree(outcome, _NO)
        mine, *theirs = outcome.get()
        for each, told in zip(node[1:], theirs, strict=True):
            self._wire.send(pickle.dumps(told), each)
        return mine

    def on_rank_zero(self, action: Callable[[], T]) -> T:
        """Run `action` on rank 0 alone; returns its result on every rank."""
        outcome: _Outcome[T] = self._wire.from_rank_zero(_try(action, 0) if self.rank == 0 else None)
        return outcome.get()

    def _agree(self, outcome: _Outcome[Any], said: int) -> int:
        """The largest of what ranks have said; raises what went wrong on any."""
        found = self._wire.largest(_FAILED if outcome.failed else said)
        if found == _FAILED:
            told: _Outcome[Any] = replace(outcome, value=None)
            self._wire.from_rank_zero(self._reduce(told, _worse)).get()
        return found

    def _reduce(self, value: T, join: Callable[[T, T], T]) -> T | None:
        for number in _below(self.rank, self.world):
            value = join(value, pickle.loads(self._wire.receive(number)))
        if self.rank == 0:
            return value
        self._wire.send(pickle.dumps(value), _above(self.rank))
        return None


def _below(rank: int, world: int) -> Iterator[int]:
    """Those that a rank listens to: rank + 1, + 2, + 4 ..., of which the last has as many below it as all others."""
    step = 1
    while not rank & step and rank + step < world:
        yield rank + step
        step *= 2


def _above(rank: int) -> int:
    """The one that listens to a rank other than the first."""
    return rank & (rank - 1)


def _worse(first: _Outcome[Any], second: _Outcome[Any]) -> _Outcome[Any]:
    problems = tuple(dict.fromkeys((*first.problems, *second.problems)))
    kinds = {each.kind for each in (first, second) if each.problems}
    kind = next((kind for kind in (DiskFullError, CheckpointError) if kind in kinds), DiskFaultError)
    return _Outcome(None, problems, kind, first.crash or second.crash)


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
