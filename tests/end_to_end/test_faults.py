"""Numbers that stop being finite, data with several sources, attention within documents."""

import json
from pathlib import Path
from typing import Any

import pytest

from src.errors import UserError
from tests.end_to_end.lives import live, opened, records, series
from tests.ranks import RankPool

# The first step sends every weight away. Whether the second or the fourth step has no number any more is decided by the
# exp of the processor near the largest floats.
WILD = ("optim.lr=10", "optim.weight_decay=100", "schedule.warmup_steps=0")


def incidents(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "incidents.jsonl").read_text().splitlines()]


def test_a_loss_that_is_not_finite_ends_the_run(text: tuple[str, ...], ranks: RankPool) -> None:
    folder = opened(*text, "parallel=fsdp2", *WILD, "name=diverged")
    told = ranks(2, live, folder)
    assert told[0] == told[1]
    (problem,) = told[0]
    (incident,) = incidents(folder)
    step, samples = incident["step"], incident["samples"]
    assert 2 <= step <= 6
    assert incident["decision"] == "stop"
    assert samples == list(range(4 * step - 4, 4 * step))
    assert problem.startswith(f"step {step}: loss ")
    assert f"over samples {samples[0]} to {samples[-1]} (incidents.jsonl); the weights were not touched" in problem
    assert "and there is no checkpoint yet" in problem
    assert json.loads((folder / "attempts.jsonl").read_text().splitlines()[-1])["ended"] == "failed"
    assert list((folder / "checkpoints").iterdir()) == []


def test_skipping_has_a_cap(text: tuple[str, ...], ranks: RankPool) -> None:
    skip = ("task.nonfinite=skip_step", "task.nonfinite_cap=3", *WILD)
    folder = opened(*text, "parallel=fsdp2", *skip, "name=capped")
    told = ranks(2, live, folder)
    found = incidents(folder)
    steps = [line["step"] for line in found]
    assert steps == list(range(steps[0], steps[0] + 4))
    assert [problem.partition(":")[0] for (problem,) in told] == [f"step {steps[-1]}"] * 2
    assert [line["decision"] for line in found] == ["skip", "skip", "skip", "stop"]


def test_attention_within_documents_trains(text: tuple[str, ...], ranks: RankPool) -> None:
    masks = ("model.attention=flex", "model.mask=block_causal", "data.document_masks=true")
    folder = opened(*text, *masks, "parallel=fsdp2", "name=documents")
    assert ranks(2, live, folder) == [True, True]
    losses = series(folder)
    assert losses[12] < losses[1] - 0.5


def test_a_mixture_keeps_its_weights_and_says_so(text: tuple[str, ...], ranks: RankPool, tmp_path: Path) -> None:
    own = [each for each in text if not each.startswith("data")]
    argv = ("data=mixture", "~data.sources.code", "~data.weights.code", "data.processes=1")
    added = ("+data/source@data.sources.other=synthetic", "data.sources.other.seed=1", "+data.weights.other=0.3")
    folder = opened(*own, *argv, *added, "data.weights.synthetic=0.7", "parallel=ddp2", "name=mixture")
    assert ranks(2, live, folder) == [True, True]
    for line in (line for line in records(folder) if "loss" in line):
        samples = 4 * line["step"]
        for name, weight in (("synthetic", 0.7), ("other", 0.3)):
            assert abs(line[f"data/{name}/tokens"] / 32 - weight * samples) <= 1
            assert line[f"data/{name}/share"] == line[f"data/{name}/tokens"] / 32 / samples


def test_an_initial_checkpoint_of_another_run(text: tuple[str, ...], ranks: RankPool) -> None:
    first = opened(*text, "task.steps=6", "name=first")
    assert ranks(1, live, first) == [True]
    start = (f"checkpoint.initial={first}",)
    further = opened(*text, *start, "optim.lr=1e-3", "name=further")
    assert ranks(1, live, further) == [True]
    assert list(series(further)) == list(range(7, 13))
    with pytest.raises(UserError, match=r"has done 6 steps.*task.steps=6 leaves nothing to do; pass more steps"):
        opened(*text, *start, "task.steps=6", "optim.lr=1e-3", "name=stale")
    with pytest.raises(UserError, match="has drawn its samples by seed=0, not 7; pass seed=0"):
        opened(*text, *start, "seed=7", "name=other")
    other = opened(*text, *start, "data.validation_fraction=0.3", "name=other")
    ((problem,),) = ranks(1, live, other)
    assert "data, tokenizer, seed and task.seq_len must be the checkpoint's" in problem
