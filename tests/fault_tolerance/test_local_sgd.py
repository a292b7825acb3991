"""What the options of LocalSGD and DiLoCo refuse, and how an exchange that failed ends."""

import os
from collections.abc import Callable
from typing import Any
from unittest.mock import patch

import pytest
import torch
from torch import Tensor

from src.distributed.pipeline.stages import modules
from src.distributed.process.rank_context import RankContext
from src.fault_tolerance.config import Asked
from src.fault_tolerance.local_sgd_groups import LocalSGDGroups
from src.fault_tolerance.replica_groups import StateCallbacks, Taken
from src.fault_tolerance.table import Quorum
from src.train.setup import build_training
from tests.fault_tolerance.by_hand import plain
from tests.ranks import RankPool as Workers
from tests.train.runs import changed, make_run, section

HALVES = (modules(4)[:3], modules(4)[3:])
REFUSED: dict[str, tuple[dict[str, Any], dict[str, Any], tuple[str, ...]]] = {
    "fragments": ({"sync_steps": 10, "fragments": 4}, {}, ("sync_steps=10", "8 or 12")),
    "delay": ({"sync_steps": 8, "fragments": 2, "delay_steps": 4}, {}, ("delay_steps=4", "at most 3")),
    "too many": ({"sync_steps": 7, "fragments": 7}, {"steps": 7}, ("fragments=7", "at most 6")),
    "unnamed": ({"fragment_modules": HALVES}, {}, ("names 2 fragments", "pass fragments=2")),
    "missing": ({"fragments": 2, "fragment_modules": (HALVES[0], HALVES[0])}, {}, ("missing layers.2", "twice")),
    "steps": ({"sync_steps": 20, "fragments": 2}, {"steps": 25}, ("task.steps=25", "20 or 30")),
    "saves": ({"delay_steps": 1}, {"save_every": 30}, ("checkpoint.every=30", "20 or 40")),
    "batch": ({"groups": 5}, {}, ("groups=5", "at most 4")),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_cannot_be_is_told_with_what_can(case: str) -> None:
    changes, asks, words = REFUSED[case]
    options = changed(section("fault_tolerance", "diloco"), **changes)
    told = "; ".join(
        options.problems(Asked(**({"micro_batches": 4, "n_layers": 4, "steps": 100, "save_every": 20} | asks)))
    )
    assert all(word in told for word in words), told


@pytest.mark.parametrize("name", ["local_sgd", "diloco"])
def test_the_presets_are_fine(name: str) -> None:
    assert section("fault_tolerance", name).problems(Asked(2, 4, 100, 7)) == []


class Alone:
    """A membership of one group, whose vote can be no."""

    group = failures = 0
    heal_seconds = 0.0
    error: Exception | None = None

    def __init__(self) -> None:
        self.answers: list[bool] = []
        self.asked: list[bool] = []

    def start_quorum(self, version: int, own: StateCallbacks) -> Quorum:
        return Quorum(1, 0, 1, healed=False)

    def outside(self) -> set[int]:
        return set()

    def vote(self, *, fine: bool) -> bool:
        self.asked.append(fine)
        return self.answers.pop(0) and fine


class Group:
    def getBackendName(self) -> str:  # noqa: N802  (torch's name)
        return "gloo"


def rounds(answers: list[bool], spoil: Callable[[dict[str, Tensor], int], None]) -> dict[str, Any]:
    """Three rounds of two fragments; before each exchange `spoil` changes the weights."""
    options = changed(section("fault_tolerance", "diloco"), sync_steps=2, fragments=2, outer_lr=1.0, outer_momentum=0.0)
    ranks, members = RankContext.join("cpu", 1, timeout_seconds=60.0), Alone()
    members.answers, members.group = answers, Group()  # type: ignore[assignment]
    told, moved = list[str](), list[set[int]]()
    with patch.dict(os.environ, {"REPLICA_GROUP_ID": "0", "TORCHFT_LIGHTHOUSE": "http://nowhere:1"}):
        groups = LocalSGDGroups(options, ranks)
    groups._membership = members  # type: ignore[assignment]
    training = build_training(make_run(), ranks, skips=0, groups=groups)
    groups.register(StateCallbacks(dict, lambda _: None, told.append, lambda: False, checksum=sum))
    assert groups.start_quorum(0, 4) == range(4)
    for step in (1, 2, 3):
        weights = plain(training)
        before = {name: tensor.clone() for name, tensor in weights.items()}
        spoil(weights, step)
        samples = range(4 * step - 4, 4 * step)
        groups.outer_step(step, 100, Taken(samples, sum(samples)))
        ends = {0: "tok_embeddings.weight", 1: "output.weight"}
        moved.append({f for f, name in ends.items() if not torch.equal(weights[name], before[name])})
    return {"asked": members.asked, "told": told, "moved": moved, "metrics": dict(groups.metrics())}


def add_one(weights: dict[str, Tensor], _: int) -> None:
    for tensor in weights.values():
        tensor.add_(1.0)


def break_once(weights: dict[str, Tensor], step: int) -> None:
    add_one(weights, step)
    if step == 1:
        weights["tok_embeddings.weight"][0, 0] = float("nan")


@pytest.mark.parametrize(("answers", "spoil"), [([False, True, True], add_one), ([True, True, True], break_once)])
def test_a_fragment_that_was_refused_goes_back_and_is_the_next_again(
    ranks: Workers, answers: list[bool], spoil: Callable[[dict[str, Tensor], int], None]
) -> None:
    (found,) = ranks(1, rounds, answers, spoil)
    assert found["asked"] == [spoil is add_one, True, True]
    # Fragment 0 is back where it was after the first round, and takes its step in the second; 1 always keeps its own.
    assert found["moved"] == [{1}, {0, 1}, {0, 1}]
    (line,) = found["told"][1:]
    assert "fragment 0 could not be exchanged" in line
    metrics = found["metrics"]
    assert (metrics["outer/syncs"], metrics["outer/failed_syncs"]) == (2, 1)
