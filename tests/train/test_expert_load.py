"""The load that a run logs, under every layout, against a count of the router's choices by hand."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from src.metrics.expert_load import ExpertLoad
from src.models.moe.router import Router
from src.train.expert_load import expert_load
from src.train.step.stepper import Stepper
from tests.distributed.layouts import adamw, degrees, parallel_network, rows, share
from tests.models.shapes import tiny_deepseek, tiny_llama
from tests.ranks import RankPool

SEQUENCES, LENGTH = 8, 16
CONFIG = tiny_deepseek(n_layers=4, moe={"score_func": "sigmoid", "route_norm": True, "load_balance_coeff": 1e-2})
ASKED = SEQUENCES * LENGTH * 3


def trained(layout: str, recompute: str, steps: int) -> ExpertLoad | None:
    """What is logged after some steps, each followed by a validation on other tokens."""
    torch.manual_seed(0)
    network = parallel_network(CONFIG, degrees(layout), recompute=recompute)
    optimizer = adamw(network)
    stepper = Stepper(network, optimizer, max_norm=1.0, skips=1)
    for step in range(steps):
        stepper(share(rows(SEQUENCES, LENGTH, CONFIG.vocab_size, seed=step), network.mesh, 2), stop=False)
        with network.inference():
            network.loss(share(rows(SEQUENCES, LENGTH, CONFIG.vocab_size, seed=9), network.mesh, 2))
    return expert_load(network, SEQUENCES * LENGTH)


def by_hand() -> dict[int, list[int]]:
    """Choices of the first step, as one forward pass of the whole batch makes them."""
    (model,) = parallel_network(CONFIG, degrees("single")).stages
    counts: dict[int, list[int]] = {}

    def count(name: str, _router: nn.Module, _inputs: Any, routing: tuple[Tensor, Tensor, Tensor]) -> None:
        counts[int(name.split(".")[1])] = [int((routing[1] == expert).sum()) for expert in range(8)]

    for name, module in model.named_modules():
        if isinstance(module, Router):
            module.register_forward_hook(lambda *args, name=name: count(name, *args))
    model(rows(SEQUENCES, LENGTH, CONFIG.vocab_size, seed=0).tokens)
    return counts


@pytest.fixture(scope="module")
def counted(ranks: RankPool) -> dict[int, list[int]]:
    return ranks(1, by_hand)[0]


@pytest.mark.parametrize(
    ("layout", "recompute"),
    [
        ("single", "full"),
        ("fsdp2", "selective"),
        ("hsdp2x2", "none"),
        ("cp2_fsdp2", "none"),
        ("pp2_fsdp2", "none"),
        ("fsdp2_ep2", "full"),
        ("pp2_fsdp2_ep2", "none"),
        ("tp2_fsdp2_ep2", "none"),
    ],
)
def test_what_is_logged_is_what_was_chosen(
    ranks: RankPool, counted: dict[int, list[int]], layout: str, recompute: str
) -> None:
    """On every rank: all layers of the model, none counted twice, and no token of a validation."""
    assert list(counted) == [1, 2, 3]
    for load in ranks(degrees(layout).world, trained, layout, recompute, 1):
        assert {number: list(layer.rows) for number, layer in load.layers.items()} == counted
        assert all(load.values()[f"experts/layer_{number:02}/dropped"] == 0 for number in counted)
        assert load.asked == ASKED
        # Between ranks it takes a while, known to all that hold the layer.
        assert all((layer.travel_ms is None) == ("ep" not in layout) for layer in load.layers.values())
        assert all(0 < spent < 60_000 for layer in load.layers.values() for spent in layer.travel_ms or ())
        # The first update moves each bias by the rate, up or down, less the mean of these.
        assert all(0 < layer.bias_norm <= 0.01 * 8**0.5 for layer in load.layers.values())


def test_each_step_counts_anew(ranks: RankPool) -> None:
    (load,) = ranks(1, trained, "single", "none", 3)
    assert all(sum(layer.rows) == ASKED for layer in load.layers.values())


def of_others() -> tuple[ExpertLoad | None, ExpertLoad | None]:
    dense, fresh = (parallel_network(config, degrees("single")) for config in (tiny_llama(), CONFIG))
    return expert_load(dense, 128), expert_load(fresh, 128)


def test_nothing_to_tell_of_a_dense_model_or_before_a_step(ranks: RankPool) -> None:
    assert ranks(1, of_others)[0] == (None, None)
