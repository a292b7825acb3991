"""flash-attn-4's kernels as operators of torch, so that compilers and recompute see them. An optional package.

On an H200, forward / backward in TFLOP/s, causal, 4.0.0b36 beside cuDNN: 2 x 32 heads (8 of keys) x 8192 x 128: 702 /
580 beside 637 / 511; x 64 wide: 551 / 521 beside 454 / 419; 32 x 12 x 1024 x 64: 238 / 258 beside 320 / 236; latent
attention, 4 x 16 x 4096, 192 and 128 wide: 674 / 445 beside 568 / 430.
"""

from functools import cache
from importlib import import_module, metadata
from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor

from src.models.kernels.disk import keep_on_disk

# (width of q and k, width of v) at which the kernels were measured to be faster, on Hopper.
FASTER = ((64, 64), (128, 128), (192, 128))
HOPPER = (9, 0)
# Queries up to which cuDNN's forward is faster, where all heads are as wide, and flash-attn-4 has the backward: 0.154
# beside 0.200 ms for 32 x 12 x 1024 x 64, 0.281 beside 0.318 for 32 x 16 (4) x 1024 x 128; at 2048 they are even.
CUDNN_FORWARD = 1024
# Tokens of a document on average, at least, for `within_documents`: the backward pass pads its sums in fp32 by up to
# one tile of 128 rows a document, and would need ever more memory.
SHORTEST = 128


def _kernels() -> Any:
    """The package's interface."""
    keep_on_disk()
    return import_module("flash_attn.cute.interface")


@cache
def here() -> bool:
    """Whether the package is installed and this is a GPU on which its kernels are the fastest."""
    there = find_spec("flash_attn") is not None and torch.cuda.is_available()
    return there and torch.cuda.get_device_capability() == HOPPER


def takes(q: Tensor, k: Tensor, v: Tensor) -> bool:
    """Whether the kernels are faster for tensors like these."""
    return q.is_cuda and q.dtype == k.dtype == v.dtype and _faster((q.shape[-1], v.shape[-1]), q.dtype)


def attends_within_documents(head_widths: tuple[int, int], dtype: torch.dtype) -> bool:
    """Whether `within_documents` is the fastest way here for such heads, in this dtype of q, k and v."""
    return here() and _faster(head_widths, dtype)


def _faster(head_widths: tuple[int, int], dtype: torch.dtype) -> bool:
    return dtype in (torch.bfloat16, torch.float16) and head_widths in FASTER


def version() -> str | None:
    """Of the package, for the record of a measurement; None where its kernels are not used."""
    return metadata.version("flash-attn-4") if here() else None


def attention(q: Tensor, k: Tensor, v: Tensor, scale: float | None) -> Tensor:
    """Causal, with shapes as in src/models/attention/cores.py."""
    out: Tensor
    out, _ = forward(q, k, v, scale, causal=True)
    return out


def document_starts(documents: Tensor) -> Tensor | None:
    """Where each document of (batch, length) begins in the flattened rows, and how many tokens there are: int32.

    Always batch * length // SHORTEST + 1 long, so that no kernel is compiled twice: behind the last document there are
    empty ones. None where there are more documents than that. On the CPU, or it would wait for the device.
    """
    starts = torch.ones_like(documents, dtype=torch.bool)
    starts[:, 1:] = documents[:, 1:] != documents[:, :-1]
    found = starts.flatten().nonzero().squeeze(1).to(torch.int32)
    most, total = documents.numel() // SHORTEST, documents.numel()
    return None if len(found) > most else torch.cat((found, found.new_full((most + 1 - len(found),), total)))


def within_documents(q: Tensor, k: Tensor, v: Tensor, starts: Tensor, scale: float | None) -> Tensor:
    """Causal within each document of `document_starts`, with shapes as in src/models/attention/cores.py."""
    out: Tensor
    out, _ = varlen_forward(q, k, v, starts, scale)
    return out


@torch.library.custom_op("flash_attention_4::forward", mutates_args=())
def forward(q: Tensor, k: Tensor, v: Tensor, scale: float | None, causal: bool) -> tuple[Tensor, Tensor]:
    """The result (batch, heads, queries, v width) and its log sum exp (batch, heads, queries), natural, fp32."""
    if q.is_cuda and causal and q.shape[2] == k.shape[2] <= CUDNN_FORWARD and q.shape[-1] == v.shape[-1]:
        cudnn = torch.ops.aten._scaled_dot_product_cudnn_attention
        out, lse, *_ = cudnn(q, k, v, attn_bias=None, compute_log_sumexp=True, is_causal=True, scale=scale)
        return out, lse.reshape(q.shape[:3])
    by_token = (each.transpose(1, 2) for each in (q, k, v))
    out, lse, *_ = _kernels()._flash_attn_fwd(*by_token, softmax_scale=scale, causal=causal, return_lse=True)
    return out.transpose(1, 2), lse


@forward.register_fake
def _(q: Tensor, k: Tensor, v: Tensor, scale: float | None, causal: bool) -> tuple[Tensor, Tensor]:  # noqa: ARG001
    return _empty_out(q, v), q.new_empty(q.shape[:3], dtype=torch.float32)


@torch.library.custom_op("flash_attention_4::backward", mutates_args=())
def backward(
    grad: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, scale: float | None, causal: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of q, k and v. `out` and `lse` may be those of a softmax over more keys than these."""
    q, k, v, out, grad = (_packed(each.transpose(1, 2)) for each in (q, k, v, out, grad))
    grads = _kernels()._flash_attn_bwd(
        q, k, v, out, grad, lse, scale, causal, deterministic=torch.are_deterministic_algorithms_enabled()
    )
    grad_q, grad_k, grad_v = (each.transpose(1, 2) for each in grads[:3])
    return grad_q, grad_k, grad_v


@torch.library.custom_op("flash_attention_4::varlen_forward", mutates_args=())
def varlen_forward(q: Tensor, k: Tensor, v: Tensor, starts: Tensor, scale: float | None) -> tuple[Tensor, Tensor]:
    """The result (batch, heads, length, v width) and its log sum exp (heads, batch * length), natural, fp32."""
    flat = (_flat(each) for each in (q, k, v))
    out, lse, *_ = _kernels()._flash_attn_fwd(
        *flat, cu_seqlens_q=starts, cu_seqlens_k=starts, softmax_scale=scale, causal=True, return_lse=True
    )
    return _rows(out, q), lse


@varlen_forward.register_fake
def _(q: Tensor, k: Tensor, v: Tensor, starts: Tensor, scale: float | None) -> tuple[Tensor, Tensor]:  # noqa: ARG001
    batch, heads, length, _ = q.shape
    return _empty_out(q, v), q.new_empty(heads, batch * length, dtype=torch.float32)


@torch.library.custom_op("flash_attention_4::varlen_backward", mutates_args=())
def varlen_backward(
    grad: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, starts: Tensor, scale: float | None
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of q, k and v."""
    flat = (_packed(_flat(each)) for each in (q, k, v, out, grad))
    grads = _kernels()._flash_attn_bwd(
        *flat,
        lse,
        scale,
        causal=True,
        cu_seqlens_q=starts,
        cu_seqlens_k=starts,
        deterministic=torch.are_deterministic_algorithms_enabled(),
    )
    grad_q, grad_k, grad_v = (_rows(each, like) for each, like in zip(grads[:3], (q, k, v), strict=True))
    return grad_q, grad_k, grad_v


@backward.register_fake
@varlen_backward.register_fake
def _(_grad: Tensor, q: Tensor, k: Tensor, v: Tensor, *_others: Any) -> tuple[Tensor, Tensor, Tensor]:
    return _like(q), _like(k), _like(v)


def _empty_out(q: Tensor, v: Tensor) -> Tensor:
    """Of the result, (batch, heads, queries, v width), as the kernels lay it out."""
    batch, heads, length, _ = q.shape
    return q.new_empty(batch, length, heads, v.shape[-1]).transpose(1, 2)


def _like(x: Tensor) -> Tensor:
    """Empty, (batch, heads, length, width) as the kernels lay it out: by token, then by head."""
    return torch.empty_like(x.transpose(1, 2), memory_format=torch.contiguous_format).transpose(1, 2)


def _flat(x: Tensor) -> Tensor:
    """(batch, heads, length, width) -> (batch * length, heads, width)."""
    return x.transpose(1, 2).flatten(0, 1)


def _rows(x: Tensor, like: Tensor) -> Tensor:
    """(batch * length, heads, width) -> (batch, heads, length, width)."""
    return x.reshape(like.shape[0], like.shape[2], *x.shape[1:]).transpose(1, 2)


def _packed(x: Tensor) -> Tensor:
    return x if x.stride(-1) == 1 else x.contiguous()


def _keep(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    q, k, v, ctx.scale, ctx.causal = inputs
    ctx.save_for_backward(q, k, v, *output)
    ctx.set_materialize_grads(False)


def _differentiate(ctx: Any, grad: Tensor, _: Tensor | None) -> tuple[Tensor | None, ...]:
    return (*backward(grad, *ctx.saved_tensors, ctx.scale, ctx.causal), None, None)


forward.register_autograd(_differentiate, setup_context=_keep)


def _keep_varlen(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    q, k, v, starts, ctx.scale = inputs
    ctx.save_for_backward(q, k, v, *output, starts)
    ctx.set_materialize_grads(False)


def _differentiate_varlen(ctx: Any, grad: Tensor, _: Tensor | None) -> tuple[Tensor | None, ...]:
    return (*varlen_backward(grad, *ctx.saved_tensors, ctx.scale), None, None)


varlen_forward.register_autograd(_differentiate_varlen, setup_context=_keep_varlen)
