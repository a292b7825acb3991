"""DeepSeek-V3 (arXiv 2412.19437) and, by its numbers, V2 (arXiv 2405.04434): latent attention, mixture of experts.

Reads alone, on one device. Weights are [out, in] without biases; rotary pairs are interleaved, as in the released
weights. Layouts live in src/distributed.
"""

import torch
from torch import Tensor, nn

from src.models.attention.cores import CausalAttention, FlexAttention, Mask
from src.models.block import Block
from src.models.decoder import Decoder
from src.models.deepseek_v3.config import DeepseekV3Config
from src.models.moe.moe import MoE
from src.models.mtp.module import MultiTokenPredictor, PredictionModule
from src.models.rope import inverse_frequencies, rotate, scale_yarn


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
            self.q_norm = nn.RMSNorm(rank, eps=config.inner_norm_eps)
            self.wq_b = nn.Linear(rank, queries, bias=False)
        self.wkv_a = nn.Linear(config.dim, self.latent + self.rope, bias=False)
        self.kv_norm = nn.RMSNorm(self.latent, eps=config.inner_norm_eps)
        self.wkv_b = nn.Linear(self.latent, config.n_heads * (self.nope + self.value), bias=False)
        self.wo = nn.Linear(config.n_heads * self.value, config.dim, bias=False)
        self.core = CausalAttention() if config.attention == "sdpa" else FlexAttention()

    def forward(self, x: Tensor, rotary: Tensor, mask: Mask | None) -> Tensor:
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


class DeepseekV3(Decoder):
    """The whole model, or a part of its pipeline: see `Decoder`."""

    config: DeepseekV3Config

    def __init__(self, config: DeepseekV3Config) -> None:
        def block(layer: int) -> Block:
            moe = None
            if layer >= config.n_dense_layers:
                moe = MoE(config.dim, config.moe, balanced=layer not in config.moe.unbalanced_layers)
            return Block(config.dim, config.norm_eps, LatentAttention(config), moe=moe, hidden=config.ffn_dim)

        def module(depth: int) -> PredictionModule:
            return PredictionModule(config.dim, config.norm_eps, block(config.n_layers + depth))

        depths = config.mtp.depths
        mtp = MultiTokenPredictor(config.mtp, map(module, range(depths))) if depths else None
        super().__init__(config, map(block, range(config.n_layers)), config.qk_rope_head_dim, mtp)

    @property
    def rotary_factor(self) -> float:
        return 1.0 if self.config.rope_scaling is None else self.config.rope_scaling.attention_factor

    def frequencies(self) -> Tensor:
        frequencies = inverse_frequencies(self.config.qk_rope_head_dim, self.config.rope_theta)
        if (yarn := self.config.rope_scaling) is None:
            return frequencies
        return scale_yarn(
            frequencies,
            theta=self.config.rope_theta,
            factor=yarn.factor,
            original=yarn.original,
            beta_fast=yarn.beta_fast,
            beta_slow=yarn.beta_slow,
        )
