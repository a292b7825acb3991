"""The kernel of the loss on a GPU against the same arithmetic by torch's operators."""

import pytest
import torch
from torch import Tensor

from src.models.cross_entropy import IGNORED, Output, gradient_, scale_, statistics

ROWS = 300


def given(words: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Logits as large as a trained head's, and labels: the first word, the last, one that does not count, any."""
    generator = torch.Generator().manual_seed(words)
    logits = 5 * torch.randn(ROWS, words, generator=generator)
    labels = torch.randint(0, words, (ROWS,), generator=generator)
    labels[:3] = torch.tensor([0, words - 1, IGNORED])
    return logits.to(dtype), labels


@pytest.mark.gpu
@pytest.mark.parametrize("words", [1, 90, 4096, 32000, 128256])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("z_loss", [0.0, 1e-3])
def test_loss_and_gradient_are_those_of_torch(words: int, dtype: torch.dtype, z_loss: float) -> None:
    """Sums of exp in another order: 1e-5 of a loss of up to 30, and one rounding of a gradient in its dtype."""
    from src.models.kernels.cross_entropy import losses_

    logits, labels = (each.cuda() for each in given(words, dtype))
    normalizer, target = statistics(logits, labels, 0)
    loss = (normalizer - target) * (labels != IGNORED)
    gradient = gradient_(logits.clone(), labels, normalizer, 0, z_loss)
    before = logits.clone()
    torch.testing.assert_close(losses_(logits, labels, IGNORED, z_loss, learns=False), loss, rtol=1e-5, atol=1e-5)
    assert torch.equal(logits, before)
    torch.testing.assert_close(losses_(logits, labels, IGNORED, z_loss, learns=True), loss, rtol=1e-5, atol=1e-5)
    rounding = 2.0**-7 if dtype == torch.bfloat16 else 1e-4
    torch.testing.assert_close(logits, gradient, rtol=rounding, atol=1e-6)
    assert not logits[2].any()


@pytest.mark.gpu
def test_logits_that_are_not_finite_make_the_loss_so() -> None:
    from src.models.kernels.cross_entropy import losses_

    for bad in (float("nan"), float("inf")):
        logits, labels = (each.cuda() for each in given(5000, torch.bfloat16))
        logits[7, 4321] = bad
        losses = losses_(logits, labels, IGNORED, 0.0, learns=True)
        assert not losses[7].isfinite()
        assert losses.isfinite().sum() == ROWS - 1


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_scaled_and_rounded_once(dtype: torch.dtype) -> None:
    """Also by operators: torch's product of a bf16 tensor and 1/3 on a GPU is one with 0.334."""
    from src.models.kernels import cross_entropy

    tensor = torch.randn(123, 457, device="cuda").to(dtype)
    factor = torch.tensor(1 / 3, device="cuda")
    exact = (tensor.float() * factor).to(dtype)
    assert torch.equal(cross_entropy.scale_(tensor.clone(), factor), exact)
    assert torch.equal(scale_(tensor.clone(), factor), exact)


@pytest.mark.gpu
def test_the_head_with_the_kernel_is_the_head_without() -> None:
    """Losses and both gradients over several chunks of rows; bf16 gradients within two of their roundings."""
    from src.models.kernels.cross_entropy import losses_

    torch.manual_seed(0)
    found = []
    hidden, labels = torch.randn(2, 5000, 64, device="cuda").bfloat16(), torch.randint(0, 999, (2, 5000)).cuda()
    labels[0, :100] = IGNORED
    weight = torch.randn(999, 64, device="cuda").bfloat16() / 8
    for kernel in (None, losses_):
        head = Output(64, 999).cuda().bfloat16()
        with torch.no_grad():
            head.weight.copy_(weight)
        head.losses_, head.rows = kernel, 4096
        inputs = hidden.clone().requires_grad_()
        loss = head(inputs, labels=labels) / 9900
        loss.backward()
        assert inputs.grad is not None
        assert head.weight.grad is not None
        found.append((loss.detach(), inputs.grad, head.weight.grad))
    for ours, theirs in zip(*found, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=2.0**-6, atol=1e-6)
