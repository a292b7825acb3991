"""A SwiGLU inside of its products against the plain one: by torch's operators here, by quack's kernels on a GPU."""

from importlib import metadata
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from src.models.block import FeedForward
from src.models.kernels import fused_swiglu
from src.models.moe.experts import Experts

COUNTS = [37, 0, 60, 3]  # an expert without a row, and numbers that no tile divides
KINDS = ["dense", "experts", "weighted", "odd"]


def made(kind: str, dim: int = 64, hidden: int = 48) -> tuple[nn.Module, list[Tensor]]:
    """A module and its inputs: x; for experts the counts of rows and, but for "experts", what scales them; "odd": as
    many rows as kernels do not read at once.
    """
    torch.manual_seed(0)
    module = FeedForward(dim, hidden) if kind == "dense" else Experts(len(COUNTS), dim, hidden)
    for parameter in module.parameters():
        nn.init.normal_(parameter, std=0.3)
    if kind == "dense":
        return module, [torch.randn(3, 50, dim)]
    counts = [*COUNTS[:-1], 1] if kind == "odd" else COUNTS
    inputs = [torch.randn(sum(counts), dim), torch.tensor(counts)]
    return module, inputs if kind == "experts" else [*inputs, torch.rand(sum(counts))]


def passed(module: Any, inputs: list[Tensor], *, fused: bool, compiled: bool = False) -> list[Tensor]:
    """The result, and the gradients of every input that has one, of w1, w3 and w2."""
    inputs = [each.clone().requires_grad_() if each.is_floating_point() else each for each in inputs]
    module.zero_grad()
    if fused:
        module.w13 = nn.Parameter(torch.cat([each.detach() for each in module.gates()], dim=-2))
    out = (torch.compile(module, fullgraph=True) if compiled else module)(*inputs)
    generator = torch.Generator().manual_seed(1)
    out.backward(torch.randn(out.shape, generator=generator).to(out))
    gates = [each.grad for each in module.gates()]
    if fused:
        assert gates == [None, None]
        gates, module.w13 = [*module.w13.grad.chunk(2, dim=-2)], None
    w2 = module.w2 if isinstance(module, Experts) else module.w2.weight
    grads = [*(each.grad for each in inputs if each.requires_grad), *gates, w2.grad]
    return [out.detach(), *(grad.clone() for grad in grads)]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("compiled", [False, True])
def test_by_torchs_operators_it_is_the_plain_one(kind: str, compiled: bool) -> None:
    """In fp32, whose sums are made in another order: 1e-6 of the largest number of each tensor."""
    module, inputs = made(kind)
    for ours, plain in zip(
        passed(module, inputs, fused=True, compiled=compiled), passed(module, inputs, fused=False), strict=True
    ):
        assert float((ours - plain).abs().max()) <= 2e-6 * float(plain.abs().max())


@pytest.mark.parametrize("error", [None, TypeError("no fail-closed semantic key"), ImportError("no quack.epilogue")])
def test_a_package_that_does_not_work_is_told_and_left_alone(
    error: Exception | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    def imported(_: str) -> None:
        if error is not None:
            raise error

    monkeypatch.setattr(fused_swiglu, "find_spec", lambda _: object())
    monkeypatch.setattr(fused_swiglu, "keep_on_disk", lambda: None)
    monkeypatch.setattr(fused_swiglu, "import_module", imported)
    monkeypatch.setattr(metadata, "version", lambda _: "0.6.2")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: fused_swiglu.HOPPER)
    here = fused_swiglu.here.__wrapped__
    if error is None:
        assert here()
        return
    with pytest.warns(UserWarning, match=f"quack-kernels 0.6.2 does not work here: {error}; SwiGLUs are not fused"):
        assert not here()


def test_nobody_else_reads_its_matrix() -> None:
    """It has no name in a checkpoint, and is no weight of its own."""
    module, _ = made("dense")
    assert set(module.state_dict()) == {"w1.weight", "w2.weight", "w3.weight"}
    assert len(list(module.parameters())) == 3


@pytest.mark.parametrize(("dim", "hidden"), [(768, 2048), (2048, 1408), (256, 8 * 83)])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("compiled", [False, True])
@pytest.mark.gpu
def test_as_near_to_fp32_as_torchs_products(kind: str, dim: int, hidden: int, compiled: bool) -> None:
    """At most twice the error of the plain one in bf16, which rounds as often; memory that held no numbers before."""
    pytest.importorskip("quack", reason="quack-kernels is not installed: requirements-cuda.txt")
    module, inputs = made(kind, dim, hidden)
    assert fused_swiglu.takes((dim, hidden), torch.bfloat16)
    exact = passed(module, inputs, fused=False)
    # The weights of rows stay fp32, as routers give them.
    inputs = [each.cuda() if each.dim() == 1 else each.cuda().bfloat16() for each in inputs]
    module = module.cuda().bfloat16()
    filth = [torch.full((40, 2**20), float("nan"), device="cuda") for _ in range(3)]
    del filth  # what the allocator hands out next is not zero
    ours = passed(module, inputs, fused=True, compiled=compiled)
    for number, (got, plain, wide) in enumerate(zip(ours, passed(module, inputs, fused=False), exact, strict=True)):
        scale = float(wide.abs().max())
        errors = [float((each.cpu().float() - wide).abs().max()) / scale for each in (got, plain)]
        assert errors[0] <= 2 * errors[1] + 1e-3, (number, errors)
        if kind != "dense" and number >= len(ours) - 3:
            assert float(got[1].abs().max()) == 0.0, "an expert without rows has no gradient"


@pytest.mark.gpu
@pytest.mark.parametrize("kind", ["dense", "weighted"])
def test_the_same_bits_at_every_run(kind: str) -> None:
    pytest.importorskip("quack", reason="quack-kernels is not installed: requirements-cuda.txt")
    module, inputs = made(kind, 768, 2048)
    module, inputs = (
        module.cuda().bfloat16(),
        [each.cuda() if each.dim() == 1 else each.cuda().bfloat16() for each in inputs],
    )
    first = passed(module, inputs, fused=True)
    for _ in range(4):
        assert all(map(torch.equal, passed(module, inputs, fused=True), first))
