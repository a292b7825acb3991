"""What a week of interruptions costs a run: simulated in one process, with this project's own decisions.

python -m benchmarks.scale --nodes 512                     the default settings, and checkpoint.every=auto
python -m benchmarks.scale --nodes 512 2048 --weeks 50     more of them, averaged
python -m benchmarks.scale --nodes 2048 --site step_seconds=8 outage_hours=12
python -m benchmarks.scale --nodes 512 --operations        what the week asks of the store and the shared disk, counted
python -m benchmarks.scale --nodes 512 2048 --record       and keep the table in benchmarks/records/scale.json

Machines, scheduler and shared disk are played (benchmarks/scale/site.py: nodes die by an MTBF, hang, break and grow
slow, the disk fails for minutes and is full for hours, a requeued job is held back). What a failure was, whether the
run is started again, on which nodes, what is waited out and how often is saved is decided by the code that decides it
in a run. Settings are those of conf/.
"""

import argparse
import json
import sys
from collections.abc import Sequence
from dataclasses import fields, replace
from pathlib import Path
from statistics import mean, stdev
from typing import Any

import yaml

from benchmarks.scale.site import HOUR, Site
from benchmarks.scale.week import Rules, Spent, Story, Week, shares
from src.planning.time.failures import best_interval

CONF = Path(__file__).resolve().parents[2] / "conf"
RECORD = Path(__file__).resolve().parents[1] / "records" / "scale.json"
LOG_EVERY = 10  # task.log_every
ONCE = 20  # requeues in all, however far the run had come, as version 0.2.0 counted its default
PARTS = {
    "useful": "steps that were kept",
    "again": "steps done again",
    "slow": "steps longer for a slow node",
    "start": "starts",
    "save": "standing still for saves",
    "disk": "waiting for the disk",
    "hang": "collectives until they were given up",
    "queue": "queue",
    "idle": "stopped, until a person came",
}


def defaults() -> Rules:
    """Of conf/."""
    cluster, every = _section("cluster/slurm.yaml"), _section("checkpoint/every_500.yaml")["every"]
    names = ("requeues", "minutes", "grace_seconds", "preflight_seconds", "preflight_gpus")
    return Rules(every=every, **{name: cluster[name] for name in names})


def _section(name: str) -> dict[str, Any]:
    found: dict[str, Any] = yaml.safe_load((CONF / name).read_text())
    return found


def auto(rules: Rules, site: Site) -> Rules:
    """With checkpoint.every=auto: a save must also be on the disk before the next one is due."""
    seconds = best_interval(site.stall_seconds, site.interruption_seconds)
    return replace(rules, every=max(1, round(seconds / site.step_seconds)))


def told(site: Site, weeks: int, seed: int) -> dict[str, Any]:
    """The rows of one size of a run: each setting's weeks, averaged."""
    plain = defaults()
    often = auto(plain, site)
    settings = {
        f"default: checkpoint.every={plain.every}": plain,
        f"checkpoint.every=auto: {often.every}": often,
        f"the same, cluster.preflight_gpus=true: {often.every}": replace(often, preflight_gpus=True),
    }
    rows = {}
    for name, rules in settings.items():
        stories = [Week(site, rules, seed + number).play() for number in range(weeks)]
        rows[name] = _row(stories)
    return {"nodes": site.nodes, "hours_between_interruptions": site.interruption_seconds / HOUR, "settings": rows}


def _row(stories: Sequence[Story]) -> dict[str, Any]:
    goodputs = [story.spent.goodput for story in stories]
    twenty = [story.requeued[ONCE] / 24 / HOUR for story in stories if len(story.requeued) > ONCE]
    counts = {
        "starts": mean(story.starts for story in stories),
        "stops that needed a person": mean(len(story.stops) for story in stories),
        "saves": mean(story.saves for story in stories),
        "saves passed over": mean(story.passed_over for story in stories),
        "saves lost": mean(story.lost_saves for story in stories),
        "faults of the disk waited out": mean(story.faults for story in stories),
        "nodes left out": mean(story.left_out for story in stories),
    }
    return {
        "goodput": mean(goodputs),
        "deviation": stdev(goodputs) if len(goodputs) > 1 else 0.0,
        "shares": shares(list(stories)),
        "counts": counts,
        "day_of_requeue_21": mean(twenty) if twenty else None,
        "events": {
            "starts": counts["starts"],
            "saves": counts["saves"],
            "failures": mean(sum(story.verdicts.values()) for story in stories),
            "logged": mean(story.steps for story in stories) / LOG_EVERY,
        },
    }


def operations(site: Site, found: dict[str, Any]) -> None:
    """Count what the weeks of each setting ask of the store and the shared disk."""
    from benchmarks.scale.operations import week_of  # which brings torch along

    for row in found["settings"].values():
        row["operations"] = week_of(site, row["events"])


def text(found: dict[str, Any]) -> str:
    """For a person."""
    lines = [f"{found['nodes']:,} nodes: an interruption every {found['hours_between_interruptions']:.1f} h"]
    for name, row in found["settings"].items():
        lines.append(f"\n  {name}\n    goodput {row['goodput']:.1%} (one week's deviation {row['deviation']:.1%})")
        parts = sorted(row["shares"].items(), key=lambda pair: -pair[1])
        lines += [f"    {share:6.1%}  {PARTS[part]}" for part, share in parts if share >= 0.0005]
        lines.append(
            "    a week: " + ", ".join(f"{count:.1f} {what}" for what, count in row["counts"].items() if count)
        )
        lines += [f"    {count:14,.0f} {what}" for what, count in row.get("operations", {}).items()]
        if (day := row["day_of_requeue_21"]) is not None:
            lines.append(f"    the {ONCE + 1}st requeue is on day {day:.1f}")
    return "\n".join(lines)


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.scale", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--nodes", type=int, nargs="+", required=True, help="of the run; several are several tables")
    parser.add_argument("--weeks", type=int, default=20, help="to be played and averaged (default %(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="of the first week (default %(default)s)")
    known = {each.name: each for each in fields(Site) if each.name != "nodes"}
    facts = ", ".join(f"{name}={each.default:g}" for name, each in known.items())
    parser.add_argument("--site", nargs="*", default=[], metavar="KEY=VALUE", help=f"other facts: {facts}")
    parser.add_argument(
        "--operations", action="store_true", help="count what the week asks of store and disk (tests/scale; seconds)"
    )
    parser.add_argument(
        "--record", action="store_true", help=f"write the numbers to {RECORD.name} in benchmarks/records"
    )
    given = parser.parse_args(arguments)
    pairs = [each.partition("=") for each in given.site]
    try:
        facts_given = {name: type(known[name].default)(float(value)) for name, _, value in pairs}
    except (KeyError, ValueError):
        parser.error(f"--site {' '.join(given.site)}: numbers for {', '.join(known)}")
    if min([*given.nodes, given.weeks]) < 1 or any(value < 0 for value in facts_given.values()):
        parser.error("nodes and weeks are at least 1, facts of the site at least 0")
    sites = [Site(nodes, **facts_given) for nodes in given.nodes]
    rows = [told(site, given.weeks, given.seed) for site in sites]
    if given.operations:
        for site, row in zip(sites, rows, strict=True):
            operations(site, row)
    print("\n\n".join(map(text, rows)))
    if given.record:
        RECORD.write_text(json.dumps({"weeks": given.weeks, "seed": given.seed, "site": facts_given, "rows": rows},
                                     indent=1) + "\n")  # fmt: skip
    return 0


if __name__ == "__main__":
    assert set(PARTS) == {each.name for each in fields(Spent)}, "every part has words"
    sys.exit(main())
