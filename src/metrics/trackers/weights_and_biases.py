"""Weights & Biases: one run for a run folder for ever, on our own step axis, offline when it must be."""

import logging
import re
import secrets
import time
from collections.abc import Mapping
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Literal

from pydantic import model_validator

from src.config.base import Config, Names
from src.config.bounds import Seconds
from src.metrics.trackers.addresses import note_address
from src.runs.records import jobs
from src.storage.atomic_write import atomic_write
from src.storage.json_lines import Lines

logger = logging.getLogger(__name__)

ID_FILE = "wandb_id.txt"
LAYERS_OF_A_SECTION = 8
OFFLINE_FILE = "wandb_offline.jsonl"  # when a tracker was opened that no server hears; see src/metrics/trackers/sync.py


class WeightsAndBiases(Config):
    project: str | None
    """Project of the run; null: WANDB_PROJECT, else wandb's own default."""
    entity: str | None
    """Person or team that owns it; null: WANDB_ENTITY, else the key's own."""
    group: str | None
    """Runs shown together; null: those of one sweep."""
    tags: Names
    """Labels of the run."""
    notes: str | None
    """Text shown with the run; null: none."""
    mode: Literal["online", "offline"] | None
    """Mode of wandb; null: WANDB_MODE, and offline without a key."""
    init_seconds: Seconds
    """Seconds for the server to answer; after them the run goes on offline."""

    @model_validator(mode="after")
    def _is_installed(self) -> "WeightsAndBiases":
        if find_spec("wandb") is None:
            raise ValueError("the package wandb is not installed; pip install wandb, or choose tracker=jsonl")
        return self

    def sink(self, folder: Path, facts: Mapping[str, Any], finish_seconds: float) -> "WandbSink":
        return WandbSink(self, folder, facts, finish_seconds)


class WandbSink:
    name = "wandb"

    def __init__(
        self, options: WeightsAndBiases, folder: Path, facts: Mapping[str, Any], finish_seconds: float
    ) -> None:
        self._options = options
        self._folder = folder
        self._facts = facts
        self._finish_seconds = finish_seconds
        self._run: Any = None

    def open(self) -> None:
        """Resume the folder's run. Replayed steps are logged again under their attempt: the server rewinds nothing."""
        import wandb

        mode = self._options.mode or wandb.setup().settings.mode
        if mode == "online":
            try:
                self._run = self._start_online()
            except (wandb.Error, TimeoutError) as error:
                later = f"python -m src.metrics.trackers.sync {self._folder} sends it"
                logger.warning("wandb: %s; logging offline; %s", error, later)
                mode = "offline"
        if self._run is None:
            self._run = self._start(mode)
        if mode == "offline":
            Lines(self._folder / OFFLINE_FILE).append({"time": time.time()})
        self._define()

    def open_online(self) -> None:
        """Open the run to send recorded points. wandb.Error or TimeoutError instead of an offline run."""
        self._run = self._start_online()
        self._define()

    def _define(self) -> None:
        self._run.define_metric("step")
        self._run.define_metric("*", step_metric="step")
        if known := jobs(self._folder):  # of all attempts so far: a run may be of several jobs
            self._run.config.update({"jobs": known}, allow_val_change=True)

    def _start_online(self) -> Any:
        """Asks the server whether it knows the key before a run is begun there; wandb.Error when nobody answers."""
        import wandb

        if not wandb.login(prompt=False):
            raise wandb.Error("no key is configured")
        run = self._start("online")
        if run.url:
            note_address(self._folder, self.name, run.url)
        return run

    def _start(self, mode: str) -> Any:
        import wandb

        options = self._options
        settings = wandb.Settings(
            console="off",  # each rank's log is in the run folder already
            silent=True,
            init_timeout=options.init_seconds,
            finish_timeout=self._finish_seconds,
        )
        return wandb.init(
            project=options.project,
            entity=options.entity,
            group=options.group,
            tags=options.tags,
            notes=options.notes,
            name=self._folder.name,
            dir=self._folder,
            id=run_id(self._folder),
            resume="allow",
            mode=mode,  # type: ignore[arg-type]
            config=dict(self._facts),
            settings=settings,
        )

    def record(self, step: int, values: Mapping[str, float]) -> None:
        self._run.log({"step": step, **{_in_sections(name): value for name, value in values.items()}})

    def image(self, step: int, name: str, path: Path) -> None:
        import wandb

        self._run.log({"step": step, name: wandb.Image(str(path))})

    def finish(self, succeeded: bool, /) -> None:
        self._run.finish(exit_code=0 if succeeded else 1)


def _in_sections(name: str) -> str:
    """experts/layer_13/dead -> experts_of_layers_08-15/dead/layer_13: panels of eight layers make a section."""
    found = re.fullmatch(r"experts/layer_(\d+)/(\w+)", name)
    if found is None:
        return name
    first = int(found[1]) // LAYERS_OF_A_SECTION * LAYERS_OF_A_SECTION
    return f"experts_of_layers_{first:02}-{first + LAYERS_OF_A_SECTION - 1:02}/{found[2]}/layer_{found[1]}"


def run_id(folder: Path) -> str:
    """The id of this folder's wandb run: minted once, then read from the folder."""
    path = folder / ID_FILE
    if not path.exists():
        atomic_write(path, secrets.token_hex(8))
    return path.read_text().strip()
