"""A run's week: the decisions are the project's own, the machines are played.

Real code decides what a failure was (`classify`, `judge`), whether it is started again (`capped`), what is waited out
(`Patience`), when to save (`Checkpoint.due`'s interval) and, with checkpoint.every=auto, how often (`best_interval`).
"""

import errno
import os
from collections import Counter
from collections.abc import Callable
from dataclasses import asdict, dataclass, field, fields, replace
from math import floor
from random import Random

from benchmarks.scale.site import HOUR, WEEK, Moments, Scheduler, Site
from src.checkpoint.store import HANGS_SECONDS
from src.cluster.backend import LogFindings, NodeEvent
from src.cluster.diagnosis.hang import Hang
from src.cluster.diagnosis.rank_failure import RankFailure
from src.cluster.diagnosis.verdict import Evidence, Headway, Verdict, capped, judge
from src.distributed.process.preflight import PreflightError
from src.errors import DiskFaultError, DiskFullError
from src.storage.patience import Patience
from src.train.setup import STEP_TIMEOUT_SECONDS

LOST = RuntimeError("[gloo/transport/tcp/pair.cc:534] Connection closed by peer")
BROKEN = RuntimeError("CUDA error: uncorrectable ECC error encountered")
# Shares of unexpected interruptions by how they show: a GPU or its memory says so, a node or its cable is gone, a
# process dies, a collective hangs, ranks lose each other and nobody knows why. After table 5 of the same paper.
KINDS = {"gpu": 0.52, "node": 0.2, "died": 0.1, "hang": 0.1, "peer": 0.08}


@dataclass(frozen=True)
class Rules:
    """Settings of the run that decide what an interruption costs."""

    every: int  # checkpoint.every, steps
    requeues: int
    minutes: float  # cluster.minutes
    grace_seconds: float
    preflight_seconds: float
    preflight_gpus: bool = False


@dataclass
class Spent:
    """Seconds of a week by what they went to; their sum is the week."""

    useful: float = 0.0  # steps that were kept, at the speed of healthy nodes
    again: float = 0.0  # steps that were done again
    slow: float = 0.0  # longer steps because of a slow node
    start: float = 0.0
    save: float = 0.0  # training stood still for one
    disk: float = 0.0  # and for a disk that did not answer
    hang: float = 0.0  # until a collective was given up
    queue: float = 0.0
    idle: float = 0.0  # stopped, until a person came

    @property
    def total(self) -> float:
        return sum(asdict(self).values())

    @property
    def goodput(self) -> float:
        return self.useful / self.total


@dataclass
class Story:
    """What happened."""

    spent: Spent = field(default_factory=Spent)
    starts: int = 0
    steps: float = 0.0  # those that were done again, too
    verdicts: Counter[str] = field(default_factory=Counter)
    stops: list[str] = field(default_factory=list)  # in words, each of which needed a person
    requeued: list[float] = field(default_factory=list)  # when
    saves: int = 0
    passed_over: int = 0
    lost_saves: int = 0
    faults: int = 0  # that were waited out
    left_out: int = 0  # nodes


class _Clock:
    """Time for `Patience`, which sleeps in it."""

    def __init__(self, now: float) -> None:
        self.now = now

    def sleep(self, seconds: float) -> None:
        self.now += seconds

    def patience(self) -> Patience:
        return Patience(sleep=self.sleep, clock=lambda: self.now, tell=lambda _: None)


class Week:
    """One run on one site. `play` tells the whole story; the same for the same seed."""

    def __init__(self, site: Site, rules: Rules, seed: int, seconds: float = WEEK) -> None:
        self.site, self.rules, self.seconds = site, rules, seconds
        self.random = Random(seed)
        self.scheduler = Scheduler(site)
        draw = self.random
        self.outages = Moments(draw, site.outage_hours * HOUR, 60.0 * site.outage_minutes, seconds)
        self.full = Moments(draw, 24 * HOUR * site.full_days, site.full_hours * HOUR, seconds, fixed=True)
        self.slowdowns = Moments(draw, site.slow_node_hours * HOUR / site.nodes, 1.0, seconds)
        self.story = Story()
        self.now = 0.0
        self.step, self.saved = 0.0, 0  # where training is, and the newest complete checkpoint
        self.records: list[dict[str, object]] = []  # verdicts.jsonl

    def play(self) -> Story:
        asked = 0.0
        while self.now < self.seconds:
            began, nodes = self.scheduler.start(asked)
            self._spend("queue", began)
            if self.now >= self.seconds:
                break
            evidence, stepped = _Life(self, nodes).live()
            if self.now >= self.seconds:
                break
            lost = (self.step - self.saved) * self.site.step_seconds  # was counted as useful
            self.story.spent.useful -= lost
            self.story.spent.again += lost
            reached, self.step = self.step, float(self.saved)
            asked = self.now + self.site.requeue_seconds
            if evidence is not None and not self._starts_again(evidence, reached if stepped else None):
                asked = self.now + self.site.person_hours * HOUR
                self._spend("idle", asked)
                self.records.clear()  # a submission is a job of its own
                self.scheduler.excluded.clear()
        return self.story

    def _starts_again(self, evidence: Evidence, reached: float | None) -> bool:
        verdict: Verdict = judge(evidence)
        checkpoint = f"step_{self.saved:08d}" if self.saved else None
        now = Headway(checkpoint, None if reached is None else int(reached // 10 * 10))
        verdict = capped(verdict, self.records, now, self.rules.requeues)
        self.records.append(asdict(now) | {"action": verdict.action, "kind": verdict.kind})
        self.story.verdicts[verdict.kind] += 1
        if verdict.action == "stop":
            self.story.stops.append(f"{verdict.kind}: {verdict.words.rpartition(chr(10))[2]}")
            return False
        self.story.requeued.append(self.now)
        if verdict.node is not None:
            self.story.left_out += sum(self.scheduler.leave_out(name) for name in verdict.node.split(","))
        return True

    def _spend(self, part: str, until: float) -> None:
        """All the time up to `until` went to this, if the week is as long."""
        until = min(max(until, self.now), self.seconds)
        setattr(self.story.spent, part, getattr(self.story.spent, part) + until - self.now)
        self.now = until


class _Life:
    """One start of the job: until it is interrupted, at its time limit, or the week is over."""

    def __init__(self, week: Week, nodes: list[str]) -> None:
        self.week, self.site, self.rules, self.nodes = week, week.site, week.rules, nodes
        self.began = week.now
        self.limit = self.began + 60.0 * self.rules.minutes - self.rules.grace_seconds
        self.failure = self.began + week.random.expovariate(1.0 / self.site.interruption_seconds)
        self.flying: tuple[int, float] | None = None  # step of a save on its way, and when it is on the disk
        self.lost: DiskFaultError | None = None
        self.passed_over = False

    def live(self) -> tuple[Evidence | None, bool]:
        """What it left behind, None at its time limit; and whether it took a step."""
        week = self.week
        week.story.starts += 1
        if (evidence := self._start()) is not None or week.now >= week.seconds:
            return evidence, False
        while week.now < week.seconds:
            if (evidence := self._go_on()) is not None:
                return evidence, True
            if week.now >= self.limit:
                return self._save(wait=True), True
        self._land(week.now)
        return None, True

    def _start(self) -> Evidence | None:
        week = self.week
        bad = week.scheduler.first(week.scheduler.broken, self.nodes, week.now)
        if bad is not None:
            week._spend("start", week.now + 3.0 * self.rules.preflight_seconds)
            return self._evidence(PreflightError(f"no word of {bad}", bad), bad)
        slow = week.scheduler.first(week.scheduler.slow, self.nodes, week.now)
        if slow is not None and self.rules.preflight_gpus and slow not in week.scheduler.excluded:
            week._spend("start", week.now + self.rules.preflight_seconds)
            return self._evidence(PreflightError(f"{slow} is slow", slow), slow)
        if (evidence := self._wait_for_disk()) is not None:
            return evidence
        until = week.now + self.site.start_seconds
        if self.failure < until:
            week._spend("start", self.failure)
            return self._interrupted()
        week._spend("start", until)
        return None

    def _go_on(self) -> Evidence | None:
        """To the next save or event, whichever is first."""
        week, every = self.week, self.rules.every
        pace = self.site.step_seconds * (1.0 + self.site.slower * (self._slow() is not None))
        due = (floor(week.step / every) + 1) * every
        at_due = week.now + (due - week.step) * pace
        moments = (week.outages.next_begin(week.now), week.slowdowns.next_begin(week.now))
        at = max(week.now, min(at_due, self.failure, self.limit, week.seconds, *moments))
        spent = week.story.spent
        steps = (at - week.now) / pace
        week.story.steps += steps
        spent.useful += steps * self.site.step_seconds
        spent.slow += steps * (pace - self.site.step_seconds)
        week.step, week.now = (float(due) if at == at_due else week.step + steps), at
        if at >= self.failure:
            return self._interrupted()
        if at == moments[1]:
            week.scheduler.slow[week.random.choice(week.scheduler.names)] = at + 24 * HOUR
        if at == moments[0]:
            return self._wait_for_disk()
        return self._save() if at == at_due else None

    def _slow(self) -> str | None:
        return self.week.scheduler.first(self.week.scheduler.slow, self.nodes, self.week.now)

    def _wait_for_disk(self) -> Evidence | None:
        """A step, or a start, reads."""
        clock = _Clock(self.week.now)
        patience = clock.patience()
        try:
            patience(lambda: self._touch(clock.now))
        except DiskFaultError as error:
            self.week._spend("disk", clock.now)
            self._land(clock.now)
            return self._evidence(error, None)
        self.week._spend("disk", clock.now)
        self.week.story.faults += patience.faults
        return None

    def _touch(self, now: float, *, writes: bool = False) -> None:
        if self.week.outages.ends(now) is not None:
            raise OSError(errno.EIO, os.strerror(errno.EIO), "/shared")
        if writes and self.week.full.ends(now) is not None:
            raise DiskFullError("/shared: no space left on device")

    def _save(self, *, wait: bool = False) -> Evidence | None:
        """As the loop and the store do it: hold the last one back no more than a minute, copy, write meanwhile."""
        week = self.week
        if self.flying is not None and self.flying[1] > week.now:
            patient = wait or self.passed_over or self.flying[1] <= week.now + HANGS_SECONDS
            week._spend("save", self.flying[1] if patient else week.now + HANGS_SECONDS)
            self.passed_over = not patient
            if not patient:
                week.story.passed_over += 1
                return None
        self._land(week.now)
        week._spend("save", week.now + self.site.stall_seconds)
        clock = _Clock(week.now)
        patience = clock.patience()
        try:
            patience(lambda: self._touch(clock.now, writes=True))
        except DiskFullError as error:
            return self._evidence(error, None)
        except DiskFaultError as error:
            week.story.lost_saves += 1
            if self.lost is not None or wait:
                return self._evidence(error, None)
            self.lost = error
            return None
        week.story.faults += patience.faults
        week.story.saves += 1
        self.flying, self.lost = (int(week.step), clock.now + self.site.write_seconds), None
        if wait:
            week._spend("save", self.flying[1])
            self._land(week.now)
        return None

    def _land(self, now: float) -> None:
        """What is on the disk by now counts."""
        if self.flying is not None and self.flying[1] <= now:
            self.week.saved, self.flying = self.flying[0], None

    def _interrupted(self) -> Evidence:
        week, random = self.week, self.week.random
        kind = random.choices([*KINDS], [*KINDS.values()])[0]
        bad = random.choice(self.nodes)
        if kind == "hang":
            week._spend("hang", week.now + STEP_TIMEOUT_SECONDS)
        self._land(week.now)
        repaired = week.now + self.site.repair_hours * HOUR
        if kind in ("gpu", "hang"):
            week.scheduler.broken[bad] = repaired
        if kind == "node":
            week.scheduler.down[bad] = repaired
        if kind == "gpu":
            return self._evidence(BROKEN, bad)
        words = f"{kind} on {bad}"
        log, event = LogFindings(), NodeEvent(bad, words)
        log = replace(log, node_down=event) if kind == "node" else replace(log, died=event) if kind == "died" else log
        hang = Hang(self.nodes.index(bad) * self.site.gpus_per_node, words) if kind == "hang" else None
        return self._evidence(None, bad, log, hang)

    def _evidence(
        self, error: Exception | None, bad: str | None, log: LogFindings | None = None, hang: Hang | None = None
    ) -> Evidence:
        """With the last words of the rank that failed itself, and of one on another node that lost it."""
        other = next(name for name in reversed(self.nodes) if name != bad or len(self.nodes) == 1)
        told = [RankFailure.of(LOST, 1, other)]
        if error is not None:
            told = [RankFailure.of(error, 0, bad or self.nodes[0]), *told]
        return Evidence(told, log or LogFindings(), hang, _Ranks(self.nodes, self.site.gpus_per_node), saved=False)


class _Ranks(list[str]):
    """The node of each rank, without a list of 16,384 names for each failure."""

    def __init__(self, nodes: list[str], per_node: int) -> None:
        super().__init__(nodes)
        self._per_node = per_node

    def __getitem__(self, rank: int) -> str:  # type: ignore[override]
        return super().__getitem__(rank // self._per_node)


def mean(stories: list[Story], of: Callable[[Story], float]) -> float:
    return sum(map(of, stories)) / len(stories)


def shares(stories: list[Story]) -> dict[str, float]:
    """Of all seconds of these weeks, by what they went to."""
    whole = sum(story.spent.total for story in stories)
    return {each.name: sum(getattr(story.spent, each.name) for story in stories) / whole for each in fields(Spent)}
