"""Trackio: metrics in files of this machine, shown by `trackio show`; one run for a run folder for ever."""

import secrets
from collections.abc import Mapping
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from pydantic import model_validator

from src.config.base import Config, Line
from src.runs.records import jobs
from src.storage.atomic_write import atomic_write

NAME_FILE = "trackio_name.txt"


class Trackio(Config):
    project: Line
    """Project whose runs are shown together; `trackio show --project` opens it."""
    group: Line | None
    """Runs shown together; null: those of one sweep."""

    @model_validator(mode="after")
    def _is_installed(self) -> "Trackio":
        if find_spec("trackio") is None:
            raise ValueError("the package trackio is not installed; pip install trackio, or choose tracker=jsonl")
        return self

    def sink(self, folder: Path, facts: Mapping[str, Any]) -> "TrackioSink":
        return TrackioSink(self, folder, facts)


class TrackioSink:
    """A replayed step is recorded again, under its attempt. Where the files are is Trackio's own choice: TRACKIO_DIR,
    else its folder of the home directory.
    """

    name = "trackio"

    def __init__(self, options: Trackio, folder: Path, facts: Mapping[str, Any]) -> None:
        self._options = options
        self._folder = folder
        self._facts = facts
        self._run: Any = None

    def open(self) -> None:
        import trackio

        self._run = trackio.init(
            project=self._options.project,
            name=run_name(self._folder),
            group=self._options.group,
            config={**self._facts, "run_folder": str(self._folder), "jobs": list(jobs(self._folder))},
            resume="allow",
            embed=False,
            auto_log_cpu=False,  # memory and throughput are measured already, without one thread more
            auto_log_gpu=False,
        )

    def record(self, step: int, values: Mapping[str, float]) -> None:
        self._run.log(dict(values), step=step)

    def image(self, step: int, name: str, path: Path) -> None:
        import trackio

        self._run.log({name: trackio.Image(str(path))}, step=step)

    def finish(self, _succeeded: bool, /) -> None:
        self._run.finish()


def run_name(folder: Path) -> str:
    """The name of this folder's run in its project, minted once: Trackio resumes by name, and a second root may have a
    folder of the same name.
    """
    path = folder / NAME_FILE
    if not path.exists():
        atomic_write(path, f"{folder.name}-{secrets.token_hex(2)}")
    return path.read_text().strip()
