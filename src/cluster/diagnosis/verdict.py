"""Why an attempt in a scheduler's job failed, and whether starting again can help.

The job's script runs `python -m src.cluster.diagnosis.verdict <folder> --requeues n` when its ranks ended badly. Words
for people go to stderr, which is the job's log; stdout says `requeue`, `requeue <bad node>` or `stop`, and the script
does it.
"""

import argparse
import json
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from datetime import datetime
from pathlib import Path
from typing import Literal

from src.checkpoint.folder import complete
from src.cluster.backend import JobScheduler, JobStart, LogFindings
from src.cluster.batch_system import scheduler_of
from src.cluster.diagnosis import hang, rank_failure
from src.config import tree as trees
from src.distributed.process.flight_recorder import TRACES
from src.metrics.alerts.send import options_of, tell_end
from src.runs.folder import attempts, end
from src.runs.records import PLAN_FILE
from src.runs.submissions import submissions
from src.storage.json_lines import METRICS_FILE, Lines

FILE = "verdicts.jsonl"
# A failure that comes back at the same step is no accident, whatever it looks like. Of the same checkpoint it may be:
# with a failure each 3 hours and 30 minutes to the next checkpoint, three in a row happen once a week.
FAILURES_AT_ONE_STEP = 3

Kind = Literal["memory", "user", "code", "node", "peer", "disk", "died", "hang", "saved", "late"]

ADVICE: dict[Kind, str] = {
    "memory": "a smaller task.micro_batch, recompute=full or more parallel.shard takes less memory; not started again",
    "user": "starting again would end the same way; change what it says, and submit again to go on",
    "code": "an error of the code: starting again would end the same way; submit again once it is mended, to go on",
    "node": "a broken machine",
    "peer": "ranks lost each other",
    "disk": "a file system kept failing",
    "died": "a process died without a word",
    "hang": "a collective never came to its end",
    "saved": "saved, and only the requeue failed",
    "late": "the save did not end before the time limit; pass a larger cluster.grace_seconds",
}


@dataclass(frozen=True)
class Verdict:
    kind: Kind
    action: Literal["requeue", "stop"]
    node: str | None  # to be left out by the next start
    words: str


@dataclass(frozen=True)
class Evidence:
    """What an attempt left behind."""

    failures: Sequence[rank_failure.RankFailure]  # the earliest first
    log: LogFindings  # the scheduler's own words in the job's log, from the start of this attempt
    hang: hang.Hang | None
    nodes: Sequence[str]  # by rank
    saved: bool  # all ranks had saved and stopped


def judge(evidence: Evidence) -> Verdict:
    """What failed first decides: a rank that lost a peer only says that another one was in trouble."""
    for failure in evidence.failures:
        if failure.kind in ("memory", "user", "code"):
            words = f"rank {failure.rank} (node {failure.node}): {failure.error}\n{ADVICE[failure.kind]}"
            return Verdict(failure.kind, "stop", None, words)
    if evidence.log.out_of_memory:
        return Verdict(
            "memory", "stop", None, "the node ran out of host memory; pass a larger cluster.memory_gib_per_gpu"
        )
    if evidence.saved and not evidence.failures:
        return Verdict("saved", "requeue", None, ADVICE["saved"])
    for failure in evidence.failures:
        if failure.kind == "node":
            return Verdict("node", "requeue", failure.bad_node, f"{ADVICE['node']}: {failure.error}")
    for failure in evidence.failures:
        if failure.kind == "disk":
            return Verdict("disk", "requeue", None, f"{ADVICE['disk']}: {failure.error}")
    if evidence.hang is not None and not evidence.hang.silent:
        return _hung(evidence.hang, evidence.nodes)
    if (down := evidence.log.node_down) is not None:
        return Verdict("node", "requeue", down.node, f"{ADVICE['node']}, {down.node}: {down.words}")
    if (died := evidence.log.died) is not None:
        return Verdict("died", "requeue", died.node, f"{ADVICE['died']}: {died.words}")
    if evidence.hang is not None:
        return _hung(evidence.hang, evidence.nodes)
    quiet = _silent_node(evidence)
    first = evidence.failures[0].error if evidence.failures else "no rank left a word"
    silent = "" if quiet is None else f"; nothing was heard of node {quiet}"
    return Verdict("peer", "requeue", quiet, f"{ADVICE['peer']}: {first}{silent}")


def _hung(found: hang.Hang, nodes: Sequence[str]) -> Verdict:
    return Verdict("hang", "requeue", nodes[found.rank], f"{ADVICE['hang']}: {found.words}")


def _silent_node(evidence: Evidence) -> str | None:
    """The one node none of whose ranks could write down an error, if the others did."""
    heard = {failure.node for failure in evidence.failures}
    silent = [node for node in dict.fromkeys(evidence.nodes) if node not in heard]
    return silent[0] if heard and len(silent) == 1 else None


@dataclass(frozen=True)
class Headway:
    """How far a run has come: what is kept, and how far the newest attempt was beyond it."""

    checkpoint: str | None  # name of the newest complete one
    step: int | None = None  # the last that the newest attempt logged; None: it logged none

    @classmethod
    def of(cls, folder: Path) -> "Headway":
        """As its own records have it."""
        tried = attempts(folder)
        begun = datetime.fromisoformat(tried[-1].started).timestamp() if tried else 0.0
        lines = (line for line in Lines(folder / METRICS_FILE).recent() if line.get("time", 0.0) >= begun)
        return cls(newest(folder), max((int(line["step"]) for line in lines if "step" in line), default=None))


def capped(verdict: Verdict, earlier: Sequence[dict[str, object]], now: Headway, requeues: int) -> Verdict:
    """No requeue for ever: not beyond `requeues` since the newest checkpoint was saved, nor for a failure that returns
    at the same step.
    """
    if verdict.action == "stop":
        return verdict
    here = [each for each in earlier if each["action"] == "requeue" and each["checkpoint"] == now.checkpoint]
    if len(here) >= requeues:
        why = f"cluster.requeues={requeues} are used up since {now.checkpoint or 'the first start'}"
    elif _returns(verdict.kind, here, now):
        where = "before its first step" if now.step is None else f"at step {now.step}"
        why = f"the {FAILURES_AT_ONE_STEP}rd failure in a row {where}, without a new checkpoint"
    else:
        return verdict
    return replace(verdict, action="stop", words=f"{verdict.words}\nnot started again: {why}")


def _returns(kind: Kind, here: Sequence[dict[str, object]], now: Headway) -> bool:
    """Whether the failures just before this one came at this very step. What a disk does, and a node before the first
    step, is no word about the run.
    """
    if kind == "disk" or (kind == "node" and now.step is None):
        return False
    before = [each.get("step") for each in here[1 - FAILURES_AT_ONE_STEP :] if each.get("kind") != "disk"]
    return before == [now.step] * (FAILURES_AT_ONE_STEP - 1)


def settle(folder: Path, job: str, verdict: Verdict, requeues: int) -> Verdict:
    """Capped, and kept in verdicts.jsonl."""
    now = Headway.of(folder)
    lines = Lines(folder / FILE)
    earlier = [each for each in lines.read() if each.get("job") == job]
    verdict = capped(verdict, earlier, now, requeues)
    record = {"job": job, "time": round(time.time(), 3)} | asdict(now) | asdict(verdict)
    lines.append(record)
    return verdict


def newest(folder: Path) -> str | None:
    """The name of the newest complete checkpoint."""
    found = complete(folder / "checkpoints")
    return found[-1].name if found else None


def gather(folder: Path, start: JobStart, scheduler: JobScheduler) -> Evidence:
    """Of the newest attempt of this job."""
    per_node = int(json.loads((folder / PLAN_FILE).read_text())["ranks_per_node"])
    nodes = [node for node in start.nodes for _ in range(per_node)]
    tried, handed = attempts(folder), submissions(folder)
    mine = bool(tried) and tried[-1].job == start.job
    since = datetime.fromisoformat(tried[-1].started).timestamp() if tried else 0.0
    left = rank_failure.place(folder, start)
    return Evidence(
        failures=rank_failure.read(left),
        log=scheduler.log_findings(Path(handed[-1]["log"]), nodes) if handed else LogFindings(),
        hang=hang.find(folder / TRACES, since, nodes, keep=left),
        nodes=nodes,
        saved=mine and tried[-1].ended == "stopped",
    )


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m src.cluster.diagnosis.verdict")
    parser.add_argument("folder", type=Path)
    parser.add_argument("--requeues", type=int, required=True)
    given = parser.parse_args(arguments)
    scheduler = scheduler_of(trees.read(given.folder / "config.yaml"))
    start = scheduler.current_start()
    if scheduler.is_ending(start.job):
        return 0  # cancelled, at its time limit, or requeued already: the scheduler's own affair
    verdict = settle(given.folder, start.job, judge(gather(given.folder, start, scheduler)), given.requeues)
    if verdict.kind != "saved" and attempts(given.folder):
        end(given.folder, "failed", verdict.words.partition("\n")[0], overrule=True)
    if verdict.action == "stop" and (options := options_of(given.folder)) is not None:
        tell_end(given.folder, options)
    leaving = f", without node {verdict.node} if enough others are there"
    leaving = leaving if verdict.node and verdict.action == "requeue" else ""
    print(f"verdict: {verdict.words}\n{verdict.action}{leaving}", file=sys.stderr, flush=True)
    print(f"{verdict.action} {verdict.node or ''}".strip())
    return 0


if __name__ == "__main__":
    sys.exit(main())
