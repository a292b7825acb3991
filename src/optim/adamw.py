"""AdamW as a config section, and its parameter groups."""

from collections.abc import Iterable
from typing import TYPE_CHECKING, Annotated, Any, Literal

from pydantic import Field, NonNegativeFloat, PositiveFloat, model_validator

from src.config.base import Config
from src.errors import ConfigError

if TYPE_CHECKING:
    import torch
    from torch import nn

Beta = Annotated[float, Field(ge=0.0, lt=1.0)]

# bfloat16 keeps 8 bits: a value that shrinks by less than 2**-8 in a step can round back to itself and never fall.
SLOWEST_BFLOAT16_BETA = 1.0 - 2.0**-8


class AdamW(Config):
    lr: PositiveFloat
    beta1: Beta
    beta2: Beta
    eps: PositiveFloat
    weight_decay: NonNegativeFloat
    decay_norms_and_embeddings: bool
    max_norm: PositiveFloat | None
    moments: Literal["float32", "bfloat16"]
    fused: bool

    @model_validator(mode="after")
    def _bfloat16_moments_can_work(self) -> "AdamW":
        if self.moments == "float32":
            return self
        if self.fused:
            raise ValueError("fused=true keeps moments=float32 only; with moments=bfloat16 set fused=false")
        for name, beta in (("beta1", self.beta1), ("beta2", self.beta2)):
            if beta > SLOWEST_BFLOAT16_BETA:
                raise ValueError(
                    f"{name}={beta} never decays in moments=bfloat16; at most {SLOWEST_BFLOAT16_BETA} does"
                )
        return self

    def build(
        self, named_parameters: "Iterable[tuple[str, nn.Parameter]]", device: "torch.device"
    ) -> "torch.optim.Optimizer":
        """The optimizer of the parameters that ask for gradients, with zero state in place.

        Two attributes, 0-dim float32 tensors on the device, are read in each step, and the host never waits to know:
        where `found_inf` is 1 everything stays as it is, and gradients are divided by `grad_scale`.
        """
        import torch

        from src.optim.state import materialise
        from src.optim.update import PlainAdamW

        groups = self._groups(named_parameters)
        betas = (self.beta1, self.beta2)
        optimizer: torch.optim.Optimizer
        if self.fused:
            try:
                optimizer = torch.optim.AdamW(groups, lr=self.lr, betas=betas, eps=self.eps, fused=True)
            except RuntimeError as error:
                raise ConfigError(
                    f"optim.fused=true is not to be had on {device.type}; set optim.fused=false"
                ) from error
        else:
            moments = torch.bfloat16 if self.moments == "bfloat16" else torch.float32
            optimizer = PlainAdamW(groups, lr=self.lr, betas=betas, eps=self.eps, moments=moments)
        materialise(optimizer)
        return optimizer

    def _groups(self, named_parameters: "Iterable[tuple[str, nn.Parameter]]") -> list[dict[str, Any]]:
        """Two groups at most, with and without weight decay, on each device mesh: torch's kernels take one mesh."""
        groups: dict[tuple[bool, object], list[nn.Parameter]] = {}
        for name, parameter in named_parameters:
            if parameter.requires_grad:
                key = (self._decays(name, parameter), getattr(parameter, "device_mesh", None))
                groups.setdefault(key, []).append(parameter)
        return [
            {"params": parameters, "weight_decay": self.weight_decay if decays else 0.0}
            for (decays, _), parameters in groups.items()
        ]

    def _decays(self, name: str, parameter: "nn.Parameter") -> bool:
        return self.decay_norms_and_embeddings or (parameter.ndim > 1 and "tok_embeddings" not in name.split("."))
