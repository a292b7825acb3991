"""What the section `data` may say: one source, or a mixture of several with weights in tokens."""

from abc import ABC, abstractmethod
from typing import Annotated, Self

from pydantic import Field, model_validator

from src.config.base import Config
from src.config.bounds import PerNode, Scale
from src.data.hub import HubSource
from src.data.sources import Source, StdlibSource, SyntheticSource, TextSource


class Data(Config, ABC):
    """The keys that every choice of `data` has."""

    validation_fraction: Annotated[float, Field(ge=0.0, lt=1.0)]
    mask_document_starts: bool
    document_masks: bool
    max_epochs: Scale | None
    processes: PerNode | None

    @abstractmethod
    def parts(self) -> dict[str, tuple[float, Source]]:
        """By name: the weight of a source (not normalised) and the source."""


class Stdlib(StdlibSource, Data):
    def parts(self) -> dict[str, tuple[float, Source]]:
        return {"stdlib": (1.0, self)}


class Text(TextSource, Data):
    def parts(self) -> dict[str, tuple[float, Source]]:
        return {"text": (1.0, self)}


class Hub(HubSource, Data):
    def parts(self) -> dict[str, tuple[float, Source]]:
        return {"hub": (1.0, self)}


class Synthetic(SyntheticSource, Data):
    def parts(self) -> dict[str, tuple[float, Source]]:
        return {"synthetic": (1.0, self)}


class Mixture(Data):
    """Every prefix of the sample order holds the weights, to within one sample of each source."""

    sources: dict[str, Source]
    weights: dict[str, Scale]

    @model_validator(mode="after")
    def _names_agree(self) -> Self:
        if not self.sources:
            raise ValueError("data.sources is empty: name at least one source")
        if self.sources.keys() != self.weights.keys():
            raise ValueError(
                f"data.weights names {', '.join(self.weights)} but data.sources names {', '.join(self.sources)}: "
                "give each source one weight"
            )
        return self

    def parts(self) -> dict[str, tuple[float, Source]]:
        return {name: (self.weights[name], self.sources[name]) for name in sorted(self.sources)}
