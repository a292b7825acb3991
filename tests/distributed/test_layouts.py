"""Every layout computes what one device computes: weights, loss, gradients, updates."""

from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from torch.distributed.tensor import DTensor

from src.train.step.stepper import Readback, Stepper
from tests.distributed.layouts import adamw, degrees, parallel_network, rows, share
from tests.models.shapes import tiny_llama
from tests.ranks import RankPool

LAYOUTS = ["ddp2", "fsdp2", "tp2", "hsdp2x2", "tp2_fsdp2", "ddp4", "fsdp4", "tp4"]
STEPS = 2


def trained(layout: str, options: dict[str, Any], changes: dict[str, Any]) -> dict[str, Any]:
    """Losses, norms, first gradients and last weights of a few steps."""
    torch.manual_seed(0)
    config = tiny_llama(**changes)
    network = parallel_network(
        config, degrees(layout, **options.get("degrees", {})), recompute=options.get("recompute", "none")
    )
    optimizer = adamw(network)
    stepper = Stepper(network, optimizer, max_norm=options.get("max_norm", 1.0), skips=0)
    start = {name: whole(parameter) for name, parameter in network.named_parameters()}
    losses, norms = [], []
    for step in range(STEPS):
        batch = rows(8, 16, config.vocab_size, seed=step)
        outcome = stepper(share(batch, network.mesh, micro_batches=options.get("micro_batches", 2)), stop=False)
        losses.append(outcome["loss"].item())
        norms.append(outcome["grad_norm"].item())
    end = {name: whole(parameter) for name, parameter in network.named_parameters()}
    return {"losses": losses, "norms": norms, "start": start, "end": end, "names": set(network.tensors())}


def whole(tensor: torch.Tensor) -> torch.Tensor:
    return (tensor.full_tensor() if isinstance(tensor, DTensor) else tensor).detach().clone()


@pytest.fixture(scope="module")
def single(ranks: RankPool) -> dict[str, Any]:
    return ranks(1, trained, "single", {}, {})[0]


@pytest.mark.parametrize("layout", LAYOUTS)
def test_layout_trains_like_one_device(ranks: RankPool, single: dict[str, Any], layout: str) -> None:
    world = degrees(layout).world
    for result in ranks(world, trained, layout, {"micro_batches": 1 if world == 4 else 2}, {}):
        assert result["names"] == single["names"]
        for name, weight in single["start"].items():
            assert torch.equal(result["start"][name], weight), name
        assert result["losses"][0] == pytest.approx(single["losses"][0], rel=1e-6)
        # fp32 sums in another order; AdamW divides by the root of a moment, which magnifies what is near zero.
        assert result["losses"] == pytest.approx(single["losses"], rel=1e-5)
        assert result["norms"] == pytest.approx(single["norms"], rel=1e-4)
        for name, weight in single["end"].items():
            torch.testing.assert_close(result["end"][name], weight, rtol=0, atol=2e-3, msg=name)


@pytest.mark.parametrize(
    ("layout", "options", "changes"),
    [
        pytest.param("fsdp2", {"recompute": "full"}, {}, id="recompute"),
        pytest.param("tp2", {"recompute": "full"}, {}, id="recompute-tp"),
        pytest.param(
            "fsdp2", {"degrees": {"reshard": "always", "sync_each_micro_batch": True}}, {}, id="reshard-always"
        ),
        pytest.param("hsdp2x2", {"degrees": {"reshard": "never"}}, {}, id="reshard-never"),
        pytest.param("tp2_fsdp2", {}, {"tie_word_embeddings": True}, id="tied"),
        pytest.param("fsdp2", {"max_norm": None}, {}, id="no-clipping"),
    ],
)
def test_options_change_no_number(
    ranks: RankPool, layout: str, options: dict[str, Any], changes: dict[str, Any]
) -> None:
    expected = ranks(1, trained, "single", {"max_norm": options.get("max_norm", 1.0)}, changes)[0]
    result = ranks(degrees(layout).world, trained, layout, options, changes)[0]
    assert result["losses"] == pytest.approx(expected["losses"], rel=1e-5)
    assert result["norms"] == pytest.approx(expected["norms"], rel=1e-4)


def _times(squares: Callable[[], torch.Tensor], factor: float) -> torch.Tensor:
    return squares() * factor


def poisoned(layout: str, skips: int) -> tuple[list[list[float]], bool]:
    """Four steps; rank 0's second and third have an infinite gradient. Outcomes, and whether weights kept still
    then.
    """
    config = tiny_llama()
    network = parallel_network(config, degrees(layout))
    optimizer = adamw(network)
    stepper = Stepper(network, optimizer, max_norm=1.0, skips=skips)
    outcomes, kept = [], True
    for step in range(4):
        before = {name: whole(parameter) for name, parameter in network.named_parameters()}
        gradients = stepper.gradients.squares
        factor = float("inf") if step in (1, 2) and torch.distributed.get_rank() == 0 else 1.0
        stepper.gradients.squares = partial(_times, gradients, factor)  # type: ignore[method-assign]
        (outcome,) = Readback().push(
            step, stepper(share(rows(4, 16, config.vocab_size), network.mesh, 1), stop=step == 3)
        )
        outcomes.append((outcome.skipped, outcome.dead, outcome.stop))
        stepper.gradients.squares = gradients  # type: ignore[method-assign]
        same = all(torch.equal(before[name], whole(parameter)) for name, parameter in network.named_parameters())
        kept = kept and same == (outcome.skipped or outcome.dead)
    return outcomes, kept


@pytest.mark.parametrize("skips", [0, 2])
def test_non_finite_step_updates_nothing_anywhere(ranks: RankPool, skips: int) -> None:
    for outcomes, kept in ranks(4, poisoned, "tp2_fsdp2", skips):
        assert kept
        assert [skipped for skipped, _, _ in outcomes] == [False, True, True, False]
        assert [dead for _, dead, _ in outcomes] == ([False, True, True, True] if skips == 0 else [False] * 4)
        assert [stop for _, _, stop in outcomes] == [False, False, False, True]
