"""The parts of a page that are text: cards, failures, tables, and the places where the script draws."""

from collections.abc import Callable, Mapping, Sequence
from html import escape
from pathlib import Path
from typing import Any

from src.config import tree as trees
from src.errors import UserError
from src.metrics.goodput import Goodput, duration
from src.metrics.trackers.addresses import addresses
from src.storage.json_lines import facts_in
from src.sweeps.ledger import SweepPoint
from src.sweeps.report.content import Shown, log_of, loss_name

ConfigOf = Callable[[SweepPoint], trees.Tree]
Link = Callable[[Path], str]
COLUMNS = 12  # runs whose configs stand side by side; of more the run's row has what is its own


def section(title: str, note: str, body: str, *, kind: str = "") -> str:
    """A card of the page; `title` and `note` are plain text, `body` is HTML."""
    told = f'<p class="note">{escape(note)}</p>' if note else ""
    return f'<section class="{kind}"><h2>{escape(title)}</h2>{told}{body}</section>'


def cards(shown: Sequence[Shown], swept: Sequence[str]) -> str:
    """The few numbers that are read first."""
    states = [each.now.state for each in shown]
    found = [(f"{states.count('finished')} of {len(shown)}", "runs finished")]
    if best := best_of(shown):
        found.insert(
            0, (f"{best.now.loss:.4f}", f"best {loss_name([best])}, run {best.point.number}: {best.label(swept)}")
        )
    rates = sorted(each.now.tokens_per_second for each in shown if each.now.tokens_per_second)
    if rates:
        found.append((f"{rates[len(rates) // 2]:,.0f}", "tokens/s per device, median"))
    total = sum((each.now.goodput for each in shown), Goodput())
    if total.share is not None:
        found.append((f"{100 * total.share:.0f}%", f"of {duration(total.total)} trained: goodput"))
    if commits := sorted({code for each in shown if (code := commit(each.point.folder))}):
        found.append((commits[0][:10], "git commit" + (f", and {len(commits) - 1} more" if len(commits) > 1 else "")))
    if broken := len(shown) - states.count("finished") - states.count("running") - states.count("queued"):
        found.append((str(broken), "runs need a look"))
    each = "".join(f'<div class="fact"><b>{escape(big)}</b><span>{escape(small)}</span></div>' for big, small in found)
    return f'<div class="facts">{each}</div>'


def best_of(shown: Sequence[Shown]) -> Shown | None:
    """The finished run of the lowest loss."""
    return min((each for each in shown if each.finished), key=lambda each: each.now.loss or 0.0, default=None)


def commit(folder: Path) -> str:
    """Of the newest attempt's code, with a + where files were changed; empty where nothing is known."""
    facts = facts_in(folder / "git.json")
    sha = facts.get("sha")
    return f"{sha}{'+' * bool(facts.get('dirty'))}" if isinstance(sha, str) and sha else ""


def failures(shown: Sequence[Shown], swept: Sequence[str], link: Link) -> str:
    """Every run that did not end well or is not as asked, and every attempt that broke off, with its cause."""
    rows = []
    for each in shown:
        broken = [one for one in each.attempts if one.ended in ("failed", "killed")]
        causes = [(f"attempt {one.number}", one.detail.partition(" ")[2]) for one in broken]
        if each.now.detail and not any(cause == each.now.detail for _, cause in causes):
            causes.append((each.now.state, each.now.detail))
        if not causes:
            continue
        where = _link(link, log, "log") if (log := log_of(each.point.folder)) else ""
        # The first line says what happened; the rest is a traceback or a rank's last words.
        told = "".join(f"<li><b>{escape(place)}</b> {_cause(cause)}</li>" for place, cause in causes)
        rows.append(
            f"<tr><td>{each.point.number}</td><td>{_state(each)}</td><td>{escape(each.label(swept))}</td>"
            f'<td class="wide"><ul>{told}</ul></td><td>{where}</td></tr>'
        )
    if not rows:
        return ""
    head = _head(["#", "state", "run", "what happened", ""])
    note = "Runs that did not end well, and attempts that broke off, with their causes."
    return section("What went wrong", note, _scrolled(head + "".join(rows)), kind="failures")


def _cause(text: str) -> str:
    first, _, rest = text.strip().partition("\n")
    return f"<details><summary>{escape(first)}</summary><pre>{escape(rest)}</pre></details>" if rest else escape(first)


def figures(facts: Mapping[str, Any], shown: Sequence[Shown], swept: Sequence[str]) -> str:
    """Controls, legend and an empty place for each figure, which the script fills."""
    curves = [_figure(chart["title"], chart["note"], "curves", wide=chart["wide"]) for chart in facts["charts"]]
    done, what = sum(each.finished for each in shown), facts["loss"]
    others = [_figure(title, each["note"], "given", wide=True) for title, each in facts["drawn"].items()]
    if done and swept:
        note = "Each dot a finished run; the line joins the means."
        others += [_figure(f"Final {what} against {key}", note, "against", key=key) for key in swept]
    if done > 2 and len(swept) > 1:
        note = "Each line a finished run; drag along an axis to choose a range, and along its name to move it."
        others.append(_figure("Parallel coordinates", note, "parallel", wide=True))
    if facts["importance"]:
        note = "Share of the variance between runs with another value of one key (epsilon squared); the rest is noise "
        others.append(_figure(f"What the final {what} depends on", f"{note}and the interplay of keys.", "importance"))
    if done > 2:
        note = "Each dot a finished run, in the order of asking; the line is the best until then."
        others.append(_figure(f"Best {what} so far", note, "best"))
    if any(run["rate"] for run in facts["runs"]):
        others.append(_figure("Mean throughput", "After the first report, which holds the compilation.", "rates"))
    if any(run["seconds"] for run in facts["runs"]):
        note = "Wall time since submission; the share at the end is what trained."
        others.append(_figure("Where the time went", note, "times"))
    none = "<noscript><p>The figures need JavaScript; every number of them is in the table below.</p></noscript>"
    return f'<div id="controls"></div>{none}<div class="plots">{"".join(curves)}{"".join(others)}</div>'


def _figure(title: str, note: str, kind: str, *, wide: bool = False, key: str = "") -> str:
    place = f'<div class="plot" data-kind="{kind}" data-title="{escape(title)}" data-key="{escape(key)}"></div>'
    return section(title, note, place, kind="figure wide" if wide else "figure")


def config_sections(shown: Sequence[Shown], swept: Sequence[str], config: ConfigOf) -> tuple[str, str, dict[int, str]]:
    """A table of the keys in which configs differ, if few runs are shown; a list of those that all have alike; and of
    each run, by number, the values of keys that differ and were not swept, as after `extend`.
    """
    leaves = {each.point.number: _leaves(each.point, config) for each in shown}
    keys = list(dict.fromkeys(key for values in leaves.values() for key in values))
    alike = {key for key in keys if len({values.get(key) for values in leaves.values()}) == 1}
    known = next(iter(leaves.values()), {})
    text = "\n".join(f"{key}: {known[key]}" for key in keys if key in alike)
    more = [key for key in keys if key not in alike and key not in swept]
    own = {number: ", ".join(f"{key}={values.get(key, 'absent')}" for key in more) for number, values in leaves.items()}
    body = f"<details><summary>{len(alike)} keys</summary><pre>{escape(text)}</pre></details>"
    shared = section("Config that all runs share", "Without cluster, tracker and places.", body)
    differ = [key for key in keys if key not in alike]
    if not differ or len(shown) > COLUMNS:
        return "", shared, own
    rows = "".join(
        f"<tr><td>{escape(key)}</td>"
        + "".join(f"<td>{escape(leaves[each.point.number].get(key, 'absent'))}</td>" for each in shown)
        + "</tr>"
        for key in differ
    )
    head = _head(["key", *(f"{each.point.number}: {each.point.folder.name}" for each in shown)])
    return section("In what the configs differ", "", _scrolled(head + rows)), shared, own


def _leaves(point: SweepPoint, config: ConfigOf) -> dict[str, str]:
    """Nothing of a config that cannot be read: the page shows the other runs."""
    try:
        return trees.leaves(config(point))
    except UserError:
        return {}


def run_table(shown: Sequence[Shown], swept: Sequence[str], own: Mapping[int, str], link: Link) -> str:
    """A row for each run, the best first, with what leads to its files."""
    heads = ["", "#", "state", *swept, loss_name(shown), "tok/s/device", "useful", "attempts", "step"]
    heads += ["commit", "run", "log", "tracker", ""]
    best = best_of(shown)
    ranked = sorted(shown, key=_rank)
    mark = {True: ' class="best"', False: ""}
    body = "".join(
        f'<tr{mark[each is best]} data-run="{each.point.number}">{"".join(_cells(each, swept, own, link))}</tr>'
        for each in ranked
    )
    note = "Best first. The box shows a run in the figures or hides it."
    return section("Runs", note, _scrolled(_head(heads) + body), kind="runs")


def _rank(each: Shown) -> tuple[bool, float]:
    """Finished ones by their loss, then the others by theirs; without one last."""
    loss = each.now.loss
    return not each.finished, float("inf") if loss is None or loss != loss else loss


def _cells(each: Shown, swept: Sequence[str], own: Mapping[int, str], link: Link) -> list[str]:
    now, folder, number = each.now, each.point.folder, each.point.number
    share = "" if now.goodput.share is None else f"{100 * now.goodput.share:.0f}%"
    loss = "" if now.loss is None else f"{now.loss:.4f}"
    rate = "" if now.tokens_per_second is None else f"{now.tokens_per_second:,.0f}"
    texts = [*(each.point.overrides.get(key, "") for key in swept), loss, rate, share, str(now.attempts)]
    texts += [str(now.step or ""), commit(folder)[:10]]
    pages = (f'<a href="{escape(url)}">{escape(name)}</a>' for name, url in addresses(folder).items())
    return [
        f'<td><input type="checkbox" checked aria-label="show run {number}" data-run="{number}"></td>',
        f'<td><i class="line" style="border-color:{each.look.colour}"></i>{number}</td>',
        f"<td>{_state(each)}</td>",
        *(f"<td>{escape(text)}</td>" for text in texts),
        f"<td>{_link(link, folder, folder.name)}</td>",
        f"<td>{_link(link, log, log.parent.name) if (log := log_of(folder)) else ''}</td>",
        f"<td>{' '.join(pages)}</td>",
        f'<td class="wide">{escape("; ".join(filter(None, (now.detail.partition(chr(10))[0], own[number]))))}</td>',
    ]


def _state(each: Shown) -> str:
    return f'<span class="state {each.now.state}">{each.now.state}</span>'


def _link(link: Link, path: Path, text: str) -> str:
    return f'<a href="{escape(link(path))}">{escape(text)}</a>'


def _head(names: Sequence[str]) -> str:
    return f"<tr>{''.join(f'<th>{escape(each)}</th>' for each in names)}</tr>"


def _scrolled(rows: str) -> str:
    return f'<div class="scroll"><table>{rows}</table></div>'
