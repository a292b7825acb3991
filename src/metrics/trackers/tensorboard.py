"""TensorBoard event files in the run folder."""

from collections.abc import Mapping
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from pydantic import model_validator

from src.config.base import Config
from src.config.bounds import Count


class EventFiles(Config):
    flush_seconds: Count
    """Seconds between writes to <run folder>/tensorboard."""

    @model_validator(mode="after")
    def _is_installed(self) -> "EventFiles":
        if find_spec("tensorboard") is None:
            raise ValueError(
                "the package tensorboard is not installed; pip install tensorboard, or choose tracker=jsonl"
            )
        return self

    def sink(self, folder: Path) -> "EventFileSink":
        return EventFileSink(folder / "tensorboard", self.flush_seconds)


class EventFileSink:
    name = "tensorboard"

    def __init__(self, folder: Path, flush_seconds: int) -> None:
        self._folder = folder
        self._flush_seconds = flush_seconds
        self._writer: Any = None

    def open(self) -> None:
        self._folder.mkdir(exist_ok=True)

    def record(self, step: int, values: Mapping[str, float]) -> None:
        writer = self._writer_from(step)
        for name, value in values.items():
            writer.add_scalar(name, value, step)

    def image(self, step: int, name: str, path: Path) -> None:
        from matplotlib.image import imread

        self._writer_from(step).add_image(name, imread(path), step, dataformats="HWC")

    def finish(self, _succeeded: bool, /) -> None:
        if self._writer is not None:
            self._writer.close()

    def _writer_from(self, step: int) -> Any:
        """Made at this attempt's first point: later points of earlier attempts were lost and are hidden."""
        if self._writer is None:
            from torch.utils.tensorboard import SummaryWriter

            self._writer = SummaryWriter(str(self._folder), purge_step=step, flush_secs=self._flush_seconds)
        return self._writer
