"""The nearest orthogonal matrix, nearly, by matrix products alone (Jordan et al. 2024, https://kellerjordan.github.io/
posts/muon/), and NorMuon's rows of one size (arXiv 2510.05491).
"""

from collections.abc import Callable
from importlib.util import find_spec

import torch
from torch import Tensor

# x -> a x + b (x x^T) x + c (x x^T)^2 x, steep at 0: five steps bring singular values between 0.002 and 1 to between
# 0.68 and 1.13. torch.optim.Muon has the same.
COEFFICIENTS = (3.4445, -4.7750, 2.0315)
EPSILON = 1e-7  # of a matrix of zeros


def orthogonalise(matrix: Tensor, steps: int) -> Tensor:
    """U V^T of the singular value decomposition U S V^T of (..., rows, columns), in the dtype that it has.

    The product with the larger Gram matrix would be n^2 m instead of m^2 n: a tall matrix is turned around.
    """
    a, b, c = COEFFICIENTS
    tall = matrix.shape[-2] > matrix.shape[-1]
    x = matrix.mT if tall else matrix
    add = torch.addmm if x.ndim == 2 else torch.baddbmm
    symmetric = symmetric_product_of(x)
    x = x / torch.linalg.vector_norm(x, dim=(-2, -1), keepdim=True).clamp(min=EPSILON)
    for _ in range(steps):
        if symmetric is None:
            gram = x @ x.mT
            factor = add(gram, gram, gram, beta=b, alpha=c)
        else:
            gram = symmetric(x)
            factor = symmetric(gram, gram, alpha=c, beta=b)
        x = add(x, factor, x, beta=a)
    return x.mT if tall else x


def symmetric_product_of(x: Tensor) -> Callable[..., Tensor] | None:
    """src/optim/kernels/symmetric.py's, where it is faster than the library's for matrices like x."""
    if not x.is_cuda or find_spec("triton") is None:
        return None
    from src.optim.kernels.symmetric import is_faster, symmetric_product

    return symmetric_product if is_faster(x) else None


def of_heads(matrix: Tensor, steps: int, heads: tuple[int, int]) -> Tensor:
    """`orthogonalise` of each head's part of (rows, columns): as many blocks of rows (0) or of columns (1)."""
    count, axis = heads
    parts = matrix.unflatten(axis, (count, -1)).movedim(axis, 0)
    return orthogonalise(parts, steps).movedim(0, axis).flatten(axis, axis + 1)


def even_rows(matrix: Tensor, moment: Tensor, beta: float, epsilon: float) -> tuple[Tensor, Tensor]:
    """Rows divided by the root of a running mean of their squares, then all brought to a root mean square of 1.

    matrix (rows, columns), moment (rows, 1) float32 -> the same after this update.
    """
    wide = matrix.float()
    moment = moment * beta + wide.square().mean(-1, keepdim=True) * (1.0 - beta)
    wide = wide / (moment.sqrt() + epsilon)
    size = wide.square().mean().sqrt().clamp(min=EPSILON)
    return (wide / size).to(matrix.dtype), moment
