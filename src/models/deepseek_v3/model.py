"""DeepSeek-V3 (arXiv 2412.19437) and, by its numbers, V2 (arXiv 2405.04434): latent attention, mixture of experts.

Reads alone, on one device. Weights are [out, in] without biases; rotary pairs are interleaved, as in the released
weights. Layouts live in src/distributed.
"""

from collections.abc import Callable, Mapping
from typing import ClassVar

import torch
from torch import Tensor, nn
from torch.nn.attention.flex_attention import BlockMask

from src.models.attention import CausalAttention, FlexAttention
from src.models.cross_entropy import Output
from src.models.decoder import Decoder
from src.models.deepseek_v3.config import DeepseekV3Config
from src.models.feed_forward import FeedForward
from src.models.init import Constant, Initializer, Normal
from src.models.moe.moe import MoE, balance
from src.models.rope import inverse_frequencies, rotary_table, rotate, scale_yarn


class LatentAttention(nn.Module):
    """Multi-head latent attention: keys and values of all heads come from one narrow vector of each token.

    A query or key is a part without position, then a part that turns with it; the turning part of the key is shared by
    all heads. Values have a width of their own.
    """

    def __init__(self, config: DeepseekV3Config) -> None:
        super().__init__()
        self.nope, self.rope, self.value = config.qk_nope_head_dim, config.qk_rope_head_dim, config.v_head_dim
        self.latent, self.scale = config.kv_lora_rank, config.softmax_scale
        queries, rank = config.n_heads * config.qk_head_dim, config.q_lora_rank
        self.low_rank_queries = rank is not None
        if rank is None:
            self.wq = nn.Linear(config.dim, queries, bias=False)
        else:
            self.wq_a = nn.Linear(config.dim, rank, bias=False)
            self.q_norm = nn.RMSNorm(rank, eps=config.norm_eps)
            self.wq_b = nn.Linear(rank, queries, bias=False)
        self.wkv_a = nn.Linear(config.dim, self.latent + self.rope, bias=False)
        self.kv_norm = nn.RMSNorm(self.latent, eps=config.norm_eps)
        self.wkv_b = nn.Linear(self.latent, config.n_heads * (self.nope + self.value), bias=False)
        self.wo = nn.Linear(config.n_heads * self.value, config.dim, bias=False)
        self.core = CausalAttention() if config.attention == "sdpa" else FlexAttention()

    def forward(self, x: Tensor, rotary: Tensor, mask: BlockMask | None) -> Tensor:
        q = self.wq_b(self.q_norm(self.wq_a(x))) if self.low_rank_queries else self.wq(x)
        # -1: as many heads as this rank holds.
        q_nope, q_rope = q.unflatten(-1, (-1, self.nope + self.rope)).split([self.nope, self.rope], dim=-1)
        q = torch.cat([q_nope, rotate(q_rope, rotary)], dim=-1)  # (batch, length, heads, nope + rope)
        latent, k_rope = self.wkv_a(x).split([self.latent, self.rope], dim=-1)
        k_rope = rotate(k_rope.unsqueeze(2), rotary)  # (batch, length, 1, rope)
        kv = self.wkv_b(self.kv_norm(latent)).unflatten(-1, (-1, self.nope + self.value))
        k_nope, v = kv.split([self.nope, self.value], dim=-1)
        k = torch.cat([k_nope, k_rope.expand(-1, -1, k_nope.shape[2], -1)], dim=-1)
        out = self.core(q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2), mask, self.scale)
        result: Tensor = self.wo(out.transpose(1, 2).flatten(-2))
        return result


class Block(nn.Module):
    """x + attention(norm(x)), then x + feed forward or experts(norm(x))."""

    def __init__(self, config: DeepseekV3Config, layer: int) -> None:
        super().__init__()
        self.attention_norm = nn.RMSNorm(config.dim, eps=config.norm_eps)
        self.attention = LatentAttention(config)
        self.ffn_norm = nn.RMSNorm(config.dim, eps=config.norm_eps)
        self.dense = layer < config.n_dense_layers
        if self.dense:
            self.feed_forward = FeedForward(config.dim, config.ffn_dim)
        else:
            self.moe = MoE(config.dim, config.moe, balanced=layer not in config.moe.unbalanced_layers)

    def forward(self, x: Tensor, rotary: Tensor, mask: BlockMask | None) -> tuple[Tensor, Tensor | None]:
        """The hidden state, and how many tokens each expert got."""
        x, normed = self.attend(x, rotary, mask)
        if self.dense:
            return x + self.feed_forward(normed), None
        routed, counts = self.moe(normed)
        return x + routed, counts

    def attend(self, x: Tensor, rotary: Tensor, mask: BlockMask | None) -> tuple[Tensor, Tensor]:
        """The stream behind the attention, and its norm: all that comes before the tokens part."""
        x = x + self.attention(self.attention_norm(x), rotary, mask)
        return x, self.ffn_norm(x)


class DeepseekV3(Decoder):
    """The whole model, or a part of its pipeline: see `Decoder`."""

    roles: ClassVar[Mapping[str, str]] = {
        "tok_embeddings": "embedding",
        "layers.*.attention_norm": "sequence",
        "layers.*.attention": "together",
        "layers.*.attention.wq": "outputs",
        "layers.*.attention.wq_a": "alike",
        "layers.*.attention.q_norm": "alike",
        "layers.*.attention.wq_b": "outputs",
        "layers.*.attention.wkv_a": "alike",
        "layers.*.attention.kv_norm": "alike",
        "layers.*.attention.wkv_b": "outputs",
        "layers.*.attention.wo": "inputs",
        "layers.*.ffn_norm": "sequence",
        "layers.*.feed_forward": "together",
        "layers.*.feed_forward.w1": "outputs",
        "layers.*.feed_forward.w3": "outputs",
        "layers.*.feed_forward.w2": "inputs",
        "layers.*.moe": "mixture",
        "layers.*.moe.router.gate": "alike",
        "layers.*.moe.shared_experts": "shared",
        "layers.*.moe.shared_experts.w1": "outputs",
        "layers.*.moe.shared_experts.w3": "outputs",
        "layers.*.moe.shared_experts.w2": "shared inputs",
        "norm": "sequence",
        "output": "vocabulary",
    }

    config: DeepseekV3Config
    rotary: Tensor  # (max_seq_len, qk_rope_head_dim / 2, 2) fp32

    def __init__(self, config: DeepseekV3Config) -> None:
        super().__init__()
        self.config = config
        self.tok_embeddings = nn.Embedding(config.vocab_size, config.dim)
        self.layers = nn.ModuleDict({str(layer): Block(config, layer) for layer in range(config.n_layers)})
        self.norm = nn.RMSNorm(config.dim, eps=config.norm_eps)
        self.output = Output(config.dim, config.vocab_size)
        shape = (config.max_seq_len, config.qk_rope_head_dim // 2, 2)
        self.register_buffer("rotary", torch.empty(shape), persistent=False)
        self.reset_buffers()

    def tie_weights(self) -> None:
        """Head and embedding are two matrices."""

    def mixtures(self) -> list[MoE]:
        """The mixtures of experts of this part, first to last."""
        found = (getattr(block, "moe", None) for block in self.layers.values())
        return [moe for moe in found if isinstance(moe, MoE)]

    def reset_buffers(self) -> None:
        with torch.device(self.rotary.device):
            frequencies = inverse_frequencies(self.config.qk_rope_head_dim, self.config.rope_theta)
            if (yarn := self.config.rope_scaling) is not None:
                frequencies = scale_yarn(
                    frequencies,
                    theta=self.config.rope_theta,
                    factor=yarn.factor,
                    original=yarn.original,
                    beta_fast=yarn.beta_fast,
                    beta_slow=yarn.beta_slow,
                )
            self.rotary = rotary_table(frequencies, self.config.max_seq_len)
        for moe in self.mixtures():
            moe.reset_buffers()

    def initializers(self) -> dict[str, Initializer]:
        """By parameter name: std 0.02, and less the deeper a matrix writes into the residual stream, or routes."""
        plan: dict[str, Initializer] = {}
        for name, _ in self.named_parameters():
            matrix = name.removesuffix(".weight").rsplit(".", 1)[-1]
            if name == "output.weight":
                plan[name] = Normal(self.config.dim**-0.5, cut=3.0)
            elif name == "tok_embeddings.weight":
                plan[name] = Normal(1.0)
            elif "norm" in matrix:
                plan[name] = Constant(1.0)
            elif matrix in ("wo", "w2", "w3", "gate"):
                plan[name] = Normal(0.02 / (2 * (int(name.split(".")[1]) + 1)) ** 0.5)
            else:
                plan[name] = Normal(0.02)
        return plan

    def graphs(self, *, experts_apart: bool) -> list[tuple[nn.Module, str]]:
        found: list[tuple[nn.Module, str]] = []
        for block in self.layers.values():
            assert isinstance(block, Block)
            if block.dense or not experts_apart:
                found.append((block, "forward"))
                continue
            moe = block.moe
            found += [(block, "attend"), (moe.router, "forward"), (moe.experts, "forward")]
            found += [(moe.shared_experts, "forward")] if moe.shared_experts is not None else []
        return found

    def counters(self) -> list[Tensor]:
        return [moe.tokens_per_expert for moe in self.mixtures()]

    def after_step(self, summed: Callable[[Tensor], Tensor], applied: Tensor) -> None:
        balance(self.mixtures(), summed, applied)

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
            hidden, counts = layer(hidden, rotary, mask)
            # Counted here, where nothing runs a second time for the backward; not in validation, nor in sampling.
            if self.training and counts is not None:
                layer.get_buffer("moe.tokens_per_expert").add_(counts)
        hidden = hidden if self.norm is None else self.norm(hidden)
        return hidden if self.output is None else self.output(hidden, labels=labels)
