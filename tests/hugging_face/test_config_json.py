"""Every key of config.json, nested ones too: read, refused or listed; held against transformers' own config classes."""

import json
from dataclasses import fields
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor

from src.config.build import build
from src.errors import UserError
from src.hugging_face.load import model_section
from src.models.hugging_face import section
from tests.checkpoint.options import problems
from tests.hugging_face.foreign import config_of
from tests.hugging_face.test_import import imported
from tests.models.shapes import NO_MTP

SHAPE: dict[str, Any] = {
    "vocab_size": 40,
    "hidden_size": 32,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "rope_parameters": {"rope_type": "default", "rope_theta": 100.0},
}
LATENT: dict[str, Any] = {
    "num_key_value_heads": 4,
    "moe_intermediate_size": 8,
    "n_shared_experts": 1,
    "n_routed_experts": 16,
    "num_experts_per_tok": 3,
    "n_group": 4,
    "topk_group": 2,
    "first_k_dense_replace": 1,
    "q_lora_rank": 16,
    "kv_lora_rank": 12,
    "qk_rope_head_dim": 8,
    "qk_nope_head_dim": 8,
    "v_head_dim": 8,
    "rope_parameters": {
        "rope_type": "yarn",
        "rope_theta": 100.0,
        "factor": 4.0,
        "beta_fast": 4.0,
        "beta_slow": 1.0,
        "mscale": 0.7,
        "mscale_all_dim": 0.7,
        "original_max_position_embeddings": 16,
    },
}
EXPERTS = {"num_experts": 8, "num_experts_per_tok": 3, "moe_intermediate_size": 8, "head_dim": 8}
FAMILIES: dict[str, dict[str, Any]] = {
    "Llama": SHAPE,
    "Mistral": SHAPE | {"sliding_window": None, "num_attention_heads": 8},
    "Qwen3": SHAPE | {"head_dim": 12},
    "Qwen3Moe": SHAPE | EXPERTS,
    "DeepseekV2": SHAPE | LATENT | {"topk_method": "group_limited_greedy", "routed_scaling_factor": 2.0},
    "DeepseekV3": SHAPE | LATENT,
}
# Another legal value, where a type alone does not say one.
OTHER: dict[str, Any] = {
    "hidden_act": "gelu",
    "dtype": "bfloat16",
    "architectures": ["X"],
    "transformers_version": "1.0",
    "problem_type": "regression",
    "id2label": {0: "a"},
    "label2id": {"a": 0},
    "layer_types": ["full_attention"] * 2,
    "eos_token_id": [3, 4],
    "bos_token_id": 3,
    "pad_token_id": 5,
    "topk_method": "greedy",
    "mlp_only_layers": [1],
    "hidden_size": 64,
    "num_attention_heads": 8,
    "num_key_value_heads": 1,
    "n_routed_experts": 32,
    "num_experts": 16,
    "num_experts_per_tok": 2,
    "n_group": 2,
    "topk_group": 3,
    "head_dim": 16,
    "qk_rope_head_dim": 12,
    "qk_nope_head_dim": 16,
    "kv_lora_rank": 20,
    "rms_norm_eps": 1e-2,
    "first_k_dense_replace": 2,
    "rope_parameters": {"rope_type": "default", "rope_theta": 9.0},
    "sliding_window": 4,
    "attention_dropout": 0.1,
    "initializer_range": 0.5,
    "moe_intermediate_size": 16,
    "num_hidden_layers": 3,
    "intermediate_size": 40,
    "vocab_size": 48,
    "v_head_dim": 16,
    "max_window_layers": 1,
    "decoder_sparse_step": 2,
    "pretraining_tp": 2,
    "num_mtp_layers": 0,
    "q_lora_rank": None,
}
# transformers' base class: the same in every family, so one is enough.
SHARED = {field.name for field in fields(transformers.PreTrainedConfig)}
YARN: dict[str, Any] = LATENT["rope_parameters"]
ROPES: dict[str, dict[str, Any]] = {
    "attention_factor": YARN | {"attention_factor": 1.3},
    "no-mscale": {key: value for key, value in YARN.items() if not key.startswith("mscale")},
    "mscale-alone": {key: value for key, value in YARN.items() if key != "mscale_all_dim"},
    "all-dim-alone": {key: value for key, value in YARN.items() if key != "mscale"},
    "two-mscales": YARN | {"mscale": 1.0},
    "untruncated": YARN | {"truncate": False},
    "one-beta": YARN | {"beta_fast": 1.0},
    "no-betas": {key: value for key, value in YARN.items() if not key.startswith("beta")},
    "no-original": {key: value for key, value in YARN.items() if not key.startswith("original")},
    "linear": {"rope_type": "linear", "rope_theta": 100.0, "factor": 2.0},
}


def other(name: str, value: Any) -> Any:
    if name in OTHER:
        return OTHER[name]
    if isinstance(value, bool):
        return not value
    return 2 * value + 1 if isinstance(value, int) else 0.5 * (value or 1.0)


def theirs(family: str, values: dict[str, Any]) -> Any:
    """transformers' model with weights by their names, so that two of equal shapes are equal."""
    config = getattr(transformers, f"{family}Config")(**json.loads(json.dumps(values)))
    model = getattr(transformers, f"{family}ForCausalLM")(config)
    with torch.no_grad():
        for name, tensor in (*model.named_parameters(), *model.named_buffers()):
            if name.endswith("inv_freq"):
                continue
            generator = torch.Generator().manual_seed(sum(name.encode()))
            tensor.copy_(torch.randn(tensor.shape, generator=generator) * 0.3 + ("norm" in name))
    return model.eval()


def logits(model: Any) -> Tensor:
    with torch.no_grad():
        result = model(torch.arange(2, 38).view(1, -1))
    return getattr(result, "logits", result).float()  # type: ignore[no-any-return]


def read(config: Any) -> dict[str, Any] | None:
    """The keys of our model that transformers' config says; None: it is refused."""
    try:
        return section(json.loads(config.to_json_string()), "config.json")[0]
    except UserError:
        return None


def differs(model: Any, folder: Path, expected: Tensor) -> float | None:
    """How far our logits of their files are from theirs; None: the files are refused."""
    model.save_pretrained(folder)
    try:
        ours = config_of(folder)
    except UserError:
        return None
    return float((logits(imported(folder, ours)) - expected).abs().max())


@pytest.mark.parametrize("family", FAMILIES)
def test_every_field_of_their_config_is_read_or_refused(family: str, tmp_path: Path) -> None:
    """Changed to another legal value, one at a time: what we compute stays what transformers computes."""
    base, refused, impossible = FAMILIES[family], set(), set()
    whole = getattr(transformers, f"{family}Config")(**base)
    names = {field.name for field in fields(whole)} - (SHARED if family != "Llama" else set())
    theirs(family, base).save_pretrained(tmp_path / "base")
    ours, meaning = logits(imported(tmp_path / "base", config_of(tmp_path / "base"))), read(whole)
    assert (ours - logits(theirs(family, base))).abs().max() < 1e-4
    for name in sorted(names):
        values = base | {name: other(name, getattr(whole, name))}
        try:
            model = theirs(family, values)
            expected = logits(model)
        except Exception:  # transformers has no such model: there is nothing to compare
            impossible.add(name)
            continue
        if (keys := read(model.config)) == meaning:  # then our model is the same one
            difference: float | None = float((ours - expected).abs().max())
        else:
            difference = None if keys is None else differs(model, tmp_path / name, expected)
        if difference is None:
            refused.add(name)
        else:
            assert difference < 1e-4, (name, values, difference)
    refusable = {"attention_bias", "hidden_act", "mlp_bias", "tie_word_embeddings", "sliding_window", "layer_types"}
    refusable |= {
        "use_sliding_window",
        "decoder_sparse_step",
        "mlp_only_layers",
        "rope_interleave",
        "num_key_value_heads",
    }
    refusable |= {"norm_topk_prob"}
    assert refused <= refusable
    assert "hidden_act" in refused
    assert impossible <= {"return_dict", "num_attention_heads", "num_key_value_heads", "label2id", "is_encoder_decoder"}


@pytest.mark.parametrize("name", ROPES)
@pytest.mark.parametrize("family", ["DeepseekV2", "DeepseekV3"])
def test_every_key_of_a_yarn_is_read_or_refused(family: str, name: str, tmp_path: Path) -> None:
    model = theirs(family, FAMILIES[family] | {"rope_parameters": ROPES[name]})
    difference = differs(model, tmp_path, logits(model))
    assert (difference is None) == (name in {"untruncated", "linear"})
    assert difference is None or difference < 1e-4


def written(family: str) -> dict[str, Any]:
    """config.json as transformers writes it."""
    values: dict[str, Any] = getattr(transformers, f"{family}Config")(**FAMILIES[family]).to_dict()
    return json.loads(json.dumps(values, default=str))  # type: ignore[no-any-return]


@pytest.mark.parametrize("family", FAMILIES)
def test_a_value_of_another_kind_is_one_line(family: str) -> None:
    """Each key, and each of the rope's, with each wrong kind of value: read or refused, never a traceback."""
    base = written(family)
    inner = [("rope_parameters", key) for key in base["rope_parameters"]]
    wrong = ("x", [], ["x"], {}, {"a": {"b": 1}}, -1, 0, 1.5, True, None, 10**40, float("nan"), float("inf"))
    refused = 0
    for group, key in (*((None, key) for key in base), *inner):
        for value in wrong:
            change = {key: value} if group is None else {group: base[group] | {key: value}}
            said = lines(base | change)
            refused += bool(said)
            assert all("\n" not in line and len(line) < 1000 for line in said), said
    assert refused > len(base)


def lines(values: dict[str, Any]) -> tuple[str, ...]:
    """What is said against a config.json."""
    try:
        keys, _ = section(values, "config.json")
        rest: dict[str, Any] = {"attention": "sdpa", "mask": "causal", "fixed_block": None}
        if keys.get("moe") is not None:
            mixture = {"load_balance_coeff": 1e-3, "unbalanced_layers": [], "force_load_balance": False}
            keys["moe"] = mixture | keys["moe"]
        if "mtp" in keys:
            keys["mtp"] = NO_MTP | keys["mtp"]
        top = {"name": "x", "seed": 0, "root": "runs", "folder": None, "dry_run": True}
        build({**top, "model": {**keys, **rest}}, sections=("model",))
    except UserError as error:
        return error.problems
    return ()


@pytest.mark.parametrize("family", FAMILIES)
def test_an_absent_key_means_what_transformers_takes_or_is_missing(family: str) -> None:
    base = written(family)
    for key in base:
        rest = {name: value for name, value in base.items() if name != key}
        if said := lines(rest):
            assert (
                all(f"{key} is missing" in line or "as it is absent" in line for line in said) or key == "model_type"
            ), said
            continue
        if family.startswith("Deepseek") and key == "num_key_value_heads":
            continue  # a latent vector has no such heads; 128 of them would not even run
        keys, _ = section(rest, "config.json")
        filled = getattr(transformers, f"{family}Config")(**rest).to_dict()
        assert section(json.loads(json.dumps(filled, default=str)), "config.json")[0] == keys, key


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"rope_parameters": "llama3"}, 'rope_parameters="llama3" is not an object'),
        ({"num_attention_heads": 0}, "num_attention_heads=0 is not a whole number from 1 to 2147483647"),
        ({"quantization_config": "fp8"}, 'quantization_config="fp8" is not an object'),
        (
            {"quantization_config": {"quant_method": "fp8", "weight_block_size": ["a", 1]}},
            'weight_block_size=["a", 1]',
        ),
        (
            {"rope_scaling": {"rope_type": "yarn", "factor": 4.0}},
            "rope_parameters and rope_scaling contradict each other",
        ),
        ({"original_max_position_embeddings": 77, "rope_parameters": YARN}, "original_max_position_embeddings=77"),
    ],
)
def test_what_is_malformed_is_refused_by_name(tmp_path: Path, changes: dict[str, Any], said: str) -> None:
    (tmp_path / "config.json").write_text(json.dumps(written("DeepseekV3") | changes))
    found = problems(model_section, tmp_path)
    assert any(said in line for line in found), found


def test_unread_keys_are_listed_with_their_place(tmp_path: Path) -> None:
    quantised = {"quant_method": "fp8", "fmt": "e4m3", "weight_block_size": [128, 128], "odd": 1}
    changes = {"rope_parameters": YARN | {"strange": 1}, "quantization_config": quantised, "other": None}
    (tmp_path / "config.json").write_text(json.dumps(written("DeepseekV3") | changes))
    assert model_section(tmp_path)[1] == ["other", "quantization_config.odd", "rope_parameters.strange"]


@pytest.mark.parametrize(
    ("kind", "needs"),
    [("deepseek_v32", "sparse attention"), ("glm4_moe", "half a head"), ("gpt_oss", "attention sinks")],
)
def test_a_model_type_that_is_not_built_says_what_it_needs(kind: str, needs: str) -> None:
    (said,) = problems(section, {"model_type": kind}, "config.json")
    assert f"model_type={kind} (it needs " in said
    assert needs in said
