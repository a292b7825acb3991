"""Qwen3 (arXiv 2505.09388), dense or with experts: grouped-query attention whose queries and keys are normed, SwiGLU.

Weights are [out, in] without biases; rotary pairs are interleaved (transformers stores halves).
"""

from torch import Tensor, nn

from src.models.attention.cores import CausalAttention, FlexAttention, Mask
from src.models.block import Block
from src.models.decoder import Decoder
from src.models.moe.moe import MoE
from src.models.qwen3.config import Qwen3Config
from src.models.rope import inverse_frequencies, rotate


class Qwen3Attention(nn.Module):
    """Grouped-query attention; one norm for the queries of all heads, one for the keys, each over a single head."""

    def __init__(self, config: Qwen3Config) -> None:
        super().__init__()
        self.head_dim = config.head_dim
        self.wq = nn.Linear(config.dim, config.n_heads * config.head_dim, bias=False)
        self.wk = nn.Linear(config.dim, config.n_kv_heads * config.head_dim, bias=False)
        self.wv = nn.Linear(config.dim, config.n_kv_heads * config.head_dim, bias=False)
        self.q_norm = nn.RMSNorm(config.head_dim, eps=config.norm_eps)
        self.k_norm = nn.RMSNorm(config.head_dim, eps=config.norm_eps)
        self.wo = nn.Linear(config.n_heads * config.head_dim, config.dim, bias=False)
        self.core = CausalAttention() if config.attention == "sdpa" else FlexAttention()

    def forward(self, x: Tensor, rotary: Tensor, mask: Mask | None) -> Tensor:
        # (batch, length, heads, head_dim) each; -1: as many heads as this rank holds.
        q, k, v = (matrix(x).unflatten(-1, (-1, self.head_dim)) for matrix in (self.wq, self.wk, self.wv))
        q, k = rotate(self.q_norm(q), rotary), rotate(self.k_norm(k), rotary)
        out = self.core(q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2), mask)
        result: Tensor = self.wo(out.transpose(1, 2).flatten(-2))
        return result


class Qwen3(Decoder):
    """The whole model, or a part of its pipeline: see `Decoder`."""

    config: Qwen3Config

    def __init__(self, config: Qwen3Config) -> None:
        def block(layer: int) -> Block:
            moe = None
            if config.moe is not None:
                moe = MoE(config.dim, config.moe, balanced=layer not in config.moe.unbalanced_layers)
            return Block(config.dim, config.norm_eps, Qwen3Attention(config), moe=moe, hidden=config.ffn_dim or 0)

        super().__init__(config, map(block, range(config.n_layers)), config.head_dim)

    def frequencies(self) -> Tensor:
        return inverse_frequencies(self.config.head_dim, self.config.rope_theta)
