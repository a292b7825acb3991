"""A store, a wire and a file system that count, for worlds that no test could start: one process plays every rank in
turn, the last first, so that what a rank waits for is there.
"""

import builtins
import io
import os
import pickle
from collections import Counter, defaultdict, deque
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from datetime import timedelta
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
import torch.distributed as dist


class FakeStore:
    """What all ranks share, and how often each has asked for something."""

    def __init__(self) -> None:
        self.content: dict[str, bytes] = {}
        self.operations: Counter[int] = Counter()
        self.bytes: Counter[int] = Counter()  # read and written, by rank

    def of(self, rank: int) -> "RankStore":
        return RankStore(self, rank)


class RankStore:
    """The store as one rank has it; torch.distributed.Store's methods."""

    def __init__(self, store: FakeStore, rank: int) -> None:
        self._store, self._rank = store, rank

    def _count(self, size: int = 0) -> dict[str, bytes]:
        self._store.operations[self._rank] += 1
        self._store.bytes[self._rank] += size
        return self._store.content

    def set(self, key: str, value: str) -> None:
        self._count(len(value))[key] = value.encode()

    def append(self, key: str, value: str) -> None:
        content = self._count(len(value))
        content[key] = content.get(key, b"") + value.encode()

    def add(self, key: str, number: int) -> int:
        content = self._count(8)
        content[key] = str(int(content.get(key, b"0")) + number).encode()
        return int(content[key])

    def get(self, key: str) -> bytes:
        return self._count(len(self._store.content[key]))[key]

    def multi_get(self, keys: list[str]) -> list[bytes]:
        found = [self._store.content[key] for key in keys]
        self._count(sum(map(len, found)))
        return found

    def check(self, keys: list[str]) -> bool:
        return all(key in self._count() for key in keys)

    def wait(self, keys: list[str], _patience: timedelta | None = None) -> None:
        assert all(key in self._count() for key in keys), f"nobody has set {keys} yet: a rank would hang"


class FakeNetwork:
    """Messages between the ranks of a world, and their bytes by receiver."""

    def __init__(self, world: int) -> None:
        self.world = world
        self.received: Counter[int] = Counter()  # bytes, by rank
        self.peers: defaultdict[int, set[int]] = defaultdict(set)
        self.collectives: Counter[int] = Counter()  # by rank
        self._waiting: defaultdict[tuple[int, int], deque[bytes]] = defaultdict(deque)

    def of(self, rank: int, answers: Callable[[], Any] = lambda: None) -> "FakeWire":
        """`answers`: what rank 0 will say, which has not had its turn."""
        return FakeWire(self, rank, answers)

    def send(self, source: int, to: int, content: bytes) -> None:
        self._waiting[source, to].append(content)
        self.peers[source].add(to)
        self.peers[to].add(source)

    def receive(self, source: int, to: int) -> bytes:
        content = self._waiting[source, to].popleft()
        self.received[to] += len(content)
        return content


class FakeWire:
    """src.checkpoint.host_group.Wire of one rank."""

    def __init__(self, network: FakeNetwork, rank: int, answers: Callable[[], Any]) -> None:
        self._network, self.rank, self.world, self._answers = network, rank, network.world, answers
        self.node = range(rank, rank + 1)

    def largest(self, number: int) -> int:
        """All say what this rank says."""
        self._network.collectives[self.rank] += 1
        self._network.received[self.rank] += 8
        return number

    def from_rank_zero(self, content: Any) -> Any:
        self._network.collectives[self.rank] += 2  # length and content
        answer = content if self.rank == 0 else self._answers()
        self._network.received[self.rank] += len(pickle.dumps(answer))
        return answer

    def send(self, content: bytes, to: int) -> None:
        self._network.send(self.rank, to, content)

    def receive(self, source: int) -> bytes:
        return self._network.receive(source, self.rank)


# Of `os`, by what a file system calls them; what opens a file creates it where it may write.
_CALLS = {
    "stat": ("stat", "lstat"),
    "list": ("scandir", "listdir"),
    "create": ("mkdir", "link", "symlink"),
    "rename": ("rename", "replace"),
    "remove": ("unlink", "rmdir", "remove"),
}


def _opening(path: Any, how: Any = "r", *_given: Any, mode: Any = None, **_named: Any) -> str:
    """`how`: a mode of open(), flags of os.open()."""
    how = how if mode is None or isinstance(how, int) else mode
    creates = how & os.O_CREAT if isinstance(how, int) else set(how) & set("wax")
    return "create" if creates else "open"


@contextmanager
def counted_files(below: Path | None = None) -> Iterator[Counter[str]]:
    """Calls of the file system by Python code in the block: open, stat, list, create, rename, remove. `below`: those
    alone whose first path lies there.
    """
    counts: Counter[str] = Counter()

    def counting(kind: Callable[..., str], call: Callable[..., Any]) -> Callable[..., Any]:
        def counted(*given: Any, **named: Any) -> Any:
            path = given[0] if given else None
            there = isinstance(path, str | os.PathLike) and str(path).startswith(str(below))
            if below is None or there:
                counts[kind(*given, **named)] += 1
            return call(*given, **named)

        return counted

    with ExitStack() as stack:
        for kind, names in _CALLS.items():
            for name in names:
                counted = counting(lambda *_given, kind=kind, **_named: kind, getattr(os, name))
                stack.enter_context(patch.object(os, name, counted))
        stack.enter_context(patch.object(os, "open", counting(_opening, os.open)))
        opened = counting(_opening, io.open)
        stack.enter_context(patch.object(io, "open", opened))
        stack.enter_context(patch.object(builtins, "open", opened))
        yield counts


def descriptors() -> int:
    """Open files of this process."""
    return len(os.listdir("/proc/self/fd"))


@contextmanager
def played_collectives(world: int) -> Iterator[None]:
    """torch.distributed's calls of the preflight check, which find everybody well."""

    def summed(total: torch.Tensor) -> None:
        total.fill_(world * (world - 1) / 2)

    nothing = {name: lambda *_given, **_named: None for name in ("init_process_group", "destroy_process_group")}
    with patch.multiple(dist, **nothing, all_reduce=summed, PrefixStore=lambda _prefix, store: store):
        yield
