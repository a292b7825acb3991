"""Llama 3 (arXiv 2407.21783): pre-norm decoder, grouped-query attention, rotary positions, SwiGLU.

Reads alone, on one device. Weights are [out, in] without biases and carry Meta's names; rotary pairs are interleaved,
which is the released weights' own order (Hugging Face permutes them). Layouts live in src/distributed, and need only
`roles`.
"""

from torch import Tensor, nn

from src.models.attention.cores import CausalAttention, FlexAttention, Mask
from src.models.block import Block
from src.models.decoder import Decoder
from src.models.llama3.config import Llama3Config
from src.models.rope import inverse_frequencies, rotate, scale_llama3


class Llama3Attention(nn.Module):
    """Grouped-query attention (arXiv 2305.13245)."""

    def __init__(self, config: Llama3Config) -> None:
        super().__init__()
        self.head_width = config.head_width
        self.wq = nn.Linear(config.dim, config.n_heads * self.head_width, bias=False)
        self.wk = nn.Linear(config.dim, config.n_kv_heads * self.head_width, bias=False)
        self.wv = nn.Linear(config.dim, config.n_kv_heads * self.head_width, bias=False)
        self.wo = nn.Linear(config.n_heads * self.head_width, config.dim, bias=False)
        self.core = CausalAttention() if config.attention == "sdpa" else FlexAttention()

    def forward(self, x: Tensor, rotary: Tensor, mask: Mask | None) -> Tensor:
        # -1: as many heads as this rank holds.
        q = self.wq(x).unflatten(-1, (-1, self.head_width))  # (batch, length, heads, width)
        k = self.wk(x).unflatten(-1, (-1, self.head_width))  # (batch, length, kv heads, width)
        v = self.wv(x).unflatten(-1, (-1, self.head_width))
        q, k = rotate(q, rotary), rotate(k, rotary)
        out = self.core(q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2), mask)
        result: Tensor = self.wo(out.transpose(1, 2).flatten(-2))
        return result


class Llama3(Decoder):
    """The whole model, or a part of its pipeline: see `Decoder`."""

    config: Llama3Config

    def __init__(self, config: Llama3Config) -> None:
        blocks = (
            Block(config.dim, config.norm_eps, Llama3Attention(config), moe=None, hidden=config.ffn_dim)
            for _ in range(config.n_layers)
        )
        super().__init__(config, blocks, config.head_width)

    def frequencies(self) -> Tensor:
        frequencies = inverse_frequencies(self.config.head_width, self.config.rope_theta)
        if (scaling := self.config.rope_scaling) is None:
            return frequencies
        return scale_llama3(
            frequencies, factor=scaling.factor, low=scaling.low, high=scaling.high, original=scaling.original
        )

    def depth(self, layer: int) -> int:
        return layer + 1 if self.config.depth_init else self.config.n_layers
