"""Config of multi-token prediction (model.mtp): how many tokens further, and the weight of their loss. module.py builds
the modules.
"""

from typing import Annotated

from pydantic import Field

from src.config.base import Config
from src.config.bounds import Fraction
from src.models.accounting import Slice, Weight, norm_bytes

MOST_DEPTHS = 16
LossWeight = Annotated[float, Field(ge=0.0, le=100.0)]


class MultiTokenPrediction(Config):
    """Each position also predicts tokens behind the next one, which training alone asks for (arXiv 2412.19437, 2.2)."""

    depths: Annotated[int, Field(ge=0, le=MOST_DEPTHS)]
    """Tokens behind the next one that each position predicts, by a module each (DeepSeek-V3: 1); 0: none."""
    weight: LossWeight
    """Factor on their mean loss, which is added to the loss."""
    later_weight: LossWeight
    """The same in the last part of the run."""
    later_from: Fraction
    """Share of task.steps after which later_weight takes the place of weight; 1: never."""

    def weight_at(self, step: float, steps: float) -> float:
        """Factor on the loss of the step with this number, counted from 0, in a task of `steps` steps."""
        return self.later_weight if step >= self.later_from * steps else self.weight

    def weights(self, unit: str, dim: int) -> tuple[Weight, ...]:
        """Parameters of the module `unit` outside of its block, between vectors of `dim` features."""
        norms = ("embedding_norm", "hidden_norm", "norm")
        return (
            *(Weight(f"{unit}.{name}.weight", (dim,), unit) for name in norms),
            Weight(f"{unit}.projection.weight", (dim, 2 * dim), unit),
        )


def saved_outside(dim: int, cut: Slice) -> int:
    """Bytes of activations that a module saves outside of its block, on one rank: what its three norms read, and the
    two vectors of each token that the projection joins.
    """
    return int(cut.tokens * (3 * norm_bytes(dim, cut) + 2 * cut.element_bytes * dim / cut.tensor))
