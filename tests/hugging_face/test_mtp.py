"""Modules of multi-token prediction as the release of DeepSeek-V3 has them: a layer more, behind the last one."""

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from src.errors import CheckpointError
from src.hugging_face.check import SCALE
from src.hugging_face.load import examine, load
from src.hugging_face.save import Form
from src.models.hugging_face import config_json, export_problems, section
from src.tasks.export.self_check import Finding, compare
from tests.checkpoint.options import problems
from tests.hugging_face.foreign import config_of, edit
from tests.hugging_face.test_float8_export import deepseek, exported, model_of
from tests.hugging_face.test_import import imported, tensors
from tests.hugging_face.test_round_trips import contents
from tests.models.shapes import NO_MTP, tiny_deepseek
from tests.train.runs import changed

PLAIN = Form("float32", fp8=False, biases=False, shard_bytes=10**9)
OF_A_LAYER = {
    *("embed_tokens", "enorm", "hnorm", "eh_proj", "shared_head.norm", "shared_head.head"),
    *("input_layernorm", "post_attention_layernorm", "self_attn.q_a_proj", "self_attn.q_a_layernorm"),
    *("self_attn.q_b_proj", "self_attn.kv_a_proj_with_mqa", "self_attn.kv_a_layernorm", "self_attn.kv_b_proj"),
    *("self_attn.o_proj", "mlp.gate"),
    *(f"mlp.shared_experts.{name}_proj" for name in ("gate", "down", "up")),
    *(f"mlp.experts.{expert}.{name}_proj" for expert in range(4) for name in ("gate", "down", "up")),
}


def predicting(depths: int) -> Any:
    config = deepseek()
    return changed(config, mtp=changed(config.mtp, depths=depths))


def test_a_module_is_written_as_the_layer_of_the_release(tmp_path: Path) -> None:
    config = predicting(1)
    found = contents(exported(tmp_path / "x", model_of(config), config, PLAIN))
    layer = {key.removeprefix("model.layers.2.") for key in found if key.startswith("model.layers.2.")}
    assert layer == {f"{name}.weight" for name in OF_A_LAYER} | {"mlp.gate.e_score_correction_bias"}
    assert torch.equal(found["model.layers.2.embed_tokens.weight"], found["model.embed_tokens.weight"])
    assert torch.equal(found["model.layers.2.shared_head.head.weight"], found["lm_head.weight"])
    written = config_json(config)
    assert written["num_nextn_predict_layers"] == 1
    assert section(written, "config.json")[0]["mtp"] == {"depths": 0}, "reading it is a run's choice"


def test_what_is_written_is_read_and_written_again(tmp_path: Path) -> None:
    config = predicting(2)
    model = model_of(config)
    before = {name: tensor.clone() for name, tensor in tensors(model).items()}
    draft = exported(tmp_path / "x", model, config, PLAIN)
    read = imported(draft, config)
    assert all(torch.equal(before[name], tensor) for name, tensor in tensors(read).items())
    again = exported(tmp_path / "y", read, config, PLAIN)
    assert (again / "model.safetensors").read_bytes() == (draft / "model.safetensors").read_bytes()


def test_float8_leaves_what_the_release_leaves(tmp_path: Path) -> None:
    config = predicting(1)
    model = model_of(config)
    draft = exported(tmp_path / "x", model, config, Form("bfloat16", fp8=True, biases=False, shard_bytes=10**9))
    found = contents(draft)
    wide = {"embed_tokens", "eh_proj", "shared_head.head", "mlp.gate"}
    for name in OF_A_LAYER:
        tensor = found[f"model.layers.2.{name}.weight"]
        quantised = tensor.ndim == 2 and name not in wide
        assert (tensor.dtype == torch.float8_e4m3fn) == quantised, name
        assert (f"model.layers.2.{name}.weight{SCALE}" in found) == quantised, name
    load(draft, tensors(model), config)
    assert all(tensor.isfinite().all() for tensor in tensors(model).values())


def test_more_or_fewer_modules_than_there_are(tmp_path: Path) -> None:
    config, fewer, more = (predicting(depths) for depths in (1, 0, 2))
    draft = exported(tmp_path / "x", model_of(config), config, PLAIN)
    count = len([key for key in contents(draft) if key.startswith("model.layers.2.")])
    assert examine(draft, fewer) == [f"{count} keys are not read: multi-token prediction; model.mtp.depths=1 reads it"]
    (told,) = problems(examine, draft, more)
    assert "keys missing: model.layers.3." in told
    values = load_file(draft / "model.safetensors")
    values["model.layers.2.embed_tokens.weight"] = torch.ones(2, 2)
    save_file(values, draft / "model.safetensors")
    with pytest.raises(CheckpointError, match=r"model\.layers\.2\.embed_tokens\.weight: shape \[2, 2\] found"):
        examine(draft, config)
    del values["model.layers.2.embed_tokens.weight"]  # a copy, which is not read
    save_file(values, draft / "model.safetensors")
    assert examine(draft, config) == []


def test_transformers_passes_over_the_layer(tmp_path: Path) -> None:
    """Of any number, where its own list knows 61 alone."""
    config = predicting(1)
    model = model_of(config)
    draft = exported(tmp_path / "x", model, config, PLAIN)
    ids = list(range(3, 40))
    with torch.no_grad():
        logits = model(torch.tensor([ids]))[0]
    finding = Finding()
    compare(draft, "", ids, {36: logits[36]}, "float32", finding, gpu=False)
    assert finding.problems == []
    edit(draft / "config.json", num_nextn_predict_layers=0)
    compare(draft, "", ids, {36: logits[36]}, "float32", finding, gpu=False)
    assert "transformers tells of" in finding.problems[0]


def test_a_version_2_has_none() -> None:
    (told,) = export_problems(tiny_deepseek(mtp=NO_MTP | {"depths": 1}))
    assert told.startswith("model.mtp.depths=1: transformers' deepseek_v2 has no multi-token prediction")


def test_config_json_leaves_the_choice_to_the_run(tmp_path: Path) -> None:
    config = predicting(1)
    draft = exported(tmp_path / "x", model_of(config), config, PLAIN)
    assert config_of(draft).prediction_depths == 0
