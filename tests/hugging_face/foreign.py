"""Models of transformers, small, and the folders that its `save_pretrained` writes."""

import json
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import nn

from src.config.build import build
from src.hugging_face.load import model_section
from src.models.base import ModelConfig
from tests.models.shapes import NO_MTP

LLAMA: dict[str, Any] = {
    "vocab_size": 96,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 3,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "max_position_embeddings": 128,
    "rope_parameters": {"rope_type": "default", "rope_theta": 500000.0},
}
SCALED = {
    "rope_type": "llama3",
    "rope_theta": 500000.0,
    "factor": 4.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32,
}
YARN = {
    "rope_type": "yarn",
    "rope_theta": 10000.0,
    "factor": 4.0,
    "beta_fast": 4.0,
    "beta_slow": 1.0,
    "mscale": 0.707,
    "mscale_all_dim": 0.707,
    "original_max_position_embeddings": 32,
}
DEEPSEEK: dict[str, Any] = {
    "vocab_size": 96,
    "hidden_size": 64,
    "intermediate_size": 48,
    "moe_intermediate_size": 16,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "n_shared_experts": 2,
    "n_routed_experts": 12,  # two digits: as text, "10" comes before "2"
    "num_experts_per_tok": 3,
    "n_group": 4,
    "topk_group": 2,
    "first_k_dense_replace": 1,
    "q_lora_rank": 40,
    "kv_lora_rank": 24,
    "qk_rope_head_dim": 8,
    "qk_nope_head_dim": 8,
    "v_head_dim": 16,
    "max_position_embeddings": 128,
    "rope_parameters": YARN,
}
ONE_GROUP = {"n_group": 1, "topk_group": 1, "num_mtp_layers": 0}
ONE_BETA = {"beta_fast": 1.0, "mscale": 1.0, "mscale_all_dim": 1.0}
PLAIN = {"rope_parameters": {"rope_type": "default", "rope_theta": 50000.0}}
NO_MSCALE = {key: value for key, value in YARN.items() if not key.startswith("mscale")}
QWEN: dict[str, Any] = {
    "vocab_size": 96,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 24,  # 4 heads of 24 are not 64
    "max_position_embeddings": 128,
    "rope_parameters": {"rope_type": "default", "rope_theta": 1000000.0},
}
QWEN_MOE = {"num_experts": 12, "num_experts_per_tok": 3, "moe_intermediate_size": 16, "norm_topk_prob": True}
MODELS: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("Llama", LLAMA),
    "llama-bytes": ("Llama", LLAMA | {"vocab_size": 258}),
    "llama-tied": ("Llama", LLAMA | {"tie_word_embeddings": True}),
    "llama-scaled": ("Llama", LLAMA | {"rope_parameters": SCALED}),
    "llama-wide-heads": ("Llama", LLAMA | {"head_dim": 16, "intermediate_size": 200}),
    "mistral": ("Mistral", LLAMA | {"sliding_window": None}),
    # Heads that do not divide the width: only as a Mistral does transformers take such a Llama.
    "mistral-odd-heads": (
        "Mistral",
        LLAMA | {"sliding_window": None, "num_attention_heads": 6, "num_key_value_heads": 3, "head_dim": 12},
    ),
    "qwen3": ("Qwen3", QWEN),
    "qwen3-tied": ("Qwen3", QWEN | {"tie_word_embeddings": True}),
    "qwen3-moe": ("Qwen3Moe", QWEN | QWEN_MOE),
    "qwen3-moe-unnormalised": ("Qwen3Moe", QWEN | QWEN_MOE | {"norm_topk_prob": False}),
    "deepseek-v3": ("DeepseekV3", DEEPSEEK | {"num_mtp_layers": 0}),
    "kimi-k2": ("DeepseekV3", DEEPSEEK | ONE_GROUP | {"rope_parameters": YARN | ONE_BETA}),
    "moonlight": ("DeepseekV3", DEEPSEEK | ONE_GROUP | {"rms_norm_eps": 1e-2, "q_lora_rank": None} | PLAIN),
    "deepseek-v3-plain-yarn": ("DeepseekV3", DEEPSEEK | {"rope_parameters": NO_MSCALE}),
    "deepseek-v2": ("DeepseekV2", DEEPSEEK | {"topk_method": "group_limited_greedy", "routed_scaling_factor": 2.0}),
    "deepseek-v2-lite": ("DeepseekV2", DEEPSEEK | {"topk_method": "greedy", "q_lora_rank": None}),
}


def foreign(name: str) -> nn.Module:
    """With weights large enough that every part matters to the logits."""
    family, values = MODELS[name]
    torch.manual_seed(0)
    model: nn.Module = getattr(transformers, f"{family}ForCausalLM")(getattr(transformers, f"{family}Config")(**values))
    for key, parameter in model.named_parameters():
        nn.init.uniform_(parameter, 0.5, 1.5) if "norm" in key else nn.init.normal_(parameter, std=0.2)
    for key, buffer in model.named_buffers():
        if key.endswith("correction_bias"):
            nn.init.normal_(buffer, std=0.1)
    return model.eval()


def saved(name: str, folder: Path, dtype: torch.dtype = torch.float32, shard: str = "100KB") -> nn.Module:
    """As transformers writes it, in several files; returns the model that was written."""
    model = foreign(name).to(dtype)
    model.save_pretrained(folder, max_shard_size=shard)
    if name == "kimi-k2":
        edit(folder / "config.json", model_type="kimi_k2")
    return model


def config_of(folder: Path, **changes: Any) -> ModelConfig:
    """The model that the folder's config.json says."""
    section, _ = model_section(folder)
    rest: dict[str, Any] = {"attention": "sdpa", "mask": "causal", "fixed_block": None}
    if section.get("moe") is not None:
        mixture = {"load_balance_coeff": 1e-3, "unbalanced_layers": [], "force_load_balance": False}
        section["moe"] = mixture | section["moe"]  # type: ignore[operator]
    if "mtp" in section:
        section["mtp"] = NO_MTP | section["mtp"]  # type: ignore[operator]
    top = {"name": "x", "seed": 0, "root": "runs", "folder": None, "dry_run": True}
    built = build({**top, "model": {**section, **rest, **changes}}, sections=("model",))["model"]
    assert isinstance(built, ModelConfig)
    return built


def edit(file: Path, **changes: Any) -> None:
    """Keys of a JSON file."""
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))
