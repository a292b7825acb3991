"""Many SwiGLUs in three parameters, each applied to its own segment of rows by grouped matrix products."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class Experts(nn.Module):
    """w2[e](silu(w1[e] x) * w3[e] x) for the rows of expert e."""

    def __init__(self, n_experts: int, dim: int, hidden: int) -> None:
        super().__init__()
        self.w1 = nn.Parameter(torch.empty(n_experts, hidden, dim))
        self.w2 = nn.Parameter(torch.empty(n_experts, dim, hidden))
        self.w3 = nn.Parameter(torch.empty(n_experts, hidden, dim))

    def forward(self, rows: Tensor, counts: Tensor, weights: Tensor | None = None) -> Tensor:
        """rows (n, dim), those of expert 0 first; counts (n_experts); weights (n) fp32 scale the result; -> (n, dim).

        bf16 on Hopper and later runs without a wait for the device; other dtypes and devices take torch's own loop.
        """
        w1, w2, w3 = self.matrices()
        ends = counts.cumsum(0, dtype=torch.int32)
        gate = F.grouped_mm(rows, w1.mT, offs=ends)
        hidden = F.silu(gate) * F.grouped_mm(rows, w3.mT, offs=ends)
        if weights is not None:
            # w2 is linear: scaling what enters it scales the result, which then needs not be kept for the backward.
            hidden = (hidden * weights.unsqueeze(-1)).to(rows.dtype)
        return F.grouped_mm(hidden, w2.mT, offs=ends)

    def matrices(self) -> tuple[Tensor, Tensor, Tensor]:
        """w1, w2, w3 of the experts that are here; a layout that cuts the parameters puts its own in the place."""
        return self.w1, self.w2, self.w3
