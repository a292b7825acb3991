"""Compose -> check -> plan -> run folder -> submit.

Exit code 0: fine, also after a stop that saved; 2: the command or its config is wrong; any other comes from the run.
Every point of a sweep is checked before the first one starts. A point that fails does not stop the later ones, and the
sweep ends with the first code that is not 0; Ctrl-C ends all of it.
"""

from src.entry import begin, raise_again

if __name__ == "__main__":
    begin()

import os
import shlex
import signal
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING

from src.cluster.local.signals import keep_interrupts
from src.cluster.rank_log import open_closed_streams
from src.config.composition.requests import ConfigPoint, asked
from src.config.reference.help import help_of, wants_help
from src.config.reference.keys import WIDTH
from src.errors import UserError, VerdictError
from src.launch.as_it_was import completed
from src.launch.dry_run import show
from src.launch.kept_layout import check_places, measured_places
from src.launch.later import started_later
from src.launch.start import EachOnce, Shared, ask_schedulers, checked, start
from src.storage.space import disk_full
from src.storage.streams import ReaderMayLeave, columns, folded
from src.sweeps.grid import in_group, names, sweep, title
from src.sweeps.search import search
from src.version import VERSION

if TYPE_CHECKING:
    from src.planning.plan import Plan
    from src.run import Run

PATIENCE_SECONDS = 5.0  # torchrun looks at its ranks every 0.1 s


def say_recipes(points: "list[tuple[ConfigPoint, Run, Plan]]") -> None:
    """On stderr, what the published recipes of these points decide, and what nobody wants; once where common."""
    from src.launch.origins import recipe_lines, unwanted_lines

    tell = EachOnce()
    for point, run, plan in points:
        tell([*recipe_lines(point.tree, point.origins, run), *unwanted_lines(point.origins, run, plan)])


def refused(error: UserError) -> int:
    """Says what is wrong, once: rank 0 goes first, and its outer launcher then ends the others."""
    if os.environ.get("RANK", "0") != "0":
        time.sleep(PATIENCE_SECONDS)
    print(*(folded(each, sys.stderr) for each in error.problems), sep="\n", file=sys.stderr, flush=True)
    return error.exit_code


def main() -> int:
    if sys.argv[1:] == ["--version"]:
        print(VERSION)
        return 0
    open_closed_streams()
    raise_again()
    keep_interrupts()
    command = shlex.join(["python", *sys.argv])
    os.environ["HYDRA_FULL_ERROR"] = "1"  # raise, instead of printing and leaving with code 1
    try:
        if wants_help(sys.argv[1:]):
            with ReaderMayLeave():
                print(help_of(sys.argv[1:], columns(sys.stdout, WIDTH)))
            return 0
        question = asked(sys.argv[1:], completed)
        if question.space:
            return search(question, sys.argv[1:])
        named = names([point.overrides for point in question.points]) if question.swept else ()
        points = checked(in_group(question.trees, title(question.trees)) if question.swept else question.trees, named)
        ask_schedulers(points)
        asked_for = list(zip(points, question.points, strict=True))
        say_recipes([(point, run, plan) for (_, run, plan), point in asked_for])
        dry = [(point, *checked_point) for checked_point, point in asked_for if checked_point[1].dry_run]
        if dry and (disagreements := show(dry)):
            raise VerdictError(disagreements)
        live = [(*checked_point, point.overrides) for checked_point, point in asked_for if not checked_point[1].dry_run]
        check_places(live)
        if told := started_later([run for _, run, *_ in live], sys.argv[1:]):
            print(told, file=sys.stderr)
            return 0
        if question.swept and live:
            code = sweep(live, sys.argv[1:])
            measured_places(live)
            return code
        status, code = start(*live[0][:3], Shared(command)) if live else ("shown", 0)
    except UserError as error:
        return refused(error)
    except KeyboardInterrupt:  # not while ranks live: who supervises them takes the signal
        print(f"\nCtrl-C: ended; the same command begins again, or goes on: {command}", file=sys.stderr)
        return 128 + signal.SIGINT
    except Exception as error:
        if (full := disk_full(error, Path.cwd())) is None:
            raise
        return refused(full)
    if status == "stopped" and "RANK" not in os.environ:
        print(f"to go on: {command}", file=sys.stderr)
    return code


if __name__ == "__main__":
    sys.exit(main())
