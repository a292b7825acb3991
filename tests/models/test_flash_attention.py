"""flash-attn-4 against torch's attention in fp32, and the operators as compilers see them."""

import sys
from collections.abc import Callable
from functools import partial
from itertools import pairwise
from types import ModuleType
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask
from torch.utils.checkpoint import checkpoint

from src.distributed import recompute
from src.distributed.context.attention_kernels import PlainKernel
from src.models.attention import flash_attention
from src.models.attention.cores import CausalAttention, FlexAttention
from tests.models.shapes import tiny_llama

HOW: dict[str, Any] = {"causal": True, "return_lse": True}
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
    assert core.flash
    assert flash_attention.takes(*given[:3])
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


def within(documents: Tensor) -> Callable[..., Tensor]:
    """torch's attention by a dense mask: causal, and within each document of (batch, length)."""
    length = documents.shape[1]
    seen = torch.ones(length, length, dtype=torch.bool, device=documents.device).tril()
    mask = (seen & (documents.unsqueeze(2) == documents.unsqueeze(1))).unsqueeze(1)
    return partial(F.scaled_dot_product_attention, attn_mask=mask, enable_gqa=True)


def some_documents(batch: int, length: int) -> Tensor:
    """(batch, length): numbers that rise at random places, as the loader counts them."""
    generator = torch.Generator().manual_seed(1)
    return (torch.rand(batch, length, generator=generator) < 3 / length).cumsum(1).to(torch.int32)


@pytest.mark.gpu
@pytest.mark.parametrize("shape", SHAPES)
def test_documents_as_near_to_fp32_as_the_device_own_kernel(shape: tuple[int, ...]) -> None:
    """Three documents a row on average, each by itself; and one a row, which is the causal mask."""
    pytest.importorskip("flash_attn.cute", reason="flash-attn-4 is not installed: requirements-cuda.txt")
    given = [x.cuda() for x in made(*shape)]
    for documents in (some_documents(shape[0], shape[3]), torch.zeros(shape[0], shape[3], dtype=torch.int32)):
        starts = flash_attention.document_starts(documents)
        assert starts is not None
        core, here = torch.compile(FlexAttention(), fullgraph=True), starts.cuda()
        how = lambda q, k, v, scale, core=core, here=here: core(q, k, v, here, scale)  # noqa: E731
        dense = within(documents.cuda())
        truth = attended(dense, [x.float() for x in given], None)
        for wide, ours, theirs in zip(truth, attended(how, given, None), attended(dense, given, None), strict=True):
            assert ours.shape == wide.shape
            assert (ours.float() - wide).abs().max() <= 2 * (theirs.float() - wide).abs().max() + 1e-3


def plain_forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    softmax_scale: float | None,
    causal: bool,
    return_lse: bool,
    cu_seqlens_q: Tensor | None = None,
    cu_seqlens_k: Tensor | None = None,
) -> tuple[Tensor, Tensor, None]:
    assert return_lse
    if cu_seqlens_q is not None:
        assert cu_seqlens_k is cu_seqlens_q
        parts = [
            plain_forward(*(x[one:two].unsqueeze(0) for x in (q, k, v)), softmax_scale=softmax_scale, **HOW)
            for one, two in pairwise(cu_seqlens_q.tolist())
            if two > one
        ]
        return torch.cat([out[0] for out, *_ in parts]), torch.cat([lse[0] for _, lse, _ in parts], 1), None
    by_head = (each.transpose(1, 2) for each in (q, k, v))
    out, lse = PlainKernel.forward(*by_head, causal=causal, scale=softmax_scale)
    return out.transpose(1, 2).to(q.dtype).contiguous(), lse.squeeze(-1), None


def plain_backward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    grad: Tensor,
    lse: Tensor,
    scale: float | None,
    causal: bool,
    *,
    deterministic: bool,
    cu_seqlens_q: Tensor | None = None,
    cu_seqlens_k: Tensor | None = None,
) -> list[Tensor]:
    assert not deterministic
    if cu_seqlens_q is not None:
        assert cu_seqlens_k is cu_seqlens_q
        parts = [
            plain_backward(
                *(x[one:two].unsqueeze(0) for x in (q, k, v, out, grad)),
                lse[:, one:two].unsqueeze(0),
                scale,
                causal,
                deterministic=deterministic,
            )
            for one, two in pairwise(cu_seqlens_q.tolist())
            if two > one
        ]
        return [torch.cat([each[0] for each in column]) for column in zip(*parts, strict=True)]
    q, k, v, out, grad = (each.transpose(1, 2) for each in (q, k, v, out, grad))
    found = PlainKernel.backward(grad, q, k, v, out, lse.unsqueeze(-1), causal=causal, scale=scale)
    return [each.transpose(1, 2).to(q.dtype).contiguous() for each in found]


@pytest.fixture
def stand_in(monkeypatch: pytest.MonkeyPatch) -> None:
    """The package's two functions by plain matrices, so that all around them is tried on a CPU too."""
    for name in ("flash_attn", "flash_attn.cute", "flash_attn.cute.interface"):
        monkeypatch.setitem(sys.modules, name, ModuleType(name))
    sys.modules["flash_attn.cute.interface"].__dict__.update(
        _flash_attn_fwd=plain_forward, _flash_attn_bwd=plain_backward
    )


@pytest.mark.usefixtures("stand_in")
@pytest.mark.parametrize("masked", [False, True], ids=["causal", "documents"])
@pytest.mark.parametrize("how", ["eager", "compiled", "recomputed"])
def test_the_operators_differentiate_compile_and_are_kept(how: str, masked: bool) -> None:
    """With the package's place taken: equal to torch's attention in fp32 within bf16's rounding of the results."""
    calls = 0
    original = sys.modules["flash_attn.cute.interface"]._flash_attn_fwd

    def counted(*arguments: Tensor, **options: Any) -> Any:
        nonlocal calls
        calls += 1
        return original(*arguments, **options)

    sys.modules["flash_attn.cute.interface"]._flash_attn_fwd = counted  # type: ignore[attr-defined]
    given = made(1, 4, 2, 256, 64, 64)

    documents = some_documents(1, 256)
    starts = flash_attention.document_starts(documents)
    assert starts is not None
    assert starts.tolist() == [0, 28, 256], "one border, and the length"

    def attend(q: Tensor, k: Tensor, v: Tensor, scale: float | None) -> Tensor:
        if masked:
            return FlexAttention()(q * 1.0, k, v, starts, scale)
        return flash_attention.attention(q * 1.0, k, v, scale)

    chosen: Callable[..., Tensor] = attend
    if how == "compiled":
        chosen = torch.compile(attend, fullgraph=True, backend="aot_eager")
    if how == "recomputed":
        chosen = partial(checkpoint, attend, use_reentrant=False, context_fn=recompute._selective)
    truth = attended(within(documents) if masked else exact, [x.float() for x in given], 0.1)
    found = attended(chosen, given, 0.1)
    for ours, wide in zip(found, truth, strict=True):
        torch.testing.assert_close(ours.float(), wide, rtol=2**-7, atol=2**-6)
    assert calls == 1


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
    assert not flash_attention.takes(q, k, v)
    assert not CausalAttention().flash
    assert torch.equal(CausalAttention()(q, k, v), exact(q, k, v, None))


def test_starts_of_documents() -> None:
    """Rows begin one, always; the shape never changes; more than one in 128 tokens are not for this kernel."""
    documents = torch.zeros(2, 512, dtype=torch.int32)
    documents[0, 100:] = 1
    documents[1, 1:] = 1
    starts = flash_attention.document_starts(documents)
    assert starts is not None
    assert starts.dtype == torch.int32
    assert starts.tolist() == [0, 100, 512, 513, 1024, 1024, 1024, 1024, 1024]
    assert flash_attention.document_starts(torch.arange(512, dtype=torch.int32).expand(2, 512)) is None


def test_a_model_says_where_documents_start_only_where_that_kernel_is() -> None:
    """A block mask otherwise: on the CPU, in fp32, beside context ranks, and where documents are too many."""
    model = tiny_llama(attention="flex", mask="block_causal").build()
    few, many = torch.zeros(2, 128, dtype=torch.int32), torch.arange(128, dtype=torch.int32).expand(2, 128)
    assert isinstance(model.attention_mask(few, 2, 128), BlockMask)
    model.by_starts = True
    starts = model.attention_mask(few, 2, 128)
    assert isinstance(starts, Tensor)
    assert starts.tolist() == [0, 128, 256]
    assert isinstance(model.attention_mask(many, 2, 128), BlockMask)
