"""The border between two stages of a run."""

from dataclasses import dataclass


@dataclass(frozen=True)
class StageBorder:
    """Where a stage of a run begins: a checkpoint of `step` is of the stage before, with that one's samples.

    `position`: sample at which the stage begins in an order of its own; None: it goes on with the samples before.
    """

    step: int
    position: int | None
