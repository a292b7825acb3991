"""Small config classes for the tests of `build`."""

from typing import Annotated, Literal

from pydantic import Field, PositiveInt, Strict, model_validator

from src.config.base import Config


class Scaling(Config):
    factor: float
    low: float


class Network(Config):
    n_layers: PositiveInt
    n_heads: PositiveInt
    dropout: Annotated[float, Field(ge=0, lt=1)]
    tied: bool
    mask: Literal["causal", "block_causal"]
    scaling: Scaling | None
    devices: int | Literal["all"]


class Source(Config):
    path: str
    weight: float


class Mixture(Config):
    sources: Annotated[tuple[Source, ...], Strict(strict=False)]
    held_out: Source

    @model_validator(mode="after")
    def _weights(self) -> "Mixture":
        if not sum(source.weight for source in self.sources) > 0:
            raise ValueError("weights must add up to more than 0")
        return self


class Plain:
    """Not a Config."""
