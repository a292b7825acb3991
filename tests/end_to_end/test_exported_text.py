"""What transformers and lm-evaluation-harness make of an exported run is what the run itself makes of it."""

import json
import math
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.end_to_end.lives import live, opened
from tests.end_to_end.test_text import PROMPT, asked, plain, scores, texts
from tests.ranks import RankPool

MIXTURE = {
    "num_experts": 4,
    "num_expert_groups": 2,
    "num_limited_groups": 1,
    "top_k": 1,
    "hidden_dim": 16,
    "score_func": "sigmoid",
}
DEEPSEEK = (
    *("model=deepseek_v3_debug", "model.kv_lora_rank=16"),
    *("model.qk_nope_head_dim=8", "model.qk_rope_head_dim=8", "model.v_head_dim=8", "model.ffn_dim=64"),
    *(f"model.moe.{key}={value}" for key, value in MIXTURE.items()),
    *("model.moe.route_norm=true", "model.moe.route_scale=2.5", "name=experts"),
)
LOCAL_TASK = """task: words
dataset_path: json
dataset_kwargs: {{data_files: {{test: {file}}}}}
test_split: test
output_type: loglikelihood_rolling
doc_to_text: ""
doc_to_target: "{{{{text}}}}"
metric_list:
  - {{metric: bits_per_byte, aggregation: bits_per_byte, higher_is_better: false}}
"""


@pytest.fixture(scope="module", params=["llama3", "deepseek_v3"])
def run(request: pytest.FixtureRequest, text: tuple[str, ...], ranks: RankPool) -> Path:
    """12 steps of a family."""
    changes, foreign = (DEEPSEEK, ("model.n_kv", "model.mult")) if request.param == "deepseek_v3" else ((), ("none",))
    folder = opened(*(each for each in text if not each.startswith(foreign)), *changes)
    assert ranks(1, live, folder) == [True]
    return folder


@pytest.fixture(scope="module")
def exported(run: Path, ranks: RankPool) -> Path:
    asked(ranks, "export", run)
    return run / "exports/step_00000012"


def test_greedy_text_is_that_of_transformers(run: Path, exported: Path, ranks: RankPool) -> None:
    transformers = pytest.importorskip("transformers")
    tokenizer = transformers.AutoTokenizer.from_pretrained(exported)
    model = transformers.AutoModelForCausalLM.from_pretrained(exported, dtype=torch.float32)
    given = tokenizer(PROMPT, return_tensors="pt")
    theirs = model.generate(**given, do_sample=False, max_new_tokens=12)[0, given["input_ids"].shape[1] :]
    expected = tokenizer.decode(theirs, skip_special_tokens=True)
    options = (f"prompt={PROMPT}", "temperature=0", "max_tokens=12")
    assert texts(asked(ranks, "generate", run, *options)) == [expected]
    assert texts(asked(ranks, "generate", f"hf:{exported}", *options, f"root={run.parent}")) == [expected]


def test_the_loss_of_an_export_is_that_of_its_run(
    run: Path, exported: Path, ranks: RankPool, text: tuple[str, ...]
) -> None:
    data = [each for each in text if each.startswith("data")]
    options = ("samples=10", "task.seq_len=32", *data)
    (ours,) = scores(asked(ranks, "evaluate", run, *options)).values()
    (theirs,) = scores(asked(ranks, "evaluate", f"hf:{exported}", *options, f"root={run.parent}")).values()
    assert theirs["loss"] == pytest.approx(ours["loss"], rel=1e-5)
    assert theirs["tokens"] == ours["tokens"]


@pytest.mark.slow
@pytest.mark.parametrize("run", ["llama3"], indirect=True)
def test_lm_evaluation_harness_runs_on_an_export(run: Path, exported: Path, tmp_path: Path) -> None:
    """A task of three texts, without a network: bits per byte, against a plain model and torch's cross entropy."""
    rows = ["kara lose tumi", "It's a text", "mira"]
    file, out = tmp_path / "rows.jsonl", tmp_path / "out"
    file.write_text("".join(json.dumps({"text": row}) + "\n" for row in rows))
    (tmp_path / "words.yaml").write_text(LOCAL_TASK.format(file=file))
    weights = f"pretrained={exported},dtype=float32,add_bos_token=False"
    arguments = f"--model hf --model_args {weights} --tasks words --device cpu --batch_size 1"
    ended = subprocess.run(
        [sys.executable, "-m", "lm_eval", *arguments.split(), "--include_path", tmp_path, "--output_path", out],
        env=os.environ | {"HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1", "HF_HOME": str(tmp_path)},
        capture_output=True,
        text=True,
    )
    assert ended.returncode == 0, ended.stderr
    (result,) = out.glob("**/results_*.json")
    found = json.loads(result.read_text())["results"]["words"]["bits_per_byte,none"]
    assert found == pytest.approx(bits_per_byte(plain(run, 12), rows), rel=1e-4)


@torch.no_grad()
def bits_per_byte(model: Any, rows: list[str]) -> float:
    nats = 0.0
    for row in rows:
        ids = torch.tensor([256, *row.encode()])
        nats += torch.nn.functional.cross_entropy(model(ids[None, :-1])[0], ids[1:], reduction="sum").item()
    return nats / math.log(2) / sum(len(row.encode()) for row in rows)
