"""Folders that transformers wrote, read by our models: the same logits, and whatever does not fit is told by name."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from src.errors import CheckpointError
from src.hugging_face.archive import INDEX, Archive
from src.hugging_face.check import check
from src.hugging_face.load import examine, load, model_section
from src.hugging_face.read import Reader
from src.models.base import ModelConfig
from src.models.decoder import Decoder
from src.models.hugging_face import section, stored
from src.models.llama3.config import Llama3Config
from tests.checkpoint.options import problems
from tests.hugging_face.foreign import LLAMA, MODELS, config_of, edit, saved


def tensors(model: Decoder) -> dict[str, Tensor]:
    """As a network names them: a shared matrix once."""
    shared = dict(model.named_parameters(remove_duplicate=False)).keys() - dict(model.named_parameters()).keys()
    return {name: tensor for name, tensor in model.state_dict().items() if name not in shared}


def imported(folder: Path, config: ModelConfig) -> Decoder:
    """Our model with the folder's weights; what is not read stays nan."""
    model = config.build()
    for tensor in tensors(model).values():
        tensor.fill_(float("nan"))
    load(folder, tensors(model), config)
    return model


@pytest.mark.parametrize("name", MODELS)
def test_logits_equal_those_of_the_writer(name: str, tmp_path: Path) -> None:
    theirs = saved(name, tmp_path)
    assert (tmp_path / INDEX).is_file(), "several files"
    config = config_of(tmp_path)
    ours = imported(tmp_path, config)
    tokens = torch.randint(config.vocab_size, (2, 100))
    with torch.no_grad():
        expected = theirs(tokens).logits
        difference = (ours(tokens) - expected).abs().max()
    assert expected.abs().max() > 1, "the comparison needs logits that say something"
    assert difference < 1e-4  # fp32, sums in another order


def test_a_single_file_and_another_dtype(tmp_path: Path) -> None:
    theirs = saved("llama", tmp_path, torch.bfloat16, shard="1GB")
    assert [file.name for file in tmp_path.glob("*.safetensors")] == ["model.safetensors"]
    ours = imported(tmp_path, config_of(tmp_path))
    assert ours.layers["1"].get_parameter("feed_forward.w1.weight").dtype == torch.float32
    expected = dict(theirs.named_parameters())["model.layers.1.mlp.gate_proj.weight"].float()
    assert torch.equal(ours.layers["1"].get_parameter("feed_forward.w1.weight"), expected)


def test_experts_are_in_the_order_of_their_numbers(tmp_path: Path) -> None:
    saved("deepseek-v3", tmp_path, shard="1GB")
    ours, written = imported(tmp_path, config_of(tmp_path)), load_file(tmp_path / "model.safetensors")
    for expert in range(12):
        key = f"model.layers.2.mlp.experts.{expert}.down_proj.weight"
        assert torch.equal(ours.layers["2"].get_parameter("moe.experts.w2")[expert], written[key])


def test_layers_that_predict_further_tokens_are_told_and_left_out(tmp_path: Path) -> None:
    saved("deepseek-v3", tmp_path, shard="1GB")
    config = config_of(tmp_path)
    written = load_file(tmp_path / "model.safetensors")
    more = {f"model.layers.3.{name}": torch.ones(4) for name in ("enorm.weight", "eh_proj.weight")}
    save_file(written | more, tmp_path / "model.safetensors")
    assert (
        "2 keys that model.family=deepseek_v3 of this shape has no place for" in problems(examine, tmp_path, config)[0]
    )
    edit(tmp_path / "config.json", num_nextn_predict_layers=1)
    assert examine(tmp_path, config) == ["2 keys are not read: multi-token prediction; model.mtp.depths=1 reads it"]
    imported(tmp_path, config)


def test_frequencies_and_a_tied_head_are_left_out(tmp_path: Path) -> None:
    saved("llama-tied", tmp_path, shard="1GB")
    written = load_file(tmp_path / "model.safetensors")
    assert "lm_head.weight" not in written
    more = {f"model.layers.{layer}.self_attn.rotary_emb.inv_freq": torch.ones(4) for layer in range(3)}
    head = {"lm_head.weight": written["model.embed_tokens.weight"].clone()}
    save_file(written | more | head, tmp_path / "model.safetensors")
    lines = examine(tmp_path, config_of(tmp_path))
    assert sorted(lines) == [
        "1 keys are not read: a head that is the embedding",
        "3 keys are not read: rotary frequencies, which are computed",
    ]


def test_missing_and_unexpected_keys_are_counted_and_named(tmp_path: Path) -> None:
    saved("llama", tmp_path, shard="1GB")
    config = config_of(tmp_path)
    written = load_file(tmp_path / "model.safetensors")
    for layer in range(3):
        del written[f"model.layers.{layer}.mlp.up_proj.weight"]
    written["model.layers.0.self_attn.q_proj.bias"] = torch.ones(64)
    save_file(written, tmp_path / "model.safetensors")
    missing, unexpected = problems(check, Archive.open(tmp_path), config)
    assert "3 of 30 keys missing: model.layers.0.mlp.up_proj.weight, model.layers.1.mlp" in missing
    assert unexpected.endswith("has no place for: model.layers.0.self_attn.q_proj.bias")


def test_shape_and_dtype_are_told_with_file_and_key(tmp_path: Path) -> None:
    saved("llama", tmp_path, shard="1GB")
    config, file = config_of(tmp_path), tmp_path / "model.safetensors"
    written = load_file(file)
    written["model.norm.weight"] = torch.ones(65)
    written["lm_head.weight"] = written["lm_head.weight"].to(torch.int8)
    save_file(written, file)
    assert set(problems(load, tmp_path, {}, config)) == {
        f"{file}: model.norm.weight: shape [65] found, [64] expected",
        f"{file}: lm_head.weight: dtype int8 found, float32 or bfloat16 or float16 expected",
    }


@pytest.mark.parametrize("left", [0, 5, 100, -1])
def test_a_file_that_is_cut_off_is_refused(tmp_path: Path, left: int) -> None:
    saved("llama", tmp_path)
    file = sorted(tmp_path.glob("*.safetensors"))[1]
    content = file.read_bytes()
    file.write_bytes(content[:left])
    (told,) = problems(Archive.open, tmp_path)
    assert told.startswith(f"{file}: {len(content[:left]):,} bytes found, ")


def test_a_file_of_another_kind_is_refused(tmp_path: Path) -> None:
    saved("llama", tmp_path, shard="1GB")
    (tmp_path / "model.safetensors").write_bytes(b"PK\x03\x04" + bytes(1000))
    assert "model.safetensors: " in problems(Archive.open, tmp_path)[0]
    (tmp_path / "model.safetensors").write_bytes((8).to_bytes(8, "little") + b"no json " + bytes(10))
    assert "no whole safetensors file (" in problems(Archive.open, tmp_path)[0]


def test_a_pointer_of_git_lfs_is_told_as_such(tmp_path: Path) -> None:
    saved("llama", tmp_path, shard="1GB")
    pointer = b"version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 12345\n"
    (tmp_path / "model.safetensors").write_bytes(pointer)
    assert "a pointer of git-lfs, not the file itself; run `git lfs pull`" in problems(Archive.open, tmp_path)[0]


def test_keys_that_only_shards_or_two_of_them_have_are_told(tmp_path: Path) -> None:
    saved("llama", tmp_path)
    index = json.loads((tmp_path / INDEX).read_text())
    first, second = sorted(tmp_path.glob("*.safetensors"))[:2]
    double = next(key for key, name in index["weight_map"].items() if name == second.name)
    more = {"beside": torch.ones(1), double: torch.ones(1)}
    save_file(load_file(first) | more, first)
    assert examine(tmp_path, config_of(tmp_path)) == [
        f"1 keys are in a shard and not in {INDEX}, and are not read: beside",
        f"1 keys are in two shards, and read of the one that {INDEX} names: {double}",
    ]


def test_missing_shards_are_counted_and_named(tmp_path: Path) -> None:
    saved("llama", tmp_path)
    first, second, *others = sorted(tmp_path.glob("*.safetensors"))
    first.unlink()
    (told,) = problems(Archive.open, tmp_path)
    assert told == f"{tmp_path}: 1 of {len(others) + 2} shards missing: {first.name}"
    second.rename(first)
    first.with_name(second.name).write_bytes(first.read_bytes())
    assert "keys are not in the shard it names" in problems(Archive.open, tmp_path)[0]


@pytest.mark.parametrize("name", ["../outside.safetensors", "/etc/model.safetensors", "sub/model.safetensors", 3])
def test_an_index_may_not_leave_its_folder(tmp_path: Path, name: Any) -> None:
    saved("llama", tmp_path)
    index = json.loads((tmp_path / INDEX).read_text())
    index["weight_map"]["model.norm.weight"] = name
    (tmp_path / INDEX).write_text(json.dumps(index))
    assert f"{tmp_path / INDEX}: {name}: no name of a file in this folder" in problems(Archive.open, tmp_path)[0]


def test_pickle_is_refused_with_the_way_out(tmp_path: Path) -> None:
    saved("llama", tmp_path)
    index = json.loads((tmp_path / INDEX).read_text())
    (tmp_path / INDEX).write_text(json.dumps({"weight_map": dict.fromkeys(index["weight_map"], "a.bin")}))
    assert "pickle can run any code. Convert them" in problems(Archive.open, tmp_path)[0]
    (tmp_path / INDEX).unlink()
    (tmp_path / "pytorch_model.bin").write_bytes(b"never read")
    (told,) = problems(Archive.open, tmp_path)
    assert told.startswith(f"{tmp_path}: holds pytorch_model.bin; weights from elsewhere are read as safetensors only")
    assert "save_pretrained" in told


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"attention_bias": True}, "attention_bias=true has no form here, only attention_bias=false"),
        (
            {"sliding_window": 4096},
            "only sliding_window=null; it needs attention to no more than the last tokens of a window",
        ),
        ({"hidden_act": "gelu"}, 'hidden_act="gelu" has no form here, only hidden_act="silu"'),
        ({"partial_rotary_factor": 0.5}, "partial_rotary_factor=0.5"),
        ({"rope_parameters": {"rope_type": "longrope"}}, "rope_type=longrope has no form here, only rope_type=default"),
        ({"rope_scaling": {"type": "dynamic", "factor": 2.0}, "rope_parameters": None}, "rope_type=dynamic"),
        ({"rope_parameters": {"full_attention": {"rope_theta": 1e4}}}, "rope_type=of each kind of layer"),
        ({"num_hidden_layers": "three"}, 'num_hidden_layers="three" is not a whole number from 1 to '),
        ({"hidden_size": None}, "hidden_size is missing"),
        ({"model_type": "mamba"}, "model_type=mamba is not known; there are llama, mistral, deepseek_v2, deepseek_v3"),
    ],
)
def test_what_has_no_form_here_is_refused_by_name(tmp_path: Path, changes: dict[str, Any], said: str) -> None:
    saved("llama", tmp_path)
    edit(tmp_path / "config.json", **changes)
    told = problems(model_section, tmp_path)
    assert any(said in line for line in told), told
    assert all(line.startswith(str(tmp_path / "config.json")) for line in told)


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"moe_layer_freq": 2}, "moe_layer_freq=2"),
        ({"rope_interleave": False}, "rope_interleave=false"),
        ({"scoring_func": "softmax"}, 'scoring_func="softmax"'),
        ({"tie_word_embeddings": True}, "tie_word_embeddings=true"),
    ],
)
def test_what_has_no_form_in_deepseek_is_refused_by_name(tmp_path: Path, changes: dict[str, Any], said: str) -> None:
    saved("deepseek-v3", tmp_path)
    edit(tmp_path / "config.json", **changes)
    (told,) = problems(model_section, tmp_path)
    assert said in told


def test_the_old_form_of_rope_and_unread_keys(tmp_path: Path) -> None:
    saved("llama-scaled", tmp_path)
    values = json.loads((tmp_path / "config.json").read_text())
    scaling = values.pop("rope_parameters")
    new = model_section(tmp_path)
    theta = scaling.pop("rope_theta")
    (tmp_path / "config.json").write_text(json.dumps(values | {"rope_theta": theta, "rope_scaling": scaling, "odd": 1}))
    assert model_section(tmp_path) == (new[0], ["odd"])


def test_a_model_chosen_by_hand_is_compared_with_config_json(tmp_path: Path) -> None:
    saved("llama-scaled", tmp_path)
    config = config_of(tmp_path, rope_theta=1e4, rope_scaling=None, max_seq_len=64)
    told = examine(tmp_path, config)
    assert told[0] == "model.rope_theta=10000.0, and config.json says 500000.0"
    assert told[1].startswith("model.rope_scaling=None, and config.json says {'factor': 4.0")
    assert len(told) == 2


@pytest.mark.parametrize(
    ("dim", "width"), [(4096, 14336), (4096, 11008), (2048, 8192), (8192, 28672), (5120, 13824), (64, 17)]
)
def test_every_width_comes_out(dim: int, width: int) -> None:
    """intermediate_size below and above 8/3 of the width."""
    given = LLAMA | {"model_type": "llama", "hidden_size": dim, "intermediate_size": width}
    keys, _ = section(given, "config.json")
    assert keys.pop("_target_").endswith(".Llama3Config")
    assert Llama3Config(**keys, attention="sdpa", mask="causal", fixed_block=None).ffn_dim == width


def test_a_file_that_shrank_since_it_was_checked_is_told(tmp_path: Path) -> None:
    saved("llama", tmp_path, shard="1GB")
    config = config_of(tmp_path)
    model = config.build()
    archive = Archive.open(tmp_path)
    file = tmp_path / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-1000])
    with pytest.raises(CheckpointError, match="no whole safetensors file"):
        Reader(archive).fill(tensors(model), stored(config))
