"""The pages of a folder of runs: what each address shows. Read anew at every request; nothing is written."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from html import escape
from pathlib import Path
from urllib.parse import urlencode

from src.errors import FolderError
from src.runs.commands.compare import FEW, command, differing, side_by_side
from src.runs.commands.find import runs_in
from src.runs.commands.listing import COLUMNS
from src.runs.commands.summary import Summary, summaries
from src.storage.json_lines import facts_in
from src.sweeps.ledger import SWEEP, Ledger
from src.sweeps.report.content import log_of
from src.sweeps.report.page import POLICY, REFRESH_SECONDS, STYLE, page, plotly_script
from src.sweeps.report.scaling import FIT_FILE

LOG_BYTES = 1 << 20  # of the end of a log
LIBRARY = '<script src="/plotly.js"></script>'
# The list is read again while runs live, but not from under a choice.
AGAIN = (
    f"setInterval(() => document.hidden || document.querySelector(':checked') || location.reload(),"
    f"{1000 * REFRESH_SECONDS})"
)


@dataclass(frozen=True)
class WebAnswer:
    body: bytes
    kind: str = "text/html; charset=utf-8"
    kept: bool = False  # whether a browser may keep it


class RunPages:
    """Of one root. Runs and sweeps go by the names of their folders directly below it; no address names a path."""

    def __init__(self, root: Path) -> None:
        self._root = root

    def answer(self, path: str, query: Mapping[str, Sequence[str]]) -> WebAnswer:
        """FolderError where nothing is at this address. `query`: the values of each name."""
        if path == "/":
            return WebAnswer(self._index().encode())
        if path == "/plotly.js":
            return WebAnswer(plotly_script(), "text/javascript; charset=utf-8", kept=True)
        if path == "/runs":
            return WebAnswer(self._runs(query.get("name", ())).encode())
        if path == "/sweep":
            return WebAnswer(self._sweep(query.get("name", ())).encode())
        if path == "/log":
            return WebAnswer(self._log(query.get("name", ())), "text/plain; charset=utf-8")
        raise FolderError(f"{path}: no such page")

    def _folders(self, names: Sequence[str]) -> list[Path]:
        there = {each.name: each for each in runs_in(self._root)}
        if missing := [name for name in names if name not in there]:
            raise FolderError(f"{missing[0]}: no run of {self._root}")
        if not names:
            raise FolderError("name a run: /runs?name=...")
        return [there[name] for name in names]

    def _runs(self, names: Sequence[str]) -> str:
        runs = summaries(self._folders(names))
        differs = differing(runs) if len(runs) > 1 else {}
        title = runs[0].name if len(runs) == 1 else f"{len(runs)} runs"
        rows = side_by_side(runs, differs)
        return page(title, command(runs), rows, [*differs][:FEW], link=self._link, plotly=LIBRARY)

    def _sweep(self, names: Sequence[str]) -> str:
        there = {each.name: each for each in self._sweeps()}
        if len(names) != 1 or names[0] not in there:
            raise FolderError(f"{', '.join(names)}: no sweep of {self._root}")
        ledger = Ledger.open(there[names[0]])
        rows, swept = ledger.standings(), ledger.swept()
        asked = " ".join(["python", "launch.py", *ledger.argv])
        law = facts_in(ledger.path / FIT_FILE)
        return page(names[0], asked, rows, swept, ledger.tree, self._link, LIBRARY, law)

    def _sweeps(self) -> list[Path]:
        return sorted(each.parent for each in self._root.glob(f"sweeps/*/{SWEEP}"))

    def _log(self, names: Sequence[str]) -> bytes:
        (folder,) = self._folders(names[:1])
        if (log := log_of(folder)) is None:
            raise FolderError(f"{folder.name}: no log yet")
        with log.open("rb") as file:
            file.seek(max(0, log.stat().st_size - LOG_BYTES))
            return file.read()

    def _link(self, path: Path) -> str:
        """The address of a run's folder or of its log; nowhere for what is outside of the root."""
        for run in (path, *path.parents):
            if run.absolute().parent == self._root.absolute():
                return ("/runs?" if run == path else "/log?") + urlencode({"name": run.name})
        return "#"

    def _index(self) -> str:
        runs = summaries(runs_in(self._root))
        runs = sorted(runs, key=lambda run: (not run.live, -(run.active or 0.0)))
        columns = [(name, [cell(run) for run in runs]) for name, cell in COLUMNS if name != "run"]
        columns = [(name, cells) for name, cells in columns if any(cells)]
        head = "".join(f"<th>{escape(name)}</th>" for name in ("", "run", *(name for name, _ in columns)))
        rows = "".join(
            f"<tr>{_boxed(run)}{''.join(f'<td>{_cell(name, cells[at])}</td>' for name, cells in columns)}</tr>"
            for at, run in enumerate(runs)
        )
        sweeps = "".join(
            f'<li><a href="/sweep?{escape(urlencode({"name": each.name}))}">{escape(each.name)}</a></li>'
            for each in self._sweeps()
        )
        title = escape(str(self._root))
        return (
            f'<!doctype html><html lang="en"><head><meta charset="utf-8"><title>{title}</title>'
            f'<meta http-equiv="Content-Security-Policy" content="{POLICY}">'
            '<meta name="viewport" content="width=device-width, initial-scale=1"><link rel="icon" href="data:,">'
            f"<style>{STYLE.read_text(encoding='utf-8')}</style></head><body><main><h1>{title}</h1>"
            f'<p class="note">{len(runs)} runs, those that live first</p>'
            + (f"<section><h2>Sweeps</h2><ul>{sweeps}</ul></section>" if sweeps else "")
            + f'<section><form action="/runs"><h2>Runs<button>compare</button></h2><div class="scroll"><table>'
            f"<tr>{head}</tr>{rows}</table></div></form></section></main>"
            + (f"<script>{AGAIN}</script>" if any(run.live for run in runs) else "")
            + "</body></html>\n"
        )


def _boxed(run: Summary) -> str:
    name, address = escape(run.name), escape(urlencode({"name": run.name}))
    box = f'<input type="checkbox" name="name" value="{name}" aria-label="compare {name}">'
    return f'<td>{box}</td><td><a href="/runs?{address}">{name}</a></td>'


def _cell(column: str, text: str) -> str:
    return f'<span class="state {escape(text)}">{escape(text)}</span>' if column == "state" else escape(text)
