"""config.json of released models, as their model cards have it: the numbers of our presets, and back again."""

from importlib import import_module
from pathlib import Path
from typing import Any

import pytest

from src.errors import CheckpointError
from src.models.base import ModelConfig
from src.models.hugging_face import config_json, export_problems, section, stored
from src.models.stored import rotary_row
from tests.models.released import PRESETS, RELEASED
from tests.models.shapes import NO_MTP, tiny_deepseek, tiny_llama
from tests.train.runs import section as preset

# What a config.json cannot say, or says by another number of the same result.
OURS = {"max_seq_len", "attention", "mask", "fixed_block", "multiple_of", "ffn_dim_multiplier", "head_dim"}
OF_TRAINING = {"load_balance_coeff", "unbalanced_layers", "force_load_balance", "group_score"}


def read(values: dict[str, Any]) -> ModelConfig:
    keys, unread = section(values, "config.json")
    assert unread == []
    module, _, name = str(keys.pop("_target_")).rpartition(".")
    if keys.get("moe") is not None:
        keys["moe"] = {"load_balance_coeff": 1e-3, "unbalanced_layers": (), "force_load_balance": False} | keys["moe"]
    if "mtp" in keys:
        keys["mtp"] = NO_MTP | keys["mtp"]
    found = getattr(import_module(module), name)(**keys, attention="sdpa", mask="causal", fixed_block=None)
    assert isinstance(found, ModelConfig)
    return found


def numbers(config: ModelConfig) -> dict[str, Any]:
    found = {key: value for key, value in config.model_dump().items() if key not in OURS}
    if found.get("moe") is not None:
        found["moe"] = {key: value for key, value in found["moe"].items() if key not in OF_TRAINING}
    return found


@pytest.mark.parametrize("name", PRESETS)
def test_released_models_are_our_presets(name: str) -> None:
    config, ours = read(RELEASED[PRESETS[name]]), preset("model", name)
    assert numbers(config) == numbers(ours)
    assert config.weights() == ours.weights()
    assert config.max_seq_len == RELEASED[PRESETS[name]]["max_position_embeddings"]


@pytest.mark.parametrize("name", RELEASED)
def test_what_is_written_says_the_same(name: str) -> None:
    config = read(RELEASED[name])
    written = config_json(config)
    assert numbers(read(written)) == numbers(config)
    same = {key: value for key, value in written.items() if key in RELEASED[name] and RELEASED[name][key] is not None}
    told = {key: RELEASED[name][key] for key in same}
    for each in (same, told):
        each.pop("num_nextn_predict_layers", None)  # layers that are not read are not written
        del each["model_type"]  # a Mistral is written as a Llama, and Kimi-K2 as a DeepSeek-V3
        if "rope_scaling" in each:
            each["rope_scaling"] = {key: value for key, value in each["rope_scaling"].items() if key != "rope_type"}
    assert same == told


@pytest.mark.parametrize("name", PRESETS)
def test_every_tensor_has_its_own_keys(name: str) -> None:
    config = preset("model", name)
    table = stored(config)
    keys = [key for each in table for key in each.keys]
    assert len(set(keys)) == len(keys)
    biases = {each.name for each in table if each.precise}
    assert {each.name: each.shape for each in table if not each.precise} == {
        weight.name: weight.shape for weight in config.weights()
    }
    assert len(biases) == (config.n_layers - getattr(config, "n_dense_layers", 0) if config.routed else 0)


def test_the_table_of_the_docs_is_true() -> None:
    """Every released model of it is read, and has the parameters that its card publishes, to their last digit."""
    lines = (Path(__file__).parents[2] / "docs" / "hugging_face.md").read_text().splitlines()
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines if line.count("|") > 5]
    table = {row[0]: row for row in rows if "/" in row[0]}
    assert table.keys() == RELEASED.keys()
    for name, (_, kind, published, _, written, *_) in table.items():
        config, digits = read(RELEASED[name]), published.rstrip("BT")
        unit = (1e12 if published.endswith("T") else 1e9) * 10.0 ** -len(digits.partition(".")[2])
        parameters = float(digits) * (1e12 if published.endswith("T") else 1e9)
        assert abs(config.counts(4096).parameters - parameters) < unit, name
        assert kind == f"`{RELEASED[name]['model_type']}`"
        assert written == f"`{config_json(config)['model_type']}`", name


def test_rotary_rows_are_permuted_within_their_head() -> None:
    """Two heads of six: pairs (0, 1), (2, 3), (4, 5) become halves."""
    assert [rotary_row(row, 12, 2) for row in range(12)] == [0, 3, 1, 4, 2, 5, 6, 9, 7, 10, 8, 11]


@pytest.mark.parametrize(
    ("config", "said"),
    [
        (tiny_llama(attention="flex", fixed_block=16), "model.fixed_block=16: transformers' llama attends"),
        (tiny_deepseek(norm_eps=1e-5), "model.latent_norm_eps=1e-05: transformers' deepseek_v2 has 1e-06"),
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
