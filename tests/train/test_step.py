"""One step decides for all ranks, before the update, and never makes the host wait for the device."""

from collections.abc import Sequence
from typing import Any
from unittest.mock import patch

import pytest
import torch
from torch import Tensor

from src.data.batches import IGNORED, Batch
from src.optim.adamw import AdamW
from src.train.setup import build_training
from src.train.step.stepper import Readback, Stepper
from tests.distributed.layouts import degrees, parallel_network, rows, share
from tests.models.shapes import tiny_deepseek, tiny_llama
from tests.ranks import RankPool
from tests.train.runs import make_run

WORDS = tiny_llama().vocab_size
SKIPS = 2
GOOD, BAD = "good", "bad"


def adamw(**changes: Any) -> AdamW:
    fields = {"lr": 1e-2, "beta1": 0.9, "beta2": 0.95, "eps": 1e-8, "weight_decay": 0.1, "max_norm": 1.0}
    rest = {"decay_norms_and_embeddings": True, "moments": "float32", "fused": True}
    return AdamW.model_validate(fields | rest | changes)


def bits(stepper: Stepper) -> list[bytes]:
    """Everything that a step may change, on this rank."""
    tensors = [parameter for _, parameter in stepper.network.named_parameters()]
    tensors += [value for state in stepper.optimizer.state.values() for value in state.values()]
    local = (tensor.to_local() if hasattr(tensor, "to_local") else tensor for tensor in tensors)
    return [tensor.detach().float().numpy().tobytes() for tensor in local]


def story(kinds: Sequence[str], optim: dict[str, Any]) -> list[tuple[bool, bool, bool, bool]]:
    """Of each step: whether it was skipped, is the last of too many, changed anything, and had a finite loss."""
    network = parallel_network(tiny_llama(), degrees("fsdp2"))
    config = adamw(**optim)
    optimizer = config.build(network.named_parameters(), torch.device("cpu"))
    stepper = Stepper(network, optimizer, config.max_norm, SKIPS)
    original = network.backward

    def poisoned(batches: Sequence[Batch], scale: Tensor) -> Tensor:
        loss = original(batches, scale)
        if network.mesh.data_rank == 1:
            name, parameter = next(iter(network.named_parameters()))
            assert parameter.grad is not None, name
            parameter.grad.to_local()[0, 0] = float("inf")  # type: ignore[attr-defined]
        return loss

    told = []
    for number, kind in enumerate(kinds):
        before = bits(stepper)
        with patch.object(network, "backward", poisoned if kind == BAD else original):
            outcome = stepper(share(rows(4, 16, WORDS, seed=number), network.mesh, 1), stop=False)
        (one,) = Readback().push(number, outcome)
        told.append((one.skipped, one.dead, bits(stepper) != before, one.loss == one.loss))
    return told


@pytest.mark.parametrize("optim", [{}, {"fused": False}, {"fused": False, "moments": "bfloat16", "max_norm": None}])
def test_an_infinite_gradient_on_one_rank_leaves_all_ranks_untouched(ranks: RankPool, optim: dict[str, Any]) -> None:
    updated, skipped, dead = (False, False, True, True), (True, False, False, True), (True, True, False, True)
    kinds = [GOOD, BAD, GOOD, BAD, BAD, GOOD, BAD, BAD, BAD]
    expected = [updated, skipped, updated, skipped, skipped, updated, skipped, skipped, dead]
    assert ranks(2, story, kinds, optim) == [expected, expected]


def test_nothing_is_updated_after_too_many(ranks: RankPool) -> None:
    """The host may learn of the end a step late: that step must not move what a checkpoint would keep."""
    for told in ranks(2, story, [GOOD, BAD, BAD, BAD, GOOD, GOOD], {}):
        assert [changed for _, _, changed, _ in told] == [True, False, False, False, False, False]
        assert [dead for _, dead, _, _ in told] == [False, False, False, True, True, True]


def uneven(micro_batches: int) -> tuple[float, float, float, list[float]]:
    """Loss, norm, tokens and a gradient's trace of a batch whose rows have very different numbers of labels."""
    network = parallel_network(tiny_llama(), degrees("ddp2" if torch.distributed.get_world_size() == 2 else "single"))
    optimizer = adamw(max_norm=None).build(network.named_parameters(), torch.device("cpu"))
    batch = rows(4, 16, WORDS)
    batch.labels[0, 1:] = IGNORED
    batch.labels[1] = IGNORED  # a rank's micro-batch without any
    outcome = Stepper(network, optimizer, None, 0)(share(batch, network.mesh, micro_batches), stop=True)
    (one,) = Readback().push(1, outcome)
    assert one.stop
    (model,) = network.stages
    with torch.no_grad():
        logits = model(batch.tokens)
    return one.loss, one.grad_norm, one.tokens, logits.flatten()[:50].tolist()


def test_the_loss_is_a_mean_over_all_labels_of_the_step(ranks: RankPool) -> None:
    (alone,) = ranks(1, uneven, 1)
    assert alone[2] == 1 + (16 - 6) + (16 - 9)
    for micro_batches in (1, 2):
        for found in ranks(2, uneven, micro_batches):
            assert found[:2] == pytest.approx(alone[:2], rel=1e-6)
            assert found[2] == alone[2]
            assert found[3] == pytest.approx(alone[3], abs=1e-5)


# FlexAttention's kernel takes heads of 16 elements and more.
WITHOUT_WAITS = {
    "dense": {"model": tiny_llama()},
    "documents": {"model": tiny_llama(attention="flex", mask="block_causal", head_dim=16)},
    "experts": {"model": tiny_deepseek()},
    "compiled experts": {
        "model": tiny_deepseek(moe={"score_func": "sigmoid", "route_norm": True}),
        "compile": "blocks",
    },
    "recomputed experts": {"model": tiny_deepseek(), "compile": "blocks", "recompute": "selective"},
}


@pytest.mark.gpu
@pytest.mark.parametrize("kind", WITHOUT_WAITS)
def test_no_step_waits_for_the_device(kind: str) -> None:
    """torch raises at any call that would; the outcome of a step is read while the next one runs."""
    from src.distributed.process.rank_context import RankContext as Process

    documents = kind == "documents"
    run = make_run(precision="bf16", parallel="single", **WITHOUT_WAITS[kind])
    process = Process.join("cuda", 1, timeout_seconds=60)
    training = build_training(run, process, skips=0)
    made = rows(8, 128, WORDS)
    numbers = torch.zeros_like(made.tokens, dtype=torch.int32) if documents else None
    places = torch.arange(128).expand(8, 128).contiguous() if documents else None
    batches = [Batch(made.tokens, made.labels, places, numbers, ()).pinned()] * 2
    readback = Readback()
    for step in range(2):
        readback.push(step, training.stepper(batches, stop=False))
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        for step in (2, 3):
            outcomes = readback.push(step, training.stepper(batches, stop=False))
    finally:
        torch.cuda.set_sync_debug_mode("default")
        process.leave()
    assert [outcome.step for outcome in outcomes] == [2]
    assert readback.flush()[0].loss < outcomes[0].loss
