"""task=merge: the mean of checkpoints and exports, on any layout, and what follows from it."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from src.errors import UserError
from tests.end_to_end.lives import WORLDS, live, opened, series, values
from tests.end_to_end.test_text import asked, plain, scores
from tests.end_to_end.test_weights import exported
from tests.ranks import RankPool

Straight = Callable[[str], Path]


def merged(ranks: RankPool, run: Path, *argv: str, layout: str = "single") -> Path:
    """The folder of a merge, after its life."""
    more = (f"root={run.parent}", "cluster.gpus=0", "data.processes=1", f"parallel={layout}")
    folder = opened("task=merge", *more, *argv)
    assert ranks(WORLDS[layout], live, folder) == [True] * WORLDS[layout]
    return folder


def told(folder: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((folder / "merge.json").read_text())
    return found


def weights(run: Path, step: int) -> dict[str, torch.Tensor]:
    found: dict[str, torch.Tensor] = plain(run, step).state_dict()
    return found


def test_checkpoints_of_a_run_are_averaged_alike_on_every_layout(straight: Straight, ranks: RankPool) -> None:
    """Against float64; the losses are those of task=evaluate, and the mean goes on as any checkpoint does."""
    run = straight("single")
    words = (f"runs={run}", "steps=[6,12]", "weights=[1,3]", "samples=8", "micro_batch=2")
    single, sharded = (
        merged(ranks, run, *words, f"name=merge-{each}", layout=each) for each in ("single", "tp2_fsdp2")
    )
    assert single.name.startswith("merge-single-")
    early, late, mean, other = (weights(*each) for each in ((run, 6), (run, 12), (single, 12), (sharded, 12)))
    for name, found in mean.items():
        expected = 0.25 * early[name].double() + 0.75 * late[name].double()
        torch.testing.assert_close(found.double(), expected, rtol=1e-6, atol=1e-8, msg=name)
        assert torch.equal(found, other[name]), name
    parts = told(single)["merged"]
    assert [(part["source"], part["step"], part["weight"]) for part in parts] == [
        (str(run), 6, 0.25),
        (str(run), 12, 0.75),
    ]
    losses = [*(part["validation_loss"] for part in parts), told(single)["validation_loss"]]
    for folder, step, loss in ((run, 6, losses[0]), (single, 12, losses[2])):
        again = asked(ranks, "evaluate", folder, f"step={step}", "samples=8", f"name=again-{folder.name}-{step}")
        assert scores(again)["text"]["loss"] == pytest.approx(loss, rel=1e-6)
    assert len(set(losses)) == 3
    assert told(sharded)["validation_loss"] == pytest.approx(losses[2], rel=1e-5)


@pytest.mark.slow
def test_the_mean_starts_a_run_and_exports_are_averaged_too(
    text: tuple[str, ...], straight: Straight, ranks: RankPool, tmp_path: Path
) -> None:
    """An export and the checkpoint that it was made of: their mean is either, bit for bit."""
    run = straight("single")
    exported(ranks, run, f"to={tmp_path / 'out'}", "task.check=false")
    folder = merged(
        ranks, run, f"runs=[{run},hf:{tmp_path / 'out'},{run}]", "weights=[2,1,5]", "samples=0", "name=same"
    )
    assert [(part["step"], part["validation_loss"]) for part in told(folder)["merged"]] == [
        (12, None),
        (None, None),
        (12, None),
    ]
    exported(ranks, folder, f"to={tmp_path / 'again'}", "task.check=false")
    first, again = (load_file(tmp_path / name / "model.safetensors") for name in ("out", "again"))
    assert first.keys() == again.keys()
    assert all(torch.equal(each, again[name]) for name, each in first.items())
    start = (*text, f"checkpoint.initial={folder}", "task.steps=2", "name=from_mean")
    with pytest.raises(
        UserError, match=r"has weights alone, and no optimizer to go on with; pass checkpoint.progress=none"
    ):
        opened(*start)
    begun = opened(*start, "checkpoint.progress=none")
    assert ranks(1, live, begun) == [True]
    assert series(begun)[1] < series(straight("single"))[1] - 1, "it begins where the weights had come to"
    assert values(folder, 12)["position"] == 0
