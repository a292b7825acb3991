"""Muon against torch's, against singular values in float64, and in every layout against one device, bit for bit."""

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from pydantic import ValidationError
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, distribute_tensor

from src.checkpoint.store import Store
from src.distributed.init_weights import seed_of
from src.distributed.matrix_owners import MatrixOwners
from src.models.base import ModelConfig
from src.optim.muon import Muon, part_of
from src.optim.newton_schulz import COEFFICIENTS, of_heads, orthogonalise
from src.optim.state import optimizer_state, scale_learning_rates
from tests.checkpoint.options import options
from tests.distributed.layouts import degrees, parallel_network
from tests.models.shapes import tiny_deepseek, tiny_llama
from tests.ranks import RankPool
from tests.train.runs import changed, section

CPU = torch.device("cpu")
SHAPES = {"square": (24, 24), "wide": (8, 40), "tall": (56, 16)}


def muon(option: str = "muon", **changes: Any) -> Muon:
    found: Muon = changed(section("optim", option), **changes)
    return found


def matrices() -> dict[str, nn.Parameter]:
    torch.manual_seed(0)
    return {f"layers.0.{name}.weight": nn.Parameter(torch.randn(shape)) for name, shape in SHAPES.items()}


def gradient(name: str, shape: Sequence[int], step: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed_of(step, name)))


def stepped(optimizer: torch.optim.Optimizer, named: dict[str, nn.Parameter], steps: int) -> dict[str, Tensor]:
    for step in range(steps):
        for group in optimizer.param_groups:
            group["lr"] = group.setdefault("peak_lr", group["lr"]) / (step + 1)
        for name, parameter in named.items():
            parameter.grad = gradient(name, parameter.shape, step)
        optimizer.step()
    return {name: parameter.detach() for name, parameter in named.items()}


def polar(matrix: Tensor) -> Tensor:
    """What Newton-Schulz makes of a matrix without rounding: its polynomial of each singular value, float64."""
    left, values, right = torch.linalg.svd(matrix.double(), full_matrices=False)
    values, (a, b, c) = values / values.norm(), COEFFICIENTS
    for _ in range(5):
        values = a * values + b * values**3 + c * values**5
    return left @ torch.diag(values) @ right


def test_equals_torch() -> None:
    keys: dict[str, Any] = {"lr": 3e-2, "weight_decay": 0.3, "momentum": 0.9}
    ours, theirs = matrices(), matrices()
    found = stepped(muon(**keys).build(ours.items(), CPU), ours, 4)
    expected = stepped(torch.optim.Muon(theirs.values(), adjust_lr_fn="match_rms_adamw", **keys), theirs, 4)
    for name, weight in expected.items():  # two of their bfloat16 roundings may fall the other way
        torch.testing.assert_close(found[name], weight, rtol=1e-5, atol=3e-4, msg=name)
        assert not torch.equal(weight, matrices()[name])


@pytest.mark.parametrize("option", ["muon", "normuon"])
def test_equals_the_papers_in_float64(option: str) -> None:
    """arXiv 2502.16982, algorithm 1 with 0.2 sqrt(max(rows, columns)); arXiv 2510.05491, algorithm 1."""
    lr, decay, named = 2e-2, 0.1, matrices()
    found = stepped(muon(option, lr=lr, weight_decay=decay).build(named.items(), CPU), named, 3)
    for name, start in matrices().items():
        weight = start.detach().double()
        momentum, rows = torch.zeros_like(weight), torch.zeros(len(weight), 1, dtype=torch.float64)
        for step in range(3):
            now = gradient(name, weight.shape, step).double()
            momentum = 0.95 * momentum + now
            update = polar(now + 0.95 * momentum)
            if option == "muon":
                update = 0.2 * max(weight.shape) ** 0.5 * update
            else:
                rows = 0.95 * rows + 0.05 * update.square().mean(1, keepdim=True)
                update = update / (rows.sqrt() + 1e-8)
                update = 0.2 * weight.numel() ** 0.5 / update.norm() * update
            rate = lr / (step + 1)
            weight = weight - rate * (update + decay * weight)
        distance = (found[name] - weight).norm() / (weight - start.double()).norm()
        assert distance < 2e-2, (name, distance)  # products of bfloat16 numbers, 15 in a row
        assert float((found[name] - start).detach().square().mean().sqrt()) == pytest.approx(lr * 0.2 * 1.4, rel=0.5)


def test_heads_are_orthogonalised_by_themselves() -> None:
    """Of wq, 4 heads are 4 blocks of rows; of wo, of columns."""
    for axis, shape in ((0, (32, 12)), (1, (12, 32))):
        matrix = torch.randn(shape).bfloat16()
        found = of_heads(matrix, 5, (4, axis))
        for block, expected in zip(found.chunk(4, axis), matrix.chunk(4, axis), strict=True):
            assert (block - polar(expected)).norm() < 3e-2 * polar(expected).norm()
        assert not torch.equal(found, orthogonalise(matrix, 5))
    heads = tiny_llama().heads()
    assert (heads["layers.0.attention.wq.weight"], heads["layers.0.attention.wk.weight"]) == ((8, 0), (4, 0))
    assert heads["layers.2.attention.wo.weight"] == (8, 1)
    latent = {name.split(".")[-2]: cut for name, cut in tiny_deepseek().heads().items()}
    assert latent == {"wq": (4, 0), "wkv_b": (4, 0), "wo": (4, 1)}


def test_each_kind_of_parameters_has_its_rule() -> None:
    weights = tiny_deepseek().weights()
    others = {weight.name for weight in weights if part_of(weight.name, len(weight.shape)) != "matrices"}
    assert {re.sub(r"layers\.\d+\.", "", name) for name in others} == {
        *("tok_embeddings.weight", "output.weight", "norm.weight", "attention_norm.weight", "ffn_norm.weight"),
        *("attention.kv_norm.weight", "moe.router.gate.weight"),
    }
    named = {
        name: nn.Parameter(torch.ones(4, 4)) for name in ("tok_embeddings.weight", "output.weight", "x.gate.weight")
    }
    named |= {"norm.weight": nn.Parameter(torch.ones(4)), "layers.0.wq.weight": nn.Parameter(torch.ones(4, 4))}
    own = {
        part: {"lr": (number + 1) * 1e-2, "weight_decay": (number + 1) * 0.1}
        for number, part in enumerate(("embedding", "head", "router", "norms"))
    }
    optimizer = changed(section("optim", "muon"), **own).build(named.items(), CPU)
    for parameter in named.values():
        parameter.grad = torch.zeros_like(parameter)
    optimizer.step()
    for number, name in enumerate(("tok_embeddings.weight", "output.weight", "x.gate.weight", "norm.weight")):
        keep = 1 - (number + 1) * 1e-2 * (number + 1) * 0.1
        torch.testing.assert_close(named[name].detach(), torch.full_like(named[name], keep), msg=name)
    torch.testing.assert_close(named["layers.0.wq.weight"].detach(), torch.full((4, 4), 1 - 8e-4 * 0.1))


def test_refuses() -> None:
    with pytest.raises(ValidationError, match=r"momentum=0.999 never decays in moments=bfloat16"):
        muon(moments="bfloat16", momentum=0.999)
    assert muon(momentum=0.999).smaller_state() is None
    assert muon().smaller_state() == ("optim.moments=bfloat16", muon(moments="bfloat16"))


# ---- in layouts

MODELS: dict[str, ModelConfig] = {"llama": tiny_llama(n_layers=2, n_heads=4), "deepseek": tiny_deepseek(n_layers=2)}
OPTIONS = {"muon": muon(), "normuon per head": muon("normuon", per_head=True, moments="bfloat16")}


def trained(model: str, layout: str) -> list[dict[str, Tensor]]:
    """By option: weights and state after four updates, of which the second is none; whole."""
    return [_trained(MODELS[model], layout, optim) for optim in OPTIONS.values()]


def resumed(model: str, layout: str, folder: Path, steps: range) -> dict[str, Tensor]:
    """As `trained`, by the last option, but these updates alone: behind those that a checkpoint holds, and saved."""
    return _trained(MODELS[model], layout, [*OPTIONS.values()][-1], steps, folder)


def _trained(
    model: ModelConfig, layout: str, optim: Muon, steps: range = range(4), folder: Path | None = None
) -> dict[str, Tensor]:
    network = parallel_network(model, degrees(layout))  # type: ignore[arg-type]
    named = dict(network.named_parameters())
    owners = None if layout == "single" else MatrixOwners(network.mesh.stage_group(), CPU)
    optimizer = optim.build(named.items(), CPU, owners, model.heads())
    store = None if folder is None else Store(folder, options(asynchronous=False))
    tree = {"model": network.tensors(), "optimizer": optimizer_state(optimizer, named.items())}
    if store is not None and (newest := store.newest()) is not None:
        store.load(newest, tree)
    for step in steps:
        scale_learning_rates(optimizer, 1 / (step + 1))
        for name, parameter in named.items():
            whole = gradient(name, parameter.shape, step)
            if step == 1:
                whole.view(-1)[0] = float("nan")
            parameter.grad = whole
            if isinstance(parameter, DTensor):
                parameter.grad = distribute_tensor(
                    whole, parameter.device_mesh, parameter.placements, src_data_rank=None
                )
        optimizer.found_inf = torch.tensor(float(step == 1))  # type: ignore[attr-defined]
        optimizer.grad_scale = torch.tensor(2.0)  # type: ignore[attr-defined]
        optimizer.step()
    if store is not None:
        store.save(steps.stop, tree, {}, wait=True)
    found = {name: parameter.detach() for name, parameter in named.items()}
    for name, kept in optimizer_state(optimizer, named.items()).items():
        found |= {f"{name} {key}": each for key, each in kept.items()}
    return {name: each.full_tensor() if isinstance(each, DTensor) else each for name, each in found.items()}


@pytest.fixture(scope="module")
def alone(ranks: RankPool) -> dict[str, list[dict[str, Tensor]]]:
    return {model: ranks(1, trained, model, "single")[0] for model in MODELS}


DENSE = ("fsdp2", "ddp2", "tp2", "cp2", "pp2", "hsdp2x2", "tp2_fsdp2", "pp2_fsdp2")
ROUTED = ("fsdp2_ep2", "tp2_fsdp2_ep2", "hsdp2x2_ep2", "tp2_etp2_fsdp2")
LAYOUTS = [*(("llama", layout) for layout in DENSE), *(("deepseek", layout) for layout in ROUTED)]
LONG = ("hsdp2x2_ep2", "tp2_etp2_fsdp2")


@pytest.mark.parametrize(
    ("model", "layout"),
    [pytest.param(*each, id=each[1], marks=pytest.mark.slow if each[1] in LONG else ()) for each in LAYOUTS],
)
def test_a_layout_is_one_device_bit_for_bit(
    ranks: RankPool, alone: dict[str, list[dict[str, Tensor]]], model: str, layout: str
) -> None:
    names: set[str] = set()
    for found in ranks(degrees(layout).world, trained, model, layout):
        for here, expected in zip(found, alone[model], strict=True):
            assert [name for name, each in here.items() if not torch.equal(each, expected[name])] == []
            names |= here.keys()
    assert names == {name for each in alone[model] for name in each}


@pytest.mark.parametrize(
    ("model", "before", "after"),
    [("llama", "fsdp2", "tp2"), ("deepseek", "fsdp2_ep2", "single")],
    ids=["tp2", "single"],
)
def test_another_layout_goes_on_bit_for_bit(
    ranks: RankPool,
    alone: dict[str, list[dict[str, Tensor]]],
    model: str,
    before: str,
    after: str,
    tmp_path: Path,
) -> None:
    ranks(degrees(before).world, resumed, model, before, tmp_path, range(2))
    for found in ranks(degrees(after).world, resumed, model, after, tmp_path, range(2, 4)):
        assert found.keys() == alone[model][-1].keys()
        assert [name for name, each in found.items() if not torch.equal(each, alone[model][-1][name])] == []
