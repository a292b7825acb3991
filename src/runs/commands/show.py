"""`show`: all that is known of one run, and what to type next."""

import shlex
import socket
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from rich.table import Table
from rich.text import Text

from src.checkpoint.folder import complete
from src.cluster.batch_system import batch_system
from src.config.composition.overrides import overrides
from src.errors import ConfigError
from src.metrics.incidents import INCIDENTS_FILE
from src.runs.commands import checkpoints
from src.runs.commands.listing import COLUMNS, print_json, short
from src.runs.commands.summary import Summary, read_plan
from src.runs.folder import Attempt, attempts, log_folder
from src.runs.lock import Lock
from src.storage.json_lines import Lines, facts_in
from src.sweeps.commands import COLOURS, folding, terminal

GIT_FILE = "git.json"  # of a run folder
GIB = 2**30
MOST = 8  # attempts, checkpoints and incidents on the screen; --json has all


def show(run: Summary, *, as_json: bool) -> int:
    """Everything about the run, as tables or as JSON."""
    known = checkpoints.facts_of(run.folder)
    tried, happened = attempts(run.folder), list(Lines(run.folder / INCIDENTS_FILE).read())
    differs, next_steps = _differences(run), commands(run)
    if as_json:
        print_json(run.to_dict() | {
            "config": differs,
            "plan": read_plan(run.folder),
            "git": facts_in(run.folder / GIT_FILE) or None,
            "attempts": [vars(each) for each in tried],
            "checkpoints": [each.to_dict() for each in known],
            "incidents": happened,
            "commands": next_steps,
        })  # fmt: skip
        return 0
    screen = terminal()
    screen.print(_facts(run))
    screen.print("config, where it is not the default:", style="bold")
    lines = [f"  {key}={value}" for key, value in differs.items()] or ["  nothing differs"]
    screen.print(*lines, sep="\n", highlight=False)
    screen.print(_attempts(tried[-MOST:]))
    if known:
        screen.print(checkpoints.table(known[-MOST:], {}))
    if happened:
        screen.print(_incidents(happened))
    screen.print(*(f"{what}: {text}" for what, text in next_steps.items()), sep="\n", highlight=False)
    return 0


def commands(run: Summary) -> dict[str, str]:
    """What to type to go on, watch or stop."""
    folder, quoted = run.folder, shlex.quote(str(run.folder))
    found = {"watch": f"python -m src.runs watch {quoted}"}
    if (stop := stop_command(run)) is not None:
        found["stop"] = stop
    if not run.live and run.state != "finished":
        found["go on"] = f"python launch.py folder={quoted}"
    if run.state == "finished" and not read_plan(folder).get("training_stages"):
        found["extend"] = f"python -m src.runs extend {quoted} steps={2 * (run.steps or 1)}"
    if complete(folder / "checkpoints"):
        found["fork"] = f"python -m src.runs fork {quoted}"
        found["generate"] = f"python launch.py task=generate run={quoted} prompt=..."
        found["export"] = f"python launch.py task=export run={quoted}"
    return found


def stop_command(run: Summary) -> str | None:
    """Ends a run that lives, after it has saved; None for one that does not."""
    if not run.live:
        return None
    owner = Lock(run.folder / "lock").owner() or {}
    job = owner.get("job") or run.job
    if job is not None:
        return batch_system().cancel_command(run.folder, str(job))
    there = "" if owner.get("host") in (None, socket.gethostname()) else f"ssh {owner['host']} "
    return f"{there}kill -TERM {owner.get('pid')}"


def _differences(run: Summary) -> Mapping[str, str]:
    try:
        return overrides(run.config)
    except ConfigError as error:
        return {"config.yaml": error.problems[0]}


def _facts(run: Summary) -> Table:
    plan, git = read_plan(run.folder), facts_in(run.folder / GIT_FILE)
    memory = plan.get("memory", {}).get("peak")
    rows: list[tuple[str, str | Text]] = [("folder", str(run.folder))]
    for name, cell in COLUMNS[1:]:
        if text := cell(run):
            rows.append((name, Text(text, style=COLOURS[run.state] if name == "state" else "")))
    rows += [
        ("ranks", str(plan.get("world", ""))),
        ("tokens", f"{short(run.tokens or 0)} of {short(plan.get('tokens', 0))}"),
        ("tokens per step", f"{plan.get('tokens_per_step', 0):,}"),
        ("memory planned", "" if memory is None else f"{memory / GIB:.1f} GiB on the fullest GPU"),
        ("code", f"{(git.get('sha') or 'no git')[:12]}{' with changes' if git.get('dirty') else ''}"),
    ]
    found = Table(show_header=False, box=None)
    found.add_column(style="bold")
    found.add_column()
    for row in rows:
        found.add_row(*row)
    return found


def _attempts(tried: Sequence[Attempt]) -> Table:
    found = folding("attempt", "started, UTC", "host", "ranks", "ended", "why", "log")
    for each in tried:
        when, _, why = each.detail.partition(" ")
        changed = f"with {', '.join(each.changed)}" if each.changed else ""
        said = "; ".join(filter(None, (why.partition("\n")[0], changed)))
        log = log_folder(Path(), each.number)
        host = f"{each.host} (job {each.job})" if each.job else each.host
        ended = f"{each.ended} {_clock(when)}" if each.ended else "no word of its end"
        found.add_row(str(each.number), _clock(each.started), host, str(each.world), ended, said, str(log))
    return found


def _clock(moment: str) -> str:
    """2026-12-01T04:02:35+00:00 as people write it."""
    return moment.removesuffix("+00:00").replace("T", " ")


def _incidents(happened: Sequence[Mapping[str, Any]]) -> Table:
    found = folding("incident at step", "loss", "gradient norm", "then")
    for each in happened[-MOST:]:
        then = ": ".join(str(each[key]) for key in ("decision", "words") if key in each)
        numbers = (str(each[key]) if key in each else "" for key in ("loss", "grad_norm"))
        found.add_row(str(each.get("step")), *numbers, then)
    if len(happened) > MOST:
        found.add_row(f"and {len(happened) - MOST} before", "", "", "")
    return found
