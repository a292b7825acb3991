"""The pre-norm block and its feed forward, a SwiGLU (Shazeer 2020, arXiv 2002.05202)."""

from typing import TYPE_CHECKING

import torch.nn.functional as F
from torch import Tensor, nn

from src.models.kernels.fused_swiglu import fused_swiglu

if TYPE_CHECKING:
    from src.models.attention.cores import Mask


class FeedForward(nn.Module):
    """w2(silu(w1 x) * w3 x): (..., dim) -> (..., dim) through `hidden` features."""

    fused = False  # whether a layout brings w1 and w3 in one matrix, for fewer passes over what they make
    w13: nn.Parameter | None  # that matrix, w1 over w3 (2 * hidden, dim), while it is there

    def __init__(self, dim: int, hidden: int) -> None:
        super().__init__()
        self.w1 = nn.Linear(dim, hidden, bias=False)
        self.w2 = nn.Linear(hidden, dim, bias=False)
        self.w3 = nn.Linear(dim, hidden, bias=False)
        self.register_parameter("w13", None)

    def gates(self) -> tuple[Tensor, Tensor]:
        """What `w13` has in one, with w1 first."""
        return self.w1.weight, self.w3.weight

    def forward(self, x: Tensor) -> Tensor:
        if self.w13 is not None:
            return fused_swiglu(x, self.w13, self.w2.weight)
        result: Tensor = self.w2(F.silu(self.w1(x)) * self.w3(x))
        return result


class Block(nn.Module):
    """x + attention(norm(x)), then x + feed forward or experts(norm(x))."""

    feed_forward: FeedForward
    moe: nn.Module

    def __init__(self, dim: int, norm_eps: float, attention: nn.Module, *, moe: nn.Module | None, hidden: int) -> None:
        """`attention`: (batch, length, dim), rotary, mask -> the same; `hidden`: of the feed forward, without `moe`."""
        super().__init__()
        self.attention_norm = nn.RMSNorm(dim, eps=norm_eps)
        self.attention = attention
        self.ffn_norm = nn.RMSNorm(dim, eps=norm_eps)
        self.dense = moe is None
        if moe is None:
            self.feed_forward = FeedForward(dim, hidden)
        else:
            self.moe = moe

    def forward(self, x: Tensor, rotary: Tensor, mask: "Mask | None") -> tuple[Tensor, Tensor | None]:
        """The hidden state, and how many tokens each expert got."""
        x, normed = self.attend(x, rotary, mask)
        if self.dense:
            return x + self.feed_forward(normed), None
        routed, counts = self.moe(normed)
        return x + routed, counts

    def attend(self, x: Tensor, rotary: Tensor, mask: "Mask | None") -> tuple[Tensor, Tensor]:
        """The stream behind the attention, and its norm: all that comes before the tokens part."""
        x = x + self.attention(self.attention_norm(x), rotary, mask)
        return x, self.ffn_norm(x)
