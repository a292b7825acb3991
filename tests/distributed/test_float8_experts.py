"""Grouped products of float8: what is rounded and how, close to bfloat16 in a model, or refused."""

from importlib.machinery import ModuleSpec
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from src.distributed.precision.config import Precision
from src.distributed.precision.float8 import Float8
from src.distributed.precision.float8_experts import emulated, kernels
from src.models.moe.experts import Experts, grouped_product
from src.train.step.stepper import Stepper
from tests.distributed.layouts import adamw, degrees, parallel_network, rows, share
from tests.models.shapes import tiny_deepseek, tiny_llama
from tests.ranks import RankPool


def rounded(x: Tensor) -> Tensor:
    """To e4m3 with a power of two as scale for each row, one number at a time."""
    out = torch.empty_like(x)
    for i, row in enumerate(x.tolist()):
        largest = max(abs(number) for number in row)
        scale = 1.0
        while largest * scale * 2 <= 448:
            scale *= 2
        while largest * scale > 448:
            scale /= 2
        for j, number in enumerate(row):
            out[i, j] = torch.tensor(number * scale).to(torch.float8_e4m3fn).float() / scale
    return out


def test_rounded_numbers_are_multiplied_forwards_and_backwards() -> None:
    torch.manual_seed(1)
    x = torch.randn(6, 8, requires_grad=True)
    w = torch.randn(2, 8, 16, requires_grad=True)
    ends, probe = torch.tensor([2, 6], dtype=torch.int32), torch.randn(6, 16)
    out = emulated(x, w, ends)
    grad_x, grad_w = torch.autograd.grad((out * probe).sum(), [x, w])
    for expert, part in enumerate((slice(0, 2), slice(2, 6))):
        left, right = rounded(x[part]), rounded(w[expert].T).T
        torch.testing.assert_close(out[part], left @ right)
        torch.testing.assert_close(grad_x[part], rounded(probe[part]) @ rounded(w[expert]).T)
        torch.testing.assert_close(grad_w[expert], rounded(x[part].T) @ rounded(probe[part].T).T)


def float8(**changes: Any) -> Float8:
    given = {"recipe": "tensorwise", "exclude": (), "experts": True, "all_gather": False, "emulate": True}
    return Float8(**(given | changes))


CONFIG = tiny_deepseek(qk_nope_head_dim=8, moe={"score_func": "sigmoid", "route_norm": True})


def losses(layout: str, how: str) -> list[float]:
    """Of three steps; `how`: bf16, float8 or float8 with experts."""
    chosen = None if how == "bf16" else float8(experts=how == "experts")
    precision = Precision(storage="float32", compute="bfloat16", reduce="float32", float8=chosen)
    network = parallel_network(CONFIG, degrees(layout), precision)
    optimizer = adamw(network)
    stepper = Stepper(network, optimizer, max_norm=1.0, skips=0)
    batches = [share(rows(8, 16, CONFIG.vocab_size, seed=step), network.mesh, 1) for step in range(3)]
    return [stepper(batch, stop=False)["loss"].item() for batch in batches]


def test_losses_are_close_to_those_of_bfloat16(ranks: RankPool) -> None:
    wide, linears, both = (ranks(1, losses, "single", how)[0] for how in ("bf16", "float8", "experts"))
    assert both == pytest.approx(wide, rel=5e-3)
    assert len({tuple(wide), tuple(linears), tuple(both)}) == 3  # each did something
    for layout in ("fsdp2", "fsdp2_ep2"):
        assert ranks(2, losses, layout, "experts")[0] == pytest.approx(both, rel=5e-3), layout


def test_only_experts_that_are_asked_for() -> None:
    for wanted in (True, False):
        model = CONFIG.build()
        float8(experts=wanted).convert(model, 1, "cpu")
        found = [module for module in model.modules() if isinstance(module, Experts)]
        assert len(found) == 2
        assert {module.product for module in found} == {emulated if wanted else grouped_product}
        assert {module.multiple for module in found} == {16 if wanted else 1}


def problems(model: Any = CONFIG, layout: str = "single", **changes: Any) -> list[str]:
    return float8(**changes).problems(model.weights(), degrees(layout), compiled=False, gpu=True)


def test_refused_with_a_reason(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    assert problems() == problems(emulate=False) == []
    assert problems(tiny_llama()) == [
        "precision.float8.experts=true: this model has no routed experts; pass precision.float8.experts=false"
    ]
    assert problems(tiny_deepseek(moe={"hidden_dim": 24})) == [
        "precision.float8.experts=true: experts have a side of 24 on a rank, which is no multiple of 16; "
        "pass precision.float8.experts=false, or a width that is"
    ]
    other = ModuleSpec("torchao", None)
    other.submodule_search_locations = [str(tmp_path)]
    monkeypatch.setattr("src.distributed.precision.float8.find_spec", lambda _: other)
    assert problems() == []
    assert problems(emulate=False) == [
        "precision.float8.experts=true: this torchao has no kernels for them; pip install torchao==0.17.0"
    ]


def test_an_mfu_says_what_was_float8() -> None:
    how = {"storage": "float32", "compute": "bfloat16", "reduce": "float32"}
    assert Precision(**how, float8=float8()).arithmetic == "float8 tensorwise with experts"
    assert Precision(**how, float8=float8(experts=False)).arithmetic == "float8 tensorwise"


@pytest.mark.gpu
@pytest.mark.parametrize("counts", [[700, 0, 300, 24], [0, 0, 0, 1024]])
def test_kernels_are_close_to_their_emulation(counts: list[int]) -> None:
    torch.manual_seed(0)
    experts = Experts(4, 256, 128).cuda().bfloat16()
    for parameter in experts.parameters():
        nn.init.normal_(parameter, std=0.1)
    experts.multiple = 16
    x = torch.randn(1024, 256, device="cuda", dtype=torch.bfloat16, requires_grad=True)
    probe, weights = torch.randn_like(x), torch.rand(1024, device="cuda")

    def results(product: Any) -> list[Tensor]:
        experts.product = product
        out = experts(x, torch.tensor(counts, device="cuda"), weights)
        return [out, *torch.autograd.grad((out * probe).sum(), [x, *experts.parameters()])]

    for real, imitated in zip(results(kernels()), results(emulated), strict=True):
        assert float((real - imitated).float().norm()) <= 0.02 * float(imitated.float().norm())


@pytest.mark.gpu
def test_kernels_wait_for_nothing_and_compile_into_one_graph() -> None:
    experts = Experts(4, 256, 128).cuda().bfloat16()
    for parameter in experts.parameters():
        nn.init.normal_(parameter, std=0.1)
    experts.product, experts.multiple = kernels(), 16
    x = torch.randn(1024, 256, device="cuda", dtype=torch.bfloat16, requires_grad=True)
    counts, weights = torch.tensor([700, 0, 300, 24], device="cuda"), torch.rand(1024, device="cuda")
    compiled = torch.compile(experts.forward, fullgraph=True)
    eager = experts(x, counts, weights)
    compiled(x, counts, weights).sum().backward()
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        result = compiled(x, counts, weights)
        result.sum().backward()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert float((result - eager).float().norm() / eager.float().norm()) < 0.02
