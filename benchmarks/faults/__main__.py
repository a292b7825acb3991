"""A fault drill: tiny runs on CPU ranks are killed, stopped, torn and crowded, go on, and must end as if nothing had
happened.

python -m benchmarks.faults                          16 rounds, one of each fault
python -m benchmarks.faults --rounds 40 --seed 1     more of them, at other moments
python -m benchmarks.faults --only SIGINT --rounds 5 of the faults whose name contains this
python -m benchmarks.faults --rounds 40 --record     and keep the table in benchmarks/records/faults.json

A round starts a command line, strikes it at a random moment, and gives the same command again until the run is done.
Then every loss and validation loss, and the bytes of the last checkpoint, are compared with those of an undisturbed run
of the same layout. The seed decides which layout, fault and moment a round has; the machine's speed decides what the
run does at that moment. Linux only: processes are found in /proc. As root one fault more is there, a full disk. Exit
code 1 if anything was lost, a process was left, or the command did not go on; then logs and run folders are kept.
Ctrl-C and SIGTERM end it with the table so far.
"""

import argparse
import json
import os
import platform
import shutil
import signal
import sys
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext, suppress
from datetime import date
from pathlib import Path
from random import Random
from typing import Any

from benchmarks.faults.faults import FAULTS, Fault
from benchmarks.faults.lives import LAYOUTS, Record, Result, Round, Starter, popen

RECORD = Path(__file__).resolve().parents[1] / "records" / "faults.json"
HEADINGS = ("fault", "rounds", "losses equal", "bytes equal", "orphans", "seconds until the launcher ends")


def main(arguments: Sequence[str] | None = None, start: Starter = popen) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.faults", description="Strike runs; see the module.")
    parser.add_argument("--rounds", type=int, default=len(FAULTS))
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--layout", choices=LAYOUTS, help="of every round; default: a random one for each")
    parser.add_argument("--only", default="", help="faults whose name contains this, or one of several (a;b)")
    parser.add_argument("--json", type=Path, help="write the results to this file")
    parser.add_argument("--record", action="store_true", help=f"write them to {RECORD.name} in benchmarks/records")
    given = parser.parse_args(arguments)
    chosen = [each for each in FAULTS if any(part in each.name for part in given.only.split(";"))]
    if not Path("/proc/self/environ").exists() or given.rounds < 1 or not chosen:
        parser.error("needs Linux, a round at least, and a fault of these: " + ", ".join(each.name for each in FAULTS))
    missing = {each.name: why for each in chosen if (why := each.cannot())}
    root = Path(tempfile.mkdtemp(prefix="faults-"))
    faults = [each for each in chosen if each.name not in missing]
    results: list[Result] = []
    with suppress(KeyboardInterrupt), interrupted_by(signal.SIGTERM, signal.SIGHUP):
        for result in rounds(faults, given.rounds, given.seed, given.layout, root, start):
            results.append(result)
            print(line(len(results), given.rounds, result), flush=True)
    print(table(results, missing))
    for file in filter(None, (given.json, RECORD if given.record else None)):
        facts = {"command": f"python -m benchmarks.faults --rounds {given.rounds} --seed {given.seed}", **machine()}
        file.write_text(json.dumps(facts | {"missing": missing, "faults": summary(results)}, indent=1) + "\n")
    if any(each.lost for each in results):
        print(f"logs and run folders: {root}")
        return 1
    shutil.rmtree(root)
    return 0 if len(results) == given.rounds or not faults else 130


@contextmanager
def interrupted_by(*numbers: signal.Signals) -> Iterator[None]:
    """Inside of the block the first of these signals is a Ctrl-C, so that what was begun is ended and no disk stays
    mounted; those that follow are not heard.
    """

    def interrupt(*_: object) -> None:
        for each in numbers:
            signal.signal(each, signal.SIG_IGN)
        raise KeyboardInterrupt

    before = {each: signal.signal(each, interrupt) for each in numbers}
    try:
        yield
    finally:
        for each, handler in before.items():
            signal.signal(each, handler)


def rounds(
    faults: list[Fault], count: int, seed: int, layout: str | None, root: Path, start: Starter
) -> Iterator[Result]:
    """`count` of them, spread over the faults; the result of each as it is done."""
    undisturbed: dict[str, Record] = {}
    for number in range(count if faults else 0):
        fault, chance = faults[number % len(faults)], Random(f"{seed}/{number}")
        where = layout or chance.choice(list(LAYOUTS))
        if where not in undisturbed:
            calm = Round("none", where, root / f"undisturbed-{where}", root, "", start)
            with calm.ended_with_us():
                calm.go_on()
            undisturbed[where] = Record.read(calm.folder)
            if calm.result.faults_found or not undisturbed[where].files:
                raise SystemExit(f"the undisturbed run failed: {calm.result.faults_found}, see {calm.log}")
        with nullcontext(root) if fault.place is None else fault.place() as place:
            one = Round(fault.name, where, place / f"round-{number}", root, f"{seed}/{number}/moment", start)
            one.log = root / f"round-{number}.log"
            with one.ended_with_us():
                fault.strike(one)
                one.go_on()
            result = judged(one, undisturbed[where])
        if not result.lost:
            shutil.rmtree(one.folder, ignore_errors=True)
        yield result


def judged(one: Round, undisturbed: Record) -> Result:
    """What this round has computed, beside the undisturbed run."""
    found = Record.read(one.folder)
    one.result.losses_equal, one.result.bytes_equal = (
        found.losses == undisturbed.losses,
        found.files == undisturbed.files,
    )
    return one.result


def line(number: int, count: int, result: Result) -> str:
    """One round, as it is done."""
    equal = (
        f"losses {'equal' if result.losses_equal else 'DIFFER'}, bytes {'equal' if result.bytes_equal else 'DIFFER'}"
    )
    found = "".join(f"; {each}" for each in result.faults_found)
    told = f"[{number}/{count}] {result.fault}, {result.layout}: {equal}, {result.orphans} orphans"
    return f"{told}, the launcher ended after {result.seconds:.1f} s{found}"


def summary(results: Sequence[Result]) -> list[dict[str, Any]]:
    """A row for each fault that had a round, with the words of HEADINGS; and `found`, what else was wrong."""
    rows = []
    for name in dict.fromkeys(each.fault for each in results):
        those = [each for each in results if each.fault == name]
        counts = (len(those), sum(each.losses_equal for each in those), sum(each.bytes_equal for each in those))
        longest = max(each.seconds for each in those)
        values = (name, *counts, sum(each.orphans for each in those), round(longest, 1))
        rows.append(
            dict(zip(HEADINGS, values, strict=True)) | {"found": [one for each in those for one in each.faults_found]}
        )
    return rows


def table(results: Sequence[Result], missing: dict[str, str]) -> str:
    """In Markdown; the seconds are the longest of a fault's rounds."""
    lines = [f"| {' | '.join(HEADINGS)} |", "|---|" + "---:|" * (len(HEADINGS) - 1)]
    for row in summary(results):
        lines.append(f"| {' | '.join(str(row[each]) for each in HEADINGS)} |")
        lines += [f"| (found: {each}) | | | | | |" for each in row["found"]]
    lines += [f"| {name} | skipped: {why} | | | | |" for name, why in missing.items()]
    lost = sum(each.lost for each in results)
    verdict = (
        f"something was lost in {lost} of {len(results)} rounds" if lost else f"{len(results)} rounds, nothing lost"
    )
    return "\n".join([*lines, "", verdict])


def machine() -> dict[str, str]:
    """When and where."""
    import torch

    cores = f"{os.cpu_count()} cores, {platform.machine()}, {platform.system()} {platform.release().partition('-')[0]}"
    versions = f"torch {torch.__version__}, Python {platform.python_version()}"
    return {"date": date.today().isoformat(), "machine": cores, "versions": versions}


if __name__ == "__main__":
    sys.exit(main())
