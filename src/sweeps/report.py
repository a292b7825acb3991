"""A sweep as one page of HTML: every plot, number, style and script is inside, so that it can be mailed and kept."""

import json
import os
import shlex
import time
from collections.abc import Callable, Sequence
from html import escape
from pathlib import Path
from urllib.parse import quote

from src.config import tree as trees
from src.metrics.goodput import Goodput, duration
from src.metrics.history import read
from src.storage.atomic_write import atomic_write
from src.sweeps import curves
from src.sweeps.curves import Shown, loss_name, numeric, ordered, section
from src.sweeps.ledger import Ledger, SweepPoint
from src.sweeps.status import LIVE, RunStatus

REPORT_FILE = "report.html"
ConfigOf = Callable[[SweepPoint], trees.Tree]
STYLE, SCRIPT = (Path(__file__).with_suffix(suffix) for suffix in (".css", ".js"))
# From cold to warm with rising values, legible on white and on black; and colours that the colour-blind tell apart.
RAMP = ("#6b4fc3", "#3f78c8", "#1f97a6", "#22a884", "#5cb85c", "#b5b827")
DISTINCT = ("#3366cc", "#e07b39", "#2a9d6f", "#c94f7c", "#8a63d2", "#b8930a", "#3fa7d6", "#7f7f7f")
DASHES = ("", "7 4", "2 4", "10 4 2 4")
REFRESH_SECONDS = 30  # of a browser that shows a sweep which still runs


def write(ledger: Ledger, rows: Sequence[tuple[SweepPoint, RunStatus]]) -> Path:
    """report.html of the sweep folder."""
    command = shlex.join(["python", "launch.py", *ledger.argv])
    return write_page(ledger.path / REPORT_FILE, ledger.path.name, command, rows, ledger.swept(), ledger.tree)


def _recorded(point: SweepPoint) -> trees.Tree:
    return trees.read(point.folder / "config.yaml")


def write_page(
    path: Path,
    name: str,
    command: str,
    rows: Sequence[tuple[SweepPoint, RunStatus]],
    swept: Sequence[str],
    config: ConfigOf = _recorded,
) -> Path:
    """The page of these runs, at `path`. `command`: shown below its name; `swept`: keys in which the runs differ;
    `config`: of a point.
    """
    colours = [_by_value(swept[:1], rows, DISTINCT), _by_value(swept[1:2], rows, DASHES)]
    shown = [
        Shown(point, now, read(point.folder), colour, dash, _title(point, now, swept))
        for (point, now), colour, dash in zip(rows, *colours, strict=True)
    ]
    atomic_write(path, _page(path.parent, escape(name), escape(command), shown, swept, config))
    return path


def _by_value(keys: Sequence[str], rows: Sequence[tuple[SweepPoint, RunStatus]], looks: Sequence[str]) -> list[str]:
    """A look for each row: by the value of the key, or the first look where there is no key."""
    if not keys:
        return [looks[0]] * len(rows)
    texts = [point.overrides.get(keys[0], "") for point, _ in rows]
    values = ordered(texts)
    if looks is DISTINCT and numeric(values) is not None:
        return [_ramp(values.index(text) / max(1, len(values) - 1)) for text in texts]
    return [looks[values.index(text) % len(looks)] for text in texts]


def _ramp(share: float) -> str:
    """A colour between the two nearest anchors."""
    place = share * (len(RAMP) - 1)
    first = min(int(place), len(RAMP) - 2)
    low, high = ([int(RAMP[each][at : at + 2], 16) for at in (1, 3, 5)] for each in (first, first + 1))
    mixed = (round(a + (b - a) * (place - first)) for a, b in zip(low, high, strict=True))
    return "#" + "".join(f"{each:02x}" for each in mixed)


def _title(point: SweepPoint, now: RunStatus, swept: Sequence[str]) -> str:
    values = " ".join(f"{key}={point.overrides.get(key, '')}" for key in swept)
    return f"{values}\n{now.state}" + ("" if now.loss is None else f", loss {now.loss:.4f}")


def _page(home: Path, name: str, command: str, shown: Sequence[Shown], swept: Sequence[str], config: ConfigOf) -> str:
    """`home`: the folder of the page, from which its links count."""
    live = any(each.now.state in LIVE for each in shown)
    again = f'<meta http-equiv="refresh" content="{REFRESH_SECONDS}">' if live else ""
    plots = [
        *curves.curves(shown),
        *(curves.against(key, shown) for key in swept),
        curves.influence(shown, swept),
        curves.best_so_far(shown),
        curves.speeds(shown, swept),
        curves.times(shown, swept),
    ]
    shared, own = _configs(shown, swept, config)
    return (
        f'<!doctype html><html lang="en"><head><meta charset="utf-8"><title>{name}</title>'
        f'<meta name="viewport" content="width=device-width, initial-scale=1">{again}'
        f"<style>{STYLE.read_text(encoding='utf-8')}</style></head><body><main>"
        f'<h1>{name}</h1><p class="note">{time.strftime("%Y-%m-%d %H:%M")}</p><code>{command}</code>'
        f'{_facts(shown, swept)}<div class="plots">{"".join(filter(None, plots))}</div>'
        f"{_table(home, shown, swept, own)}{shared}"
        f"</main><script>{SCRIPT.read_text(encoding='utf-8')}</script></body></html>\n"
    )


def _facts(shown: Sequence[Shown], swept: Sequence[str]) -> str:
    states = [each.now.state for each in shown]
    found = [(f"{states.count('finished')} of {len(shown)}", "points finished")]
    if best := _best(shown):
        values = ", ".join(f"{key.rpartition('.')[2]} {best.point.overrides.get(key, '')}" for key in swept)
        found.insert(0, (f"{best.now.loss:.4f}", f"best {loss_name([best])}, point {best.point.number}: {values}"))
    rates = sorted(each.now.tokens_per_second for each in shown if each.now.tokens_per_second)
    if rates:
        found.append((f"{rates[len(rates) // 2]:,.0f}", "tokens/s per device, median"))
    total = sum((each.now.goodput for each in shown), Goodput())
    if total.share is not None:
        found.append((f"{100 * total.share:.0f}%", f"of {duration(total.total)} trained: goodput"))
    if commits := sorted({code for each in shown if (code := _commit(each.point.folder))}):
        found.append((commits[0][:10], "git commit" if len(commits) == 1 else f"and {len(commits) - 1} more commits"))
    if broken := len(shown) - states.count("finished") - states.count("running") - states.count("queued"):
        found.append((str(broken), "points need a look: see the table"))
    cards = "".join(f'<div class="fact"><b>{escape(big)}</b><span>{escape(small)}</span></div>' for big, small in found)
    return f'<div class="facts">{cards}</div>'


def _best(shown: Sequence[Shown]) -> Shown | None:
    return min((each for each in shown if each.finished), key=lambda each: each.now.loss or 0.0, default=None)


def _commit(folder: Path) -> str:
    """Of the newest attempt's code, with a + where files were changed; empty where nothing is known."""
    try:
        facts = json.loads((folder / "git.json").read_text())
        return f"{facts['sha']}{'+' * bool(facts['dirty'])}" if facts["sha"] else ""
    except (OSError, ValueError, LookupError, TypeError):
        return ""


def _configs(shown: Sequence[Shown], swept: Sequence[str], config: ConfigOf) -> tuple[str, dict[int, str]]:
    """A section with the keys that all points have alike, and of each point, by number, the values of keys that differ
    and were not swept, as after `extend`.
    """
    leaves = {each.point.number: trees.leaves(config(each.point)) for each in shown}
    keys = list(dict.fromkeys(key for values in leaves.values() for key in values))
    alike = {key for key in keys if len({values.get(key) for values in leaves.values()}) == 1}
    known = next(iter(leaves.values()), {})
    text = "\n".join(f"{key}: {known[key]}" for key in keys if key in alike)
    more = [key for key in keys if key not in alike and key not in swept]
    own = {number: ", ".join(f"{key}={values.get(key, 'absent')}" for key in more) for number, values in leaves.items()}
    body = f"<details><summary>{len(alike)} keys</summary><pre>{escape(text)}</pre></details>"
    return section("Config that all points share", "Without cluster, tracker and places.", body), own


def _table(home: Path, shown: Sequence[Shown], swept: Sequence[str], own: dict[int, str]) -> str:
    heads = ["#", "state", *swept, loss_name(shown), "tok/s/device", "useful", "attempts", "step", "run", "log", ""]
    best = _best(shown)
    ranked = sorted(shown, key=_rank)
    body = "".join(f"<tr{_row_class(each is best)}>{''.join(_cells(home, each, swept, own))}</tr>" for each in ranked)
    head = "".join(f"<th>{escape(each)}</th>" for each in heads)
    note = "Best first. table.csv beside this page has every number."
    return section("Points", note, f'<div class="scroll"><table><tr>{head}</tr>{body}</table></div>')


def _rank(each: Shown) -> tuple[bool, float]:
    """Finished ones by their loss, then the others by theirs; without one last."""
    loss = each.now.loss
    return not each.finished, float("inf") if loss is None or loss != loss else loss


def _row_class(best: bool) -> str:
    return ' class="best"' if best else ""


def _cells(home: Path, each: Shown, swept: Sequence[str], own: dict[int, str]) -> list[str]:
    now, folder = each.now, each.point.folder
    share = "" if now.goodput.share is None else f"{100 * now.goodput.share:.0f}%"
    loss = "" if now.loss is None else f"{now.loss:.4f}"
    rate = "" if now.tokens_per_second is None else f"{now.tokens_per_second:,.0f}"
    values = [each.point.overrides.get(key, "") for key in swept]
    texts = [*values, loss, rate, share, str(now.attempts), str(now.step or "")]
    details = "; ".join(filter(None, (now.detail, own[each.point.number])))
    return [
        f"<td>{each.point.number}</td>",
        f'<td><span class="state {now.state}">{now.state}</span></td>',
        *(f"<td>{escape(text)}</td>" for text in texts),
        f"<td>{_link(home, folder, folder.name)}</td>",
        f"<td>{_link(home, log, log.parent.name) if (log := _log(folder)) else ''}</td>",
        f'<td class="wide">{escape(details)}</td>',
    ]


def _log(folder: Path) -> Path | None:
    """Rank 0's, of the newest attempt."""
    found = folder.glob("logs/attempt_*/rank_0.log")
    return max(found, key=lambda path: int(path.parent.name.rpartition("_")[2]), default=None)


def _link(home: Path, path: Path, text: str) -> str:
    """Relative to the page, so that it holds where the whole root was moved."""
    return f'<a href="{quote(os.path.relpath(path, home))}">{escape(text)}</a>'
