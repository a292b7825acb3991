"""Outer weights against torch's own SGD and against whole tensors, on one rank and in shards."""

from dataclasses import dataclass
from itertools import chain
from typing import Any

import pytest
import torch
from rich.console import Console
from torch import Tensor

from src.distributed.pipeline.stages import module_of
from src.distributed.process.rank_context import RankContext
from src.errors import PlanError
from src.fault_tolerance.carry import local
from src.fault_tolerance.fragments import cut
from src.fault_tolerance.outer import Averaging, Nesterov, Outer, Rule
from src.planning.memory import GIB
from src.planning.plan import plan
from src.planning.table import render
from src.run import Run
from src.train.setup import build_training
from tests.ranks import RankPool as Workers
from tests.train.runs import Here, changed, make_run, section


@pytest.mark.parametrize(("lr", "momentum"), [(0.7, 0.9), (1.0, 0.0), (0.3, 0.5)])
def test_the_outer_optimizer_is_sgd(lr: float, momentum: float) -> None:
    chance = torch.Generator().manual_seed(0)
    weight = torch.nn.Parameter(torch.randn(50, generator=chance))
    agreed, velocity, rule = weight.detach().clone(), torch.zeros(50), Nesterov(lr, momentum)
    sgd = torch.optim.SGD([weight], lr=lr, momentum=momentum, nesterov=momentum > 0)
    for _ in range(5):
        weight.grad = torch.randn(50, generator=chance)
        agreed = rule.moved(agreed, weight.grad, velocity)
        sgd.step()
        torch.testing.assert_close(agreed, weight.detach(), rtol=1e-6, atol=1e-6)


def made(layout: str, rule: Rule, fragments: int) -> tuple[Any, Outer]:
    """A network whose weights have moved since the outer ones were copied from them."""
    run = make_run(parallel=layout)
    ranks = RankContext.join("cpu", run.parallel.world, timeout_seconds=60.0)
    network = build_training(run, ranks, skips=0).network
    outer = Outer(network, cut(run.model.n_layers, fragments, None), rule, "cpu", ())
    outer.begin()
    for tensor in network.tensors().values():
        local(tensor).mul_(1.25)
    return network, outer


@dataclass(frozen=True)
class Moved:
    """After two merges of fragment 0, as if of one group."""

    live: dict[str, Tensor]
    agreed: dict[str, Tensor]
    squares: float  # of the last way, as the ranks count it
    way: float  # the same, of whole tensors
    elements: int  # that ranks have sent, all together


def exchanged(layout: str, fragments: int, own_share: float) -> Moved:
    network, outer = made(layout, Nesterov(0.7, 0.9), fragments)
    outer.merge(0, outer.outgoing(0), own_share)
    before = whole(outer.tensors()["weights"])
    sent = outer.outgoing(0)
    squares = outer.merge(0, sent, own_share)
    total = torch.tensor([squares, float(sent.numel())], dtype=torch.float64)
    torch.distributed.all_reduce(total)
    after = whole(outer.tensors()["weights"])
    way = sum((after[name] - before[name]).square().sum().item() for name in after)
    return Moved(whole(network.tensors()), after, total[0].item(), way, int(total[1].item()))


def whole(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: getattr(each, "full_tensor", lambda each=each: each)().clone() for name, each in tensors.items()}


@pytest.mark.parametrize(("layout", "world"), [("fsdp2", 2), ("tp2", 2)])
def test_shards_move_as_whole_tensors_do(ranks: Workers, layout: str, world: int) -> None:
    (expected,) = ranks(1, exchanged, "single", 2, 0.25)
    assert expected.way > 1.0
    for found in ranks(world, exchanged, layout, 2, 0.25):
        for name in expected.live:
            assert torch.equal(found.live[name], expected.live[name]), name
            assert torch.equal(found.agreed[name], expected.agreed[name]), name
        assert found.squares == pytest.approx(expected.way, rel=1e-5)
        # What tensor parallelism does not cut is on both ranks.
        assert found.elements == expected.elements if layout == "fsdp2" else found.elements > expected.elements


def held(layout: str, method: str, place: str) -> tuple[int, int]:
    """Bytes of this rank's outer tensors on the device of its weights, and those of the plan."""
    options = changed(section("fault_tolerance", method), copy_on=place)
    run = make_run({"steps": 20, "micro_batch": 1}, parallel=layout, fault_tolerance=options)
    ranks = RankContext.join("cpu", run.parallel.world, timeout_seconds=60.0)
    network = build_training(run, ranks, skips=0).network
    outer = Outer(network, options.modules(run.model.n_layers), options.rule(), options.copy_on, ())
    tensors = chain(*(part.values() for part in outer.tensors().values()))
    return sum(local(tensor).nbytes for tensor in tensors), plan(run).memory.outer


@pytest.mark.parametrize(("layout", "world"), [("single", 1), ("fsdp2", 2), ("tp2", 2)])
@pytest.mark.parametrize("method", ["local_sgd", "diloco"])
def test_the_plan_counts_what_is_kept_beside_the_weights(ranks: Workers, layout: str, world: int, method: str) -> None:
    found = ranks(world, held, layout, method, "device")
    assert max(built for built, _ in found) == found[0][1]


def eight_billion(place: str, memory_gib: float | None = None) -> Run:
    options = changed(section("fault_tolerance", "diloco"), copy_on=place)
    task = {"steps": 20, "seq_len": 8192, "global_batch": 64, "micro_batch": 1}
    return make_run(task, Here(memory_gib), model="llama3_8b", parallel="fsdp8", fault_tolerance=options)


def table(run: Run) -> str:
    console = Console(width=120)
    with console.capture() as captured:
        console.print(render(plan(run)))
    return captured.get()


def test_the_plan_tells_of_outer_weights_on_the_device_and_of_the_way_out() -> None:
    in_host, beside = plan(eight_billion("cpu")), plan(eight_billion("device"))
    assert in_host.memory.outer == 0
    assert beside.memory.outer == 8 * beside.parameters_per_gpu  # float32 weights and momentum
    assert beside.memory.allocated - in_host.memory.allocated == beside.memory.outer
    assert "outer weights and momentum" in table(eight_billion("device"))
    assert "outer weights" not in table(eight_billion("cpu"))
    between = (in_host.memory.peak + beside.memory.peak) / 2 / GIB
    assert plan(eight_billion("cpu", between)).fits
    with pytest.raises(PlanError, match=r"fault_tolerance\.copy_on=cpu frees 7\.6 GiB and fits"):
        plan(eight_billion("device", between))


def restored() -> dict[str, tuple[bool, bool]]:
    """By name: whether a weight is as it was, and whether it is the outer one, once fragment 1 has gone back."""
    network, outer = made("single", Averaging(), 2)
    before = whole(network.tensors())
    outer.restore(1)
    after, agreed = whole(network.tensors()), whole(outer.tensors()["weights"])
    return {name: (torch.equal(after[name], before[name]), torch.equal(after[name], agreed[name])) for name in after}


def test_a_fragment_goes_back_and_leaves_the_others(ranks: Workers) -> None:
    (found,) = ranks(1, restored)
    fragments = cut(section("model", "llama3_debug").n_layers, 2, None)
    assert found == {name: (module_of(name) in fragments[0], module_of(name) in fragments[1]) for name in found}
