"""What a run relies on in any optimizer: those of conf/optim, and one that only this file knows."""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any, ClassVar

import pytest
import torch
from torch import Tensor, nn

from src.config.groups import options
from src.distributed.matrix_owners import MatrixOwners
from src.optim.base import Optimizer, Reads, StateTensor
from src.optim.owners import Owners
from src.optim.state import optimizer_state, scale_learning_rates
from src.planning.memory import estimate
from src.planning.plan import load_of, plan
from src.tasks.verify.certificate import Certificate
from tests.models.shapes import tiny_deepseek, tiny_llama
from tests.optim.test_adamw import CPU, gradients, network
from tests.ranks import RankPool
from tests.tasks.test_verify import TASK, certified
from tests.train.runs import changed, make_run, section


class Momentum(Optimizer):
    """Heavy-ball SGD, and half the learning rate for the embedding."""

    momentum: float

    def state(self, name: str, shape: Sequence[int]) -> Mapping[str, StateTensor]:
        return {"velocity": StateTensor("float32", tuple(shape))}

    def learning_rate(self, name: str, parameter: nn.Parameter) -> float:
        return self.lr / 2 if "tok_embeddings" in name else self.lr

    def from_groups(
        self, groups: list[dict[str, Any]], device: torch.device, owners: Owners | None
    ) -> torch.optim.Optimizer:
        from src.optim.elementwise import Elementwise, learning_rate

        return Elementwise(groups, velocity, learning_rate, (self.momentum,))


def velocity(
    weight: Tensor, gradient: Tensor, state: Sequence[Tensor], rates: Sequence[Tensor], *momentum: float
) -> tuple[Tensor, Sequence[Tensor]]:
    moved = state[0] * momentum[0] + gradient
    return weight - rates[0] * moved, (moved,)


class Whole(Momentum):
    reads: ClassVar[Reads] = "matrices"


SGD = Momentum(lr=1e-2, weight_decay=0.1, decay_norms_and_embeddings=False, max_norm=1.0, momentum=0.9)
EVERY: dict[str, Optimizer] = {name: section("optim", name) for name in options("optim")} | {"sgd of this test": SGD}
every = pytest.mark.parametrize("optim", EVERY.values(), ids=EVERY)


def stepped(optim: Optimizer, model: nn.Module, steps: Sequence[int], **attributes: float) -> torch.optim.Optimizer:
    """Updates with the gradients of these numbers. `attributes`: found_inf, grad_scale."""
    optimizer = optim.build(model.named_parameters(), CPU)
    for step in steps:
        gradients(model, step)
        for name, value in attributes.items():
            setattr(optimizer, name, torch.tensor(value))
        optimizer.step()
    return optimizer


def bits(model: nn.Module, optimizer: torch.optim.Optimizer) -> list[Tensor]:
    """All that an update may change; copies."""
    state = optimizer_state(optimizer, model.named_parameters())
    tensors = [*model.parameters(), *(each for one in state.values() for each in one.values())]
    return [tensor.detach().clone() for tensor in tensors]


def same(left: list[Tensor], right: list[Tensor]) -> bool:
    return all(torch.equal(one, other) for one, other in zip(left, right, strict=True))


@every
def test_the_state_is_what_the_section_says(optim: Optimizer) -> None:
    model = network()
    state = optimizer_state(optim.build(model.named_parameters(), CPU), model.named_parameters())
    assert set(state) == {name for name, each in model.named_parameters() if each.requires_grad}
    for name, kept in state.items():
        parameter = model.get_parameter(name)
        expected = optim.state(name, parameter.shape)
        assert kept.keys() == {"step", *expected}
        assert (kept["step"].dtype, kept["step"].shape) == (torch.float32, ())
        for key, tensor in expected.items():
            assert (str(kept[key].dtype), kept[key].shape) == (f"torch.{tensor.dtype}", tensor.shape)
            assert kept[key].nbytes == tensor.bytes
            assert not kept[key].any()


@every
def test_a_step_that_is_skipped_leaves_everything(optim: Optimizer) -> None:
    model = network()
    optimizer = stepped(optim, model, [0])
    before = bits(model, optimizer)
    gradients(model, 1)
    for parameter in model.parameters():
        if parameter.grad is not None:
            parameter.grad[..., 0] = float("nan")
    optimizer.found_inf = torch.ones(())  # type: ignore[attr-defined]
    optimizer.step()
    assert same(bits(model, optimizer), before)
    optimizer.found_inf = torch.zeros(())  # type: ignore[attr-defined]
    gradients(model, 1)
    optimizer.step()
    straight = network()
    assert same(bits(model, optimizer), bits(straight, stepped(optim, straight, [0, 1])))
    assert {float(one["step"]) for one in optimizer_state(optimizer, model.named_parameters()).values()} == {2.0}


@every
def test_gradients_are_divided_as_they_are_read(optim: Optimizer) -> None:
    scaled, divided = network(), network()
    stepped(optim, scaled, [0], grad_scale=4.0)
    optimizer = optim.build(divided.named_parameters(), CPU)
    gradients(divided, 0)
    torch._foreach_div_([each.grad for each in divided.parameters() if each.grad is not None], 4.0)
    optimizer.step()
    torch.testing.assert_close([*scaled.parameters()], [*divided.parameters()], rtol=1e-6, atol=1e-9)


@every
def test_it_goes_on_bitwise_from_a_state_that_was_loaded_in_place(optim: Optimizer) -> None:
    straight, half, resumed = network(), network(), network()
    finished = stepped(optim, straight, range(5))
    saved = bits(half, stepped(optim, half, range(3)))
    optimizer = optim.build(resumed.named_parameters(), CPU)
    state = optimizer_state(optimizer, resumed.named_parameters())
    targets = [*resumed.parameters(), *(each for one in state.values() for each in one.values())]
    with torch.no_grad():
        for target, value in zip(targets, saved, strict=True):
            target.copy_(value)
    for step in (3, 4):
        gradients(resumed, step)
        optimizer.step()
    assert same(bits(resumed, optimizer), bits(straight, finished))


@every
@pytest.mark.parametrize("everything", [True, False])
def test_decay_shrinks_matrices_and_only_if_asked_norms_and_embeddings(optim: Optimizer, everything: bool) -> None:
    """Without a gradient nothing else moves a weight."""
    model, optim = network(), changed(optim, decay_norms_and_embeddings=everything)
    before = {name: each.detach().clone() for name, each in model.named_parameters()}
    optimizer = optim.build(model.named_parameters(), CPU)
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter) if parameter.requires_grad else None
    optimizer.step()
    for name, parameter in model.named_parameters():
        decayed = parameter.requires_grad and (everything or name == "hidden.weight")
        factor = 1.0 - optim.learning_rate(name, parameter) * optim.weight_decay if decayed else 1.0
        torch.testing.assert_close(parameter.detach(), before[name] * factor, rtol=1e-6, atol=0.0)


@every
def test_the_schedule_scales_the_learning_rate_of_each_group(optim: Optimizer) -> None:
    model = network()
    optimizer = optim.build(model.named_parameters(), CPU)
    for factor in (0.5, 0.25):
        scale_learning_rates(optimizer, factor)
        rates = {id(each): group["lr"] for group in optimizer.param_groups for each in group["params"]}
        for name, parameter in model.named_parameters():
            if parameter.requires_grad:
                assert rates[id(parameter)] == optim.learning_rate(name, parameter) * factor


@every
@pytest.mark.parametrize("layout", ["single", "tp2_fsdp2", "pp2_fsdp2"])
def test_the_plan_knows_its_bytes(optim: Optimizer, layout: str) -> None:
    run = make_run({"micro_batch": 2}, optim=optim, parallel=layout)
    memory = estimate(load_of(run))
    cuts = {"single": 1, "tp2_fsdp2": 4, "pp2_fsdp2": 4}  # of all weights alike, but for norms of a few bytes
    whole = sum(each.bytes for one in run.model.weights() for each in optim.state(one.name, one.shape).values())
    assert memory.optimizer == pytest.approx(whole / cuts[layout], rel=0.0 if layout == "single" else 0.02)
    if (smaller := optim.smaller_state()) is not None:
        assert estimate(load_of(replace(run, optim=smaller[1]))).optimizer < memory.optimizer


def test_an_optimizer_says_which_shards_it_cannot_update() -> None:
    whole = Whole(**dict(SGD))
    assert whole.problems(storage="float32", row_shards=1, tensor=1) == []
    assert plan(make_run(optim=whole, parallel="ddp2")).world == 2
    for layout, words in (("fsdp2", "FSDP cuts into 2 shards"), ("tp2", "parallel.tensor=2 cuts")):
        with pytest.raises(Exception, match=f"Whole reads whole matrices, which {words}"):
            plan(make_run(optim=whole, parallel=layout))


def sharded(optim: Optimizer) -> list[Tensor]:
    """Three steps, one of them skipped, of a network that FSDP shards unevenly: whole weights and state."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard
    from torch.distributed.tensor import DTensor, distribute_tensor

    model, mesh = network(), init_device_mesh("cpu", (4,))
    fully_shard(model, mesh=mesh)
    optimizer = optim.build(model.named_parameters(), CPU, MatrixOwners(mesh.get_group(), CPU))
    for step in range(3):
        generator = torch.Generator().manual_seed(step)
        for parameter in model.parameters():
            if isinstance(parameter, DTensor) and parameter.requires_grad:
                whole = torch.randn(parameter.shape, generator=generator)
                whole[0] = float("nan") if step == 1 else whole[0]
                parameter.grad = distribute_tensor(whole, parameter.device_mesh, parameter.placements)
        optimizer.found_inf = torch.tensor(float(step == 1))  # type: ignore[attr-defined]
        optimizer.step()
    kept = [each for one in optimizer.state.values() for name, each in one.items() if name != "step"]
    assert all(isinstance(each, DTensor) for each in kept)
    return [each.full_tensor() if isinstance(each, DTensor) else each for each in bits(model, optimizer)]


@every
def test_shards_equal_the_whole(ranks: RankPool, optim: Optimizer) -> None:
    model = network()
    expected = bits(model, stepped(optim, model, [0, 2]))
    for found in ranks(4, sharded, optim):
        torch.testing.assert_close(found, expected)


LAYOUTS = [("fsdp2", tiny_llama()), ("tp2", tiny_llama()), ("pp2", tiny_llama()), ("fsdp2_ep2", tiny_deepseek())]


@pytest.mark.slow
@pytest.mark.parametrize(("layout", "model"), LAYOUTS, ids=[layout for layout, _ in LAYOUTS])
@pytest.mark.parametrize(
    "optim",
    [section("optim", "lion"), SGD, section("optim", "muon")],
    ids=["lion", "sgd of this test", "muon"],
)
def test_a_layout_trains_with_it_like_one_device(ranks: RankPool, optim: Optimizer, layout: str, model: Any) -> None:
    run = replace(make_run(model=model, parallel=layout, optim=optim), task=TASK)
    certificates: list[Certificate] = ranks(2, certified, run)
    assert [certificate.failed for certificate in certificates] == [[], []]
