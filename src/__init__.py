"""The rooms of this project; docs/architecture.md is their plan."""

import sys
from pathlib import Path

ENTRY = '__name__ == "__main__"'
TRACKERS = ("src.metrics.trackers.sync", "src.metrics.trackers.dashboard")
COMMANDS = ("src.runs", "src.sweeps", "src.planning", "src.train.coordinates", "src.config.comments", *TRACKERS)


def no_command(module: str) -> bool:
    """Whether `python -m <module>` would import a module of this package and do nothing, with exit code 0."""
    file = Path(__file__).parents[1].joinpath(*module.split("."))
    source = file / "__main__.py" if file.is_dir() else file.with_suffix(".py")
    return source.is_file() and ENTRY not in source.read_text(encoding="utf-8")


# Python imports the packages of a module that `-m` names before it sets sys.argv[0].
if sys.argv[:1] == ["-m"] and "-m" in sys.orig_argv[:-1]:
    asked = sys.orig_argv[sys.orig_argv.index("-m") + 1]
    if asked.startswith("src.") and no_command(asked):
        print(f"python -m {asked}: no command; there are python launch.py and, behind python -m,", file=sys.stderr)
        print(*(f"  {each}" for each in COMMANDS), sep="\n", file=sys.stderr)
        raise SystemExit(2)
