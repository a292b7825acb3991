"""Llama 3 (arXiv 2407.21783): pre-norm decoder, grouped-query attention, rotary positions, SwiGLU.

Reads alone, on one device. Weights are [out, in] without biases and carry Meta's names; rotary pairs are interleaved,
which is the released weights' own order (Hugging Face permutes them). Layouts live in src/distributed, and need only
`roles`.
"""

from collections.abc import Mapping
from typing import ClassVar

import torch
from torch import Tensor, nn
from torch.nn.attention.flex_attention import BlockMask

from src.models.attention import CausalAttention, FlexAttention
from src.models.cross_entropy import Output
from src.models.decoder import Decoder
from src.models.feed_forward import FeedForward
from src.models.init import Constant, Initializer, Normal
from src.models.llama3.config import Llama3Config
from src.models.rope import inverse_frequencies, rotary_table, rotate, scale_llama3


class Attention(nn.Module):
    """Grouped-query attention (arXiv 2305.13245)."""

    def __init__(self, config: Llama3Config) -> None:
        super().__init__()
        self.head_width = config.head_width
        self.wq = nn.Linear(config.dim, config.n_heads * self.head_width, bias=False)
        self.wk = nn.Linear(config.dim, config.n_kv_heads * self.head_width, bias=False)
        self.wv = nn.Linear(config.dim, config.n_kv_heads * self.head_width, bias=False)
        self.wo = nn.Linear(config.n_heads * self.head_width, config.dim, bias=False)
        self.core = CausalAttention() if config.attention == "sdpa" else FlexAttention()

    def forward(self, x: Tensor, rotary: Tensor, mask: BlockMask | None) -> Tensor:
        # -1: as many heads as this rank holds.
        q = self.wq(x).unflatten(-1, (-1, self.head_width))  # (batch, length, heads, width)
        k = self.wk(x).unflatten(-1, (-1, self.head_width))  # (batch, length, kv heads, width)
        v = self.wv(x).unflatten(-1, (-1, self.head_width))
        q, k = rotate(q, rotary), rotate(k, rotary)
        out = self.core(q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2), mask)
        result: Tensor = self.wo(out.transpose(1, 2).flatten(-2))
        return result


class Block(nn.Module):
    """x + attention(norm(x)), then x + feed forward(norm(x))."""

    def __init__(self, config: Llama3Config) -> None:
        super().__init__()
        self.attention_norm = nn.RMSNorm(config.dim, eps=config.norm_eps)
        self.attention = Attention(config)
        self.ffn_norm = nn.RMSNorm(config.dim, eps=config.norm_eps)
        self.feed_forward = FeedForward(config.dim, config.ffn_dim)

    def forward(self, x: Tensor, rotary: Tensor, mask: BlockMask | None) -> Tensor:
        x = x + self.attention(self.attention_norm(x), rotary, mask)
        result: Tensor = x + self.feed_forward(self.ffn_norm(x))
        return result


class Llama3(Decoder):
    """The whole model, or a part of its pipeline: see `Decoder`."""

    roles: ClassVar[Mapping[str, str]] = {
        "tok_embeddings": "embedding",
        "layers.*.attention_norm": "sequence",
        "layers.*.attention": "gather",
        "layers.*.attention.wq": "columns",
        "layers.*.attention.wk": "columns",
        "layers.*.attention.wv": "columns",
        "layers.*.attention.wo": "rows",
        "layers.*.ffn_norm": "sequence",
        "layers.*.feed_forward": "gather",
        "layers.*.feed_forward.w1": "columns",
        "layers.*.feed_forward.w3": "columns",
        "layers.*.feed_forward.w2": "rows",
        "norm": "sequence",
        "output": "vocabulary",
    }

    config: Llama3Config
    rotary: Tensor  # (max_seq_len, head width / 2, 2) fp32

    def __init__(self, config: Llama3Config) -> None:
        super().__init__()
        self.config = config
        self.tok_embeddings = nn.Embedding(config.vocab_size, config.dim)
        self.layers = nn.ModuleDict({str(layer): Block(config) for layer in range(config.n_layers)})
        self.norm = nn.RMSNorm(config.dim, eps=config.norm_eps)
        self.output = Output(config.dim, config.vocab_size)
        self.register_buffer("rotary", torch.empty(config.max_seq_len, config.head_width // 2, 2), persistent=False)
        self.reset_buffers()
        self.tie_weights()

    def tie_weights(self) -> None:
        if self.config.tied_embeddings:
            assert self.output is not None, "tied weights live on one stage"
            assert self.tok_embeddings is not None, "tied weights live on one stage"
            self.output.weight = self.tok_embeddings.weight

    def reset_buffers(self) -> None:
        with torch.device(self.rotary.device):
            frequencies = inverse_frequencies(self.config.head_width, self.config.rope_theta)
            if (scaling := self.config.rope_scaling) is not None:
                frequencies = scale_llama3(
                    frequencies,
                    factor=scaling.factor,
                    low=scaling.low,
                    high=scaling.high,
                    original=scaling.original,
                )
            self.rotary = rotary_table(frequencies, self.config.max_seq_len)

    def initializers(self) -> dict[str, Initializer]:
        """By parameter name: std 0.02, and less the deeper a projection writes into the residual stream."""
        plan: dict[str, Initializer] = {}
        for name, _ in self.named_parameters():
            if name == "output.weight" or (name == "tok_embeddings.weight" and self.config.tied_embeddings):
                # A shared matrix starts as a head: as an embedding (std 1) its logits would have std dim^0.5.
                plan[name] = Normal(self.config.dim**-0.5, cut=3.0)
            elif name == "tok_embeddings.weight":
                plan[name] = Normal(1.0)
            elif "norm" in name:
                plan[name] = Constant(1.0)
            elif name.rsplit(".", 2)[-2] in ("wo", "w2", "w3"):
                layer = int(name.split(".")[1])
                depth = layer + 1 if self.config.depth_init else self.config.n_layers
                plan[name] = Normal(0.02 / (2 * depth) ** 0.5)
            else:
                plan[name] = Normal(0.02)
        return plan

    def forward(
        self,
        tokens: Tensor,
        labels: Tensor | None = None,
        positions: Tensor | None = None,
        mask: BlockMask | None = None,
    ) -> Tensor:
        hidden = tokens if self.tok_embeddings is None else self.tok_embeddings(tokens)
        rotary = self.rotary if positions is None else self.rotary[positions]
        for layer in self.layers.values():
            hidden = layer(hidden, rotary, mask)
        hidden = hidden if self.norm is None else self.norm(hidden)
        return hidden if self.output is None else self.output(hidden, labels=labels)
