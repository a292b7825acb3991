"""How initialisation and learning rates follow the width of a model: the section `parametrization`.

muP (arXiv 2203.03466) chooses both so that what a step does to activations is the same at every width; then what is
best for a narrow model is best for a wide one. Factors that the paper writes in front of logits are in the weights
here, as its table 3 has them: a model computes, is exported and is served as any other.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from difflib import get_close_matches
from math import sqrt
from typing import TYPE_CHECKING, Any

from pydantic import ValidationError

from src.config.base import Config
from src.config.bounds import Width
from src.models.accounting import Weight
from src.models.base import ModelConfig

if TYPE_CHECKING:
    from src.models.parametrization.init import Initializer

# (name, whole shape, heads of attention's matrices) -> rows and columns of the matrices that an update makes orthogonal
# and multiplies by the root of the longer side; None: every number moves by about the learning rate.
Orthogonal = Callable[[str, tuple[int, ...], Mapping[str, tuple[int, int]]], tuple[int, int] | None]


class Parametrization(Config, ABC):
    """Base of every class of the group parametrization."""

    @abstractmethod
    def problems(self, model: ModelConfig) -> list[str]:
        """Why this model cannot have it: key, value, rule, nearest legal value."""

    @abstractmethod
    def initializers(self, model: ModelConfig, own: "Mapping[str, Initializer]") -> "Mapping[str, Initializer]":
        """How parameters start, by name; `own`: as the model says."""

    @abstractmethod
    def rates(self, model: ModelConfig, orthogonal: Orthogonal) -> Mapping[str, float]:
        """By name, what the learning rate of a parameter is multiplied by; 1 where nothing is said."""


class Standard(Parametrization):
    """Initialisation as the model says, one learning rate."""

    def problems(self, model: ModelConfig) -> list[str]:
        return []

    def initializers(self, model: ModelConfig, own: "Mapping[str, Initializer]") -> "Mapping[str, Initializer]":
        return own

    def rates(self, model: ModelConfig, orthogonal: Orthogonal) -> Mapping[str, float]:
        return {}


class MuP(Parametrization):
    """Initialisation and learning rates by which a width trains like base_width does.

    Of a matrix that reads `in` times and writes `out` times as many numbers as that of the base model, the initial
    deviation is multiplied by min(1, sqrt(out / in)) / sqrt(in), the learning rate of AdamW and Lion by 1 / in, and
    that of an orthogonal update by sqrt(out / in) over the root of its longer side's growth (arXiv 2310.17813). Wider
    heads have logits of 1 / width: the root of it beyond 1 / sqrt(width) is in the queries' matrix.
    """

    base_width: Width
    """Width of the residual stream (model.dim) at which learning rate and initialisation are those of the config."""
    base: dict[str, Any]
    """Other keys of model that grow with the width, with their values at base_width, such as {n_heads: 4}."""

    def problems(self, model: ModelConfig) -> list[str]:
        if model.tied:
            return [
                "parametrization=mup: model.tie_word_embeddings=true makes one matrix embedding and head, which need "
                "two learning rates; pass model.tie_word_embeddings=false"
            ]
        if "dim" in self.base:
            return [f"parametrization.base.dim={self.base['dim']}: is base_width={self.base_width}; leave it out"]
        try:
            base = self.base_of(model)
        except ValidationError as error:
            what = f"parametrization.base_width={self.base_width} with base={self.base} makes no model"
            return [f"{what}: {_told(each, model)}" for each in error.errors()]
        if [(each.name, len(each.shape)) for each in base.weights()] != [
            (each.name, len(each.shape)) for each in model.weights()
        ]:
            return [f"parametrization.base={self.base}: has other weights than the model; only sizes may differ"]
        return []

    def base_of(self, model: ModelConfig) -> ModelConfig:
        """The model at base_width. ValidationError where there is none."""
        return type(model).model_validate(_merged(model.model_dump(), {"dim": self.base_width, **self.base}))

    def initializers(self, model: ModelConfig, own: "Mapping[str, Initializer]") -> "Mapping[str, Initializer]":
        import torch

        base = self.base_of(model)
        with torch.device("meta"):
            there = base.build().initializers()
        growth, turn = _growths(model, base), _query_factors(model, base)
        return {
            name: there[name].scaled(min(1.0, sqrt(rows / columns)) / sqrt(columns) * turn.get(name, 1.0))
            for name, (rows, columns) in growth.items()
            if name in own
        }

    def rates(self, model: ModelConfig, orthogonal: Orthogonal) -> Mapping[str, float]:
        base = self.base_of(model)
        growth, turn = _growths(model, base), _query_factors(model, base)
        found = {}
        for now, then in zip(model.weights(), base.weights(), strict=True):
            sides = orthogonal(now.name, now.shape, model.heads())
            before = orthogonal(then.name, then.shape, base.heads())
            if sides is None or before is None:
                factor = 1.0 / growth[now.name][1]
            else:
                rows, columns = (new / old for new, old in zip(sides, before, strict=True))
                factor = sqrt(rows / columns) * sqrt(max(before) / max(sides))
            found[now.name] = factor * turn.get(now.name, 1.0)
        return found


def _told(error: Any, model: ModelConfig) -> str:
    """One of pydantic's errors."""
    key = ".".join(map(str, error["loc"]))
    if error["type"] == "extra_forbidden":
        near = get_close_matches(key, type(model).model_fields, n=1)
        return f"model has no key {key}" + "".join(f"; did you mean {each}?" for each in near)
    return f"model.{key or 'dim'}: {error['msg'].removeprefix('Value error, ')}"


def _growths(model: ModelConfig, base: ModelConfig) -> dict[str, tuple[float, float]]:
    """By weight: how many times as many numbers as the base's it writes and reads."""
    return {now.name: _growth(now, then) for now, then in zip(model.weights(), base.weights(), strict=True)}


def _growth(now: Weight, then: Weight) -> tuple[float, float]:
    if len(now.shape) < 2:
        return 1.0, 1.0
    rows, columns = (new / old for new, old in zip(now.shape[-2:], then.shape[-2:], strict=True))
    return (columns, rows) if now.embedding else (rows, columns)  # which reads a token's number and writes a row


def _query_factors(model: ModelConfig, base: ModelConfig) -> dict[str, float]:
    """By name, of the weights that make queries: the base's scale of logits times 1 / width, over 1 / sqrt(width)."""
    factor = sqrt(base.head_widths[0] / model.head_widths[0])
    return {each.name: factor for each in model.weights() if each.name.split(".")[-2] == model.query_weight}


def _merged(below: Mapping[str, Any], above: Mapping[str, Any]) -> dict[str, Any]:
    both = {key for key, value in above.items() if isinstance(value, Mapping) and isinstance(below.get(key), Mapping)}
    return {**below, **above, **{key: _merged(below[key], above[key]) for key in both}}


def grown(model: ModelConfig, base_width: int, base: Mapping[str, Any], width: int) -> ModelConfig:
    """The model at a width: every size of `base` times width / base_width. ValidationError where there is none."""

    def larger(value: Any) -> Any:
        if isinstance(value, Mapping):
            return {key: larger(each) for key, each in value.items()}
        return value * width // base_width if type(value) is int else value

    return type(model).model_validate(_merged(model.model_dump(), {"dim": width, **larger(base)}))
