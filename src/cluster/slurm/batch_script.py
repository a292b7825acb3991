"""Lines of a job's batch script around its ranks, and where SLURM's files go."""

import os
import shlex
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path

from src.cluster.slurm import client
from src.cluster.slurm.payload import QueuedJob
from src.runs.frozen_code import NO_BYTECODE

Flag = str | int | float | bool | None

# Between Python and its arguments, of each rank: one of a node makes the copy of the code that all of them import.
ON_NODE = '-I -S "$snapshot/src/runs/node_copy.py" "$snapshot" "$SLURM_JOB_ID.${SLURM_RESTART_COUNT:-0}"'


def job_name(jobs: Sequence[QueuedJob]) -> str:
    """The first run's, and how many more there are."""
    first, more = jobs[0].folder, f"+{len(jobs) - 1}" if len(jobs) > 1 else ""
    return (f"{first.parents[1].name}-" if first.parent.name == "groups" else "") + first.name + more


def job_folder(jobs: Sequence[QueuedJob]) -> Path:
    """Where SLURM's files go: a run's own folder, or one beside the runs for an array."""
    first = jobs[0].folder
    if len(jobs) == 1:
        return first / "logs" / "slurm"
    return first.parent / "slurm" / f"{first.name}+{len(jobs) - 1}-{time.strftime('%Y%m%d-%H%M%S')}-{os.getpid()}"


def setup(jobs: Sequence[QueuedJob]) -> list[str]:
    """Ranks import the frozen code of their own point, wherever they start."""
    folders = " ".join(shlex.quote(str(job.folder)) for job in jobs)
    codes = " ".join(job.code for job in jobs)
    return [
        f"folders=({folders})",
        f"codes=({codes})",
        "point=${SLURM_ARRAY_TASK_ID:-0}",
        'snapshot="${folders[$point]}/code/${codes[$point]}"',
        'export PYTHONPATH="$snapshot${PYTHONPATH:+:$PYTHONPATH}"',
        "export PYTHONSAFEPATH=1",  # or `python -m` would find the work tree first
        *(f"export {key}={value}" for key, value in NO_BYTECODE.items()),
    ]


def kept(given: Mapping[str, Flag]) -> dict[str, Flag]:
    """Without those that null or false drop; 0 is a value."""
    return {key: value for key, value in given.items() if value is not None and value is not False}


def flags(given: Mapping[str, Flag]) -> list[str]:
    """As arguments."""
    return [f"--{key}" if value is True else f"--{key}={value}" for key, value in kept(given).items()]


def left_out(excluded: str | None, partition: str | None, slow: Sequence[str], wanted: int) -> str | None:
    """The site's excluded nodes, and those that a start of the run found slow, if enough others are there for it."""
    if not slow:
        return excluded
    if client.enough_without(partition, excluded, slow, wanted):
        return ",".join([*([excluded] if excluded else []), *slow])
    print(f"warning: {', '.join(slow)} found slow and not left out: too few other nodes for the run", file=sys.stderr)
    return excluded


def teardown(python: str, requeues: int, srun: Mapping[str, Flag], excluded: str | None = None) -> list[str]:
    """After the ranks: why they failed, and whether another start may help. The node's own scontrol acts on it.

    A bad node is left out only if sbatch would take this very script without it and without those that the site's
    facts (`excluded`) or an earlier failure left out: an update replaces their list, and a job that cannot start waits
    for ever. Where too few nodes would be left, those of earlier failures may come again: they were mended since, or
    fail at once and are named in their turn.
    """
    step = shlex.join(["srun", "--overlap", "--nodes=1", "--ntasks=1", *flags(srun)])
    judge = [f"{step} {python}" if srun else python, "-m", "src.cluster.diagnosis.verdict"]
    return [
        "# Did the ranks fail, then why? What another start may mend is requeued, without the node at fault.",
        "code=$?",
        # Of an array's last element SLURM_JOB_ID is the array's: all elements would be requeued.
        'job="${SLURM_ARRAY_JOB_ID:+${SLURM_ARRAY_JOB_ID}_$SLURM_ARRAY_TASK_ID}"',
        'job="${job:-$SLURM_JOB_ID}"',
        'if [ "$code" -ne 0 ]; then',
        "  trap '' TERM",
        f'  answer=$({" ".join(judge)} "${{folders[$point]}}" --requeues {requeues})',
        '  case "$answer" in',
        '    requeue*) bad="${answer#requeue}" && bad="${bad# }"',
        '      if [ -n "$bad" ]; then # only if enough nodes are left without it',
        '        out=$(scontrol show job "$job" | sed -En "s/.*ExcNodeList=([^ (]*).*/\\1/p" | head -n 1)',
        f'        every="${{out:+$out,}}$bad" own={shlex.quote(excluded or "")}',
        '        for out in "$every" "${own:+$own,}$bad"; do',
        '          sbatch --test-only --exclude="$out" "$0" > /dev/null 2>&1 && break',
        "          out=",
        "        done",
        '        if [ -z "$out" ]; then',
        '          echo "node $bad is not left out: without $every too few nodes are left for this job" >&2',
        "          bad=",
        "        fi",
        "      fi",
        '      scontrol requeue "$job"',
        '      [ -z "$bad" ] || scontrol update JobId="$job" ExcNodeList="$out" ;;',
        "  esac",
        "fi",
        'exit "$code"',
    ]
