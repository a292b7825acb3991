"""How one weight starts. A model names an initializer for every parameter; who owns which slice of it is not its
concern.
"""

from dataclasses import dataclass

import torch
from torch import Tensor, nn


@dataclass(frozen=True)
class Normal:
    """N(0, std^2), cut at +-`cut` standard deviations when given."""

    std: float
    cut: float | None = None

    def fill(self, weight: Tensor, generator: torch.Generator) -> None:
        """In place; `weight` is fp32 and whole."""
        if self.cut is None:
            # Bounds of +-2 at std 0.02 are 100 sigma away. torch's trunc_normal_ is not used for them: its uniform
            # draw can
            # hit the end point, about once in 2^24 samples, and leaves a weight of -2.
            weight.normal_(0.0, self.std, generator=generator)
        else:
            bound = self.cut * self.std
            nn.init.trunc_normal_(weight, 0.0, self.std, -bound, bound, generator=generator)


@dataclass(frozen=True)
class Constant:
    """Every element the same."""

    value: float

    def fill(self, weight: Tensor, generator: torch.Generator) -> None:
        """In place; the generator is not used."""
        weight.fill_(self.value)


Initializer = Normal | Constant
