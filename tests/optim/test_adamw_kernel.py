"""The update of many tensors by one kernel equals the one of each tensor, whatever their sizes and types."""

import pytest
import torch
from torch import Tensor

from src.optim.adamw import rates, update
from src.optim.elementwise import Elementwise

OPTIONS = (0.9, 0.95, 1e-8)
# One number, fewer than a block, more than a chunk and no multiple of anything, whole chunks, a matrix, matrices of
# experts, whose copies and gradients are halves of others' rows.
SHAPES: tuple[tuple[int, ...], ...] = ((1,), (257,), (40_001,), (2 * 16384,), (300, 1024), (5, 64, 24))


def stepped(
    device: str, gradient: torch.dtype, moment: torch.dtype, *, kernel: bool, copies: bool
) -> tuple[list[list[Tensor]], list[Tensor]]:
    """(weight and moments of each, copies) after three steps, the second of which is skipped."""
    generator = torch.Generator().manual_seed(0)
    weights = [torch.nn.Parameter(torch.randn(shape, generator=generator).to(device)) for shape in SHAPES]
    launches = None
    if kernel:
        from src.optim.kernels.adamw import launches
    groups = [
        {"params": weights[:2], "lr": 1e-2, "weight_decay": 0.0},
        {"params": weights[2:], "lr": 1e-3, "weight_decay": 0.1},
    ]
    optimizer = Elementwise(groups, update, rates, OPTIONS, launches)
    beside: dict[Tensor, Tensor] = {weight: weight.detach().bfloat16() for weight in weights[1:]} if copies else {}
    if copies:
        beside[weights[-1]] = halved(weights[-1].detach().bfloat16())
    optimizer.copies = beside
    for weight in weights:
        weight.grad_dtype = gradient
        state = {name: torch.zeros_like(weight, dtype=moment) for name in ("exp_avg", "exp_avg_sq")}
        optimizer.state[weight] = {"step": torch.zeros((), device=device), **state}
    optimizer.grad_scale = torch.full((), 1.7, device=device)
    for step in range(3):
        optimizer.found_inf = torch.full((), float(step == 1), device=device)
        for weight in weights:
            made = torch.randn(weight.shape, generator=generator).to(device, gradient)
            weight.grad = halved(made) if copies and weight is weights[-1] else made
        optimizer.step()
    ends = [[weight.detach(), *(each for name, each in optimizer.state[weight].items())] for weight in weights]
    return ends, list(beside.values())


def halved(tensor: Tensor) -> Tensor:
    """The same numbers in the second half of rows twice as many."""
    half = torch.cat((torch.full_like(tensor, float("nan")), tensor), dim=-2).chunk(2, dim=-2)[1]
    assert not half.is_contiguous()
    return half


@pytest.mark.gpu
@pytest.mark.parametrize("copies", [True, False])
@pytest.mark.parametrize("moment", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("gradient", [torch.float32, torch.bfloat16])
def test_one_launch_equals_an_update_of_each(gradient: torch.dtype, moment: torch.dtype, copies: bool) -> None:
    """The kernel may contract a product and a sum, so fp32 differs by some ulp, and what is rounded after by one."""
    ours, mine = stepped("cuda", gradient, moment, kernel=True, copies=copies)
    theirs, _ = stepped("cpu", gradient, moment, kernel=False, copies=copies)
    tolerance = {torch.float32: 1e-5, torch.bfloat16: 1.0 / 128}
    for tensors, expected in zip(ours, theirs, strict=True):
        for tensor, right in zip(tensors, expected, strict=True):
            apart = max(tolerance[tensor.dtype], tolerance[moment] * 0.01)
            torch.testing.assert_close(tensor.cpu(), right, rtol=apart, atol=1e-6)
    for copy, (weight, *_) in zip(mine, ours[1:], strict=False):
        assert torch.equal(copy, weight.bfloat16())


def test_a_copy_is_written_with_its_weight() -> None:
    ends, copies = stepped("cpu", torch.bfloat16, torch.float32, kernel=False, copies=True)
    assert len(copies) == len(SHAPES) - 1
    assert all(torch.equal(copy, weight.bfloat16()) for copy, (weight, *_) in zip(copies, ends[1:], strict=True))
