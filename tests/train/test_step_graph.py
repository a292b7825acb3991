"""A step that is replayed as a CUDA graph has the bits of the step that Python launches."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import Tensor

from src.data.batches import Batch
from src.distributed.process.rank_context import RankContext as Process
from src.errors import ConfigError, PlanError
from src.optim.state import scale_learning_rates
from src.planning.plan import plan
from src.train.setup import Training, build_training
from src.train.step.graph import EAGER_STEPS
from src.train.step.stepper import Readback, StepOutcome
from src.train.validate import summed_loss
from tests.distributed.layouts import rows
from tests.models.shapes import tiny_deepseek, tiny_llama
from tests.train.runs import Gpus, make_run

WORDS = tiny_llama().vocab_size
LENGTH = 128
STEPS = EAGER_STEPS + 5
STOPPED, INFINITE = EAGER_STEPS + 1, EAGER_STEPS + 2  # steps, from 0
KINDS: dict[str, dict[str, Any]] = {
    "dense": {"model": tiny_llama()},
    "documents": {"model": tiny_llama(attention="flex", mask="block_causal", head_dim=16)},
    "experts": {"model": tiny_deepseek(moe={"score_func": "sigmoid", "route_norm": True, "load_balance_coeff": 1e-3})},
    "recomputed": {"model": tiny_deepseek(), "recompute": "selective"},
    "lion": {"model": tiny_llama(), "optim": "lion"},
}


@contextmanager
def trainer(compile: str, **sections: Any) -> Iterator[Training]:
    run = make_run(precision="bf16", parallel="single", compile=compile, **sections)
    process = Process.join("cuda", 1, timeout_seconds=60)
    try:
        yield build_training(run, process, skips=3)
    finally:
        process.leave()


def batches(step: int, *, documents: bool) -> list[Batch]:
    """Two micro-batches, in page-locked memory as the loader hands them out."""
    made = [rows(8, LENGTH, WORDS, seed=2 * step + number) for number in range(2)]
    numbers = torch.arange(LENGTH).expand(8, LENGTH) // (16 + step) if documents else None
    places = torch.arange(LENGTH).expand(8, LENGTH) % (16 + step) if documents else None
    keep = (None if x is None else x.contiguous() for x in (places, None if numbers is None else numbers.int()))
    places, numbers = keep
    return [Batch(one.tokens, one.labels, places, numbers, ()).pinned() for one in made]


def lived(training: Training, *, documents: bool) -> tuple[list[StepOutcome], dict[str, Tensor], float]:
    """Outcomes of all steps, with a rate that changes, a vote to stop and an infinite gradient among them; weights and
    moments afterwards; a validation loss in between.
    """
    readback, outcomes, validation = Readback(), [], 0.0
    copies = training.network.weights
    assert copies is not None
    for step in range(STEPS):
        scale_learning_rates(training.state.optimizer, 1.0 - step / STEPS)
        kept = copies.copies[0].detach().clone()
        if step == INFINITE:
            copies.copies[0].data.fill_(float("inf"))
        outcomes += readback.push(step, training.stepper(batches(step, documents=documents), stop=step == STOPPED))
        if step == INFINITE:
            copies.copies[0].data.copy_(kept)
        if step == STEPS - 2:
            found = summed_loss(training.network, batches(99, documents=documents), lambda: False)
            assert found is not None
            validation = found[0]
    outcomes += readback.flush()
    state = {
        f"{name}.{key}": value.clone()
        for name, parameter in training.network.named_parameters()
        for key, value in {"weight": parameter.detach(), **training.state.optimizer.state[parameter]}.items()
    }
    return outcomes, state, validation


@pytest.mark.gpu
@pytest.mark.parametrize("kind", KINDS)
def test_replayed_steps_are_those_that_python_launches(kind: str) -> None:
    """Bitwise: the kernels are the same. Losses, norms, skips, votes, weights, moments, validation."""
    lives = []
    for compile in ("blocks", "graph"):
        with trainer(compile, **KINDS[kind]) as training:
            lives.append(lived(training, documents=kind == "documents"))
            kept = training.stepper.captured_bytes
            assert kept > 0 if compile == "graph" else kept == 0
    (launched, first, checked), (replayed, second, rechecked) = lives
    assert [outcome.step for outcome in replayed] == list(range(STEPS))
    assert replayed[:INFINITE] + replayed[INFINITE + 1 :] == launched[:INFINITE] + launched[INFINITE + 1 :]
    assert [outcome.skipped for outcome in replayed] == [step == INFINITE for step in range(STEPS)]
    assert [outcome.stop for outcome in replayed] == [step == STOPPED for step in range(STEPS)]
    assert first.keys() == second.keys()
    assert [name for name, value in first.items() if not torch.equal(value, second[name])] == []
    assert rechecked == checked


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"parallel": "fsdp2"}, "there are 2 ranks; pass parallel=single"),
        ({}, "there is no GPU here; pass compile=blocks"),
    ],
)
def test_what_cannot_be_captured_is_refused_by_name(changes: dict[str, Any], told: str) -> None:
    devices = None if changes else Gpus()
    with pytest.raises(PlanError, match=f"compile.graph=true.*{told}"):
        plan(make_run(compile="graph", **changes), devices=devices)


def test_a_rank_without_a_gpu_says_so() -> None:
    process = Process.join("cpu", 1, timeout_seconds=60)
    try:
        with pytest.raises(ConfigError, match=r"compile\.graph=true needs a CUDA device, not cpu"):
            build_training(make_run(parallel="single", compile="graph"), process, skips=0)
    finally:
        process.leave()
