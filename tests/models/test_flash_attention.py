"""flash-attn-4 against torch's attention in fp32, and the operators as compilers see them."""

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from src.models import flash_attention
from src.models.attention import CausalAttention

SHAPES = [(2, 8, 2, 1024, 64, 64), (2, 8, 2, 1000, 128, 128), (1, 4, 4, 512, 192, 128)]


def made(batch: int, heads: int, kv_heads: int, length: int, width: int, value_width: int) -> list[Tensor]:
    """q, k, v and the gradient of the result, as models store them: (batch, length, heads, width)."""
    generator = torch.Generator().manual_seed(0)
    shapes = [(heads, width), (kv_heads, width), (kv_heads, value_width), (heads, value_width)]
    return [torch.randn(batch, length, *each, generator=generator).bfloat16().transpose(1, 2) for each in shapes]


def attended(how: object, given: list[Tensor], scale: float | None) -> list[Tensor]:
    """The result and the gradients of q, k and v."""
    *inputs, grad = (x.detach().clone(memory_format=torch.preserve_format) for x in given)
    inputs = [x.requires_grad_() for x in inputs]
    out = how(*inputs, scale=scale)  # type: ignore[operator]
    out.backward(grad)
    return [out.detach(), *(x.grad for x in inputs if x.grad is not None)]


def exact(q: Tensor, k: Tensor, v: Tensor, scale: float | None) -> Tensor:
    return F.scaled_dot_product_attention(q, k, v, is_causal=True, scale=scale, enable_gqa=True)


@pytest.mark.gpu
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("compiled", [False, True])
@pytest.mark.parametrize("scale", [None, 0.05])
def test_as_near_to_fp32_as_the_device_own_kernel(shape: tuple[int, ...], compiled: bool, scale: float | None) -> None:
    """At most twice the error of torch's attention in bf16, which rounds at the same places."""
    pytest.importorskip("flash_attn.cute", reason="flash-attn-4 is not installed: requirements-cuda.txt")
    given = [x.cuda() for x in made(*shape)]
    core = CausalAttention()
    assert flash_attention.serves(*given[:3])
    how = torch.compile(core, fullgraph=True) if compiled else core
    truth = attended(exact, [x.float() for x in given], scale)
    for wide, ours, theirs in zip(truth, attended(how, given, scale), attended(exact, given, scale), strict=True):
        assert ours.dtype == torch.bfloat16
        assert ours.shape == wide.shape
        assert (ours.float() - wide).abs().max() <= 2 * (theirs.float() - wide).abs().max() + 1e-3


@pytest.mark.gpu
def test_deterministic_when_asked() -> None:
    pytest.importorskip("flash_attn.cute", reason="flash-attn-4 is not installed: requirements-cuda.txt")
    given = [x.cuda() for x in made(2, 8, 2, 4096, 128, 128)]
    torch.use_deterministic_algorithms(mode=True)
    try:
        first = attended(CausalAttention(), given, None)
        assert all(
            torch.equal(one, other)
            for _ in range(5)
            for one, other in zip(first, attended(CausalAttention(), given, None), strict=True)
        )
    finally:
        torch.use_deterministic_algorithms(mode=False)


@pytest.mark.parametrize("shape", SHAPES)
def test_shapes_and_strides_are_told_to_the_compiler(shape: tuple[int, ...]) -> None:
    """Of results and gradients, as the kernels lay them out: by token, then by head."""
    q, k, v, grad = (x.to("meta") for x in made(*shape))
    out, lse = flash_attention.forward(q, k, v, None, causal=True)
    assert (out.shape, out.stride()) == (grad.shape, grad.stride())
    assert (lse.shape, lse.dtype) == (q.shape[:3], torch.float32)
    for found, like in zip(flash_attention.backward(grad, q, k, v, out, lse, None, True), (q, k, v), strict=True):
        assert (found.shape, found.stride(), found.dtype) == (like.shape, like.stride(), like.dtype)


def test_elsewhere_torch_attends() -> None:
    """On a CPU and at widths that were not measured the operators are not asked."""
    q, k, v, _ = made(1, 2, 2, 8, 64, 64)
    assert not flash_attention.serves(q, k, v)
    assert torch.equal(CausalAttention()(q, k, v), exact(q, k, v, None))
