"""Data that are not here yet: files at URLs, which the launcher copies, and those that jobs are still preparing, behind
which the command is handed to a small job.
"""

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from src.cluster.backend import LaterBackend, SilentError, backend_of
from src.config.build import build
from src.config.tree import Tree
from src.distributed.process.rank_context import LauncherEnv, joined
from src.errors import DataError, PlanError

if TYPE_CHECKING:
    from src.run import Run
    from src.storage.streams import Tell


def look_at_data(tree: Tree, run: "Run", tell: "Tell") -> None:
    """DataError with all that is wrong with the sources of a run, as far as that is seen without reading a text. Files
    at URLs are copied here first, but by a dry run, by a command that a small job will type again, and where another
    rank of an outer launcher does it.
    """
    from src.data.preparing.elsewhere import look_at_files

    first = not joined() or LauncherEnv.read().rank == 0
    fetches = first and run.dry_run is False and not isinstance(backend_of(run.cluster), LaterBackend)
    named: dict[str, Any] = build(tree)
    sections = named.get("stages") or [named]
    pairs = zip([each["data"] for each in sections], [each.data for each in run.stages or [run]], strict=True)
    looks = (look_at_files(*pair, run.cache, fetches=fetches, tell=tell) for pair in pairs)
    if problems := [line for lines in looks for line in lines]:
        raise DataError(dict.fromkeys(problems))


def started_later(runs: "Sequence[Run]", arguments: Sequence[str]) -> str | None:
    """What to tell of the job that will type this command; None where it can go on now.

    Only runs that read data are held back: their launcher would tokenise on this machine what others are at. All else
    waits in the queue by itself.
    """
    run = next((each for each in runs if each.task.needs_corpus), None)
    if run is None or not isinstance(backend := backend_of(run.cluster), LaterBackend):
        return None
    command = [str(Path(sys.argv[0]).resolve()), *arguments]
    try:
        return backend.start_later(command, run.root.expanduser().absolute() / "later")
    except SilentError as error:
        raise PlanError(f"cluster.after: the scheduler does not answer: {error}") from error
