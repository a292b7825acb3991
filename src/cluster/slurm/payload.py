"""The payload of a SLURM job: one call for first start, requeue, and restart after a node failure."""

import hashlib
import json
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Literal, NoReturn

from src.cluster.diagnosis import rank_failure
from src.cluster.diagnosis.verdict import newest
from src.cluster.kernel_cache import KernelCache
from src.cluster.local.side_by_side import SAVED
from src.cluster.rank import RankJob, end_with, imported, run_rank
from src.cluster.slurm.replica_groups import introduce
from src.cluster.slurm.scheduler import SlurmScheduler
from src.cluster.slurm.time_limit import Deadline
from src.config import tree as trees
from src.distributed.process.flight_recorder import TRACES
from src.distributed.process.rank_context import LauncherEnv
from src.entry import collect_seldom
from src.errors import FolderError, UserError
from src.metrics.alerts.send import options_of, tell_end
from src.runs.folder import RunFolder
from src.runs.node_copy import place
from src.storage.json_lines import Lines
from src.storage.patience import Patience

if TYPE_CHECKING:
    import torch
    from submitit.core.utils import DelayedSubmission

SLOW_FILE = "slow_nodes.jsonl"  # of a run folder: nodes that were slower than their twins
LOCK_SECONDS = 60.0  # the launcher holds the folder until sbatch has answered
# Peers notice a dead rank within moments of each other; the first to leave makes srun end the others.
LAST_WORDS_SECONDS = 3.0
_POLL_SECONDS = 0.5
_SELDOM = 60  # looks
# What decides about compiled kernels; they are kept by content below it, so more would only split the cache.
_COMPILED = ("model", "parallel", "precision", "recompute", "compile")


@dataclass(frozen=True)
class QueuedJob:
    """The whole payload: where the run is, and what of the site its ranks must know."""

    folder: Path
    code: str  # hash8 of the snapshot
    world: int
    home: Path  # where relative paths of the config count from
    device: Literal["cuda", "cpu"]
    preflight_seconds: float
    preflight_gpus: bool = False  # whether devices are held against their twins
    saved: str | None = None  # the newest checkpoint at the last requeue

    def __call__(self) -> None:
        collect_seldom()  # torch is not imported yet
        os.chdir(self.home)
        end_with(os.getppid())  # a dead step daemon must not leave ranks on its GPUs
        nodes = _export(self.device, self.folder)
        facts = LauncherEnv.read()
        node = nodes[facts.rank // facts.local_world]
        try:
            finished = self._live(facts, nodes)
            if not finished:
                self._hand_over(facts)
            # Python gives handlers up while it ends: a signal of the time limit would then make a failure of the end.
            signal.signal(signal.SIGUSR2, signal.SIG_IGN)
        except Exception as error:  # noqa: BLE001 (the last word of a rank, whatever it is)
            leave(rank_failure.RankFailure.of(error, facts.rank, node), self.folder, error, leads=facts.local_rank == 0)

    def checkpoint(self) -> "DelayedSubmission":
        """What submitit starts at the requeue."""
        now = newest(self.folder)
        allowed = int(trees.read(self.folder / "config.yaml")["cluster"]["requeues"])
        return renewed(replace(self, saved=now), allowed if now != self.saved else 0)

    def _live(self, facts: LauncherEnv, nodes: list[str]) -> bool:
        _assert_frozen(self.folder / "code" / self.code)
        tree = Patience()(lambda: trees.read(self.folder / "config.yaml"))
        kernels = _kernels(tree, self.code)
        introduce(self.folder, tree)
        if facts.rank > 0:
            return self._run(facts, nodes, tree)
        with _rejoin(self.folder, self.code) as folder:
            attempt = folder.begin(self.world)
            print(f"attempt {attempt.number} of {self.folder} as job {attempt.job}", flush=True)
            site = tree["cluster"]
            with Deadline(self.folder, site["requeues"], site["grace_seconds"]):
                finished = self._run(facts, nodes, tree)
                kernels.keep()
            if (options := options_of(self.folder)) is not None:
                tell_end(self.folder, options)
            return finished

    def _run(self, facts: LauncherEnv, nodes: list[str], tree: trees.Tree) -> bool:
        from src.distributed.process.preflight import preflight, table
        from src.distributed.process.rank_context import leave_all

        address = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
        then = self._twins(facts, nodes) if self.preflight_gpus else None
        seconds, traces = self.preflight_seconds, self.folder / TRACES
        present = preflight(facts, self.device, self.world, nodes, address, seconds, traces=traces, then=then)
        if facts.rank == 0:
            print(table(present), flush=True)
        finished = run_rank(RankJob(self.folder, self.code), tree)
        leave_all()  # whom the check has joined
        return finished

    def _twins(self, facts: LauncherEnv, nodes: list[str]) -> "Callable[[torch.device], None]":
        """Rank 0 keeps the list of slow nodes, for this job's next start and the run's next submission."""
        from src.distributed.process.twins import SlowDevice, check_twins

        known, ranks, per_node = slow_nodes([self.folder]), range(self.world), facts.local_world

        def tell(slow: Sequence[SlowDevice]) -> None:
            for each in slow if facts.rank == 0 else ():
                print(f"warning: {each.words}", flush=True)
                if each.node not in known:
                    record = {"node": each.node, "words": each.words, "time": round(time.time(), 3)}
                    Lines(self.folder / SLOW_FILE).append(record)

        node_ranks = [ranks[first : first + per_node] for first in range(0, self.world, per_node)]
        return partial(check_twins, facts.rank, nodes[facts.rank // per_node], node_ranks, known, tell)

    def _hand_over(self, facts: LauncherEnv) -> NoReturn:
        """All ranks have saved. Rank 0 has submitit requeue the job, unless SLURM is already ending it.

        Until then no rank may leave: it would count as done, and SLURM, which grants a job some time before it preempts
        it, would not requeue what is done. After that all leave at once, instead of when SLURM's patience ends.
        """
        from submitit.core.utils import UncompletedJobError

        rank, start = facts.rank, SlurmScheduler().current_start()
        released = rank_failure.place(self.folder, start) / "released"
        near = Path(tempfile.gettempdir()) / f"released.{os.getuid()}.{start.job}.{start.restarts}"
        if rank == 0 and SlurmScheduler().is_ending(SlurmScheduler().own_job()):
            _leave_to_script(released, near, "SLURM is ending this job")
        if rank == 0:
            requeue = signal.getsignal(signal.SIGUSR2)
            assert callable(requeue), "submitit sets its handler before it calls us"
            try:
                requeue(signal.SIGUSR2, None)
            except SystemExit:
                print("requeued", flush=True)
            except UncompletedJobError as error:
                raise UserError(
                    f"{self.folder}: saved, and {error} Submit it again to go on, or raise cluster.requeues"
                ) from error
            except (OSError, subprocess.SubprocessError) as error:
                _leave_to_script(released, near, f"requeue failed: {error}")
            _release(released)
        await_release(released, near, leads=facts.local_rank == 0)
        os._exit(0)


def renewed(job: Callable[[], None], allowed: int) -> "DelayedSubmission":
    """`job` for submitit, which lets it meet its time limit at least `allowed` times more: those before a step forward
    do not count.
    """
    from submitit.core import utils

    class DelayedSubmission(utils.DelayedSubmission):  # submitit asks for this name; pickled by value
        def set_timeout(self, timeout_min: int, max_num_timeout: int) -> None:
            super().set_timeout(timeout_min, max(max_num_timeout, allowed))

    return DelayedSubmission(job)


def slow_nodes(folders: Iterable[Path]) -> list[str]:
    """Nodes that a start of these runs has found slow."""
    return list(dict.fromkeys(str(line["node"]) for each in folders for line in Lines(each / SLOW_FILE).read()))


def await_release(released: Path, near: Path, *, leads: bool, sleep: Callable[[float], None] = time.sleep) -> None:
    """Returns when `released` is there. One rank of a node, which `leads`, asks the shared disk for it twice a second
    and passes it on by `near`, a file of the node; the others ask the disk themselves once in half a minute, should
    they not see that file.
    """
    looks = 0
    while not (released.exists() if leads or looks % _SELDOM == _SELDOM - 1 else near.exists()):
        looks += 1
        sleep(_POLL_SECONDS)
    if leads:
        with suppress(OSError):
            near.touch()


def _leave_to_script(released: Path, near: Path, words: str) -> NoReturn:
    """Rank 0 ends with a code that is no success: where nobody has requeued the job after all, its batch script does.

    So what SLURM was ending and then does not, since whoever wanted the nodes has gone, is not taken for done.
    """
    print(words, file=sys.stderr, flush=True)
    _release(released)
    with suppress(OSError):
        near.touch()
    time.sleep(4 * _POLL_SECONDS)  # srun ends by force whoever is still there when this rank has left
    os._exit(SAVED)


def _release(mark: Path) -> None:
    mark.parent.mkdir(parents=True, exist_ok=True)
    mark.touch()


def _export(device: str, folder: Path) -> list[str]:
    """RANK and the rest from this job's own environment; returns the names of the nodes."""
    from submitit import JobEnvironment
    from submitit.helpers import TorchDistributedEnvironment

    job = JobEnvironment()
    # Another port for each run and start: the last one's may not be free yet. From 32768 on Linux gives ports away.
    seed = f"{folder}.{job.job_id}.{os.environ.get('SLURM_RESTART_COUNT', '0')}"
    os.environ["MASTER_PORT"] = str(random.Random(seed).randrange(15000, 32000))
    TorchDistributedEnvironment().export(set_cuda_visible_devices=False, overwrite=True)
    if device == "cpu":
        os.environ["CUDA_VISIBLE_DEVICES"] = ""
    else:
        os.environ.setdefault("PYTORCH_ALLOC_CONF", "expandable_segments:True")
    return list(job.hostnames)


def _assert_frozen(snapshot: Path) -> None:
    """The modules of this process are those of the snapshot, or of this machine's copy of it, whatever the site's
    environment did to Python's path.
    """
    here = imported()
    with suppress(OSError):
        if here == place(snapshot).resolve():
            return
    if here != snapshot.resolve():
        raise FolderError(f"{snapshot}: this rank imports {here} instead; let cluster.setup leave PYTHONPATH alone")


def _kernels(tree: trees.Tree, code: str) -> KernelCache:
    """A requeue, and every other point of this shape, finds its kernels compiled."""
    parts = json.dumps({key: tree.get(key) for key in _COMPILED}, sort_keys=True)
    key = f"{code}-{hashlib.sha256(parts.encode()).hexdigest()[:8]}"
    start = SlurmScheduler().current_start()
    shared = Path(tree["root"]).expanduser().absolute() / "cache" / "compile" / key
    kernels = KernelCache.on_node(shared, f"{start.job}.{start.restarts}")
    kernels.export()
    return kernels


def _rejoin(path: Path, code: str) -> RunFolder:
    """The launcher may still hold the folder."""
    end = time.monotonic() + LOCK_SECONDS
    while True:
        try:
            return RunFolder.rejoin(path, code, SlurmScheduler())
        except FolderError:
            if time.monotonic() > end:
                raise
            time.sleep(0.5)


def leave(failure: rank_failure.RankFailure, folder: Path, error: Exception, *, leads: bool) -> NoReturn:
    """Say it, keep it, and go without waiting for threads or process groups, which may wait for other ranks.

    Of a lost peer one rank of each node, which `leads`, has the word: the verdict asks which nodes were heard.
    """
    text = "\n".join(error.problems) if isinstance(error, UserError) else failure.traceback
    if leads or failure.kind != "peer":
        failure.write(rank_failure.place(folder, SlurmScheduler().current_start()))
    else:
        text = failure.error
    print(f"rank {failure.rank} on {failure.node} failed\n{text}", file=sys.stderr, flush=True)
    rank_failure.gather_traces(error, folder)
    if failure.kind == "peer":
        time.sleep(LAST_WORDS_SECONDS)
    os._exit(error.exit_code if isinstance(error, UserError) else 1)
