"""The pre-norm block and its feed forward, a SwiGLU (Shazeer 2020, arXiv 2002.05202)."""

from typing import TYPE_CHECKING

import torch.nn.functional as F
from torch import Tensor, nn

if TYPE_CHECKING:
    from src.models.attention.cores import Mask


class FeedForward(nn.Module):
    """w2(silu(w1 x) * w3 x): (..., dim) -> (..., dim) through `hidden` features."""

    def __init__(self, dim: int, hidden: int) -> None:
        super().__init__()
        self.w1 = nn.Linear(dim, hidden, bias=False)
        self.w2 = nn.Linear(hidden, dim, bias=False)
        self.w3 = nn.Linear(dim, hidden, bias=False)

    def forward(self, x: Tensor) -> Tensor:
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
