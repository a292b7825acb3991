"""How fast a device is by itself: products and copies of a fixed size, timed without any other rank."""

import time
from collections.abc import Callable
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch

# Rows of a square product, repeated in a row and the best of some: 0.15 ms of an H100 each, 0.5 ms of a core. So small
# that a log step does not feel it, so large that a GPU must be at its clock.
_GPU_ROWS, _CPU_ROWS = 4096, 256
_IN_A_ROW, _BEST_OF = 8, 3
_COPY_BYTES = 1 << 28  # read and written: beyond any cache


def product_seconds(device: "torch.device") -> float:
    """Seconds of one product of two square matrices, in bfloat16 on a GPU; waits for the device."""
    import torch

    rows, dtype = (_GPU_ROWS, torch.bfloat16) if device.type == "cuda" else (_CPU_ROWS, torch.float32)
    left = torch.ones(rows, rows, device=device, dtype=dtype)
    result = torch.empty_like(left)
    with torch.no_grad():
        return best_seconds(lambda: torch.mm(left, left, out=result), device)


def copy_seconds(device: "torch.device") -> float:
    """Seconds of one copy of 256 MiB within the device's memory; waits for the device."""
    import torch

    source = torch.zeros(_COPY_BYTES, device=device, dtype=torch.uint8)
    target = torch.empty_like(source)
    return best_seconds(lambda: target.copy_(source), device)


def best_seconds(work: Callable[[], object], device: "torch.device") -> float:
    """Of `work` by itself, repeated a few times after a first one that warms up."""
    import torch

    def settle() -> None:
        if device.type == "cuda":
            torch.cuda.synchronize(device)

    work()
    found = []
    for _ in range(_BEST_OF):
        settle()
        began = time.perf_counter()
        for _ in range(_IN_A_ROW):
            work()
        settle()
        found.append((time.perf_counter() - began) / _IN_A_ROW)
    return min(found)
