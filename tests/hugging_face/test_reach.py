"""Import, train a step, export, reload in transformers: equal logits, for every form that is read."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

from src.hugging_face.save import Form, save
from src.hugging_face.write import held
from src.models.hugging_face import config_json
from tests.hugging_face.foreign import MODELS, config_of, saved
from tests.hugging_face.test_float8_export import Alone
from tests.hugging_face.test_import import imported, tensors

FORM = Form("float32", fp8=False, biases=False, shard_bytes=10**9)
WRITTEN_AS = {"kimi-k2": "deepseek_v3", "mistral": "llama", "mistral-odd-heads": "mistral"}


@pytest.mark.parametrize("name", [each for each in MODELS if each not in ("llama-bytes", "qwen3-moe-unnormalised")])
def test_a_step_and_back(name: str, tmp_path: Path) -> None:
    theirs = saved(name, tmp_path / "in")
    config = config_of(tmp_path / "in")
    model: Any = imported(tmp_path / "in", config)
    tokens = torch.randint(config.vocab_size, (2, 33), generator=torch.Generator().manual_seed(0))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.03)
    model.train()(tokens[:, :-1], labels=tokens[:, 1:]).backward()
    torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    optimizer.step()
    values = config_json(config)
    assert values["model_type"] == WRITTEN_AS.get(name, theirs.config.model_type)  # type: ignore[union-attr]
    beside = {"config.json": json.dumps(values).encode(), "generation_config.json": b"{}"}
    parts = held(tensors(model))
    draft = save(Alone(), tmp_path / "out", parts, config, FORM, beside, lambda each: each, torch.device("cpu"))
    found, info = transformers.AutoModelForCausalLM.from_pretrained(draft, output_loading_info=True)
    assert not any(info.values()), info
    with torch.no_grad():
        ours, expected, before = model.eval()(tokens), found.eval()(tokens).logits, theirs(tokens).logits
    assert (ours - expected).abs().max() < 1e-4
    assert (ours - before).abs().max() > 1e-2, "the step moved the weights"
