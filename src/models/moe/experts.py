"""Routed experts: SwiGLU weights stacked in three parameters, applied by grouped matrix products (grouped GEMM).

Rows come sorted by expert; expert e computes on its own segment.
"""

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from src.models.kernels.fused_swiglu import fused_swiglu

# rows (n, in), those of expert 0 first; matrices (num_experts, in, out); ends of the rows of each (num_experts), int32
Product = Callable[[Tensor, Tensor, Tensor], Tensor]


def grouped_product(rows: Tensor, matrices: Tensor, ends: Tensor) -> Tensor:
    """bf16 on Hopper and later runs without a wait for the device; other dtypes and devices take torch's own loop."""
    return F.grouped_mm(rows, matrices, offs=ends)


class Experts(nn.Module):
    """`w2[e] @ (silu(w1[e] @ x) * (w3[e] @ x))` for the rows of expert e."""

    # Another precision puts its own in the place, and says what the number of each expert's rows must be a multiple of.
    product: Product
    multiple: int
    fused = False  # as in src/models/block.py, of each expert's w1 and w3
    w13: nn.Parameter | None

    def __init__(self, num_experts: int, dim: int, hidden: int) -> None:
        super().__init__()
        self.product, self.multiple = grouped_product, 1
        self.w1 = nn.Parameter(torch.empty(num_experts, hidden, dim))
        self.w2 = nn.Parameter(torch.empty(num_experts, dim, hidden))
        self.w3 = nn.Parameter(torch.empty(num_experts, hidden, dim))
        self.register_parameter("w13", None)

    def gates(self) -> tuple[Tensor, Tensor]:
        """What `w13` has in one, with w1 first."""
        return self.w1, self.w3

    def forward(self, rows: Tensor, counts: Tensor, weights: Tensor | None = None) -> Tensor:
        """rows (n, dim), those of expert 0 first; counts (num_experts); weights (n) fp32 scale the result (n, dim)."""
        if self.multiple == 1:
            return self._swiglu(rows, counts.cumsum(0, dtype=torch.int32), weights)
        places, slots, ends = filling(counts, len(rows), self.multiple)
        filled = fill(rows, places, slots)
        scales = None if weights is None else fill(weights.unsqueeze(-1), places, slots).squeeze(-1)
        return unfill(self._swiglu(filled, ends, scales), places, slots)

    def _swiglu(self, rows: Tensor, ends: Tensor, weights: Tensor | None) -> Tensor:
        w1, w2, w3 = self.matrices()
        if self.w13 is not None:
            return fused_swiglu(rows, self.w13, w2, ends, weights)
        hidden = F.silu(self.product(rows, w1.mT, ends)) * self.product(rows, w3.mT, ends)
        if weights is not None:
            # w2 is linear: scaling what enters it scales the result, which then needs not be kept for the backward.
            hidden = (hidden * weights.unsqueeze(-1)).to(rows.dtype)
        return self.product(hidden, w2.mT, ends)

    def matrices(self) -> tuple[Tensor, Tensor, Tensor]:
        """w1, w2, w3 of the experts that are here; a layout that cuts the parameters puts its own in the place."""
        return self.w1, self.w2, self.w3


def filling(counts: Tensor, rows: int, multiple: int) -> tuple[Tensor, Tensor, Tensor]:
    """How to stretch each expert's segment to a multiple of rows, without a wait for the device: the new place of each
    row; the row at each new place, or `rows` where there is none; and where the new segments end (num_experts), int32.

    What no segment needs of the fixed length belongs to the last one.
    """
    experts = len(counts)
    length = -(-(rows + experts * (multiple - 1)) // multiple) * multiple
    ends, stretched = counts.cumsum(0), ((counts + multiple - 1) // multiple * multiple).cumsum(0)
    shifts = F.pad((stretched - ends)[:-1], (1, 0))  # how far the experts before push this one's rows
    numbers = torch.arange(rows, device=counts.device)
    places = numbers + shifts[torch.searchsorted(ends, numbers, right=True)]
    slots = torch.full((length,), rows, device=counts.device).scatter(0, places, numbers)
    is_last = torch.arange(experts, device=counts.device) == experts - 1
    return places, slots, torch.where(is_last, length, stretched).to(torch.int32)


def fill(rows: Tensor, places: Tensor, slots: Tensor) -> Tensor:
    """rows (n, dim) at their new places, with zeros between them."""
    apply: Callable[..., Tensor] = _Fill.apply
    return apply(rows, places, slots)


def unfill(rows: Tensor, places: Tensor, slots: Tensor) -> Tensor:
    """The transpose: (n, dim) again."""
    apply: Callable[..., Tensor] = _Unfill.apply
    return apply(rows, places, slots)


# Each is the other's gradient, and both only gather: see src/models/moe/moe.py.
def _spread(rows: Tensor, slots: Tensor) -> Tensor:
    return F.pad(rows, (0, 0, 0, 1))[slots]


class _Fill(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, rows: Tensor, places: Tensor, slots: Tensor) -> Tensor:
        ctx.save_for_backward(places)
        return _spread(rows, slots)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None]:
        (places,) = ctx.saved_tensors
        return grads[0][places], None, None


class _Unfill(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, rows: Tensor, places: Tensor, slots: Tensor) -> Tensor:
        ctx.save_for_backward(slots)
        return rows[places]

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None]:
        (slots,) = ctx.saved_tensors
        return _spread(grads[0], slots), None, None
