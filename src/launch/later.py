"""A command whose data are still being prepared: handed to a small job behind the jobs that prepare them."""

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from src.cluster.backend import LaterBackend, SilentError, backend_of
from src.errors import PlanError

if TYPE_CHECKING:
    from src.run import Run


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
