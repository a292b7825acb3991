"""Long-lived gloo workers: torch is imported once, not once per worker or test.

`ranks(4, function, *args)` calls `function(*args)` on four processes inside a fresh gloo world of 4 and returns what
each returned, by rank. `function` must be importable at module level. A failing rank raises `RankError` with its
traceback; one that a signal ends, with the signal's name, after the stacks of its threads on stderr.

Once in some fifteen runs of all tests the heap of a worker is damaged under torch 2.13 ("malloc(): unaligned tcache
chunk detected", in a step that is right at every other time; neither valgrind nor a quarantine of freed blocks found
the write that does it). So one crash of a pool is told as a warning and its world is run again; the second one raises.

A death fails the call in which it happens, clean-up included, and no other: workers that died since are replaced.
"""

import faulthandler
import functools
import gc
import os
import signal
import sys
import tempfile
import traceback
import warnings
from collections.abc import Callable, Iterator
from datetime import timedelta
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any

from tests.forks import Place, forkserver

TIMEOUT_SECONDS = 600.0  # a rank may wait for a compiler on a machine that does other things as well
SECONDS_TO_DIE = 1.0  # a rank that lost its peer may speak before the peer is seen to be dead
MOST_THREADS = 20  # of a worker; it begins with 5
GONE = (EOFError, OSError)  # what a pipe raises whose other end died; ConnectionResetError where it left data unread
CRASHES = (signal.SIGABRT, signal.SIGSEGV, signal.SIGBUS)  # nobody sends these: libc or the processor does


class RankError(AssertionError):
    """A rank raised; the message holds the traceback of the first that did."""


class CrashError(RankError):
    """A rank ended by one of CRASHES."""


def _serve(pipe: Connection, place: Place) -> None:
    place.enter()
    faulthandler.enable()
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    import torch
    import torch.distributed as dist

    torch.set_num_threads(1)
    pipe.send(None)
    while True:
        try:
            rank, world, store, function, args = pipe.recv()
        except GONE:
            return
        try:
            dist.init_process_group(
                "gloo", init_method=f"file://{store}", rank=rank, world_size=world, timeout=timedelta(seconds=300)
            )
            dist.barrier()  # a rank whose work is short would be gone while another still connects to it, which fails
            for key, value in {"RANK": rank, "WORLD_SIZE": world, "LOCAL_RANK": rank}.items():
                os.environ[key] = str(value)
            pipe.send((True, function(*args)))
        except BaseException:
            pipe.send((False, traceback.format_exc()))
        finally:
            if dist.is_initialized():
                dist.destroy_process_group()
            _forget()
        pipe.send(None)  # clean-up can kill too (groups that caches held end here), and that is this call's failure


def _forget() -> None:
    """DTensor's caches hold meshes of the world that is gone, and take one of the same shape for the same. They also
    keep its groups alive, each with three threads that wake up 100 times a second: 1,400 of them took both cores.
    """
    if "torch.distributed.tensor" not in sys.modules:
        return
    from torch.distributed.tensor.debug import _clear_sharding_prop_cache

    _clear_sharding_prop_cache()
    threads = Path("/proc/self/task")
    if threads.is_dir() and len(list(threads.iterdir())) > MOST_THREADS:
        for cached in _caches():
            cached.cache_clear()
        getattr(sys.modules["torch.distributed.tensor._redistribute"], "_planner_cache", {}).clear()  # of torch 2.13
        gc.collect()


def _caches() -> Iterator[Any]:
    """Functions and methods of torch.distributed that keep what they returned. Not by asking the garbage collector for
    them: it does not know what tests/warm/preload.py has left out of it.
    """
    for name, module in list(sys.modules.items()):
        if name.startswith("torch.distributed"):
            # By their types: to ask some of these objects for their class is a warning.
            places = [module, *(each for each in vars(module).values() if issubclass(type(each), type))]
            for value in [each for place in places for each in vars(place).values()]:
                found = value.__func__ if type(value) in (staticmethod, classmethod) else value
                if type(found) is functools._lru_cache_wrapper:
                    yield found


class RankPool:
    """A pool that grows to the largest world asked for and lives as long as the test session."""

    def __init__(self) -> None:
        self._context = forkserver()
        self._workers: list[tuple[Any, Connection]] = []
        self._folder: tempfile.TemporaryDirectory[str] | None = None
        self._calls = 0
        self._crashed = False

    def __call__(self, world: int, function: Callable[..., Any], *args: Any) -> list[Any]:
        """The results of `function(*args)` on `world` ranks, by rank."""
        try:
            return self._run(world, function, args)
        except CrashError as crash:
            if self._crashed:
                raise
            self._crashed = True
            warnings.warn(f"{crash}; run again in new workers", stacklevel=2)
            return self._run(world, function, args)

    def _run(self, world: int, function: Callable[..., Any], args: tuple[Any, ...]) -> list[Any]:
        try:
            pipes = self._start(world, function, args)
            results: dict[int, Any] = {}
            for rank, (fine, result) in self._replies(pipes, function.__name__):
                if not fine:
                    raise self._failure(rank, world, result, function.__name__)
                results[rank] = result
            for rank, reply in self._replies(pipes, function.__name__):
                if reply is not None:
                    raise self._failure(rank, world, reply[1], f"the clean-up after {function.__name__}")
        except BaseException:  # Ctrl-C too: the next call would read what this one left in the pipes
            self.close()
            raise
        return [results[rank] for rank in range(world)]

    def _start(self, world: int, function: Callable[..., Any], args: tuple[Any, ...]) -> list[Connection]:
        """Hands the work to `world` living workers. One that dies as it is asked has run nothing, and neither have the
        others, who wait for it in init_process_group: so all of them are replaced and asked again, once.
        """
        try:
            return self._send(world, function, args)
        except GONE:
            self.close()
            return self._send(world, function, args)

    def _send(self, world: int, function: Callable[..., Any], args: tuple[Any, ...]) -> list[Connection]:
        store = self._grow(world)
        pipes = [pipe for _, pipe in self._workers[:world]]
        for rank, pipe in enumerate(pipes):
            pipe.send((rank, world, store, function, args))
        return pipes

    def _grow(self, world: int) -> str:
        """At least `world` living workers; returns the file where they are to meet."""
        if dead := [process for process, _ in self._workers if not process.is_alive()]:
            codes = sorted(_how(process.exitcode) for process in dead)
            self.close()
            warnings.warn(f"workers died of {', '.join(codes)} between two calls; all are replaced", stacklevel=6)
        # As long as the workers: FileStore's destructor, which may run calls later, looks for its file and then opens
        # it, and aborts where that has gone in between.
        self._folder = self._folder or tempfile.TemporaryDirectory()
        old = len(self._workers)
        while len(self._workers) < world:
            here, there = self._context.Pipe()
            process = self._context.Process(target=_serve, args=(there, Place()), daemon=True)
            process.start()
            there.close()
            self._workers.append((process, here))
        for _, pipe in self._workers[old:]:
            pipe.recv()  # torch is imported: that may take longer on a busy machine than ranks wait for each other
        self._calls += 1
        return str(Path(self._folder.name) / str(self._calls))

    @staticmethod
    def _replies(pipes: list[Connection], name: str) -> Iterator[tuple[int, Any]]:
        """The next message of each rank as it comes: None after clean-up, else whether it went well, and the result or
        a traceback; (False, "no word") of one that is gone.
        """
        left = dict(enumerate(pipes))
        while left:
            ready = wait(list(left.values()), timeout=TIMEOUT_SECONDS)
            if not ready:
                raise RankError(f"ranks {sorted(left)} hang in {name}")
            for rank in [rank for rank, pipe in left.items() if pipe in ready]:
                try:
                    yield rank, left.pop(rank).recv()
                except GONE:
                    yield rank, (False, "no word")

    def _failure(self, rank: int, world: int, told: str, name: str) -> RankError:
        """What ended this world, first of all a rank that died. The others may wait for it for ever, so the pool ends;
        a new one starts with the next call.
        """
        processes = [process for process, _ in self._workers[:world]]
        ended = wait([each.sentinel for each in processes], timeout=SECONDS_TO_DIE)
        dead = [number for number, each in enumerate(processes) if each.sentinel in ended]
        self.close()  # joins them: only then is the exit code there
        if dead:
            number, code = dead[0], processes[dead[0]].exitcode
            return (CrashError if -code in CRASHES else RankError)(f"rank {number} died of {_how(code)} in {name}")
        return RankError(f"rank {rank} of {world} in {name}:\n{told}")

    def close(self) -> None:
        """End all workers; the next call starts new ones."""
        for process, pipe in self._workers:
            pipe.close()
            process.kill()
            process.join()
        self._workers.clear()
        if self._folder is not None:
            self._folder.cleanup()
            self._folder = None


def _how(code: int) -> str:
    """A process ended: the name of the signal, or its exit code."""
    return signal.Signals(-code).name if code < 0 else f"exit code {code}"
