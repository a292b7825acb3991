"""AdamW, torch's fused kernel or our own, which keeps moments of any width."""

from collections.abc import Mapping, Sequence
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any, Self

from pydantic import model_validator

from src.config.bounds import Beta, Epsilon
from src.errors import ConfigError
from src.optim.base import Optimizer, StateDtype, StateTensor, bfloat16_problem

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from src.optim.elementwise import Launches
    from src.optim.owners import Owners


class AdamW(Optimizer):
    """Loshchilov and Hutter 2019, https://arxiv.org/abs/1711.05101, algorithm 2."""

    beta1: Beta
    """Decay of the first moment."""
    beta2: Beta
    """Decay of the second moment."""
    eps: Epsilon
    """Added to the root of the second moment."""
    moments: StateDtype
    """Dtype of both moments; bfloat16: 4 instead of 8 bytes per parameter, needs fused=false."""
    fused: bool
    """True: on a CPU torch's one-kernel update, where weights have the moments' dtype; false: our own, as on a GPU."""

    @model_validator(mode="after")
    def _bfloat16_moments_can_work(self) -> "AdamW":
        if self.moments == "float32":
            return self
        if self.fused:
            raise ValueError("fused=true keeps moments=float32 only; with moments=bfloat16 set fused=false")
        if (problem := bfloat16_problem(beta1=self.beta1, beta2=self.beta2)) is not None:
            raise ValueError(problem)
        return self

    def state(self, name: str, shape: Sequence[int]) -> Mapping[str, StateTensor]:
        moment = StateTensor(self.moments, tuple(shape))
        return {"exp_avg": moment, "exp_avg_sq": moment}

    def smaller_state(self) -> tuple[str, Self] | None:
        if self.moments == "bfloat16" or bfloat16_problem(beta1=self.beta1, beta2=self.beta2) is not None:
            return None
        return "optim=adamw_bf16", self.model_copy(update={"moments": "bfloat16", "fused": False})

    def from_groups(
        self, groups: list[dict[str, Any]], device: "torch.device", owners: "Owners | None"
    ) -> "torch.optim.Optimizer":
        import torch

        from src.optim.elementwise import Elementwise
        from src.optim.fused_adamw import FusedAdamW

        betas = (self.beta1, self.beta2)
        if (launches := own_kernel(groups)) is not None:
            return Elementwise(groups, update, rates, (*betas, self.eps), launches)
        kept = all(each.dtype == getattr(torch, self.moments) for group in groups for each in group["params"])
        if not self.fused or not kept:  # torch's kernel keeps moments of the weights' type
            return Elementwise(groups, update, rates, (*betas, self.eps))
        try:
            return FusedAdamW(groups, lr=self.lr, betas=betas, eps=self.eps, fused=True)
        except RuntimeError as error:
            raise ConfigError(f"optim.fused=true is not to be had on {device.type}; set optim.fused=false") from error


def own_kernel(groups: list[dict[str, Any]]) -> "Launches | None":
    """Of src/optim/kernels/adamw.py, where the parameters are on a GPU and Triton is there."""
    if not groups[0]["params"][0].is_cuda or find_spec("triton") is None:
        return None
    from src.optim.kernels.adamw import launches

    return launches


def update(
    weight: "Tensor",
    gradient: "Tensor",
    moments: "Sequence[Tensor]",
    rates: "Sequence[Tensor]",
    beta1: float,
    beta2: float,
    eps: float,
) -> "tuple[Tensor, Sequence[Tensor]]":
    """As `Update` of src/optim/elementwise.py; rates are those below."""
    (rate, root), (first, second) = rates, moments
    first = first.lerp(gradient, 1.0 - beta1)
    second = second * beta2 + gradient.square() * (1.0 - beta2)
    return weight - rate * first / (second.sqrt() * root + eps), (first, second)


def rates(lr: "Tensor", steps: "Tensor", beta1: float, beta2: float, _eps: float) -> "tuple[Tensor, Tensor]":
    """What the direction and the root of the second moment are multiplied by: both correct for moments from zero."""
    return lr / (1.0 - beta1**steps), (1.0 - beta2**steps).rsqrt()
