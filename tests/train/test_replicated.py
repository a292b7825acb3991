"""Replica groups wrap the training loop: who reads the plain one meets none of their words."""

import re
from pathlib import Path

import pytest

from src.train.loop import Loop
from src.train.replicated.loop import ReplicatedLoop
from src.train.replicated.step import ReplicatedStepper
from src.train.step.stepper import Stepper

HOME = Path(__file__).parents[2]
THEIRS = re.compile(
    r"replica|fault_tolerance|peers?\b|quorum|\bheal|allreduce|commit|\bouter|lighthouse|other groups", re.I
)


@pytest.mark.parametrize("module", ["loop", "step/stepper", "step/metrics", "state"])
def test_the_plain_loop_has_none_of_their_words(module: str) -> None:
    lines = (HOME / f"src/train/{module}.py").read_text().splitlines()
    assert [line for line in lines if THEIRS.search(line)] == []


def test_the_words_are_those_of_the_wrappers() -> None:
    for module in ("replicated/loop", "replicated/step"):
        assert len(THEIRS.findall((HOME / f"src/train/{module}.py").read_text())) > 5
    assert issubclass(ReplicatedLoop, Loop)
    assert issubclass(ReplicatedStepper, Stepper)
