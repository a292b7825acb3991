"""One of the sets of weights of a merge."""

from dataclasses import dataclass


@dataclass(frozen=True)
class MergePart:
    """Where it lies, and its share."""

    source: str  # run folder, or hf:<folder>
    step: int | None  # None: of an export, which has none
    weight: float  # its share of the mean; all of them add up to 1

    @property
    def name(self) -> str:
        """For people."""
        return self.source if self.step is None else f"{self.source}@{self.step}"
