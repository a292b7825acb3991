"""A SwiGLU inside of the matrix products around it, by quack's kernels for Hopper. An optional package.

The product of x and (w1, w3) writes silu(w1 x) * w3 x as it ends, and that of the result's gradient and w2 goes on to
the gradients of w1 x and w3 x: two passes less over the widest tensors of a block, of which one less is kept. w1 and w3
must lie in one matrix, `w13`. The same arithmetic by torch's operators serves any other device.

On an H200 in bf16, ms beside torch's products and compiled passes, of 32,768 rows of 768 x 2048: into the SwiGLU 0.344
beside 0.419, back through it 0.279 beside 0.346, gradients of x, w1 and w3 0.62 beside 0.66. Of 98,304 rows of 64
experts of 2048 x 1408: 1.91 beside 2.19, 1.18 beside 1.40, 3.61 beside 4.27, w2 and its gradient 1.85 beside 2.12.
"""

import warnings
from collections.abc import Callable
from functools import cache
from importlib import import_module, metadata
from importlib.util import find_spec
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from src.models.kernels.disk import keep_on_disk

HOPPER = (9, 0)
WIDEST = 2048  # of what comes in, up to which models were measured with it; torch's products gain on it as they grow
MULTIPLE = 8  # of elements: rows that begin at 16 bytes, as the kernels copy them
WEIGHTS = 4  # that a kernel reads at once
# Of a product: tile of rows and columns, two tiles by turns ("pingpong"), tiles in a cluster by rows and by columns.
Tiles = tuple[int, int, bool, int, int]
DENSE: Tiles = (128, 192, True, 2, 1)
EXPERTS: Tiles = (192, 128, True, 1, 2)
GRADIENT: Tiles = (128, 256, False, 2, 1)


@cache
def here() -> bool:
    """Whether the package is installed and works, and this is a GPU that its kernels were measured on.

    Beside another version of the compiler under it, or outside of a folder site-packages, it refuses its own kernels.
    """
    there = find_spec("quack") is not None and torch.cuda.is_available()
    if not there or torch.cuda.get_device_capability() != HOPPER:
        return False
    keep_on_disk()
    try:
        import_module("quack.epilogue.library")
    except (ImportError, AttributeError, TypeError) as error:
        found = f"quack-kernels {metadata.version('quack-kernels')} does not work here: {error}"
        warnings.warn(f"{found}; SwiGLUs are not fused; see requirements-cuda.txt", stacklevel=2)
        return False
    return True


def takes(widths: tuple[int, int], dtype: torch.dtype) -> bool:
    """Whether the kernels are faster for a SwiGLU of these widths, outside and inside, and are there for the dtype."""
    fits = widths[0] <= WIDEST and all(width % MULTIPLE == 0 for width in widths)
    return fits and dtype in (torch.bfloat16, torch.float16) and here()


def version() -> str | None:
    """Of the package, for the record of a measurement; None where it is not to be used."""
    return metadata.version("quack-kernels") if here() else None


def fused_swiglu(
    x: Tensor, w13: Tensor, w2: Tensor, ends: Tensor | None = None, weights: Tensor | None = None
) -> Tensor:
    """w2(silu(w1 x) * w3 x): (..., dim) -> (..., dim); w13 (2 * hidden, dim) is w1 over w3, w2 (dim, hidden).

    With `ends` (num_experts) int32 each expert has rows and matrices of its own, as src/models/moe/experts.py says;
    `weights` (rows) fp32 scale the result.
    """
    apply: Callable[..., Tensor] = _FusedSwiGLU.apply
    return apply(x.flatten(0, -2), w13, w2, ends, weights).view_as(x)


class _FusedSwiGLU(torch.autograd.Function):
    """Kept for the backward: x, and w1 x and w3 x."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, w13: Tensor, w2: Tensor, ends: Tensor | None, weights: Tensor | None) -> Tensor:
        out: Tensor
        out, gates = forward(x, w13, w2, ends)
        ctx.save_for_backward(x, gates, w13, w2, ends, weights)
        return out if weights is None else (out * weights.unsqueeze(-1)).to(out.dtype)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        x, gates, w13, w2, ends, weights = ctx.saved_tensors
        grad_x, grad_w13, grad_w2, grad_weights = backward(grads[0], x, gates, w13, w2, ends, weights)
        return grad_x, grad_w13, grad_w2, None, None if weights is None else grad_weights


@torch.library.custom_op("fused_swiglu::forward", mutates_args=())
def forward(x: Tensor, w13: Tensor, w2: Tensor, ends: Tensor | None) -> tuple[Tensor, Tensor]:
    """The result (rows, dim), and (rows, 2 * hidden) in which the elements of w1 x and w3 x take turns."""
    hidden, gates = _gated(x, w13, ends)
    return _product(hidden, w2.mT, ends), gates


@forward.register_fake
def _(x: Tensor, w13: Tensor, w2: Tensor, ends: Tensor | None) -> tuple[Tensor, Tensor]:  # noqa: ARG001
    return torch.empty_like(x), x.new_empty(len(x), w13.shape[-2])


@torch.library.custom_op("fused_swiglu::backward", mutates_args=())
def backward(
    grad: Tensor, x: Tensor, gates: Tensor, w13: Tensor, w2: Tensor, ends: Tensor | None, weights: Tensor | None
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Gradients of x, w13, w2 and weights (fp32; nothing without weights), of that of the result."""
    grad = grad.contiguous()
    grad_gates, hidden, grad_weights = _gated_gradient(grad, w2, gates, ends, weights)
    grad_w2 = _product_by_rows(grad, hidden, ends)
    grad_x = _from_both(grad_gates, w13, ends)
    return grad_x, _of_both(grad_gates, x, ends), grad_w2, grad_weights


@backward.register_fake
def _(
    _grad: Tensor, x: Tensor, _gates: Tensor, w13: Tensor, w2: Tensor, _ends: Tensor | None, weights: Tensor | None
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    of_weights = x.new_empty(0 if weights is None else len(x), dtype=torch.float32)
    return torch.empty_like(x), w13.new_empty(w13.shape), w2.new_empty(w2.shape), of_weights


# ---- the products: quack's on a GPU, else torch's


def _gated(x: Tensor, w13: Tensor, ends: Tensor | None) -> tuple[Tensor, Tensor]:
    """silu(w1 x) * w3 x (rows, hidden), and both of them in turn (rows, 2 * hidden)."""
    if not x.is_cuda:
        gates = _in_turn(_product(x, w13.mT, ends))
        return F.silu(gates[:, ::2]) * gates[:, 1::2], gates
    gates, hidden = x.new_empty(len(x), w13.shape[-2]), x.new_empty(len(x), w13.shape[-2] // 2)
    _kernels().gemm_act(
        x,
        w13.mT,
        activation="swiglu",
        preact_out=gates,
        postact_out=hidden,
        cu_seqlens_m=_starts(ends),
        concat_layout=("B",),
        config=_config(DENSE if ends is None else EXPERTS),
    )
    return hidden, gates


def _gated_gradient(
    grad: Tensor, w2: Tensor, gates: Tensor, ends: Tensor | None, weights: Tensor | None
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of w1 x and w3 x in turn, what w2 was multiplied with, and the gradient of the weights."""
    if not grad.is_cuda or (weights is not None and len(weights) % WEIGHTS):
        return _gated_gradient_by_torch(_product(grad, w2, ends), gates, weights)
    grad_gates, hidden, *of_weights = _kernels().gemm_dact(
        grad,
        w2,
        gates,
        activation="swiglu",
        colvec_scale=weights,
        colvec_reduce=weights is not None,
        cu_seqlens_m=_starts(ends),
        dynamic_scheduler=False,
        config=_config(GRADIENT),
    )
    return grad_gates, hidden, of_weights[0] if of_weights else grad.new_empty(0, dtype=torch.float32)


def _gated_gradient_by_torch(grad: Tensor, gates: Tensor, weights: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
    grad, gate, up = grad.float(), gates[:, ::2].float(), gates[:, 1::2].float()
    sigmoid = gate.sigmoid()
    hidden = gate * sigmoid * up
    grad_weights = grad.new_empty(0) if weights is None else (grad * hidden).sum(1)
    if weights is not None:
        grad, hidden = grad * weights.unsqueeze(-1), hidden * weights.unsqueeze(-1)
    of_gate = grad * up * sigmoid * (1 + gate * (1 - sigmoid))
    grad_gates = torch.stack((of_gate, grad * gate * sigmoid), dim=-1).flatten(1)
    return grad_gates.to(gates.dtype), hidden.to(gates.dtype), grad_weights


def _product(rows: Tensor, matrices: Tensor, ends: Tensor | None) -> Tensor:
    """rows (n, in) times (in, out), or those of each expert times its own."""
    if ends is None:
        return rows @ matrices
    if not rows.is_cuda:
        return F.grouped_mm(rows, matrices, offs=ends)
    out: Tensor = _kernels().gemm(rows, matrices, cu_seqlens_m=_starts(ends), tuned=False)
    return out


def _product_by_rows(left: Tensor, right: Tensor, ends: Tensor | None) -> Tensor:
    """(n, out) and (n, in) -> (out, in), or that of each expert's rows."""
    if ends is None:
        return left.mT @ right
    if not left.is_cuda:
        return F.grouped_mm(left.mT, right, offs=ends)
    out: Tensor = _kernels().gemm(left.mT, right, cu_seqlens_k=_starts(ends), tuned=False)
    return out


def _from_both(grad_gates: Tensor, w13: Tensor, ends: Tensor | None) -> Tensor:
    """The gradient of x: (rows, 2 * hidden) in turn -> (rows, dim)."""
    if not grad_gates.is_cuda:
        return _product(_apart(grad_gates), w13, ends)
    out: Tensor = _kernels().gemm(grad_gates, w13, cu_seqlens_m=_starts(ends), concat_layout=("B",), tuned=False)
    return out


def _of_both(grad_gates: Tensor, x: Tensor, ends: Tensor | None) -> Tensor:
    """The gradient of w13."""
    if not grad_gates.is_cuda:
        return _product_by_rows(_apart(grad_gates), x, ends)
    out: Tensor = _kernels().gemm(grad_gates.mT, x, cu_seqlens_k=_starts(ends), concat_layout=("out",), tuned=False)
    return out


def _in_turn(both: Tensor) -> Tensor:
    """(rows, 2 * hidden): the elements of the two halves in turn."""
    result: Tensor = both.unflatten(1, (2, -1)).mT.flatten(1)
    return result


def _apart(in_turn: Tensor) -> Tensor:
    """The inverse of `_in_turn`."""
    result: Tensor = in_turn.unflatten(1, (-1, 2)).mT.flatten(1)
    return result


def _starts(ends: Tensor | None) -> Tensor | None:
    """Where the rows of each expert begin and, at last, end: (num_experts + 1) int32."""
    return None if ends is None else F.pad(ends, (1, 0))


@cache
def _config(tiles: Tiles) -> Any:
    rows, columns, pingpong, by_rows, by_columns = tiles
    return import_module("quack.gemm_config").GemmConfig(
        tile_m=rows,
        tile_n=columns,
        pingpong=pingpong,
        is_dynamic_persistent=False,
        cluster_m=by_rows,
        cluster_n=by_columns,
    )


def _kernels() -> Any:
    """The package's interface."""
    keep_on_disk()
    return import_module("quack.gemm_interface")
