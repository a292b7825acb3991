"""The entry of every rank: `run_rank`. `python -m src.cluster.rank <folder> ...` is a rank that our supervisor starts.

Nothing but the folder is read: config.yaml as it was resolved and the code as it was frozen when the run was started.
"""

from src.entry import begin, end_at_once

if __name__ == "__main__":
    begin()

import argparse
import os
import signal
import sys
import threading
import time
import traceback
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from src.cluster.diagnosis.rank_failure import classify, gather_traces
from src.cluster.rank_log import keep_log, only_log, open_closed_streams
from src.config import tree as trees
from src.distributed.process.rank_context import LauncherEnv
from src.errors import UserError
from src.runs.folder import end, log_folder
from src.runs.frozen_code import verify
from src.storage.patience import Patience
from src.storage.space import disk_full


@dataclass(frozen=True)
class RankJob:
    """What a rank is told: start, resume and requeue are the same job."""

    folder: Path
    code: str | None  # hash8 of the snapshot that must run; None where an outer launcher chose the code

    @property
    def source(self) -> Path | None:
        """Where the frozen code is: what PYTHONPATH must lead to."""
        return None if self.code is None else self.folder / "code" / self.code


def run_rank(job: RankJob, tree: trees.Tree | None = None) -> bool:
    """One rank's life, whoever made its process: our supervisor, a scheduler or an outer launcher. False when it
    stopped early, after saving.

    `tree`: the config, where whoever calls has read it, or an outer launcher starts ranks before rank 0 has made the
    folder; else the folder's.
    attempts.jsonl records how it ended: well, by rank 0, or not, by the first rank that fails.
    """
    from src.config.build import build
    from src.run import Run

    facts = LauncherEnv.read()
    rank, local_rank = facts.rank, facts.local_rank
    patience, source = Patience(), job.source
    # 621 files to open: once a run, since each machine has checked its copy; once a machine where it has none.
    if source is not None and (rank == 0 or (local_rank == 0 and imported() == source.resolve())):
        patience(lambda: verify(source))
    tree = patience(lambda: trees.read(job.folder / "config.yaml")) if tree is None else tree
    try:
        run = Run.from_sections(build(tree))
        finished = run.task.run(run, job.folder)
    except Exception as error:
        full = disk_full(error, job.folder)
        told = error if full is None else full
        # Of a dead rank all others hear at once: one of each node says so, and those that failed themselves.
        if local_rank == 0 or classify(told) != "peer":
            with suppress(OSError, LookupError):  # nothing that breaks here may take the place of the error
                end(job.folder, "failed", f"rank {rank}: {type(told).__name__}: {told}")
        if told is error:
            raise
        raise told from error
    if rank == 0:
        end(job.folder, "finished" if finished else "stopped")
    return finished


def imported() -> Path:
    """The folder of the code that this process imports: a snapshot, this machine's copy of it, or a work tree."""
    import src

    return Path(src.__file__ or "").resolve().parents[1]


def by_launcher(module: str, description: str) -> argparse.ArgumentParser:
    """What every process on a run folder is told by the one that starts it."""
    parser = argparse.ArgumentParser(prog=f"python -m {module}", description=description)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--code", required=True, help="hash of the snapshot below <folder>/code")
    parser.add_argument("--launcher", type=int, required=True, help="pid; this process ends with it")
    return parser


def main(arguments: Sequence[str] | None = None) -> int:
    """A rank that src/cluster/local/config.py started."""
    parser = by_launcher("src.cluster.rank", "One rank of a run folder.")
    parser.add_argument("--attempt", type=int, required=True, help="number of the attempt, for the log")
    given = parser.parse_args(arguments)
    end_with(given.launcher)
    open_closed_streams()
    end_at_once()  # until the task installs its own handlers there is nothing to save
    rank = LauncherEnv.read().rank
    keep_log(log_folder(given.folder, given.attempt) / f"rank_{rank}.log", terminal=rank == 0)
    from torch.distributed.elastic.multiprocessing.errors import record

    try:
        record(run_rank)(RankJob(given.folder, given.code))
    except UserError as error:
        _last_words("\n".join(error.problems))
        return error.exit_code
    except KeyboardInterrupt:
        return 128 + signal.SIGINT
    except Exception as error:  # noqa: BLE001 (the last word of a rank: any error goes to its log and to the launcher)
        _last_words(traceback.format_exc().rstrip())
        with suppress(OSError):
            gather_traces(error, given.folder)
        return 1
    only_log()
    return 0


def _last_words(text: str) -> None:
    """To the log alone: the launcher tells them. A log that cannot be written is no reason to end otherwise."""
    with suppress(OSError):
        only_log()
        print(text, file=sys.stderr, flush=True)


def end_with(launcher: int) -> None:
    """A launcher (our parent) ended by kill -9 must not leave ranks on the GPUs, nor a second writer in the folder."""
    if sys.platform == "linux":
        import ctypes

        set_parent_death_signal = 1
        ctypes.CDLL(None, use_errno=True).prctl(set_parent_death_signal, signal.SIGKILL, 0, 0, 0)
    else:
        threading.Thread(target=_watch, args=(launcher,), daemon=True).start()
    if os.getppid() != launcher:  # it died before the line above
        os.kill(os.getpid(), signal.SIGKILL)


def _watch(launcher: int) -> None:
    while os.getppid() == launcher:
        time.sleep(1.0)
    os.kill(os.getpid(), signal.SIGKILL)


def _exit(code: int) -> None:
    """Leave a failed rank without waiting for its threads and process groups: they may wait for other ranks."""
    with suppress(OSError):
        sys.stdout.flush()
        sys.stderr.flush()
    if code not in (0, UserError.exit_code):
        os._exit(code)
    sys.exit(code)


if __name__ == "__main__":
    _exit(main())
