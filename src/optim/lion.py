"""Lion (Chen et al. 2023, https://arxiv.org/abs/2302.06675, program 1): each weight moves by the learning rate."""

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, Self

from pydantic import model_validator

from src.config.bounds import Beta
from src.optim.base import Optimizer, StateDtype, StateTensor, bfloat16_problem

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from src.optim.owners import Owners


class Lion(Optimizer):
    """Moves along the sign of a momentum; one moment instead of two."""

    beta1: Beta
    """Share of the momentum in the direction of a step."""
    beta2: Beta
    """Decay of the momentum."""
    moments: StateDtype
    """Dtype of the momentum; bfloat16: 2 instead of 4 bytes per parameter."""

    @model_validator(mode="after")
    def _a_bfloat16_momentum_can_work(self) -> "Lion":
        if self.moments == "bfloat16" and (problem := bfloat16_problem(beta2=self.beta2)) is not None:
            raise ValueError(problem)
        return self

    def state(self, name: str, shape: Sequence[int]) -> Mapping[str, StateTensor]:
        return {"exp_avg": StateTensor(self.moments, tuple(shape))}

    def smaller_state(self) -> tuple[str, Self] | None:
        if self.moments == "bfloat16" or bfloat16_problem(beta2=self.beta2) is not None:
            return None
        return "optim.moments=bfloat16", self.model_copy(update={"moments": "bfloat16"})

    def from_groups(
        self, groups: list[dict[str, Any]], device: "torch.device", owners: "Owners | None"
    ) -> "torch.optim.Optimizer":
        from src.optim.elementwise import Elementwise, learning_rate

        return Elementwise(groups, update, learning_rate, (self.beta1, self.beta2))


def update(
    weight: "Tensor", gradient: "Tensor", state: "Sequence[Tensor]", rates: "Sequence[Tensor]", *betas: float
) -> "tuple[Tensor, Sequence[Tensor]]":
    (momentum,), (beta1, beta2) = state, betas
    return weight - rates[0] * momentum.lerp(gradient, 1.0 - beta1).sign(), (momentum.lerp(gradient, 1.0 - beta2),)
