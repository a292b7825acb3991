"""AdamW against torch's own, its groups, its skipped steps and its state."""

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from pydantic import ValidationError
from torch import nn

from src.optim.adamw import AdamW
from src.optim.fused_adamw import FusedAdamW
from src.optim.state import materialise, optimizer_state, scale_learning_rates
from tests.ranks import RankPool

CONF = Path(__file__).parents[2] / "conf"
CPU = torch.device("cpu")


def section(**changes: object) -> AdamW:
    fields = yaml.safe_load((CONF / "optim" / "adamw.yaml").read_text())
    del fields["_target_"]
    return AdamW.model_validate(fields | changes)


def network() -> nn.Module:
    torch.manual_seed(0)
    model = nn.Sequential()
    model.add_module("tok_embeddings", nn.Embedding(11, 8))
    model.add_module("norm", nn.LayerNorm(8))
    model.add_module("hidden", nn.Linear(8, 6, bias=False))
    model.add_module("frozen", nn.Linear(2, 2).requires_grad_(False))
    return model


def gradients(model: nn.Module, step: int) -> None:
    generator = torch.Generator().manual_seed(step)
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.grad = torch.randn(parameter.shape, generator=generator)


def trained(steps: int = 5, **changes: object) -> dict[str, torch.Tensor]:
    model = network()
    optimizer = section(lr=1e-2, **changes).build(model.named_parameters(), CPU)
    for step in range(steps):
        scale_learning_rates(optimizer, 1.0 / (step + 1))
        gradients(model, step)
        optimizer.step()
    return {name: parameter.detach() for name, parameter in model.named_parameters()}


def reference(steps: int = 5) -> dict[str, torch.Tensor]:
    """Torch's unfused loop over every trainable parameter."""
    model = network()
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(parameters, betas=(0.9, 0.95), eps=1e-8, weight_decay=0.1, foreach=False)
    for step in range(steps):
        optimizer.param_groups[0]["lr"] = 1e-2 / (step + 1)
        gradients(model, step)
        optimizer.step()
    return {name: parameter.detach() for name, parameter in model.named_parameters()}


@pytest.mark.parametrize("fused", [True, False])
def test_equals_torch(fused: bool) -> None:
    ours, theirs = trained(fused=fused), reference()
    for name, weight in theirs.items():
        torch.testing.assert_close(ours[name], weight, rtol=1e-5, atol=1e-6, msg=name)


@pytest.mark.parametrize("scale", [None, 3.0])
def test_the_fused_update_is_torchs_own_bit_for_bit(scale: float | None) -> None:
    """Which is given the whole tensors; gradients are divided by `grad_scale` as they are read."""
    found = []
    for kind in (FusedAdamW, torch.optim.AdamW):
        model = network()
        parameters = [each for each in model.parameters() if each.requires_grad]
        optimizer = kind(parameters, lr=1e-2, betas=(0.9, 0.95), eps=1e-8, weight_decay=0.1, fused=True)
        materialise(optimizer, {each: section().state("", each.shape) for each in parameters})
        optimizer.grad_scale = None if scale is None else torch.tensor(scale)  # type: ignore[attr-defined]
        optimizer.found_inf = torch.zeros(())  # type: ignore[attr-defined]
        for step in range(4):
            gradients(model, step)
            parameters[step % 3].grad = None  # no update, and no step of its own
            optimizer.step()
        found.append([*parameters, *(value for each in parameters for value in optimizer.state[each].values())])
    assert all(torch.equal(ours, theirs) for ours, theirs in zip(*found, strict=True))


def test_weights_in_bfloat16_keep_the_moments_that_were_asked_for() -> None:
    """torch's fused kernel would keep them in bfloat16, so the update is our own."""
    for fused in (True, False):
        model = network().to(torch.bfloat16)
        optimizer = section(fused=fused).build(model.named_parameters(), CPU)
        assert {value["exp_avg"].dtype for value in optimizer.state.values()} == {torch.float32}


def test_bfloat16_moments_stay_near() -> None:
    start, ours, theirs = trained(steps=0), trained(fused=False, moments="bfloat16"), reference()
    for name in ("tok_embeddings.weight", "hidden.weight", "norm.weight"):
        moved = (theirs[name] - start[name]).norm()
        distance = (ours[name] - theirs[name]).norm()
        assert 0 < distance < 0.01 * moved, name


@pytest.mark.parametrize(
    "changes", [{"fused": True}, {"fused": False}, {"fused": False, "moments": "bfloat16"}], ids=str
)
def test_found_inf_leaves_everything(changes: dict[str, Any]) -> None:
    model = network()
    optimizer = section(**changes).build(model.named_parameters(), CPU)
    gradients(model, 0)
    optimizer.step()
    state = optimizer_state(optimizer, model.named_parameters())
    before = {name: [p.detach().clone(), *(t.clone() for t in state.get(name, {}).values())]
              for name, p in model.named_parameters()}  # fmt: skip
    gradients(model, 1)
    for parameter in model.parameters():
        if parameter.grad is not None:
            parameter.grad[..., 0] = float("nan")
    optimizer.found_inf = torch.ones(())  # type: ignore[attr-defined]
    optimizer.step()
    for name, parameter in model.named_parameters():
        after = [parameter.detach(), *state.get(name, {}).values()]
        assert all(torch.equal(old, new) for old, new in zip(before[name], after, strict=True)), name
    optimizer.found_inf = torch.zeros(())  # type: ignore[attr-defined]
    gradients(model, 1)
    optimizer.step()
    assert not torch.equal(before["hidden.weight"][0], model.get_parameter("hidden.weight"))
    assert {float(one["step"]) for one in state.values()} == {2.0}


def test_groups_without_decay() -> None:
    model = network()
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    optimizer = section(decay_norms_and_embeddings=False).build(model.named_parameters(), CPU)
    groups = {group["weight_decay"]: {names[id(p)] for p in group["params"]} for group in optimizer.param_groups}
    assert groups == {0.1: {"hidden.weight"}, 0.0: {"tok_embeddings.weight", "norm.weight", "norm.bias"}}
    everything = section().build(model.named_parameters(), CPU)
    assert [(group["weight_decay"], len(group["params"])) for group in everything.param_groups] == [(0.1, 4)]


@pytest.mark.parametrize("changes", [{"fused": True}, {"fused": False, "moments": "bfloat16"}], ids=str)
def test_state_loads_in_place_before_the_first_step(changes: dict[str, Any]) -> None:
    """3 + 2 steps through exported state equal 5, bitwise."""
    first = network()
    optimizer = section(**changes).build(first.named_parameters(), CPU)
    for step in range(3):
        gradients(first, step)
        optimizer.step()
    second = network()
    second.load_state_dict(first.state_dict())
    resumed = section(**changes).build(second.named_parameters(), CPU)
    saved = optimizer_state(optimizer, first.named_parameters())
    fresh = optimizer_state(resumed, second.named_parameters())
    assert saved.keys() == fresh.keys() == {"tok_embeddings.weight", "hidden.weight", "norm.weight", "norm.bias"}
    assert all(not tensor.any() for one in fresh.values() for tensor in one.values())
    for name, one in fresh.items():
        for key, tensor in one.items():
            tensor.copy_(saved[name][key])
    for model, each in ((first, optimizer), (second, resumed)):
        for step in range(3, 5):
            gradients(model, step)
            each.step()
    for name, weight in first.state_dict().items():
        assert torch.equal(weight, second.state_dict()[name]), name


def test_moments_are_as_wide_as_asked() -> None:
    model = network()
    optimizer = section(fused=False, moments="bfloat16").build(model.named_parameters(), CPU)
    state = optimizer_state(optimizer, model.named_parameters())
    assert {t.dtype for one in state.values() for key, t in one.items() if key != "step"} == {torch.bfloat16}
    assert {one["step"].dtype for one in state.values()} == {torch.float32}


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"moments": "bfloat16"}, "set fused=false"),
        ({"moments": "bfloat16", "fused": False, "beta2": 0.999}, "beta2=0.999 never decays"),
        ({"beta2": 1.0}, "less than 1"),
        ({"max_norm": 0.0}, "greater than or equal"),
        ({"lr": "fast"}, "valid number"),
        ({"momentum": 0.9}, "Extra inputs"),
    ],
    ids=str,
)
def test_refuses(changes: dict[str, Any], words: str) -> None:
    with pytest.raises(ValidationError, match=words):
        section(**changes)


@pytest.mark.parametrize(
    "changes", [{"fused": True}, {"fused": False}, {"fused": False, "moments": "bfloat16"}], ids=str
)
def test_gradients_are_divided_as_they_are_read(changes: dict[str, Any]) -> None:
    """The squares in the second moments tell whether they were divided, once."""
    found = []
    for scale in (None, 4.0):
        model = network()
        optimizer = section(**changes).build(model.named_parameters(), CPU)
        for step in range(2):
            gradients(model, step)
            if scale is None:
                torch._foreach_div_([each.grad for each in model.parameters() if each.grad is not None], 4.0)
            else:
                optimizer.grad_scale = torch.tensor(scale)  # type: ignore[attr-defined]
            optimizer.step()
        state = optimizer_state(optimizer, model.named_parameters())
        found.append([*model.parameters(), *(one["exp_avg_sq"] for one in state.values())])
    torch.testing.assert_close(*found, rtol=1e-6, atol=0.0)


def _on_three_meshes(fused: bool) -> list[torch.Tensor]:
    """One step of a plain parameter and of two on different meshes, as tensor and expert parallelism leave them."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import DTensor, Shard, distribute_tensor

    line = init_device_mesh("cpu", (4,), mesh_dim_names=("all",))
    square = init_device_mesh("cpu", (2, 2), mesh_dim_names=("outer", "inner"))
    weights = [torch.ones(8, 4) * (index + 1) for index in range(3)]
    parameters = [nn.Parameter(weights[0])]
    for whole, mesh in ((weights[1], line), (weights[2], square["inner"])):
        parameters.append(nn.Parameter(distribute_tensor(whole, mesh, [Shard(0)])))
    optimizer = section(fused=fused).build(((f"p{i}.weight", one) for i, one in enumerate(parameters)), CPU)
    for one in parameters:
        one.grad = one.detach() * 0.5
    optimizer.found_inf = torch.zeros(())  # type: ignore[attr-defined]
    optimizer.grad_scale = torch.full((), 2.0)  # type: ignore[attr-defined]
    optimizer.step()
    return [(one.full_tensor() if isinstance(one, DTensor) else one).detach() for one in parameters]


@pytest.mark.parametrize("fused", [True, False])
def test_parameters_of_several_meshes(ranks: RankPool, fused: bool) -> None:
    # The first step moves each weight by lr against its gradient, after a decay of lr * weight_decay.
    expected = [torch.full((8, 4), (index + 1) * (1 - 8e-5) - 8e-4) for index in range(3)]
    for weights in ranks(4, _on_three_meshes, fused):
        torch.testing.assert_close(weights, expected)


@pytest.mark.gpu
@pytest.mark.parametrize("changes", [{"fused": True}, {"fused": False, "moments": "bfloat16"}], ids=str)
def test_gpu_equals_cpu_and_skips(changes: dict[str, Any]) -> None:
    results = []
    for device in (CPU, torch.device("cuda", 0)):
        model = network().to(device)
        optimizer = section(lr=1e-2, **changes).build(model.named_parameters(), device)
        for step in range(4):
            scale_learning_rates(optimizer, 1.0 / (step + 1))
            for parameter in model.parameters():
                if parameter.requires_grad:
                    generator = torch.Generator().manual_seed(step)
                    parameter.grad = torch.randn(parameter.shape, generator=generator).to(device)
            optimizer.found_inf = torch.full((), float(step == 2), device=device)  # type: ignore[attr-defined]
            optimizer.grad_scale = torch.full((), 1.0 + step, device=device)  # type: ignore[attr-defined]
            optimizer.step()
        results.append([parameter.detach().cpu() for parameter in model.parameters()])
    torch.testing.assert_close(*results, rtol=1e-5, atol=1e-4)  # a bfloat16 moment may round to its neighbour


def test_the_sections_are_light() -> None:
    """A mistake in a config is told before torch is imported."""
    modules = "src.optim.adamw, src.optim.lion, src.optim.schedule, src.metrics.trackers.config"
    code = f"import sys, {modules}; sys.exit('torch' in sys.modules or 'wandb' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0
