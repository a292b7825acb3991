"""Grid sweeps: records the points in the ledger and submits those that are not done, here or to a scheduler."""

import hashlib
import re
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import takewhile
from pathlib import Path
from typing import TYPE_CHECKING, Any

from src.cluster.backend import JobScheduler, QueueBackend, SharedBackend
from src.cluster.submission import Prepared, Submitted
from src.config.base import Config
from src.config.tree import SITE, Tree, difference, identity, swept
from src.distributed.process.rank_context import joined
from src.errors import PlanError, UserError
from src.launch.start import Shared, ask_schedulers, by_cluster, checked, prepare, start
from src.runs.folder import attempts
from src.storage.streams import to_stderr
from src.sweeps.ledger import Ledger, SweepPoint
from src.sweeps.status import OPEN, State

if TYPE_CHECKING:
    from src.planning.plan import Plan
    from src.run import Run

SWEEPS = "sweeps"
ADVICE = "python -m src.sweeps status"
OTHERS = "or, in its place: table, report, fit, retry, cancel, extend"


class Grid(Config):
    """sweep=grid: the points are those that were asked for."""

    name: str | None
    """Name of the sweep's folder below <root>/sweeps and of its group; null: what the points' names share."""


@dataclass(frozen=True)
class SweepEntry:
    """A point, ready to be handed over."""

    point: SweepPoint
    tree: Tree
    run: "Run"
    plan: "Plan"


def title(trees: Sequence[Tree], salt: str = "") -> str:
    """sweep.name, else what the points' names have in common up to a separator, with a hash of what they are."""
    names = {str(tree["name"]) for tree in trees}
    words = zip(*(re.split("[_-]", name) for name in names), strict=False)
    shared = "_".join(first for first, *_ in takewhile(lambda each: len(set(each)) == 1, words))
    shared = names.pop() if len(names) == 1 else shared
    digest = hashlib.sha256(" ".join([*sorted(map(identity, trees)), salt]).encode()).hexdigest()[:8]
    return f"{trees[0]['sweep']['name'] or shared or 'sweep'}-{digest}"


def in_group(trees: Sequence[Tree], name: str) -> list[Tree]:
    """With the sweep's name as their group in every tracker that has groups, unless they have their own."""
    return [tree | {"tracker": _grouped(tree["tracker"], name)} for tree in trees]


def _grouped(tracker: Mapping[str, Any], name: str) -> Tree:
    return {
        key: section | {"group": section["group"] or name}
        if isinstance(section, dict) and "group" in section
        else section
        for key, section in tracker.items()
    }


def names(overrides: Sequence[Mapping[str, str]]) -> list[str]:
    """Of points that have no number yet: what each has of its own, such as "point 2 of 3 (optim.lr=3e-4)"."""
    keys = swept(overrides)
    own = [" ".join(f"{key}={each[key]}" for key in keys if key in each) for each in overrides]
    return [f"point {number} of {len(own)}{f' ({text})' * bool(text)}" for number, text in enumerate(own, start=1)]


def sweep(given: "Sequence[tuple[Tree, Run, Plan, dict[str, str]]]", argv: Sequence[str]) -> int:
    """Hand over what is missing of the points that were asked for; the first code of a local point that is not 0.

    The same command again finds the same ledger, and starts nothing that lives, is done or has failed.
    """
    if joined():
        raise PlanError("a sweep starts its own ranks, one point after the other; leave the outer launcher out")
    if same := one_run([tree for tree, *_ in given], [overrides for *_, overrides in given]):
        print(f"note: {same}", file=sys.stderr)
    run = given[0][1]
    ledger = Ledger.make(run.root / SWEEPS / title([tree for tree, *_ in given]), argv, {})
    return enter(ledger, given)


def one_run(trees: Sequence[Tree], overrides: Sequence[Mapping[str, str]]) -> str | None:
    """A line where points differ in keys that decide no number, and so are one run."""
    first: dict[str, Tree] = {}
    lines = [line for tree in trees for line in difference(first.setdefault(identity(tree), tree), tree, steering=True)]
    if len(first) == len(trees):
        return None
    keys = list(dict.fromkeys(line.partition(":")[0] for line in lines))
    keys += [key for key in swept(overrides) if key.partition(".")[0] in SITE]  # which is no difference at all
    if not keys:  # the same values twice
        return None
    several = """; for one run in any of several pass cluster.partition='"a,b"'"""
    several = several if "cluster.partition" in keys else ""
    return (
        f"{len(trees)} points are {len(first)} run{'s' * (len(first) > 1)}, each with the last value of "
        f"{', '.join(keys)}, which decides no number{several}; for runs of their own pass name=...-${{{keys[0]}}}"
    )


def enter(ledger: Ledger, given: "Sequence[tuple[Tree, Run, Plan, dict[str, str]]]") -> int:
    """Write points down, then hand over those that nobody works on."""
    entries = [SweepEntry(ledger.add(tree, overrides), tree, run, plan) for tree, run, plan, overrides in given]
    entries = list({entry.point.identity: entry for entry in entries}.values())
    states = {point.identity: standing.state for point, standing in ledger.standings()}
    chosen = [entry for entry in entries if states[entry.point.identity] in OPEN]
    for state in dict.fromkeys(states[entry.point.identity] for entry in entries if entry not in chosen):
        same = [entry for entry in entries if states[entry.point.identity] == state]
        print(f"{_counted(len(same))} {state}{_hint(state)}", file=sys.stderr)
    code = hand_over(ledger, chosen)
    print(f"ledger: {ledger.path}\n{ADVICE} {ledger.path}\n{OTHERS}", file=sys.stderr)
    return code


def ready(ledger: Ledger, points: Sequence[SweepPoint]) -> tuple[list[SweepEntry], int]:
    """Points of the ledger with the runs that their configs make, and the code of the first that makes none or that
    its scheduler would refuse: those are refused, one by one.
    """
    found, codes = list[SweepEntry](), list[int]()
    for point in points:
        try:
            ((tree, run, plan),) = checked([ledger.tree(point)])
        except UserError as error:
            codes.append(refused(ledger, point, error))
        else:
            found.append(SweepEntry(point, tree, run, plan))
    kept = list[SweepEntry]()
    for same in by_cluster(found, lambda entry: entry.run.cluster):
        try:
            ask_schedulers([(entry.tree, entry.run, entry.plan) for entry in same])
        except UserError as error:
            codes += [refused(ledger, entry.point, error) for entry in same]
        else:
            kept += same
    return sorted(kept, key=lambda entry: entry.point.number), next(iter(codes), 0)


def hand_over(ledger: Ledger, entries: Sequence[SweepEntry], *, wait: bool = False) -> int:
    """A scheduler takes all at once; this machine one after the other, or side by side where cluster.at_once says so.
    `wait`: until queued ones have ended, too.

    The first code that is not 0; nothing that is refused keeps others from being handed over.
    """
    for entry in entries:
        ledger.resumed(entry.point)
    shared, codes = Shared(), list[int]()
    here = [entry for entry in entries if not isinstance(entry.run.cluster, QueueBackend)]
    waits = list[Callable[[], int]]()
    # One submission per cluster: points may ask for several partitions.
    for same in by_cluster([entry for entry in entries if entry not in here], lambda entry: entry.run.cluster):
        cluster = same[0].run.cluster
        assert isinstance(cluster, QueueBackend), "chosen above"
        submitted, code = _submit(ledger, cluster, same, shared)
        codes.append(code)
        if submitted and (wait or cluster.wait):
            waits.append(partial(_until_ended, submitted, cluster.scheduler))
    together, alone = _by_sharing(here)
    codes += [_side_by_side(ledger, same, shared) for same in together]
    codes.append(_one_by_one(ledger, alone, shared))
    codes += [each() for each in waits]
    return next(filter(None, codes), 0)


def _until_ended(submitted: Sequence[Submitted], scheduler: JobScheduler) -> int:
    from src.cluster.wait import wait

    return wait(submitted, scheduler).exit_code


def _submit(
    ledger: Ledger, cluster: QueueBackend, entries: Sequence[SweepEntry], shared: Shared
) -> tuple[list[Submitted], int]:
    """What is in the scheduler's hands, and the code of the first point that is not."""
    opened, codes = list[tuple[SweepEntry, Prepared]](), list[int]()
    try:
        for entry in entries:
            try:
                if entry.run.fault_tolerance.on:
                    raise PlanError("fault_tolerance: a sweep queues runs of one group; pass none")
                folder, answers = prepare(entry.tree, entry.run, entry.plan, shared)
                opened.append((entry, Prepared(folder, answers.to_dict())))
            except UserError as error:
                codes.append(refused(ledger, entry.point, error))
        try:
            found = cluster.submit_many([prepared for _, prepared in opened]) if opened else []
        except UserError as error:
            found = [error] * len(opened)
    finally:
        for _, prepared in opened:
            prepared.folder.close()
    handed, keys = [], ledger.swept()
    for (entry, _), each in zip(opened, found, strict=True):
        if isinstance(each, UserError):
            codes.append(refused(ledger, entry.point, each))
            continue
        ledger.submitted(entry.point)
        print(f"{_named(entry.point, keys)}\n{each.text()}", file=sys.stderr)
        handed.append(each)
    return handed, next(iter(codes), 0)


def _by_sharing(entries: Sequence[SweepEntry]) -> tuple[list[list[SweepEntry]], list[SweepEntry]]:
    """Those of each cluster that share this machine, and those that have it for themselves."""
    together = [
        same
        for same in by_cluster(entries, lambda entry: entry.run.cluster)
        if isinstance(same[0].run.cluster, SharedBackend) and same[0].run.cluster.shared
    ]
    groups = [[entry for entry in same if not entry.run.fault_tolerance.on] for same in together]
    sharing = {entry.point.identity for same in groups for entry in same}
    return [same for same in groups if same], [entry for entry in entries if entry.point.identity not in sharing]


def _side_by_side(ledger: Ledger, entries: Sequence[SweepEntry], shared: Shared) -> int:
    """The first code that is not 0; a point that fails stops no other, and a stop ends all."""
    cluster = entries[0].run.cluster
    assert isinstance(cluster, SharedBackend), "chosen above"
    opened, codes = list[tuple[SweepEntry, Prepared]](), list[int]()
    try:
        for entry in entries:
            try:
                folder, answers = prepare(entry.tree, entry.run, entry.plan, shared)
                opened.append((entry, Prepared(folder, answers.to_dict())))
            except UserError as error:
                codes.append(refused(ledger, entry.point, error))
        points = {prepared.folder.path: entry.point for entry, prepared in opened}

        def begin(folder: Path) -> bool:
            if _cancelled(ledger, points[folder]):  # meanwhile, from another terminal
                return False
            ledger.submitted(points[folder])
            return True

        found = cluster.submit_side_by_side([prepared for _, prepared in opened], begin) if opened else {}
    finally:
        for _, prepared in opened:
            prepared.folder.close()
    failed = [(points[folder], code) for folder, code in found.items() if code]
    for point, code in failed:
        why = attempts(point.folder)[-1].detail.partition(" ")[2] if attempts(point.folder) else ""
        print(f"{_label(point)} ended with code {code}: {why}", file=sys.stderr)
    return next(iter([*codes, *(code for _, code in failed)]), 0)


def _one_by_one(ledger: Ledger, entries: Sequence[SweepEntry], shared: Shared) -> int:
    """A point that fails does not stop the later ones; a stop ends all."""
    failed: dict[str, int] = {}
    keys = ledger.swept()
    for count, entry in enumerate(entries, start=1):
        if _cancelled(ledger, entry.point):  # meanwhile, from another terminal
            continue
        print(f"[{count}/{len(entries)}] {_named(entry.point, keys)}", file=sys.stderr)
        ledger.submitted(entry.point)
        try:
            status, code = start(entry.tree, entry.run, entry.plan, shared)
        except UserError as error:
            status, code = "refused", refused(ledger, entry.point, error)
        if code:
            failed[_label(entry.point)] = code
        if status in ("stopped", "killed") and not _cancelled(ledger, entry.point):
            break
    print(*(f"{label} ended with code {code}\n" for label, code in failed.items()), sep="", end="", file=sys.stderr)
    return next(iter(failed.values()), 0)


def refused(ledger: Ledger, point: SweepPoint, error: UserError) -> int:
    """Note it, tell it with its point, and return its code."""
    ledger.refused(point, "; ".join(error.problems))
    to_stderr([f"{_label(point)} refused", *error.problems])
    return error.exit_code


def _cancelled(ledger: Ledger, point: SweepPoint) -> bool:
    return any(each.cancelled for each in ledger.points() if each.identity == point.identity)


def _label(point: SweepPoint) -> str:
    return f"{point.number}: {point.folder.name}"


def _named(point: SweepPoint, keys: Sequence[str]) -> str:
    """With the values by which it differs from the others."""
    values = " ".join(f"{key}={point.overrides[key]}" for key in keys if key in point.overrides)
    return f"{_label(point)}{f' ({values})' * bool(values)}"


def _counted(count: int) -> str:
    return f"{count} point{'s' if count > 1 else ''}"


def _hint(state: State) -> str:
    return {
        "failed": ": not started again; see status, then retry",
        "diverged": ": not started again; see status, then retry",
        "cancelled": ": not started again; name its number to retry",
    }.get(state, "")
