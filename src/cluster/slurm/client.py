"""Client of SLURM's commands (squeue, sinfo, scontrol): job states, partitions, nodes."""

import re
import shutil
import subprocess
from collections.abc import Iterable
from dataclasses import dataclass

from src.cluster.backend import SilentError

_ANSWER_SECONDS = 60


@dataclass(frozen=True)
class NodeFacts:
    """One node of a partition."""

    name: str
    cpus: int
    memory_mib: int
    gpus: int
    limit_minutes: int | None  # of the partition; None: no limit


def available() -> bool:
    """Whether jobs can be submitted from this machine."""
    return shutil.which("sbatch") is not None and shutil.which("srun") is not None


def states(jobs: Iterable[str]) -> dict[str, str]:
    """Those of the jobs that SLURM still knows, with their state; an element of an array goes by either of its ids.

    SilentError when squeue does not answer: then nobody knows.
    """
    wanted = set(jobs)
    found: dict[str, str] = {}
    for line in _ask("squeue", "--me", "--noheader", "--array", "--states=all", "--format=%A|%i|%T").splitlines():
        raw, shown, state = line.strip().split("|")
        found |= {each: state for each in (raw, shown) if each in wanted}
    return found


def live(job: str) -> bool:
    """Whether the job is queued or running; also true when nobody can say."""
    try:
        state = states([job]).get(job)
    except SilentError:
        return True
    return state is not None and state not in ENDED


def seconds_left(job: str) -> float | None:
    """Until the job's time limit; None without one, or when nobody can say."""
    try:
        text = _ask("squeue", "--noheader", f"--jobs={job}", "--format=%L").strip()
    except SilentError:
        return None
    if not re.fullmatch(r"-?(\d+-)?(\d+:)?\d+:\d+", text):
        return None  # UNLIMITED, NOT_SET, INVALID
    days, _, clock = text.lstrip("-").rpartition("-")
    hours, minutes, seconds = [0, *map(int, clock.split(":"))][-3:]
    return float(int(days or 0) * 86400 + hours * 3600 + minutes * 60 + seconds) * (-1 if text[0] == "-" else 1)


# What squeue --states=all may still show of a job that will not run again.
ENDED = frozenset(
    (
        *("BOOT_FAIL", "CANCELLED", "COMPLETED", "DEADLINE", "FAILED", "NODE_FAIL", "OUT_OF_MEMORY", "REVOKED"),
        *("TIMEOUT", "PREEMPTED"),  # for good: a preempted job that is requeued is COMPLETING, then PENDING
    )
)


def partitions() -> list[str]:
    return sorted(set(_ask("sinfo", "--noheader", "--format=%R").split()))


def default_partition() -> str | None:
    """Where SLURM queues what names no partition."""
    marked = [each for each in _ask("sinfo", "--noheader", "--format=%P").split() if each.endswith("*")]
    return marked[0].removesuffix("*") if marked else None


def nodes(partition: str) -> list[NodeFacts]:
    """Every node of a partition, or of several as "a,b"; none when there is no such partition."""
    lines = _ask("sinfo", "--noheader", "--Node", f"--partition={partition}", "--format=%N|%c|%m|%G|%l").splitlines()
    return [_node(line) for line in lines]


def _node(line: str) -> NodeFacts:
    name, cpus, memory, gres, limit = line.strip().split("|")
    gpus = sum(int(count) for count in re.findall(r"gpu(?::[^:,()]+)?:(\d+)", gres))
    return NodeFacts(name, int(cpus.rstrip("+")), int(memory.rstrip("+")), gpus, minutes(limit))


def minutes(text: str) -> int | None:
    """SLURM's `[days-][hours:]minutes:seconds`; None for "infinite"."""
    if not re.fullmatch(r"(\d+-)?[\d:]+", text):
        return None
    days, _, clock = text.rpartition("-")
    parts = [int(part) for part in clock.split(":")]
    if days:
        hours, minute = [*parts, 0][:2]
    else:
        hours, minute = parts[-3] if len(parts) > 2 else 0, parts[-2] if len(parts) > 1 else parts[0]
    return int(days or 0) * 1440 + hours * 60 + minute


def enough_without(partition: str | None, excluded: str | None, slow: Iterable[str], wanted: int) -> bool:
    """Whether a partition (None: the default one) has so many nodes beside these; true where nobody answers."""
    try:
        name = partition or default_partition()
        there = {node.name for node in nodes(name)} if name else set[str]()
        out = set(_ask("scontrol", "show", "hostnames", excluded).split()) if excluded else set[str]()
    except SilentError:
        return True
    return len(there - out - set(slow)) >= wanted


# The first version with expedited requeue, which a site allows by a scheduler parameter.
EXPEDITES = (25, 11)
EXPEDITED = "enable_expedited_requeue"


def expedites() -> bool:
    """Whether a job that lost a node may come back at once, first in the queue; false where nobody answers."""
    try:
        version = re.search(r"(\d+)\.(\d+)", _ask("sbatch", "--version"))
        if version is None or (int(version[1]), int(version[2])) < EXPEDITES:
            return False
        allowed = re.search(rf"^SchedulerParameters\s*=.*\b{EXPEDITED}\b", _ask("scontrol", "show", "config"), re.M)
        return allowed is not None
    except SilentError:
        return False


def waits_for_children() -> bool:
    """Whether srun can hold a step until the processes that its tasks started have ended, too; false where it does not
    answer.
    """
    try:
        return "--wait-for-children" in _ask("srun", "--help")
    except SilentError:
        return False


# What stays as it is, however long the job waits. Of nodes that are busy or down now the queue is the answer.
_FOR_EVER = re.compile(r"[Ii]nvalid|not (?:permitted|allowed)|denied|exceeds|violates|configuration is not available")


def refusal(script: str) -> str | None:
    """sbatch's own words on why it would never take this script, which it only tests; None where it would.

    SilentError when it does not answer.
    """
    try:
        done = subprocess.run(
            ["sbatch", "--test-only"], input=script, capture_output=True, text=True, timeout=_ANSWER_SECONDS
        )
    except (OSError, subprocess.TimeoutExpired) as error:
        raise SilentError(str(error)) from error
    words = " ".join(line.strip() for line in done.stderr.splitlines() if line.strip())
    return words if done.returncode != 0 and _FOR_EVER.search(words) else None


def _ask(*command: str) -> str:
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=_ANSWER_SECONDS)
    except (OSError, subprocess.TimeoutExpired) as error:
        raise SilentError(str(error)) from error
    if done.returncode != 0:
        said = done.stderr.strip().splitlines() or [f"{command[0]} ended with code {done.returncode}"]
        raise SilentError(said[-1])  # the first lines are of what it tried
    return done.stdout
