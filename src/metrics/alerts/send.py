"""Sends alerts about a run: each event once an attempt, again where it did not arrive, and no secret into a log."""

import json
import os
import shlex
import subprocess
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from datetime import datetime, timedelta
from http.client import HTTPException
from pathlib import Path
from typing import Any

from src.config.tree import read_section
from src.errors import UserError
from src.metrics.alerts.config import Alerts, Event
from src.runs.folder import Attempt, attempts
from src.storage.json_lines import METRICS_FILE, Lines

ALERTS_FILE = "alerts.jsonl"  # of a run folder: what was told, and what did not arrive
DAY = timedelta(hours=24)


@dataclass(frozen=True)
class Alert:
    event: Event
    run: str
    folder: str
    attempt: int
    step: int | None
    detail: str
    time: float  # seconds since 1970

    @property
    def text(self) -> str:
        """One line for a person."""
        at = "" if self.step is None else f" at step {self.step}"
        return f"{self.run}: {self.event}{at}" + (f": {self.detail}" if self.detail else "")


def alert_of(folder: Path, event: Event, detail: str) -> Alert:
    """About the newest attempt, with the step that its log tells."""
    tried, step = attempts(folder), Lines(folder / METRICS_FILE).newest("step").get("step")
    attempt = tried[-1].number if tried else 0
    return Alert(event, folder.name, str(folder), attempt, step, detail.strip(), round(time.time(), 3))


def tell(folder: Path, options: Alerts, event: Event, detail: str = "") -> None:
    """Tell of an event that somebody wants to hear of, unless it was told of this attempt. Never raises: an alert is no
    reason to end otherwise. Takes as long as the other side and the retries do.
    """
    if not options.wanted or event not in options.events:
        return
    try:
        alert, lines = alert_of(folder, event, detail), Lines(folder / ALERTS_FILE)
        if any((each.get("event"), each.get("attempt")) == (event, alert.attempt) for each in lines.read()):
            return
        lines.append(asdict(alert))  # first: who comes next must not tell it again
        if missed := send(alert, options, os.environ):
            lines.append({"missed": missed, "of": event, "time": round(time.time(), 3)})
    except (OSError, UserError):
        return


def tell_aside(folder: Path, options: Alerts, event: Event, detail: str) -> None:
    """As `tell`, from a thread of its own: training waits for nobody who is told."""
    threading.Thread(target=tell, args=(folder, options, event, detail), name="alert", daemon=True).start()


def tell_end(folder: Path, options: Alerts) -> None:
    """Tell how the newest attempt has ended, and whether it was one stop too many."""
    tried = attempts(folder)
    if not tried or not options.wanted:
        return
    detail = tried[-1].detail.partition(" ")[2].partition("\n")[0]
    if tried[-1].ended == "finished":
        tell(folder, options, "finished", detail)
    elif tried[-1].ended in ("failed", "killed"):
        tell(folder, options, "diverged" if "DivergedError" in detail else "failed", detail)
    elif tried[-1].ended == "stopped" and (count := _stops(tried)) >= options.preemptions:
        tell(folder, options, "preempted", f"stopped {count} times in 24 hours")


def options_of(folder: Path) -> Alerts | None:
    """The section `alert` of a run folder, for those who have nothing else of its config; None in one without it."""
    section = read_section(folder / "config.yaml", "alert")
    if not isinstance(section, dict):
        return None
    return Alerts(**{key: value for key, value in section.items() if key != "_target_"})


def _stops(tried: list[Attempt]) -> int:
    """Of the 24 hours before the last one."""
    ends = [datetime.fromisoformat(each.detail.partition(" ")[0]) for each in tried if each.ended == "stopped"]
    return sum(ends[-1] - each < DAY for each in ends)


def send(
    alert: Alert, options: Alerts, environment: Mapping[str, str], sleep: Callable[[float], None] = time.sleep
) -> list[str]:
    """What did not arrive after all retries, in words without a secret."""
    ways: list[tuple[str, Callable[[], str | None]]] = []
    if options.webhook is not None:
        ways.append(("webhook", lambda: _post(alert, options, environment.get(options.webhook or ""))))
    if options.command is not None:
        ways.append(("command", lambda: _start(alert, options)))
    missed = []
    for name, attempt in ways:
        problem = attempt()
        for number in range(options.retries):
            if problem is None:
                break
            sleep(2.0**number)
            problem = attempt()
        missed += [] if problem is None else [f"{name}: {problem}"]
    return missed


def body(alert: Alert, form: str) -> dict[str, Any]:
    """What is posted."""
    return {"text": alert.text} if form == "slack" else {"text": alert.text} | asdict(alert)


def _post(alert: Alert, options: Alerts, url: str | None) -> str | None:
    """What went wrong. The URL is in none of the words: of an error only its class or its code is told."""
    if not url:
        return f"the environment has no {options.webhook}"
    content = json.dumps(body(alert, options.form)).encode()
    try:
        request = urllib.request.Request(url, content, {"Content-Type": "application/json"})
        if request.type not in ("http", "https"):
            return "the URL is neither http nor https"
        with urllib.request.urlopen(request, timeout=options.timeout_seconds):
            return None
    except urllib.error.HTTPError as error:
        return f"answered {error.code}"
    except (OSError, ValueError, HTTPException) as error:
        return type(error).__name__


def _start(alert: Alert, options: Alerts) -> str | None:
    facts = json.dumps({"text": alert.text} | asdict(alert))
    try:
        done = subprocess.run(
            shlex.split(options.command or ""),
            input=facts,
            text=True,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            timeout=options.timeout_seconds,
        )
    except (OSError, ValueError, subprocess.SubprocessError) as error:
        return type(error).__name__
    return f"exit code {done.returncode}" if done.returncode else None
