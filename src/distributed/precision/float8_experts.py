"""Grouped matrix products of routed experts in float8: e4m3 numbers with a power of two as scale for each row of the
left and each column of the right factor, in the forward pass and in both gradients.

torchao has the kernels, for Hopper; the emulation below multiplies the same rounded numbers in bfloat16 anywhere.
"""

from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from src.models.moe.experts import Product

LARGEST = 448.0  # of e4m3


def kernels() -> Product:
    """torchao's, which wants the rows of each expert to be a multiple of 16."""
    from torchao.prototype.moe_training.fp8_grouped_mm import _to_fp8_rowwise_then_scaled_grouped_mm

    product: Product = partial(
        _to_fp8_rowwise_then_scaled_grouped_mm,
        out_dtype=torch.bfloat16,
        float8_dtype=torch.float8_e4m3fn,
        pad_token_groups_for_grouped_mm=False,
    )
    return product


def emulated(rows: Tensor, matrices: Tensor, ends: Tensor) -> Tensor:
    """The same for machines without such kernels: as accurate, and slower than bfloat16."""
    apply: Product = _Emulated.apply
    return apply(rows, matrices, ends)


class _Emulated(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, rows: Tensor, matrices: Tensor, ends: Tensor) -> Tensor:
        ctx.save_for_backward(rows, matrices, ends)
        return F.grouped_mm(_rounded(rows, -1), _rounded(matrices, -2), offs=ends)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor, None]:
        rows, matrices, ends = ctx.saved_tensors
        (grad,) = grads
        grad_rows = F.grouped_mm(_rounded(grad, -1), _rounded(matrices.mT, -2), offs=ends)
        left, right = _rounded_by_segment(rows, ends), _rounded_by_segment(grad, ends)
        return grad_rows, F.grouped_mm(left.T, right, offs=ends), None


def _rounded(x: Tensor, dim: int) -> Tensor:
    """To what e4m3 can hold, with a scale of its own for each line along `dim`."""
    return _with_scale(x, x.abs().amax(dim, keepdim=True))


def _rounded_by_segment(x: Tensor, ends: Tensor) -> Tensor:
    """With a scale for each column of each expert's rows, which the gradient of its matrix sums over."""
    segment = torch.searchsorted(ends, torch.arange(len(x), device=x.device, dtype=ends.dtype), right=True)
    segment = segment.clamp(max=len(ends) - 1)
    index = segment.unsqueeze(-1).expand_as(x)
    largest = x.new_zeros(len(ends), x.shape[1]).scatter_reduce(0, index, x.abs(), "amax")
    return _with_scale(x, largest[segment])


def _with_scale(x: Tensor, largest: Tensor) -> Tensor:
    scale = torch.exp2(torch.floor(torch.log2(LARGEST / largest.float().clamp(min=1e-12))))
    eighth = (x.float() * scale).clamp(-LARGEST, LARGEST).to(torch.float8_e4m3fn)
    return (eighth.float() / scale).to(x.dtype)
