"""Pages made of the code: docs/config.md of the config classes and conf/, docs/metrics.md of src.metrics.names; and
tables of costs, made of benchmarks/records (docs/costs.py).

After a change of a key or a metric: `python -m docs.reference --write`. Without `--write`, exit code 1 and the pages
that differ.
"""

import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path

from docs.costs import filled
from docs.key_costs import COSTS
from docs.readers import read_by
from src.config.groups import EXPERIMENT, GROUPS, RECIPE, options
from src.config.reference.keys import Key, keys, kinds, top_keys
from src.config.reference.options import ABOUT_GROUPS, about
from src.metrics.names import NAMES
from src.storage.atomic_write import atomic_write

HOME = Path(__file__).parent
GENERATED = "<!-- python -m docs.reference --write -->"


def config_page() -> str:
    """Every group with its options, and every key of every class."""
    lines = [
        "# Config reference",
        "",
        GENERATED,
        "",
        "A command is groups and keys: `python launch.py model=llama3_8b task.steps=1000`. In a terminal",
        "`python launch.py --help task.steps` says the same as this page, `--cfg job` what a whole command composes.",
        "An empty default is that of a key below one that is null. Read by: the packages of `src` whose code asks for",
        "it, found in the syntax trees. Cost: in memory or time, where a step, a start or the disk shows one.",
        "",
        "## Keys without a group",
        "",
        *_table(top_keys()),
    ]
    for group in GROUPS:
        lines += ["", f"## {group}", "", f"{ABOUT_GROUPS[group][0].upper()}{ABOUT_GROUPS[group][1:]}.", ""]
        lines += ["| option | what it is |", "|---|---|"]
        lines += [f"| `{group}={name}` | {_cell(about(group, name))} |" for name in options(group)]
        if group in (RECIPE, EXPERIMENT):
            continue
        for target, names in kinds(group).items():
            lines += ["", f"### {target.rpartition('.')[2]}: {', '.join(f'`{name}`' for name in names)}", ""]
            lines += [f"Class {_linked(target)}; defaults of `{group}={names[0]}`.", ""]
            lines += _table(keys(group, names[0]))
    return "\n".join(lines) + "\n"


def _table(found: Iterable[Key]) -> Iterator[str]:
    yield "| key | type | default | range or choices | unit | meaning | read by | cost |"
    yield "|---|---|---|---|---|---|---|---|"
    for key in found:
        default = f"`{key.default}`" if key.default else ""
        readers = ", ".join(map(_linked, _readers(key)))
        cost = COSTS.get(key.name, "")
        cells = (f"`{key.name}`", key.kind, default, _cell(key.legal), key.unit, _cell(key.meaning), readers, cost)
        yield f"| {' | '.join(cells)} |"


def _readers(key: Key) -> list[str]:
    """Packages; where its name is put together at run time, that of its class."""
    return read_by(key.owner, key.name.rpartition(".")[2]) or [key.owner.rpartition(".")[0].rpartition(".")[0]]


def _linked(name: str) -> str:
    """A package `src.train`, or a class `src.train.module.Class`, with a link to its file."""
    place = name.replace(".", "/")
    if not (HOME.parent / place).is_dir():
        place = f"{place.rpartition('/')[0]}.py"
    return f"[{name}](../{place})"


def metrics_page() -> str:
    """Every number of metrics.jsonl."""
    lines = [
        "# Metrics",
        "",
        GENERATED,
        "",
        "`metrics.jsonl` of a run folder has a line of JSON for each logged step, with `step`, `attempt` and `time`",
        "(seconds since 1970); trackers get the same names. A step that was computed again after a restart stands",
        "there again: its last line counts. Lines with `event` say when an attempt began and ended.",
        "`pandas.read_json(path, lines=True).dropna(subset='loss')` opens it.",
        "",
        "| name | unit | what it is |",
        "|---|---|---|",
        *(f"| `{each.pattern}` | {each.unit} | {_cell(each.meaning)} |" for each in NAMES),
    ]
    return "\n".join(lines) + "\n"


def _cell(text: str) -> str:
    return text.replace("|", "\\|").replace("<", "&lt;").replace("[", "\\[")


PAGES: Mapping[str, Callable[[], str]] = {
    "config.md": config_page,
    "metrics.md": metrics_page,
    "layouts.md": partial(filled, "layouts.md"),
    "precision_and_recompute.md": partial(filled, "precision_and_recompute.md"),
}


def main(arguments: Sequence[str]) -> int:
    texts = {HOME / name: page() for name, page in PAGES.items()}
    stale = [file for file, text in texts.items() if not file.is_file() or file.read_text(encoding="utf-8") != text]
    for file in stale:
        print(file.relative_to(HOME.parent))
        if "--write" in arguments:
            atomic_write(file, texts[file])
    return 1 if stale and "--write" not in arguments else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
