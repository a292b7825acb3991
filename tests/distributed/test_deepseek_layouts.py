"""A mixture of experts under every layout that its room has: weights, losses, gradients, and biases that balance."""

from typing import Any

import pytest
import torch

from src.train.step.stepper import Stepper
from tests.distributed.layouts import adamw, degrees, parallel_network, rows, share
from tests.distributed.test_layouts import whole
from tests.models.shapes import STRETCHED, tiny_deepseek
from tests.ranks import RankPool

LAYOUTS = ["ddp2", "fsdp2", "hsdp2x2", "cp2_fsdp2", "pp2", "pp2_fsdp2"]
LAYOUTS += ["fsdp2_ep2", "fsdp4_ep2", "fsdp4_ep4", "hsdp2x2_ep2", "cp2_fsdp2_ep2", "pp2_fsdp2_ep2"]
LAYOUTS += ["tp2", "tp2_etp2", "tp2_fsdp2_ep2", "tp2_fsdp2_ep2_etp2", "pp2_tp2_ep2"]
CORNERS = ("pp2", "fsdp4_ep4", "cp2_fsdp2_ep2", "tp2_fsdp2_ep2_etp2", "pp2_tp2_ep2")  # each axis, and products of them
STEPS = 3
MOE = {
    "score_func": "sigmoid",
    "route_norm": True,
    "route_scale": 2.5,
    "num_expert_groups": 4,
    "num_limited_groups": 2,
    "load_balance_coeff": 1e-2,
}


def trained(layout: str, recompute: str = "none", steps: int = STEPS, poisoned: bool = False) -> dict[str, Any]:
    """Losses, norms, last weights and biases of a few steps; of a `poisoned` run the last norm is not finite."""
    torch.manual_seed(0)
    config = tiny_deepseek(n_layers=4, q_lora_rank=40, rope_scaling=STRETCHED, moe=MOE)
    network = parallel_network(config, degrees(layout), recompute=recompute)
    optimizer = adamw(network)
    stepper = Stepper(network, optimizer, max_norm=1.0, skips=1)
    losses, norms = [], []
    for step in range(steps):
        batch = rows(8, 16, config.vocab_size, seed=step)
        if poisoned and step == steps - 1:
            stepper.gradients.squares = lambda: torch.tensor(float("inf"))  # type: ignore[method-assign]
        outcome = stepper(share(batch, network.mesh, micro_batches=2), stop=False)
        losses.append(outcome["loss"].item())
        norms.append(outcome["grad_norm"].item())
        with network.inference():
            network.loss(share(batch, network.mesh, micro_batches=2))
    left = [int(moe.tokens_per_expert.sum()) for part in network.stages for moe in part.mixtures()]
    return {
        "losses": losses,
        "norms": norms,
        "left": left,
        "end": {name: whole(tensor) for name, tensor in network.tensors().items()},
    }


@pytest.fixture(scope="module")
def single(ranks: RankPool) -> dict[str, Any]:
    return ranks(1, trained, "single")[0]


@pytest.mark.parametrize(
    "layout", [pytest.param(each, marks=() if each in CORNERS else pytest.mark.slow) for each in LAYOUTS]
)
def test_layout_trains_like_one_device(ranks: RankPool, single: dict[str, Any], layout: str) -> None:
    results = ranks(degrees(layout).world, trained, layout)
    assert set().union(*(result["end"] for result in results)) == set(single["end"])
    for result in results:
        assert result["losses"] == pytest.approx(single["losses"], rel=1e-5)
        assert result["norms"] == pytest.approx(single["norms"], rel=1e-4)
        assert not any(result["left"]), "validation must not count tokens"
        for name, tensor in result["end"].items():
            # Counts are whole numbers and biases move by their signs: equal, where weights are only near.
            tolerance = 1e-8 if name.endswith("expert_bias") else 2e-3
            torch.testing.assert_close(tensor, single["end"][name], rtol=0, atol=tolerance, msg=name)


def test_biases_have_moved(single: dict[str, Any]) -> None:
    for layer in (1, 2, 3):
        bias = single["end"][f"layers.{layer}.moe.expert_bias"]
        assert 0 < bias.abs().max() < 0.061
        assert abs(float(bias.sum())) < 1e-6


@pytest.mark.parametrize("mode", ["full", "selective"])
def test_recomputation_counts_no_token_twice(ranks: RankPool, single: dict[str, Any], mode: str) -> None:
    result = ranks(2, trained, "fsdp2", mode)[0]
    assert result["losses"] == pytest.approx(single["losses"], rel=1e-5)
    assert result["norms"] == pytest.approx(single["norms"], rel=1e-4)
    for name, tensor in single["end"].items():
        if name.endswith("expert_bias"):
            torch.testing.assert_close(result["end"][name], tensor, rtol=0, atol=1e-8)


def counted(mode: str) -> list[list[int]]:
    """Tokens that each expert of each layer got in one step's passes, before any update."""
    config = tiny_deepseek()
    network = parallel_network(config, degrees("single"), recompute=mode)
    batch = rows(4, 16, config.vocab_size)
    network.backward(share(batch, network.mesh, micro_batches=2), torch.tensor(1e-2))
    return [moe.tokens_per_expert.tolist() for part in network.stages for moe in part.mixtures()]


@pytest.mark.parametrize("mode", ["full", "selective", "every2"])
def test_counts_are_those_of_the_forward_pass(ranks: RankPool, mode: str) -> None:
    counts = ranks(1, counted, mode)[0]
    assert [sum(layer) for layer in counts] == [4 * 16 * 3] * 2
    assert counts == ranks(1, counted, "none")[0]


def test_a_skipped_step_moves_no_bias(ranks: RankPool) -> None:
    before = ranks(2, trained, "fsdp2", "none", STEPS - 1)[0]["end"]
    skipped = ranks(2, trained, "fsdp2", "none", STEPS, True)[0]
    assert skipped["norms"][-1] == float("inf")
    assert not any(skipped["left"])
    for name, tensor in before.items():
        assert torch.equal(skipped["end"][name], tensor), name
