"""Whoever wants another number of each step registers it in one place; it costs no collective."""

from pathlib import Path
from unittest.mock import patch

import pytest
import torch
import torch.distributed as dist

from src.train.step import metrics as step_metrics
from src.train.step.metrics import STEP_METRICS, StepMetric
from src.train.step.stepper import Stepper
from tests.distributed.layouts import degrees, parallel_network
from tests.end_to_end.lives import TINY, live, opened, records, write_text
from tests.models.shapes import tiny_llama
from tests.ranks import RankPool

ADDED = (
    StepMetric("rank", "mean", lambda _: torch.tensor(float(dist.get_rank()))),
    StepMetric("rows", "sum", lambda now: torch.tensor(float(sum(len(each.tokens) for each in now.batches)))),
    StepMetric("double_loss", "sum", STEP_METRICS[0].measure, lambda loss: 2.0 * loss),
)


def recorded(folder: Path, added: bool) -> int:
    """A rank's life, and how often it entered an all-reduce."""
    with (
        patch.object(step_metrics, "STEP_METRICS", (*STEP_METRICS, *(ADDED if added else ()))),
        patch.object(dist, "all_reduce", side_effect=dist.all_reduce) as counted,
    ):
        assert live(folder) is True
        return counted.call_count


def test_a_new_metric_is_in_the_log_and_costs_no_collective(ranks: RankPool, tmp_path: Path) -> None:
    argv = (*TINY, *write_text(tmp_path), f"root={tmp_path / 'runs'}", "parallel=fsdp2", "task.steps=3")
    plain, more = opened(*argv, "name=plain"), opened(*argv, "name=more")
    assert ranks(2, recorded, more, True) == ranks(2, recorded, plain, False)
    without, found = ([line for line in records(folder) if "loss" in line] for folder in (plain, more))
    assert [line["step"] for line in found] == [1, 2, 3]
    for line, other in zip(found, without, strict=True):
        assert (line["rank"], line["rows"]) == (0.5, 4.0)
        assert line["double_loss"] == 2.0 * line["loss"]
        assert (line["loss"], line["grad_norm"]) == (other["loss"], other["grad_norm"])
        assert set(line) - set(other) == {"rank", "rows", "double_loss"}


def test_a_name_that_is_taken_is_refused(ranks: RankPool) -> None:
    assert ranks(1, refused) == [True]


def refused() -> bool:
    network = parallel_network(tiny_llama(), degrees("single"))
    taken = StepMetric("tokens", "sum", lambda now: now.loss)
    with pytest.raises(AssertionError, match="a name twice"):
        Stepper(network, torch.optim.SGD([torch.zeros(1)]), None, 0, metrics=(*STEP_METRICS, taken))
    return True
