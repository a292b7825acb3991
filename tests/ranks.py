"""Long-lived gloo workers: torch is imported once per worker, not once per test.

`ranks(4, function, *args)` calls `function(*args)` on four processes inside a fresh gloo world of 4 and returns what
each returned, by rank. `function` must be importable at module level. A failing rank raises `RankError` with its
traceback.
"""

import functools
import gc
import multiprocessing
import os
import sys
import tempfile
import traceback
from collections.abc import Callable
from datetime import timedelta
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any

TIMEOUT_SECONDS = 120.0
MOST_THREADS = 60  # of a worker; it begins with 5


class RankError(AssertionError):
    """A rank raised; the message holds the traceback of the first that did."""


def _serve(pipe: Connection) -> None:
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    import torch
    import torch.distributed as dist

    torch.set_num_threads(1)
    while True:
        try:
            rank, world, store, function, args = pipe.recv()
        except EOFError:
            return
        try:
            dist.init_process_group(
                "gloo", init_method=f"file://{store}", rank=rank, world_size=world, timeout=timedelta(seconds=60)
            )
            for key, value in {"RANK": rank, "WORLD_SIZE": world, "LOCAL_RANK": rank}.items():
                os.environ[key] = str(value)
            pipe.send((True, function(*args)))
        except BaseException:
            pipe.send((False, traceback.format_exc()))
        finally:
            if dist.is_initialized():
                dist.destroy_process_group()
            _forget()


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
        for each in gc.get_objects():
            # By its type: to ask a weak proxy for its class is an error once its object is gone.
            if type(each) is functools._lru_cache_wrapper and str(each.__module__).startswith("torch.distributed"):
                each.cache_clear()
        getattr(sys.modules["torch.distributed.tensor._redistribute"], "_planner_cache", {}).clear()  # of torch 2.13
        gc.collect()


class Ranks:
    """A pool that grows to the largest world asked for and lives as long as the test session."""

    def __init__(self) -> None:
        self._context = multiprocessing.get_context("spawn")
        self._workers: list[tuple[Any, Connection]] = []

    def _grow(self, world: int) -> None:
        while len(self._workers) < world:
            here, there = self._context.Pipe()
            process = self._context.Process(target=_serve, args=(there,), daemon=True)
            process.start()
            there.close()
            self._workers.append((process, here))

    def __call__(self, world: int, function: Callable[..., Any], *args: Any) -> list[Any]:
        """The results of `function(*args)` on `world` ranks, by rank."""
        self._grow(world)
        with tempfile.TemporaryDirectory() as folder:
            store = Path(folder) / "store"
            pipes = [pipe for _, pipe in self._workers[:world]]
            for rank, pipe in enumerate(pipes):
                pipe.send((rank, world, str(store), function, args))
            results: dict[int, Any] = {}
            while len(results) < world:
                ready = wait([pipes[r] for r in range(world) if r not in results], timeout=TIMEOUT_SECONDS)
                if not ready:
                    self.close()
                    raise RankError(f"ranks {sorted(set(range(world)) - set(results))} hang in {function.__name__}")
                for pipe in ready:
                    rank = pipes.index(pipe)  # type: ignore[arg-type]
                    try:
                        fine, results[rank] = pipe.recv()  # type: ignore[union-attr]
                    except EOFError:
                        self.close()
                        raise RankError(f"rank {rank} died in {function.__name__}") from None
                    if not fine:
                        # The others may wait for this rank for ever: end the pool, a new one starts with the next call.
                        error = results[rank]
                        self.close()
                        raise RankError(f"rank {rank} of {world} in {function.__name__}:\n{error}")
            return [results[rank] for rank in range(world)]

    def close(self) -> None:
        """End all workers; the next call starts new ones."""
        for process, pipe in self._workers:
            pipe.close()
            process.kill()
            process.join()
        self._workers.clear()
