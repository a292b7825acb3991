"""The config section `checkpoint`: when to save, what to keep, what to start from."""

from pathlib import Path
from typing import Annotated, Literal

from pydantic import Field, model_validator

from src.checkpoint.fetched import cached
from src.checkpoint.folder import complete, read_initial
from src.config.base import Config, Place, Url
from src.config.bounds import Steps
from src.storage.remote import is_url

FOREIGN = "hf:"


SLOW_SHARE = 0.5  # of the grace: ranks must agree and finish a step first, and disks have bad days


def hardly_fits(save_seconds: float, grace_seconds: float) -> str | None:
    """A warning when a save that took this long has hardly the time between a stop signal and the end."""
    if save_seconds <= SLOW_SHARE * grace_seconds:
        return None
    return (
        f"a save took {save_seconds:.0f} s, and cluster.grace_seconds={grace_seconds:g} must hold it and a step; "
        f"pass at least {save_seconds / SLOW_SHARE:.0f}"
    )


class Checkpoint(Config):
    every: Literal["auto"] | Steps | None
    """Optimizer steps between two checkpoints; the end and a stop save too; auto: as often as loses the least time to
    failures, by cluster.mtbf_hours_per_gpu; null: never save.
    """
    keep: Annotated[int, Field(ge=2)] | None
    """Newest checkpoints to keep; null: all."""
    keep_every: Steps | None
    """Keep those of every so many optimizer steps for ever, a multiple of `every`; null: none beyond `keep`."""
    keep_best: Annotated[int, Field(ge=1)] | None
    """Keep those with the lowest validation loss, so many, beside the newest; a checkpoint has one if its step was
    validated; null: none.
    """
    asynchronous: bool
    """True: copy to host memory, train on, write meanwhile; false: training waits for the disk."""
    verify: Literal["full", "size"]
    """Check before loading; full: reads every byte (crc32); size: compares file sizes only."""
    export_every: Steps | None
    """Optimizer steps between two exports for transformers, into exports/; null: none."""
    initial: Place | None
    """Start of a new run: a step_XXXXXXXX folder, the newest one of a run folder, the URL of either, or, weights only,
    hf:<folder> or hf:<hub id>[@revision]; null: random weights.
    """
    mirror: Url | None
    """URL under which a folder of the run's name gets a copy of each checkpoint, in the background, such as
    s3://bucket/runs; a start takes the newest whole one of both; null: none.
    """
    progress: Literal["all", "samples", "none"]
    """What of its progress a run takes over from initial, beside weights and moments; all: steps and samples, as one
    that goes on with it; samples: steps begin at 0; none: both begin at 0.
    """
    trusted: bool
    """True: torch reads checkpoints' metadata, pickle that can run any code; false: only what ours hold is read."""

    @model_validator(mode="after")
    def _kept_steps_are_saved_steps(self) -> "Checkpoint":
        if self.keep_every is None or self.every == "auto":  # which becomes a divisor
            return self
        if self.every is None:
            raise ValueError(f"keep_every={self.keep_every} keeps nothing while every=null; set both to null")
        if self.keep_every % self.every:
            nearest = max(1, round(self.keep_every / self.every)) * self.every
            raise ValueError(f"keep_every={self.keep_every} is not a multiple of every={self.every} ({nearest} is)")
        return self

    @model_validator(mode="after")
    def _there_is_something_to_mirror(self) -> "Checkpoint":
        if self.mirror is not None and self.every is None:
            raise ValueError(f"mirror={self.mirror} copies nothing while every=null; set both to null")
        return self

    @model_validator(mode="after")
    def _there_is_progress(self) -> "Checkpoint":
        if self.progress != "all" and (self.initial is None or self.foreign is not None):
            what = "null" if self.initial is None else f"{FOREIGN}..., which are weights alone"
            raise ValueError(f"progress={self.progress} is about a checkpoint, and initial={what}; pass progress=all")
        return self

    @property
    def interval(self) -> int | None:
        """Steps between two checkpoints, which the launcher has decided where they are `auto`; None: never save."""
        assert self.every != "auto", "the launcher chooses: src.launch.auto_cadence"
        return self.every

    def due(self, step: int, *, last: bool) -> bool:
        """Whether to save after `step`; `last` means that nothing follows: the end of the run or a stop."""
        return self.interval is not None and (last or step % self.interval == 0)

    def exports(self, step: int) -> bool:
        """Whether the weights after `step` also become a folder in Hugging Face layout."""
        return self.export_every is not None and step % self.export_every == 0

    @property
    def foreign(self) -> str | None:
        """Behind `hf:` in `initial`: weights in Hugging Face layout, which src/hugging_face reads."""
        text = self.initial
        return text.removeprefix(FOREIGN) if text is not None and text.startswith(FOREIGN) else None

    def here(self, cache: Path) -> "Checkpoint":
        """With the folder of the cache that stands for a URL in `initial`, which the launcher fills."""
        if self.initial is None or not is_url(self.initial):
            return self
        return self.model_copy(update={"initial": str(cached(self.initial, cache))})

    def origin(self, checkpoints: Path) -> Path | None:
        """What a run with this folder of checkpoints starts from: its own newest, else `initial`, else None.

        None too where `initial` is `foreign`: that is no checkpoint.

        Raises CheckpointError when `initial` is needed but is not there.
        """
        own = complete(checkpoints)
        if own:
            return own[-1]
        if self.initial is None or self.foreign is not None:
            return None
        return read_initial(Path(self.initial).expanduser())
