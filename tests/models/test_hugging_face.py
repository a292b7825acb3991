"""config.json of released models, as their model cards have it: the numbers of our presets, and back again."""

from typing import Any

import pytest

from src.errors import CheckpointError
from src.models.base import ModelConfig
from src.models.hugging_face import config_json, export_problems, section, stored
from src.models.llama3.config import Llama3Config
from src.models.stored import rotary_row
from tests.models.shapes import tiny_deepseek, tiny_llama
from tests.train.runs import section as preset

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
RELEASED: dict[str, dict[str, Any]] = {
    "llama3_8b": LLAMA
    | {"hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32, "tie_word_embeddings": False}
    | {"max_position_embeddings": 8192, "rope_scaling": None},
    "llama3_1b": LLAMA
    | {"hidden_size": 2048, "intermediate_size": 8192, "num_hidden_layers": 16, "tie_word_embeddings": True}
    | {"head_dim": 64, "rope_scaling": STRETCH | {"factor": 32.0}},
    "llama3_405b": LLAMA
    | {"hidden_size": 16384, "intermediate_size": 53248, "num_hidden_layers": 126, "num_attention_heads": 128}
    | {"rope_scaling": STRETCH | {"factor": 8.0}},
    "deepseek_v3_16b": DEEPSEEK
    | {"model_type": "deepseek_v2", "hidden_size": 2048, "intermediate_size": 10944, "moe_intermediate_size": 1408}
    | {"num_hidden_layers": 27, "first_k_dense_replace": 1, "num_attention_heads": 16, "num_key_value_heads": 16}
    | {"n_routed_experts": 64, "n_shared_experts": 2, "num_experts_per_tok": 6, "n_group": 1, "topk_group": 1}
    | {"topk_method": "greedy", "scoring_func": "softmax", "norm_topk_prob": False, "routed_scaling_factor": 1.0}
    | {"q_lora_rank": None, "vocab_size": 102400, "rope_scaling": YARN | {"mscale": 0.707, "mscale_all_dim": 0.707}},
    "deepseek_v3_671b": DEEPSEEK
    | {"model_type": "deepseek_v3", "hidden_size": 7168, "intermediate_size": 18432, "moe_intermediate_size": 2048}
    | {"num_hidden_layers": 61, "first_k_dense_replace": 3, "num_attention_heads": 128, "num_key_value_heads": 128}
    | {"n_routed_experts": 256, "n_shared_experts": 1, "num_experts_per_tok": 8, "n_group": 8, "topk_group": 4}
    | {"topk_method": "noaux_tc", "scoring_func": "sigmoid", "norm_topk_prob": True, "routed_scaling_factor": 2.5}
    | {"q_lora_rank": 1536, "vocab_size": 129280, "num_nextn_predict_layers": 1}
    | {"rope_scaling": YARN | {"mscale": 1.0, "mscale_all_dim": 1.0}},
}
# What a config.json cannot say, or says by another number of the same result.
OURS = {"max_seq_len", "attention", "mask", "fixed_block", "multiple_of", "ffn_dim_multiplier", "head_dim"}
OF_TRAINING = {"load_balance_coeff", "unbalanced_layers", "force_load_balance", "group_score"}


def read(values: dict[str, Any]) -> ModelConfig:
    keys, unread = section(values, "config.json")
    assert unread == []
    target = keys.pop("_target_")
    if "moe" in keys:
        keys["moe"] = {"load_balance_coeff": 1e-3, "unbalanced_layers": (), "force_load_balance": False} | keys["moe"]
    kind = Llama3Config if target.endswith(".Llama3Config") else type(tiny_deepseek())
    return kind(**keys, attention="sdpa", mask="causal", fixed_block=None)


def numbers(config: ModelConfig) -> dict[str, Any]:
    found = {key: value for key, value in config.model_dump().items() if key not in OURS}
    if "moe" in found:
        found["moe"] = {key: value for key, value in found["moe"].items() if key not in OF_TRAINING}
    return found


@pytest.mark.parametrize("name", RELEASED)
def test_released_models_are_our_presets(name: str) -> None:
    config, ours = read(RELEASED[name]), preset("model", name)
    assert numbers(config) == numbers(ours)
    assert config.weights() == ours.weights()
    assert config.max_seq_len == RELEASED[name]["max_position_embeddings"]


@pytest.mark.parametrize("name", RELEASED)
def test_what_is_written_says_the_same(name: str) -> None:
    config = read(RELEASED[name])
    written = config_json(config)
    assert numbers(read(written)) == numbers(config)
    same = {key: value for key, value in written.items() if key in RELEASED[name] and RELEASED[name][key] is not None}
    told = {key: RELEASED[name][key] for key in same}
    for each in (same, told):
        each.pop("num_nextn_predict_layers", None)  # layers that are not read are not written
        if "rope_scaling" in each:
            each["rope_scaling"] = {key: value for key, value in each["rope_scaling"].items() if key != "rope_type"}
    assert same == told


@pytest.mark.parametrize("name", RELEASED)
def test_every_tensor_has_its_own_keys(name: str) -> None:
    config = preset("model", name)
    table = stored(config)
    keys = [key for each in table for key in each.keys]
    assert len(set(keys)) == len(keys)
    biases = {each.name for each in table if each.precise}
    assert {each.name: each.shape for each in table if not each.precise} == {
        weight.name: weight.shape for weight in config.weights()
    }
    assert len(biases) == (config.n_layers - config.n_dense_layers if config.routed else 0)


def test_rotary_rows_are_permuted_within_their_head() -> None:
    """Two heads of six: pairs (0, 1), (2, 3), (4, 5) become halves."""
    assert [rotary_row(row, 12, 2) for row in range(12)] == [0, 3, 1, 4, 2, 5, 6, 9, 7, 10, 8, 11]


@pytest.mark.parametrize(
    ("config", "said"),
    [
        (tiny_llama(attention="flex", fixed_block=16), "model.fixed_block=16: transformers' llama attends"),
        (tiny_llama(dim=60, head_dim=8, n_heads=8), "model.n_heads=8 does not divide model.dim=60"),
        (tiny_deepseek(norm_eps=1e-5), "model.norm_eps=1e-05: transformers' deepseek_v2 has 1e-06"),
        (tiny_deepseek(moe={"num_shared_experts": 0}), "model.moe.num_shared_experts=0"),
        (tiny_deepseek(moe={"route_norm": True}), "model.moe.route_norm=true with model.moe.score_func=softmax"),
        (tiny_deepseek(moe={"score_before_experts": True}), "model.moe.score_before_experts=true"),
        (tiny_deepseek(moe={"force_load_balance": True}), "model.moe.force_load_balance=true"),
        (
            tiny_deepseek(moe={"num_expert_groups": 4, "num_limited_groups": 2}),
            "model.moe.group_score=top2sum: transformers' deepseek_v2",
        ),
    ],
)
def test_what_transformers_does_not_have_is_told(config: ModelConfig, said: str) -> None:
    (told,) = export_problems(config)
    assert told.startswith(said)
    with pytest.raises(CheckpointError):
        config_json(config)
