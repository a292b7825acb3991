"""Small model configs that tests share; the released shapes are conf/model's."""

from typing import Any

import torch
from torch import nn

from src.models.base import ModelConfig
from src.models.decoder import Decoder
from src.models.deepseek_v3.config import DeepseekV3Config, Yarn
from src.models.llama3.config import Llama3Config, RopeScaling
from src.models.moe.config import MixtureOfExperts

TINY: dict[str, Any] = {
    "dim": 64,
    "n_layers": 3,
    "n_heads": 8,
    "n_kv_heads": 4,
    "head_dim": None,
    "ffn_dim_multiplier": None,
    "multiple_of": 32,
    "vocab_size": 96,
    "max_seq_len": 128,
    "rope_theta": 500000.0,
    "rope_scaling": None,
    "norm_eps": 1e-5,
    "tie_word_embeddings": False,
    "depth_init": True,
    "attention": "sdpa",
    "mask": "causal",
    "fixed_block": None,
}


def tiny_llama(**changes: Any) -> Llama3Config:
    """A Llama 3 of 0.2 M parameters."""
    return Llama3Config(**(TINY | changes))


SCALED = RopeScaling(factor=4.0, low=1.0, high=4.0, original=32)

TINY_MOE: dict[str, Any] = {
    "num_experts": 8,
    "num_expert_groups": 1,
    "num_limited_groups": 1,
    "top_k": 3,
    "num_shared_experts": 2,
    "hidden_dim": 16,
    "score_func": "softmax",
    "group_score": "top2sum",
    "route_norm": False,
    "route_scale": 1.0,
    "score_before_experts": False,
    "load_balance_coeff": 1e-3,
    "unbalanced_layers": (),
    "force_load_balance": False,
}
NO_MTP: dict[str, Any] = {"depths": 0, "weight": 0.3, "later_weight": 0.1, "later_from": 0.676}
TINY_DEEPSEEK: dict[str, Any] = {
    "dim": 64,
    "n_layers": 3,
    "n_heads": 4,
    "vocab_size": 96,
    "max_seq_len": 128,
    "ffn_dim": 48,
    "n_dense_layers": 1,
    "q_lora_rank": None,
    "kv_lora_rank": 24,
    "qk_nope_head_dim": 8,
    "qk_rope_head_dim": 8,
    "v_head_dim": 16,
    "rope_theta": 10000.0,
    "rope_scaling": None,
    "norm_eps": 1e-6,
    "latent_norm_eps": None,
    "mtp": NO_MTP,
    "attention": "sdpa",
    "mask": "causal",
    "fixed_block": None,
}
STRETCHED = Yarn(factor=8.0, original=32, beta_fast=4.0, beta_slow=1.0, mscale=0.707, attention_factor=1.0)


def tiny_moe(**changes: Any) -> MixtureOfExperts:
    """Eight experts of 16 features."""
    return MixtureOfExperts(**(TINY_MOE | changes))


def tiny_deepseek(*, moe: dict[str, Any] | None = None, **changes: Any) -> DeepseekV3Config:
    """A DeepSeek of 0.1 M parameters; `moe`: changes of its mixture of experts."""
    return DeepseekV3Config(**(TINY_DEEPSEEK | {"moe": tiny_moe(**(moe or {}))} | changes))


def randomised(config: ModelConfig) -> Decoder:
    """The model with weights large enough that every part matters to the logits."""
    torch.manual_seed(0)
    model = config.build()
    for name, parameter in model.named_parameters():
        nn.init.uniform_(parameter, 0.5, 1.5) if "norm" in name else nn.init.normal_(parameter, std=0.2)
    return model
