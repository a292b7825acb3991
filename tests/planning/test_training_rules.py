"""Options of a step that the model, the layout or the compiler cannot have are refused by name."""

from dataclasses import replace
from typing import Any

import pytest

from src.planning.training_rules import training_problems
from tests.train.runs import changed, make_run, section

CLIP = {"qk_clip": 100.0}
SPIKES = {"spike_score": 8.0, "on_spike": "rewind"}
REFUSED: dict[str, tuple[dict[str, Any], dict[str, str], str]] = {
    "average of groups": ({"ema_decay": 0.9}, {"fault_tolerance": "torchft"}, "replica groups keep no average"),
    "average in a graph": ({"ema_decay": 0.9, "ema_offload": True}, {"compile": "graph"}, "task.ema_offload=true"),
    "matrices in a graph": ({}, {"compile": "graph", "optim": "muon"}, "optim: Muon reads whole matrices"),
    "logits of qwen3": (CLIP, {"model": "qwen3_debug"}, "task.qk_clip=100: logits of"),
    "logits in blocks": (CLIP, {"compile": "blocks"}, "pass compile=off"),
    "logits of parts": (CLIP, {"parallel": "cp2"}, "at most parallel.context=1"),
    "logits of groups": (CLIP, {"fault_tolerance": "torchft"}, "would scale their weights apart"),
    "spikes of groups": (SPIKES, {"fault_tolerance": "torchft"}, "do not agree on what a spike is"),
    "nowhere to go back to": (SPIKES, {"checkpoint": "none"}, "task.on_spike=rewind goes back to a checkpoint"),
}


def problems(task: dict[str, Any], **choices: str) -> list[str]:
    return training_problems(replace(make_run(**choices), task=changed(section("task", "pretrain"), **task)))


@pytest.mark.parametrize("case", REFUSED)
def test_refused(case: str) -> None:
    task, choices, said = REFUSED[case]
    assert any(said in line for line in problems(task, **choices))


def test_all_at_once_is_fine() -> None:
    every = CLIP | SPIKES | {"ema_decay": 0.9, "layer_norms": True, "z_loss": 1e-4}
    assert problems(every, optim="muon", parallel="tp2_fsdp2", model="deepseek_v3_debug") == []
