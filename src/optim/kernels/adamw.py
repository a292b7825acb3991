"""AdamW's update of many tensors by one Triton kernel: weights, moments and the copies that the passes read.

Each number is read and written once: 28 bytes a parameter with moments in fp32 and gradients and copies in bf16. Only
imported where there is a CUDA device, which brings Triton.
"""

from collections import deque
from collections.abc import Sequence

import torch
import triton  # type: ignore[import-not-found,unused-ignore]
import triton.language as tl  # type: ignore[import-not-found,unused-ignore]
from torch import Tensor

# Elements of one program, and of one turn of its loop: 4 a thread. TB/s on an H200, which copies at 4.31 (chunk, block,
# warps): 512, 512, 4: 4.04; 1024, 512, 4: 3.98; 4096, 1024, 8: 3.84; 4096, 512, 4: 3.71; 16384, 2048, 8: 2.81. Tables
# take 12 bytes a chunk: 53 MB for 4.5 billion parameters as it is, 107 MB with chunks of 512.
CHUNK = 1024
BLOCK = 512
WARPS = 4
COLUMNS = 5  # weight, gradient, first and second moment, copy
TYPES = {torch.float32: tl.float32, torch.bfloat16: tl.bfloat16, torch.float16: tl.float16}


@triton.jit  # type: ignore[untyped-decorator,unused-ignore]
def _update(  # type: ignore[no-untyped-def]  # noqa: ANN202
    pointers,  # noqa: ANN001
    sizes,  # noqa: ANN001
    tensors,  # noqa: ANN001
    firsts,  # noqa: ANN001
    factors,  # noqa: ANN001
    skip,  # noqa: ANN001
    beta2,  # noqa: ANN001
    rest1,  # noqa: ANN001
    rest2,  # noqa: ANN001
    eps,  # noqa: ANN001
    WEIGHT: tl.constexpr,
    GRADIENT: tl.constexpr,
    MOMENT: tl.constexpr,
    COPY: tl.constexpr,
    COPIES: tl.constexpr,
    CHUNK: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Loshchilov and Hutter 2019, algorithm 2, in float32. `rest`: 1 - beta, which float32 loses when it subtracts."""
    if tl.load(skip) != 0:
        return
    which = tl.load(tensors + tl.program_id(0))
    first = tl.load(firsts + tl.program_id(0))
    size = tl.load(sizes + which)
    row = pointers + which * 5
    weights = tl.multiple_of(tl.load(row).to(tl.pointer_type(WEIGHT)), 16)
    gradients = tl.multiple_of(tl.load(row + 1).to(tl.pointer_type(GRADIENT)), 16)
    means = tl.multiple_of(tl.load(row + 2).to(tl.pointer_type(MOMENT)), 16)
    squares = tl.multiple_of(tl.load(row + 3).to(tl.pointer_type(MOMENT)), 16)
    copies = tl.multiple_of(tl.load(row + 4).to(tl.pointer_type(COPY)), 16)
    shrink = tl.load(factors + which * 4)
    keep = tl.load(factors + which * 4 + 1)
    rate = tl.load(factors + which * 4 + 2)
    root = tl.load(factors + which * 4 + 3)
    for start in range(0, CHUNK, BLOCK):
        at = first + start + tl.arange(0, BLOCK)
        inside = at < size
        weight = tl.load(weights + at, mask=inside).to(tl.float32) * keep
        gradient = tl.load(gradients + at, mask=inside).to(tl.float32) * shrink
        mean = tl.load(means + at, mask=inside).to(tl.float32)
        square = tl.load(squares + at, mask=inside).to(tl.float32)
        mean = mean + (gradient - mean) * rest1
        square = square * beta2 + gradient * gradient * rest2
        weight = weight - rate * mean / (tl.sqrt(square) * root + eps)
        tl.store(weights + at, weight.to(WEIGHT), mask=inside)
        tl.store(means + at, mean.to(MOMENT), mask=inside)
        tl.store(squares + at, square.to(MOMENT), mask=inside)
        if COPIES:
            tl.store(copies + at, weight.to(COPY), mask=inside)


class Launch:
    """One kernel for tensors that share the types of their columns; the tables of what lies where stay on the device.

    `columns`: for each tensor its weight, two moments and copy (None where all have none), contiguous and aligned to
    16 bytes, as every allocation of torch's is; a copy, and then the gradient too, may be contiguous in each of the
    first axis' slices alone.
    """

    def __init__(self, columns: Sequence[tuple[Tensor, Tensor, Tensor, Tensor | None]]) -> None:
        self.weights = [weight for weight, *_ in columns]
        device = self.weights[0].device
        self._kept = columns
        self._slices = [1 if copy is None or copy.is_contiguous() else len(copy) for *_, copy in columns]
        self._fixed = [
            row
            for (weight, mean, square, copy), slices in zip(columns, self._slices, strict=True)
            for row in zip(
                *(_addresses(tensor, slices) for tensor in (weight, mean, square)),
                [0] * slices if copy is None else _addresses(copy, slices),
                strict=True,
            )
        ]
        slices = torch.tensor(self._slices, device=device)
        self._owners = torch.arange(len(columns), device=device).repeat_interleave(slices)
        numbers = (torch.tensor([weight.numel() for weight in self.weights], device=device) // slices)[self._owners]
        chunks = (numbers + CHUNK - 1) // CHUNK
        self._sizes = numbers
        which = torch.arange(len(numbers), dtype=torch.int32, device=device).repeat_interleave(chunks)
        before = (chunks.cumsum(0) - chunks)[which]
        self._tensors, self._firsts = which, (torch.arange(len(which), device=device) - before) * CHUNK
        _, mean, _, copy = columns[0]
        self._types = (self.weights[0].dtype, mean.dtype, torch.bfloat16 if copy is None else copy.dtype)
        self._copies = copy is not None
        # A CUDA graph reads its table at each replay, and while one is captured page-locked memory must not be let go
        # of: torch would record an event in the graph, which nobody may ask about later.
        self._tables: deque[Tensor] = deque(maxlen=4)

    def __call__(
        self, gradients: Sequence[Tensor], factors: Tensor, skip: Tensor, beta1: float, beta2: float, eps: float
    ) -> None:
        """`gradients`: of the same tensors, of one type; `factors`: (tensors, 4) float32; `skip`: change nothing."""
        places = [
            place
            for gradient, slices in zip(gradients, self._slices, strict=True)
            for place in _addresses(gradient, slices)
        ]
        rows = [
            (weight, place, mean, square, copy)
            for (weight, mean, square, copy), place in zip(self._fixed, places, strict=True)
        ]
        self._tables.append(torch.tensor(rows, dtype=torch.int64, pin_memory=True))
        table = self._tables[-1].to(skip.device, non_blocking=True)
        factors = factors if len(places) == len(gradients) else factors[self._owners]
        weight, moment, copy = (TYPES[dtype] for dtype in self._types)
        _update[(len(self._tensors),)](
            table,
            self._sizes,
            self._tensors,
            self._firsts,
            factors,
            skip,
            beta2,
            1.0 - beta1,
            1.0 - beta2,
            eps,
            WEIGHT=weight,
            GRADIENT=TYPES[gradients[0].dtype],
            MOMENT=moment,
            COPY=copy,
            COPIES=self._copies,
            CHUNK=CHUNK,
            BLOCK=BLOCK,
            num_warps=WARPS,
        )


def _addresses(tensor: Tensor, slices: int) -> list[int]:
    """Of the tensor, or of its slices along the first axis."""
    first = tensor.data_ptr()
    return [first] if slices == 1 else [first + each * tensor.stride(0) * tensor.itemsize for each in range(slices)]


def launches(
    columns: Sequence[tuple[Tensor, Tensor, Tensor, Tensor | None]], gradients: Sequence[torch.dtype]
) -> dict[tuple[int, ...], Launch]:
    """By the places in `columns` of the tensors of each: one launch for each mix of types."""
    kinds: dict[tuple[object, ...], list[int]] = {}
    for place, tensors in enumerate(columns):
        kind = (gradients[place], *(None if tensor is None else tensor.dtype for tensor in tensors))
        kinds.setdefault(kind, []).append(place)
    return {tuple(places): Launch([columns[place] for place in places]) for places in kinds.values()}
