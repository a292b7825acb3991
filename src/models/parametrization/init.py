"""Initializers of single weights, applied to the whole tensor whatever its sharding."""

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Normal:
    """N(0, std^2), cut at +-`cut` standard deviations when given."""

    std: float
    cut: float | None = None

    def scaled(self, factor: float) -> "Normal":
        """The same numbers times `factor`."""
        return Normal(self.std * factor, self.cut)

    def fill(self, weight: Tensor, generator: torch.Generator) -> None:
        """Draw the values, in place; `weight` is fp32 and whole."""
        weight.normal_(0.0, self.std, generator=generator)
        if self.cut is None:
            return
        # What lies outside is drawn again. torch's trunc_normal_ draws other numbers in 2.13 than in 2.11, where its
        # uniform draw could hit an end point besides, about once in 2^24 samples.
        while (outside := weight.abs() > self.cut * self.std).any():
            again = torch.empty(int(outside.sum()), device=weight.device)
            weight[outside] = again.normal_(0.0, self.std, generator=generator)


@dataclass(frozen=True)
class Constant:
    """Every element the same."""

    value: float

    def scaled(self, factor: float) -> "Constant":
        """The same number times `factor`."""
        return Constant(self.value * factor)

    def fill(self, weight: Tensor, generator: torch.Generator) -> None:
        """Set every element, in place; the generator is not used."""
        weight.fill_(self.value)


Initializer = Normal | Constant
