"""A sweep, or runs side by side, as one page of HTML. It needs nothing but a browser: every number, style and script is
inside, so that it can be mailed and kept.
"""

import base64
import gzip
import json
import os
import shlex
import time
from collections.abc import Mapping, Sequence
from functools import cache
from html import escape
from pathlib import Path
from types import MappingProxyType
from typing import Any
from urllib.parse import quote

from src.config import tree as trees
from src.metrics.history import read
from src.runs.folder import attempts
from src.storage.atomic_write import atomic_write
from src.storage.json_lines import facts_in
from src.sweeps.ledger import Ledger, SweepPoint
from src.sweeps.report.content import Shown, content
from src.sweeps.report.looks import legend, looks
from src.sweeps.report.scaling import FIT_FILE, figures_of
from src.sweeps.report.sections import ConfigOf, Link, cards, config_sections, failures, figures, run_table
from src.sweeps.status import LIVE, RunStatus

REPORT_FILE = "report.html"
STYLE, SCRIPT = (Path(__file__).with_suffix(suffix) for suffix in (".css", ".js"))
REFRESH_SECONDS = 30  # of a browser that shows runs which still live
# Whatever a run folder may hold, the page fetches nothing and sends nothing anywhere. WebGL's shaders are made by eval.
POLICY = "; ".join(
    (
        "default-src 'none'",
        "script-src 'unsafe-inline' 'unsafe-eval' 'self'",
        "style-src 'unsafe-inline'",
        "img-src data: blob:",
    )
)


def write(ledger: Ledger, rows: Sequence[tuple[SweepPoint, RunStatus]]) -> Path:
    """report.html of the sweep folder."""
    command = shlex.join(["python", "launch.py", *ledger.argv])
    where, name = ledger.path / REPORT_FILE, ledger.path.name
    return write_page(where, name, command, rows, ledger.swept(), ledger.tree, facts_in(ledger.path / FIT_FILE))


def _recorded(point: SweepPoint) -> trees.Tree:
    return trees.read(point.folder / "config.yaml")


def write_page(
    path: Path,
    name: str,
    command: str,
    rows: Sequence[tuple[SweepPoint, RunStatus]],
    swept: Sequence[str],
    config: ConfigOf = _recorded,
    law: Mapping[str, Any] = MappingProxyType({}),
) -> Path:
    """The page of these runs, at `path`. `command`: shown below its name; `swept`: keys in which the runs differ;
    `config`: of a run; `law`: facts of a fit.
    """

    def link(to: Path) -> str:  # relative, so that it holds where the whole root was moved
        return quote(os.path.relpath(to, path.parent))

    atomic_write(path, page(name, command, rows, swept, config, link, _inlined(), law))
    return path


def page(
    name: str,
    command: str,
    rows: Sequence[tuple[SweepPoint, RunStatus]],
    swept: Sequence[str],
    config: ConfigOf = _recorded,
    link: Link = str,
    plotly: str = "",
    law: Mapping[str, Any] = MappingProxyType({}),
) -> str:
    """The text of a page. `link`: address of a path; `plotly`: the element that brings plotly.js; `law`: of a fit."""
    values = [{key: point.overrides.get(key, "") for key in swept} for point, _ in rows]
    drawn = looks(values, swept)
    shown = [
        Shown(point, now, read(point.folder), look, attempts(point.folder))
        for (point, now), look in zip(rows, drawn, strict=True)
    ]
    facts = content(shown, swept, legend(values, swept, drawn))
    live = any(each.now.state in LIVE for each in shown)
    facts |= {"drawn": figures_of(law)}
    facts |= {"refresh": REFRESH_SECONDS if live else None}
    differences, shared, own = config_sections(shown, swept, config)
    written = time.strftime("%Y-%m-%d %H:%M")
    return (
        f'<!doctype html><html lang="en"><head><meta charset="utf-8"><title>{escape(name)}</title>'
        f'<meta http-equiv="Content-Security-Policy" content="{POLICY}">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f'<link rel="icon" href="data:,"><style>{STYLE.read_text(encoding="utf-8")}</style></head><body><main>'
        f'<h1>{escape(name)}</h1><p class="note">{written}{", read again every 30 s while runs live" if live else ""}'
        f"</p><code>{escape(command)}</code>"
        f"{cards(shown, swept)}{failures(shown, swept, link)}{figures(facts, shown, swept)}"
        f"{run_table(shown, swept, own, link)}{differences}{shared}"
        f'</main><script type="application/json" id="content">{_embedded(facts)}</script>{plotly}'
        f"<script>{SCRIPT.read_text(encoding='utf-8')}</script></body></html>\n"
    )


def _embedded(facts: object) -> str:
    """JSON inside of HTML: no text in it can end the element."""
    return json.dumps(facts, allow_nan=False, separators=(",", ":")).replace("<", "\\u003c")


@cache
def _inlined() -> str:
    """plotly.js, packed: 1.9 MB of a page, where it is 4.8 MB as it comes. A file beside the pages would be shared by
    them, and missing from the one that is mailed.
    """
    packed = base64.b64encode(gzip.compress(plotly_script(), 9, mtime=0)).decode()
    return f'<script type="application/gzip" id="plotly">{packed}</script>'


def plotly_script() -> bytes:
    """plotly.js as the installed package has it."""
    from plotly.offline import get_plotlyjs

    return str(get_plotlyjs()).encode()
