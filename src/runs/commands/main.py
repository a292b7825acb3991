"""`python -m src.runs <command>`: find, look at, compare and tidy up runs, on any machine that sees their folders.

RUN is a run folder, or the name of one below the root, or its beginning. RUNS are any of these, roots and sweep
folders; nothing: all runs of the root. Conditions choose among them: state=running model=llama3_8b 'optim.lr<3e-4'
'age>2d' name=demo*. Exit codes: 0 fine, 1 the answer is no (nothing found, not whole, failed), 2 a mistake.
"""

import argparse
import shlex
from collections.abc import Callable, Sequence
from pathlib import Path

from src.errors import FolderError, UserError
from src.runs.commands import find
from src.runs.commands.filters import FACTS, chosen, conditions
from src.runs.commands.summary import Summary, summaries
from src.storage.remote import is_url
from src.storage.streams import ReaderMayLeave, to_stderr

METRIC = "metric="
PAGE = "compare.html"


def _list(given: argparse.Namespace) -> int:
    """runs that fulfil the conditions, one a line"""
    from src.runs.commands.listing import ordered, show_list

    return show_list(ordered(_runs(given, given.runs), given.sort), as_json=given.json)


def _show(given: argparse.Namespace) -> int:
    """all that is known of one run, and what to type next"""
    from src.runs.commands.show import show

    return show(_run(given), as_json=given.json)


def _best(given: argparse.Namespace) -> int:
    """runs by one of their numbers: metric=validation_loss"""
    from src.runs.commands.compare import best

    named = [each.removeprefix(METRIC) for each in given.runs if each.startswith(METRIC)]
    runs = _runs(given, [each for each in given.runs if not each.startswith(METRIC)])
    return best(runs, (named or ["validation_loss"])[-1], highest=given.highest, as_json=given.json)


def _checkpoint(given: argparse.Namespace) -> int:
    """what lies in a step folder, or in all of a run: steps, tokens, losses, tensors, and whether it is whole"""
    from src.runs.commands.checkpoints import show_checkpoint, show_elsewhere

    if is_url(given.folder):
        return show_elsewhere(given.folder, full=given.full, as_json=given.json)
    path = Path(given.folder).expanduser()
    path = path if path.exists() else find.folder(given.folder, _root(given))
    return show_checkpoint(path, full=given.full, as_json=given.json)


def _compare(given: argparse.Namespace) -> int:
    """in what runs differ, what they brought, and their curves on one page"""
    from src.runs.commands.compare import compare

    return compare(_runs(given, given.runs), given.page or _root(given) / PAGE, as_json=given.json)


def _plot(given: argparse.Namespace) -> int:
    """curves as a figure of a paper: x=tokens y=validation_loss out=fig.pdf; seeds of one config are averaged"""
    from src.runs.commands.figures.drawing import plot

    words, rest = _settings(given.runs, ("x", "y", "out", "style", "label", "log"))
    return plot(_runs(given, rest), words, as_json=given.json)


def _table(given: argparse.Namespace) -> int:
    """final numbers, a row for each config, also as LaTeX: --latex, or out=table.tex"""
    from src.runs.commands.figures.tables import table

    words, rest = _settings(given.runs, ("y", "out", "label"))
    command = shlex.join(["python", "-m", "src.runs", "table", *given.runs])
    return table(_runs(given, rest), words, command, latex=given.latex, as_json=given.json)


def _cite(given: argparse.Namespace) -> int:
    """BibTeX of the software that made a run"""
    from src.runs.commands.figures.software import cite

    return cite(_runs(given, given.runs) if given.runs else [], as_json=given.json)


def _extend(given: argparse.Namespace) -> int:
    """more steps for a run: steps=2000 schedule.total_steps=1000; says what becomes of its learning rate"""
    from src.runs.commands.extend import extend

    return extend(*_at(given), given.words, yes=given.yes, as_json=given.json)


def _fork(given: argparse.Namespace) -> int:
    """the command of a new run that starts from a checkpoint, with other values: fork demo@800 optim.lr=1e-4"""
    from src.runs.commands.fork import fork

    return fork(*_at(given), given.words, run=given.run_it, as_json=given.json)


def _clean(given: argparse.Namespace) -> int:
    """what may go and how much it frees; with runs or conditions these runs, else what broken saves have left"""
    from src.runs.commands.clean import clean

    runs = _runs(given, given.runs)
    whole = bool(given.runs)
    return clean(runs, _root(given), whole=whole, caches=given.caches, yes=given.yes, as_json=given.json)


def _watch(given: argparse.Namespace) -> int:
    """one run live, until it ends"""
    from src.runs.commands.watch import watch

    return watch(find.folder(given.run, _root(given)), once=given.once, as_json=given.json)


def _serve(given: argparse.Namespace) -> int:
    """pages of all runs on 127.0.0.1, to read only, for whoever has the token of the address that it prints"""
    from src.runs.commands.serve.server import serve

    return serve(_root(given), given.port, as_json=given.json)


COMMANDS: dict[str, Callable[[argparse.Namespace], int]] = {
    "list": _list,
    "show": _show,
    "best": _best,
    "compare": _compare,
    "plot": _plot,
    "table": _table,
    "cite": _cite,
    "checkpoint": _checkpoint,
    "extend": _extend,
    "fork": _fork,
    "clean": _clean,
    "watch": _watch,
    "serve": _serve,
}
OF_MANY = ("list", "best", "compare", "plot", "table", "cite", "clean")
OF_ONE, AT_A_STEP = ("show", "watch"), ("extend", "fork")


def parser() -> argparse.ArgumentParser:
    """Of every command."""
    whole = argparse.ArgumentParser(
        prog="python -m src.runs", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    commands = whole.add_subparsers(dest="command", required=True)
    for name, act in COMMANDS.items():
        each = commands.add_parser(name, help=act.__doc__, description=act.__doc__)
        each.add_argument("--root", type=Path, help="folder of runs; without it $RUNS, else runs")
        each.add_argument("--json", action="store_true", help="for machines, on stdout")
        if name in OF_MANY:
            each.add_argument("runs", nargs="*", metavar="RUNS or condition", help="such as state=failed 'age<2d'")
        elif name in OF_ONE:
            each.add_argument("run", metavar="RUN")
        elif name in AT_A_STEP:
            each.add_argument("run", metavar="RUN[@step]", help="without a step: its newest checkpoint")
            each.add_argument("words", nargs="*", metavar="key=value")
        if name in ("extend", "clean"):
            each.add_argument("--yes", action="store_true", help="do it")
    commands.choices["fork"].add_argument("--run", action="store_true", dest="run_it", help="start it, here and now")
    commands.choices["compare"].add_argument("--page", type=Path, help=f"where to write the page; else <root>/{PAGE}")
    commands.choices["table"].add_argument("--latex", action="store_true", help="print LaTeX")
    commands.choices["clean"].add_argument("--caches", action="store_true", help="and tokens that no run reads")
    commands.choices["list"].add_argument("--sort", choices=sorted(FACTS), help="by this, small ones first")
    commands.choices["best"].add_argument("--highest", action="store_true", help="more is better")
    commands.choices["checkpoint"].add_argument("folder", help="step_XXXXXXXX, or a run, or the URL of either")
    commands.choices["checkpoint"].add_argument("--full", action="store_true", help="compare checksums: reads all")
    commands.choices["serve"].add_argument("--port", type=int, default=8000, help="0: any that is free")
    commands.choices["watch"].add_argument("--once", action="store_true", help="show it once, and leave")
    return whole


def main(arguments: Sequence[str] | None = None) -> int:
    """Exit code 2 for a mistake."""
    given = _parsed(arguments)
    try:
        with ReaderMayLeave():
            return COMMANDS[given.command](given)
    except UserError as error:
        to_stderr(error.problems)
        return error.exit_code
    return 0


def _parsed(arguments: Sequence[str] | None) -> argparse.Namespace:
    """Also with options between runs and settings: `plot demo --root r x=step`, of which argparse takes the first."""
    whole = parser()
    given, rest = whole.parse_known_args(arguments)
    if rest and ("runs" not in given or any(each.startswith("-") for each in rest)):
        whole.error(f"unrecognized arguments: {' '.join(rest)}")
    if rest:
        given.runs += rest
    return given


def _root(given: argparse.Namespace) -> Path:
    root: Path = given.root or find.default_root()
    return root.expanduser()


def _runs(given: argparse.Namespace, words: Sequence[str]) -> list[Summary]:
    wanted, names = conditions(words)
    return chosen(summaries(find.folders(names, _root(given))), wanted)


def _settings(words: Sequence[str], names: Sequence[str]) -> tuple[dict[str, str], list[str]]:
    """The words `name=value` among the arguments, the last of each, and all others."""
    pairs = {word: word.partition("=") for word in words}
    mine = [word for word, (name, sign, _) in pairs.items() if sign and name in names]
    return {pairs[word][0]: pairs[word][2] for word in mine}, [word for word in words if word not in mine]


def _at(given: argparse.Namespace) -> tuple[Path, int | None]:
    """RUN@step, with the run's folder."""
    name, at, step = given.run.rpartition("@")
    if not at:
        return find.folder(given.run, _root(given)), None
    if not step.isdecimal():
        raise FolderError(f"{given.run}: {step!r} behind @ is no step; write {name}@1000")
    return find.folder(name, _root(given)), int(step)


def _run(given: argparse.Namespace) -> Summary:
    (run,) = summaries([find.folder(given.run, _root(given))])
    return run
