"""alpha x x^T + beta c, which is symmetric: a Triton kernel makes one half of it and writes that twice.

Of a Newton-Schulz step (src/optim/newton_schulz.py) two of three products are of this kind. On an H200 in bf16, beside
the library's whole product: x 4096 x 4096 0.110 beside 0.175 ms, 4096 x 14336 0.351 beside 0.583. Only imported where
there is a CUDA device, which brings Triton.
"""

import torch
import triton  # type: ignore[import-not-found,unused-ignore]
import triton.language as tl  # type: ignore[import-not-found,unused-ignore]
from torch import Tensor
from triton.tools.tensor_descriptor import (  # type: ignore[import-not-found,unused-ignore]
    TensorDescriptor,
)

BLOCK = 128  # rows and columns of a tile
INNER = 64  # columns of x of one turn of its loop
WARPS = 4
STAGES = 4
WAVES = 2  # tiles of a half for each multiprocessor, at least: 2048 x 8192 has one, 0.098 beside 0.095 ms
ALIGNED = 8  # columns of x and of the result: a tensor descriptor wants rows that begin at multiples of 16 bytes
HOPPER = 9  # first major version with tensor descriptors


@triton.jit  # type: ignore[untyped-decorator,unused-ignore]
def _half(  # type: ignore[no-untyped-def]  # noqa: ANN202
    x,  # noqa: ANN001
    c,  # noqa: ANN001
    out,  # noqa: ANN001
    rows,  # noqa: ANN001
    columns,  # noqa: ANN001
    alpha,  # noqa: ANN001
    beta,  # noqa: ANN001
    ADD: tl.constexpr,
    BLOCK: tl.constexpr,
    INNER: tl.constexpr,
):
    """Tile number i (i + 1) / 2 + j, of the rows of block i and the columns of block j <= i, and its mirror.

    All matrices lie row after row; a last block reads beyond its own, and what it makes of that is not written.
    """
    number = tl.program_id(0)
    matrix = tl.program_id(1)
    i = ((tl.sqrt(8.0 * number.to(tl.float32) + 1.0) - 1.0) * 0.5).to(tl.int32)
    i = tl.where((i + 1) * (i + 2) // 2 <= number, i + 1, i)  # the root was rounded
    i = tl.where(i * (i + 1) // 2 > number, i - 1, i)
    j = number - i * (i + 1) // 2
    total = tl.zeros((BLOCK, BLOCK), dtype=tl.float32)
    for start in range(0, columns, INNER):
        left = x.load([matrix * rows + i * BLOCK, start])
        right = x.load([matrix * rows + j * BLOCK, start])
        total = tl.dot(left, right.T, total)
    total *= alpha
    down = i * BLOCK + tl.arange(0, BLOCK)
    across = j * BLOCK + tl.arange(0, BLOCK)
    inside = (down < rows)[:, None] & (across < rows)[None, :]
    first = matrix.to(tl.int64) * rows * rows
    at = first + down.to(tl.int64)[:, None] * rows + across[None, :]
    if ADD:
        total += beta * tl.load(c + at, mask=inside, other=0.0).to(tl.float32)
    made = total.to(out.dtype.element_ty)
    tl.store(out + at, made, mask=inside)
    mirrored = first + across.to(tl.int64)[:, None] * rows + down[None, :]
    tl.store(out + mirrored, tl.trans(made), mask=tl.trans(inside))


def is_faster(x: Tensor) -> bool:
    """Whether half the product of x (rows, columns) or (count, rows, columns) is made faster than all of it."""
    if x.dtype != torch.bfloat16 or x.shape[-1] % ALIGNED or x.shape[-2] % ALIGNED:
        return False
    device = torch.cuda.get_device_properties(x.device)
    return device.major >= HOPPER and _tiles(x) >= WAVES * device.multi_processor_count


def symmetric_product(x: Tensor, c: Tensor | None = None, *, alpha: float = 1.0, beta: float = 0.0) -> Tensor:
    """alpha x x^T + beta c, for x as `is_faster` takes it and a symmetric c of the result's shape.

    Sums are float32, rounded once to the dtype of x.
    """
    *count, rows, columns = x.shape
    out = x.new_empty((*count, rows, rows))
    matrices = count[0] if count else 1
    with torch.cuda.device(x.device):
        _half[(_tiles(x) // matrices, matrices)](
            TensorDescriptor.from_tensor(x.contiguous().view(-1, columns), [BLOCK, INNER]),
            out if c is None else c,
            out,
            rows,
            columns,
            alpha,
            beta,
            ADD=c is not None,
            BLOCK=BLOCK,
            INNER=INNER,
            num_warps=WARPS,
            num_stages=STAGES,
        )
    return out


def _tiles(x: Tensor) -> int:
    """Of the halves of all matrices."""
    blocks = -(-x.shape[-2] // BLOCK)
    return blocks * (blocks + 1) // 2 * (x.shape[0] if x.ndim == 3 else 1)
