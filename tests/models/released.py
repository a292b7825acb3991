"""config.json of released models, as their pages have it, and the parameters that their cards publish."""

from typing import Any

LLAMA: dict[str, Any] = {
    "model_type": "llama",
    "attention_bias": False,
    "hidden_act": "silu",
    "mlp_bias": False,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "pretraining_tp": 1,
    "rms_norm_eps": 1e-05,
    "rope_theta": 500000.0,
    "torch_dtype": "bfloat16",
    "vocab_size": 128256,
    "max_position_embeddings": 131072,
}
STRETCH = {
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
    "rope_type": "llama3",
}
MISTRAL: dict[str, Any] = {
    "model_type": "mistral",
    "hidden_act": "silu",
    "intermediate_size": 14336,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "rms_norm_eps": 1e-05,
    "rope_theta": 1000000.0,
    "sliding_window": None,
    "tie_word_embeddings": False,
}
QWEN: dict[str, Any] = {
    "model_type": "qwen3",
    "attention_bias": False,
    "head_dim": 128,
    "hidden_act": "silu",
    "max_position_embeddings": 40960,
    "num_key_value_heads": 8,
    "rms_norm_eps": 1e-06,
    "rope_scaling": None,
    "rope_theta": 1000000,
    "sliding_window": None,
    "tie_word_embeddings": False,
    "use_sliding_window": False,
    "vocab_size": 151936,
}
QWEN_MOE = QWEN | {
    "model_type": "qwen3_moe",
    "decoder_sparse_step": 1,
    "mlp_only_layers": [],
    "norm_topk_prob": True,
    "num_experts": 128,
    "num_experts_per_tok": 8,
    "num_key_value_heads": 4,
    "router_aux_loss_coef": 0.001,
}
YARN = {"beta_fast": 32, "beta_slow": 1, "factor": 40, "original_max_position_embeddings": 4096, "type": "yarn"}
DEEPSEEK: dict[str, Any] = {
    "attention_bias": False,
    "attention_dropout": 0.0,
    "aux_loss_alpha": 0.001,
    "ep_size": 1,
    "hidden_act": "silu",
    "kv_lora_rank": 512,
    "max_position_embeddings": 163840,
    "moe_layer_freq": 1,
    "pretraining_tp": 1,
    "qk_nope_head_dim": 128,
    "qk_rope_head_dim": 64,
    "rms_norm_eps": 1e-06,
    "rope_theta": 10000,
    "seq_aux": True,
    "tie_word_embeddings": False,
    "v_head_dim": 128,
}
V2 = DEEPSEEK | {
    "model_type": "deepseek_v2",
    "first_k_dense_replace": 1,
    "n_shared_experts": 2,
    "norm_topk_prob": False,
    "num_experts_per_tok": 6,
    "scoring_func": "softmax",
    "vocab_size": 102400,
}
V3 = DEEPSEEK | {
    "model_type": "deepseek_v3",
    "hidden_size": 7168,
    "intermediate_size": 18432,
    "moe_intermediate_size": 2048,
    "n_shared_experts": 1,
    "norm_topk_prob": True,
    "num_experts_per_tok": 8,
    "num_hidden_layers": 61,
    "q_lora_rank": 1536,
    "scoring_func": "sigmoid",
    "topk_method": "noaux_tc",
}
FP8 = {"activation_scheme": "dynamic", "fmt": "e4m3", "quant_method": "fp8", "weight_block_size": [128, 128]}


def sizes(hidden: int, intermediate: int, layers: int, **more: Any) -> dict[str, Any]:
    return {"hidden_size": hidden, "intermediate_size": intermediate, "num_hidden_layers": layers, **more}


DEEPSEEK_V3: dict[str, Any] = V3 | {
    "first_k_dense_replace": 3,
    "n_group": 8,
    "n_routed_experts": 256,
    "num_attention_heads": 128,
    "num_key_value_heads": 128,
    "num_nextn_predict_layers": 1,
    "quantization_config": FP8,
    "rope_scaling": YARN | {"mscale": 1.0, "mscale_all_dim": 1.0},
    "routed_scaling_factor": 2.5,
    "topk_group": 4,
    "vocab_size": 129280,
}
# By id on the hub.
RELEASED: dict[str, dict[str, Any]] = {
    "meta-llama/Llama-3.2-1B": LLAMA
    | sizes(2048, 8192, 16, head_dim=64, tie_word_embeddings=True, rope_scaling=STRETCH | {"factor": 32.0}),
    "meta-llama/Llama-3.2-3B": LLAMA
    | sizes(3072, 8192, 28, head_dim=128, num_attention_heads=24, tie_word_embeddings=True)
    | {"rope_scaling": STRETCH | {"factor": 32.0}},
    "meta-llama/Meta-Llama-3-8B": LLAMA
    | sizes(4096, 14336, 32, max_position_embeddings=8192, rope_scaling=None, tie_word_embeddings=False),
    "meta-llama/Llama-3.1-8B": LLAMA | sizes(4096, 14336, 32, rope_scaling=STRETCH | {"factor": 8.0}),
    "meta-llama/Llama-3.1-70B": LLAMA
    | sizes(8192, 28672, 80, num_attention_heads=64, rope_scaling=STRETCH | {"factor": 8.0}),
    "meta-llama/Llama-3.1-405B": LLAMA
    | sizes(16384, 53248, 126, num_attention_heads=128, rope_scaling=STRETCH | {"factor": 8.0}),
    "mistralai/Mistral-7B-v0.3": MISTRAL
    | {"hidden_size": 4096, "num_hidden_layers": 32, "vocab_size": 32768, "max_position_embeddings": 32768},
    "mistralai/Mistral-Nemo-Base-2407": MISTRAL
    | {"hidden_size": 5120, "num_hidden_layers": 40, "vocab_size": 131072, "max_position_embeddings": 131072}
    | {"head_dim": 128},
    "Qwen/Qwen3-0.6B": QWEN | sizes(1024, 3072, 28, num_attention_heads=16, tie_word_embeddings=True),
    "Qwen/Qwen3-1.7B": QWEN | sizes(2048, 6144, 28, num_attention_heads=16, tie_word_embeddings=True),
    "Qwen/Qwen3-4B": QWEN | sizes(2560, 9728, 36, num_attention_heads=32, tie_word_embeddings=True),
    "Qwen/Qwen3-8B": QWEN | sizes(4096, 12288, 36, num_attention_heads=32),
    "Qwen/Qwen3-14B": QWEN | sizes(5120, 17408, 40, num_attention_heads=40),
    "Qwen/Qwen3-32B": QWEN | sizes(5120, 25600, 64, num_attention_heads=64),
    "Qwen/Qwen3-30B-A3B": QWEN_MOE | sizes(2048, 6144, 48, num_attention_heads=32, moe_intermediate_size=768),
    "Qwen/Qwen3-235B-A22B": QWEN_MOE | sizes(4096, 12288, 94, num_attention_heads=64, moe_intermediate_size=1536),
    "deepseek-ai/DeepSeek-V2-Lite": V2
    | sizes(2048, 10944, 27, moe_intermediate_size=1408, num_attention_heads=16, num_key_value_heads=16)
    | {"n_routed_experts": 64, "n_group": 1, "topk_group": 1, "topk_method": "greedy", "routed_scaling_factor": 1.0}
    | {"q_lora_rank": None, "rope_scaling": YARN | {"mscale": 0.707, "mscale_all_dim": 0.707}},
    "deepseek-ai/DeepSeek-V2": V2
    | sizes(5120, 12288, 60, moe_intermediate_size=1536, num_attention_heads=128, num_key_value_heads=128)
    | {"n_routed_experts": 160, "n_group": 8, "topk_group": 3, "topk_method": "group_limited_greedy"}
    | {"q_lora_rank": 1536, "routed_scaling_factor": 16.0}
    | {"rope_scaling": YARN | {"mscale": 1.0, "mscale_all_dim": 1.0}},
    "deepseek-ai/DeepSeek-V3": DEEPSEEK_V3,
    "deepseek-ai/DeepSeek-V3.1": DEEPSEEK_V3 | {"quantization_config": FP8 | {"scale_fmt": "ue8m0"}},
    "moonshotai/Moonlight-16B-A3B": V3
    | sizes(2048, 11264, 27, moe_intermediate_size=1408, num_attention_heads=16, num_key_value_heads=16)
    | {"n_routed_experts": 64, "n_shared_experts": 2, "num_experts_per_tok": 6, "n_group": 1, "topk_group": 1}
    | {"q_lora_rank": None, "first_k_dense_replace": 1, "routed_scaling_factor": 2.446, "vocab_size": 163840}
    | {"rms_norm_eps": 1e-5, "rope_theta": 50000.0, "max_position_embeddings": 8192, "num_nextn_predict_layers": 0},
    "moonshotai/Kimi-K2-Instruct": V3
    | {"model_type": "kimi_k2", "num_attention_heads": 64, "num_key_value_heads": 64, "n_routed_experts": 384}
    | {"n_group": 1, "topk_group": 1, "first_k_dense_replace": 1, "routed_scaling_factor": 2.827, "rope_theta": 50000.0}
    | {"vocab_size": 163840, "max_position_embeddings": 131072, "num_nextn_predict_layers": 0}
    | {"quantization_config": FP8}
    | {"rope_scaling": YARN | {"factor": 32.0, "beta_fast": 1.0, "mscale": 1.0, "mscale_all_dim": 1.0}},
}
# Our presets of the same models.
PRESETS = {
    "llama3_8b": "meta-llama/Meta-Llama-3-8B",
    "llama3_1b": "meta-llama/Llama-3.2-1B",
    "llama3_405b": "meta-llama/Llama-3.1-405B",
    "qwen3_0_6b": "Qwen/Qwen3-0.6B",
    "qwen3_8b": "Qwen/Qwen3-8B",
    "qwen3_30b_a3b": "Qwen/Qwen3-30B-A3B",
    "deepseek_v3_16b": "deepseek-ai/DeepSeek-V2-Lite",
    "deepseek_v3_236b": "deepseek-ai/DeepSeek-V2",
    "deepseek_v3_671b": "deepseek-ai/DeepSeek-V3",
}
