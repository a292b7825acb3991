"""flash-attn-4's kernels as operators of torch, so that compilers and recompute see them. An optional package.

On an H200, forward / backward in TFLOP/s, causal, 4.0.0b36 beside cuDNN: 2 x 32 heads (8 of keys) x 8192 x 128: 702 /
580 beside 637 / 511; x 64 wide: 551 / 521 beside 454 / 419; 32 x 12 x 1024 x 64: 238 / 258 beside 320 / 236; latent
attention, 4 x 16 x 4096, 192 and 128 wide: 674 / 445 beside 568 / 430.
"""

from functools import cache
from importlib import metadata
from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor

# (width of q and k, width of v) at which the kernels were measured to be faster, on Hopper.
FASTER = ((64, 64), (128, 128), (192, 128))
HOPPER = (9, 0)


@cache
def here() -> bool:
    """Whether the package is installed and this is a GPU on which its kernels are the fastest."""
    there = find_spec("flash_attn") is not None and torch.cuda.is_available()
    return there and torch.cuda.get_device_capability() == HOPPER


def takes(q: Tensor, k: Tensor, v: Tensor) -> bool:
    """Whether the kernels are faster for tensors like these."""
    half = q.dtype in (torch.bfloat16, torch.float16) and q.dtype == k.dtype == v.dtype
    return q.is_cuda and half and (q.shape[-1], v.shape[-1]) in FASTER


def version() -> str | None:
    """Of the package, for the record of a measurement; None where its kernels are not used."""
    return metadata.version("flash-attn-4") if here() else None


def attention(q: Tensor, k: Tensor, v: Tensor, scale: float | None) -> Tensor:
    """Causal, with shapes as in src/models/attention/cores.py."""
    out: Tensor
    out, _ = forward(q, k, v, scale, causal=True)
    return out


@torch.library.custom_op("flash_attention_4::forward", mutates_args=())
def forward(q: Tensor, k: Tensor, v: Tensor, scale: float | None, causal: bool) -> tuple[Tensor, Tensor]:
    """The result (batch, heads, queries, v width) and its log sum exp (batch, heads, queries), natural, fp32."""
    from flash_attn.cute.interface import _flash_attn_fwd  # type: ignore[import-not-found,unused-ignore]

    by_token = (each.transpose(1, 2) for each in (q, k, v))
    out, lse, *_ = _flash_attn_fwd(*by_token, softmax_scale=scale, causal=causal, return_lse=True)
    return out.transpose(1, 2), lse


@forward.register_fake
def _(q: Tensor, k: Tensor, v: Tensor, scale: float | None, causal: bool) -> tuple[Tensor, Tensor]:  # noqa: ARG001
    batch, heads, length, _ = q.shape
    out = q.new_empty(batch, length, heads, v.shape[-1]).transpose(1, 2)
    return out, q.new_empty(batch, heads, length, dtype=torch.float32)


@torch.library.custom_op("flash_attention_4::backward", mutates_args=())
def backward(
    grad: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, scale: float | None, causal: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of q, k and v. `out` and `lse` may be those of a softmax over more keys than these."""
    from flash_attn.cute.interface import _flash_attn_bwd

    q, k, v, out, grad = (_packed(each.transpose(1, 2)) for each in (q, k, v, out, grad))
    grads = _flash_attn_bwd(
        q, k, v, out, grad, lse, scale, causal, deterministic=torch.are_deterministic_algorithms_enabled()
    )
    grad_q, grad_k, grad_v = (each.transpose(1, 2) for each in grads[:3])
    return grad_q, grad_k, grad_v


@backward.register_fake
def _(
    grad: Tensor,  # noqa: ARG001
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,  # noqa: ARG001
    lse: Tensor,  # noqa: ARG001
    scale: float | None,  # noqa: ARG001
    causal: bool,  # noqa: ARG001
) -> tuple[Tensor, Tensor, Tensor]:
    grad_q, grad_k, grad_v = (
        torch.empty_like(each.transpose(1, 2), memory_format=torch.contiguous_format).transpose(1, 2)
        for each in (q, k, v)
    )
    return grad_q, grad_k, grad_v


def _packed(x: Tensor) -> Tensor:
    return x if x.stride(-1) == 1 else x.contiguous()


def _keep(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    q, k, v, ctx.scale, ctx.causal = inputs
    ctx.save_for_backward(q, k, v, *output)
    ctx.set_materialize_grads(False)


def _differentiate(ctx: Any, grad: Tensor, _: Tensor | None) -> tuple[Tensor | None, ...]:
    return (*backward(grad, *ctx.saved_tensors, ctx.scale, ctx.causal), None, None)


forward.register_autograd(_differentiate, setup_context=_keep)
